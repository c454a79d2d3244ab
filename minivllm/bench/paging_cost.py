"""`python -m minivllm.bench.paging_cost --output FILE`: what reading K and V through a block table costs on this GPU.

One layer's decode attention in bf16, 32 query heads and 8 KV heads of size 128, over contexts, batches and block sizes:
blocks scattered over the pool, the same blocks in order, and contiguous keys for the same kernel and for torch's own.
Times are medians of CUDA-graph replays that rotate over more keys than the L2 cache holds; the roof is a copy measured
in the same process. GB/s counts K, V, q and out once. Outputs are compared with float64, and
a checksum of their bits is kept.
"""

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minivllm.bench.kernels import gpu_facts
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.provenance import provenance
from minivllm.text_files import write_text

if TYPE_CHECKING:
    from minivllm.bench.paging_layouts import Keys, Run

HEADS = (32, 8, 128)  # query heads, KV heads, head size: Llama-3-8B, Qwen3-8B
SHAPE = {"heads": HEADS[0], "kv_heads": HEADS[1], "head_size": HEADS[2], "dtype": "bfloat16"}
CONTEXTS, BATCHES = (256, 1024, 4096, 16384, 65536), (1, 8, 64)
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
IN_ORDER, FEW = (1, 16, 256), (16, 64, 256)  # block sizes where the curve needs no more points
GATHERED = 16  # the block size of the way without a paged kernel
GRAPH_BYTES, MOST_CALLS = 10**9, 200  # that one graph reads: the flush before it is then a small part
CHECKED = 2  # requests of which float64 makes the answer again

