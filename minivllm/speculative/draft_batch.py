"""Passes of a drafter: a batch of its own, and drafts in a chain, each computed from the one before.

pass        tokens of a request                    gives
first       what is known, up to the last token    d1
second      d1                                     d2
...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minivllm.attention import ForwardBatch
from minivllm.config import ModelConfig
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.engine.tables import slot_of
from minivllm.request import Request
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.sampler import distribution, pick
from minivllm.speculative.proposer import Draft
from minivllm.speculative.verify import draft_noise

MOST_CHAINED = 63  # drafts of a request, where the host does not look

Advance = Callable[[ForwardBatch, list[int]], torch.Tensor]


class ChainDrafter(Protocol):
    """A proposer whose passes can run where the host does not look: on memory that stays, as CUDA graphs."""

    config: ModelConfig
    storage: KVStorage
    choice: "Choice"
    num_more: int  # passes behind the one that gives the last draft

    def begin(self, slots: Sequence[int]) -> None:
        """Requests whose last known tokens have these slots are about to get drafts."""
        ...

    def draft_pass(self, batch: ForwardBatch, carried: torch.Tensor, *, is_first: bool) -> torch.Tensor:
        """Logits [R, V'] behind one token of each request; `carried` [R, hidden] goes from pass to pass."""
        ...


@dataclass(frozen=True)
class Span:
    """Positions first .. end - 1 of one request."""

    request: Request
    first: int
    end: int


def batch_of(
    spans: Sequence[Span], token_ids: Sequence[int] | torch.Tensor, block_size: int, device: str | torch.device
) -> ForwardBatch:
    """The spans in one batch, with their tokens [T]; the logits wanted are those of each one's last."""
    positions = [position for span in spans for position in range(span.first, span.end)]
    slots = [
        slot_of(position, span.request.block_ids, block_size)
        for span in spans
        for position in range(span.first, span.end)
    ]
    starts = [0]
    for span in spans:
        starts.append(starts[-1] + span.end - span.first)
    width = max(len(span.request.block_ids) for span in spans)
    columns = {
        "positions": positions,
        "slots": slots,
        "block_table": [s.request.block_ids + [NULL_BLOCK] * (width - len(s.request.block_ids)) for s in spans],
        "query_starts": starts,
        "num_tokens": [span.end for span in spans],
        "logit_rows": [end - 1 for end in starts[1:]],
    }
    tensors = {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in columns.items()}
    return ForwardBatch(torch.as_tensor(token_ids, dtype=torch.int64, device=device), **tensors)


@dataclass(frozen=True)
class Choice:
    """How a drafter's logits [R, V'] become tokens of the target: the likeliest, or drawn as the request draws."""

    vocab_size: int  # the target's
    vocabulary: torch.Tensor | None  # [V'] the target's id of each column; None: they are the same
    is_drawn: bool

    def tokens(
        self, logits: torch.Tensor, requests: Sequence[Request], index: int
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Draft `index` of each request [R], and what it was drawn from, [vocab] each; None: it is certain."""
        columns = logits.float().argmax(dim=-1)
        probs: list[torch.Tensor | None] = [None] * len(requests)
        for row, request in enumerate(requests):
            if self.is_drawn and not request.params.is_greedy:
                own = distribution(logits[row].float(), request)
                columns[row] = pick(own, draft_noise(request.seed, request.num_tokens + index, len(own)))
                probs[row] = self._spread(own)
        return self._of_target(columns), probs

    def likeliest(self, logits: torch.Tensor) -> torch.Tensor:
        """The draft of each row [R], whatever the requests wish."""
        return self._of_target(logits.float().argmax(dim=-1))

    def _of_target(self, columns: torch.Tensor) -> torch.Tensor:
        return columns if self.vocabulary is None else self.vocabulary[columns]

    def _spread(self, probs: torch.Tensor) -> torch.Tensor:
        """Probabilities [V'] over the target's vocabulary."""
        if self.vocabulary is None:
            return probs
        return probs.new_zeros(self.vocab_size).index_copy_(0, self.vocabulary, probs)


def chain(
    requests: Sequence[Request],
    lengths: Sequence[int],
    logits: torch.Tensor,
    advance: Advance,
    choice: Choice,
    block_size: int,
) -> list[Draft]:
    """So many drafts for each request, the first from `logits` [R, V'] of its last known token.

    `advance` computes one more token of some requests, given their batch and which of the rows before it they were,
    and gives their logits.
    """
    tokens: list[list[torch.Tensor]] = [[] for _ in requests]
    probs: list[list[torch.Tensor]] = [[] for _ in requests]
    alive = list(range(len(requests)))
    for index in range(max(lengths)):
        chosen, sources = choice.tokens(logits, [requests[r] for r in alive], index)
        for row, r in enumerate(alive):
            tokens[r].append(chosen[row])
            if (source := sources[row]) is not None:
                probs[r].append(source)
        kept = [row for row, r in enumerate(alive) if lengths[r] > index + 1]
        if not kept:
            break
        alive = [alive[row] for row in kept]
        spans = [Span(requests[r], requests[r].num_tokens + index, requests[r].num_tokens + index + 1) for r in alive]
        chosen = chosen if len(kept) == len(chosen) else chosen[kept]
        logits = advance(batch_of(spans, chosen, block_size, logits.device), kept)
    flat = torch.stack([token for own in tokens for token in own]).tolist()  # the drafter's only wait for a device
    ends = [sum(lengths[: r + 1]) for r in range(len(requests))]
    return [
        Draft(flat[end - length : end], torch.stack(own) if own else None)
        for end, length, own in zip(ends, lengths, probs, strict=True)
    ]
