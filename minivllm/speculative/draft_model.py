"""A smaller model of the same tokenizer drafts (Leviathan et al. 2023): K and V of its own, in the target's blocks.

K and V of the drafts are stored as they are drafted, and stay where these are accepted. The last draft gets a pass of
its own, whose logits nobody wants: else it might be accepted, its block published, and its K and V never be there.

position    n-1   n    n+1  n+2              n-1   n    n+1  n+2  n+3
drafting    a --> d1 > d2 > d3 >   accepted: a     d1   d2   d3   x --> ...
stored      x     x    x    x                x     x    x    x    x
"""

from collections.abc import Sequence

import torch

from minivllm.attention import ForwardBatch, LayerKV, choose_backend
from minivllm.config import ModelConfig
from minivllm.engine.plan import Transfer
from minivllm.engine.tables import slot_of
from minivllm.models.decoder import Decoder
from minivllm.request import Request
from minivllm.runner.kv_storage import KVStorage
from minivllm.speculative.draft_batch import Choice, Span, batch_of, chain
from minivllm.speculative.proposer import Draft


class DraftModelProposer:
    """`storage` has as many blocks as the target's, of the same size."""

    needs_hidden = True
    num_more = 1

    def __init__(self, model: Decoder, config: ModelConfig, storage: KVStorage, choice: Choice) -> None:
        self.model, self.config, self.storage, self.choice = model, config, storage, choice
        self.device = storage.data.device
        self._backend = choose_backend(self.device.type, config)
        self._layers: list[LayerKV] = list(storage.layers)
        self._drafted: set[int] = set()  # slots of the last known tokens of those who get drafts in this step

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        size = self.storage.block_size
        spans = [Span(request, request.num_tokens - 1, request.num_tokens) for request in requests]
        self.begin([slot_of(span.first, span.request.block_ids, size) for span in spans])
        logits = self._logits(batch_of(spans, [request.token_ids[-1] for request in requests], size, self.device))
        drafts = chain(requests, lengths, logits, lambda batch, _: self._logits(batch), self.choice, size)
        ends = [request.num_tokens + len(draft.token_ids) for request, draft in zip(requests, drafts, strict=True)]
        lasts = [Span(request, end - 1, end) for request, end in zip(requests, ends, strict=True)]
        self._hidden(batch_of(lasts, [draft.token_ids[-1] for draft in drafts], size, self.device))
        return drafts

    def begin(self, slots: Sequence[int]) -> None:
        self._drafted = set(slots)

    def draft_pass(self, batch: ForwardBatch, carried: torch.Tensor, *, is_first: bool) -> torch.Tensor:
        return self._logits(batch)

    def has_drafted_for_all(self, num_requests: int) -> bool:
        """Whether a step of so many requests has nothing that is not computed already."""
        return len(self._drafted) == num_requests

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """Compute what the target computed: all but the requests whose drafts are our own."""
        if self.has_drafted_for_all(len(batch.num_tokens)):
            return
        self._hidden(self._of_others(batch) if self._drafted else batch)

    def move(self, transfers: list[Transfer]) -> None:
        self._drafted = set()  # a step begins
        self.storage.move(transfers)

    def clear(self, block_ids: list[int]) -> None:
        self.storage.clear(block_ids)

    def _of_others(self, batch: ForwardBatch) -> ForwardBatch:
        """The requests without drafts of our own."""
        starts = batch.query_starts[:-1]
        columns = torch.stack((starts, batch.query_starts[1:], batch.slots[starts])).tolist()
        rows, index, query_starts = list[int](), list[int](), [0]
        for row, (start, end, slot) in enumerate(zip(*columns, strict=True)):
            if slot not in self._drafted:
                rows.append(row)
                index += range(start, end)
                query_starts.append(len(index))
        return ForwardBatch(
            token_ids=batch.token_ids[index],
            positions=batch.positions[index],
            slots=batch.slots[index],
            block_table=batch.block_table[rows],
            query_starts=torch.tensor(query_starts, device=self.device),
            num_tokens=batch.num_tokens[rows],
            logit_rows=batch.logit_rows[:0],
        )

    def _logits(self, batch: ForwardBatch) -> torch.Tensor:
        return self.model.logits(self._hidden(batch)[batch.logit_rows])

    def _hidden(self, batch: ForwardBatch) -> torch.Tensor:
        return self.model.hidden(batch.token_ids, batch.positions, self._backend(self.config, batch, self._layers))
