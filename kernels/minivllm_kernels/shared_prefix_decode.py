"""Decode attention of requests that share a prefix: the prefix is read once for all of them (cascade attention).

    group of 3 requests   | shared prefix                | own keys
    request 0             | ---------------------------> | ------>
    request 1             |  one tile of queries: all    | --->
    request 2             |  heads of all three requests | --------->

The queries of a group stand below one another as the rows of one tile against the prefix: P keys are read P times, not
B * P times, and there are rows enough for the tensor core. Each request's own keys are cut as in split_kv.py, and the
parts of both merge exactly (Ye et al., "Cascade Inference", FlashInfer 2024).

Bytes per token and layer: 2 * Hkv * D * itemsize, each *distinct* key once, and the prefix's fp32 parts twice.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm_kernels.attention_configs import HopperDecodeConfig, PrefixConfig, prefix_config
from minivllm_kernels.checks import check_index, require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.paged_decode_hopper import decode_obstacle, launch_stream
from minivllm_kernels.split_kv import (
    Chunking,
    DecodeArguments,
    attend_tiles,
    decode_arguments,
    merge_chunks,
    shared_keys,
    store_chunks,
    store_part,
)
from minivllm_kernels.workspace import SplitWorkspace


@triton.jit(do_not_specialize=["num_groups", "num_slots"])
def prefix_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, prefix_ptr, group_starts_ptr, members_ptr, parts_ptr, lse_ptr, num_groups,
    num_slots, scale, soft_cap, stride_q, stride_q_head, stride_block, stride_slot, stride_kv_head, stride_table,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PREFIX_TILE: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, split of the prefix, tile of ROWS queries of one group)."""
    head, split, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads, num_splits = tl.num_programs(0), tl.num_programs(1)
    groups = tl.arange(0, GROUPS)
    starts = tl.load(group_starts_ptr + groups, mask=groups < num_groups, other=0)
    sizes = tl.load(group_starts_ptr + groups + 1, mask=groups < num_groups, other=0) - starts
    tiles = tl.cdiv(sizes * GROUP, ROWS)
    ends = tl.cumsum(tiles, 0)
    group = tl.sum((ends <= tile).to(tl.int32))
    if group < num_groups:
        first = tl.load(group_starts_ptr + group)
        size = tl.load(group_starts_ptr + group + 1) - first
        tile -= tl.sum(tl.where(groups == group, ends - tiles, 0))
        leader = tl.load(members_ptr + first)
        prefix = shared_keys(prefix_ptr, leader, PREFIX_TILE)
        if prefix > 0:
            rows, columns = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
            is_row, heads = rows < size * GROUP, rows % GROUP  # row = (member, head of its KV head)
            requests = tl.load(members_ptr + first + rows // GROUP, mask=is_row, other=0)
            is_kept = is_row[:, None] & (columns < HEAD_SIZE)[None, :]
            q_rows = requests.to(tl.int64) * stride_q + (head * GROUP + heads) * stride_q_head
            q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=is_kept, other=0.0)
            split_tokens = tl.cdiv(tl.cdiv(prefix, num_splits), TILE) * TILE
            peak, total, output = attend_tiles(
                q, k_ptr + head * stride_kv_head, v_ptr + head * stride_kv_head,
                table_ptr + leader.to(tl.int64) * stride_table,
                split * split_tokens, tl.minimum((split + 1) * split_tokens, prefix), 0,
                scale, soft_cap, stride_block, stride_slot, HEAD_SIZE, BLOCK_SIZE, TILE, False, HAS_CAP, PRECISION,
            )  # fmt: skip
            total = tl.where(total == 0.0, 1.0, total)  # a split without keys: output 0, lse -inf, weight 0
            part_rows = ((requests * num_kv_heads + head) * num_slots + split) * GROUP + heads
            output /= total[:, None]
            lse = peak + tl.log2(total)
            store_part(parts_ptr, lse_ptr, part_rows, is_row, lse, output, HEAD_SIZE)


def shared_prefix_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    prefix_tokens: torch.Tensor,
    group_starts: torch.Tensor,
    members: torch.Tensor,
    out: torch.Tensor,
    workspace: SplitWorkspace,
    *,
    max_own_tokens: int,
    scale: float | None = None,
    soft_cap: float | None = None,
    config: PrefixConfig | None = None,
    side_stream: torch.cuda.Stream | None = None,
) -> None:
    """`paged_decode` where request r shares its first prefix_tokens[r] keys with its whole group.

    Group g is the requests members[group_starts[g] : group_starts[g + 1]] (int32 [B] and [G + 1]), each in one group at
    most; their block tables begin with the same blocks, their prefix_tokens [B] are equal. A request without a group
    shares nothing: its prefix_tokens are 0. `max_own_tokens` bounds num_tokens - prefix_tokens: keys beyond it are not
    seen, and only the GPU could tell; `workspace_rows` says what room it takes. With a `side_stream` the prefix
    (arithmetic) runs beside the own keys (memory). A layer with a sliding window gains nothing: call `paged_decode`.
    Raises ValueError for shapes, types and workspaces that do not fit. Allocates nothing; fit for a CUDA graph.
    """
    config = config or prefix_config(q.device)
    inputs = (q, k_cache, v_cache, block_table, num_tokens)
    arguments = decode_arguments(*inputs, out, scale, None, soft_cap, config.own)
    _check_groups(prefix_tokens, group_starts, members, q)
    if len(q) == 0:
        return
    require(max_own_tokens > 0, f"max_own_tokens is {max_own_tokens}: pass the most keys a request has of its own")
    cuts = _cut(inputs, len(group_starts) - 1, max_own_tokens, config)
    num_cut_rows = 2 * cuts.num_programs * arguments.shape["GROUP"]
    workspace.require_room(num_cut_rows + q.shape[0] * q.shape[1] * cuts.chunking.num_slots, q.shape[2])
    parts = workspace.behind(num_cut_rows)
    if side_stream is not None:
        side_stream.wait_stream(torch.cuda.current_stream(q.device))
    with torch.cuda.stream(side_stream):
        _store_prefix(inputs, (prefix_tokens, group_starts, members), parts, arguments, config, cuts)
    _store_own(inputs, prefix_tokens, workspace, parts, arguments, cuts)
    if side_stream is not None:
        torch.cuda.current_stream(q.device).wait_stream(side_stream)
    merge_chunks(inputs, prefix_tokens, out, parts, arguments, cuts.chunking)


