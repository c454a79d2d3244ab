"""`minivllm bench kernels`: each kernel's time, its share of what this GPU reaches, and rivals on the same inputs.

Roofs are measured in the same process before and after; if they differ by more than 3 % nothing here is to be trusted.
Times are medians of CUDA-graph replays with the L2 cache flushed; launches under 20 us rotate over inputs of their own.
GB/s and TFLOP/s count ideal bytes and visible scores, not what an implementation moves or wastes.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minivllm.errors import ConfigError
from minivllm.provenance import provenance

if TYPE_CHECKING:
    from minivllm.bench.kernel_shapes import Call, Case, Target
    from minivllm.bench.kernel_timing import Roofs

PARTS = ("read", "decode", "prefix", "prefill", "mla", "rows", "sampling")
WORST_SPREAD = 0.03


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    part: str
    what: str
    us: float  # the median
    low_us: float  # p20
    high_us: float  # p80
    speed: float
    unit: str
    share: float  # of the roof
    error: float  # against float64
    target: str
    rivals_us: dict[str, float]
    is_met: bool | None = None


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, print a table, write the result file."""
    parser = argparse.ArgumentParser(prog="minivllm bench kernels", description=__doc__)
    parser.add_argument(
        "--only", default="", help=f"parts or words of names, comma-separated; parts: {', '.join(PARTS)}"
    )
    parser.add_argument("--json", type=Path, help="write the figures and their provenance to this file")
    parser.add_argument("--quick", action="store_true", help="short measurements, no rivals")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ConfigError("bench kernels needs a CUDA device: a CPU only interprets the kernels")
    results, roofs = measure(args)
    if args.json:
        facts = provenance(args.seed) | gpu_facts()
        rows = [asdict(result) for result in results]
        args.json.write_text(json.dumps({"provenance": facts, "roofs": roofs, "rows": rows}, indent=1) + "\n")
    return 0


def measure(args: argparse.Namespace) -> tuple[list[Result], dict[str, object]]:
    """A result for each case, printed as it is ready, and the roofs before and after."""
    from minivllm.bench.kernel_timing import measure_roofs, spread  # triton: only where there is a GPU

    device, cases = torch.device("cuda", torch.cuda.current_device()), chosen(args.only)
    results: list[Result] = []
    before = measure_roofs(device)
    print(f"{torch.cuda.get_device_name()}: copy {before.copy_gbps:.0f} GB/s, GEMM {before.gemm_tflops:.0f} TFLOP/s")
    for case in cases:
        result = bench_case(case, device, before, args)
        results.append(replace(result, is_met=is_met(case.target, result, results)))
        print(line(results[-1]), flush=True)
        torch.cuda.empty_cache()
    after = measure_roofs(device)
    change = spread(before, after)
    print(f"afterwards: copy {after.copy_gbps:.0f} GB/s, GEMM {after.gemm_tflops:.0f} TFLOP/s, {change:.1%} apart")
    if change > WORST_SPREAD:
        print(f"The roofs moved by more than {WORST_SPREAD:.0%}: measure again on a quieter GPU.")
    return results, {"before": asdict(before), "after": asdict(after), "trusted": change <= WORST_SPREAD}


def chosen(only: str) -> "list[Case]":
    """Cases of the parts named, or with a word in their name; all for an empty string."""
    from minivllm.bench.kernel_read import read_cases  # triton: only where there is a GPU
    from minivllm.bench.kernel_rows import row_cases
    from minivllm.bench.kernel_shapes import attention_cases

    words, every = only.split(","), [*read_cases(), *attention_cases(), *row_cases()]
    cases = [case for case in every if any(word in f"{case.part} {case.name}" for word in words)]
    if not cases:
        raise ConfigError(f"--only: no case holds '{only}'; parts are {', '.join(PARTS)}")
    return cases


