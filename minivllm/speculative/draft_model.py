"""A smaller model of the same tokenizer drafts (Leviathan et al. 2023): K and V of its own, in the target's blocks.

K and V of the drafts but the last are stored as they are drafted, and stay where these are accepted. The last one is
owed: the pass that comes next over this request computes it first. A block that it fills may be published before
that, so there it is computed at once; so nothing in the prefix cache is owed.

position    n-1   n    n+1  n+2             n-1   n    n+1  n+2  n+3
drafting    a --> d1 > d2 > d3   accepted:  a     d1   d2   d3   x --> ...
stored      x     x    x    owed            x     x    x    <------- computed with x
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
from minivllm.speculative.pages import Pages, slots_before
from minivllm.speculative.proposer import Draft

NOTHING = -1


class DraftModelProposer:
    """`storage` has as many blocks as the target's, of the same size."""

    needs_hidden = True

    def __init__(self, model: Decoder, config: ModelConfig, storage: KVStorage, choice: Choice) -> None:
        self.model, self.config, self.storage, self.choice = model, config, storage, choice
        self.device = storage.data.device
        self._owed = Pages(storage, 1, torch.int32, NOTHING)  # tokens whose K and V are not stored
        self._backend = choose_backend(self.device.type, config)
        self._layers: list[LayerKV] = list(storage.layers)
        self._drafted: set[int] = set()  # slots of the last known tokens of those who got drafts in this step

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        size = self.storage.block_size
        places = [slot_of(max(request.num_tokens - 2, 0), request.block_ids, size) for request in requests]
        owed = self._owed.rows[places, 0].tolist()
        spans = [
            Span(request, request.num_tokens - 1 - (token_id != NOTHING and request.num_tokens > 1), request.num_tokens)
            for request, token_id in zip(requests, owed, strict=True)
        ]
        token_ids = [token_id for span in spans for token_id in span.request.token_ids[span.first :]]
        logits = self._logits(batch_of(spans, token_ids, size, self.device))
        drafts = chain(requests, lengths, logits, lambda batch, _: self._logits(batch), self.choice, size)
        self._leave_last(requests, drafts)
        self._drafted = {slot_of(span.end - 1, span.request.block_ids, size) for span in spans}
        return drafts

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """Compute what the target computed: all but the requests whose drafts are our own."""
        starts = batch.query_starts[:-1]
        first, size = batch.positions[starts], self.storage.block_size
        before = slots_before(first, batch.block_table, size)
        owed = torch.where(first > 0, self._owed.rows[before, 0], NOTHING)
        columns = torch.stack((starts, batch.query_starts[1:], batch.slots[starts], owed)).tolist()
        rows, index, query_starts = list[int](), list[int](), [0]
        for row, (start, end, slot, token_id) in enumerate(zip(*columns, strict=True)):
            if slot in self._drafted:
                continue
            rows.append(row)
            index += [len(batch.token_ids) + row] * (token_id != NOTHING) + list(range(start, end))
            query_starts.append(len(index))
        self._drafted = set()
        if not rows:
            return
        own = ForwardBatch(
            token_ids=torch.cat((batch.token_ids, owed))[index],
            positions=torch.cat((batch.positions, first - 1))[index],
            slots=torch.cat((batch.slots, before))[index],
            block_table=batch.block_table[rows],
            query_starts=torch.tensor(query_starts, device=self.device),
            num_tokens=batch.num_tokens[rows],
            logit_rows=batch.logit_rows[:0],
        )
        self._hidden(own)

    def move(self, transfers: list[Transfer]) -> None:
        self._drafted = set()  # a step begins
        self.storage.move(transfers)
        self._owed.move(transfers)

    def clear(self, block_ids: list[int]) -> None:
        self.storage.clear(block_ids)

    def _leave_last(self, requests: Sequence[Request], drafts: Sequence[Draft]) -> None:
        """Compute the last draft of each request that fills a block; note the others' as owed."""
        size = self.storage.block_size
        ends = [request.num_tokens + len(draft.token_ids) for request, draft in zip(requests, drafts, strict=True)]
        filling = [r for r, end in enumerate(ends) if end % size == 0]
        if filling:
            spans = [Span(requests[r], ends[r] - 1, ends[r]) for r in filling]
            self._hidden(batch_of(spans, [drafts[r].token_ids[-1] for r in filling], size, self.device))
        owing = [r for r, end in enumerate(ends) if end % size]
        slots = [slot_of(ends[r] - 1, requests[r].block_ids, size) for r in owing]
        token_ids = [drafts[r].token_ids[-1] for r in owing]
        self._owed.rows[slots, 0] = torch.tensor(token_ids, dtype=torch.int32, device=self.device)

    def _logits(self, batch: ForwardBatch) -> torch.Tensor:
        return self.model.logits(self._hidden(batch)[batch.logit_rows])

    def _hidden(self, batch: ForwardBatch) -> torch.Tensor:
        attention = self._backend(self.config, batch, self._layers)
        self._owed.rows[batch.slots] = NOTHING
        return self.model.hidden(batch.token_ids, batch.positions, attention)
