"""Attention of one row with norm, RoPE and the store in it, against the two kernels that do it for many rows."""

import math
from typing import Any

import pytest
import torch
from minivllm_kernels.paged_decode import paged_decode
from minivllm_kernels.row_attention import row_attention
from minivllm_kernels.store_kv import qk_norm_rope_store
from minivllm_kernels.workspace import SplitWorkspace

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, paged_case, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
MAX_POSITION = 700
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # output, K cache, V cache


def attend(
    length: int, heads: tuple[int, int], head_size: int, block_size: int, dtype: torch.dtype,
    *, window: int | None = None, has_norm: bool = True, is_stored: bool = True, is_padding: bool = False,
) -> tuple[Result, Result]:  # fmt: skip
    """By one launch, and by two; each slot that no key is in holds NaN, the new key's own slot too."""
    case = paged_case([1], [length], heads, head_size, block_size, dtype)
    random = torch.Generator().manual_seed(length)
    last = length - 1
    block, offset = int(case.block_table[0, last // block_size]), last % block_size
    for cache in (case.k_cache, case.v_cache):
        cache[block, offset] = math.nan if is_stored else 0.5
    qkv = torch.randn(1, (heads[0] + 2 * heads[1]) * head_size, generator=random).to(DEVICE, dtype)
    q_norm, k_norm = (torch.randn(head_size, generator=random).to(DEVICE, dtype) if has_norm else None for _ in "qk")
    cos_sin = torch.randn(MAX_POSITION, head_size, generator=random).to(DEVICE)
    position, slot, num_tokens = (
        torch.tensor([value], dtype=torch.int32, device=DEVICE)
        for value in (
            -1 if is_padding else last,
            block * block_size + offset if is_stored and not is_padding else -1,
            0 if is_padding else length,
        )
    )
    workspace = SplitWorkspace.allocate(DEVICE, 0, heads[0] // heads[1], head_size)

    def fresh() -> Result:
        return torch.full_like(case.q, math.nan), case.k_cache.clone(), case.v_cache.clone()

    found, expected = fresh(), fresh()
    row_attention(
        qkv, q_norm, k_norm, cos_sin, position, slot, found[1], found[2], case.block_table, num_tokens, found[0],
        workspace, eps=1e-3, window=window,
    )  # fmt: skip
    q = torch.zeros_like(case.q)
    qk_norm_rope_store(
        qkv, q_norm, k_norm, cos_sin, position, slot, q, expected[1], expected[2],
        num_heads=heads[0], num_kv_heads=heads[1], eps=1e-3,
    )  # fmt: skip
    paged_decode(q, expected[1], expected[2], case.block_table, num_tokens, expected[0], workspace, window=window)
    assert workspace.arrivals.count_nonzero() == 0
    return found, expected


CASES: dict[str, tuple[tuple[int, tuple[int, int], int, int], dict[str, Any]]] = {
    "one part": ((65, (4, 2), 64, 16), {}),
    "parts": ((150, (4, 2), 64, 16), {}),
    "many parts": ((640, (9, 3), 64, 8), {"has_norm": False}),
    "one key": ((1, (4, 1), 80, 16), {}),
    "tile's end": ((129, (2, 2), 64, 16), {"has_norm": False}),
    "block 1": ((40, (4, 2), 64, 1), {}),
    "window": ((150, (6, 2), 64, 16), {"window": 30, "has_norm": False}),
    "window of one": ((65, (4, 2), 128, 32), {"window": 1}),
    "window of two": ((65, (4, 2), 128, 32), {"window": 2}),
    "window over all": ((40, (4, 2), 96, 32), {"window": 64}),
    "d 256": ((100, (2, 1), 256, 16), {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_cache_are_those_of_two_launches(name: str, dtype: torch.dtype) -> None:
    shape, options = CASES[name]
    found, expected = attend(*shape, dtype, **options)
    assert relative_error(found[0], expected[0]) < 2 * TOLERANCE[dtype]  # each is off by its own roundings
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert relative_error(mine.nan_to_num(), theirs.nan_to_num()) < TOLERANCE[dtype] / 10


def test_a_row_of_padding_stores_nothing_and_gives_zeros() -> None:
    found, expected = attend(20, (4, 2), 64, 16, torch.float16, is_padding=True)
    assert found[0].count_nonzero() == expected[0].count_nonzero() == 0
    assert all(mine.isnan().equal(theirs.isnan()) for mine, theirs in zip(found[1:], expected[1:], strict=True))


def test_without_a_slot_the_cache_stays_as_it_was() -> None:
    found, expected = attend(20, (4, 2), 64, 16, torch.float16, is_stored=False)
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert not found[0].isnan().any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = paged_case([1], [20], dtype=torch.float32)
    workspace = SplitWorkspace.allocate(DEVICE, 0, 2, 64)
    index, cos_sin = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(30, 64, device=DEVICE)
    qkv, norm = torch.zeros(1, 8 * 64, device=DEVICE), torch.zeros(64, device=DEVICE)

    def refused(message: str, **changes: torch.Tensor | None) -> None:
        given = {
            "qkv": qkv, "q_norm": norm, "k_norm": norm, "cos_sin": cos_sin, "position": index, "slot": index,
            "k_cache": case.k_cache, "v_cache": case.v_cache, "block_table": case.block_table,
            "num_tokens": case.num_tokens, "out": case.q, "workspace": workspace,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            row_attention(**given | changes, eps=1e-6)  # type: ignore[arg-type]

    refused(r"qkv has shape \(1, 448\)", qkv=qkv[:, :448])
    refused("both norm weights or neither", k_norm=None)
    refused(r"norm weights must be \[64\]", q_norm=norm[:32], k_norm=norm[:32])
    refused("cos_sin has shape", cos_sin=cos_sin[:, :32])
    refused("slot is torch.int64", slot=index.long())
    refused("num_tokens has shape", num_tokens=case.num_tokens.repeat(2))
    refused("out must be a contiguous", out=case.q.repeat(2, 1, 1))
