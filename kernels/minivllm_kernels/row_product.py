"""The product of one row with a matrix, norm before it and addition after it: a single request's step, piece by piece.

    weight [N, K]        x [1, K]
    +--------------+     +-----------+
    | ROWS of it   |  .  | all of it |  -->  ROWS elements of out [1, N]     one program
    +--------------+     +-----------+
Every program norms x anew: a few kB from the L2 cache, where a kernel of its own would take as long as a small product.
Lanes hold partial sums over K in fp32: no tensor cores, whose tiles of 64 rows and more leave many multiprocessors
without work. The weight is on its way before x is there (early_launch.py).
Bytes: N * K * itemsize; x comes from the L2 cache.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs
from minivllm_kernels.early_launch import can_launch_early, let_next_begin, wait_for_input
from minivllm_kernels.row_tiles import added, load_row, load_tiles, normalised, product


@triton.jit
def _row_product_kernel(
    x_ptr, plus_ptr, norm_ptr, weight_ptr, bias_ptr, add_to_ptr, out_ptr, eps, weight_stride,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One program multiplies ROWS rows of the weight with x."""
    let_next_begin(IS_EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < N
    tiles = load_tiles(weight_ptr + row.to(tl.int64) * weight_stride, is_row, K, COLUMNS)  # int64: passes 2**31
    if norm_ptr is not None:
        norm = load_row(norm_ptr, K, COLUMNS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, mask=is_row, other=0.0)
    wait_for_input(IS_EARLY)
    x = load_row(x_ptr, K, COLUMNS)
    if add_to_ptr is not None:
        residual = tl.load(add_to_ptr + row, mask=is_row, other=0.0)
    if plus_ptr is not None:
        x = added(x, load_row(plus_ptr, K, COLUMNS))
    if norm_ptr is not None:
        x = normalised(x, norm, eps, K)
    out = product(tiles, x)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        out += bias.to(tl.float32)
    if add_to_ptr is not None:
        out = out.to(dtype).to(tl.float32) + residual.to(tl.float32)
    tl.store(out_ptr + row, out.to(dtype), mask=is_row)


def row_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    plus: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    add_to: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """out [1, N] = x [1, K] times weight [N, K] transposed, plus bias [N] if any.

    x is first added to `plus` [1, K] and normed with the weight `norm` [K]; the result is added to `add_to` [1, N],
    which may be `out`: each if it is given. `early`: begin beside the kernel in front, which must not write weights.
    Raises ValueError for shapes, types or devices that do not fit together.
    """
    depth = check_row(x, weight, bias, norm, plus)
    size = len(weight)
    for name, rows in (("out", out), ("add_to", add_to)):
        shape_fits = rows is None or rows.shape == (1, size)
        checks.require(shape_fits, f"{name} has shape {None if rows is None else tuple(rows.shape)}, not (1, {size})")
    checks.check_float("x", x, out, *(tensor for tensor in (add_to,) if tensor is not None))
    shape = configs.row_shape(x.device, depth * x.element_size())
    is_early = early and can_launch_early(x.device)
    _row_product_kernel[(triton.cdiv(size, shape.rows),)](
        x, plus, norm, weight, bias, add_to, out, eps, weight.stride(0), N=size, K=depth, ROWS=shape.rows,
        COLUMNS=shape.columns, IS_EARLY=is_early, num_warps=shape.num_warps, launch_pdl=is_early,
    )  # fmt: skip


def check_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    plus: torch.Tensor | None = None,
) -> int:
    """What a row and the matrix it is multiplied with must be; K."""
    checks.require(x.ndim == weight.ndim == 2 and len(x) == 1, "x must be [1, K] and weight [N, K]")
    size, depth = weight.shape
    checks.require(x.shape[1] == depth, f"x has {x.shape[1]} columns, weight has {depth}")
    checks.require(bias is None or bias.shape == (size,), f"bias must be [{size}]")
    checks.require(norm is None or norm.shape == (depth,), f"norm must be [{depth}]")
    checks.require(plus is None or plus.shape == x.shape, f"plus must be [1, {depth}]")
    checks.check_float("x", x, weight, *(tensor for tensor in (bias, norm, plus) if tensor is not None))
    return depth
