"""Hopper's latent attention agrees with the slow twin; without a GPU its code runs on threads (gluon_threads.py)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from minivllm_kernels import checks, configs, mla_decode_hopper, mla_fetch
from minivllm_kernels.attention_configs import MLA_HOPPER, MlaHopperConfig
from minivllm_kernels.reference import mla_decode_twin
from minivllm_kernels.workspace import SplitWorkspace

from tests.gluon_threads import ThreadedKernel
from tests.kernel_cases import DEVICE, HAS_GPU, TOLERANCE, relative_error
from tests.test_kernels_mla_decode import SCALE, MlaCase, mla_case

IS_HOPPER = HAS_GPU and configs.device_class(DEVICE) == "hopper"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs sm_90")] if HAS_GPU else []
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
KERNEL = "_hopper_mla_kernel"
NARROW = (128, 64)  # latent and rope: three boxes of 64 columns, fast to emulate
SMALL = MlaHopperConfig(heads=16, groups=1, pack=1, places=7, least_tiles=1)
Attention = Callable[..., torch.Tensor]


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Attention:
    """A call that gives the output, in memory that held NaN, from a workspace that did."""
    if not HAS_GPU:
        monkeypatch.setattr(checks, "device_class", lambda device: "hopper")
        monkeypatch.setattr(mla_decode_hopper, KERNEL, threaded())

    def attend(case: MlaCase, config: MlaHopperConfig | None = SMALL) -> torch.Tensor:
        out = torch.full_like(case.q_latent, float("nan"))
        workspace = SplitWorkspace.allocate(DEVICE, 1024, 16, case.q_latent.shape[2])
        workspace.parts.fill_(float("nan"))
        workspace.lse.fill_(float("nan"))
        mla_decode_hopper.mla_decode_hopper(*inputs(case), out, workspace, scale=SCALE, config=config)
        return out

    return attend


def threaded() -> ThreadedKernel:
    return ThreadedKernel(getattr(mla_decode_hopper, KERNEL), (mla_fetch, mla_decode_hopper))


def inputs(case: MlaCase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return case.q_latent, case.q_rope, case.latent_cache, case.block_table, case.num_tokens


def error(case: MlaCase, out: torch.Tensor) -> float:
    return relative_error(out, mla_decode_twin(*inputs(case), SCALE))


def narrow(num_tokens: list[int], heads: int = 16, block_size: int = 64) -> MlaCase:
    return mla_case(num_tokens, heads, block_size, DTYPE, NARROW)


@pytest.mark.parametrize("heads", [16, 20, 64, 128])
def test_equals_the_twin_as_it_ships(attention: Attention, heads: int) -> None:
    case = mla_case([70, 3], heads, 64, DTYPE)
    assert error(case, attention(case, None)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_any_block_size_from_8_up(attention: Attention, block_size: int) -> None:
    case = narrow([150, 1], block_size=block_size)
    assert error(case, attention(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 127, 128, 129])
def test_tiles_at_their_edges(attention: Attention, num_tokens: int) -> None:
    case = narrow([num_tokens])
    assert error(case, attention(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("shape", [(1, 3), (1, 5), (1, 20), (3, 1), (3, 2), (3, 4)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_ring_gives_the_same_ragged_batch(attention: Attention, groups: int, shape: tuple[int, int]) -> None:
    case = narrow([200, 0, 33, 500, 64, 1, 0], heads=20, block_size=16)
    config = replace(SMALL, groups=groups, pack=shape[0], places=shape[1])
    assert error(case, attention(case, config)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("least_tiles", [1, 2, 4, 100])
def test_a_long_request_is_cut_and_merged(attention: Attention, least_tiles: int) -> None:
    case = narrow([1, 1500, 0, 2])
    assert error(case, attention(case, replace(SMALL, least_tiles=least_tiles))) < TOLERANCE[DTYPE]


def test_many_requests_fall_to_one_share(attention: Attention) -> None:
    case = narrow([1 + 37 * row % 150 for row in range(40)])
    assert error(case, attention(case)) < TOLERANCE[DTYPE]


@pytest.mark.parametrize("heads", [1, 33, 80])
def test_heads_beyond_one_program_are_other_programs_work(attention: Attention, heads: int) -> None:
    case = narrow([70, 200], heads)
    assert error(case, attention(case, replace(SMALL, groups=2))) < TOLERANCE[DTYPE]


def test_padded_requests_are_zero(attention: Attention) -> None:
    out = attention(narrow([0, 90, 0]))
    assert out[0].count_nonzero() == out[2].count_nonzero() == 0
    assert attention(narrow([0, 0])).count_nonzero() == 0


def test_strides_are_free(attention: Attention) -> None:
    case = narrow([70, 20])
    wide = torch.full((*case.latent_cache.shape[:2], 256), float("nan"), dtype=DTYPE, device=DEVICE)
    wide[..., :192] = case.latent_cache
    by_head = torch.empty(16, 2, 128, dtype=DTYPE, device=DEVICE).transpose(0, 1).copy_(case.q_latent)
    case = replace(case, latent_cache=wide[..., :192], q_latent=by_head)
    assert error(case, attention(case)) < TOLERANCE[DTYPE]


def test_what_it_cannot_do_is_refused_in_one_line(attention: Attention) -> None:
    with pytest.raises(ValueError, match="latent and rope are 512 and 32, not multiples of 64"):
        attention(mla_case([4], dtype=DTYPE, sizes=(512, 32)))
    with pytest.raises(ValueError, match="256 columns are not packs of 3 boxes"):
        attention(mla_case([4], dtype=DTYPE, sizes=(128, 128)), replace(SMALL, pack=3))
    with pytest.raises(ValueError, match="float32 has no fast tensor cores: use mla_decode"):
        attention(mla_case([4], sizes=NARROW))
    with pytest.raises(ValueError, match="block_size 1: "):
        attention(narrow([4], block_size=1))


@pytest.mark.parametrize("heads", MLA_HOPPER)
def test_the_ring_of_a_configuration_holds_a_tile(heads: int) -> None:
    config = MLA_HOPPER[heads]
    assert config.heads * config.groups == heads and 9 % config.pack == 0 and config.places * config.pack >= 9


@pytest.mark.skipif(HAS_GPU, reason="shows what happens elsewhere")
def test_another_device_is_refused() -> None:
    case = narrow([4])
    workspace = SplitWorkspace.allocate(DEVICE, 1024, 16, 128)
    with pytest.raises(ValueError, match="not hopper: use mla_decode"):
        mla_decode_hopper.mla_decode_hopper(*inputs(case), case.q_latent, workspace, scale=SCALE, config=SMALL)
