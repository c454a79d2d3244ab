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

import torch
import triton
import triton.language as tl

from minivllm_kernels.attention_configs import PrefixConfig, prefix_config
from minivllm_kernels.checks import check_index, require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.split_kv import (
    SplitWorkspace,
    attend_tiles,
    decode_arguments,
    merge_chunks,
    store_chunks,
    store_part,
)


@triton.jit(do_not_specialize=["num_groups", "num_slots"])
def prefix_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, prefix_ptr, group_starts_ptr, parts_ptr, lse_ptr, num_groups, num_slots,
    scale, soft_cap, stride_q, stride_q_head, stride_block, stride_slot, stride_kv_head, stride_table,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
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
        prefix = tl.load(prefix_ptr + first)
        if prefix > 0:
            rows, columns = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
            requests, heads = (first + rows // GROUP).to(tl.int64), rows % GROUP  # row = (request, head in its group)
            is_row = rows < size * GROUP
            is_kept = is_row[:, None] & (columns < HEAD_SIZE)[None, :]
            q_rows = requests * stride_q + (head * GROUP + heads) * stride_q_head
            q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=is_kept, other=0.0)
            split_tokens = tl.cdiv(tl.cdiv(prefix, num_splits), TILE) * TILE
            peak, total, output = attend_tiles(
                q, k_ptr + head * stride_kv_head, v_ptr + head * stride_kv_head,
                table_ptr + first.to(tl.int64) * stride_table,
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

    Groups are runs of requests: group g is requests group_starts[g] .. group_starts[g + 1] - 1 (int32 [G + 1], from 0
    to B); its block tables begin with the same blocks and its prefix_tokens [B] are equal; 0 means nothing is shared.
    `max_own_tokens` bounds num_tokens - prefix_tokens. With a `side_stream` the prefix (arithmetic) runs beside the
    own keys (memory). A layer with a sliding window gains nothing here: call `paged_decode`.
    Raises ValueError for shapes, types and workspaces that do not fit. Allocates nothing; fit for a CUDA graph.
    """
    config = config or prefix_config(q.device)
    inputs = (q, k_cache, v_cache, block_table, num_tokens)
    arguments = decode_arguments(*inputs, out, scale, None, soft_cap, config.own)
    check_index("prefix_tokens", prefix_tokens, (len(q),), q.device)
    check_index("group_starts", group_starts, (len(group_starts),), q.device)
    num_groups, num_kv_heads = len(group_starts) - 1, k_cache.shape[2]
    require(num_groups > 0, "group_starts needs G + 1 entries, from 0 to the number of requests")
    row_tiles = triton.cdiv(len(q) * arguments.shape["GROUP"], config.rows) + num_groups - 1
    num_splits = config.num_splits(num_kv_heads * row_tiles, num_multiprocessors(q.device))
    slots = (num_splits, num_splits + triton.cdiv(max_own_tokens, config.own_split_tokens))
    workspace.require_room(q.shape[0] * q.shape[1] * slots[1], q.shape[2])
    reading = arguments.reading | config.reading(arguments.shape["COLS"] * q.element_size())
    del reading["HAS_WINDOW"]
    if side_stream is not None:
        side_stream.wait_stream(torch.cuda.current_stream(q.device))
    with torch.cuda.stream(side_stream):
        prefix_kernel[(num_kv_heads, num_splits, row_tiles)](
            q, k_cache, v_cache, block_table, prefix_tokens, group_starts, workspace.parts, workspace.lse,
            num_groups, slots[1], *arguments.numbers[:2], *arguments.strides,
            GROUPS=triton.next_power_of_2(num_groups), **arguments.shape, **reading,
        )  # fmt: skip
    store_chunks(inputs, prefix_tokens, workspace, arguments, config.own_split_tokens, *slots)
    if side_stream is not None:
        torch.cuda.current_stream(q.device).wait_stream(side_stream)
    merge_chunks(inputs, prefix_tokens, out, workspace, arguments, config.own_split_tokens, *slots)
