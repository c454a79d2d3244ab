"""Latent attention (MLA) over a paged cache, in its two forms; which one a request gets is a matter of arithmetic.

    expanded   build every head's keys [W_UK latent | rope key] and values W_UV latent of the whole context, then
               attend with head sizes dn + dr and dv: the building is paid once, so it suits many queries
    absorbed   since q . (W_UK latent) = (W_UK^T q) . latent, take W_UK^T q as query and the cache row itself as key,
               its latent as value, W_UV after the softmax: all heads read one row, as in MQA; it suits few queries

Both compute DeepSeek-V2's equations 10 to 15; they differ in rounding only. Requests with one query are absorbed
together, in groups of similar lengths as in torch_backend, the others are computed one by one.
"""

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

from minivllm.attention import ForwardBatch, LayerKV
from minivllm.attention.torch_backend import similar_lengths
from minivllm.config import MlaConfig, ModelConfig


class LatentDecode(Protocol):
    """Absorbed attention of a step's single queries: q [b, H, r + dr] over the cache rows, gives [b, H, r]."""

    def __call__(self, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor: ...


def prefers_absorbed(mla: MlaConfig, num_new: int, num_tokens: int) -> bool:
    """Whether absorbing multiplies less than expanding: for DeepSeek's sizes up to 170 queries on a long context.

    Multiplications per head. Weights: once per context token to expand, once per query to absorb. Scores and output:
    once per query and token, of size dn + dr + dv expanded, 2r + dr absorbed.
    """
    weights = mla.kv_lora_rank * (mla.nope_head_size + mla.v_head_size)
    expanded_pair, absorbed_pair = mla.qk_head_size + mla.v_head_size, mla.row_size + mla.kv_lora_rank
    expanded = num_tokens * (weights + num_new * expanded_pair)
    return num_new * (weights + num_tokens * absorbed_pair) <= expanded


class TorchLatentAttention:
    """One step's attention; what all layers share (choice, gathers, masks) is worked out once, when it is built."""

    def __init__(
        self, config: ModelConfig, batch: ForwardBatch, layers: list[LayerKV], decode: LatentDecode | None = None
    ) -> None:
        """`decode` computes the requests with one query, all of them in the batch's order; None: in torch."""
        assert config.mla is not None
        self.mla, self.scale = config.mla, config.softmax_scale
        self.batch, self.layers = batch, layers
        block_size = layers[0].k.shape[1]
        starts, num_tokens = batch.query_starts.tolist(), batch.num_tokens.tolist()
        num_new = [end - start for start, end in pairwise(starts)]
        singles = [request for request, new in enumerate(num_new) if new == 1]
        self.single_rows = batch.query_starts[singles] if singles else None
        self.decode = decode or TorchLatentDecode(config, batch, singles, num_tokens, block_size)
        self.chunks = [
            _Chunk(self.mla, batch.block_table[request], block_size, starts[request], new, num_tokens[request])
            for request, new in enumerate(num_new)
            if new > 1
        ]

    def attend_latent(
        self,
        layer: int,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        rows: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
    ) -> torch.Tensor:
        """Store the new rows, then attend over all that is stored: [T, H, dv]."""
        cache = self.layers[layer].k
        cache.flatten(0, 2).index_copy_(0, self.batch.slots, rows)
        out = q_nope.new_empty(*q_nope.shape[:2], w_uv.shape[1])
        if self.single_rows is not None:
            q = absorb(q_nope[self.single_rows], q_rope[self.single_rows], w_uk)
            out[self.single_rows] = expand_values(self.decode(q, cache), w_uv)
        for chunk in self.chunks:
            attend = self._absorbed if chunk.is_absorbed else self._expanded
            context = cache.index_select(0, chunk.block_ids).flatten(0, 2)  # [S, r + dr]
            out[chunk.rows] = attend(q_nope[chunk.rows], q_rope[chunk.rows], context, w_uk, w_uv, chunk.mask)
        return out

    def _absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        context: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        q = absorb(q_nope, q_rope, w_uk).transpose(0, 1)  # [H, t, r + dr]
        latent = _attend_rows(q, context, mask, self.scale, self.mla.kv_lora_rank)
        return expand_values(latent.transpose(0, 1), w_uv)

    def _expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        context: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        latent, k_rope = context.split((self.mla.kv_lora_rank, self.mla.rope_head_size), dim=-1)
        k_nope = torch.matmul(latent, w_uk.transpose(1, 2))  # [H, S, dn]
        keys = torch.cat((k_nope, k_rope.expand(len(k_nope), -1, -1)), dim=-1)
        values = torch.matmul(latent, w_uv.transpose(1, 2))  # [H, S, dv]
        missing = max(0, keys.shape[2] - values.shape[2])
        values = F.pad(values, (0, missing))  # torch's fused kernel wants one head size; 1.4x on a CPU for DeepSeek's
        q = torch.cat((q_nope, q_rope), dim=-1).transpose(0, 1)  # [H, t, dn + dr]
        out = F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask, scale=self.scale)
        return out[0, :, :, : w_uv.shape[1]].transpose(0, 1)


