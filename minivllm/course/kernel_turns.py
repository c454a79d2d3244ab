"""What a paged decode kernel did, program by program: the data that a recording holds and the kernel stepper draws.

Programs share the tiles of all (request, KV head) pairs equally. A program works through its stretch pair by pair: a
Turn for each tile of keys, then an End that writes the output, or stores a part of it where the pair was cut.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

from minivllm.errors import MiniVLLMError
from minivllm.text_files import read_text, write_text

LOG2_E = log2(2.718281828459045)  # the kernel's scores are in powers of two: score * log2(e)
DIGITS = 7  # of a float in a file: fp32 has no more
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class KernelCase:
    """The launch: the model's heads, the batch, and how the work was cut."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    num_blocks: int  # of the pool
    tile: int  # tokens
    num_programs: int
    num_tokens: tuple[int, ...]  # by request
    block_tables: tuple[tuple[int, ...], ...]  # by request, as many entries as it has blocks

    @property
    def group(self) -> int:
        """Query heads that share a KV head, and so a program's reads."""
        return self.num_heads // self.num_kv_heads

    @property
    def pairs(self) -> list[tuple[int, int, int]]:
        """(request, KV head, tiles), in the order of the line of tiles."""
        return [
            (request, head, max(1, -(-count // self.tile)))
            for request, count in enumerate(self.num_tokens)
            for head in range(self.num_kv_heads)
        ]

    @property
    def share(self) -> int:
        """Tiles of a program; the last ones may have fewer."""
        return -(-sum(tiles for _, _, tiles in self.pairs) // self.num_programs)


@dataclass(frozen=True)
class Turn:
    """One tile of one pair: what was read, and the running softmax after it, a row for each query head of the group."""

    program: int
    request: int
    kv_head: int
    start: int  # the tile's first token
    slots: tuple[int, ...]  # of the tokens that exist; the rest of the tile is masked
    k_offsets: tuple[int, ...]  # where each token's K begins, in elements from the start of the cache
    scores: Rows  # [group, tokens], scaled, in powers of two
    peak: tuple[float, ...]  # [group], in powers of two
    total: tuple[float, ...]  # [group]
    output: Rows  # [group, head size], not yet divided by `total`


@dataclass(frozen=True)
class End:
    """The end of a program's work on a pair."""

    program: int
    request: int
    kv_head: int
    slot: int | None  # of the workspace, for a part; None: the program had the whole pair and wrote its output
    lse: tuple[float, ...]  # [group], log2 of the softmax's sum
    output: Rows  # [group, head size], divided
    merged_slots: tuple[int, ...] = ()  # this part was the pair's last: these were merged, in order


Stage = Turn | End


@dataclass(frozen=True)
class KernelSteps:
    """A whole launch: the stages in the order in which they ran, and what was written."""

    case: KernelCase
    stages: tuple[Stage, ...]
    out: tuple[Rows, ...]  # [requests, heads, head size]
    origin: str  # one sentence: live, or which recording
    facts: Mapping[str, object] = field(default_factory=dict)  # machine, versions, commit, command

    @property
    def turns(self) -> list[Turn]:
        return [stage for stage in self.stages if isinstance(stage, Turn)]

    @property
    def ends(self) -> list[End]:
        return [stage for stage in self.stages if isinstance(stage, End)]

    def of_program(self, program: int) -> list[Stage]:
        return [stage for stage in self.stages if stage.program == program]

    def save(self, path: str | Path) -> Path:
        """Write the launch as JSON, a line for each stage."""
        whole = rounded(asdict(self))
        lines = ",\n".join(json.dumps(stage, separators=(",", ":")) for stage in whole.pop("stages"))
        text = json.dumps(whole, separators=(",", ":"))[:-1] + f',"stages":[\n{lines}\n]}}\n'
        return write_text(path, text, "kernel steps")

    @staticmethod
    def load(path: str | Path) -> "KernelSteps":
        """Read what `save` wrote. Raises MiniVLLMError that begins with the path for anything else."""
        return read_text(path, _parsed, "kernel steps")


def rounded(value: Any) -> Any:
    """Floats as short as fp32 allows, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def distinct_blocks(turn: Turn, block_size: int) -> list[int]:
    """Table entries that a turn reads, in order: one for each block that its tokens lie in."""
    blocks = [slot // block_size for slot in turn.slots]
    return blocks[:1] + [block for before, block in pairwise(blocks) if block != before]


def _parsed(text: str) -> KernelSteps:
    try:
        found = _tuples(json.loads(text))
        stages = [Turn(**stage) if "scores" in stage else End(**stage) for stage in found["stages"]]
        return KernelSteps(KernelCase(**found["case"]), tuple(stages), found["out"], found["origin"], found["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise MiniVLLMError(
            f"these are no kernel steps ({type(error).__name__}: {error}); record them again"
        ) from error


def _tuples(value: Any) -> Any:
    """Lists of JSON as tuples, at any depth."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
