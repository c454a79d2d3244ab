"""Inputs for kernel tests: paged caches with shuffled blocks, and NaN wherever no kernel may look."""

import math
import os
from dataclasses import dataclass

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: one mode per process
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}  # relative, norm-wise


@dataclass(frozen=True)
class PagedCase:
    """One step's attention inputs; names and shapes as in minivllm_kernels."""

    q: torch.Tensor  # [T, H, D]
    k_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [B, M] int32
    num_tokens: torch.Tensor  # [B] int32
    query_starts: torch.Tensor  # [B + 1] int32


def paged_case(
    num_new: list[int],
    num_tokens: list[int],
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    is_head_major: bool = True,
) -> PagedCase:
    """Random q, K and V; physical blocks shuffled over a pool twice as large, every unused slot NaN.

    `is_head_major` stores a block as [Hkv, block_size, D] behind the same logical shape.
    """
    random = torch.Generator().manual_seed(seed)
    num_blocks = [-(-total // block_size) for total in num_tokens]
    pool = 2 * sum(num_blocks) + 2
    shape = (pool, heads[1], block_size, head_size) if is_head_major else (pool, block_size, heads[1], head_size)
    caches = [torch.full(shape, math.nan, dtype=dtype) for _ in "kv"]
    k_cache, v_cache = (cache.transpose(1, 2) if is_head_major else cache for cache in caches)
    free = (torch.randperm(pool - 1, generator=random) + 1).tolist()
    table = torch.zeros(len(num_tokens), max(1, *num_blocks), dtype=torch.int32)
    for row, total in enumerate(num_tokens):
        for column in range(num_blocks[row]):
            block = table[row, column] = free.pop()
            used = min(block_size, total - column * block_size)
            for cache in (k_cache, v_cache):
                cache[block, :used] = torch.randn(used, heads[1], head_size, generator=random).to(dtype)
    q = torch.randn(sum(num_new), heads[0], head_size, generator=random).to(dtype)
    starts = torch.tensor([0, *num_new]).cumsum(0).int()
    tensors = (q, k_cache, v_cache, table, torch.tensor(num_tokens, dtype=torch.int32), starts)
    return PagedCase(*(_to_device(tensor) for tensor in tensors))


def _to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the device with the same strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return copy.copy_(tensor)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected|, norm-wise, in float64; NaN counts as infinite."""
    difference = (out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float(difference.nan_to_num(math.inf))
