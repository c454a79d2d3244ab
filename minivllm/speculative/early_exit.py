"""The target's own first layers draft (LayerSkip, Elhoushi et al. 2024): no weights, no storage beside the target's.

K and V that they store for drafts go to the slots where verification stores the same. Final norm and lm_head were
trained for the last layer's output, so a model that was not trained to exit early drafts badly: see the acceptance.
"""

from collections.abc import Sequence

import torch

from minivllm.attention import ForwardBatch, LayerKV, choose_backend
from minivllm.config import ModelConfig
from minivllm.engine.plan import Transfer
from minivllm.models.decoder import Decoder
from minivllm.request import Request
from minivllm.runner.kv_storage import KVStorage
from minivllm.speculative.draft_batch import Choice, Span, batch_of, chain
from minivllm.speculative.proposer import Draft


class EarlyExitProposer:
    """`config` and `storage` are the target's; `num_layers` may be all of them."""

    needs_hidden = False
    num_more = 0

    def __init__(
        self, target: Decoder, config: ModelConfig, storage: KVStorage, num_layers: int, choice: Choice
    ) -> None:
        self.target, self.config, self.storage = target, config, storage
        self.num_layers, self.choice = num_layers, choice
        self.device = storage.data.device
        self._backend = choose_backend(self.device.type, config)
        self._layers: list[LayerKV] = list(storage.layers)

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        size = self.storage.block_size
        spans = [Span(request, request.num_tokens - 1, request.num_tokens) for request in requests]
        token_ids = [request.token_ids[-1] for request in requests]
        logits = self._logits(batch_of(spans, token_ids, size, self.device))
        return chain(requests, lengths, logits, lambda batch, _: self._logits(batch), self.choice, size)

    def begin(self, slots: Sequence[int]) -> None:
        """Nothing to prepare."""

    def draft_pass(self, batch: ForwardBatch, carried: torch.Tensor, *, is_first: bool) -> torch.Tensor:
        return self._logits(batch)

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """What the target stored is all there is."""

    def move(self, transfers: list[Transfer]) -> None:
        """The target's storage moves."""

    def clear(self, block_ids: list[int]) -> None:
        """The target's storage is cleared."""

    def _logits(self, batch: ForwardBatch) -> torch.Tensor:
        attention = self._backend(self.config, batch, self._layers)
        hidden = self.target.hidden(batch.token_ids, batch.positions, attention, self.num_layers)
        return self.target.logits(hidden)