class _Chunk:
    """A request with several new tokens: its rows among the queries, its blocks, and who sees what."""

    def __init__(
        self, mla: MlaConfig, table: torch.Tensor, block_size: int, start: int, num_new: int, num_tokens: int
    ) -> None:
        self.rows = slice(start, start + num_new)
        self.block_ids = table[: -(-num_tokens // block_size)]
        self.is_absorbed = prefers_absorbed(mla, num_new, num_tokens)
        positions = torch.arange(num_tokens - num_new, num_tokens, device=table.device)
        keys = torch.arange(len(self.block_ids) * block_size, device=table.device)
        self.mask = keys <= positions[:, None]  # [t, S]; True: seen


class TorchLatentDecode:
    """Single queries with torch's operators: gather the blocks of a group of requests, pad to its longest, attend."""

    def __init__(
        self, config: ModelConfig, batch: ForwardBatch, singles: list[int], num_tokens: list[int], block_size: int
    ) -> None:
        assert config.mla is not None
        self.rank, self.scale = config.mla.kv_lora_rank, config.softmax_scale
        place = {request: index for index, request in enumerate(singles)}
        self.groups: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []  # places, table [b, m], mask [b, 1, S]
        for requests in similar_lengths(singles, num_tokens):
            table = batch.block_table[requests, : -(-max(num_tokens[r] for r in requests) // block_size)]
            keys = torch.arange(table.shape[1] * block_size, device=table.device)
            mask = (keys < batch.num_tokens[requests, None])[:, None]
            self.groups.append(([place[request] for request in requests], table, mask))

    def __call__(self, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Absorbed queries [b, H, r + dr] of all singles; gives [b, H, r]."""
        out = q.new_empty(*q.shape[:2], self.rank)
        for places, table, mask in self.groups:
            context = cache.index_select(0, table.flatten()).view(len(places), -1, q.shape[2])  # [b, S, r + dr]
            out[places] = _attend_rows(q[places], context, mask, self.scale, self.rank)
        return out


def absorb(q_nope: torch.Tensor, q_rope: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """Queries that meet a cache row as it is, [W_UK^T q_nope | q_rope]: [T, H, r + dr]."""
    return torch.cat((torch.einsum("thd,hdr->thr", q_nope, w_uk), q_rope), dim=-1)


def expand_values(latent: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """Each head's output of its weighted latents [T, H, r]: [T, H, dv]."""
    return torch.einsum("thr,hvr->thv", latent, w_uv)


def _attend_rows(q: torch.Tensor, context: torch.Tensor, mask: torch.Tensor, scale: float, rank: int) -> torch.Tensor:
    """Softmax (fp32) of q [..., rows, r + dr] over cache rows [..., S, r + dr], times their latents: [..., rows, r]."""
    scores = torch.matmul(q * scale, context.transpose(-1, -2)).float()
    weights = scores.masked_fill_(~mask, float("-inf")).softmax(dim=-1).to(q.dtype)
    return torch.matmul(weights, context[..., :rank])
