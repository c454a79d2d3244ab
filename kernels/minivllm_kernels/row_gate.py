"""The first half of a gated MLP for one row: norm, the products with gate and up, silu(gate) * up, in one launch.

    weight [2F, K]   | gate 0 .. F-1 | up 0 .. F-1 |
                         | ROWS          | the same ROWS        one program reads both, so they meet in a register
                         +--- silu * ----+--->  ROWS elements of out [1, F]

Bytes: 2 * F * K * itemsize; x comes from the L2 cache. Rounds where activations.py does.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs
from minivllm_kernels.early_launch import can_launch_early, let_next_begin, wait_for_input
from minivllm_kernels.row_product import check_row
from minivllm_kernels.row_tiles import load_row, load_tiles, normalised, product


@triton.jit
def _row_gate_kernel(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, eps, weight_stride,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One program multiplies ROWS rows of gate, and the same of up, with x."""
    let_next_begin(IS_EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < F
    gate_rows = weight_ptr + row.to(tl.int64) * weight_stride  # int64: matrices pass 2**31 elements
    up_start = tl.full((), F, tl.int64) * weight_stride
    gate_tiles = load_tiles(gate_rows, is_row, K, COLUMNS)
    up_tiles = load_tiles(gate_rows + up_start, is_row, K, COLUMNS)
    norm = load_row(norm_ptr, K, COLUMNS)
    if bias_ptr is not None:
        gate_bias = tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)
        up_bias = tl.load(bias_ptr + F + row, mask=is_row, other=0.0).to(tl.float32)
    wait_for_input(IS_EARLY)
    x = normalised(load_row(x_ptr, K, COLUMNS), norm, eps, K)
    gate, up = product(gate_tiles, x), product(up_tiles, x)
    if bias_ptr is not None:
        gate += gate_bias
        up += up_bias
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row, (silu * up).to(dtype), mask=is_row)


def row_gate(
    x: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    eps: float,
    early: bool = False,
) -> None:
    """out [1, F] = silu(gate) * up; [gate, up] = x [1, K], normed with `norm` [K], times weight [2F, K], plus bias.

    `early` as in row_product. Raises ValueError for shapes, types or devices that do not fit together.
    """
    depth = check_row(x, weight, bias, norm)
    size = out.shape[-1]
    fits = out.shape == (1, size) and len(weight) == 2 * size
    checks.require(fits, f"out has shape {tuple(out.shape)}, expected (1, {len(weight) // 2})")
    checks.check_float("x", x, out)
    shape = configs.row_shape(x.device, depth * x.element_size(), is_gate=True)
    is_early = early and can_launch_early(x.device)
    _row_gate_kernel[(triton.cdiv(size, shape.rows),)](
        x, norm, weight, bias, out, eps, weight.stride(0), F=size, K=depth, ROWS=shape.rows,
        COLUMNS=shape.columns, IS_EARLY=is_early, num_warps=shape.num_warps, launch_pdl=is_early,
    )  # fmt: skip
