"""The product of one row with a matrix: what a single request's step consists of, at the memory's speed.

    weight [N, K]        x [1, K]
    +--------------+     +-----------+
    | ROWS of it   |  .  | all of it |  -->  ROWS elements of out [1, N]     one program
    +--------------+     +-----------+
Lanes hold partial sums over K in fp32 and are added up once, at the end: no tensor cores, whose tiles of 64 rows and
more leave many multiprocessors without work.
Bytes: N * K * itemsize; x comes from the L2 cache.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks

ROWS, COLUMNS, NUM_WARPS = 2, 1024, 4  # the best of eight choices for four matrices on an H200 (NOTES.md)


@triton.jit
def _row_product_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, weight_stride,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program multiplies ROWS rows of the weight with x."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < N
    weight_rows = weight_ptr + row.to(tl.int64)[:, None] * weight_stride  # int64: matrices pass 2**31 elements
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, K, COLUMNS):
        is_there = first + column < K
        mask = is_row[:, None] & is_there[None, :]
        weight = tl.load(weight_rows + first + column[None, :], mask=mask, other=0.0)
        x = tl.load(x_ptr + first + column, mask=is_there, other=0.0)
        sums += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(sums, axis=1)  # [ROWS]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=is_row)


def row_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [1, N] = x [1, K] times weight [N, K] transposed, plus bias [N] if any.

    Raises ValueError for shapes, types or devices that do not fit together.
    """
    checks.require(x.ndim == weight.ndim == 2 and len(x) == 1, "x must be [1, K] and weight [N, K]")
    size, depth = weight.shape
    checks.require(x.shape[1] == depth, f"x has {x.shape[1]} columns, weight has {depth}")
    checks.require(out.shape == (1, size), f"out has shape {tuple(out.shape)}, expected (1, {size})")
    checks.require(bias is None or bias.shape == (size,), f"bias must be [{size}]")
    checks.check_float("x", x, weight, out, *([] if bias is None else [bias]))
    _row_product_kernel[(triton.cdiv(size, ROWS),)](
        x, weight, bias, out, weight.stride(0), N=size, K=depth, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
