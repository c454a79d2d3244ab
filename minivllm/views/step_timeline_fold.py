"""From events to who did what in which step: one row for each request, its steps in runs of equal kind.

    waiting -> prefill or chunks -> decode ... -> gone
                  ^                    |
              recompute <- preempted <-+-> swapped -> decode
Of a live run only the last steps are kept; a trace is kept whole, and its runs are shorter than its events.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from minivllm.events import Added, Admitted, Event, Finished, Forked, Preempted, Refused, StepRan
from minivllm.views.sentences import sentence

NUM_KEPT = 240  # steps of a live run
COMPUTED = ("prefill", "chunk", "recompute", "decode")


@dataclass(frozen=True, slots=True)
class Run:
    """Steps in a row in which a request did the same; `stored` counts tokens after the last of them."""

    kind: str  # of COMPUTED, or waiting, paused, preempted, swapped
    first_step: int
    num_steps: int
    num_new: int  # in each of them
    stored: int
    seat: int | None

    @property
    def last_step(self) -> int:
        return self.first_step + self.num_steps - 1

    def stored_after(self, step: int) -> int:
        return self.stored - (self.last_step - step) * self.num_new


@dataclass(frozen=True, slots=True)
class Row:
    """A request; `ordinal` counts arrivals from 0."""

    request_id: str
    ordinal: int
    runs: tuple[Run, ...]

    def at(self, step: int) -> Run | None:
        return next((run for run in self.runs if run.first_step <= step <= run.last_step), None)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One step in numbers, and in words."""

    step: int
    num_tokens: int
    num_outputs: int
    num_busy: int  # seats that computed
    num_waiting: int
    run_ms: float
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TimelineState:
    rows: tuple[Row, ...]
    steps: tuple[StepFacts, ...]
    num_seats: int

    @property
    def first_step(self) -> int:
        return self.steps[0].step if self.steps else 0

    @property
    def last_step(self) -> int:
        return self.steps[-1].step if self.steps else 0


@dataclass(slots=True)
class _Record:
    """A request while it is folded."""

    request_id: str
    ordinal: int
    num_prompt: int
    status: str = "waiting"
    seat: int | None = None
    begun_at: int = 0  # tokens stored when it was admitted
    begun_in: int = 0  # the step
    stored: int = 0  # the most so far
    recompute_to: int = 0  # tokens that were stored once and are not any more
    runs: deque[Run] = field(default_factory=deque)


