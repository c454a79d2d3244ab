"""One step on paper (StepPlan, from the scheduler) and what came of it (StepResult, from the runner)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from minivllm.request import Request

Scheduled = list[tuple[Request, int]]  # requests, each with the number of its known tokens that a step computes


class Move(Enum):
    """Between which pools a block's contents go."""

    COPY = "copy"  # device to device: copy-on-write
    SWAP_OUT = "swap out"  # device to host
    SWAP_IN = "swap in"  # host to device


@dataclass(frozen=True, slots=True)
class Transfer:
    """The contents of one block go to another, over all layers; ids of the host's blocks count apart."""

    move: Move
    source_id: int
    target_id: int


@dataclass(frozen=True)
class StepPlan:
    """Which requests advance by how many tokens.

    First the transfers run, strictly in order (one may read what the next one overwrites); then the fresh blocks,
    which may hold what their last owner left, are cleared; then the tokens are computed.
    """

    step: int
    scheduled: Scheduled
    fresh_block_ids: list[int]
    preempted: list[Request]
    transfers: list[Transfer] = field(default_factory=list)
    num_drafts: Mapping[str, int] = field(default_factory=dict)  # by request id: drafts to verify beside its one token
    is_short: bool = False  # of blocks, while a step is under way: who must go is decided when that has ended

    @property
    def num_tokens(self) -> int:
        """Known tokens and drafts."""
        return sum(num_new for _, num_new in self.scheduled) + sum(self.num_drafts.values())


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token's raw logprob and rank (1 is the best), and the most likely tokens, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """A request's drafts in one step, and how many of them stand."""

    method: str
    draft_token_ids: tuple[int, ...]
    num_accepted: int


@dataclass(frozen=True)
class StepResult:
    """Tokens by request id: one for each request whose known tokens are all computed, none for the others.

    A request with drafts gets those that were accepted, and one more.
    """

    new_token_ids: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[int, list[TokenLogprobs]]] = field(default_factory=dict)  # of tokens first+1 ..
    judged: dict[str, Judged] = field(default_factory=dict)
    draft_s: float = 0.0
    verify_s: float = 0.0


class Runner(Protocol):
    """Whatever executes a plan: the model on a device, or fifteen lines in a test."""

    def run(self, plan: StepPlan) -> StepResult: ...


class Launched(Protocol):
    """A step that a device computes."""

    @property
    def allows_next(self) -> bool:
        """Whether the next step can be launched before this one's tokens are read."""
        ...

    def result(self) -> StepResult:
        """Wait for the tokens."""
        ...


class Launcher(Runner, Protocol):
    """A runner that does not wait: it knows on the device what its last step chose."""

    is_async: bool

    def launch(self, plan: StepPlan) -> Launched: ...


@dataclass(frozen=True)
class Done:
    """A step whose result was there at once."""

    known: StepResult
    allows_next: bool = False

    def result(self) -> StepResult:
        return self.known


def needs_token(request: Request, num_new: int) -> bool:
    """Whether this chunk reaches the last known or promised token, so that its logits give the next one."""
    return request.num_computed + num_new == request.num_expected


def with_accepted(stored: tuple[tuple[str, int, int], ...], result: StepResult) -> Iterator[tuple[str, int, int]]:
    """Of each request: new tokens and tokens stored after them, its accepted drafts included."""
    for request_id, num_new, num_stored in stored:
        judged = result.judged.get(request_id)
        num_accepted = judged.num_accepted if judged else 0
        yield request_id, num_new + num_accepted, num_stored + num_accepted
