"""Attention of several queries per request against float64: mixed lengths, odd shapes, NaN wherever no key lies."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from minivllm_kernels.attention_configs import AttentionConfig
from minivllm_kernels.paged_attention import UNSEEN, paged_attention
from minivllm_kernels.reference import paged_attention_twin

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, PagedCase, paged_case, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []

# A prompt, a chunk on a prefix, drafts to verify, a decode, a prompt of one token, a padded row: one launch.
MIXED = ([33, 20, 5, 1, 1, 0], [33, 97, 40, 130, 1, 0])
SMALL_TILES = AttentionConfig(rows=32, tile_bytes=4096, num_warps=4, num_stages=2)
BY_POINTERS = AttentionConfig(rows=64, tile_bytes=16384, num_warps=4, num_stages=2)
BY_BOX = replace(BY_POINTERS, box=BY_POINTERS)


def attend(case: PagedCase, max_query_len: int | None = None, **options: Any) -> torch.Tensor:
    """What `paged_attention` writes over NaN."""
    out = torch.full_like(case.q, math.nan)
    longest = max_query_len or max(1, int(case.query_starts.diff().max()))
    paged_attention(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, out,
        max_query_len=longest, **options,
    )  # fmt: skip
    return out


def twin(case: PagedCase, **options: Any) -> torch.Tensor:
    return paged_attention_twin(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_chunks_drafts_and_decodes_share_a_launch(dtype: torch.dtype) -> None:
    case = paged_case(*MIXED, dtype=dtype)
    assert relative_error(attend(case), twin(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (9, 3), (8, 1), (33, 1)], ids=str)
def test_any_ratio_of_query_to_kv_heads(heads: tuple[int, int]) -> None:
    case = paged_case([7, 3, 1], [7, 40, 20], heads=heads)
    assert relative_error(attend(case, config=SMALL_TILES), twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 64])
def test_every_head_size_by_pointers_and_by_box(head_size: int, block_size: int) -> None:
    case = paged_case([9, 5], [9, 70], (2, 1), head_size, block_size, dtype=torch.float16)
    assert relative_error(attend(case, config=BY_BOX), twin(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("block_size", [1, 8, 32, 128, 256])
@pytest.mark.parametrize("is_head_major", [True, False], ids=["head-major", "slot-major"])
def test_every_block_size_in_both_layouts(block_size: int, is_head_major: bool) -> None:
    case = paged_case([9, 5], [9, 150], (2, 2), 64, block_size, torch.float16, is_head_major=is_head_major)
    assert relative_error(attend(case, config=BY_BOX), twin(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 1000])
def test_keys_before_the_window_do_not_count(window: int, block_size: int) -> None:
    case = paged_case([33, 3], [33, 150], (2, 1), block_size=block_size, dtype=torch.float16)
    config = BY_BOX if block_size == 64 else SMALL_TILES
    error = relative_error(attend(case, window=window, config=config), twin(case, window=window))
    assert error < TOLERANCE[torch.float16]


def test_soft_cap_and_scale_are_applied_before_the_mask() -> None:
    case = paged_case([12, 2], [12, 40])
    options: dict[str, Any] = {"soft_cap": 2.0, "scale": 0.7}
    assert relative_error(attend(case, **options), twin(case, **options)) < TOLERANCE[torch.float32]


def test_heads_may_run_before_tiles() -> None:
    case = paged_case(*MIXED, dtype=torch.float16)
    config = replace(BY_POINTERS, heads_first=True)
    assert relative_error(attend(case, config=config), twin(case)) < TOLERANCE[torch.float16]


def test_rows_of_no_request_stay_and_rows_without_keys_are_zero() -> None:
    case = paged_case([2, 3, 4], [20, 0, 4])
    starts = torch.tensor([0, 2, 5, 6], dtype=torch.int32, device=DEVICE)  # rows 6 to 8: nobody's
    case = PagedCase(case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, starts)
    out = attend(case)
    assert out[6:].isnan().all()
    assert not out[2:5].any()
    assert relative_error(out[:6], twin(case)[:6]) < TOLERANCE[torch.float32]


def test_a_generous_query_length_changes_nothing() -> None:
    case = paged_case(*MIXED, dtype=torch.float16)
    assert torch.equal(attend(case, max_query_len=33), attend(case, max_query_len=4000))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    case = paged_case([5, 2], [5, 50])
    case.q.mul_(200)
    assert relative_error(attend(case), twin(case)) < TOLERANCE[torch.float32]


def test_out_may_be_a_slice_of_a_wider_tensor() -> None:
    case = paged_case([3, 2], [3, 20])
    wide = torch.full((5, 6, 64), math.nan, device=DEVICE)
    paged_attention(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, wide[:, 1:5],
        max_query_len=3,
    )  # fmt: skip
    assert wide[:, 0].isnan().all() and wide[:, 5].isnan().all()
    assert relative_error(wide[:, 1:5], twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs")
def test_a_captured_launch_follows_the_lengths() -> None:
    case = paged_case([20, 1], [100, 300], dtype=torch.float16)
    out = attend(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        paged_attention(
            case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, out,
            max_query_len=21,
        )  # fmt: skip
    case.num_tokens.sub_(7)
    case.query_starts[1] = 3
    graph.replay()
    assert relative_error(out, twin(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_query_len": -1}, "max_query_len"),
        ({"scale": -1.0}, "scale"),
        ({"window": 0}, "window"),
        ({"soft_cap": 0.0}, "soft_cap"),
    ],
    ids=str,
)
def test_nonsense_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    case = paged_case([3], [3])
    with pytest.raises(ValueError, match=message):
        attend(case, **options)


@pytest.mark.parametrize("head_size", [16, 32, 64, 80, 96, 128, 256])
def test_score_of_an_unseen_key_times_any_factor_is_exact(head_size: int) -> None:
    """A GPU fuses score * factor - peak: what the product loses by rounding is the exponent, and 2 ** 1e21 is inf."""

    def lost(score: float) -> Fraction:
        product = np.float32(score) * factor
        return Fraction(float(np.float32(score))) * Fraction(float(factor)) - Fraction(float(product))

    factor = np.float32(head_size**-0.5 * math.log2(math.e))
    assert lost(UNSEEN.value) == 0
    assert abs(lost(-1e30)) > 1e20  # which once made NaN of windows with heads of 64
