"""Keys and values into the paged cache: as they are, or together with all that happens to q, k and v before attention.

store_kv: 16 rows (token, head) of k, v a program      slots[t] = block * block_size + offset
+------------------+                              +--------------------------------+
| token 0, head 0  |  ------ slots[0] = 115 --->  | block 7, offset 3, head 0      |   block_size 16
| token 0, head 1  |                              | block 7, offset 3, head 1      |
| token 1, head 0  |  ------ slots[1] = -1        (padding: nothing is written)
+------------------+
Bytes per token: 4 * Hkv * D * itemsize (K and V, read and written).

qk_norm_rope_store: one token a program, its row of the fused projection read once
qkv[t]   | q heads: first half, second half | k heads: first, second | v heads |
           RMSNorm over D, if any  ----------------------+               |
           (a, b) -> (a cos - b sin, b cos + a sin) -----+               |
                 |                                       |               |
              q_out[t]                            k_cache[slots[t]]  v_cache[slots[t]]
A head's two halves are two tensors, so partners of a rotation meet in one thread: nothing is exchanged.
Bytes per token: 2 * (H + 2 Hkv) * D * itemsize, and D angles from L2; as separate kernels about 3 times that.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs


@triton.jit(do_not_specialize=["num_rows"])
def _store_kv_kernel(
    k_ptr, v_ptr,  # [T, Hkv, D]
    k_cache_ptr, v_cache_ptr,  # [num_blocks, block_size, Hkv, D]
    slots_ptr,  # [T]
    num_rows,  # T * Hkv
    k_stride_token, k_stride_head, v_stride_token, v_stride_head,
    stride_block, stride_offset, stride_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program copies ROWS (token, head) pairs, so that no head count leaves lanes idle."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED_SIZE)[None, :]
    token = (row // NUM_KV_HEADS).to(tl.int64)
    head = row % NUM_KV_HEADS
    is_row = row < num_rows
    is_read = is_row[:, None] & (dim < HEAD_SIZE)
    # read before the slot is known: the latencies overlap, and a padded row costs little
    k = tl.load(k_ptr + (token * k_stride_token + head * k_stride_head)[:, None] + dim, mask=is_read)  # [ROWS, D]
    v = tl.load(v_ptr + (token * v_stride_token + head * v_stride_head)[:, None] + dim, mask=is_read)
    slot = tl.load(slots_ptr + token, mask=is_row, other=-1).to(tl.int64)  # int64: caches pass 2**31 elements
    target = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_offset + head * stride_head
    is_written = is_read & (slot >= 0)[:, None]
    tl.store(k_cache_ptr + target[:, None] + dim, k, mask=is_written)
    tl.store(v_cache_ptr + target[:, None] + dim, v, mask=is_written)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x in fp32 with the bits that `dtype` keeps: transformers computes step by step in the model's type."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _halves(ptr, mask, HALF: tl.constexpr):
    """First and second halves of the rows that `ptr` points at."""
    return tl.load(ptr, mask=mask, other=0.0), tl.load(ptr + HALF, mask=mask, other=0.0)


@triton.jit
def _norm_and_rotate(first, second, weight_first, weight_second, cos, sin, eps, HALF: tl.constexpr):
    """Halves [heads, D/2] of some heads, normalised over D if there is a weight, turned by the angles [1, D/2]."""
    dtype: tl.constexpr = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)
    cos, sin = _rounded(cos, dtype), _rounded(sin, dtype)
    if weight_first is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]  # [heads, 1]
        a = _rounded(_rounded(a * scale, dtype) * weight_first.to(tl.float32), dtype)
        b = _rounded(_rounded(b * scale, dtype) * weight_second.to(tl.float32), dtype)
    turned_a = _rounded(a * cos, dtype) - _rounded(b * sin, dtype)
    turned_b = _rounded(b * cos, dtype) + _rounded(a * sin, dtype)
    return turned_a.to(dtype), turned_b.to(dtype)


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr,  # [T, (H + 2 Hkv) * D]
    q_weight_ptr, k_weight_ptr,  # [D] or None
    cos_sin_ptr,  # [max_position, D]: cosines, then sines
    positions_ptr, slots_ptr,  # [T]
    q_out_ptr,  # [T, H, D]
    k_cache_ptr, v_cache_ptr,  # [num_blocks, block_size, Hkv, D]
    eps,
    qkv_stride, q_stride_token, q_stride_head, stride_block, stride_offset, stride_head,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, Q_TILE: tl.constexpr, KV_TILE: tl.constexpr,
):  # fmt: skip
    """One program takes one token, and of its heads the next Q_TILE of q and KV_TILE of k and v."""
    token = tl.program_id(0).to(tl.int64)  # int64: T rows of qkv pass 2**31 elements
    q_head = (tl.program_id(1) * Q_TILE + tl.arange(0, Q_TILE))[:, None]
    kv_head = (tl.program_id(1) * KV_TILE + tl.arange(0, KV_TILE))[:, None]
    dim = tl.arange(0, PADDED_HALF)[None, :]
    is_dim = dim < HALF
    is_q = (q_head < NUM_HEADS) & is_dim
    is_kv = (kv_head < NUM_KV_HEADS) & is_dim
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    q = qkv_ptr + token * qkv_stride + q_head * (2 * HALF) + dim
    k = qkv_ptr + token * qkv_stride + (NUM_HEADS + kv_head) * (2 * HALF) + dim
    q_first, q_second = _halves(q, is_q, HALF)  # [Q_TILE, D/2]
    k_first, k_second = _halves(k, is_kv, HALF)  # [KV_TILE, D/2]
    v_first, v_second = _halves(k + NUM_KV_HEADS * 2 * HALF, is_kv, HALF)
    q_weight_first, q_weight_second, k_weight_first, k_weight_second = None, None, None, None
    if q_weight_ptr is not None:
        q_weight_first, q_weight_second = _halves(q_weight_ptr + dim, is_dim, HALF)  # [1, D/2]
        k_weight_first, k_weight_second = _halves(k_weight_ptr + dim, is_dim, HALF)
    cos, sin = _halves(cos_sin_ptr + tl.maximum(position, 0) * (2 * HALF) + dim, is_dim, HALF)  # [1, D/2]
    # Every load is under way before the first is used: the compiler moves none over a barrier, and no arithmetic out of
    # a branch; left alone it saves registers by reading q, k and v one after another, a memory latency each.
    tl.debug_barrier()
    if position >= 0:
        first, second = _norm_and_rotate(q_first, q_second, q_weight_first, q_weight_second, cos, sin, eps, HALF)
        q_out = q_out_ptr + token * q_stride_token + q_head * q_stride_head + dim
        tl.store(q_out, first, mask=is_q)
        tl.store(q_out + HALF, second, mask=is_q)
        first, second = _norm_and_rotate(k_first, k_second, k_weight_first, k_weight_second, cos, sin, eps, HALF)
        target = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_offset + kv_head * stride_head + dim
        is_written = is_kv & (slot >= 0)
        tl.store(k_cache_ptr + target, first, mask=is_written)
        tl.store(k_cache_ptr + target + HALF, second, mask=is_written)
        tl.store(v_cache_ptr + target, v_first, mask=is_written)
        tl.store(v_cache_ptr + target + HALF, v_second, mask=is_written)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write k, v [T, Hkv, D] (rows at any stride) into slots [T] of two [num_blocks, block_size, Hkv, D] caches.

    A negative slot is skipped. Slots are not compared with the cache's end: that would wait for the GPU.
    Raises ValueError for shapes, types or devices that do not fit together.
    """
    checks.require(k.ndim == 3 and k.shape == v.shape, "k and v must be two [T, Hkv, D] tensors of the same shape")
    num_tokens, num_kv_heads, head_size = k.shape
    checks.check_float("k", k, v)
    checks.require(
        k_cache.shape[2:] == k.shape[1:],
        f"k has {num_kv_heads} heads of {head_size}, the cache has shape {tuple(k_cache.shape)}",
    )
    checks.check_cache(k, k_cache, v_cache)
    _check_per_token("slots", slots, num_tokens, k.device)
    if num_tokens == 0:
        return
    config = configs.STORE_KV[configs.device_class(k.device)]
    num_rows = num_tokens * num_kv_heads
    _store_kv_kernel[(triton.cdiv(num_rows, config.rows),)](
        k, v, k_cache, v_cache, slots, num_rows, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, PADDED_SIZE=triton.next_power_of_2(head_size),
        BLOCK_SIZE=k_cache.shape[1], ROWS=config.rows, num_warps=config.num_warps,
    )  # fmt: skip


