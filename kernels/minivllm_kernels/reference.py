"""The slow twins: each kernel once more in plain torch and float64, straight from its definition."""

import math

import torch


def paged_attention_twin(
    q: torch.Tensor,  # [T, H, D]
    k_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor,
    block_table: torch.Tensor,  # [B, M]
    num_tokens: torch.Tensor,  # [B] keys each request sees, its new ones included
    query_starts: torch.Tensor,  # [B + 1]
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Causal attention of each request's last queries over its blocks, [T, H, D] in float64; empty rows are zero."""
    group = q.shape[1] // k_cache.shape[2]  # query heads that share a KV head
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row, total in enumerate(num_tokens.tolist()):
        first, last = query_starts[row : row + 2].tolist()
        if first == last or total == 0:
            continue
        keys, values = (
            cache[block_table[row].long()].flatten(0, 1)[:total].double().repeat_interleave(group, dim=1)
            for cache in (k_cache, v_cache)
        )  # [total, H, D]
        scores = torch.einsum("thd,shd->hts", q[first:last].double(), keys) * (scale or 1 / math.sqrt(q.shape[2]))
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        seen = torch.arange(total, device=q.device)
        position = seen[total - (last - first) :, None]
        is_visible = seen <= position if window is None else (seen <= position) & (seen > position - window)
        probs = torch.softmax(scores.where(is_visible, -math.inf), dim=-1)
        out[first:last] = torch.einsum("hts,shd->thd", probs, values)
    return out
