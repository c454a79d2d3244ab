"""Paged attention with torch's own operators: gather a request's blocks, then scaled_dot_product_attention.

The G query heads that share a KV head are laid out as G query rows, so K and V are never expanded. Requests with
one query are computed together, padded to the longest; padding is read like data, so requests of unlike lengths go
in several groups. Requests with more queries (prompts, chunks) are computed one by one.
Masked slots must hold finite numbers (0 * NaN is NaN): the runner clears fresh blocks before they are used.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from minivllm.attention import ForwardBatch, LayerKV
from minivllm.config import ModelConfig

Window = int | None
GROUP_COST_TOKENS = 800  # what one more group costs, in tokens that could be read instead (measured, 2 cores)
MATMUL_TOKENS = 3000  # from here on two plain bf16 matmuls beat torch's fused kernel on a CPU, up to 1.6x


class _Group:
    """Requests computed in one call: which rows of q, which blocks, and a mask for each window in the model."""

    def __init__(
        self, rows: torch.Tensor | slice, table: torch.Tensor, masks: dict[Window, torch.Tensor], num_queries: int
    ) -> None:
        self.rows = rows
        self.block_ids = table.reshape(-1)  # [b * m]
        self.num_requests = table.shape[0]
        self.num_queries = num_queries
        self.masks = masks


class TorchAttention:
    """One step's attention; what all layers share (gathers, masks) is worked out once, when it is built."""

    def __init__(self, config: ModelConfig, batch: ForwardBatch, layers: list[LayerKV]) -> None:
        self.config = config
        self.batch = batch
        self.layers = layers
        self.scale = config.head_size**-0.5
        self.block_size = layers[0].k.shape[1]
        self.mask_dtype = layers[0].k.dtype
        self.windows: set[Window] = set(config.windows) or {None}
        self.widest = None if None in self.windows else max(window for window in self.windows if window)
        starts, num_tokens = batch.query_starts.tolist(), batch.num_tokens.tolist()
        num_new = [end - start for start, end in pairwise(starts)]
        singles = [r for r, new in enumerate(num_new) if new == 1]
        self.groups = [self._single_queries(part, num_tokens) for part in similar_lengths(singles, num_tokens)]
        self.groups += [
            self._many_queries(r, starts[r], new, num_tokens[r]) for r, new in enumerate(num_new) if new > 1
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store the new K and V, then attend over all that is stored; [T, H, D] in and out."""
        kv, window = self.layers[layer], self.config.window_of(layer)
        kv.k.flatten(0, 1).index_copy_(0, self.batch.slots, k)
        kv.v.flatten(0, 1).index_copy_(0, self.batch.slots, v)
        if len(self.groups) == 1:
            return self._attend_group(self.groups[0], q, kv, window)
        out = torch.empty_like(q)
        for group in self.groups:
            out[group.rows] = self._attend_group(group, q[group.rows], kv, window)
        return out

    def _attend_group(self, group: _Group, q: torch.Tensor, kv: LayerKV, window: Window) -> torch.Tensor:
        num_kv_heads, head_size = kv.k.shape[2:]
        b, t = group.num_requests, group.num_queries
        shape = (b, -1, num_kv_heads, head_size)
        keys = kv.k.index_select(0, group.block_ids).view(shape).transpose(1, 2)  # [b, Hkv, S, D]
        values = kv.v.index_select(0, group.block_ids).view(shape).transpose(1, 2)
        rows = q.unflatten(1, (num_kv_heads, -1)).unflatten(0, (b, t)).permute(0, 2, 3, 1, 4)  # [b, Hkv, G, t, D]
        rows = rows.reshape(b, num_kv_heads, -1, head_size)
        attention = _matmul_attention if self._prefers_matmul(group, keys) else F.scaled_dot_product_attention
        out = attention(rows, keys, values, attn_mask=group.masks[window], scale=self.scale)
        out = out.view(b, num_kv_heads, -1, t, head_size).permute(0, 3, 1, 2, 4)  # [b, t, Hkv, G, D]
        return out.reshape(b * t, -1, head_size)

    def _prefers_matmul(self, group: _Group, keys: torch.Tensor) -> bool:
        is_big = group.num_queries == 1 and group.num_requests * keys.shape[2] >= MATMUL_TOKENS
        return is_big and keys.dtype == torch.bfloat16 and keys.device.type == "cpu"

    def _single_queries(self, requests: list[int], num_tokens: list[int]) -> _Group:
        lengths = self.batch.num_tokens[requests]
        num_blocks = -(-max(num_tokens[r] for r in requests) // self.block_size)
        first = self._first_seen(min(num_tokens[r] for r in requests) - 1)
        table = self.batch.block_table[requests, first:num_blocks]
        rows = self.batch.query_starts[requests]
        masks = {w: self._mask(lengths[:, None] - 1, table, first, w)[:, None] for w in self.windows}  # [b, 1, 1, S]
        return _Group(rows, table, masks, num_queries=1)

    def _many_queries(self, request: int, start: int, num_new: int, num_tokens: int) -> _Group:
        first = self._first_seen(num_tokens - num_new)
        table = self.batch.block_table[request : request + 1, first : -(-num_tokens // self.block_size)]
        positions = torch.arange(num_tokens - num_new, num_tokens, device=table.device)[None]
        group = self.config.num_heads // self.config.num_kv_heads
        masks = {w: self._mask(positions, table, first, w).repeat(1, group, 1)[:, None] for w in self.windows}
        return _Group(slice(start, start + num_new), table, masks, num_new)

    def _first_seen(self, position: int) -> int:
        """The first block that a query at `position` sees, or one after it: what stands before is not read."""
        return 0 if self.widest is None else max(0, position + 1 - self.widest) // self.block_size

    def _mask(self, positions: torch.Tensor, table: torch.Tensor, first: int, window: Window) -> torch.Tensor:
        """0 where a query at `positions` [b, t] sees a key, -inf where not: [b, t, S]; keys begin at block `first`."""
        keys = torch.arange(first * self.block_size, (first + table.shape[1]) * self.block_size, device=table.device)
        distance = positions[:, :, None] - keys
        is_seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = torch.zeros(is_seen.shape, dtype=self.mask_dtype, device=table.device)
        return mask.masked_fill_(~is_seen, float("-inf"))


def _matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention spelled out: softmax(q k^T * scale + mask) v, the softmax in fp32; [b, Hkv, rows, D]."""
    scores = torch.matmul(q * scale, k.contiguous().transpose(-1, -2)).float() + attn_mask
    return torch.matmul(scores.softmax(dim=-1).to(v.dtype), v.contiguous())


def similar_lengths(requests: list[int], num_tokens: list[int]) -> list[list[int]]:
    """Groups that are read together: a group is cut where that saves more padding than a group costs.

    ([0, 1, 2], [10, 2000, 20]) -> [[0, 2], [1]]
    """
    if not requests:
        return []
    ordered = sorted(requests, key=num_tokens.__getitem__)
    longest = num_tokens[ordered[-1]]
    saved = [cut * (longest - num_tokens[ordered[cut - 1]]) for cut in range(1, len(ordered))]  # by [:cut] | [cut:]
    if not saved or max(saved) <= GROUP_COST_TOKENS:
        return [sorted(requests)]  # in the batch's order: a group of all requests needs no scattering
    cut = saved.index(max(saved)) + 1
    return similar_lengths(ordered[:cut], num_tokens) + similar_lengths(ordered[cut:], num_tokens)
