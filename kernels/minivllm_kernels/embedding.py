"""The first row of a step: each token's embedding, of tokens too that only the device knows.

    token_ids [T]    7   -1   42   -3            a negative one, -1 - r, is what row r of the last step chose
                         |          |
    chosen    [R]        0: 15      2: 99        so a step can be launched before anybody has read the last one's tokens
                         v          v
    tokens           7   15   42   99   -->  rows of the table  -->  out [T, H]

Bytes per token: 2 * H * itemsize.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks

COLUMNS, NUM_WARPS = 1024, 4


@triton.jit
def _embed_kernel(
    token_ids_ptr, chosen_ptr, table_ptr, out_ptr, table_stride, out_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """One program copies COLUMNS elements of one token's row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(token_ids_ptr + row)
    if token < 0:
        token = tl.load(chosen_ptr - 1 - token)
    elements = tl.load(table_ptr + token.to(tl.int64) * table_stride + column, mask=column < SIZE)
    tl.store(out_ptr + row * out_stride + column, elements, mask=column < SIZE)


def embed(token_ids: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, H] = rows of table [V, H] by int32 token_ids [T]; -1 - r stands for int32 chosen[r].

    Raises ValueError for shapes, types or devices that do not fit together; token ids are not looked at.
    """
    checks.require(table.ndim == 2 and out.shape == (len(token_ids), table.shape[1]), "out must be [T, H]")
    checks.require(token_ids.dtype == chosen.dtype == torch.int32, "token_ids and chosen must be int32")
    checks.require(token_ids.is_contiguous() and chosen.is_contiguous(), "token_ids and chosen must be contiguous")
    checks.check_float("table", table, out)
    if len(token_ids) == 0:
        return
    size = table.shape[1]
    _embed_kernel[(len(token_ids), triton.cdiv(size, COLUMNS))](
        token_ids, chosen, table, out, table.stride(0), out.stride(0), SIZE=size, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