def _check_groups(
    prefix_tokens: torch.Tensor, group_starts: torch.Tensor, members: torch.Tensor, q: torch.Tensor
) -> None:
    check_index("prefix_tokens", prefix_tokens, (len(q),), q.device)
    check_index("group_starts", group_starts, (len(group_starts),), q.device)
    check_index("members", members, (len(q),), q.device)
    require(len(group_starts) >= 2, "group_starts needs G + 1 entries: where each group begins, where the last ends")


def workspace_rows(device: torch.device, num_requests: int, num_heads: int, group: int, max_own_tokens: int) -> int:
    """Rows of a workspace that any launch of up to `num_requests` requests fits in."""
    config, num_sms = prefix_config(device), num_multiprocessors(device)
    _, num_parts = config.own_parts(max_own_tokens)
    cut_rows = 2 * config.stream.shares_per_sm * num_sms * group if config.stream else 0
    prefix_rows = max(num_requests * num_heads, num_sms * config.rows)  # one split each, or tiles for every SM
    return cut_rows + prefix_rows + num_requests * num_heads * num_parts


@dataclass(frozen=True)
class _Cuts:
    """Where a launch cuts its keys."""

    row_tiles: int  # tiles of queries against the prefixes
    chunking: Chunking  # of own keys; its first slots are the parts of a prefix
    stream: HopperDecodeConfig | None  # own keys by equal shares: one part a request
    num_programs: int  # that take those shares


def _cut(inputs: tuple[torch.Tensor, ...], num_groups: int, max_own_tokens: int, config: PrefixConfig) -> _Cuts:
    """What the shapes say; what the lengths say, only the GPU knows."""
    q, k_cache, v_cache = inputs[:3]
    num_sms, num_kv_heads = num_multiprocessors(q.device), k_cache.shape[2]
    full_tiles = triton.cdiv(len(q) * (q.shape[1] // num_kv_heads), config.rows)
    row_tiles = full_tiles + num_groups - 1  # every group but one may end in a tile that it does not fill
    num_splits = config.num_splits(num_kv_heads * full_tiles, num_sms)
    stream = config.stream
    if stream is None or decode_obstacle(q, k_cache, v_cache) is not None:
        split_tokens, num_parts = config.own_parts(max_own_tokens)
        return _Cuts(row_tiles, Chunking(split_tokens, num_splits + num_parts, num_splits, prefix_tile=1), None, 0)
    tile = stream.tile_tokens(q.shape[2], k_cache.shape[1])
    split_tokens = max_own_tokens + tile  # more than any request has behind its rounded prefix
    chunking = Chunking(split_tokens, num_splits + 1, num_splits, prefix_tile=tile)
    return _Cuts(row_tiles, chunking, stream, stream.shares_per_sm * num_sms)


def _store_prefix(
    inputs: tuple[torch.Tensor, ...],
    groups: tuple[torch.Tensor, ...],  # prefix_tokens, group_starts, members
    parts: SplitWorkspace,
    arguments: DecodeArguments,
    config: PrefixConfig,
    cuts: _Cuts,
) -> None:
    """The parts of each group's prefix, for all its requests at once."""
    q, k_cache, v_cache, block_table, _ = inputs
    num_groups = len(groups[1]) - 1
    reading = arguments.reading | config.reading(arguments.shape["COLS"] * q.element_size())
    del reading["HAS_WINDOW"]
    prefix_kernel[(k_cache.shape[2], cuts.chunking.first_slot, cuts.row_tiles)](
        q, k_cache, v_cache, block_table, *groups, parts.parts, parts.lse, num_groups,
        cuts.chunking.num_slots, *arguments.numbers[:2], *arguments.strides,
        GROUPS=triton.next_power_of_2(num_groups), PREFIX_TILE=cuts.chunking.prefix_tile, **arguments.shape, **reading,
    )  # fmt: skip


def _store_own(
    inputs: tuple[torch.Tensor, ...],
    prefix_tokens: torch.Tensor,
    workspace: SplitWorkspace,
    parts: SplitWorkspace,
    arguments: DecodeArguments,
    cuts: _Cuts,
) -> None:
    """The parts of each request's own keys, behind those of its prefix."""
    if cuts.stream is None:
        store_chunks(inputs, prefix_tokens, parts, arguments, cuts.chunking)
        return
    group, head_size, num_kv_heads = arguments.shape["GROUP"], inputs[0].shape[2], inputs[1].shape[2]
    first_row, pair_stride = cuts.chunking.first_slot * group, cuts.chunking.num_slots * group * head_size
    launch_stream(
        inputs, parts.parts[first_row:], (num_kv_heads * pair_stride, pair_stride, head_size), workspace, arguments,
        cuts.stream, prefix_tokens, parts.lse[first_row:],
    )  # fmt: skip
