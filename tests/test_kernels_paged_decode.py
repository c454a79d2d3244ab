"""Decode attention kernels against float64: odd lengths and shapes, shuffled blocks, NaN in every slot not in use."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from minivllm_kernels.attention_configs import decode_config
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.paged_decode import paged_decode
from minivllm_kernels.reference import paged_attention_twin
from minivllm_kernels.workspace import SplitWorkspace

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, PagedCase, paged_case, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []

RAGGED = [1, 15, 16, 17, 0, 200]
LONG_AMONG_SHORT = [3, 1, 700, 2, 1]


def decode(case: PagedCase, **options: Any) -> torch.Tensor:
    """What `paged_decode` writes over NaN."""
    num_heads, head_size = case.q.shape[1:]
    group = num_heads // case.k_cache.shape[2]
    workspace = SplitWorkspace.allocate(DEVICE, len(case.q) * num_heads * 64, group, head_size)
    workspace.parts.fill_(math.nan)
    out = torch.full_like(case.q, math.nan)
    paged_decode(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, out, workspace, **options
    )  # fmt: skip
    assert not workspace.arrivals.any(), "a counter was left for the next launch"
    return out


def twin(case: PagedCase, **options: Any) -> torch.Tensor:
    return paged_attention_twin(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [RAGGED, LONG_AMONG_SHORT], ids=["ragged", "long among short"])
def test_every_length_agrees_with_float64(lengths: list[int], dtype: torch.dtype) -> None:
    case = paged_case([1] * len(lengths), lengths, dtype=dtype)
    assert relative_error(decode(case), twin(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (9, 3), (8, 1), (33, 1)], ids=str)
def test_any_ratio_of_query_to_kv_heads(heads: tuple[int, int]) -> None:
    case = paged_case([1] * 3, [40, 1, 97], heads=heads)
    assert relative_error(decode(case), twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("split_tokens", [None, 128], ids=["equal shares", "fixed split"])
def test_every_head_size(head_size: int, split_tokens: int | None) -> None:
    case = paged_case([1] * 3, [40, 1, 270], head_size=head_size)
    assert relative_error(decode(case, split_tokens=split_tokens), twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("is_head_major", [True, False], ids=["head-major", "token-major"])
def test_every_block_size_at_its_edges(block_size: int, is_head_major: bool) -> None:
    lengths = [max(1, block_size - 1), block_size, block_size + 1]
    case = paged_case([1] * 3, lengths, block_size=block_size, is_head_major=is_head_major)
    assert relative_error(decode(case), twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("split_tokens", [None, 128], ids=["equal shares", "fixed split"])
@pytest.mark.parametrize("window", [1, 16, 50, 1000])
def test_sliding_window(window: int, split_tokens: int | None) -> None:
    case = paged_case([1] * 4, [1, 51, 0, 260])
    out = decode(case, window=window, split_tokens=split_tokens)
    assert relative_error(out, twin(case, window=window)) < TOLERANCE[torch.float32]


def test_keys_before_the_window_are_not_read() -> None:
    case = paged_case([1], [300], block_size=16)
    expected = twin(case, window=20)
    for cache in (case.k_cache, case.v_cache):
        cache[case.block_table[0, :16].long()] = math.nan  # tokens 0 .. 255; the window's first tile holds 256 ..
    assert relative_error(decode(case, window=20), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(soft_cap: float) -> None:
    case = paged_case([1] * 2, [17, 80])
    assert relative_error(decode(case, soft_cap=soft_cap), twin(case, soft_cap=soft_cap)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("split_tokens", [None, 128], ids=["equal shares", "fixed split"])
def test_a_padded_row_is_zero_and_costs_the_others_nothing(split_tokens: int | None) -> None:
    case = paged_case([1] * 4, [0, 30, 0, 140])
    out = decode(case, split_tokens=split_tokens)
    assert not out[[0, 2]].any()
    assert relative_error(out, twin(case)) < TOLERANCE[torch.float32]


def test_more_requests_than_programs_and_more_programs_than_requests() -> None:
    many = 3 * num_multiprocessors(DEVICE) + 1 if not HAS_GPU else 1100
    case = paged_case([1] * many, [1 + row % 5 for row in range(many)], heads=(2, 1))
    assert relative_error(decode(case), twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("split_tokens", [None, 128], ids=["equal shares", "fixed split"])
def test_shuffling_the_physical_blocks_leaves_every_bit(split_tokens: int | None) -> None:
    case = paged_case([1] * 3, [33, 190, 64])
    pool = len(case.k_cache)
    order = torch.randperm(pool, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    shuffled = PagedCase(
        case.q, case.k_cache[order], case.v_cache[order],
        order.argsort()[case.block_table.long()].int(), case.num_tokens, case.query_starts,
    )  # fmt: skip
    assert torch.equal(decode(shuffled, split_tokens=split_tokens), decode(case, split_tokens=split_tokens))


def test_fixed_split_has_the_same_bits_alone_and_in_any_batch() -> None:
    lengths = [300, 1, 129, 128, 127, 0, 513]
    case = paged_case([1] * len(lengths), lengths)
    together = decode(case, split_tokens=128)
    for row in range(len(lengths)):
        alone = PagedCase(
            case.q[row : row + 1], case.k_cache, case.v_cache, case.block_table[row : row + 1].contiguous(),
            case.num_tokens[row : row + 1], case.query_starts[:2],
        )  # fmt: skip
        assert torch.equal(decode(alone, split_tokens=128)[0], together[row])


def test_queries_may_be_a_slice_of_the_fused_projection() -> None:
    case = paged_case([1] * 2, [20, 70])
    wide = torch.full((2, 9, 64), math.nan, dtype=case.q.dtype, device=DEVICE)
    wide[:, 2:6] = case.q
    sliced = PagedCase(
        wide[:, 2:6], case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts
    )  # fmt: skip
    assert torch.equal(decode(sliced), decode(case))


def test_more_parts_than_the_merge_reads_at_a_time() -> None:
    tile = decode_config(DEVICE).tile_tokens(64 * 4)
    case = paged_case([1] * 2, [11 * tile - 3, 20 * tile], seed=1)
    case.q.mul_(6)  # sharp scores: the largest so far changes from part to part
    assert relative_error(decode(case, split_tokens=tile), twin(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("split_tokens", [None, 128], ids=["equal shares", "fixed split"])
def test_block_tables_may_be_a_slice_of_a_wider_buffer(split_tokens: int | None) -> None:
    case = paged_case([1] * 2, [20, 70])
    wide = torch.full((2, 11), 10**6, dtype=torch.int32, device=DEVICE)
    wide[:, : case.block_table.shape[1]] = case.block_table
    table = wide[:, : case.block_table.shape[1]]
    sliced = PagedCase(case.q, case.k_cache, case.v_cache, table, case.num_tokens, case.query_starts)
    assert torch.equal(decode(sliced, split_tokens=split_tokens), decode(case, split_tokens=split_tokens))


def test_an_empty_batch_is_no_work() -> None:
    case = paged_case([1] * 2, [20, 70])
    empty = PagedCase(
        case.q[:0], case.k_cache, case.v_cache, case.block_table[:0], case.num_tokens[:0], case.query_starts[:1]
    )  # fmt: skip
    assert decode(empty).shape == (0, 4, 64)


def bad(change: str) -> dict[str, Any]:
    case = paged_case([1] * 2, [20, 30])
    workspace = SplitWorkspace.allocate(DEVICE, 0, 2, 64)
    arguments: dict[str, Any] = {
        "q": case.q, "k_cache": case.k_cache, "v_cache": case.v_cache, "block_table": case.block_table,
        "num_tokens": case.num_tokens, "out": torch.empty_like(case.q), "workspace": workspace,
    }  # fmt: skip
    match change:
        case "heads":
            arguments["q"] = arguments["out"] = case.q[:, :3].contiguous()
        case "int64":
            arguments["num_tokens"] = case.num_tokens.long()
        case "dtype":
            arguments["k_cache"] = case.k_cache.half()
        case "split":
            arguments["split_tokens"] = 100
        case "no split":
            arguments["split_tokens"] = 0
        case "counters":
            arguments["workspace"] = replace(workspace, arrivals=workspace.arrivals[:1])
        case "room":
            arguments["split_tokens"] = 128
            arguments["block_table"] = case.block_table.repeat(1, 20_000).contiguous()
        case "window" | "soft_cap" | "scale":
            arguments[change] = 0
        case "rank":
            arguments["q"] = case.q[0]
        case "block_size":
            arguments["k_cache"] = arguments["v_cache"] = case.k_cache[:, :5]
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("heads", "3 query heads do not divide among 2 KV heads"),
        ("int64", "num_tokens is torch.int64: pass int32"),
        ("dtype", "q is torch.float32 but another input is torch.float16: cast one"),
        ("split", "split_tokens 100 is no multiple of"),
        ("no split", "split_tokens is 0: pass a multiple of the tile"),
        ("counters", "the workspace counts 1 programs, this launch has"),
        ("room", "allocate it larger"),
        ("block_size", "block_size 5 is not one of"),
        ("window", "window is 0: pass at least 1"),
        ("soft_cap", "soft_cap is 0: pass a positive number"),
        ("scale", "scale is 0: pass a positive number"),
        ("rank", r"q has shape \(4, 64\), expected \[rows, heads, head size\]"),
    ],
)
def test_bad_input_gets_one_line(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_decode(**bad(change))
