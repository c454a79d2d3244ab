"""Latent attention against its float64 twin: odd lengths, cut requests, NaN wherever the kernel may not look."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from minivllm_kernels.attention_configs import mla_config
from minivllm_kernels.mla_decode import mla_decode
from minivllm_kernels.reference import mla_decode_twin
from minivllm_kernels.workspace import SplitWorkspace

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []

SCALE = 1 / math.sqrt(192)


@dataclass(frozen=True)
class MlaCase:
    q_latent: torch.Tensor  # [B, H, R]
    q_rope: torch.Tensor  # [B, H, P]
    latent_cache: torch.Tensor  # [num_blocks, block_size, R + P]
    block_table: torch.Tensor  # [B, M] int32
    num_tokens: torch.Tensor  # [B] int32


def mla_case(
    num_tokens: list[int],
    heads: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int] = (512, 64),
) -> MlaCase:
    """Random queries and rows; blocks shuffled over a pool twice as large, every unused slot NaN."""
    random = torch.Generator().manual_seed(0)
    num_blocks = [-(-total // block_size) for total in num_tokens]
    pool = 2 * sum(num_blocks) + 2
    cache = torch.full((pool, block_size, sum(sizes)), math.nan, dtype=dtype)
    free = (torch.randperm(pool - 1, generator=random) + 1).tolist()
    table = torch.zeros(len(num_tokens), max(1, *num_blocks), dtype=torch.int32)
    for row, total in enumerate(num_tokens):
        for column in range(num_blocks[row]):
            block = table[row, column] = free.pop()
            used = min(block_size, total - column * block_size)
            cache[block, :used] = torch.randn(used, sum(sizes), generator=random).to(dtype)
    queries = [3 * torch.randn(len(num_tokens), heads, size, generator=random).to(dtype) for size in sizes]
    tensors = (*queries, cache, table, torch.tensor(num_tokens, dtype=torch.int32))
    return MlaCase(*(tensor.to(DEVICE) for tensor in tensors))


def attend(case: MlaCase, split_tokens: int | None = None, num_rows: int = 1024) -> torch.Tensor:
    """The kernel's output, in memory that held NaN, from a workspace that did."""
    out = torch.full_like(case.q_latent, math.nan)
    workspace = SplitWorkspace.allocate(DEVICE, num_rows, 16, case.q_latent.shape[2])
    workspace.parts.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    inputs = (case.q_latent, case.q_rope, case.latent_cache, case.block_table, case.num_tokens)
    mla_decode(*inputs, out, workspace, scale=SCALE, split_tokens=split_tokens)
    return out


def error(case: MlaCase, out: torch.Tensor) -> float:
    inputs = (case.q_latent, case.q_rope, case.latent_cache, case.block_table, case.num_tokens)
    return relative_error(out, mla_decode_twin(*inputs, SCALE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [[1, 31, 33], [150], [5, 0, 97, 64]], ids=str)
def test_equals_the_twin(num_tokens: list[int], dtype: torch.dtype) -> None:
    case = mla_case(num_tokens, dtype=dtype)
    assert error(case, attend(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("block_size", [1, 8, 64, 256])
def test_equals_the_twin_for_any_block_size(block_size: int) -> None:
    case = mla_case([70, 3], block_size=block_size, dtype=torch.float16)
    assert error(case, attend(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("heads", [1, 20, 80, 128])
def test_heads_beyond_one_program_are_other_programs_work(heads: int) -> None:
    case = mla_case([70], heads, dtype=torch.float16)
    assert error(case, attend(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("split_tokens", [None, 64], ids=["equal shares", "fixed split"])
def test_a_long_request_is_cut_and_merged(split_tokens: int | None) -> None:
    case = mla_case([1, 500, 0, 2], block_size=32, dtype=torch.float16)
    assert error(case, attend(case, split_tokens)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("split_tokens", [None, 64], ids=["equal shares", "fixed split"])
def test_padded_requests_are_zero(split_tokens: int | None) -> None:
    out = attend(mla_case([0, 90, 0], dtype=torch.float16), split_tokens)
    assert out[0].count_nonzero() == out[2].count_nonzero() == 0


def test_a_batch_of_only_padding_is_zero() -> None:
    assert attend(mla_case([0, 0], dtype=torch.float16)).count_nonzero() == 0


def test_equals_the_twin_for_other_widths() -> None:
    case = mla_case([40, 7, 65], heads=5, dtype=torch.float16, sizes=(128, 32))
    assert error(case, attend(case)) < TOLERANCE[torch.float16]


def test_strides_are_free() -> None:
    case = mla_case([70, 20], dtype=torch.float16)
    wide = torch.full((*case.latent_cache.shape[:2], 640), math.nan, dtype=torch.float16, device=DEVICE)
    wide[..., :576] = case.latent_cache
    by_head = torch.empty(16, 2, 512, dtype=torch.float16, device=DEVICE).transpose(0, 1).copy_(case.q_latent)
    case = replace(case, latent_cache=wide[..., :576], q_latent=by_head)
    assert error(case, attend(case)) < TOLERANCE[torch.float16]


def test_a_fixed_split_gives_a_request_the_same_bits_in_any_batch() -> None:
    case = mla_case([200, 5, 129], dtype=torch.float16)
    alone = replace(
        case,
        q_latent=case.q_latent[2:],
        q_rope=case.q_rope[2:],
        block_table=case.block_table[2:, :9].contiguous(),
        num_tokens=case.num_tokens[2:],
    )
    assert torch.equal(attend(case, split_tokens=64)[2:], attend(alone, split_tokens=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rope": torch.zeros(2, 15, 64, dtype=torch.float16)}, "must be"),
        ({"q_rope": torch.zeros(2, 16, 48, dtype=torch.float16)}, "powers of two"),
        ({"q_rope": torch.zeros(2, 16, 64)}, "cast one"),
        ({"latent_cache": torch.zeros(9, 16, 512, dtype=torch.float16)}, "latent_cache has shape"),
        ({"latent_cache": torch.zeros(9, 12, 576, dtype=torch.float16)}, "block_size 12"),
        ({"num_tokens": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"block_table": torch.zeros(3, 4, dtype=torch.int32)}, "block_table has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_do_not_belong_together_raise(change: dict[str, torch.Tensor], message: str) -> None:
    case = mla_case([20, 3], dtype=torch.float16)
    changed = replace(case, **{name: tensor.to(DEVICE) for name, tensor in change.items()})
    with pytest.raises(ValueError, match=message):
        attend(changed)


def test_a_split_is_a_multiple_of_the_tile() -> None:
    tile = mla_config(DEVICE, 16, torch.float16).tile
    with pytest.raises(ValueError, match=f"no multiple of the tile, {tile}"):
        attend(mla_case([20], dtype=torch.float16), split_tokens=tile + 8)


def test_a_workspace_too_small_raises() -> None:
    case = mla_case([4000], dtype=torch.float16)
    small = SplitWorkspace(torch.zeros(64, 512, device=DEVICE), torch.zeros(64, device=DEVICE), case.num_tokens)
    inputs = (case.q_latent, case.q_rope, case.latent_cache, case.block_table, case.num_tokens)
    with pytest.raises(ValueError, match="the workspace has 64 rows"):
        mla_decode(*inputs, case.q_latent, small, scale=SCALE)
