"""Multi-head latent attention (DeepSeek-V2), decode: every head reads the same row of the cache, as key and as value.

With the up-projections absorbed (W_UK into the query, W_UV applied afterwards), a token's key is its cache row
[latent 512 | rope 64] and its value the latent part again: multi-query attention whose one tile serves two products.

    tile of the cache, in shared memory         latent [TILE, 512]   rope [TILE, 64]
    scores [HEADS, TILE]                        = q_latent @ latent^T + q_rope @ rope^T
    output [HEADS, 512]                        += softmax(scores) @ latent           the same bytes, read once

Work is shared out as in paged_decode: the tiles of all requests form one line, cut into equal shares, and the programs
of a share's head blocks run side by side, so that the second finds the tile in L2. A request cut by a border is stored
in parts, at most two a share. Parts are 512 wide, so they have the output's dtype, and a second launch merges them,
spread over heads and columns: a lone long request has a hundred parts, too many for whoever arrives last.
`split_tokens` cuts at fixed places instead, and then a request's output has the same bits in any batch.

Bytes per token and layer: 576 * itemsize (1152 in bf16) for up to 64 heads. Operations: 2 * H * (576 + 512) per token:
16 heads are bound by memory (30 operations a byte), 128 heads by the tensor cores (242).
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels.attention_configs import MlaConfig, mla_config
from minivllm_kernels.checks import BLOCK_SIZES, check_float, check_index, check_options, require
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.split_kv import LOG2_E, merge_partials
from minivllm_kernels.workspace import SplitWorkspace

MERGE_COLUMNS = 128  # of a part, that one merging program reads


@triton.jit
def _attend_latent(
    q_ptr, q_rope_ptr, q_rows, q_rope_rows, has_head,  # [HEADS] where each head's query lies, and whether it exists
    cache_ptr, table_ptr,  # table_ptr: the request's row of the block table
    begin, end,  # tokens begin .. end - 1
    scale, stride_block, stride_slot,
    LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over begin .. end: base-2 logarithm of the sum [HEADS], and the output divided by that sum."""
    latent_columns, rope_columns, offsets = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, TILE)
    q = tl.load(q_ptr + q_rows[:, None] + latent_columns[None, :], mask=has_head[:, None], other=0.0)
    q_rope = tl.load(q_rope_ptr + q_rope_rows[:, None] + rope_columns[None, :], mask=has_head[:, None], other=0.0)
    peak = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    output = tl.zeros(q.shape, tl.float32)
    # The ids of the next tile's blocks are read one tile ahead: only then can the pipeliner fetch its rows early.
    block_ids = tl.load(table_ptr + (begin + offsets) // BLOCK_SIZE, mask=begin + offsets < end, other=0)
    for start in tl.range(begin, end, TILE):
        tokens = start + offsets
        rows = block_ids.to(tl.int64) * stride_block + (tokens % BLOCK_SIZE) * stride_slot
        is_stored = (tokens < end)[:, None]  # beyond it lies garbage, NaN included
        latent = tl.load(cache_ptr + rows[:, None] + latent_columns[None, :], mask=is_stored, other=0.0)
        rope = tl.load(cache_ptr + LATENT + rows[:, None] + rope_columns[None, :], mask=is_stored, other=0.0)
        block_ids = tl.load(table_ptr + (tokens + TILE) // BLOCK_SIZE, mask=tokens + TILE < end, other=0)
        scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)  # [HEADS, TILE]
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION) * scale
        scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        probs = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(probs, 1)
        output = tl.dot(probs.to(latent.dtype), latent, output * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)  # a padded row sees no key: zero
    return peak + tl.log2(total), output * (1.0 / total)[:, None]


