"""Decode attention over shared prefixes, against float64: any rows in any groups, and rows without one."""

import math
from itertools import accumulate

import pytest
import torch
from minivllm_kernels.attention_configs import prefix_config
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.reference import paged_attention_twin
from minivllm_kernels.shared_prefix_decode import shared_prefix_decode, workspace_rows
from minivllm_kernels.workspace import SplitWorkspace

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, PagedCase, paged_case, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []


Groups = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # prefix_tokens, group_starts, members


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def prefix_case(
    groups: list[list[int]], prefixes: list[int], own: list[int], dtype: torch.dtype, block_size: int = 16
) -> tuple[PagedCase, Groups]:
    """Requests whose tables begin with their group's blocks; with prefix_tokens, group_starts and members."""
    prefix_of = {member: prefix for group, prefix in zip(groups, prefixes, strict=True) for member in group}
    shared = [prefix_of.get(request, 0) for request in range(len(own))]
    lengths = [prefix + tail for prefix, tail in zip(shared, own, strict=True)]
    case = paged_case([1] * len(own), lengths, heads=(6, 2), block_size=block_size, dtype=dtype)
    for group, prefix in zip(groups, prefixes, strict=True):
        case.block_table[group, : prefix // block_size] = case.block_table[group[:1], : prefix // block_size].clone()
    listed = [member for group in groups for member in group]
    others = [-1] * (len(own) - len(listed))  # nobody looks at them
    starts = [0, *accumulate(len(group) for group in groups)]
    return case, (ints(shared), ints(starts), ints(listed + others))


def attended(case: PagedCase, groups: Groups, bound: int) -> torch.Tensor:
    """What `shared_prefix_decode` writes over NaN, with no more workspace than it asks for."""
    num_heads, head_size = case.q.shape[1:]
    group = num_heads // case.k_cache.shape[2]
    room = workspace_rows(DEVICE, len(case.q), num_heads, group, bound)
    workspace = SplitWorkspace.allocate(DEVICE, room, group, head_size)
    workspace.parts.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    out = torch.full_like(case.q, math.nan)
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, *groups, out)
    shared_prefix_decode(*inputs, workspace, max_own_tokens=bound)
    return out


def expected(case: PagedCase) -> torch.Tensor:
    return paged_attention_twin(
        case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("groups", "prefixes"),
    [
        ([[0, 1, 2, 3, 4, 5, 6]], [160]),
        ([[1, 2, 3, 4, 5], [6]], [48, 16]),
        ([[2, 0, 4], [5, 3, 6]], [16, 320]),
        ([[6, 2, 4, 0], [5, 1]], [64, 128]),
        ([[3, 5], [], [], []], [33 * 16, 0, 0, 0]),
        ([[], [0, 1], []], [0, 32, 0]),
        ([[0, 1, 2, 3, 4, 5, 6]], [0]),
        ([[], []], [0, 0]),
    ],
    ids=str,
)
def test_shared_prefix_is_exact(groups: list[list[int]], prefixes: list[int], dtype: torch.dtype) -> None:
    case, grouped = prefix_case(groups, prefixes, own=[1, 17, 130, 16, 3, 64, 9], dtype=dtype)
    assert relative_error(attended(case, grouped, bound=130), expected(case)) < TOLERANCE[dtype]


def test_a_prefix_shorter_than_its_splits() -> None:
    case = paged_case([1] * 2, [17, 40], heads=(3, 1))
    case.block_table[1, 0] = case.block_table[0, 0]
    groups = (torch.full_like(case.num_tokens, 16), ints([0, 2]), ints([0, 1]))
    assert relative_error(attended(case, groups, bound=24), expected(case)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("bound", [130, 1000, 100_000])
def test_padded_rows_beside_a_group_are_zero_whatever_bound_own_keys_have(bound: int) -> None:
    case, grouped = prefix_case([[4, 0, 2]], [48], own=[5, 0, 130, 7, 16], dtype=torch.float32)
    out = attended(case, grouped, bound)
    assert relative_error(out, expected(case)) < TOLERANCE[torch.float32] and not out[1].any()


@pytest.mark.parametrize("num_requests", [1, 3, 16, 200, 512])
@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (9, 3), (64, 1)])
def test_workspace_rows_are_enough_for_fewer_requests_too(num_requests: int, heads: tuple[int, int]) -> None:
    config, num_sms = prefix_config(DEVICE), num_multiprocessors(DEVICE)
    group = heads[0] // heads[1]
    for count in (1, num_requests // 3 + 1, num_requests):
        num_splits = config.num_splits(heads[1] * -(-count * group // config.rows), num_sms)
        for max_own in (1, 1000, 40_960):
            split_tokens, num_parts = config.own_parts(max_own)
            assert split_tokens * num_parts >= max_own and num_parts <= config.most_own_parts
            needed = count * heads[0] * (num_splits + num_parts)
            assert workspace_rows(DEVICE, num_requests, heads[0], group, max_own) >= needed