Row = dict[str, object]
Clock = Callable[["Sequence[Run]", int], tuple[float, float, float]]  # launches, bytes of one -> us: median, p20, p80


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long each figure may take."""

    contexts: Sequence[int] = CONTEXTS
    batches: Sequence[int] = BATCHES
    block_sizes: Sequence[int] = BLOCK_SIZES
    heads: tuple[int, int, int] = HEADS
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, print a table, write the result file."""
    parser = argparse.ArgumentParser(prog="python -m minivllm.bench.paging_cost", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="write figures and their provenance to this file")
    parser.add_argument("--milliseconds", type=int, default=20, help="for each figure (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError("paging_cost needs a CUDA device: a CPU only interprets the kernels")
    if not os.access(args.output.parent, os.W_OK):  # before a minute of measuring
        raise ConfigError(f"--output: {args.output.parent} is no folder that can be written; choose another")
    rows, roofs = measure(Settings(seed=args.seed), partial(timed, milliseconds=args.milliseconds))
    facts = provenance(args.seed) | gpu_facts() | {"command": " ".join([parser.prog, *argv])}
    write_text(args.output, file_text({"provenance": facts, "roofs": roofs}, rows), "figures")
    return 0


def live_figures(settings: Settings, milliseconds: int = 20) -> dict[str, object] | None:
    """This machine's figures in the form of the file, for a notebook; None without triton and a GPU that knows bf16."""
    if not find_spec("triton") or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        return None
    rows, roofs = measure(settings, partial(timed, milliseconds=milliseconds))
    return {"provenance": provenance(settings.seed) | gpu_facts(), "roofs": roofs, "shape": SHAPE, "rows": rows}


def measure(settings: Settings, clock: Clock) -> tuple[list[Row], dict[str, object]]:
    """All rows of this GPU, each printed as it is ready, and the roofs before and after."""
    from minivllm.bench.kernel_timing import measure_roofs, spread  # triton: only where there is a GPU

    device, start = torch.device("cuda", torch.cuda.current_device()), time.perf_counter()
    before, rows = measure_roofs(device), []
    print(f"{torch.cuda.get_device_name()}: copy {before.copy_gbps:.0f} GB/s")
    for batch, context in product(settings.batches, settings.contexts):
        for row in measure_point(batch, context, settings, device, clock):
            row["share"] = round(float(str(row["gbps"])) / before.copy_gbps, 4)
            rows.append(row)
            print(line(row), flush=True)
        torch.cuda.empty_cache()
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    after = measure_roofs(device)
    return rows, {"before": asdict(before), "after": asdict(after), "spread": round(spread(before, after), 4)}


def measure_point(batch: int, context: int, settings: Settings, device: torch.device, clock: Clock) -> Iterator[Row]:
    """The rows of one batch and context: every layout and kernel that runs here; nothing where they do not fit."""
    from minivllm.bench.paging_layouts import Keys

    query_heads, kv_heads, head_size = settings.heads
    num_bytes = 2 * settings.dtype.itemsize * batch * head_size * (context * kv_heads + query_heads)
    copies = copies_of(num_bytes) if device.type == "cuda" else 2
    if device.type == "cuda" and 4 * copies * num_bytes > torch.cuda.mem_get_info()[0]:  # the keys, a pool, copies
        print(f"batch {batch}, context {context}: left out, too large for this GPU", file=sys.stderr)
        return
    keys = Keys.random(batch, context, copies, settings.heads, device, settings.dtype, settings.seed)
    expected = reference(keys)
    for kernel, layout, block_size, runs, out in variants(keys, settings):
        try:
            answer = runs[0]()
            found = clock(runs, num_bytes)
        except RuntimeError as error:  # other people's code: not all of it runs everywhere or can be captured
            print(f"  {kernel} left out: {str(error).strip().splitlines()[0][:100]}", file=sys.stderr)
            continue
        answer = (answer if isinstance(answer, torch.Tensor) else out[:batch]).reshape(batch, query_heads, head_size)
        us, low_us, high_us = (round(value, 2) for value in found)
        yield {
            "kernel": kernel, "layout": layout, "block_size": block_size, "batch": batch, "context": context,
            "us": us, "low_us": low_us, "high_us": high_us, "gbps": round(num_bytes / found[0] / 1e3, 1),
            "error": float(f"{relative_error(answer[:CHECKED], expected):.1e}"), "bits": bits_of(answer),
        }  # fmt: skip


def variants(keys: "Keys", settings: Settings) -> "Iterator[tuple[str, str, int, Sequence[Run], torch.Tensor]]":
    """Kernel, layout, block size (0: contiguous), a launch for each copy, and the output that ours write."""
    from minivllm.bench import paging_layouts as layouts

    out = torch.full_like(keys.q, torch.nan)
    yield "plain", "contiguous", 0, layouts.contiguous_runs(keys, out), out
    for name, backend in layouts.BACKENDS.items():
        yield name, "contiguous", 0, layouts.sdpa_runs(keys, backend), out
    for block_size in settings.block_sizes:
        if block_size in IN_ORDER:
            layout = layouts.paged(keys, block_size, False)
            yield "plain", "in order", block_size, layouts.paged_runs(keys, layout, "plain", out.fill_(torch.nan)), out
            del layout
        layout = layouts.paged(keys, block_size, True, settings.seed)
        kernels = ["plain"] + ["engine"] * layouts.has_engine_kernel(keys, layout) + ["ragged"] * (block_size in FEW)
        for kernel in kernels:
            yield kernel, "scattered", block_size, layouts.paged_runs(keys, layout, kernel, out.fill_(torch.nan)), out
        if block_size == GATHERED:
            runs = layouts.gather_runs(keys, layout, layouts.BACKENDS["SDPA flash"])
            yield "gather, then SDPA flash", "scattered", block_size, runs, out


def copies_of(num_bytes: int) -> int:
    """Steps whose keys together exceed the L2 cache: one, if it does so alone."""
    from minivllm.bench.kernel_timing import L2_BYTES

    return max(1, min(-(-L2_BYTES // num_bytes), MOST_CALLS))


def timed(runs: "Sequence[Run]", num_bytes: int, milliseconds: int) -> tuple[float, float, float]:
    """Microseconds of one launch: median, p20, p80, from graphs that read enough for the flush before to be little."""
    from minivllm.bench.kernel_timing import time_rotating

    calls = max(len(runs), min(-(-GRAPH_BYTES // num_bytes), MOST_CALLS))
    found = time_rotating([runs[i % len(runs)] for i in range(calls)], milliseconds)
    return found.median_us, found.low_us, found.high_us


def reference(keys: "Keys") -> torch.Tensor:
    """The first requests' attention in float64, [CHECKED or fewer, H, D]."""
    count = min(CHECKED, keys.batch)
    group = keys.q.shape[1] // keys.k.shape[1]
    answers = []
    for row in range(count):
        q = keys.q[row].double().unflatten(0, (-1, group))  # [Hkv, group, D]
        probs = torch.softmax(q @ keys.k[row].double().mT / q.shape[-1] ** 0.5, dim=-1)
        answers.append((probs @ keys.v[row].double()).flatten(0, 1))
    return torch.stack(answers)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def bits_of(out: torch.Tensor) -> str:
    """A checksum of an output's bytes: equal for equal bits."""
    return f"{zlib.crc32(out.contiguous().view(torch.uint8).cpu().numpy().tobytes()):08x}"


def file_text(figures: dict[str, object], rows: Sequence[Row]) -> str:
    """The file: figures first, then one line a row."""
    lines = ",\n ".join(json.dumps(row) for row in rows)
    return json.dumps({**figures, "shape": SHAPE}, indent=1)[:-2] + f',\n "rows": [\n {lines}\n ]\n}}\n'


def line(row: Row) -> str:
    """One line of the table on the terminal."""
    place = f"{row['layout']}, block {row['block_size']}" if row["block_size"] else str(row["layout"])
    return (
        f"{row['batch']:>3} x {row['context']:<6} {row['kernel']:<24} {place:<22} {row['us']:>9} us "
        f"{row['gbps']:>7} GB/s {row['share']:<6} error {row['error']:<8} {row['bits']}"
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MiniVLLMError as error:
        sys.exit(f"paging_cost: {error}")
