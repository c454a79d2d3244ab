"""Decode attention for Hopper GPUs: the equal shares of paged_decode, with a warp that fetches far ahead.

    fetching warp     K0 V0 K1 V1 | K0 V0 | K0 V0 K1 ...     over the borders of requests, see hopper_stream.py
                       \\  \\  \\        \\
    shared memory     [a ring of 3 tiles of 32 kB]     three times what hides the memory's latency
                       |  |
    group of 4 warps  S' = K Q'   [tile keys, heads]   tensor cores read K from where it landed
                      P' = exp2(S' - peak)             one peak per head: a column
                      O' += V' P' [head size, heads]   ... and V; P' passes through 1 kB of shared memory

Keys, not heads, fill the 64 rows that the tensor cores want, and heads are padded to 8 only: few instructions, and
hardly a register, for a tile that takes 1700 cycles to arrive. A share that ends within a pair leaves a part, and
whoever stores a pair's last part merges them.

Bytes per token and layer: 2 * Hkv * D * itemsize, each read once; all query heads of a KV head ride along.
"""

import math

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minivllm_kernels.attention_configs import HOPPER_DECODE_HEAD_SIZES, HopperDecodeConfig, hopper_decode_config
from minivllm_kernels.checks import hopper_obstacle, require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.hopper_fetch import BOX_COLUMNS
from minivllm_kernels.hopper_merge import merge_parts
from minivllm_kernels.hopper_stream import equal_share, next_pair, produce, segment
from minivllm_kernels.split_kv import DecodeArguments, decode_arguments
from minivllm_kernels.workspace import SplitWorkspace

LOG2_E = gl.constexpr(math.log2(math.e))
QUERY_SLOTS = gl.constexpr(2)  # of this segment and of the next


@gluon.jit
def _softmax(scores, peak, first_key, length, factors):
    """Scores [TILE, HEADS] of the keys from `first_key` on -> weights, what older sums shrink by, running maximum."""
    scale, soft_cap, window = factors
    if soft_cap is not None:  # cap * tanh(x / cap), in units of log 2
        scores = soft_cap * LOG2_E * (1 - 2 / (1 + gl.exp2(scores * (2 * scale / soft_cap))))
    else:
        scores *= scale
    keys = first_key + gl.arange(0, scores.shape[0], layout=gl.SliceLayout(1, scores.type.layout))[:, None]
    is_seen = keys < length
    if window is not None:
        is_seen = is_seen & (keys >= length - window)
    scores = gl.where(is_seen, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 0))
    return gl.exp2(scores - new_peak[None, :]), gl.exp2(peak - new_peak), new_peak


@gluon.jit
def _clear_rows(tiles, slot, first_row):
    """Zero the rows of a tile from `first_row` on: nobody wrote them, and 0 * NaN is NaN."""
    TILE: gl.constexpr = tiles.shape[1]
    HALVES: gl.constexpr = tiles.shape[2] // BOX_COLUMNS
    halves = tiles._reinterpret(tiles.dtype, [tiles.shape[0] * HALVES, TILE, BOX_COLUMNS], tiles.layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))[:, None]
    for half in gl.static_range(HALVES):
        part = halves.index(slot * HALVES + half)
        part.store(gl.where(rows < first_row, part.load(layout), 0.0).to(tiles.dtype))


