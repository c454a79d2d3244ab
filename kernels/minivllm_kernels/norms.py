"""RMSNorm over whole rows, alone or with the residual addition that comes before it.

    x        [T, h]  --+
                       +--> sum, rounded --> residual (in place)
    residual [T, h]  --+         |
                                 +--> * rsqrt(mean of squares + eps), rounded --> * weight --> out [T, h]

One program per row: it holds the row in registers, so every element is read once and written once.
Bytes per row: 4 * h * itemsize with the addition (6 as two kernels), 2 * h * itemsize without.
Rounds where transformers does: the sum, the normalised row and the product are each of the model's type.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs

MAX_WIDTH = 16384


@triton.jit
def _normalised(row, weight, eps, WIDTH: tl.constexpr):
    """row / rms(row) * weight in fp32 [PADDED]; entries past WIDTH must be zero."""
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / WIDTH + eps)
    return (row * scale).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, x_stride, out_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """One program normalises one row."""
    row = tl.program_id(0).to(tl.int64)  # int64: T * h passes 2**31
    column = tl.arange(0, PADDED)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < WIDTH, other=0.0)  # [PADDED]
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)  # before the sum: both loads under way
    out = _normalised(x.to(tl.float32), weight, eps, WIDTH)
    tl.store(out_ptr + row * out_stride + column, out.to(x.dtype), mask=column < WIDTH)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, x_stride, residual_stride, out_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program adds one row to the residual and normalises the sum."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    residual_ptr += row * residual_stride
    x = tl.load(x_ptr + row * x_stride + column, mask=column < WIDTH, other=0.0)  # [PADDED]
    residual = tl.load(residual_ptr + column, mask=column < WIDTH, other=0.0)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    out = _normalised(total.to(tl.float32), weight, eps, WIDTH)
    tl.store(residual_ptr + column, total, mask=column < WIDTH)
    tl.store(out_ptr + row * out_stride + column, out.to(x.dtype), mask=column < WIDTH)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over rows of x [T, h]; out may be x.

    Raises ValueError unless h is a multiple of 8 up to MAX_WIDTH and all tensors are of one type and device.
    """
    _check(x, weight, x, out)
    if len(x) == 0:
        return
    width = x.shape[1]
    padded = triton.next_power_of_2(width)
    _rms_norm_kernel[(len(x),)](
        x, weight, out, eps, x.stride(0), out.stride(0),
        WIDTH=width, PADDED=padded, num_warps=configs.norm_warps(x.device, padded),
    )  # fmt: skip


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float
) -> None:
    """residual += x, then out = rms_norm(residual), both [T, h]; out may be x, never residual.

    Raises ValueError as rms_norm does.
    """
    _check(x, weight, residual, out)
    if len(x) == 0:
        return
    checks.require(out.data_ptr() != residual.data_ptr(), "out must not be the residual: both are written")
    width = x.shape[1]
    padded = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(len(x),)](
        x, residual, weight, out, eps, x.stride(0), residual.stride(0), out.stride(0),
        WIDTH=width, PADDED=padded, num_warps=configs.norm_warps(x.device, padded),
    )  # fmt: skip


def _check(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
    """What both norms ask of their rows."""
    checks.require(x.ndim == 2, f"x has shape {tuple(x.shape)}, expected [T, h]")
    checks.require(residual.shape == x.shape and out.shape == x.shape, "x, residual and out must have the same shape")
    width = x.shape[1]
    checks.require(width % 8 == 0 and 0 < width <= MAX_WIDTH, f"width {width} is not a multiple of 8 up to {MAX_WIDTH}")
    checks.require(weight.shape == (width,), f"weight has shape {tuple(weight.shape)}, expected ({width},)")
    checks.check_float("x", x, weight, residual, out)