@triton.jit
def _line_of_tiles(num_tokens_ptr, batch_size, shares, BATCH: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr):
    """Tiles per request, where each one's end in the line [BATCH], and the equal share: at least LEAST tiles."""
    requests = tl.arange(0, BATCH)
    lengths = tl.load(num_tokens_ptr + requests, mask=requests < batch_size, other=0)
    tiles = tl.where(requests < batch_size, tl.maximum(tl.cdiv(lengths, TILE), 1), 0)  # a padded row writes its zeros
    return tiles, tl.cumsum(tiles, 0), tl.maximum(tl.cdiv(tl.sum(tiles), shares), LEAST)


@triton.jit(do_not_specialize=["batch_size"])
def _stream_kernel(
    q_ptr, q_rope_ptr, cache_ptr, table_ptr, num_tokens_ptr, out_ptr, parts_ptr, lse_ptr, batch_size, scale,
    stride_q, stride_q_head, stride_rope, stride_rope_head, stride_block, stride_slot, stride_table,
    stride_out, stride_out_head,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, LEAST_TILES: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    share_index, shares = tl.program_id(1), tl.num_programs(1)
    tiles, ends, share = _line_of_tiles(num_tokens_ptr, batch_size, shares, BATCH, TILE, LEAST_TILES)
    position, stop = share_index * share, tl.minimum(share_index * share + share, tl.sum(tiles))
    heads, columns = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, LATENT)
    has_head = (heads < NUM_HEADS) | (NUM_HEADS % HEADS == 0)  # no mask where every head exists
    while position < stop:
        request = tl.sum((ends <= position).to(tl.int32))
        request_stop = tl.sum(tl.where(tl.arange(0, BATCH) == request, ends, 0))
        request_start = request_stop - tl.sum(tl.where(tl.arange(0, BATCH) == request, tiles, 0))
        segment_stop = tl.minimum(request_stop, stop)
        row = request.to(tl.int64)
        lse, output = _attend_latent(
            q_ptr, q_rope_ptr, row * stride_q + heads * stride_q_head, row * stride_rope + heads * stride_rope_head,
            has_head, cache_ptr, table_ptr + row * stride_table, (position - request_start) * TILE,
            tl.minimum((segment_stop - request_start) * TILE, tl.load(num_tokens_ptr + request)),
            scale, stride_block, stride_slot, LATENT, ROPE, BLOCK_SIZE, TILE, PRECISION,
        )  # fmt: skip
        target, stride_target = out_ptr + row * stride_out, stride_out_head
        if request_start // share != (request_stop - 1) // share:  # other shares hold the rest of it
            slot = share_index + (position != request_start) * shares  # one request may end here, another begin
            tl.store(lse_ptr + slot * NUM_HEADS + heads, lse, mask=has_head)
            target, stride_target = parts_ptr + slot.to(tl.int64) * (NUM_HEADS * LATENT), LATENT
        target_rows = target + heads[:, None] * stride_target  # one store for both, or its addresses fill the registers
        tl.store(target_rows + columns[None, :], output.to(out_ptr.dtype.element_ty), mask=has_head[:, None])
        position = segment_stop


