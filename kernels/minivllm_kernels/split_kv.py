"""What the split-KV kernels share: reading tiles through a block table, and merging partial softmaxes.

A partial result over some of the keys is (output, lse), the output already divided by its own softmax sum and lse the
base-2 logarithm of that sum. Two partials merge exactly (Milakov and Gimelshein 2018; Dao et al., Flash-Decoding 2023):

    lse = log2(2^lse_a + 2^lse_b)        output = output_a * 2^(lse_a - lse) + output_b * 2^(lse_b - lse)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from minivllm_kernels.attention_configs import DecodeConfig, decode_config
from minivllm_kernels.checks import check_cache, check_float, check_index, check_options, require
from minivllm_kernels.workspace import SplitWorkspace

LOG2_E = 1.4426950408889634  # scores are scaled by it, so that exp becomes exp2


@triton.jit
def attend_tiles(
    q,  # [ROWS, COLS] the query heads that share one KV head, padded to the rows a tensor core wants
    k_ptr, v_ptr,  # one KV head of the caches
    table_ptr,  # the request's row of the block table
    begin, end,  # keys begin .. end - 1
    first_visible,  # keys before it lie outside the sliding window
    scale,  # 1 / sqrt(D), and log2(e) with it unless there is a soft cap
    soft_cap,
    stride_block, stride_slot,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of begin .. end: running maximum [ROWS], sum [ROWS] and output [ROWS, COLS]."""
    columns = tl.arange(0, q.shape[1])
    offsets = tl.arange(0, TILE)
    peak = tl.full((q.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    output = tl.zeros(q.shape, tl.float32)
    # The ids of the next tile's blocks are read one tile ahead: only then can the pipeliner fetch its K and V early.
    block_ids = tl.load(table_ptr + (begin + offsets) // BLOCK_SIZE, mask=begin + offsets < end, other=0)
    for start in tl.range(begin, end, TILE):
        tokens = start + offsets
        rows = block_ids.to(tl.int64) * stride_block + (tokens % BLOCK_SIZE) * stride_slot
        is_stored = (tokens < end)[:, None] & (columns < HEAD_SIZE)[None, :]  # beyond it lies garbage, NaN included
        k = tl.load(k_ptr + rows[:, None] + columns[None, :], mask=is_stored, other=0.0)  # [TILE, COLS]
        v = tl.load(v_ptr + rows[:, None] + columns[None, :], mask=is_stored, other=0.0)
        block_ids = tl.load(table_ptr + (tokens + TILE) // BLOCK_SIZE, mask=tokens + TILE < end, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [ROWS, TILE]
        if HAS_CAP:
            scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1) * 1.4426950408889634  # tanh, then log2(e)
        is_seen = tokens < end
        if HAS_WINDOW:
            is_seen &= tokens >= first_visible
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        probs = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(probs, 1)
        output = tl.dot(probs.to(v.dtype), v, output * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    return peak, total, output


@triton.jit
def store_part(parts_ptr, lse_ptr, part_rows, is_row, lse, output, HEAD_SIZE: tl.constexpr):
    """Store output [ROWS, COLS] and lse [ROWS] as the rows `part_rows` of the workspace, where `is_row`."""
    columns = tl.arange(0, output.shape[1])
    is_kept = is_row[:, None] & (columns < HEAD_SIZE)[None, :]
    tl.store(parts_ptr + part_rows.to(tl.int64)[:, None] * HEAD_SIZE + columns[None, :], output, mask=is_kept)
    tl.store(lse_ptr + part_rows, lse, mask=is_row)


@triton.jit
def merge_partials(
    parts_ptr,  # partial outputs [slots, GROUP, HEAD_SIZE] fp32
    lse_ptr,  # [slots, GROUP] fp32
    first_slot, rest_slot, num_parts,  # part 0 lies at first_slot, part i at rest_slot + i
    out_ptr, stride_out_head,  # the GROUP heads of one request
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    first_row=0,
):  # fmt: skip
    """Store the merged output of ROWS of the GROUP heads; PARTS parts are read at a time: their latencies overlap."""
    rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, COLS)
    is_kept = (rows < GROUP)[:, None] & (columns < HEAD_SIZE)[None, :]
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        is_there = (part < num_parts)[:, None] & (rows < GROUP)[None, :]
        slot = tl.where(part == 0, first_slot, rest_slot + part).to(tl.int64)
        lse_rows = slot[:, None] * GROUP + rows[None, :]  # [PARTS, ROWS]
        lse = tl.load(lse_ptr + lse_rows, mask=is_there, other=float("-inf"), cache_modifier=".cg")
        part_output = tl.load(
            parts_ptr + lse_rows[:, :, None] * HEAD_SIZE + columns[None, None, :],
            mask=is_there[:, :, None] & is_kept[None, :, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        pivot = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # padding rows have no key: -inf less -inf is NaN
        shrink, weights = tl.exp2(peak - pivot), tl.exp2(lse - pivot[None, :])
        total = total * shrink + tl.sum(weights, 0)
        output = output * shrink[:, None] + tl.sum(part_output * weights[:, :, None], 0)
        peak = new_peak
    output /= tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = rows * stride_out_head
    tl.store(out_ptr + out_rows[:, None] + columns[None, :], output.to(out_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def shared_keys(prefix_ptr, request, PREFIX_TILE: tl.constexpr):
    """Keys that a request leaves to the prefix kernel: whole tiles of PREFIX_TILE; 0 stands for no prefixes at all."""
    return tl.load(prefix_ptr + request) // PREFIX_TILE * PREFIX_TILE if PREFIX_TILE > 0 else 0


@triton.jit(do_not_specialize=["window", "first_slot"])
def chunk_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, num_tokens_ptr, prefix_ptr, parts_ptr, lse_ptr, split_tokens, first_slot,
    scale, soft_cap, window, stride_q, stride_q_head, stride_block, stride_slot, stride_kv_head, stride_table,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, PREFIX_TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, chunk, request): every chunk is stored as a part, behind `first_slot` others."""
    head, chunk, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(num_tokens_ptr + request)
    first_visible = tl.maximum(length - window, 0) if HAS_WINDOW else 0
    own_start = shared_keys(prefix_ptr, request, PREFIX_TILE)  # keys before it are another kernel's work
    begin = tl.maximum(own_start + chunk * split_tokens, first_visible // TILE * TILE)
    end = tl.minimum(own_start + (chunk + 1) * split_tokens, length)
    if begin < end:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, COLS)
        is_kept = (rows < GROUP)[:, None] & (columns < HEAD_SIZE)[None, :]
        q_rows = request.to(tl.int64) * stride_q + (head * GROUP + rows) * stride_q_head
        q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=is_kept, other=0.0)
        peak, total, output = attend_tiles(
            q, k_ptr + head * stride_kv_head, v_ptr + head * stride_kv_head,
            table_ptr + request.to(tl.int64) * stride_table, begin, end, first_visible,
            scale, soft_cap, stride_block, stride_slot, HEAD_SIZE, BLOCK_SIZE, TILE, HAS_WINDOW, HAS_CAP, PRECISION,
        )  # fmt: skip
        slots = first_slot + tl.num_programs(1)  # per pair
        slot = (request.to(tl.int64) * tl.num_programs(0) + head) * slots + first_slot + chunk
        output /= total[:, None]
        lse = peak + tl.log2(total)
        store_part(parts_ptr, lse_ptr, slot * GROUP + rows, rows < GROUP, lse, output, HEAD_SIZE)


@triton.jit(do_not_specialize=["num_slots", "window", "first_slot"])
def merge_kernel(
    num_tokens_ptr, prefix_ptr, out_ptr, parts_ptr, lse_ptr, split_tokens, num_slots, first_slot, window,
    stride_out, stride_out_head,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr, MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
    PREFIX_TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, request): merge its parts in order and store the output."""
    head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(num_tokens_ptr + request)
    own_start = shared_keys(prefix_ptr, request, PREFIX_TILE)
    skipped_chunks = tl.maximum(length - window, 0) // split_tokens if HAS_WINDOW else 0
    first = tl.where(own_start > 0, 0, first_slot + skipped_chunks)  # without a prefix, its slots are not read
    slot = (request * tl.num_programs(0) + head) * num_slots + first
    num_parts = first_slot + tl.cdiv(length - own_start, split_tokens) - first
    merge_partials(
        parts_ptr, lse_ptr, slot, slot, tl.where(length > 0, num_parts, 0),
        out_ptr + request * stride_out + head * GROUP * stride_out_head, stride_out_head,
        GROUP, HEAD_SIZE, MERGE_ROWS, COLS, PARTS,
    )  # fmt: skip


@dataclass(frozen=True)
class DecodeArguments:
    """What the decode kernels share on launch, worked out once by `decode_arguments`."""

    config: DecodeConfig
    scale: float
    numbers: tuple[float, float, int]  # scale, soft cap, window
    strides: tuple[int, ...]  # of q's rows and heads, the cache's blocks, slots and KV heads, the block table
    shape: dict[str, int]
    merging: dict[str, int]
    reading: dict[str, Any]


def decode_arguments(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
    scale: float | None,
    window: int | None,
    soft_cap: float | None,
    config: DecodeConfig | None,
) -> DecodeArguments:
    """Check the inputs of a decode launch, as `paged_decode` documents them, and derive its constants."""
    check_cache(q, k_cache, v_cache)
    check_options(scale, window, soft_cap)
    batch_size, num_heads, head_size = q.shape
    check_float("q", q, out)
    require(out.shape == q.shape, f"out has shape {tuple(out.shape)}, q {tuple(q.shape)}")
    check_index("block_table", block_table, (batch_size, block_table.shape[-1]), q.device)
    check_index("num_tokens", num_tokens, (batch_size,), q.device)
    config = config or decode_config(q.device)
    scale = 1 / math.sqrt(head_size) if scale is None else scale
    group, columns = num_heads // k_cache.shape[2], triton.next_power_of_2(head_size)
    merge_rows = triton.next_power_of_2(group)
    return DecodeArguments(
        config,
        scale,
        numbers=(scale if soft_cap else scale * LOG2_E, soft_cap or 0.0, window or 0),
        strides=(q.stride(0), q.stride(1), *k_cache.stride()[:3], block_table.stride(0)),
        shape={"GROUP": group, "HEAD_SIZE": head_size, "COLS": columns},
        merging={"MERGE_ROWS": merge_rows, "PARTS": max(1, min(16, 8192 // (merge_rows * columns)))},
        reading={
            "ROWS": max(16, merge_rows), "BLOCK_SIZE": k_cache.shape[1],
            "TILE": config.tile_tokens(columns * q.element_size()),
            "HAS_WINDOW": window is not None, "HAS_CAP": soft_cap is not None,
            "PRECISION": "ieee" if q.dtype == torch.float32 else None,
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        },
    )  # fmt: skip


@dataclass(frozen=True)
class Chunking:
    """Which parts a request has, and where they lie: `first_slot` of its prefix, then one for each chunk."""

    split_tokens: int  # a chunk
    num_slots: int  # of a (request, KV head) pair
    first_slot: int = 0
    prefix_tile: int = 0  # a prefix is rounded down to a multiple of it; 0: no request has one


def store_chunks(
    inputs: tuple[torch.Tensor, ...],  # q, k_cache, v_cache, block_table, num_tokens
    prefix_tokens: torch.Tensor | None,  # [B] int32: keys of each request that the first_slot parts before hold
    workspace: SplitWorkspace,
    arguments: DecodeArguments,
    chunking: Chunking,
) -> None:
    """Cut every request at multiples of `split_tokens` and store a part for each chunk."""
    tile, num_requests, num_heads, head_size = arguments.reading["TILE"], *inputs[0].shape
    split_tokens, num_slots, first_slot = chunking.split_tokens, chunking.num_slots, chunking.first_slot
    require(split_tokens > 0 and split_tokens % tile == 0, f"split_tokens {split_tokens} is no multiple of {tile}")
    workspace.require_room(num_requests * num_heads * num_slots, head_size)
    chunk_kernel[(inputs[1].shape[2], num_slots - first_slot, num_requests)](
        *inputs, prefix_tokens, workspace.parts, workspace.lse, split_tokens, first_slot,
        *arguments.numbers, *arguments.strides,
        PREFIX_TILE=chunking.prefix_tile, **arguments.shape, **arguments.reading,
    )  # fmt: skip


def merge_chunks(
    inputs: tuple[torch.Tensor, ...],
    prefix_tokens: torch.Tensor | None,
    out: torch.Tensor,
    workspace: SplitWorkspace,
    arguments: DecodeArguments,
    chunking: Chunking,
) -> None:
    """Merge each request's parts in order: the result does not depend on who stored them when."""
    is_short = chunking.num_slots <= 4  # one warp: what counts is latency
    merge_kernel[(inputs[1].shape[2], len(out))](
        inputs[4], prefix_tokens, out, workspace.parts, workspace.lse, chunking.split_tokens, chunking.num_slots,
        chunking.first_slot, arguments.numbers[2], out.stride(0), out.stride(1), PREFIX_TILE=chunking.prefix_tile,
        HAS_WINDOW=arguments.reading["HAS_WINDOW"], **arguments.shape,
        MERGE_ROWS=arguments.merging["MERGE_ROWS"], PARTS=min(4 if is_short else 8, arguments.merging["PARTS"]),
        num_warps=1 if is_short else 2,
    )  # fmt: skip
