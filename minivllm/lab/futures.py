"""Two futures of one moment side by side: what each came to, where they part first, whether the answers are equal."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest

from minivllm.engine_config import EngineConfig
from minivllm.events import Admitted, BlockCopied, Event, Preempted, PrefixHit, StepRan
from minivllm.lab.inputs import End, Noted
from minivllm.lab.recording import Recording
from minivllm.trace import Trace

TIMING = ("schedule_ms", "run_ms", "update_ms", "state_hash")  # fields of StepRan that are no decisions


@dataclass(frozen=True)
class Outcome:
    """What a future came to, counted from the moment it begins; the requests are those that were there or came."""

    tokens: dict[str, tuple[int, ...]]  # the whole output of each request
    finish_reasons: dict[str, str | None]
    greedy_ids: frozenset[str]
    num_steps: int  # until the last one that computed anything
    num_preemptions: int
    mean_ttft_steps: float | None  # steps from arrival to first token, of those who got it in this future
    num_copies: int
    num_hit_tokens: int  # prompt tokens found at first admissions, as Request.num_cached counts them
    num_found_again: int  # other tokens found: what a preempted request had computed before, what a fork's parent said

    @staticmethod
    def of(run: Recording) -> "Outcome":
        """Sum up a run that has ended."""
        steps = [event for event in run.trace if isinstance(event, StepRan) and event.scheduled]
        first_steps = {id_: step.step for step in reversed(steps) for id_, _ in step.new_tokens}
        waits = [
            first_steps[request.id] - request.arrival_step
            for request in run.requests.values()
            if request.id in first_steps and run.num_output_before[request.id] == 0
        ]
        num_hit, num_again = _found(run)
        return Outcome(
            tokens={r.id: tuple(r.output_token_ids) for r in run.requests.values()},
            finish_reasons={r.id: r.finish_reason for r in run.requests.values()},
            greedy_ids=frozenset(r.id for r in run.requests.values() if r.params.is_greedy),
            num_steps=max((step.step for step in steps), default=run.first_step) - run.first_step,
            num_preemptions=len(run.trace.of(Preempted)),
            mean_ttft_steps=sum(waits) / len(waits) if waits else None,
            num_copies=len(run.trace.of(BlockCopied)),
            num_hit_tokens=num_hit,
            num_found_again=num_again,
        )


@dataclass(frozen=True)
class Future:
    """A run that began in the middle of another; `trace` has what was before, too."""

    config: EngineConfig
    outcome: Outcome
    trace: Trace
    events: tuple[Event, ...]  # of this future alone

    @staticmethod
    def of(run: Recording, past: Sequence[Event]) -> "Future":
        """End a recording and sum it up."""
        run.close()
        trace = Trace(run.trace.header, [*past, *run.trace])
        return Future(run.engine.config, Outcome.of(run), trace, tuple(run.trace))


@dataclass(frozen=True)
class Difference:
    """Where two futures part: the first events that are not equal, and what that step ran, all in words."""

    step: int
    original: str
    changed: str
    original_plan: str
    changed_plan: str

    def __str__(self) -> str:
        return (
            f"step {self.step}:\n  original  {self.original}\n            {self.original_plan}\n"
            f"  changed   {self.changed}\n            {self.changed_plan}"
        )


@dataclass(frozen=True)
class Futures:
    """The same moment twice: with the recorded policies, and with some changed."""

    step: int
    changes: dict[str, object]
    original: Future
    changed: Future
    dropped: tuple[Noted, ...]  # inputs that the changed future had no use for

    @property
    def first_difference(self) -> Difference | None:
        """The first events that differ; None when the futures are the same. Times of day are no difference."""
        return first_difference(self.original.events, self.changed.events)

    @property
    def different_ids(self) -> list[str]:
        """Greedy requests of both futures with other tokens in each.

        Of one that was aborted, that still waits for its owner, or whose end from outside was dropped, only the tokens
        that both futures have must agree.
        """
        original, changed = self.original.outcome, self.changed.outcome
        unended = {noted.input.request_id for noted in self.dropped if isinstance(noted.input, End)}
        return [
            request_id
            for request_id in original.tokens
            if request_id in original.greedy_ids and request_id in changed.greedy_ids
            if not _agree(original, changed, request_id, is_whole=request_id not in unended)
        ]

    @property
    def tokens_equal(self) -> bool:
        """Whether no greedy request got other tokens: policies decide when and where, never what."""
        return not self.different_ids

    def __str__(self) -> str:
        changes = ", ".join(f"{name}={value!r}" for name, value in self.changes.items()) or "nothing"
        lines = [f"after step {self.step}, {changes} changed", f"{'':22}{'original':>12}{'changed':>12}"]
        rows = ("num_steps", "num_preemptions", "mean_ttft_steps", "num_copies", "num_hit_tokens", "num_found_again")
        for name in rows:
            values = [getattr(future.outcome, name) for future in (self.original, self.changed)]
            lines.append(f"{name:22}" + "".join(f"{_short(value):>12}" for value in values))
        same = "equal" if self.tokens_equal else f"NOT equal: {', '.join(self.different_ids)}"
        lines.append(f"greedy tokens are {same}; {len(self.dropped)} inputs dropped")
        difference = self.first_difference
        lines.append(f"first difference: {'none' if difference is None else difference}")
        return "\n".join(lines)


def first_difference(original: Sequence[Event], changed: Sequence[Event]) -> Difference | None:
    """Compare two lists of events from the same moment on."""
    for ours, theirs in zip_longest(original, changed):
        if ours is None or theirs is None or decisions(ours) != decisions(theirs):
            step = min(event.step for event in (ours, theirs) if event is not None)
            return Difference(step, in_words(ours), in_words(theirs), _plan(original, step), _plan(changed, step))
    return None


def decisions(event: Event) -> tuple[object, ...]:
    """An event without what the machine's speed decides: two runs that decide alike give equal tuples."""
    return (type(event).__name__, *(getattr(event, f.name) for f in fields(event) if f.name not in TIMING))


