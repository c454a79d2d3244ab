"""The slow twins of all attention backends: one query, one head at a time, straight from the definition."""

import math

import torch


def paged_attention_reference(
    q: torch.Tensor,  # [T, H, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,
    block_tables: list[list[int]],
    num_new: list[int],
    num_tokens: list[int],
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of each request's last `num_new` tokens over its first `num_tokens`; float64 inside."""
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // num_kv_heads  # query heads that share a KV head
    out = torch.empty_like(q, dtype=torch.float64)
    row = 0
    for table, new, total in zip(block_tables, num_new, num_tokens, strict=True):
        for position in range(total - new, total):
            first = 0 if window is None else max(0, position - window + 1)
            seen = [(table[p // block_size], p % block_size) for p in range(first, position + 1)]
            for head in range(q.shape[1]):
                keys = torch.stack([k_cache[block, offset, head // group] for block, offset in seen]).double()
                values = torch.stack([v_cache[block, offset, head // group] for block, offset in seen]).double()
                scores = keys @ q[row, head].double() / math.sqrt(q.shape[2])
                out[row, head] = torch.softmax(scores, dim=0) @ values
            row += 1
    return out


def latent_attention_reference(
    q_nope: torch.Tensor,  # [T, H, dn]
    q_rope: torch.Tensor,  # [T, H, dr]
    cache: torch.Tensor,  # [num_blocks, block_size, 1, r + dr]
    w_uk: torch.Tensor,  # [H, dn, r]
    w_uv: torch.Tensor,  # [H, dv, r]
    block_tables: list[list[int]],
    num_new: list[int],
    num_tokens: list[int],
    scale: float,
) -> torch.Tensor:
    """Latent attention as DeepSeek-V2 defines it (equations 10 to 15): each head's keys and values are built first."""
    block_size, rank = cache.shape[1], w_uk.shape[2]
    out = torch.empty(*q_nope.shape[:2], w_uv.shape[1], dtype=torch.float64)
    row = 0
    for table, new, total in zip(block_tables, num_new, num_tokens, strict=True):
        for position in range(total - new, total):
            seen = [cache[table[p // block_size], p % block_size, 0].double() for p in range(position + 1)]
            for head in range(q_nope.shape[1]):
                query = torch.cat((q_nope[row, head], q_rope[row, head])).double()
                keys = torch.stack([torch.cat((w_uk[head].double() @ s[:rank], s[rank:])) for s in seen])
                values = torch.stack([w_uv[head].double() @ s[:rank] for s in seen])
                out[row, head] = torch.softmax(keys @ query * scale, dim=0) @ values
            row += 1
    return out
