"""The slow twins: each kernel once more in plain torch and float64, straight from its definition."""

import math

import torch

SAMPLING_TILE = 1024  # tokens that race as one first


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


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rope_twin(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn x [T, heads, D] to its positions: (a, b) -> (a cos - b sin, b cos + a sin), in float64."""
    cos, sin = cos_sin[positions.long()].double()[:, None].chunk(2, dim=-1)  # [T, 1, D/2]
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def store_kv_twin(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The cache [num_blocks, block_size, Hkv, D] after rows [T, Hkv, D] went to their slots, one by one."""
    cache = cache.clone()
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            cache[slot // cache.shape[1], slot % cache.shape[1]] = row
    return cache


def silu_and_mul_twin(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of gate_up [T, 2F], in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def mla_decode_twin(
    q_latent: torch.Tensor,  # [B, H, R]
    q_rope: torch.Tensor,  # [B, H, P]
    latent_cache: torch.Tensor,  # [num_blocks, block_size, R + P]
    block_table: torch.Tensor,  # [B, M]
    num_tokens: torch.Tensor,  # [B]
    scale: float,
) -> torch.Tensor:
    """Latent attention of one query per request, [B, H, R] in float64: a cache row is a key, its latent the value."""
    out = torch.zeros(q_latent.shape, dtype=torch.float64, device=q_latent.device)
    queries = torch.cat([q_latent, q_rope], dim=-1).double()
    for row, total in enumerate(num_tokens.tolist()):
        keys = latent_cache[block_table[row].long()].flatten(0, 1)[:total].double()  # [total, R + P]
        probs = torch.softmax(queries[row] @ keys.T * scale, dim=-1)  # [H, total]
        out[row] = probs @ keys[:, : q_latent.shape[2]]
    return out


def philox_twin(counter: list[torch.Tensor], key: list[torch.Tensor], num_rounds: int = 10) -> list[torch.Tensor]:
    """Philox4x32 (Salmon et al. 2011): four 32-bit words from four of `counter` and two of `key`, all held in int64."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(num_rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits: the sign bit is a digit, as the masks below see it
        c0, c1, c2, c3 = (b >> 32 & mask) ^ c1 ^ k0, b & mask, (a >> 32 & mask) ^ c3 ^ k1, a & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return [c0, c1, c2, c3]


def sampling_words_twin(seeds: torch.Tensor, positions: torch.Tensor, items: torch.Tensor, kind: int) -> torch.Tensor:
    """The 32 random bits of each row's items [B, n] (tokens are of kind 0, tiles of kind 1), in int64."""
    mask = 2**32 - 1
    seed, position = (values.long()[:, None].expand_as(items) for values in (seeds, positions))
    counter = [items, position & mask, position >> 32 & mask, torch.full_like(items, kind)]
    return philox_twin(counter, [seed & mask, seed >> 32 & mask])[0]


def exponential_twin(words: torch.Tensor) -> torch.Tensor:
    """E = -log(1 - x) ~ Exp(1) in float64, x in (0, 1) from 32 random bits."""
    return -torch.log1p(-(words + 0.5) / 2**32)


def kept_twin(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Which tokens of one row [vocab] min_p, then top_k, then top_p leave; ties at a limit stay, as does the best."""
    probs = torch.softmax(logits.double() / max(temperature, 1e-5), dim=-1)
    probs = probs.where(probs >= min_p * probs.max(), 0.0)
    if 0 < top_k < len(probs):
        probs = probs.where(probs >= probs.topk(top_k).values[-1], 0.0)
    if top_p < 1:
        best = (probs / probs.sum()).sort(descending=True).values
        before = best.cumsum(0) - best  # probability of the tokens ahead of each
        last = max(1, int((before < top_p).sum())) - 1
        probs = probs.where(probs / probs.sum() >= best[last], 0.0)
    return probs > 0


def sample_twin(
    logits: torch.Tensor,  # [B, vocab]
    temperatures: torch.Tensor,  # [B]; 0 takes the largest logit
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """The token of each row: a race of weight / E among its tiles of 1024 tokens, then one inside the winner, [B]."""
    num_tiles = -(-logits.shape[1] // SAMPLING_TILE)
    weights = torch.zeros(len(logits), num_tiles * SAMPLING_TILE, dtype=torch.float64, device=logits.device)
    for row, temperature in enumerate(temperatures.tolist()):
        keys = logits[row].double()
        if temperature > 0:
            k, p, least = (
                default if values is None else values[row].item()
                for values, default in ((top_k, 0), (top_p, 1.0), (min_p, 0.0))
            )
            keys = ((keys - keys.max()) / max(temperature, 1e-5)).exp()
            weights[row, : len(keys)] = keys.where(kept_twin(logits[row], temperature, int(k), p, least), 0.0)
        else:
            weights[row, keys.argmax()] = 1.0
    tiles = torch.arange(num_tiles, device=logits.device).expand(len(logits), num_tiles)
    noise = exponential_twin(sampling_words_twin(seeds, positions, tiles, 1))
    winner = (weights.unflatten(1, (-1, SAMPLING_TILE)).sum(dim=2) / noise).argmax(dim=1)
    tokens = winner[:, None] * SAMPLING_TILE + torch.arange(SAMPLING_TILE, device=logits.device)
    noise = exponential_twin(sampling_words_twin(seeds, positions, tokens, 0))
    best = (weights.gather(1, tokens) / noise).argmax(dim=1, keepdim=True)
    return tokens.gather(1, best)[:, 0]
