"""A head on the target's hidden states drafts (EAGLE, Li et al. 2024): K, V and features in the target's blocks.

A feature is the target's last layer output before the final norm. At position t the head sees the embedding of token
t and the feature of t - 1; for drafts, whose features nobody has yet, it takes its own outputs instead:

propose    (f of n-2, a at n-1) -> g, d1      (g, d1 at n) -> g', d2      (g', d2 at n+1) -> ...
follow     the target computed a, d1, d2 ..: their features are stored, and the head computes K and V of them anew
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minivllm.attention import ForwardBatch, LayerKV, choose_backend
from minivllm.config import ModelConfig
from minivllm.engine.plan import Transfer
from minivllm.request import Request
from minivllm.runner.kv_storage import KVStorage
from minivllm.speculative.draft_batch import Choice, Span, batch_of, chain
from minivllm.speculative.eagle_model import EagleDraft
from minivllm.speculative.pages import Pages, slots_before
from minivllm.speculative.proposer import Draft


@dataclass(frozen=True)
class StoreOnly:
    """The attention of tokens whose outputs nobody wants: K and V are stored, and that is all."""

    layers: Sequence[LayerKV]
    slots: torch.Tensor  # [T]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kv = self.layers[layer]
        kv.k.flatten(0, 1).index_copy_(0, self.slots, k)
        kv.v.flatten(0, 1).index_copy_(0, self.slots, v)
        return q


class EagleProposer:
    """`storage` is the head's, one layer; it has as many blocks as the target's, of the same size."""

    needs_hidden = True
    num_more = 0

    def __init__(self, draft: EagleDraft, config: ModelConfig, storage: KVStorage, choice: Choice) -> None:
        """`config` is the head's, with the window that it is given."""
        self.draft, self.config, self.storage, self.choice = draft, config, storage, choice
        self.device = storage.data.device
        self.features = Pages(storage, config.hidden_size, storage.data.dtype)
        self._backend = choose_backend(self.device.type, config)
        self._layers: list[LayerKV] = list(storage.layers)

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        size = self.storage.block_size
        spans = [Span(request, request.num_tokens - 1, request.num_tokens) for request in requests]
        batch = batch_of(spans, [request.token_ids[-1] for request in requests], size, self.device)
        features = self._run(batch, self._features_before(batch.positions, batch.block_table))

        def advance(batch: ForwardBatch, kept: list[int]) -> torch.Tensor:
            nonlocal features
            features = self._run(batch, features[kept])
            return self.draft.logits(features)

        return chain(requests, lengths, self.draft.logits(features), advance, self.choice, size)

    def begin(self, slots: Sequence[int]) -> None:
        """Nothing to prepare: features lie in pages."""

    def draft_pass(self, batch: ForwardBatch, carried: torch.Tensor, *, is_first: bool) -> torch.Tensor:
        before = self._features_before(batch.positions, batch.block_table) if is_first else carried
        features = self._run(batch, before)
        carried.copy_(features)
        return self.draft.logits(features)

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """Store the features of the step's tokens, drafts too, and the head's K and V of them."""
        starts = batch.query_starts[:-1]
        before = hidden.roll(1, dims=0)
        before[starts] = self._features_before(batch.positions[starts], batch.block_table)
        self.features.rows[batch.slots] = hidden
        self._store(batch.token_ids, batch.positions, batch.slots, before)

    def follow_rows(
        self, token_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, block_table: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:  # fmt: skip
        """The same for T single tokens with a row of `block_table` each; padding has position and slot -1.

        Never waits for the device. A draft's feature before is that of the row in front of it, just stored.
        """
        positions, slots = positions.long(), slots.long().clamp(min=0)  # of padding: the null block's
        self.features.rows.index_copy_(0, slots, hidden)
        self._store(token_ids, positions, slots, self._features_before(positions, block_table))

    def move(self, transfers: list[Transfer]) -> None:
        self.storage.move(transfers)
        self.features.move(transfers)

    def clear(self, block_ids: list[int]) -> None:
        self.storage.clear(block_ids)

    def _features_before(self, positions: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
        """Features [B, hidden] of the positions before these [B], each with a row of the table; 0 before the first."""
        slots = slots_before(positions, block_table, self.storage.block_size)
        return self.features.rows[slots].where(positions[:, None] > 0, 0)

    def _store(
        self, token_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, features: torch.Tensor
    ) -> None:
        """The head's K and V of tokens [T], given the features [T, hidden] of the positions before."""
        self.draft.head.store(self.draft.embed(token_ids), features, positions, StoreOnly(self._layers, slots))

    def _run(self, batch: ForwardBatch, features: torch.Tensor) -> torch.Tensor:
        """The head's outputs [T, hidden], given the features of the positions before."""
        attention = self._backend(self.config, batch, self._layers)
        return self.draft.head(self.draft.embed(batch.token_ids), features, batch.positions, attention)