@triton.jit(do_not_specialize=["batch_size", "shares"])
def merge_stream_kernel(
    num_tokens_ptr, out_ptr, parts_ptr, lse_ptr, batch_size, shares, stride_out, stride_out_head,
    NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, TILE: tl.constexpr, LEAST_TILES: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    first_row, first_column, request = tl.program_id(0) * ROWS, tl.program_id(1) * COLS, tl.program_id(2)
    tiles, ends, share = _line_of_tiles(num_tokens_ptr, batch_size, shares, BATCH, TILE, LEAST_TILES)
    request_stop = tl.sum(tl.where(tl.arange(0, BATCH) == request, ends, 0))
    request_start = request_stop - tl.sum(tl.where(tl.arange(0, BATCH) == request, tiles, 0))
    first_part, last_part = request_start // share, (request_stop - 1) // share
    if first_part != last_part:
        merge_partials(
            parts_ptr + first_column, lse_ptr, first_part, shares + first_part, last_part - first_part + 1,
            out_ptr + request.to(tl.int64) * stride_out + first_column, stride_out_head,
            NUM_HEADS, LATENT, ROWS, COLS, PARTS, first_row,
        )  # fmt: skip


@triton.jit
def _chunk_kernel(
    q_ptr, q_rope_ptr, cache_ptr, table_ptr, num_tokens_ptr, parts_ptr, lse_ptr, split_tokens, scale,
    stride_q, stride_q_head, stride_rope, stride_rope_head, stride_block, stride_slot, stride_table,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    begin, row = tl.program_id(1) * split_tokens, tl.program_id(2).to(tl.int64)
    length = tl.load(num_tokens_ptr + row)
    if begin < length:
        heads, columns = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, LATENT)
        has_head = (heads < NUM_HEADS) | (NUM_HEADS % HEADS == 0)  # no mask where every head exists
        lse, output = _attend_latent(
            q_ptr, q_rope_ptr, row * stride_q + heads * stride_q_head, row * stride_rope + heads * stride_rope_head,
            has_head, cache_ptr, table_ptr + row * stride_table, begin, tl.minimum(begin + split_tokens, length),
            scale, stride_block, stride_slot, LATENT, ROPE, BLOCK_SIZE, TILE, PRECISION,
        )  # fmt: skip
        part_rows = (row * tl.num_programs(1) + tl.program_id(1)) * NUM_HEADS + heads
        tl.store(lse_ptr + part_rows, lse, mask=has_head)
        part = parts_ptr + part_rows[:, None] * LATENT + columns[None, :]
        tl.store(part, output.to(parts_ptr.dtype.element_ty), mask=has_head[:, None])


@triton.jit(do_not_specialize=["num_chunks"])
def _merge_chunks_kernel(
    num_tokens_ptr, out_ptr, parts_ptr, lse_ptr, split_tokens, num_chunks, stride_out, stride_out_head,
    NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    first_row, first_column, request = tl.program_id(0) * ROWS, tl.program_id(1) * COLS, tl.program_id(2).to(tl.int64)
    num_parts = tl.cdiv(tl.load(num_tokens_ptr + request), split_tokens)
    merge_partials(
        parts_ptr + first_column, lse_ptr, request * num_chunks, request * num_chunks, num_parts,
        out_ptr + request * stride_out + first_column, stride_out_head,
        NUM_HEADS, LATENT, ROWS, COLS, PARTS, first_row,
    )  # fmt: skip


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
    workspace: SplitWorkspace,
    *,
    scale: float,
    split_tokens: int | None = None,
    config: MlaConfig | None = None,
) -> None:
    """Attention of one query per request over its `num_tokens` cache rows, written to `out`; zeros where that is 0.

    q_latent, out [B, H, R]; q_rope [B, H, P]; latent_cache [num_blocks, block_size, R + P], any strides; block_table
    [B, M] and num_tokens [B] int32. `scale` is 1 / sqrt(head size before absorption): 1 / sqrt(192) for DeepSeek.
    SplitWorkspace.allocate(device, 0, 16, R) serves equal shares at any batch. `split_tokens`, a multiple of the tile,
    gives each request the same bits in any batch, and stores B * H * ceil(M * block_size / split_tokens) rows.
    Raises ValueError for shapes, types and workspaces that do not fit. Allocates nothing; fit for a CUDA graph.
    """
    check_latent(q_latent, q_rope, latent_cache, block_table, num_tokens, out)
    check_options(scale, None, None)
    batch_size, num_heads, latent = q_latent.shape
    if batch_size == 0:
        return
    config = config or mla_config(q_latent.device, num_heads, q_latent.dtype)
    head_blocks = triton.cdiv(num_heads, config.heads)
    reading = _reading(q_latent, q_rope, latent_cache, config)
    inputs = (q_latent, q_rope, latent_cache, block_table, num_tokens)
    strides = (*q_latent.stride()[:2], *q_rope.stride()[:2], *latent_cache.stride()[:2], block_table.stride(0))
    parts = (workspace.parts.view(out.dtype), workspace.lse)  # as exact as out: wide rows cost more than they tell
    if split_tokens is None:
        shares = max(1, config.programs_per_sm * num_multiprocessors(q_latent.device) // head_blocks)
        workspace.require_room(2 * shares * num_heads, latent)
        line = {"TILE": config.tile, "LEAST_TILES": config.least_tiles, "BATCH": triton.next_power_of_2(batch_size)}
        _stream_kernel[(head_blocks, shares)](
            *inputs, out, *parts, batch_size, scale * LOG2_E, *strides, *out.stride()[:2], **(reading | line)
        )
        # About two parts a request in a large batch, up to one a share in a small one.
        grid, merge = merging(out, *((8, 2) if batch_size * num_heads > 512 else (1, 32)))
        merge_stream_kernel[grid](num_tokens, out, *parts, batch_size, shares, *out.stride()[:2], **line, **merge)
        return
    fits = split_tokens > 0 and split_tokens % config.tile == 0
    require(fits, f"split_tokens {split_tokens} is no multiple of the tile, {config.tile}")
    chunks = triton.cdiv(block_table.shape[1] * latent_cache.shape[1], split_tokens)
    workspace.require_room(batch_size * num_heads * chunks, latent)
    _chunk_kernel[(head_blocks, chunks, batch_size)](*inputs, *parts, split_tokens, scale * LOG2_E, *strides, **reading)
    grid, merge = merging(out, 1, 32)  # alike in any batch
    _merge_chunks_kernel[grid](num_tokens, out, *parts, split_tokens, chunks, *out.stride()[:2], **merge)


def _reading(
    q_latent: torch.Tensor, q_rope: torch.Tensor, latent_cache: torch.Tensor, config: MlaConfig
) -> dict[str, int | str | None]:
    """Constants of the kernels that read the cache."""
    return {
        "NUM_HEADS": q_latent.shape[1], "HEADS": config.heads, "LATENT": q_latent.shape[2], "ROPE": q_rope.shape[2],
        "BLOCK_SIZE": latent_cache.shape[1], "TILE": config.tile,
        "PRECISION": "ieee" if q_latent.dtype == torch.float32 else None,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def merging(out: torch.Tensor, rows: int, at_once: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid and constants of a merge by programs of `rows` heads that read `at_once` parts at a time."""
    batch_size, num_heads, latent = out.shape
    columns = min(MERGE_COLUMNS, latent)
    constants = {"NUM_HEADS": num_heads, "LATENT": latent, "ROWS": rows, "COLS": columns, "PARTS": at_once}
    return (triton.cdiv(num_heads, rows), latent // columns, batch_size), constants


def check_latent(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Raise ValueError unless the tensors belong together."""
    check_float("q_latent", q_latent, q_rope, latent_cache, out)
    require(
        q_latent.ndim == 3 and q_rope.ndim == 3 and q_rope.shape[:2] == q_latent.shape[:2],
        f"q_latent {tuple(q_latent.shape)} and q_rope {tuple(q_rope.shape)} must be [B, H, R] and [B, H, P]",
    )
    batch_size, _, latent = q_latent.shape
    rope = q_rope.shape[2]
    for size in (latent, rope):
        require(size >= 16 and size & (size - 1) == 0, f"latent and rope are {latent} and {rope}: take powers of two")
    require(
        latent_cache.ndim == 3 and latent_cache.shape[2] == latent + rope,
        f"latent_cache has shape {tuple(latent_cache.shape)}, expected [num_blocks, block_size, {latent + rope}]",
    )
    require(latent_cache.shape[1] in BLOCK_SIZES, f"block_size {latent_cache.shape[1]} is not one of {BLOCK_SIZES}")
    require(out.shape == q_latent.shape, f"out has shape {tuple(out.shape)}, q_latent {tuple(q_latent.shape)}")
    check_index("block_table", block_table, (batch_size, block_table.shape[-1]), q_latent.device)
    check_index("num_tokens", num_tokens, (batch_size,), q_latent.device)