def bench_case(case: "Case", device: torch.device, roofs: "Roofs", args: argparse.Namespace) -> Result:
    """Check the output once, then time ours and the rivals."""
    from minivllm.bench.kernel_timing import SHORT_US, copies_needed, time_once, time_rotating  # triton

    milliseconds = 40 if args.quick else 200
    calls = [case.build(device, torch.bfloat16, args.seed)]
    calls[0].run()
    error = calls[0].check()
    time = time_once(calls[0].run, milliseconds)
    if time.median_us < SHORT_US:
        calls += [case.build(device, torch.bfloat16, args.seed + i) for i in range(1, copies_needed(case.num_bytes))]
        time = time_rotating([call.run for call in calls], milliseconds)
    rivals_us = {} if args.quick else time_rivals(calls, milliseconds)
    speed, share = rates(case, time.median_us, roofs)
    return Result(
        case.part, case.name, round(time.median_us, 1), round(time.low_us, 1), round(time.high_us, 1),
        speed, "TFLOP/s" if case.flops else "GB/s", share, float(f"{error:.1e}"), case.target.text, rivals_us,
    )  # fmt: skip


def time_rivals(calls: "Sequence[Call]", milliseconds: int) -> dict[str, float]:
    """Microseconds of each rival that a CUDA graph can hold; several calls are rotated over, as ours were."""
    from minivllm.bench.kernel_timing import time_once, time_rotating  # triton: only where there is a GPU

    found, runs = {}, [call.rivals() for call in calls]
    for name in runs[0]:
        turns = [run[name] for run in runs]
        try:
            time = time_rotating(turns, milliseconds) if len(turns) > 1 else time_once(turns[0], milliseconds)
        except RuntimeError as error:  # other people's code, and not all of it can be captured
            print(f"  {name} left out: {str(error).strip().splitlines()[0][:100]}", file=sys.stderr)
            continue
        found[name] = round(time.median_us, 1)
    return found


def rates(case: "Case", microseconds: float, roofs: "Roofs") -> tuple[float, float]:
    """Speed by ideal work and its share of the roof that binds: the copy, or the matrix product for a compute case."""
    speed, roof = case.num_bytes / microseconds / 1e3, roofs.copy_gbps
    if case.flops:
        speed, roof = case.flops / microseconds / 1e6, roofs.gemm_tflops
    return round(speed, 1), round(speed / roof, 3)


def is_met(target: "Target", result: Result, others: Sequence[Result]) -> bool | None:
    """Whether a result reaches its target; None if it has none, or its other case was not measured."""
    held = []
    if target.at_most_us is not None:
        held.append(result.us <= target.at_most_us)
    if target.least_tflops is not None:
        held.append(result.speed >= target.least_tflops)
    if target.least_share is not None:
        held.append(result.share >= target.least_share)
    if target.twin is not None:
        name, factor = target.twin
        held += [result.us <= factor * other.us for other in others if other.what == name]
    return all(held) if held else None


def line(result: Result) -> str:
    """One line of the table on the terminal."""
    goal = {True: "ok   ", False: "MISS ", None: ""}[result.is_met] + result.target
    time = f"{result.us:>8} us ({result.low_us} .. {result.high_us})"
    rivals = ", ".join(f"{name} {us}" for name, us in result.rivals_us.items())
    speed = f"{result.speed:>7} {result.unit:<7} {result.share:.3f} error {result.error:<8}"
    return f"{result.what:<46} {time:<32} {speed} {goal:<24} {rivals}".rstrip()


def gpu_facts() -> dict[str, object]:
    """What the CPU's provenance does not say: the GPU, the compiler, the rivals' versions."""
    from minivllm.bench.kernel_rivals import LIBRARIES  # beside the kernels' cases: only where there is a GPU

    facts: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "triton": version("triton"),
    }
    for library in LIBRARIES:
        try:
            facts[library] = version(library)
        except PackageNotFoundError:
            continue
    return facts
