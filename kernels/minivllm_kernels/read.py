"""Reading and nothing else: the least that any kernel can take for so many bytes, and the simplest kernel there is.

    x     [programs, TILE * TILES]     one row a program: short ones, handed to whichever SM is free
    sums  [programs] fp32              so that the compiler may not leave the loads out

Bytes per element: its own.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels.checks import check_float, require

TILE, TILES = 4096, 4  # elements at a time, and how often


@triton.jit
def _read_kernel(x_ptr, sums_ptr, TILE: tl.constexpr, TILES: tl.constexpr):
    """One program sums one row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(TILES):
        total += tl.load(x_ptr + (row * TILES + tile) * TILE + tl.arange(0, TILE)).to(tl.float32)
    tl.store(sums_ptr + row, tl.sum(total))


def read_sums(x: torch.Tensor, sums: torch.Tensor) -> None:
    """sums [programs] = the sums of the rows of x [programs, TILE * TILES], contiguous. Raises ValueError otherwise."""
    check_float("x", x)
    require(sums.dtype == torch.float32 and sums.device == x.device, "sums must be fp32, on the device of x")
    require(x.ndim == 2 and x.shape[1] == TILE * TILES, f"x has shape {tuple(x.shape)}, expected [.., {TILE * TILES}]")
    is_row = sums.shape == x.shape[:1] and sums.is_contiguous()
    require(x.is_contiguous() and is_row, "x and sums must be contiguous, and sums as long as x")
    _read_kernel[(len(x),)](x, sums, TILE=TILE, TILES=TILES, num_warps=8)
