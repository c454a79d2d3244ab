"""How long a kernel takes on the GPU: graph replays after an L2 flush, and the roofs that its share is taken of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from triton.testing import do_bench

Run = Callable[[], object]
SHORT_US = 20.0  # below it, a launch is too large a part of one replay
L2_BYTES = 3 * 60_000_000  # buffers beyond it push each other out of an H200's L2
FEWEST_CALLS, MOST_CALLS = 20, 200


@dataclass(frozen=True)
class Time:
    median_us: float
    low_us: float  # p20
    high_us: float  # p80


@dataclass(frozen=True)
class Roofs:
    """What this GPU reaches in this process: the measure of every share."""

    copy_gbps: float  # bytes read and written
    gemm_tflops: float


def measure_roofs(device: torch.device, num_bytes: int = 4 << 30, size: int = 8192, warm_ms: int = 1000) -> Roofs:
    """A copy of 4 GiB and a bf16 product of 8192 x 8192 matrices, random since zeros run faster, on a warm GPU."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in "ab")
    product = torch.empty_like(a)
    gemm_ms = do_bench(lambda: torch.mm(a, b, out=product), warmup=warm_ms, rep=300, return_mode="median")
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = do_bench(lambda: target.copy_(source), warmup=50, rep=200, return_mode="median")
    return Roofs(2 * source.nbytes / copy_ms / 1e6, 2 * size**3 / gemm_ms / 1e9)


def spread(before: Roofs, after: Roofs) -> float:
    """The larger relative change of the two roofs: above 0.03 the session is not to be trusted."""
    pairs = ((before.copy_gbps, after.copy_gbps), (before.gemm_tflops, after.gemm_tflops))
    return max(abs(last / first - 1) for first, last in pairs)


def time_once(run: Run, milliseconds: int) -> Time:
    """One replay of a CUDA graph, so without Python's launch, each after the L2 cache was flushed."""
    return _timed(capture([run]), milliseconds, calls=1)


def time_rotating(runs: Sequence[Run], milliseconds: int) -> Time:
    """Runs on inputs of their own back to back in one graph: what is left of launches in a real step."""
    return _timed(capture(runs), milliseconds, calls=len(runs))


def copies_needed(num_bytes: int) -> int:
    """Input sets that together exceed the L2 cache, a whole graph of them: copies_needed(2_000_000) == 91."""
    return min(max(L2_BYTES // num_bytes + 1, FEWEST_CALLS), MOST_CALLS)


def capture(runs: Sequence[Run]) -> Run:
    """A CUDA graph of the runs; its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and warms up outside the capture
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph.replay


def _timed(run: Run, milliseconds: int, calls: int) -> Time:
    times = do_bench(run, warmup=milliseconds // 4, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    return Time(*(1000 * time / calls for time in times))