def qk_norm_rope_store(
    qkv: torch.Tensor,  # [T, (H + 2 Hkv) * D]
    q_weight: torch.Tensor | None,  # [D]; None: no norm, as in Llama
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,  # [max_position, D], fp32 or qkv's type: D/2 cosines, then D/2 sines
    positions: torch.Tensor,  # [T]; negative: a row of padding, nothing is written
    slots: torch.Tensor,  # [T]; negative: K and V are not written, q is
    q_out: torch.Tensor,  # [T, H, D]; may be the q part of qkv
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> None:
    """Norm and rotate q and k of the fused projection; q goes to q_out, k and v to their slots.

    Positions and slots are not compared with the tables' ends: that would wait for the GPU.
    Raises ValueError for shapes, types or devices that do not fit together.
    """
    num_tokens, head_size = len(qkv), q_out.shape[-1]
    _check_fused(qkv, q_weight, k_weight, cos_sin, q_out, num_heads, num_kv_heads)
    checks.check_cache(q_out, k_cache, v_cache)
    checks.require(k_cache.shape[2] == num_kv_heads, f"num_kv_heads is {num_kv_heads}, the cache's {k_cache.shape[2]}")
    _check_per_token("positions", positions, num_tokens, qkv.device)
    _check_per_token("slots", slots, num_tokens, qkv.device)
    if num_tokens == 0:
        return
    shape = configs.rope_shape(qkv.device, num_heads, num_kv_heads, head_size)
    _qk_norm_rope_store_kernel[(num_tokens, shape.splits)](
        qkv, q_weight, k_weight, cos_sin, positions, slots, q_out, k_cache, v_cache, eps,
        qkv.stride(0), *q_out.stride()[:2], *k_cache.stride()[:3],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_size // 2,
        PADDED_HALF=triton.next_power_of_2(head_size // 2), BLOCK_SIZE=k_cache.shape[1],
        Q_TILE=shape.q_tile, KV_TILE=shape.kv_tile, num_warps=shape.num_warps,
    )  # fmt: skip


def _check_fused(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin: torch.Tensor,
    q_out: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """The projection, the norms' weights, the angles and the output for q fit together."""
    checks.require(qkv.ndim == 2, f"qkv has shape {tuple(qkv.shape)}, expected [T, (H + 2 Hkv) * D]")
    checks.require(
        q_out.ndim == 3 and q_out.shape[:2] == (len(qkv), num_heads),
        f"q_out has shape {tuple(q_out.shape)}, expected [{len(qkv)}, {num_heads}, D]",
    )
    head_size = q_out.shape[2]
    width = (num_heads + 2 * num_kv_heads) * head_size
    checks.require(qkv.shape[1] == width, f"qkv has {qkv.shape[1]} columns, expected {width}")
    checks.require((q_weight is None) == (k_weight is None), "pass both norm weights or neither")
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    checks.require(all(weight.shape == (head_size,) for weight in weights), f"norm weights must be [{head_size}]")
    checks.check_float("qkv", qkv, q_out, *weights)
    checks.require(
        cos_sin.ndim == 2 and cos_sin.shape[1] == head_size and cos_sin.is_contiguous(),
        f"cos_sin has shape {tuple(cos_sin.shape)}, expected a contiguous [max_position, {head_size}]",
    )
    is_wide = cos_sin.dtype in (torch.float32, qkv.dtype)
    checks.require(is_wide, f"cos_sin is {cos_sin.dtype}: pass float32 or {qkv.dtype}")
    checks.require(cos_sin.device == qkv.device, f"cos_sin is on {cos_sin.device}, qkv on {qkv.device}")


def _check_per_token(name: str, tensor: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    """One int32 or int64 for every token."""
    checks.require(tensor.shape == (num_tokens,), f"{name} has shape {tuple(tensor.shape)}, expected ({num_tokens},)")
    checks.require(tensor.dtype in (torch.int32, torch.int64), f"{name} is {tensor.dtype}: pass int32 or int64")
    checks.require(tensor.device == device, f"{name} is on {tensor.device}, expected {device}")
    checks.require(tensor.is_contiguous(), f"{name} must be contiguous")
