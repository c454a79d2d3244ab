"""What only a GPU can show: errors beside those of a flash kernel, CUDA graphs, memory that nobody may touch."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.kernel_cases import DEVICE, PagedCase, paged_case, relative_error
from tests.kernel_launches import LAUNCHES, launch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90"
)
MOST_TIMES_FLASH = 1.5  # the error a paged kernel may have, in those of torch's flash kernel on the same numbers


def attention_in_torch(case: PagedCase, dtype: torch.dtype, backend: SDPBackend) -> torch.Tensor:
    """Each request alone on gathered keys and values: torch's flash kernel in bf16, or its own formula in float64."""
    out = torch.empty_like(case.q, dtype=dtype)
    group = case.q.shape[1] // case.k_cache.shape[2]
    for row, total in enumerate(case.num_tokens.tolist()):
        first, last = case.query_starts[row : row + 2].tolist()
        keys, values = (
            cache[case.block_table[row].long()].flatten(0, 1)[:total].to(dtype).repeat_interleave(group, 1)
            for cache in (case.k_cache, case.v_cache)
        )
        q = case.q[first:last].to(dtype)
        is_visible = (
            torch.arange(total, device=q.device) <= torch.arange(total - len(q), total, device=q.device)[:, None]
        )
        q, keys, values = (tensor.transpose(0, 1)[None] for tensor in (q, keys, values))
        is_square = last - first == total
        with sdpa_kernel(backend):
            mask = None if is_square or last - first == 1 else is_visible
            attended = scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=is_square)
        out[first:last] = attended[0].transpose(0, 1)
    return out


DECODE = ([1] * 4, [4000, 63, 1025, 1])
PROMPTS = ([700, 1, 333], [700, 1, 333])  # whole prompts: what torch's flash kernel takes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("paged_decode", DECODE),
        ("paged_decode, fixed split", DECODE),
        pytest.param("paged_decode_hopper", DECODE, marks=HOPPER),
        ("paged_attention", PROMPTS),
        pytest.param("paged_attention_hopper", PROMPTS, marks=HOPPER),
    ],
)
def test_error_is_at_most_that_of_a_flash_kernel(
    name: str, lengths: tuple[list[int], list[int]], head_size: int, seed: int
) -> None:
    case = paged_case(*lengths, heads=(8, 2), head_size=head_size, dtype=torch.bfloat16, seed=seed, block_size=64)
    exact = attention_in_torch(case, torch.float64, SDPBackend.MATH)
    flash = relative_error(attention_in_torch(case, torch.bfloat16, SDPBackend.FLASH_ATTENTION), exact)
    assert relative_error(launch(name, case)(), exact) <= MOST_TIMES_FLASH * flash


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_call_allocates_nothing_and_replays_after_the_lengths_change(name: str) -> None:
    if "hopper" in name and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs sm_90")
    num_new = [1] * 4 if "decode" in name else [5, 1, 64, 2]
    case, other = (
        paged_case(num_new, totals, heads=(8, 2), dtype=torch.bfloat16, seed=seed, block_size=64)
        for seed, totals in enumerate(([300, 20, 200, 90], [70, 150, 64, 300]))
    )
    pools = max(len(case.k_cache), len(other.k_cache))
    case, other = (grown(each, pools) for each in (case, other))
    run = launch(name, case)
    run()  # compiles
    num_allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    run()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == num_allocations
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for field in ("q", "k_cache", "v_cache", "block_table", "num_tokens"):
        getattr(case, field).copy_(getattr(other, field))
    graph.replay()
    assert torch.equal(replayed, launch(name, other)())


def grown(case: PagedCase, num_blocks: int) -> PagedCase:
    """The same requests over a pool of `num_blocks` and tables five blocks wide."""
    caches = []
    for cache in (case.k_cache, case.v_cache):
        larger = torch.full((num_blocks, *cache.transpose(1, 2).shape[1:]), math.nan, dtype=cache.dtype, device=DEVICE)
        larger = larger.transpose(1, 2)
        larger[: len(cache)] = cache
        caches.append(larger)
    table = torch.zeros(len(case.block_table), 5, dtype=torch.int32, device=DEVICE)
    table[:, : case.block_table.shape[1]] = case.block_table
    return PagedCase(case.q, caches[0], caches[1], table, case.num_tokens, case.query_starts)


# Racecheck reports how Triton's warp_specialize hands its worker warps their parts, in every Gluon kernel: NOTES.md.
@pytest.mark.parametrize(("tool", "left_out"), [("memcheck", "none"), ("synccheck", "none"), ("racecheck", "hopper")])
def test_compute_sanitizer_finds_nothing(tool: str, left_out: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    command: list[str] = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.kernel_launches",
        left_out,
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-2000:]
    assert "attention kernels ran" in found.stdout
