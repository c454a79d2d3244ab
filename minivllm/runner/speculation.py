"""A step with drafts: propose, run the target once over known tokens and drafts, keep what stands.

request    known | drafts               logits of         -> tokens
A          a9    | d1 d2 d3             a9 d1 d2 d3          d1 d2 x      (d3 fell)
B          b4    |                      b4                   y
C          c0 .. c99 (a prompt)         c99                  z
"""

import time
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.plan import Judged, StepPlan, StepResult, TokenLogprobs, Transfer
from minivllm.errors import ConfigError
from minivllm.request import Request
from minivllm.runner.sampler import apply_penalties, distribution, forbid_early_end, sample, token_logprobs
from minivllm.speculative.draft_batch import MOST_CHAINED
from minivllm.speculative.draft_model import DraftModelProposer
from minivllm.speculative.ngram import NgramProposer
from minivllm.speculative.proposer import Draft, Proposer
from minivllm.speculative.verify import Target, verify


@dataclass
class RequestTarget:
    """The target's logits [1 + drafts, vocab] for one request: row i is said after i accepted drafts."""

    request: Request
    logits: torch.Tensor
    eos_token_ids: Sequence[int]

    @property
    def seed(self) -> int:
        return self.request.seed

    @property
    def num_tokens(self) -> int:
        return self.request.num_tokens

    def choose(self, accepted: Sequence[int]) -> int:
        row = len(accepted)
        return int(sample(self.logits[row : row + 1], [self._after(accepted)], self.eos_token_ids))

    def probs(self, accepted: Sequence[int]) -> torch.Tensor:
        logits, request = self.logits[len(accepted)].float().clone(), self._after(accepted)
        forbid_early_end(logits, request, self.eos_token_ids)
        apply_penalties(logits, request)
        return distribution(logits, request)

    def _after(self, accepted: Sequence[int]) -> Request:
        """The request as it will stand: penalties, min_tokens and the noise look at all that comes before."""
        request = copy(self.request)
        request.token_ids = [*self.request.token_ids, *accepted]
        return request


@dataclass(frozen=True)
class Verified:
    """What became of a request's drafts."""

    token_ids: list[int]
    judged: Judged
    logprobs: list[TokenLogprobs]

    def enter(self, result: StepResult, request_id: str) -> None:
        result.new_token_ids[request_id] = self.token_ids
        result.judged[request_id] = self.judged
        if self.logprobs:
            result.logprobs[request_id] = self.logprobs


@dataclass(frozen=True)
class Chosen:
    """A target whose tokens are chosen already: `token_ids[i]` after i accepted drafts."""

    seed: int
    num_tokens: int
    token_ids: Sequence[int]

    def choose(self, accepted: Sequence[int]) -> int:
        return self.token_ids[len(accepted)]

    def probs(self, accepted: Sequence[int]) -> torch.Tensor:
        raise AssertionError("drafts that were drawn are judged by logits")


class Speculation:
    """The proposers of an engine, by method."""

    def __init__(self, proposers: Mapping[str, Proposer], eos_token_ids: Sequence[int]) -> None:
        self.proposers = proposers
        self.eos_token_ids = eos_token_ids
        self.draft_s = self.verify_s = 0.0  # of the latest step

    def twin(self) -> "Speculation":
        """The same for another runner. Raises ConfigError for drafters with pages, whose contents it would lack."""
        others = [method for method, proposer in self.proposers.items() if not isinstance(proposer, NgramProposer)]
        if others:
            raise ConfigError(
                f"time travel keeps the target's blocks, not those of {', '.join(others)}: "
                "record with speculative_config of ngram, or none"
            )
        return Speculation(self.proposers, self.eos_token_ids)

    def method_of(self, request: Request) -> str:
        """Who drafts for a request that the scheduler gave drafts."""
        wished = request.params.speculative_method
        return wished if wished is not None and wished in self.proposers else next(iter(self.proposers))

    def move(self, transfers: list[Transfer], fresh_block_ids: list[int], chained: Collection[str] = ()) -> None:
        """Move and clear what proposers keep; our kernels, which compute chains, never look at what is not stored."""
        for method, proposer in self.proposers.items():
            proposer.move(transfers)
            if method not in chained:
                proposer.clear(fresh_block_ids)

    def propose(self, plan: StepPlan, chained: Collection[str] = ()) -> dict[str, Draft]:
        """Drafts by request id; who has no idea is not in it.

        Those of the methods `chained` are filled in later (draft_chain.py): 0 stands for each of their tokens.
        """
        started_s = time.perf_counter()
        drafts: dict[str, Draft] = {}
        for method, proposer in self.proposers.items():
            mine = [r for r, _ in plan.scheduled if r.id in plan.num_drafts and self.method_of(r) == method]
            if method in chained:
                drafts |= {request.id: Draft([0] * min(plan.num_drafts[request.id], MOST_CHAINED)) for request in mine}
            elif mine:
                found = proposer.propose(mine, [plan.num_drafts[request.id] for request in mine])
                drafts |= {r.id: draft for r, draft in zip(mine, found, strict=True) if draft.token_ids}
        self.draft_s = time.perf_counter() - started_s
        return drafts

    @property
    def needs_hidden(self) -> bool:
        """Whether a proposer looks at what the target computed."""
        return any(proposer.needs_hidden for proposer in self.proposers.values())

    def followers(self, num_requests: int) -> list[Proposer]:
        """Proposers that have something to see in a step of so many requests."""
        return [
            proposer
            for proposer in self.proposers.values()
            if proposer.needs_hidden
            and not (isinstance(proposer, DraftModelProposer) and proposer.has_drafted_for_all(num_requests))
        ]

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """Let the proposers see the step."""
        for proposer in self.followers(len(batch.num_tokens)):
            proposer.follow(batch, hidden)

    def verify(self, request: Request, draft: Draft, logits: torch.Tensor, target: Target | None = None) -> Verified:
        """Keep what stands; `logits` [1 + drafts, vocab]; `target` draws the tokens, None: as on a CPU."""
        tokens = verify(draft, target or RequestTarget(request, logits, self.eos_token_ids))
        judged = Judged(self.method_of(request), tuple(draft.token_ids), len(tokens) - 1)
        if request.params.logprobs is None:
            return Verified(tokens, judged, [])
        chosen = torch.tensor(tokens, device=logits.device)
        return Verified(tokens, judged, token_logprobs(logits[: len(tokens)], chosen, request.params.logprobs))