class TimelineFold:
    """Applies events one by one. `num_kept` None keeps all steps."""

    def __init__(self, header: Mapping[str, object], num_kept: int | None = NUM_KEPT) -> None:
        seats = header.get("max_num_seqs")
        self._num_seats = seats if isinstance(seats, int) else 0  # 0: as many as were ever taken
        self._num_kept = num_kept
        self.step = 0
        self._num_arrived = 0
        self._alive: dict[str, _Record] = {}
        self._gone: deque[_Record] = deque()
        self._leaving: list[_Record] = []  # finished in the step that runs
        self._left: set[str] = set()  # ids of all who were there once
        self._seats: dict[int, str] = {}
        self._most_seats = 0
        self._steps: deque[StepFacts] = deque(maxlen=num_kept)
        self._sentences: list[str] = []

    def apply(self, event: Event) -> None:
        match event:
            case Added(request_id=request_id, num_prompt=num_prompt):
                self._alive[request_id] = _Record(request_id, self._num_arrived, num_prompt)
                self._num_arrived += 1
            case Admitted(request_id=request_id, num_computed=num_computed):
                self._begin(self._record(request_id), num_computed, event.step)
            case Forked():
                self._fork(event)
            case Preempted(request_id=request_id, how=how):
                self._preempt(self._record(request_id), how)
            case Finished(request_id=request_id) | Refused(request_id=request_id):
                self._leave(event.step, request_id)
        if words := sentence(event):
            self._sentences.append(words)
            del self._sentences[:-64]  # between two steps
        if isinstance(event, StepRan):
            self._close(event)
        self.step = max(self.step, event.step)

    def state(self) -> TimelineState:
        records = sorted([*self._gone, *self._alive.values()], key=lambda record: record.ordinal)
        rows = tuple(Row(r.request_id, r.ordinal, tuple(r.runs)) for r in records if r.runs)
        return TimelineState(rows, tuple(self._steps), self._num_seats or self._most_seats)

    def _record(self, request_id: str) -> _Record:
        """The request; one that arrived before the first event is made known now."""
        if request_id not in self._alive:
            self._alive[request_id] = _Record(request_id, self._num_arrived, 0)
            self._num_arrived += 1
        return self._alive[request_id]

    def _begin(self, record: _Record, num_computed: int, step: int) -> None:
        record.status, record.begun_at, record.begun_in = "running", num_computed, step
        record.stored = max(record.stored, num_computed)
        record.seat = next(seat for seat in range(len(self._seats) + 1) if seat not in self._seats)
        self._seats[record.seat] = record.request_id
        self._most_seats = max(self._most_seats, record.seat + 1)

    def _fork(self, event: Forked) -> None:
        child, parent = self._record(event.request_id), self._record(event.parent_id)
        child.num_prompt = max(child.num_prompt, parent.num_prompt)
        if event.block_ids:
            self._begin(child, event.num_computed, event.step)
        else:
            child.recompute_to = parent.stored  # its tokens were computed once, for the parent

    def _preempt(self, record: _Record, how: str) -> None:
        record.status = "swapped" if how == "swap" else "preempted"
        if how != "swap":
            record.recompute_to = record.stored
        self._stand_up(record)

    def _leave(self, step: int, request_id: str) -> None:
        """A request that ends within a step still has its cell there; between steps it is gone at once."""
        self._left.add(request_id)
        record = self._alive.pop(request_id, None)
        if record is None:
            return
        if self._steps and step <= self._steps[-1].step:
            self._stand_up(record)
            self._gone.append(record)
        else:
            self._leaving.append(record)

    def _stand_up(self, record: _Record) -> None:
        if record.seat is not None:
            del self._seats[record.seat]
            record.seat = None

    def _close(self, event: StepRan) -> None:
        """The step ended: a cell for each request."""
        present = {record.request_id: record for record in [*self._leaving, *self._alive.values()]}
        scheduled = {request_id: (new, stored) for request_id, new, stored in event.scheduled}
        for request_id, (num_new, stored) in scheduled.items():
            if request_id in self._left and request_id not in present:
                continue  # a step launched ahead: it ended in the one before
            record = present.get(request_id) or self._record(request_id)
            _extend(record, event.step, _kind(record, num_new, stored), num_new, stored)
            record.stored = max(record.stored, stored)
        for record in self._alive.values():
            if record.request_id not in scheduled and record.begun_in <= event.step:  # else by a step launched ahead
                kind = "paused" if record.status == "running" else record.status
                _extend(record, event.step, kind, 0, record.stored)
        for record in self._leaving:
            self._stand_up(record)
        self._gone.extend(self._leaving)
        self._leaving = []
        num_tokens, num_outputs = sum(new for new, _ in scheduled.values()), sum(len(t) for _, t in event.new_tokens)
        self._steps.append(
            StepFacts(
                event.step, num_tokens, num_outputs, len(scheduled), event.num_waiting, event.run_ms,
                tuple(self._sentences),
            )
        )  # fmt: skip
        self._sentences = []
        self._forget()

    def _forget(self) -> None:
        """Drop what lies before the steps that are kept."""
        if self._num_kept is None:
            return
        first = self._steps[0].step
        while self._gone and (not self._gone[0].runs or self._gone[0].runs[-1].last_step < first):
            self._gone.popleft()
        for record in self._alive.values():
            while record.runs and record.runs[0].last_step < first:
                record.runs.popleft()


def _kind(record: _Record, num_new: int, stored: int) -> str:
    start = stored - num_new
    if start < record.recompute_to:
        return "recompute"
    if start >= record.num_prompt:
        return "decode"
    return "prefill" if start == record.begun_at and stored >= record.num_prompt else "chunk"


def _extend(record: _Record, step: int, kind: str, num_new: int, stored: int) -> None:
    """One more step of the last run, or the first of a new one."""
    last = record.runs[-1] if record.runs else None
    is_same = last is not None and (last.kind, last.num_new, last.seat) == (kind, num_new, record.seat)
    if last is not None and is_same and step == last.last_step + 1 and stored == last.stored + num_new:
        record.runs[-1] = replace(last, num_steps=last.num_steps + 1, stored=stored)
    else:
        record.runs.append(Run(kind, step, 1, num_new, stored, record.seat))
