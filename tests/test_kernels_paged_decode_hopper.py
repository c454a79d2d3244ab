"""The Hopper decode kernel agrees with the slow twin; without a GPU it runs on threads (tests/gluon_threads.py)."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from minivllm_kernels import (
    checks,
    configs,
    hopper_fetch,
    hopper_merge,
    hopper_stream,
    paged_decode_hopper,
    shared_prefix_decode,
)
from minivllm_kernels.attention_configs import (
    HOPPER_DECODE_HEAD_SIZES,
    HopperDecodeConfig,
    hopper_decode_config,
    prefix_config,
)
from minivllm_kernels.reference import paged_attention_twin
from minivllm_kernels.workspace import SplitWorkspace

from tests.gluon_threads import ThreadedKernel
from tests.kernel_cases import DEVICE, HAS_GPU, TOLERANCE, PagedCase, paged_case, relative_error

IS_HOPPER = HAS_GPU and configs.device_class(DEVICE) == "hopper"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs sm_90")] if HAS_GPU else []
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
KERNEL = "_hopper_decode_kernel"
SHORT_SHARES = HopperDecodeConfig(tile_bytes=16384, num_stages=4, programs_per_sm=1, least_tiles=1)  # on threads: 4
RAGGED = [1, 127, 128, 129, 0, 700]
Decode = Callable[..., torch.Tensor]


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Decode:
    """A call that gives the output, NaN where nothing was written."""
    if not HAS_GPU:
        modules = (hopper_fetch, hopper_merge, hopper_stream, paged_decode_hopper)
        kernel = ThreadedKernel(getattr(paged_decode_hopper, KERNEL), modules)
        monkeypatch.setattr(checks, "device_class", lambda device: "hopper")
        monkeypatch.setattr(paged_decode_hopper, KERNEL, kernel)

    def call(case: PagedCase, config: HopperDecodeConfig = SHORT_SHARES, **options: Any) -> torch.Tensor:
        num_heads, head_size = case.q.shape[1:]
        workspace = SplitWorkspace.allocate(DEVICE, 0, num_heads // case.k_cache.shape[2], head_size)
        workspace.parts.fill_(math.nan)
        workspace.lse.fill_(math.nan)
        out = torch.full_like(case.q, math.nan)
        inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, out, workspace)
        paged_decode_hopper.paged_decode_hopper(*inputs, config=config, **options)
        assert not workspace.arrivals.any(), "a counter was left for the next launch"
        return out

    return call


def error(decode: Decode, case: PagedCase, config: HopperDecodeConfig = SHORT_SHARES, **options: Any) -> float:
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts)
    return relative_error(decode(case, config, **options), paged_attention_twin(*inputs, **options))


def batch(num_tokens: list[int], **options: Any) -> PagedCase:
    defaults: dict[str, Any] = {"block_size": 64, "dtype": DTYPE}
    return paged_case([1] * len(num_tokens), num_tokens, **(defaults | options))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("is_head_major", [True, False], ids=["head-major", "token-major"])
def test_every_block_size_from_8_up(decode: Decode, block_size: int, is_head_major: bool) -> None:
    case = batch([307, 128, 9], block_size=block_size, is_head_major=is_head_major)
    assert error(decode, case) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("head_size", HOPPER_DECODE_HEAD_SIZES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (9, 3), (20, 2), (33, 1), (64, 1)], ids=str)
def test_any_ratio_of_query_to_kv_heads(decode: Decode, heads: tuple[int, int], head_size: int) -> None:
    case = batch([130, 1, 300], heads=heads, head_size=head_size)
    assert error(decode, case) < TOLERANCE[DTYPE]


@pytest.mark.parametrize(("tile_bytes", "num_stages"), [(8192, 5), (16384, 2), (32768, 3)])
@pytest.mark.parametrize("box_tokens", [16, 32, 64])
@pytest.mark.parametrize(("least_tiles", "waves"), [(1, 1), (1, 3), (3, 2), (100, 1)])
def test_every_variant_gives_the_same_ragged_batch(
    decode: Decode, tile_bytes: int, num_stages: int, box_tokens: int, least_tiles: int, waves: int
) -> None:
    config = HopperDecodeConfig(tile_bytes, num_stages, 2, box_tokens, least_tiles, waves)
    assert error(decode, batch(RAGGED), config) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("programs_per_sm", [1, 2, 3])
def test_a_long_request_among_short_ones_is_cut_and_merged(decode: Decode, programs_per_sm: int) -> None:
    config = replace(SHORT_SHARES, programs_per_sm=programs_per_sm)
    assert error(decode, batch([3, 1, 3000, 2, 1], heads=(2, 1)), config) < TOLERANCE[DTYPE]


def test_more_requests_than_programs(decode: Decode) -> None:
    case = batch([1 + row % 5 for row in range(150)], heads=(2, 1), block_size=16)
    assert error(decode, case) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("window", [1, 40, 128, 1000])
def test_a_window_hides_old_keys(decode: Decode, window: int) -> None:
    assert error(decode, batch([1, 129, 0, 500]), window=window) < TOLERANCE[DTYPE]


def test_keys_before_the_window_are_not_read(decode: Decode) -> None:
    case = batch([500], block_size=16)
    expected = decode(case, window=20)
    for cache in (case.k_cache, case.v_cache):
        cache[case.block_table[0, :24].long()] = math.nan  # tokens 0 .. 383; the window's first tile holds 384 ..
    assert torch.equal(decode(case, window=20), expected)


def test_a_soft_cap_bounds_scores(decode: Decode) -> None:
    assert error(decode, batch([300, 5]), soft_cap=1.5, scale=0.4) < TOLERANCE[DTYPE]


def test_a_padded_row_is_zero_and_costs_the_others_nothing(decode: Decode) -> None:
    case = batch([0, 30, 0, 140])
    assert not decode(case)[[0, 2]].any()
    assert error(decode, case) < TOLERANCE[DTYPE]


def test_queries_may_be_a_slice_of_the_fused_projection(decode: Decode) -> None:
    case = batch([20, 70])
    wide = torch.full((2, 9, 64), math.nan, dtype=case.q.dtype, device=DEVICE)
    wide[:, 2:6] = case.q
    assert torch.equal(decode(replace(case, q=wide[:, 2:6])), decode(case))


def test_what_it_cannot_do_is_refused_in_one_line(decode: Decode) -> None:
    with pytest.raises(ValueError, match=r"head size 80 is not one of .* use paged_decode"):
        decode(batch([4], head_size=80))
    with pytest.raises(ValueError, match="float32 has no fast tensor cores: use paged_decode"):
        decode(batch([4], dtype=torch.float32))
    with pytest.raises(ValueError, match="block_size 1: "):
        decode(batch([4], block_size=1))
    with pytest.raises(ValueError, match="65 query heads share a KV head"):
        decode(batch([4], heads=(65, 1)))


@pytest.mark.skipif(HAS_GPU, reason="shows what happens elsewhere")
def test_another_device_is_refused() -> None:
    case, workspace = batch([4]), SplitWorkspace.allocate(DEVICE, 0, 2, 64)
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.q, workspace)
    with pytest.raises(ValueError, match="not hopper: use paged_decode"):
        paged_decode_hopper.paged_decode_hopper(*inputs)


@pytest.mark.skipif(not IS_HOPPER, reason="a race between warps")
def test_a_thousand_launches_agree(decode: Decode) -> None:
    """Warps once disagreed about their share, one launch in some hundreds: NOTES.md, sanitizer."""
    case = batch([1 + 37 * row % 800 for row in range(300)], heads=(16, 8), head_size=128)
    workspace, out = SplitWorkspace.allocate(DEVICE, 0, 2, 128), torch.empty_like(case.q)
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, out, workspace)
    expected = decode(case, hopper_decode_config(2, 128, 300 * 8 / 132))
    num_different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        out.fill_(math.nan)
        paged_decode_hopper.paged_decode_hopper(*inputs)
        num_different += (out != expected).any()
    assert num_different == 0


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("prefix", [320, 70, 0])
def test_own_keys_behind_a_shared_prefix(decode: Decode, prefix: int, head_size: int) -> None:
    """The prefix in plain Triton, own keys in Gluon, merged; a prefix is rounded down to a tile."""
    own = [1, 17, 130, 64, 300]
    case = batch([prefix + tail for tail in own], heads=(6, 2), head_size=head_size, block_size=16)
    case.block_table[:, : prefix // 16] = case.block_table[0, : prefix // 16].clone()
    config = replace(prefix_config(DEVICE), stream=SHORT_SHARES)
    workspace = SplitWorkspace.allocate(DEVICE, 9000, 3, head_size)
    workspace.parts.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    out = torch.full_like(case.q, math.nan)
    shared = torch.full_like(case.num_tokens, prefix // 16 * 16)
    starts, members = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([0, 2, 5], [4, 1, 0, 3, 2]))
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, shared, starts, members, out)
    shared_prefix_decode.shared_prefix_decode(*inputs, workspace, max_own_tokens=310, config=config)
    expected = paged_attention_twin(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts
    )
    assert relative_error(out, expected) < TOLERANCE[DTYPE]
