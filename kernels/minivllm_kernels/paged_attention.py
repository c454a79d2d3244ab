"""Attention of several queries per request over its blocks, causal: prompts, chunks of them, drafts, decodes.

A tile is ROWS rows of one KV head: the query heads that share it, for ROWS // GROUP tokens in a row. One program owns
one tile and walks over the keys its rows see, TILE at a time, with an online softmax (FlashAttention-2, Dao 2023):

    keys      0        TILE     2 TILE   3 TILE
    token 9   |  all   |  all   |  all   |##      |
    token 10  |  all   |  all   |  all   |###     |     only the last tiles need a mask: a loop of their own
    token 11  |  all   |  all   |  all   |####    |

The loop is turned by half a step, as in FlashAttention-3 (Shah et al. 2024): it enters with the scores of its tile, so
that the tensor cores work on the last tile's V while the exponentials of this one are computed, and K and V travel:

    tensor cores   | K1 |  V0  | K2 |  V1  | K3 |  V2  |        Ki: scores of tile i;  Vi: its weighted sum of V
    exponentials        | softmax 1 | softmax 2 | ...

Nobody plans on the host: each program finds its request from `query_starts` by a cumulative sum of tiles. The tiles at
the end of a prompt see the most keys and start first, so that the launch ends on short ones.

A K or V tile is fetched in one of two ways. By pointers, TILE rows wherever the block table puts them: any block size.
By a tensor descriptor where a tile lies inside one block: one thread asks the copy engine for the whole box, and no
thread computes addresses.

Bytes per tile of rows and layer: 2 * keys * D * itemsize from L2, for 4 * ROWS * keys * D FLOPs: ROWS FLOPs a byte.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from minivllm_kernels.attention_configs import AttentionConfig, attention_config
from minivllm_kernels.checks import check_cache, check_float, check_index, require

LOG2_E = math.log2(math.e)


@triton.jit
def _find_tile(query_starts_ptr, num_requests, program, TOKENS: tl.constexpr, BATCH: tl.constexpr):
    """Request and tile of a program, the last tile first; the tile is negative if none is left."""
    requests = tl.arange(0, BATCH)
    is_there = requests < num_requests
    starts = tl.load(query_starts_ptr + requests, mask=is_there, other=0)
    stops = tl.load(query_starts_ptr + requests + 1, mask=is_there, other=0)
    tiles = tl.cdiv(stops - starts, TOKENS)
    ends = tl.cumsum(tiles, 0)  # queries 3, 0, 40 in tiles of 32 tokens: 1 1 3
    place = tl.sum(tiles) - 1 - program
    request = tl.sum((ends <= place).to(tl.int32))
    return request, place - tl.max(tl.where(ends <= place, ends, 0))


@triton.jit
def _block_ids(table_ptr, start, num_tokens, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, BY_BOX: tl.constexpr):
    """Where a tile's keys lie: its one block, or the block of each key [TILE]; block 0 past the end."""
    keys = start if BY_BOX else start + tl.arange(0, TILE)
    return tl.load(table_ptr + keys // BLOCK_SIZE, mask=keys < num_tokens, other=0)


@triton.jit
def _load_tile(
    cache, block_ids, start, num_tokens, head, stride_block, stride_slot,
    HEAD_SIZE: tl.constexpr, COLS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    BY_BOX: tl.constexpr, IS_RAGGED: tl.constexpr,
):  # fmt: skip
    """K or V of keys start .. start + TILE - 1: [TILE, COLS]; a ragged tile is zero from num_tokens on."""
    offsets, columns = tl.arange(0, TILE), tl.arange(0, COLS)
    if BY_BOX:
        tile = cache.load([block_ids, head, start % BLOCK_SIZE, 0]).reshape(TILE, COLS)
        if IS_RAGGED:
            tile = tl.where((start + offsets < num_tokens)[:, None], tile, 0.0)
    else:
        slots = offsets % BLOCK_SIZE if BLOCK_SIZE <= TILE else start % BLOCK_SIZE + offsets
        rows = block_ids.to(tl.int64) * stride_block + slots * stride_slot
        pointers = cache + rows[:, None] + columns[None, :]
        if IS_RAGGED:
            is_stored = (start + offsets < num_tokens)[:, None] & (columns < HEAD_SIZE)[None, :]
            tile = tl.load(pointers, mask=is_stored, other=0.0)
        elif HEAD_SIZE < COLS:
            tile = tl.load(pointers, mask=(columns < HEAD_SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _attend(
    scores,  # [ROWS, TILE] of the tile at `begin`
    output, total, peak,  # so far: sum of V [ROWS, COLS], softmax sum [ROWS], largest score [ROWS] times log2(e)
    block_ids, next_ids,  # of the tile at `begin`, of the one behind it
    begin, end,  # keys begin .. end - 1; begin is a multiple of TILE
    q, k_cache, v_cache, table_ptr, head, num_tokens,
    positions,  # [ROWS] of the queries
    scale, soft_cap, window, stride_block, stride_slot,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, BY_BOX: tl.constexpr, IS_MASKED: tl.constexpr, IS_RAGGED: tl.constexpr,
):  # fmt: skip
    """Online softmax over a stretch of tiles; returns what it was given, for the tile behind the stretch."""
    TILE: tl.constexpr = scores.shape[1]
    COLS: tl.constexpr = q.shape[1]
    for start in tl.range(begin, end, TILE):
        if HAS_CAP:
            scores = soft_cap * (2 * tl.sigmoid(2 * scale / soft_cap * scores) - 1)  # cap * tanh(score / cap)
        factor = 1.4426950408889634 if HAS_CAP else scale
        if IS_MASKED:
            keys = (start + tl.arange(0, TILE))[None, :]
            is_seen = keys <= positions[:, None]
            if HAS_WINDOW:
                is_seen &= keys > positions[:, None] - window
            scores = tl.where(is_seen, scores, -1e30)  # finite: a row that sees nothing yet must not become NaN
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shrink = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores * factor - new_peak[:, None])
        total = total * shrink + tl.sum(probs, 1)
        peak = new_peak
        weights = probs.to(q.dtype)
        # Loads stand where they are used: there the compiler waits for them. It sends for them one turn earlier, as
        # their block ids come with the loop.
        k = _load_tile(
            k_cache, next_ids, start + TILE, num_tokens, head, stride_block, stride_slot,
            HEAD_SIZE, COLS, BLOCK_SIZE, TILE, BY_BOX, False,
        )  # fmt: skip
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        v = _load_tile(
            v_cache, block_ids, start, num_tokens, head, stride_block, stride_slot,
            HEAD_SIZE, COLS, BLOCK_SIZE, TILE, BY_BOX, IS_RAGGED,
        )  # fmt: skip
        output = tl.dot(weights, v, output * shrink[:, None], input_precision=PRECISION)
        block_ids = _block_ids(table_ptr, start + TILE, num_tokens, BLOCK_SIZE, TILE, BY_BOX)
        next_ids = _block_ids(table_ptr, start + 2 * TILE, num_tokens, BLOCK_SIZE, TILE, BY_BOX)
    return scores, output, total, peak, block_ids, next_ids


@triton.jit(do_not_specialize=["num_requests", "window", "stride_table"])
def _attention_kernel(
    q_ptr, k_cache, v_cache, table_ptr, num_tokens_ptr, query_starts_ptr, out_ptr,
    num_requests, scale, soft_cap, window, stride_q, stride_q_head, stride_out, stride_out_head,
    stride_block, stride_slot, stride_kv_head, stride_table,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BATCH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, BY_BOX: tl.constexpr, HEAD_AXIS: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    head = tl.program_id(HEAD_AXIS)
    request, tile = _find_tile(query_starts_ptr, num_requests, tl.program_id(1 - HEAD_AXIS), TOKENS, BATCH)
    if tile < 0:
        return
    first_row = tl.load(query_starts_ptr + request)
    num_queries = tl.load(query_starts_ptr + request + 1) - first_row
    num_tokens = tl.load(num_tokens_ptr + request)
    table_ptr += request.to(tl.int64) * stride_table
    if not BY_BOX:
        k_cache += head.to(tl.int64) * stride_kv_head
        v_cache += head.to(tl.int64) * stride_kv_head
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLS)
    tokens = tile * TOKENS + rows // GROUP  # (group 4) rows 0 1 2 3 are the heads of the tile's first token
    heads = head * GROUP + rows % GROUP
    is_kept = ((rows < TOKENS * GROUP) & (tokens < num_queries))[:, None] & (columns < HEAD_SIZE)[None, :]
    q_rows = (first_row + tokens).to(tl.int64) * stride_q + heads * stride_q_head
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=is_kept, other=0.0)
    first = num_tokens - num_queries + tile * TOKENS  # position of the tile's first token
    positions = tl.minimum(first + rows // GROUP, num_tokens - 1)
    end = tl.minimum(first + TOKENS, num_tokens)
    stored = num_tokens // TILE * TILE  # tiles before it hold no slot without a key
    begin, inner = 0, 0  # all rows see the keys from inner on
    if HAS_WINDOW:
        begin = tl.maximum(first + 1 - window, 0) // TILE * TILE
        inner = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE, stored)
    all_see = tl.maximum(tl.maximum(first + 1, 0) // TILE * TILE, inner)  # ... and before this one
    borders = (begin, inner, all_see, tl.maximum(all_see, tl.minimum(stored, end)), end)
    block_ids = _block_ids(table_ptr, begin, num_tokens, BLOCK_SIZE, TILE, BY_BOX)
    next_ids = _block_ids(table_ptr, begin + TILE, num_tokens, BLOCK_SIZE, TILE, BY_BOX)
    k = _load_tile(
        k_cache, block_ids, begin, num_tokens, head, stride_block, stride_slot,
        HEAD_SIZE, COLS, BLOCK_SIZE, TILE, BY_BOX, False,
    )  # fmt: skip
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    output = tl.zeros((ROWS, COLS), tl.float32)
    total, peak = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
    for PART in tl.static_range(0 if HAS_WINDOW else 1, 4):
        scores, output, total, peak, block_ids, next_ids = _attend(
            scores, output, total, peak, block_ids, next_ids, borders[PART], borders[PART + 1],
            q, k_cache, v_cache, table_ptr, head, num_tokens, positions, scale, soft_cap, window, stride_block,
            stride_slot, HEAD_SIZE, BLOCK_SIZE, HAS_WINDOW, HAS_CAP, PRECISION, BY_BOX, PART != 1, PART == 3,
        )  # fmt: skip
    output /= tl.where(total == 0.0, 1.0, total)[:, None]  # a request without keys: zeros
    out_rows = (first_row + tokens).to(tl.int64) * stride_out + heads * stride_out_head
    tl.store(out_ptr + out_rows[:, None] + columns[None, :], output.to(out_ptr.dtype.element_ty), mask=is_kept)


def paged_attention(
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
    config: AttentionConfig | None = None,
) -> None:
    """Causal attention of each request's last queries over its `num_tokens` keys, written to `out`.

    q, out [T, H, D], request r in rows query_starts[r] .. query_starts[r + 1] - 1; k_cache, v_cache [num_blocks,
    block_size, Hkv, D], any strides; block_table [B, M], num_tokens [B] and query_starts [B + 1] int32. No request has
    more than `max_query_len` queries. Rows of a request with 0 keys become zero, rows of no request stay as they are.
    `window` keys are seen at most; `soft_cap` caps scores as cap * tanh(score / cap).
    Raises ValueError for shapes, types and options that do not fit. Allocates nothing; fit for a CUDA graph.
    """
    require(q.ndim == 3 and out.shape == q.shape, f"q {tuple(q.shape)} and out {tuple(out.shape)} must be [T, H, D]")
    num_rows, num_heads, head_size = q.shape
    check_float("q", q, out)
    check_cache(q, k_cache, v_cache, num_heads, head_size)
    _check_requests(block_table, num_tokens, query_starts, q.device)
    _, block_size, num_kv_heads, _ = k_cache.shape
    group, batch_size = num_heads // num_kv_heads, num_tokens.shape[0]
    scale = head_size**-0.5 if scale is None else scale
    _check_options(max_query_len, scale, window, soft_cap, group)
    columns = triton.next_power_of_2(head_size)
    config = config or attention_config(q.device, q.dtype, max_query_len * group)
    row_bytes = columns * q.element_size()
    by_box = config.box_bytes > 0 and block_size >= 64 and all(map(_fits_descriptor, (k_cache, v_cache)))
    rows, tile = config.tile_rows(row_bytes, group), config.tile_tokens(row_bytes, block_size if by_box else None)
    caches: list[torch.Tensor | TensorDescriptor] = [k_cache, v_cache]
    if by_box:  # a box holds one head's slots
        caches = [TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, tile, columns]) for x in (k_cache, v_cache)]
    tokens = rows // group
    num_tiles = min(num_rows // tokens + batch_size, batch_size * triton.cdiv(max_query_len, tokens))
    _attention_kernel[(num_kv_heads, num_tiles) if config.heads_first else (num_tiles, num_kv_heads)](
        q, *caches, block_table, num_tokens, query_starts, out,
        batch_size, scale if soft_cap else scale * LOG2_E, soft_cap or 0.0, window or 0,
        *q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3], block_table.stride(0),
        group, head_size, columns, block_size, rows, tile, max(16, triton.next_power_of_2(batch_size)),
        window is not None, soft_cap is not None, "ieee" if q.dtype == torch.float32 else "tf32", by_box,
        HEAD_AXIS=0 if config.heads_first else 1, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _check_requests(
    block_table: torch.Tensor, num_tokens: torch.Tensor, query_starts: torch.Tensor, device: torch.device
) -> None:
    """One row, one length and one start for each request, and the last one's end."""
    batch_size = num_tokens.shape[0]
    check_index("num_tokens", num_tokens, (batch_size,), device)
    check_index("query_starts", query_starts, (batch_size + 1,), device)
    check_index("block_table", block_table, (batch_size, block_table.shape[-1]), device)


def _check_options(max_query_len: int, scale: float, window: int | None, soft_cap: float | None, group: int) -> None:
    """The numbers that a kernel cannot refuse."""
    require(max_query_len >= 1, f"max_query_len is {max_query_len}: pass the longest request's queries, at least 1")
    require(scale > 0, f"scale is {scale}: pass a positive number, as the largest score is found before scaling")
    require(window is None or window >= 1, f"window is {window}: pass at least 1, or None to see all keys")
    require(soft_cap is None or soft_cap > 0, f"soft_cap is {soft_cap}: pass a positive number or None")
    require(group <= 128, f"{group} query heads share a KV head: a tile holds 128 at most")


def _fits_descriptor(cache: torch.Tensor) -> bool:
    """Whether the copy engine can address it: everything but the last dimension on 16-byte steps."""
    strides_bytes = [stride * cache.element_size() for stride in cache.stride()[:-1]]
    return all(number % 16 == 0 for number in (cache.data_ptr(), *strides_bytes))
