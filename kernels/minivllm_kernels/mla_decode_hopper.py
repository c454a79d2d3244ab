"""MLA decode for Hopper GPUs: one warp fetches latent rows far ahead, groups of four warps multiply what has landed.

The work is mla_decode's (equal shares of one line of tiles, parts merged by a second launch), the way is another. A
tensor core takes 64 rows at least and 16 heads are too few: here tokens and columns are the rows, heads the columns.

    tile, in boxes          RoPE | latent 0 | latent 1 | ... | latent 7     64 tokens x 64 columns each, 8 kB
    scores   [64, HEADS]     =  sum over all boxes of   box   @ (q of its columns)^T
    output i [64, HEADS]    +=  of each latent box      box^T @ softmax(scores)     O^T as 8 strips of 64 columns
    ring of 24 boxes        [9 held by tile t][15 landed or under way: tiles t + 1 and t + 2]        see mla_fetch.py

Whole tiles would fit but twice beside the queries. A tile takes 2.3 us to arrive and 1 us to multiply: meanwhile the
ring keeps 120 kB under way, where two tiles keep 74. 64 heads are two groups of 32 on one ring: one group multiplies
while the other takes exponentials.

Bytes per token and layer: 1152, read once for up to 64 heads. Operations: 2 * H * (576 + 512) per token.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minivllm_kernels.attention_configs import MlaHopperConfig, mla_hopper_config
from minivllm_kernels.checks import check_options, hopper_obstacle, require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.mla_decode import check_latent, merge_stream_kernel, merging
from minivllm_kernels.mla_fetch import BOX, TILE, equal_share, produce, segment
from minivllm_kernels.split_kv import LOG2_E
from minivllm_kernels.workspace import SplitWorkspace


@gluon.jit
def _box(ring, full, turn, box, PACK: gl.constexpr):
    """A tile's box in shared memory: the tile's packs begin at `turn` of the ring."""
    return ring.index((turn + box // PACK) % full.shape[0] * PACK + box % PACK)


@gluon.jit
def _clear_rows(ring, full, turn, first_row, BEGIN: gl.constexpr, END: gl.constexpr, PACK: gl.constexpr):
    """Zero the rows of boxes BEGIN .. END - 1 from `first_row` on: nobody wrote them, and 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))[:, None]
    for box in range(BEGIN, END):
        part = _box(ring, full, turn, box, PACK)
        part.store(gl.where(rows < first_row, part.load(layout), 0.0).to(ring.dtype))


