"""The gate of a gated MLP: silu(gate) * up, from the one matrix product that gave both.

    gate_up [T, 2F]   | gate 0 .. F-1 | up 0 .. F-1 |
                              |              |
                           silu, rounded --> * --> out [T, F]       one program: COLUMNS of one row

Bytes per token: 3 * F * itemsize. Rounds where transformers does: silu's result, then the product.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr, out_ptr, in_stride, out_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program gates COLUMNS elements of one row."""
    row = tl.program_id(0).to(tl.int64)  # int64: T * 2F passes 2**31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate_ptr = gate_up_ptr + row * in_stride
    gate = tl.load(gate_ptr + column, mask=column < SIZE)  # [COLUMNS]
    up = tl.load(gate_ptr + SIZE + column, mask=column < SIZE)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + row * out_stride + column, (silu.to(tl.float32) * up.to(tl.float32)).to(up.dtype),
             mask=column < SIZE)  # fmt: skip


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, F] = silu(gate) * up, where gate_up [T, 2F] holds the gate's columns first.

    Raises ValueError unless F is a multiple of 8 and both tensors are of one type and device.
    """
    checks.require(gate_up.ndim == 2 and out.ndim == 2, "gate_up must be [T, 2F] and out [T, F]")
    num_tokens, size = out.shape
    checks.require(gate_up.shape == (num_tokens, 2 * size), f"gate_up has shape {tuple(gate_up.shape)}, out [T, F]: "
                   f"{tuple(out.shape)}; expected ({num_tokens}, {2 * size})")  # fmt: skip
    checks.require(size % 8 == 0, f"F = {size} is not a multiple of 8")
    checks.check_float("gate_up", gate_up, out)
    if num_tokens == 0:
        return
    config = configs.SILU[configs.device_class(out.device)]
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(size, config.columns))](
        gate_up, out, gate_up.stride(0), out.stride(0),
        SIZE=size, COLUMNS=config.columns, num_warps=config.num_warps,
    )  # fmt: skip
