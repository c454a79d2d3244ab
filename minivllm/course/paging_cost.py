"""What the block table costs: rows that `python -m minivllm.bench.paging_cost` measured, and what follows from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivllm.errors import MiniVLLMError
from minivllm.text_files import read_text

RECORDING = Path(__file__).parents[1] / "bench" / "results" / "paging_cost_h200.json"
CHIPS = {  # what the driver calls a GPU, and what the calculators do
    "NVIDIA H200": "h200-sxm", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA A100-SXM4-80GB": "a100-80gb-sxm",
    "NVIDIA A100-SXM4-40GB": "a100-40gb-sxm", "NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "NVIDIA B200": "b200-sxm",
}  # fmt: skip

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of a number


@dataclass(frozen=True)
class CostRow:
    """One kernel on one layout of the same keys."""

    kernel: str  # plain, engine, ragged, SDPA flash, SDPA cuDNN, or gather, then SDPA flash
    layout: str  # scattered, in order, contiguous
    block_size: int  # 0: contiguous
    batch: int  # requests
    context: int  # tokens of each
    us: float  # median
    low_us: float  # p20
    high_us: float  # p80
    gbps: float  # K, V, q and out once
    error: float  # against float64
    bits: str  # a checksum of the output
    share: float  # of the copy's bandwidth


@dataclass(frozen=True)
class PagingCost:
    """All rows of one GPU."""

    rows: tuple[CostRow, ...]
    shape: Mapping[str, object]  # heads, kv_heads, head_size, dtype
    copy_gbps: float
    facts: Mapping[str, object] = field(default_factory=dict)

    @staticmethod
    def load(path: str | Path = RECORDING) -> "PagingCost":
        """Read a result file. Raises MiniVLLMError that begins with the path for anything else."""
        return read_text(path, _parsed, "paging costs")

    @staticmethod
    def of(figures: Mapping[str, Any]) -> "PagingCost":
        """What minivllm/bench/paging_cost.py has just measured, or what a file holds of it."""
        rows = tuple(CostRow(**row) for row in figures["rows"])
        return PagingCost(rows, figures["shape"], figures["roofs"]["before"]["copy_gbps"], figures["provenance"])

    @property
    def batches(self) -> list[int]:
        return sorted({row.batch for row in self.rows})

    @property
    def block_sizes(self) -> list[int]:
        return sorted({row.block_size for row in self.rows} - {0})

    @property
    def gpu(self) -> str:
        return str(self.facts.get("gpu", "an unknown GPU"))

    @property
    def chip(self) -> str | None:
        """The GPU as the calculators name it, if they know it."""
        return CHIPS.get(self.gpu)

    @property
    def origin(self) -> str:
        """One line: which machine, commit and command."""
        return (
            f"{self.gpu}, commit {self.facts.get('commit')}, seed {self.facts.get('seed')}: {self.facts.get('command')}"
        )

    def contexts(self, batch: int) -> list[int]:
        return sorted({row.context for row in self.rows if row.batch == batch})

    def find(self, kernel: str, layout: str, batch: int, context: int, block_size: int = 0) -> CostRow | None:
        """The row of a launch, if it was measured."""
        wanted = (kernel, layout, 0 if layout == "contiguous" else block_size, batch, context)
        return next((r for r in self.rows if (r.kernel, r.layout, r.block_size, r.batch, r.context) == wanted), None)

    def row(self, kernel: str, layout: str, batch: int, context: int, block_size: int = 0) -> CostRow:
        """As `find`. Raises MiniVLLMError where nothing was measured."""
        found = self.find(kernel, layout, batch, context, block_size)
        if found is None:
            size = f" in blocks of {block_size}" if block_size else ""
            raise MiniVLLMError(f"{kernel}, {layout}{size}, was not measured for {batch} requests of {context} tokens")
        return found

    def overhead(self, row: CostRow) -> float:
        """How much longer than our own kernel takes on contiguous keys: 0.03 is 3 %."""
        return row.us / self.row("plain", "contiguous", row.batch, row.context).us - 1

    def num_bytes(self, row: CostRow) -> int:
        """What a launch moves, each byte once: K and V of all tokens, and q and out of one token for each request."""
        heads, kv_heads, head_size = (int(str(self.shape[key])) for key in ("heads", "kv_heads", "head_size"))
        numbers = 2 * row.context * kv_heads * head_size + 2 * heads * head_size
        return row.batch * numbers * BYTES[str(self.shape["dtype"])]

    def exercise_facts(self, row: CostRow) -> dict[str, object]:
        """A row as exercise 06.6 wants it; nothing for a GPU whose data sheet is not known: then it draws numbers."""
        if self.chip is None:
            return {}
        shape = {"num_kv_heads": self.shape["kv_heads"], "head_size": self.shape["head_size"], "chip": self.chip}
        return {"time_us": row.us, "num_requests": row.batch, "num_tokens": row.context, **shape}

    def same_bits(self, kernel: str = "plain") -> list[tuple[int, int, int]]:
        """(batch, context, number of layouts) for each point at which all layouts gave a kernel the same bits."""
        points = sorted({(row.batch, row.context) for row in self.rows})
        bits = [[r.bits for r in self.rows if r.kernel == kernel and (r.batch, r.context) == point] for point in points]
        return [(*point, len(found)) for point, found in zip(points, bits, strict=True) if len(set(found)) == 1]


def net_gain(overhead: float, attention_share: float, times_as_many: float) -> float:
    """Tokens per second of a step that holds more requests and whose attention got slower: both as factors and shares.

    net_gain(0.25, 0.2, 2) == 2 / 1.05. The rest of the step is taken to last as long as before.
    """
    return times_as_many / (1 + overhead * attention_share)


def _parsed(text: str) -> PagingCost:
    try:
        return PagingCost.of(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise MiniVLLMError(
            f"these are no paging costs ({type(error).__name__}: {error}); measure them again"
        ) from error