def in_words(event: Event | None) -> str:
    """in_words(Evicted(3, block_id=7)) == "Evicted: block_id 7"."""
    if event is None:
        return "nothing more happens"
    facts = [f"{f.name} {getattr(event, f.name)}" for f in fields(event) if f.name not in (*TIMING, "step")]
    return f"{type(event).__name__}: {', '.join(facts)}"


def _plan(events: Sequence[Event], step: int) -> str:
    """What a step ran: each request and how many tokens."""
    for event in events:
        if isinstance(event, StepRan) and event.step == step:
            return "runs " + (", ".join(f"{id_}+{num_new}" for id_, num_new, _ in event.scheduled) or "nothing")
    return "no such step"


def _found(run: Recording) -> tuple[int, int]:
    """Tokens found in the prefix cache: those of prompts at first admissions, and all others."""
    num_preemptions = {(e.step, e.request_id): e.num_preemptions for e in run.trace if isinstance(e, Admitted)}
    hits = [event for event in run.trace if isinstance(event, PrefixHit)]
    num_hit = sum(
        min(hit.num_tokens, run.requests[hit.request_id].num_prompt)
        for hit in hits
        if num_preemptions[hit.step, hit.request_id] == 0
    )
    return num_hit, sum(hit.num_tokens for hit in hits) - num_hit


def _agree(original: Outcome, changed: Outcome, request_id: str, *, is_whole: bool) -> bool:
    ours, theirs = original.tokens[request_id], changed.tokens[request_id]
    reasons = {original.finish_reasons[request_id], changed.finish_reasons[request_id]}
    if is_whole and reasons <= {"stop", "length"}:
        return ours == theirs
    return all(a == b for a, b in zip(ours, theirs, strict=False))


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else f"{value:,}"
