"""Decode attention: one query per request over its blocks, the work cut into equal shares whatever the lengths.

Line up the tiles of every (request, KV head) pair behind one another and give each program an equal stretch
(stream-K: Osama et al. 2023; for attention: LeanAttention, Sanovar et al. 2024):

    pairs     | request 0, head 0 | r0, h1            | r1, h0 | r1, h1 | r2, h0 ...
    programs  |      0      |      1      |      2      |      3      |      4 ...

A program that holds all of a pair writes its output. A pair cut by a border is stored in parts, two slots a program at
most, and whoever stores the last part merges them in order: no second launch, no tail, and the workspace does not grow
with the batch. Where the cuts fall depends on the batch, and with it the last bits of the sums. `split_tokens` fixes
them: every request is cut at multiples of that many tokens, so its output has the same bits in any batch.

Bytes per token and layer: 2 * Hkv * D * itemsize, each read once; all query heads of a KV head ride along.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels.attention_configs import DecodeConfig
from minivllm_kernels.checks import require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.split_kv import (
    Chunking,
    attend_tiles,
    decode_arguments,
    merge_chunks,
    merge_partials,
    store_chunks,
    store_part,
)
from minivllm_kernels.workspace import SplitWorkspace


@triton.jit(do_not_specialize=["batch_size", "window"])
def stream_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, num_tokens_ptr, out_ptr, parts_ptr, lse_ptr, arrivals_ptr,
    batch_size, scale, soft_cap, window, stride_q, stride_q_head, stride_block, stride_slot, stride_kv_head,
    stride_table, stride_out, stride_out_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, LEAST_TILES: tl.constexpr, BATCH: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per equal share of the line of tiles."""
    program, requests = tl.program_id(0), tl.arange(0, BATCH)
    lengths = tl.load(num_tokens_ptr + requests, mask=requests < batch_size, other=0)
    tiles = tl.cdiv(lengths, TILE)
    if HAS_WINDOW:
        tiles -= tl.maximum(lengths - window, 0) // TILE  # tiles wholly before the window are nobody's work
    tiles = tl.where(requests < batch_size, tl.maximum(tiles, 1), 0)  # a padded row's one empty tile writes its zeros
    ends = tl.cumsum(tiles, 0) * NUM_KV_HEADS  # where each request's work ends in the line of tiles
    all_tiles = tl.sum(tiles) * NUM_KV_HEADS
    share = tl.maximum(tl.cdiv(all_tiles, tl.num_programs(0)), LEAST_TILES)
    position, stop = program * share, tl.minimum(program * share + share, all_tiles)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLS)
    is_kept = (rows < GROUP)[:, None] & (columns < HEAD_SIZE)[None, :]
    while position < stop:
        request = tl.sum((ends <= position).to(tl.int32))
        pair_tiles = tl.sum(tl.where(requests == request, tiles, 0))
        request_start = tl.sum(tl.where(requests == request, ends, 0)) - pair_tiles * NUM_KV_HEADS
        head = (position - request_start) // pair_tiles
        pair_start = request_start + head * pair_tiles
        pair_stop = pair_start + pair_tiles
        length = tl.load(num_tokens_ptr + request)
        first_visible = tl.maximum(length - window, 0) if HAS_WINDOW else 0
        skipped = first_visible // TILE - pair_start  # from a place in the line to a tile of the request
        segment_stop = tl.minimum(pair_stop, stop)
        q_rows = request.to(tl.int64) * stride_q + (head * GROUP + rows) * stride_q_head
        q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=is_kept, other=0.0)
        peak, total, output = attend_tiles(
            q, k_ptr + head * stride_kv_head, v_ptr + head * stride_kv_head,
            table_ptr + request.to(tl.int64) * stride_table,
            (position + skipped) * TILE, tl.minimum((segment_stop + skipped) * TILE, length), first_visible,
            scale, soft_cap, stride_block, stride_slot, HEAD_SIZE, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_CAP, PRECISION,
        )  # fmt: skip
        output /= tl.where(total == 0.0, 1.0, total)[:, None]  # a padded row sees no key: zero
        out_row = out_ptr + request.to(tl.int64) * stride_out + head * GROUP * stride_out_head
        first_part, last_part = pair_start // share, (pair_stop - 1) // share
        if first_part == last_part:
            out_rows = out_row + rows[:, None] * stride_out_head + columns[None, :]
            tl.store(out_rows, output.to(out_ptr.dtype.element_ty), mask=is_kept)
        else:
            slot = program + (position != pair_start) * tl.num_programs(0)  # one pair may end here, another begin
            lse = peak + tl.log2(total)
            store_part(parts_ptr, lse_ptr, slot * GROUP + rows, rows < GROUP, lse, output, HEAD_SIZE)
            tl.debug_barrier()  # every thread's part is stored before one thread says so
            arrived = tl.atomic_add(arrivals_ptr + first_part, 1, sem="acq_rel")
            if arrived == last_part - first_part:
                merge_partials(
                    parts_ptr, lse_ptr, first_part, tl.num_programs(0) + first_part, last_part - first_part + 1,
                    out_row, stride_out_head, GROUP, HEAD_SIZE, MERGE_ROWS, COLS, PARTS,
                )  # fmt: skip
                tl.store(arrivals_ptr + first_part, 0)  # ready for the next launch
        position = segment_stop


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
    workspace: SplitWorkspace,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    split_tokens: int | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of one query per request over its `num_tokens` keys, written to `out`; zeros where that is 0.

    q, out [B, H, D]; k_cache, v_cache [num_blocks, block_size, Hkv, D], any strides; block_table [B, M] and
    num_tokens [B] int32. A request sees its last `window` keys; `soft_cap` caps scores as cap * tanh(score / cap).
    `split_tokens`, a multiple of the tile, gives each request the same bits in any batch, for a second launch.
    Raises ValueError for shapes, types and workspaces that do not fit. Allocates nothing; fit for a CUDA graph.
    """
    inputs = (q, k_cache, v_cache, block_table, num_tokens)
    arguments = decode_arguments(*inputs, out, scale, window, soft_cap, config)
    if len(q) == 0:
        return
    if split_tokens is not None:
        require(split_tokens > 0, f"split_tokens is {split_tokens}: pass a multiple of the tile, or None")
        num_chunks = triton.cdiv(block_table.shape[1] * k_cache.shape[1], split_tokens)
        chunking = Chunking(split_tokens, num_chunks)
        store_chunks(inputs, None, workspace, arguments, chunking)
        merge_chunks(inputs, None, out, workspace, arguments, chunking)
        return
    programs = arguments.config.programs_per_sm * num_multiprocessors(q.device)
    workspace.require_room(2 * programs * arguments.shape["GROUP"], q.shape[2], programs)
    stream_kernel[(programs,)](
        *inputs, out, workspace.parts, workspace.lse, workspace.arrivals, len(q),
        *arguments.numbers, *arguments.strides, out.stride(0), out.stride(1),
        NUM_KV_HEADS=k_cache.shape[2], LEAST_TILES=arguments.config.least_tiles,
        BATCH=triton.next_power_of_2(len(q)), **arguments.shape, **arguments.merging, **arguments.reading,
    )  # fmt: skip
