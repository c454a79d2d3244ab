"""Prefill attention for Hopper GPUs: one warp fetches, two groups of four warps multiply (FlashAttention-3, Shah 2024).

A work item is 128 queries of one head. A program takes items in turn, the longest first, and its warps never meet
again after the start: barriers in shared memory say when a buffer is full and when it is empty.

    fetching warp     Q   K9   K8 V9   K7 V8   ...       see hopper_fetch.py; tiles run from the diagonal back to 0
                      |    \\    \\  \\
    shared memory    [Q]   [ring of K]  [ring of V]
                      |    /    /  /
    group 0   tensor cores   Q K9 |        | Q K8, P9 V9 |           | Q K7, P8 V8 |
              exponentials        |   P9   |             P8          |             P7 ...
    group 1                  the same for rows 64..127: one group multiplies while the other takes exponentials

Only tiles at the diagonal, and at the far edge of a window, are masked. Where a request's last tile ends in slots that
nobody wrote, K is masked and V cleared, for 0 * NaN is NaN.

Bytes per item: 4 * D * (128 + keys), from L2 but for Q, for 4 * 128 * keys * D FLOPs: 128 FLOPs a byte.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minivllm_kernels.attention_configs import HOPPER_ATTENTION
from minivllm_kernels.checks import check_cache, check_float, check_index, check_options, hopper_obstacle, require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.hopper_fetch import BOX_COLUMNS, GROUP_ROWS, ITEM_ROWS, produce, work_item

LOG2_E = gl.constexpr(math.log2(math.e))


@gluon.jit
def _softmax(scores, peak, total, key, limit, factors, IS_MASKED: gl.constexpr):
    """Scores of a tile that begins at `key` -> weights, what older sums shrink by, running maximum and sum."""
    scale, soft_cap, window = factors
    if soft_cap is not None:  # cap * tanh(x / cap), in units of log 2
        scores = soft_cap * LOG2_E * (1 - 2 / (1 + gl.exp2(scores * (2 * scale / soft_cap))))
        scale = 1.0
    if IS_MASKED:
        columns = key + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))[None, :]
        is_seen = columns <= limit[:, None]
        if window is not None:
            is_seen = is_seen & (columns > limit[:, None] - window)
        scores = gl.where(is_seen, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1))
    anchor = new_peak * scale
    if IS_MASKED:  # a row may have seen nothing yet
        anchor = gl.where(new_peak == float("-inf"), 0.0, anchor)
    shrink = gl.exp2(peak * scale - anchor)
    weights = gl.exp2(scores * scale - anchor[:, None])
    return weights, shrink, new_peak, total * shrink + gl.sum(weights, 1)


@gluon.jit
def _advance(
    state, begin, end, num_tiles, q, buffers, barriers, turn, num_moves, last, limit, factors,
    group: gl.constexpr, IS_MASKED: gl.constexpr, OVERLAPS: gl.constexpr, TAKES_TURNS: gl.constexpr,
):  # fmt: skip
    """For each tile: its scores and the output of the tile before on the tensor cores, meanwhile its softmax."""
    output, weights, peak, total = state
    _, keys, values = buffers
    _, _, k_full, k_empty, v_full, v_empty, turns = barriers
    STAGES: gl.constexpr = keys.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    score_layout: gl.constexpr = peak.type.layout.parent
    for tile in range(begin, end):
        now, before, after = turn + tile, turn + tile - 1, turn + tile + 1
        if TAKES_TURNS:  # group 0 goes first: a barrier's phase before the first counts as over
            mbarrier.wait(turns.index(group), (num_moves + tile) & 1 ^ group)
        scores = gl.zeros([GROUP_ROWS, TILE], gl.float32, score_layout)
        scores = warpgroup_mma(q, keys.index(now % STAGES).permute((1, 0)), scores, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before % STAGES), before // STAGES & 1)
        output = warpgroup_mma(weights, values.index(before % STAGES), output, is_async=True)
        if TAKES_TURNS:
            mbarrier.arrive(turns.index(1 - group), count=1)
        if OVERLAPS:
            scores = warpgroup_mma_wait(1, deps=(scores,))
        else:
            scores, output = warpgroup_mma_wait(0, deps=(scores, output))
        mbarrier.arrive(k_empty.index(now % STAGES), count=1)
        new_weights, shrink, peak, total = _softmax(
            scores, peak, total, (last - tile) * TILE, limit, factors, IS_MASKED
        )
        # The next K is waited for here, not above: the assembler moves no exponential past this on to the line below.
        mbarrier.wait(k_full.index(after % STAGES), after // STAGES & 1, pred=tile + 1 < num_tiles)
        if OVERLAPS:
            output = warpgroup_mma_wait(0, deps=(output,))
        mbarrier.arrive(v_empty.index(before % STAGES), count=1)
        weights = gl.convert_layout(new_weights.to(q.dtype), weights.type.layout)
        output *= gl.convert_layout(shrink, gl.SliceLayout(1, output.type.layout))[:, None]
    return output, weights, peak, total


@gluon.jit
def _attend(
    item, buffers, barriers, turn, num_items, factors,
    group: gl.constexpr, OVERLAPS: gl.constexpr, TAKES_TURNS: gl.constexpr,
):  # fmt: skip
    """One group's 64 rows of an item: [64, D], normalised; rows that see no key are zero."""
    _, _, _, _, position, num_tokens, first, last = item
    queries, keys, values = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    STAGES: gl.constexpr = keys.shape[0]
    TILE: gl.constexpr = keys.shape[1]
    COLS: gl.constexpr = keys.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    rows = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=row_layout)
    limit = gl.minimum(position + rows, num_tokens - 1)  # the last key that a row sees
    num_tiles = last - first + 1
    q = queries.index(group)
    mbarrier.wait(q_full.index(0), num_items & 1)
    mbarrier.wait(k_full.index(turn % STAGES), turn // STAGES & 1)
    scores = gl.zeros([GROUP_ROWS, TILE], gl.float32, score_layout)
    scores = warpgroup_mma(q, keys.index(turn % STAGES).permute((1, 0)), scores, use_acc=False)
    mbarrier.arrive(k_empty.index(turn % STAGES), count=1)
    peak = gl.full([GROUP_ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([GROUP_ROWS], gl.float32, row_layout)
    weights, _, peak, total = _softmax(scores, peak, total, last * TILE, limit, factors, True)
    weights = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, layout, 2))
    mbarrier.wait(k_full.index((turn + 1) % STAGES), (turn + 1) // STAGES & 1, pred=num_tiles > 1)
    state = (gl.zeros([GROUP_ROWS, COLS], gl.float32, layout), weights, peak, total)
    # Tiles count back from the diagonal: masked, then seen whole by all rows, then masked by the window.
    whole = gl.minimum(gl.maximum(last + 1 - gl.maximum(position + 1, 0) // TILE, 1), num_tiles)
    edge = num_tiles
    if factors[2] is not None:
        inner = (gl.maximum(position + ITEM_ROWS - factors[2], 0) + TILE - 1) // TILE  # the last row sees it whole
        edge = gl.minimum(gl.maximum(last + 1 - inner, whole), num_tiles)
    now = (q, buffers, barriers, turn, turn - num_items, last, limit, factors)  # so many moves in the items before
    state = _advance(state, 1, whole, num_tiles, *now, group, True, OVERLAPS, TAKES_TURNS)
    state = _advance(state, whole, edge, num_tiles, *now, group, False, OVERLAPS, TAKES_TURNS)
    if factors[2] is not None:
        state = _advance(state, edge, num_tiles, num_tiles, *now, group, True, OVERLAPS, TAKES_TURNS)
    output, weights, _, total = state
    mbarrier.arrive(q_empty.index(0), count=1)
    end = turn + num_tiles - 1
    mbarrier.wait(v_full.index(end % STAGES), end // STAGES & 1)
    output = warpgroup_mma(weights, values.index(end % STAGES), output)
    mbarrier.arrive(v_empty.index(end % STAGES), count=1)
    return output * gl.convert_layout(1 / gl.where(total == 0, 1.0, total), gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def _consume(
    shared, out_ptr, stride_out, stride_out_head, HEADS: gl.constexpr,
    group: gl.constexpr, OVERLAPS: gl.constexpr, TAKES_TURNS: gl.constexpr,
):  # fmt: skip
    """A group of four warps: 64 rows of every item of the program."""
    buffers, barriers, work, factors = shared
    TILE: gl.constexpr = buffers[1].shape[1]
    turn, num_items = 0, 0  # tiles and items so far
    for step in range(work[2]):
        item = work_item(step, work, HEADS, TILE)
        _, head, q_row, num_rows, _, _, first, last = item
        if num_rows > 0:
            output = _attend(item, buffers, barriers, turn, num_items, factors, group, OVERLAPS, TAKES_TURNS)
            rows = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, output.type.layout))
            columns = gl.arange(0, output.shape[1], layout=gl.SliceLayout(0, output.type.layout))
            first_ptr = out_ptr + q_row.to(gl.int64) * stride_out + head * stride_out_head
            pointers = first_ptr + rows[:, None] * stride_out + columns[None, :]
            gl.store(pointers, output.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None])
            turn += last - first + 1
            num_items += 1


@gluon.jit(do_not_specialize=["num_rounds", "num_requests", "num_query_tiles", "window", "stride_table"])
def _hopper_attention_kernel(
    q_desc, k_desc, v_desc, out_ptr, table_ptr, num_tokens_ptr, query_starts_ptr,
    num_rounds, num_requests, num_query_tiles, window, stride_out, stride_out_head, stride_table, scale, soft_cap,
    HEADS: gl.constexpr, GROUP: gl.constexpr, COLS: gl.constexpr, BLOCK: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr, OVERLAPS: gl.constexpr, TAKES_TURNS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(q_desc.dtype, [2, GROUP_ROWS, COLS], layout)
    keys = gl.allocate_shared_memory(q_desc.dtype, [STAGES, TILE, COLS], layout)
    values = gl.allocate_shared_memory(q_desc.dtype, [STAGES, TILE, COLS], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], barrier_layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [1, 1], barrier_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], barrier_layout)  # one more: landed, to be cleared
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier_layout)
    mbarrier.init(q_full.index(0), count=1)
    mbarrier.init(q_empty.index(0), count=2)  # both groups
    mbarrier.init(v_full.index(STAGES), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    work = (num_tokens_ptr, query_starts_ptr, num_rounds, num_requests, num_query_tiles, window)
    shared = ((queries, keys, values), barriers, work, (scale * LOG2_E, soft_cap, window))
    # Registers: 168 a thread at launch; fetching needs few, so the groups get 224 and it 56, the least without spills.
    gl.warp_specialize(
        [
            (_consume, (shared, out_ptr, stride_out, stride_out_head, HEADS, 0, OVERLAPS, TAKES_TURNS)),
            (_consume, (shared, out_ptr, stride_out, stride_out_head, HEADS, 1, OVERLAPS, TAKES_TURNS)),
            (produce, ((q_desc, k_desc, v_desc), shared, table_ptr, stride_table, HEADS, GROUP, BLOCK)),
        ],
        [4, 1],
        [224, 56],
    )


def _descriptor(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """What the copy engine must know of a tensor: where, how large, which strides, how much at once."""
    return TensorDescriptor.from_tensor(tensor, box, gl.NVMMASharedLayout(128, 16, len(box)))


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    num_tokens: torch.Tensor, query_starts: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Shapes and types, and that nothing here is for the plain kernel alone."""
    check_cache(q, k_cache, v_cache)
    check_float("out", out, q)
    require(out.shape == q.shape, f"out has shape {tuple(out.shape)}, q {tuple(q.shape)}")
    num_requests, width = block_table.shape
    check_index("block_table", block_table, (num_requests, width), q.device)
    check_index("num_tokens", num_tokens, (num_requests,), q.device)
    check_index("query_starts", query_starts, (num_requests + 1,), q.device)
    obstacle = attention_obstacle(q, k_cache, v_cache)
    require(obstacle is None, f"{obstacle}: use paged_attention")


def attention_obstacle(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> str | None:
    """Why this kernel cannot serve these tensors and paged_attention has to; None if it can."""
    if q.shape[2] not in HOPPER_ATTENTION:
        return f"head size {q.shape[2]} is not one of {tuple(HOPPER_ATTENTION)}"
    return hopper_obstacle(k_cache.shape[1], q, k_cache, v_cache)


def paged_attention_hopper(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    query_starts: torch.Tensor,
    out: torch.Tensor,
    *,
    max_query_len: int,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> None:
    """Write causal attention of q [T, H, D] over paged K and V [num_blocks, block_size, Hkv, D] to out [T, H, D].

    block_table [B, M], num_tokens [B] keys each request sees, query_starts [B + 1]; bf16 or fp16, D 64, 128 or 256.
    It looks at B * max_query_len queries, however few there are: for long requests. ValueError if anything is unfit.
    """
    _check(q, k_cache, v_cache, block_table, num_tokens, query_starts, out)
    require(max_query_len >= 0, f"max_query_len is {max_query_len}: pass the longest request's number of queries")
    check_options(scale, window, soft_cap)
    heads, head_size = q.shape[1:]
    config = HOPPER_ATTENTION[head_size]
    num_requests, num_query_tiles = block_table.shape[0], -(-max_query_len // ITEM_ROWS.value)
    num_items = num_requests * num_query_tiles * heads
    if num_items == 0:
        return
    num_programs = min(num_items, num_multiprocessors(q.device)) if config.is_persistent else num_items
    box = [1, 1, min(k_cache.shape[1], config.tile), BOX_COLUMNS.value]
    _hopper_attention_kernel[(num_programs,)](
        _descriptor(q.transpose(0, 1), [1, GROUP_ROWS.value, BOX_COLUMNS.value]),
        _descriptor(k_cache.transpose(1, 2), box), _descriptor(v_cache.transpose(1, 2), box),
        out, block_table, num_tokens, query_starts, -(-num_items // num_programs), num_requests, num_query_tiles,
        window, out.stride(0), out.stride(1), block_table.stride(0), scale or 1 / math.sqrt(head_size), soft_cap,
        HEADS=heads, GROUP=heads // k_cache.shape[2], COLS=head_size, BLOCK=k_cache.shape[1], TILE=config.tile,
        STAGES=config.num_stages, OVERLAPS=config.overlaps, TAKES_TURNS=config.takes_turns, num_warps=4, maxnreg=168,
    )  # fmt: skip
