"""A head on the target's hidden states drafts (EAGLE, Li et al. 2024): K, V and features in the target's blocks.

A feature is the target's last layer output before the final norm. At position t the head sees the embedding of token
t and the feature of t - 1; for drafts, whose features nobody has yet, it takes its own outputs instead:

propose    (f of n-2, a at n-1) -> g, d1      (g, d1 at n) -> g', d2      (g', d2 at n+1) -> ...
follow     the target computed a, d1, d2 ..: their features are stored, and the head computes K and V of them anew
"""

from collections.abc import Sequence

import torch

from minivllm.attention import ForwardBatch, LayerKV, choose_backend
from minivllm.config import ModelConfig
from minivllm.engine.plan import Transfer
from minivllm.engine.tables import slot_of
from minivllm.request import Request
from minivllm.runner.kv_storage import KVStorage
from minivllm.speculative.draft_batch import Choice, Span, batch_of, chain
from minivllm.speculative.eagle_model import EagleDraft
from minivllm.speculative.pages import Pages, slots_before
from minivllm.speculative.proposer import Draft


class EagleProposer:
    """`storage` is the head's, one layer; it has as many blocks as the target's, of the same size."""

    needs_hidden = True

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
        slots = [slot_of(max(request.num_tokens - 2, 0), request.block_ids, size) for request in requests]
        features = self._run(batch, self.features.rows[slots].where(batch.positions[:, None] > 0, 0))

        def advance(batch: ForwardBatch, kept: list[int]) -> torch.Tensor:
            nonlocal features
            features = self._run(batch, features[kept])
            return self.draft.logits(features)

        return chain(requests, lengths, self.draft.logits(features), advance, self.choice, size)

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """Store the features of the step's tokens, drafts too, and the head's K and V of them."""
        starts = batch.query_starts[:-1]
        first = batch.positions[starts]
        slots = slots_before(first, batch.block_table, self.storage.block_size)
        before = hidden.roll(1, dims=0)
        before[starts] = self.features.rows[slots].where(first[:, None] > 0, 0)
        self.features.rows[batch.slots] = hidden
        self._run(batch, before)

    def move(self, transfers: list[Transfer]) -> None:
        self.storage.move(transfers)
        self.features.move(transfers)

    def clear(self, block_ids: list[int]) -> None:
        self.storage.clear(block_ids)

    def _run(self, batch: ForwardBatch, features: torch.Tensor) -> torch.Tensor:
        """The head's outputs [T, hidden], given the features of the positions before."""
        attention = self._backend(self.config, batch, self._layers)
        return self.draft.head(self.draft.embed(batch.token_ids), features, batch.positions, attention)