@gluon.jit
def _attend(
    shared, first_turn, num_queries, num_keys, num_tiles, scale,
    group: gl.constexpr, LATENT_BOXES: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """A group's heads over tiles of one request, `num_keys` from the first: O^T in strips of 64 columns, and lse."""
    ring, queries, probs, full, empty, q_full, q_empty = shared
    PLACES: gl.constexpr = full.shape[0]
    HEADS: gl.constexpr = queries.shape[1]
    BOXES: gl.constexpr = queries.shape[0] // probs.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))[:, None]
    peak = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
    total = gl.zeros([TILE, HEADS], gl.float32, layout)  # a sum for every row: added up at the end, not for each tile
    outputs = ()
    for _ in gl.static_range(LATENT_BOXES):
        outputs += (gl.zeros([BOX, HEADS], gl.float32, layout),)  # type: ignore[assignment]
    mbarrier.wait(q_full.index(0), num_queries & 1, pred=num_tiles > 0)
    for tile in range(num_tiles):
        turn, keys_left = first_turn + tile * (BOXES // PACK), num_keys - tile * TILE
        scores = gl.zeros([TILE, HEADS], gl.float32, layout)
        for box in gl.static_range(BOXES):  # as they land
            if box % PACK == 0:
                mbarrier.wait(full.index((turn + box // PACK) % PLACES), (turn + box // PACK) // PLACES & 1)
            q = queries.index(group * BOXES + box).permute((1, 0))
            scores = warpgroup_mma(_box(ring, full, turn, box, PACK), q, scores, use_acc=box > 0, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(q_empty.index(0), count=1, pred=tile == num_tiles - 1)
        scores = gl.where(rows < keys_left, scores, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(scores, 0))
        shrink = gl.exp2((peak - new_peak) * scale)[None, :]
        weights = gl.exp2((scores - new_peak[None, :]) * scale)
        peak, total = new_peak, total * shrink + weights
        probs.index(group).permute((1, 0)).store(weights.to(probs.dtype))
        if keys_left < TILE:
            _clear_rows(ring, full, turn, keys_left, BOXES - LATENT_BOXES, BOXES, PACK)
        fence_async_shared()  # the tensor cores read through another path than these stores
        products = ()
        for strip in gl.static_range(LATENT_BOXES):
            columns = _box(ring, full, turn, BOXES - LATENT_BOXES + strip, PACK).permute((1, 0))
            weight = probs.index(group).permute((1, 0))
            product = warpgroup_mma(columns, weight, outputs[strip] * shrink, is_async=True)
            products += (product,)  # type: ignore[assignment]
        outputs = warpgroup_mma_wait(0, deps=products)
        for pack in gl.static_range(BOXES // PACK):
            mbarrier.arrive(empty.index((turn + pack) % PLACES), count=1)
    return outputs, peak * scale, gl.sum(total, 0)


@gluon.jit
def _consume(
    shared, work, target, scale, head,
    NUM_HEADS: gl.constexpr, group: gl.constexpr, LATENT_BOXES: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """A group of four warps: its heads of every request of the share."""
    _, queries, probs, _, _, _, _ = shared
    num_tokens_ptr, position, stop, share, request, request_start = work
    out_ptr, parts_ptr, lse_ptr, stride_out, stride_out_head, share_index, shares = target
    HEADS: gl.constexpr = queries.shape[1]
    LATENT: gl.constexpr = LATENT_BOXES * BOX
    # Eight columns to a thread: a product's own layout would store two bytes at a time.
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    columns = gl.arange(0, BOX, layout=gl.SliceLayout(1, layout))[:, None]
    heads = head + group * HEADS + gl.arange(0, HEADS, layout=gl.SliceLayout(0, layout))
    turn, num_queries = 0, 0
    while position < stop:
        num_tokens, request_stop, segment_stop, first, num_tiles = segment(
            num_tokens_ptr, position, stop, request, request_start
        )
        outputs, peak, total = _attend(
            shared, turn, num_queries, num_tokens - first * TILE, num_tiles, scale, group, LATENT_BOXES, PACK
        )
        total = gl.where(total == 0, 1.0, total)  # a padded row sees no key: zero
        target_ptr, stride_head = out_ptr + request.to(gl.int64) * stride_out, stride_out_head
        if request_start // share != (request_stop - 1) // share:  # other shares hold the rest of it
            slot = share_index + gl.where(position != request_start, shares, 0)  # one may end here, another begin
            lse = gl.convert_layout(peak + gl.log2(total), gl.SliceLayout(0, layout))
            gl.store(lse_ptr + slot * NUM_HEADS + heads, lse, mask=heads < NUM_HEADS)
            target_ptr, stride_head = parts_ptr + slot.to(gl.int64) * (NUM_HEADS * LATENT), LATENT
        for box in gl.static_range(LATENT_BOXES):
            strip = (outputs[box] * (1 / total)[None, :]).to(out_ptr.dtype.element_ty)
            pointers = target_ptr + heads[None, :] * stride_head + (box * BOX + columns)
            gl.store(pointers, gl.convert_layout(strip, layout), mask=(heads < NUM_HEADS)[None, :])
        turn += num_tiles * (queries.shape[0] // probs.shape[0] // PACK)
        num_queries += gl.minimum(num_tiles, 1)
        position, request, request_start = segment_stop, request + 1, request_stop


@gluon.jit(do_not_specialize=["batch_size", "stride_table"])
def _hopper_mla_kernel(
    q_desc, rope_desc, cache_desc, table_ptr, num_tokens_ptr, out_ptr, parts_ptr, lse_ptr,
    batch_size, scale, stride_table, stride_out, stride_out_head,
    NUM_HEADS: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, LATENT_BOXES: gl.constexpr,
    BOXES: gl.constexpr, PACK: gl.constexpr, PLACES: gl.constexpr, BLOCK: gl.constexpr, BATCH: gl.constexpr,
    LEAST_TILES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    ring = gl.allocate_shared_memory(cache_desc.dtype, [PLACES * PACK, TILE, BOX], layout)
    queries = gl.allocate_shared_memory(cache_desc.dtype, [GROUPS * BOXES, HEADS, BOX], layout)
    probs = gl.allocate_shared_memory(cache_desc.dtype, [GROUPS, HEADS, TILE], layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], barrier_layout)  # its boxes have landed
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], barrier_layout)  # the groups are done with them
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], barrier_layout)
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=GROUPS)
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=GROUPS)
    fence_async_shared()
    head_blocks: gl.constexpr = (NUM_HEADS + GROUPS * HEADS - 1) // (GROUPS * HEADS)
    share_index, shares = gl.program_id(0) // head_blocks, gl.num_programs(0) // head_blocks
    head = gl.program_id(0) % head_blocks * (GROUPS * HEADS)
    work = equal_share(num_tokens_ptr, batch_size, shares, share_index, BATCH, LEAST_TILES)
    shared = (ring, queries, probs, full, empty, q_full, q_empty)
    target = (out_ptr, parts_ptr, lse_ptr, stride_out, stride_out_head, share_index, shares)
    fetched = (q_desc, rope_desc, cache_desc, table_ptr, stride_table)
    # Triton 3.6 hands the parts over where the last sum passed between warps, and does not wait until all have read it.
    tl.debug_barrier()
    # Registers: fetching needs few of those that a thread has at launch; the groups get what it hands over.
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (shared, work, target, scale, head, NUM_HEADS, 0, LATENT_BOXES, PACK)),
                (produce, (fetched, shared, work, head, LATENT_BOXES, PACK, BLOCK)),
            ],
            [1], [56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (shared, work, target, scale, head, NUM_HEADS, 0, LATENT_BOXES, PACK)),
                (_consume, (shared, work, target, scale, head, NUM_HEADS, 1, LATENT_BOXES, PACK)),
                (produce, (fetched, shared, work, head, LATENT_BOXES, PACK, BLOCK)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip


def mla_decode_hopper(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
    workspace: SplitWorkspace,
    *,
    scale: float,
    config: MlaHopperConfig | None = None,
) -> None:
    """Attention of one query per request over its `num_tokens` cache rows, written to `out`; zeros where that is 0.

    Arguments as for `mla_decode`, but bf16 or fp16, latent and rope multiples of 64, blocks of at least 8 tokens, and
    always by equal shares. ValueError for what does not fit. Allocates nothing; fit for a CUDA graph.
    """
    check_latent(q_latent, q_rope, latent_cache, block_table, num_tokens, out)
    batch_size, num_heads, latent = q_latent.shape
    block_size, width = latent_cache.shape[1:]
    config = config or mla_hopper_config(num_heads)
    obstacle = mla_obstacle(q_latent, q_rope, latent_cache, config)
    require(obstacle is None, f"{obstacle}: use mla_decode")
    check_options(scale, None, None)
    if batch_size == 0:
        return
    head_blocks = triton.cdiv(num_heads, config.heads * config.groups)
    shares = max(1, num_multiprocessors(q_latent.device) // head_blocks)
    workspace.require_room(2 * shares * num_heads, latent)
    parts = (workspace.parts.view(out.dtype), workspace.lse)
    box = [1, config.heads, BOX.value]
    # One request a thread at least: one kernel for all smaller batches, and ptxas spills in narrower ones.
    line = {"LEAST_TILES": config.least_tiles, "BATCH": max(128, triton.next_power_of_2(batch_size))}
    _hopper_mla_kernel[(head_blocks * shares,)](
        _descriptor(q_latent, box), _descriptor(q_rope, box),
        _descriptor(latent_cache, [1, min(block_size, TILE.value), BOX.value]), block_table, num_tokens, out, *parts,
        batch_size, scale * LOG2_E, block_table.stride(0), out.stride(0), out.stride(1),
        NUM_HEADS=num_heads, HEADS=config.heads, GROUPS=config.groups, LATENT_BOXES=latent // BOX.value,
        BOXES=width // BOX.value, PACK=config.pack, PLACES=config.places, BLOCK=block_size, **line, num_warps=4,
        maxnreg=config.registers,
    )  # fmt: skip
    grid, merge = merging(out, *((8, 2) if batch_size * num_heads > 512 else (1, 32)))
    merge_stream_kernel[grid](
        num_tokens, out, *parts, batch_size, shares, out.stride(0), out.stride(1), TILE=TILE.value, **line, **merge
    )


def _descriptor(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """What the copy engine must know of a tensor: where, how large, which strides, how much at once."""
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout(128, 16, len(box)))


def mla_obstacle(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent_cache: torch.Tensor, config: MlaHopperConfig | None = None
) -> str | None:
    """Why this kernel cannot serve these tensors and mla_decode has to; None if it can."""
    latent, rope = q_latent.shape[2], q_rope.shape[2]
    config = config or mla_hopper_config(q_latent.shape[1])
    if latent % BOX.value or rope % BOX.value or latent > 512:
        return f"latent and rope are {latent} and {rope}, not multiples of 64 up to 512"
    boxes = (latent + rope) // BOX.value
    if boxes % config.pack or boxes > config.pack * config.places:
        return f"{latent + rope} columns are not packs of {config.pack} boxes of 64, or the ring is short"
    return hopper_obstacle(latent_cache.shape[1], q_latent, q_rope, latent_cache)
