"""The Hopper kernel agrees with the slow twin; without a GPU its code runs on threads (tests/gluon_threads.py)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from minivllm_kernels import checks, configs, hopper_fetch, paged_attention_hopper
from minivllm_kernels.attention_configs import HOPPER_ATTENTION
from minivllm_kernels.reference import paged_attention_twin

from tests.gluon_threads import ThreadedKernel
from tests.kernel_cases import DEVICE, HAS_GPU, TOLERANCE, PagedCase, paged_case, relative_error

IS_HOPPER = HAS_GPU and configs.device_class(DEVICE) == "hopper"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs sm_90")] if HAS_GPU else []
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
KERNEL = "_hopper_attention_kernel"
Attention = Callable[..., torch.Tensor]


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Attention:
    """A call that gives the output, NaN where nothing was written."""
    if not HAS_GPU:
        kernel = ThreadedKernel(getattr(paged_attention_hopper, KERNEL), (hopper_fetch, paged_attention_hopper))
        monkeypatch.setattr(checks, "device_class", lambda device: "hopper")
        monkeypatch.setattr(paged_attention_hopper, "num_multiprocessors", lambda device: 2)
        monkeypatch.setattr(paged_attention_hopper, KERNEL, kernel)

    def attend(case: PagedCase, max_query_len: int | None = None, **options: Any) -> torch.Tensor:
        out = torch.full_like(case.q, float("nan"))
        longest = int(case.query_starts.diff().max()) if max_query_len is None else max_query_len
        inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, out)
        paged_attention_hopper.paged_attention_hopper(*inputs, max_query_len=longest, **options)
        return out

    return attend


def expected(case: PagedCase, **options: Any) -> torch.Tensor:
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts)
    return paged_attention_twin(*inputs, **options)


def small(num_new: list[int], num_tokens: list[int], **options: Any) -> PagedCase:
    defaults: dict[str, Any] = {"heads": (2, 1), "block_size": 64, "dtype": DTYPE}
    return paged_case(num_new, num_tokens, **(defaults | options))


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_any_block_size_from_8_up(attention: Attention, block_size: int) -> None:
    case = small([150], [307], block_size=block_size)
    assert relative_error(attention(case), expected(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("head_size", HOPPER_ATTENTION)
def test_each_head_size_of_the_table(attention: Attention, head_size: int) -> None:
    case = small([130, 3], [261, 140], head_size=head_size, block_size=32)
    assert relative_error(attention(case), expected(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("is_head_major", [True, False])
def test_both_orders_of_a_block(attention: Attention, is_head_major: bool) -> None:
    case = small([70], [200], heads=(4, 2), is_head_major=is_head_major)
    assert relative_error(attention(case), expected(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("num_tokens", [1, 127, 128, 129, 255, 256, 257, 640])
def test_tiles_of_keys_at_their_edges(attention: Attention, num_tokens: int) -> None:
    case = small([num_tokens // 2 + 1], [num_tokens])
    assert relative_error(attention(case), expected(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("change", [{}, {"takes_turns": True}, {"overlaps": False}, {"is_persistent": False}])
def test_every_variant_gives_the_same_ragged_batch(
    attention: Attention, monkeypatch: pytest.MonkeyPatch, num_stages: int, change: dict[str, bool]
) -> None:
    config = replace(HOPPER_ATTENTION[64], num_stages=num_stages, **change)
    monkeypatch.setitem(HOPPER_ATTENTION, 64, config)
    case = small([129, 1, 0, 60], [400, 300, 50, 60], heads=(3, 1), block_size=16)
    assert relative_error(attention(case), expected(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("window", [1, 40, 128, 200, 1000])
def test_a_window_hides_old_keys(attention: Attention, window: int) -> None:
    case = small([140], [500])
    assert relative_error(attention(case, window=window), expected(case, window=window)) < TOLERANCE[DTYPE]


def test_a_soft_cap_bounds_scores(attention: Attention) -> None:
    case = small([140], [300])
    out = attention(case, soft_cap=1.5, scale=0.4)
    assert relative_error(out, expected(case, soft_cap=1.5, scale=0.4)) < TOLERANCE[DTYPE]


def test_rows_of_a_padded_request_are_zero(attention: Attention) -> None:
    case = small([130, 5], [130, 5])
    case = replace(case, num_tokens=torch.tensor([130, 0], dtype=torch.int32, device=DEVICE))
    assert bool((attention(case)[130:] == 0).all())


def test_rows_of_no_request_are_left_alone(attention: Attention) -> None:
    case = small([20, 30], [20, 30])
    case = replace(case, query_starts=torch.tensor([0, 20, 40], dtype=torch.int32, device=DEVICE))
    assert bool(attention(case)[40:].isnan().all())


def test_a_larger_max_query_len_changes_nothing(attention: Attention) -> None:
    case = small([90, 200], [90, 310])
    assert torch.equal(attention(case), attention(case, max_query_len=700))


def test_what_it_cannot_do_is_refused_in_one_line(attention: Attention) -> None:
    with pytest.raises(ValueError, match="head size 80 is not one of"):
        attention(small([4], [4], head_size=80))
    with pytest.raises(ValueError, match="float32 has no fast tensor cores: use paged_attention"):
        attention(small([4], [4], dtype=torch.float32))
    with pytest.raises(ValueError, match="block_size 1: "):
        attention(small([4], [4], block_size=1))
    with pytest.raises(ValueError, match="window is 0"):
        attention(small([4], [4]), window=0)


@pytest.mark.skipif(HAS_GPU, reason="shows what happens elsewhere")
def test_another_device_is_refused() -> None:
    case = small([4], [4])
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, case.q)
    with pytest.raises(ValueError, match="not hopper: use paged_attention"):
        paged_attention_hopper.paged_attention_hopper(*inputs, max_query_len=4)
