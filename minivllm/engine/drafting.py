"""How many drafts each request gets in a step, and what became of them.

Drafts are guests of a step: they come after everybody's known tokens, take budget and blocks that are left over, and
push nobody out. A request is given some only when it has one token to compute, whose logits choose the next.

    length fixed      num_speculative_tokens
    length adaptive   + 2 when all were accepted, - 1 when one was rejected; after LOSSES rounds without a single
                      acceptance none for PAUSE tokens; never more than keeps the step below max_step_tokens

(The + 2 and - 1 are those of transformers' assisted generation.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from minivllm.draft_events import DraftJudged, StepSpeculated
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import Judged, StepResult
from minivllm.engine_config import EngineConfig
from minivllm.events import EventBus
from minivllm.request import Request
from minivllm.speculative_config import CPU_STEP_TOKENS, OFF, SpeculativeConfig

LOSSES, PAUSE = 3, 16


@dataclass
class SpeculationStats:
    """Counts over all rounds: a round is one request's drafts in one step."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens of a round, the one that is always gained included; nan before the first."""
        return 1 + self.num_accepted / self.num_rounds if self.num_rounds else float("nan")

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted; nan before the first."""
        return self.num_accepted / self.num_drafted if self.num_drafted else float("nan")

    def count(self, judged: Judged) -> None:
        num_drafted = len(judged.draft_token_ids)
        missing = num_drafted - len(self.drafted_by_position)
        self.drafted_by_position.extend([0] * missing)
        self.accepted_by_position.extend([0] * missing)
        for position in range(num_drafted):
            self.drafted_by_position[position] += 1
            self.accepted_by_position[position] += position < judged.num_accepted
        self.num_rounds += 1
        self.num_drafted += num_drafted
        self.num_accepted += judged.num_accepted


class Drafting:
    """Plans the drafts of each step and keeps the score."""

    def __init__(self, config: EngineConfig, kv: KVManager, events: EventBus) -> None:
        self.configs = {each.method: each for each in config.speculative}
        self.stats = SpeculationStats()
        self.stats_of = {method: SpeculationStats() for method in self.configs}
        self._kv, self._events = kv, events

    def method_of(self, request: Request) -> str | None:
        """Who drafts for a request; None: nobody."""
        wished = request.params.speculative_method
        if wished == OFF or not self.configs or request.is_steered:
            return None
        return wished if wished in self.configs else next(iter(self.configs))

    def plan(self, scheduled: Sequence[tuple[Request, int]], limits: EngineConfig) -> dict[str, int]:
        """Drafts by request id, for which the tables have grown, out of the budget that the known tokens leave."""
        num_drafts: dict[str, int] = {}
        if not self.configs:
            return num_drafts
        num_tokens = sum(num_new for _, num_new in scheduled)
        budget = limits.max_num_batched_tokens - num_tokens
        for request, num_new in scheduled:
            method = self.method_of(request)
            is_up_to_date = request.num_computed + num_new == request.num_tokens
            if method is None or num_new != 1 or not is_up_to_date or request.pending_forks:
                continue
            config = self.configs[method]
            if config.disable_by_batch_size is not None and len(scheduled) >= config.disable_by_batch_size:
                continue
            room = min(
                budget, request.max_tokens - request.num_output - 1, limits.max_model_len - request.num_tokens - 1
            )
            length = min(self._wish(request, config), room)
            if config.adaptive:
                most = config.max_step_tokens or CPU_STEP_TOKENS
                length = min(length, (most - num_tokens) // len(scheduled))
            length = self._with_room(request, length)
            if length > 0:
                num_drafts[request.id] = length
                budget -= length
        return num_drafts

    def book(self, request: Request, result: StepResult, step: int) -> None:
        """Count a round, let the next one's length follow it, and give back what a rejected tail leaves empty.

        Of drafts that were cut off because the request ended before them, none counts as accepted.
        """
        if not request.is_finished:
            self._kv.publish(request)
            self._kv.drop_outside_window(request)
            self._kv.trim(request)
        if request.id not in result.judged:
            return  # the proposer had no idea
        num_accepted = len(result.new_token_ids[request.id]) - 1
        judged = result.judged[request.id] = replace(result.judged[request.id], num_accepted=num_accepted)
        self.stats.count(judged)
        self.stats_of[judged.method].count(judged)
        request.num_drafted += len(judged.draft_token_ids)
        request.num_accepted_drafts += judged.num_accepted
        config = self.configs[judged.method]
        if config.adaptive:
            _adapt(request, judged, config.num_speculative_tokens)
        if self._events:
            self._events.emit(DraftJudged(step, request.id, judged.method, judged.draft_token_ids, judged.num_accepted))

    def end_step(self, result: StepResult, step: int) -> None:
        """Add a step's times, and tell of it."""
        rounds = result.judged.values()
        if not rounds:
            return
        self.stats.draft_s += result.draft_s
        self.stats.verify_s += result.verify_s
        for method in {judged.method for judged in rounds}:
            share = sum(judged.method == method for judged in rounds) / len(rounds)
            self.stats_of[method].draft_s += share * result.draft_s
            self.stats_of[method].verify_s += share * result.verify_s
        if self._events:
            num_drafted = sum(len(judged.draft_token_ids) for judged in rounds)
            num_accepted = sum(judged.num_accepted for judged in rounds)
            times = (result.draft_s * 1e3, result.verify_s * 1e3)
            self._events.emit(StepSpeculated(step, num_drafted, num_accepted, *times))

    def _wish(self, request: Request, config: SpeculativeConfig) -> int:
        asked = request.params.num_speculative_tokens
        most = config.num_speculative_tokens if asked is None else asked
        if not config.adaptive:
            return most
        if request.num_tokens < request.drafts_again_at:
            return 0
        return min(most, most if request.draft_length is None else request.draft_length)

    def _with_room(self, request: Request, length: int) -> int:
        """Grow the tables for as many drafts as the pool has blocks for; how many that is."""
        while length > 0 and not self._kv.grow(request, 1 + length):
            length -= 1
        return length


def _adapt(request: Request, judged: Judged, most: int) -> None:
    num_drafted = len(judged.draft_token_ids)
    length = num_drafted if request.draft_length is None else request.draft_length
    is_all = judged.num_accepted == num_drafted
    request.draft_length = min(most, length + 2) if is_all else max(1, length - 1)
    request.num_losses = 0 if judged.num_accepted else request.num_losses + 1
    if request.num_losses >= LOSSES:
        request.num_losses, request.drafts_again_at = 0, request.num_tokens + PAUSE
