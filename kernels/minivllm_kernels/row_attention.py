"""Attention of one request's one new token in one launch: norm, RoPE, storing its K and V, looking at all keys.

    qkv [1, (H + 2 Hkv) D]         cache of a KV head: keys 0 .. n-2 of the request's blocks
    | q of a head's group | k | v |      | part 0 | part 1 | part 2 |        a program each
        |                   |   |            |        |        |
     norm, RoPE           norm, RoPE -----------------------> + the new key, which never comes back from the cache
        +------------------------------ softmax --+--------+
                                                  last to finish merges: out [1, H, D]

Every program of a KV head norms and turns its group's few queries anew. The first tile of K and V is on its way before
q is known, and each further one before the tile in front of it is used: through registers, for kernels that begin early
must share an SM with the ones in front, and shared memory of more than 48 kB makes it wait until it is empty.
Parts are equal and as many as the keys are worth, so the order of additions depends on the length alone.
Bytes: 2 * Hkv * D * itemsize a key.
"""

import math

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs
from minivllm_kernels.early_launch import can_launch_early, let_next_begin, wait_for_input
from minivllm_kernels.split_kv import LOG2_E, merge_partials, store_part
from minivllm_kernels.workspace import SplitWorkspace


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _with_partners(ptr, mask, HEAD_SIZE: tl.constexpr):
    """Elements [.., COLS] of heads that start at `ptr`, and for each its partner of the rotation, half a head away."""
    column = tl.arange(0, mask.shape[1])[None, :]
    partner = tl.load(ptr + (column + HEAD_SIZE // 2) % HEAD_SIZE, mask=mask, other=0.0)
    return tl.load(ptr + column, mask=mask, other=0.0), partner


@triton.jit
def _angles(cos_sin_ptr, position_ptr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr):
    """Cosines of a position [1, COLS], and sines as partners are multiplied with them: minus in the first half."""
    column = tl.arange(0, COLS)[None, :]
    HALF: tl.constexpr = HEAD_SIZE // 2
    angle_ptr = cos_sin_ptr + tl.maximum(tl.load(position_ptr), 0).to(tl.int64) * HEAD_SIZE + column % HALF
    cos = tl.load(angle_ptr, mask=column < HEAD_SIZE, other=0.0)
    sin = tl.load(angle_ptr + HALF, mask=column < HEAD_SIZE, other=0.0)
    return cos, tl.where(column < HALF, -sin, sin)


@triton.jit
def _turned(ptr, mask, weight, partner_weight, angles, eps, HEAD_SIZE: tl.constexpr):
    """Heads that start at `ptr` [heads, 1], normed if there is a weight, and turned: [heads, COLS].

    Each element meets its partner by being read twice; rounds where store_kv.py does.
    """
    x, partner = _with_partners(ptr, mask, HEAD_SIZE)
    dtype: tl.constexpr = x.dtype
    x, partner = x.to(tl.float32), partner.to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_SIZE + eps)[:, None]
        x = _rounded(_rounded(x * scale, dtype) * weight.to(tl.float32), dtype)
        partner = _rounded(_rounded(partner * scale, dtype) * partner_weight.to(tl.float32), dtype)
    cos, sin = angles
    return (_rounded(x * _rounded(cos, dtype), dtype) + _rounded(partner * _rounded(sin, dtype), dtype)).to(dtype)


@triton.jit
def _blocks(table_ptr, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where the keys from `start` on lie, read a tile ahead."""
    token = start + tl.arange(0, TILE)
    return tl.load(table_ptr + token // BLOCK_SIZE, mask=token < end, other=0).to(tl.int64)


@triton.jit
def _load_tile(
    k_ptr, v_ptr, blocks, start, end, stride_block, stride_slot,
    HEAD_SIZE: tl.constexpr, COLS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """K and V [TILE, COLS] of the keys from `start` on, zeros from `end` on: there lies garbage, NaN included."""
    token, column = start + tl.arange(0, blocks.shape[0]), tl.arange(0, COLS)
    offset = (blocks * stride_block + token % BLOCK_SIZE * stride_slot)[:, None] + column[None, :]
    mask = (token < end)[:, None] & (column < HEAD_SIZE)[None, :]
    return tl.load(k_ptr + offset, mask=mask, other=0.0), tl.load(v_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _with_tile(peak, total, output, q, k, v, is_seen, scale, PRECISION: tl.constexpr):
    """A softmax (running maximum [ROWS], sum [ROWS], output [ROWS, COLS]) with a tile of keys more."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [ROWS, TILE]
    scores = tl.where(is_seen[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights, shrink = tl.exp2(scores - new_peak[:, None]), tl.exp2(peak - new_peak)
    output = tl.dot(weights.to(v.dtype), v, output * shrink[:, None], input_precision=PRECISION)
    return new_peak, total * shrink + tl.sum(weights, 1), output


@triton.jit
def _store_new(k_ptr, v_ptr, slot, k, v, mask, stride_block, stride_slot, BLOCK_SIZE: tl.constexpr):
    """The new key and value [1, COLS] into their slot, if they have one."""
    column = tl.arange(0, k.shape[1])[None, :]
    offset = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot + column
    tl.store(k_ptr + offset, k, mask=mask & (slot >= 0))
    tl.store(v_ptr + offset, v, mask=mask & (slot >= 0))


@triton.jit
def _start_softmax(q, new_k, new_v, scale, has_new):
    """Running maximum, sum and output of the new key alone; of no key unless `has_new`."""
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), 1) * scale
    peak = tl.where(has_new, score, float("-inf"))
    return peak, tl.where(has_new, score * 0 + 1, 0.0), tl.where(has_new, new_v.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["window", "splits"])
def _row_attention_kernel(
    qkv_ptr,  # [(H + 2 Hkv) * D]
    q_norm_ptr, k_norm_ptr, cos_sin_ptr, position_ptr, slot_ptr, k_ptr, v_ptr, table_ptr, num_tokens_ptr, out_ptr,
    parts_ptr, lse_ptr, arrivals_ptr, eps, scale, window, splits, stride_block, stride_slot, stride_kv_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr, COLS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, PRECISION: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One program takes the query heads of a KV head and one part of the keys."""
    let_next_begin(IS_EARLY)
    head, part, length = tl.program_id(0), tl.program_id(1), tl.load(num_tokens_ptr)
    old = length - 1  # keys that the cache holds
    first_visible = tl.maximum(length - window, 0) if HAS_WINDOW else 0
    begin = first_visible // TILE * TILE
    share = tl.maximum(tl.cdiv(tl.cdiv(old - begin, TILE), splits), 1) * TILE
    num_parts = tl.maximum(tl.cdiv(old - begin, share), 1)
    if part >= num_parts:
        return
    start, end = begin + part * share, tl.minimum(begin + part * share + share, old)
    k_ptr, v_ptr = k_ptr + head * stride_kv_head, v_ptr + head * stride_kv_head
    row, column, tile = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :], tl.arange(0, TILE)
    is_column, is_query = column < HEAD_SIZE, (row < GROUP) & (column < HEAD_SIZE)
    blocks = _blocks(table_ptr, start, end, BLOCK_SIZE, TILE)
    k, v = _load_tile(k_ptr, v_ptr, blocks, start, end, stride_block, stride_slot, HEAD_SIZE, COLS, BLOCK_SIZE)
    blocks = _blocks(table_ptr, start + TILE, end, BLOCK_SIZE, TILE)
    q_norm, q_partner_norm, k_norm, k_partner_norm = None, None, None, None
    if q_norm_ptr is not None:
        q_norm, q_partner_norm = _with_partners(q_norm_ptr, is_column, HEAD_SIZE)
        k_norm, k_partner_norm = _with_partners(k_norm_ptr, is_column, HEAD_SIZE)
    slot, angles = tl.load(slot_ptr).to(tl.int64), _angles(cos_sin_ptr, position_ptr, HEAD_SIZE, COLS)
    wait_for_input(IS_EARLY)
    q_ptr, new_k_ptr = qkv_ptr + (head * GROUP + row) * HEAD_SIZE, qkv_ptr + (NUM_KV_HEADS * GROUP + head) * HEAD_SIZE
    new_k = _turned(new_k_ptr, is_column, k_norm, k_partner_norm, angles, eps, HEAD_SIZE)
    new_v = tl.load(new_k_ptr + NUM_KV_HEADS * HEAD_SIZE + column, mask=is_column, other=0.0)
    q = _turned(q_ptr, is_query, q_norm, q_partner_norm, angles, eps, HEAD_SIZE)
    has_new = (part == num_parts - 1) & (length > 0)  # a row of padding has none
    _store_new(k_ptr, v_ptr, slot, new_k, new_v, is_column & has_new, stride_block, stride_slot, BLOCK_SIZE)
    peak, total, output = _start_softmax(q, new_k, tl.broadcast_to(new_v, q.shape), scale, has_new)
    for first in range(start, end, TILE):
        next_k, next_v = _load_tile(
            k_ptr, v_ptr, blocks, first + TILE, end, stride_block, stride_slot, HEAD_SIZE, COLS, BLOCK_SIZE
        )
        blocks = _blocks(table_ptr, first + 2 * TILE, end, BLOCK_SIZE, TILE)
        is_seen = (first + tile < end) & (first + tile >= first_visible)
        peak, total, output = _with_tile(peak, total, output, q, k, v, is_seen, scale, PRECISION)
        k, v = next_k, next_v
    output /= tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += head * GROUP * HEAD_SIZE
    if num_parts == 1:
        tl.store(out_ptr + row * HEAD_SIZE + column, output.to(out_ptr.dtype.element_ty), mask=is_query)
        return
    first_slot, rows, lse = head * splits, tl.arange(0, ROWS), peak + tl.log2(total)
    store_part(parts_ptr, lse_ptr, (first_slot + part) * GROUP + rows, rows < GROUP, lse, output, HEAD_SIZE)
    tl.debug_barrier()  # every thread's part is stored before one thread says so
    if tl.atomic_add(arrivals_ptr + head, 1, sem="acq_rel") == num_parts - 1:
        merge_partials(
            parts_ptr, lse_ptr, first_slot, first_slot, num_parts, out_ptr, HEAD_SIZE,
            GROUP, HEAD_SIZE, MERGE_ROWS, COLS, PARTS,
        )  # fmt: skip
        tl.store(arrivals_ptr + head, 0)  # ready for the next launch


def row_attention(
    qkv: torch.Tensor,  # [1, (H + 2 Hkv) * D]
    q_norm: torch.Tensor | None,  # [D]; None: no norm, as in Llama
    k_norm: torch.Tensor | None,
    cos_sin: torch.Tensor,  # [max_position, D] fp32: D/2 cosines, then D/2 sines
    position: torch.Tensor,  # [1]
    slot: torch.Tensor,  # [1]; negative: K and V are not written
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,
    block_table: torch.Tensor,  # [1, M]
    num_tokens: torch.Tensor,  # [1] the new one included; 0: a row of padding, `out` is zero
    out: torch.Tensor,  # [1, H, D]
    workspace: SplitWorkspace,
    *,
    eps: float,
    window: int | None = None,
    early: bool = False,
) -> None:
    """What qk_norm_rope_store and paged_decode do for a row, its newest key taken from qkv and not from the cache.

    `early`: begin beside the kernel in front, which must write neither integers nor older keys.
    Raises ValueError for shapes, types or devices that do not fit together.
    """
    _check(qkv, (q_norm, k_norm), cos_sin, k_cache, v_cache, out)
    row, table = (1,), (1, block_table.shape[-1])
    checks.check_index("position", position, row, qkv.device)
    checks.check_index("slot", slot, row, qkv.device)
    checks.check_index("num_tokens", num_tokens, row, qkv.device)
    checks.check_index("block_table", block_table, table, qkv.device)
    (_, num_heads, head_size), num_kv_heads = out.shape, k_cache.shape[2]
    config = configs.row_attention_config(qkv.device, qkv.dtype)
    group, columns = num_heads // num_kv_heads, triton.next_power_of_2(head_size)
    merge_rows = triton.next_power_of_2(group)
    splits = max(1, config.programs_per_sm * configs.num_multiprocessors(qkv.device) // num_kv_heads)
    workspace.require_room(num_kv_heads * splits * group, head_size, num_kv_heads)
    is_early = early and can_launch_early(qkv.device)
    _row_attention_kernel[(num_kv_heads, splits)](
        qkv, q_norm, k_norm, cos_sin, position, slot, k_cache, v_cache, block_table, num_tokens, out,
        workspace.parts, workspace.lse, workspace.arrivals, eps, LOG2_E / math.sqrt(head_size), window or 0, splits,
        *k_cache.stride()[:3], NUM_KV_HEADS=num_kv_heads, GROUP=group, ROWS=max(16, merge_rows), HEAD_SIZE=head_size,
        COLS=columns, BLOCK_SIZE=k_cache.shape[1], TILE=config.tile_tokens(columns * qkv.element_size()),
        MERGE_ROWS=merge_rows,
        PARTS=max(1, min(16, 8192 // (merge_rows * columns))), HAS_WINDOW=window is not None,
        PRECISION="ieee" if qkv.dtype == torch.float32 else None, IS_EARLY=is_early,
        num_warps=config.num_warps, launch_pdl=is_early,
    )  # fmt: skip


def _check(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The projection, the norms' weights, the angles, the caches and the output fit together."""
    checks.check_cache(out, k_cache, v_cache)
    _, num_heads, head_size = out.shape
    width = (num_heads + 2 * k_cache.shape[2]) * head_size
    checks.require(qkv.shape == (1, width), f"qkv has shape {tuple(qkv.shape)}, expected (1, {width})")
    checks.require((norms[0] is None) == (norms[1] is None), "pass both norm weights or neither")
    weights = [weight for weight in norms if weight is not None]
    checks.require(all(weight.shape == (head_size,) for weight in weights), f"norm weights must be [{head_size}]")
    checks.check_float("qkv", qkv, out, *weights)
    fits = cos_sin.ndim == 2 and cos_sin.shape[1] == head_size and cos_sin.is_contiguous()
    checks.require(fits, f"cos_sin has shape {tuple(cos_sin.shape)}, expected a contiguous [max_position, {head_size}]")
    checks.require(len(out) == 1 and out.is_contiguous(), "out must be a contiguous [1, H, D]")