@gluon.jit
def _attend(q, buffers, full, empty, entry, begin, end, length, factors):
    """Online softmax over tiles begin .. end - 1: running maximum [HEADS], sum [HEADS] and output [COLS, HEADS]."""
    _queries, tiles, weights_buffer = buffers
    STAGES: gl.constexpr = tiles.shape[0]
    TILE: gl.constexpr = tiles.shape[1]
    COLS: gl.constexpr = tiles.shape[2]
    HEADS: gl.constexpr = weights_buffer.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    peak = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
    totals = gl.zeros([TILE, HEADS], gl.float32, layout)  # added up over the keys at the end only
    output = gl.zeros([COLS, HEADS], gl.float32, layout)
    for tile in range(begin, end):
        k_slot, v_slot = entry % STAGES, (entry + 1) % STAGES
        mbarrier.wait(full.index(k_slot), entry // STAGES & 1)
        scores = gl.zeros([TILE, HEADS], gl.float32, layout)
        scores = warpgroup_mma(tiles.index(k_slot), q, scores, use_acc=False)
        mbarrier.arrive(empty.index(k_slot), count=1)
        weights, shrink, peak = _softmax(scores, peak, tile * TILE, length, factors)
        totals = totals * shrink[None, :] + weights
        output *= shrink[None, :]
        weights_buffer.permute((1, 0)).store(weights.to(tiles.dtype))
        mbarrier.wait(full.index(v_slot), (entry + 1) // STAGES & 1)
        if length - tile * TILE < TILE:
            _clear_rows(tiles, v_slot, length - tile * TILE)
        fence_async_shared()  # the tensor cores read through another path than these stores
        output = warpgroup_mma(tiles.index(v_slot).permute((1, 0)), weights_buffer.permute((1, 0)), output)
        mbarrier.arrive(empty.index(v_slot), count=1)
        entry += 2
    return peak, gl.sum(totals, 0), output, entry


@gluon.jit
def _consume(
    shared, share, workspace, out_ptr, out_lse_ptr, strides,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, MERGE_ROWS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The four warps that multiply: each segment of the share, then its output, or a part of it."""
    buffers, barriers, lengths_ptrs, factors = shared
    q_full, q_empty, full, empty = barriers
    parts_ptr, lse_ptr, arrivals_ptr = workspace
    stride_out, stride_out_pair, stride_out_head = strides
    queries, tiles, _ = buffers
    COLS: gl.constexpr = tiles.shape[2]
    entry, num_segments = 0, 0  # so far
    share_tiles, position, stop, request, head, pair_start = share
    while position < stop:
        length, begin, end, segment_stop, pair_stop = segment(
            position, stop, pair_start, request, lengths_ptrs, factors[2], tiles.shape[1]
        )
        q_slot = num_segments % QUERY_SLOTS
        mbarrier.wait(q_full.index(q_slot), num_segments // QUERY_SLOTS & 1, pred=begin < end)
        q = queries.index(q_slot).permute((1, 0))
        peak, total, output, entry = _attend(q, buffers, full, empty, entry, begin, end, length, factors)
        mbarrier.arrive(q_empty.index(q_slot), count=1, pred=begin < end)
        num_segments += (begin < end).to(gl.int32)
        output *= (1 / gl.where(total == 0, 1.0, total))[None, :]  # a padded row sees no key: zero
        heads = gl.arange(0, queries.shape[1], layout=gl.SliceLayout(0, output.type.layout))
        columns = gl.arange(0, COLS, layout=gl.SliceLayout(1, output.type.layout))[:, None]
        is_kept = (heads < GROUP)[None, :]
        pair_offset = request.to(gl.int64) * stride_out + head * stride_out_pair
        out_row, lse_row = out_ptr + pair_offset, None
        if out_lse_ptr is not None:
            lse_row = out_lse_ptr + pair_offset // COLS
        first_part, last_part = pair_start // share_tiles, (pair_stop - 1) // share_tiles
        if first_part == last_part:
            pointers = out_row + heads[None, :] * stride_out_head + columns
            gl.store(pointers, output.to(out_ptr.dtype.element_ty), mask=is_kept)
            if lse_row is not None:
                gl.store(lse_row + heads * stride_out_head // COLS, peak + gl.log2(total), mask=heads < GROUP)
        else:  # one pair may end in this share, and another begin: two slots
            slot = gl.program_id(0) + gl.where(position == pair_start, 0, gl.num_programs(0))
            part_rows = slot * GROUP + heads
            gl.store(parts_ptr + part_rows[None, :] * COLS + columns, output, mask=is_kept)
            gl.store(lse_ptr + part_rows, peak + gl.log2(total), mask=heads < GROUP)
            tl.debug_barrier()  # all threads' parts are stored before one says so; Gluon's name changed in Triton 3.7
            arrived = gl.atomic_add(arrivals_ptr + first_part, 1, sem="acq_rel")
            if arrived == last_part - first_part:
                num_parts = last_part - first_part + 1
                merge_parts(
                    workspace, first_part, num_parts, out_row, lse_row, stride_out_head, GROUP, COLS, MERGE_ROWS, PARTS
                )  # fmt: skip
                gl.store(arrivals_ptr + first_part, 0)  # ready for the next launch
        position, pair_start = segment_stop, pair_stop
        request, head = next_pair(request, head, NUM_KV_HEADS)


@gluon.jit(do_not_specialize=["batch_size", "window", "stride_table"])
def _hopper_decode_kernel(
    q_desc, k_desc, v_desc, table_ptr, num_tokens_ptr, prefix_ptr, out_ptr, out_lse_ptr, parts_ptr, lse_ptr,
    arrivals_ptr, batch_size, window, stride_table, stride_out, stride_out_pair, stride_out_head, scale, soft_cap,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, COLS: gl.constexpr, BLOCK: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr, LEAST_TILES: gl.constexpr, BATCH: gl.constexpr,
    MERGE_ROWS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """One program per equal share of the line of tiles."""
    HEADS: gl.constexpr = q_desc.block_shape[1]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(q_desc.dtype, [QUERY_SLOTS, HEADS, COLS], layout)
    tiles = gl.allocate_shared_memory(q_desc.dtype, [STAGES, TILE, COLS], layout)
    weights_buffer = gl.allocate_shared_memory(q_desc.dtype, [HEADS, TILE], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERY_SLOTS, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERY_SLOTS, 1], barrier_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    for slot in gl.static_range(QUERY_SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    lengths_ptrs = (num_tokens_ptr, prefix_ptr)
    share = equal_share(lengths_ptrs, batch_size, window, NUM_KV_HEADS, TILE, LEAST_TILES, BATCH)
    barriers = (q_full, q_empty, full, empty)
    shared = ((queries, tiles, weights_buffer), barriers, lengths_ptrs, (scale * LOG2_E, soft_cap, window))
    workspace, strides = (parts_ptr, lse_ptr, arrivals_ptr), (stride_out, stride_out_pair, stride_out_head)
    # Triton 3.6 hands the parts over where the last sum passed between warps, and does not wait until all have read it.
    tl.debug_barrier()
    # Registers: 128 a thread at launch; fetching needs few and leaves the rest to the multiplying warps.
    gl.warp_specialize(
        [
            (
                _consume,
                (shared, share, workspace, out_ptr, out_lse_ptr, strides, NUM_KV_HEADS, GROUP, MERGE_ROWS, PARTS),
            ),
            (produce, ((q_desc, k_desc, v_desc), shared, share, table_ptr, stride_table, NUM_KV_HEADS, GROUP, BLOCK)),
        ],
        [1],
        [56],
    )


def decode_obstacle(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why this kernel cannot serve these tensors and paged_decode has to; None if it can."""
    head_size, group = q.shape[2], q.shape[1] // k_cache.shape[2]
    if head_size not in HOPPER_DECODE_HEAD_SIZES:
        return f"head size {head_size} is not one of {HOPPER_DECODE_HEAD_SIZES}"
    if group > 64:
        return f"{group} query heads share a KV head, at most 64 here"
    return hopper_obstacle(k_cache.shape[1], q, k_cache, v_cache)


def launch_stream(
    inputs: tuple[torch.Tensor, ...],  # q, k_cache, v_cache, block_table, num_tokens
    out: torch.Tensor,
    out_strides: tuple[int, int, int],  # of requests, KV heads, query heads
    workspace: SplitWorkspace,
    arguments: DecodeArguments,
    config: HopperDecodeConfig | None,
    prefix_tokens: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
) -> None:
    """Equal shares of the keys behind each request's prefix, if any; base-2 log sums to `out_lse` at out's rows."""
    q, k_cache, v_cache, block_table, num_tokens = inputs
    obstacle = decode_obstacle(q, k_cache, v_cache)
    require(obstacle is None, f"{obstacle}: use paged_decode")
    if len(q) == 0:
        return
    head_size, group, block_size = q.shape[2], arguments.shape["GROUP"], k_cache.shape[1]
    rows = max(8, triton.next_power_of_2(group))  # heads as columns of a product
    num_sms = num_multiprocessors(q.device)
    config = config or hopper_decode_config(group, head_size, len(q) * k_cache.shape[2] / num_sms)
    tile = config.tile_tokens(head_size, block_size)
    programs = config.shares_per_sm * num_sms
    workspace.require_room(2 * programs * group, head_size, programs)
    box = [1, 1, min(block_size, tile, config.box_tokens), BOX_COLUMNS.value]
    _, soft_cap, window = arguments.numbers
    _hopper_decode_kernel[(programs,)](
        _descriptor(q, [1, rows, BOX_COLUMNS.value]),
        _descriptor(k_cache.transpose(1, 2), box), _descriptor(v_cache.transpose(1, 2), box),
        block_table, num_tokens, prefix_tokens, out, out_lse, workspace.parts, workspace.lse, workspace.arrivals,
        len(q), window or None, block_table.stride(0), *out_strides, arguments.scale, soft_cap or None,
        NUM_KV_HEADS=k_cache.shape[2], GROUP=group, COLS=head_size, BLOCK=block_size, TILE=tile,
        STAGES=config.num_stages, LEAST_TILES=config.least_tiles,
        BATCH=max(128, triton.next_power_of_2(len(q))), **arguments.merging,
        num_warps=4, maxnreg=config.registers,
    )  # fmt: skip


def _descriptor(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """What the copy engine must know of a tensor: where, how large, which strides, how much at once."""
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout(128, 16, len(box)))


def paged_decode_hopper(
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
    config: HopperDecodeConfig | None = None,
) -> None:
    """Attention of one query per request over its `num_tokens` keys, written to `out`; zeros where that is 0.

    As paged_decode, for bf16 or fp16, D 64 or 128, blocks of 8 and more, 64 query heads a KV head at most.
    Raises ValueError for anything else. Allocates nothing; fit for a CUDA graph.
    """
    inputs = (q, k_cache, v_cache, block_table, num_tokens)
    arguments = decode_arguments(*inputs, out, scale, window, soft_cap, None)
    strides = (out.stride(0), arguments.shape["GROUP"] * out.stride(1), out.stride(1))
    launch_stream(inputs, out, strides, workspace, arguments, config)
