"""Attention of several queries per request over its blocks, causal: prompts, chunks of them, drafts, decodes.

A tile is ROWS rows of one KV head: the query heads that share it, for ROWS // GROUP tokens in a row. One program owns
one tile and walks over the keys its rows see, TILE at a time, with an online softmax (FlashAttention-2, Dao 2023):

    keys      0        TILE     2 TILE   3 TILE
    token 9   |  all   |  all   |  all   |##      |
    token 10  |  all   |  all   |  all   |###     |     only the last tiles need a mask: a loop of their own
    token 11  |  all   |  all   |  all   |####    |

Scores, softmax and the weighted sum of V wait for each other, and the tensor cores with them. So two programs share an
SM where registers allow, and one multiplies while the other computes exponentials:

    tensor cores   | V0 a  K1 a | V0 b  K1 b | V1 a  K2 a | V1 b  K2 b |      Ki, Vi: products of tile i
    exponentials   |        0 b |        1 a |        1 b |        2 a |      a, b: the two programs

Overlap within a program, as in FlashAttention-3 (Shah et al. 2024), needs control over waiting that this language keeps
to itself: turned by half a step, this loop compiled to a softmax that overwrote the weights of a product under way.
`paged_attention_hopper` has that control.

Nobody plans on the host: each program finds its request from `query_starts` by a cumulative sum of tiles. The tiles at
the end of a prompt see the most keys and start first, so that the launch ends on short ones.

A K or V tile is fetched in one of two ways. By pointers, TILE rows wherever the block table puts them: any block size.
By a tensor descriptor where a tile lies inside one block: one thread asks the copy engine for the whole box, and no
thread computes addresses. A box cannot leave out the slots that hold no key, so V of the last tiles comes by pointers.

Bytes per tile of rows and layer: 2 * keys * D * itemsize from L2, for 4 * ROWS * keys * D FLOPs: ROWS FLOPs a byte.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from minivllm_kernels.attention_configs import AttentionConfig, attention_config
from minivllm_kernels.checks import check_cache, check_float, check_index, check_options, require

LOG2_E = math.log2(math.e)
# The score of a key that a row does not see. Finite, for a row that sees nothing yet must not become NaN; and a power
# of two, so that score * factor is exact: in one fused multiply-add, 1e30 * factor less its own rounded value is 1e21.
UNSEEN = tl.constexpr(-(2.0**100))


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
def _block_ids(table_ptr, start, num_tokens, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where a tile's keys lie: its one block, or the block of each key [TILE]; block 0 past the end."""
    offsets = tl.arange(0, TILE) if BLOCK_SIZE < TILE else 0
    return tl.load(table_ptr + start // BLOCK_SIZE + offsets // BLOCK_SIZE, mask=offsets < num_tokens - start, other=0)


@triton.jit
def _load_tile(
    cache_ptr, box, block_ids, start, num_tokens, head, stride_block, stride_slot,
    HEAD_SIZE: tl.constexpr, COLS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """K or V of keys start .. start + TILE - 1: [TILE, COLS]; zero from num_tokens on if the tile is masked."""
    offsets, columns = tl.arange(0, TILE), tl.arange(0, COLS)
    if box is not None and not IS_MASKED:
        tile = box.load([block_ids, head, start % BLOCK_SIZE, 0]).reshape(TILE, COLS)
    else:
        slots = offsets % BLOCK_SIZE if BLOCK_SIZE < TILE else start % BLOCK_SIZE + offsets
        rows = slots * stride_slot + block_ids.to(tl.int64) * stride_block
        pointers = cache_ptr + columns[None, :] + rows[:, None]
        if IS_MASKED:  # a slot without a key may hold NaN, and 0 * NaN is NaN
            is_stored = (start + offsets < num_tokens)[:, None] & (columns < HEAD_SIZE)[None, :]
            tile = tl.load(pointers, mask=is_stored, other=0.0)
        elif HEAD_SIZE < COLS:
            tile = tl.load(pointers, mask=(columns < HEAD_SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _attend(
    output, total, peak,  # so far: sum of V [ROWS, COLS], softmax sum [ROWS], largest score [ROWS] times log2(e)
    block_ids,  # of the tile at `begin`
    begin, end,  # keys begin .. end - 1; begin is a multiple of TILE
    q, k_ptr, v_ptr, k_box, v_box, table_ptr, head, num_tokens,
    first,  # position of the first row's token
    scale, soft_cap, window, stride_block, stride_slot,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over a stretch of tiles; returns what it was given, for the tile behind the stretch."""
    ROWS: tl.constexpr = q.shape[0]
    COLS: tl.constexpr = q.shape[1]
    # Boxes go with few warps and no register to spare: the addresses of q's parts are not worth keeping in some.
    for start in tl.range(begin, end, TILE, disable_licm=k_box is not None):
        k = _load_tile(
            k_ptr, k_box, block_ids, start, num_tokens, head, stride_block, stride_slot,
            HEAD_SIZE, COLS, BLOCK_SIZE, TILE, False,
        )  # fmt: skip
        scores = tl.dot(q, k.T, input_precision=PRECISION)  # [ROWS, TILE]
        if HAS_CAP:
            scores = soft_cap * (2 * tl.sigmoid(2 * scale / soft_cap * scores) - 1)  # cap * tanh(score / cap)
        factor = 1.4426950408889634 if HAS_CAP else scale
        if IS_MASKED:
            keys, positions = (start + tl.arange(0, TILE))[None, :], (first + tl.arange(0, ROWS) // GROUP)[:, None]
            is_seen = keys <= positions
            if HAS_WINDOW:
                is_seen &= keys > positions - window
            scores = tl.where(is_seen, scores, UNSEEN)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shrink = tl.exp2(peak - new_peak)
        probs = tl.exp2(scores * factor - new_peak[:, None])
        total = total * shrink + tl.sum(probs, 1)
        peak = new_peak
        v = _load_tile(
            v_ptr, v_box, block_ids, start, num_tokens, head, stride_block, stride_slot,
            HEAD_SIZE, COLS, BLOCK_SIZE, TILE, IS_MASKED,
        )  # fmt: skip
        output = tl.dot(probs.to(q.dtype), v, output * shrink[:, None], input_precision=PRECISION)
        # Known one turn ahead, so that the compiler can send for the next K and V while this tile is computed.
        block_ids = _block_ids(table_ptr, start + TILE, num_tokens, BLOCK_SIZE, TILE)
    return output, total, peak, block_ids


@triton.jit(do_not_specialize=["num_requests", "window", "stride_table"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, k_box, v_box, table_ptr, num_tokens_ptr, query_starts_ptr, out_ptr,
    num_requests, scale, soft_cap, window, stride_q, stride_q_head, stride_out, stride_out_head,
    stride_block, stride_slot, stride_kv_head, stride_table,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, BATCH: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_AXIS: tl.constexpr,
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
    k_ptr += head.to(tl.int64) * stride_kv_head
    v_ptr += head.to(tl.int64) * stride_kv_head
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLS)
    tokens, heads = rows // GROUP, rows % GROUP  # (group 4) rows 0 1 2 3 are the heads of the tile's first token
    is_row = (tokens < tl.minimum(num_queries - tile * TOKENS, TOKENS))[:, None]
    is_kept = is_row & (columns < HEAD_SIZE)[None, :]
    first_row = (first_row + tile * TOKENS).to(tl.int64)
    q_ptr += first_row * stride_q + head * GROUP * stride_q_head
    q_rows = tokens * stride_q + heads * stride_q_head
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=is_kept, other=0.0)
    first = num_tokens - num_queries + tile * TOKENS  # position of the tile's first token
    end = tl.minimum(first + TOKENS, num_tokens)
    begin, inner = 0, 0  # all rows see the keys from inner on
    if HAS_WINDOW:
        begin = tl.maximum(first + 1 - window, 0) // TILE * TILE
        inner = tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE
    borders = (begin, inner, tl.maximum(tl.maximum(first + 1, 0) // TILE * TILE, inner), end)
    block_ids = _block_ids(table_ptr, begin, num_tokens, BLOCK_SIZE, TILE)
    output = tl.zeros((ROWS, COLS), tl.float32)
    total, peak = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
    for PART in tl.static_range(0 if HAS_WINDOW else 1, 3):  # a mask at the window's edge and on the last tiles
        output, total, peak, block_ids = _attend(
            output, total, peak, block_ids, borders[PART], borders[PART + 1], q, k_ptr, v_ptr, k_box, v_box, table_ptr,
            head, num_tokens, first, scale, soft_cap, window, stride_block, stride_slot,
            GROUP, HEAD_SIZE, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_CAP, PRECISION, PART != 1,
        )  # fmt: skip
    output /= tl.where(total == 0.0, 1.0, total)[:, None]  # a request without keys: zeros
    out_ptr += first_row * stride_out + head * GROUP * stride_out_head
    out_rows = tokens * stride_out + heads * stride_out_head
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
    _check_requests(q, out, block_table, num_tokens, query_starts)
    num_rows, num_heads, head_size = q.shape
    check_cache(q, k_cache, v_cache)
    _, block_size, num_kv_heads, _ = k_cache.shape
    group, batch_size = num_heads // num_kv_heads, num_tokens.shape[0]
    scale = head_size**-0.5 if scale is None else scale
    _check_options(max_query_len, scale, window, soft_cap, group)
    columns = triton.next_power_of_2(head_size)
    config = config or attention_config(q.device, q.dtype, max_query_len * group)
    row_bytes = columns * q.element_size()
    tile = config.tile_tokens(row_bytes)
    boxes: list[TensorDescriptor | None] = [None, None]
    if config.box and block_size >= 64 and _fits_descriptor(k_cache) and _fits_descriptor(v_cache):
        config = config.box
        tile = min(config.tile_tokens(row_bytes), block_size)  # a box holds one head's slots
        boxes = [TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, tile, columns]) for x in (k_cache, v_cache)]
    rows = config.tile_rows(row_bytes, group)
    num_tiles = _most_tiles(num_rows, batch_size, max_query_len, rows // group)
    _attention_kernel[(num_kv_heads, num_tiles) if config.heads_first else (num_tiles, num_kv_heads)](
        q, k_cache, v_cache, *boxes, block_table, num_tokens, query_starts, out,
        batch_size, scale if soft_cap else scale * LOG2_E, soft_cap or 0.0, window or 0,
        *q.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3], block_table.stride(0),
        group, head_size, columns, block_size, rows, tile, max(16, triton.next_power_of_2(batch_size)),
        window is not None, soft_cap is not None, "ieee" if q.dtype == torch.float32 else "tf32",
        HEAD_AXIS=0 if config.heads_first else 1, **config.compile_options,
    )  # fmt: skip


def _check_requests(
    q: torch.Tensor, out: torch.Tensor, block_table: torch.Tensor, num_tokens: torch.Tensor, query_starts: torch.Tensor
) -> None:
    """Rows in and out; for each request one row of blocks, one length and one start, and the last one's end."""
    require(q.ndim == 3 and out.shape == q.shape, f"q {tuple(q.shape)} and out {tuple(out.shape)} must be [T, H, D]")
    check_float("q", q, out)
    batch_size = num_tokens.shape[0]
    check_index("num_tokens", num_tokens, (batch_size,), q.device)
    check_index("query_starts", query_starts, (batch_size + 1,), q.device)
    check_index("block_table", block_table, (batch_size, block_table.shape[-1]), q.device)


def _check_options(max_query_len: int, scale: float, window: int | None, soft_cap: float | None, group: int) -> None:
    """The numbers that a kernel cannot refuse."""
    require(max_query_len >= 1, f"max_query_len is {max_query_len}: pass the longest request's queries, at least 1")
    check_options(scale, window, soft_cap)  # the largest score is found before scaling: a negative scale would be wrong
    require(group <= 128, f"{group} query heads share a KV head: a tile holds 128 at most")


def _fits_descriptor(cache: torch.Tensor) -> bool:
    """Whether the copy engine can address it: everything but the last dimension on 16-byte steps."""
    strides_bytes = [stride * cache.element_size() for stride in cache.stride()[:-1]]
    return all(number % 16 == 0 for number in (cache.data_ptr(), *strides_bytes))


def _most_tiles(num_rows: int, batch_size: int, max_query_len: int, tokens: int) -> int:
    """Tiles of `tokens` that the requests can have together; 100 rows of 3 requests, tiles of 32: at most 6."""
    return min(num_rows // tokens + batch_size, batch_size * triton.cdiv(max_query_len, tokens))
