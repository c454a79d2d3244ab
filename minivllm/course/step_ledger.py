"""The step ledger as rows: what each step had to move and do, the floor that gives, what it took, and what remains.

    floor = weights + K and V + logits, at the rate of memory, + arithmetic that this does not hide
    run   = floor + remainder
`ledger_rows` reads a recorded trace, `LedgerFold` follows a live one; the events come from lab/ledger.py.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from minivllm.draft_events import DraftJudged
from minivllm.events import Event, StepCosted, StepRan

NUM_KEPT = 2000  # steps of a live run
KINDS = ("prefill", "mixed", "decode")


class FloorParts(NamedTuple):
    """Milliseconds of a floor, by what they are spent on."""

    weights: float
    kv: float
    logits: float
    arithmetic: float  # that no moving hides


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One step."""

    step: int
    kind: str  # of KINDS: no request, some, or all of them had one more token, accepted drafts aside
    num_requests: int
    num_tokens: int
    weight_bytes: int
    kv_bytes: int
    logit_bytes: int
    flops: int
    parts: FloorParts
    floor_ms: float
    run_ms: float
    host_ms: float  # to schedule and to update; beside run_ms, or hidden behind it

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.logit_bytes

    @property
    def remainder_ms(self) -> float:
        """What the floor does not explain."""
        return self.run_ms - self.floor_ms

    @property
    def is_bound_by_compute(self) -> bool:
        return self.parts.arithmetic > 0

    @property
    def group(self) -> str:
        """The kind, and of decode the size of the batch, in powers of two: "decode 129-256"."""
        if self.kind != "decode":
            return self.kind
        most = 1 << (self.num_requests - 1).bit_length()
        return f"decode {most}" if most <= 2 else f"decode {most // 2 + 1}-{most}"


class LedgerSum(NamedTuple):
    """Steps together."""

    name: str
    num_steps: int
    run_ms: float
    floor_ms: float
    host_ms: float
    parts: FloorParts
    weight_bytes: int
    kv_bytes: int
    logit_bytes: int
    flops: int

    @property
    def remainder_ms(self) -> float:
        return self.run_ms - self.floor_ms

    @property
    def share(self) -> float:
        """How much of the measured time the floor is; 0 where nothing was measured."""
        return self.floor_ms / self.run_ms if self.run_ms else 0.0

    @property
    def most_of_floor(self) -> str:
        """The largest part of the floor, in words."""
        return PART_WORDS[max(FloorParts._fields, key=self.parts._asdict().__getitem__)]


PART_WORDS = {"weights": "weights", "kv": "K and V", "logits": "logits", "arithmetic": "arithmetic"}


class LedgerFold:
    """Applies events one by one; `num_kept` None keeps all rows."""

    def __init__(self, header: Mapping[str, object] | None = None, num_kept: int | None = NUM_KEPT) -> None:
        self.step = 0
        self._ran: StepRan | None = None
        self._judged: tuple[int, set[str]] = 0, set()  # the step, and whose drafts it verified
        self._rows: deque[LedgerRow] = deque(maxlen=num_kept)

    def apply(self, event: Event) -> None:
        """A row is there when a step's StepRan and its StepCosted were seen; steps without tokens get none."""
        self.step = max(self.step, event.step)
        if isinstance(event, DraftJudged):
            step, ids = self._judged
            self._judged = event.step, {event.request_id} | (ids if step == event.step else set())
        elif isinstance(event, StepRan):
            self._ran = event
        elif isinstance(event, StepCosted) and self._ran and self._ran.step == event.step and self._ran.scheduled:
            step, ids = self._judged
            self._rows.append(row_of(self._ran, event, ids if step == event.step else ()))

    def state(self) -> tuple[LedgerRow, ...]:
        return tuple(self._rows)


def ledger_rows(events: Iterable[Event]) -> tuple[LedgerRow, ...]:
    """Every step of a recorded run of which the trace tells the cost."""
    fold = LedgerFold(num_kept=None)
    for event in events:
        fold.apply(event)
    return fold.state()


def row_of(ran: StepRan, cost: StepCosted, drafted: Container[str] = ()) -> LedgerRow:
    """One step's row, from its two events; `drafted` are the requests whose drafts it verified."""
    num_new = [new for _, new, _ in ran.scheduled]
    # a prompt of one token is a prompt
    num_single = sum(new == 1 < stored or id_ in drafted for id_, new, stored in ran.scheduled)
    kind = "decode" if num_single == len(num_new) else "mixed" if num_single else "prefill"
    num_bytes = cost.weight_bytes + cost.kv_bytes + cost.logit_bytes
    per_byte = (cost.floor_ms - cost.unhidden_ms) / num_bytes if num_bytes else 0.0
    moved = cost.weight_bytes, cost.kv_bytes, cost.logit_bytes
    weights, kv, logits = (each * per_byte for each in moved)
    parts = FloorParts(weights, kv, logits, cost.unhidden_ms)
    return LedgerRow(
        ran.step, kind, len(num_new), sum(num_new), *moved, cost.flops, parts, cost.floor_ms, cost.run_ms,
        ran.schedule_ms + ran.update_ms,
    )  # fmt: skip


def cost_line(rows: Iterable[LedgerRow]) -> list[tuple[int, float, float]]:
    """For a small plot: step, floor and measured time in milliseconds."""
    return [(row.step, row.floor_ms, row.run_ms) for row in rows]


def summed(rows: Sequence[LedgerRow], name: str = "all") -> LedgerSum:
    """Rows as one."""

    def total(of: Callable[[LedgerRow], float]) -> float:
        return sum(map(of, rows), 0.0)

    parts = FloorParts(
        total(lambda row: row.parts.weights), total(lambda row: row.parts.kv), total(lambda row: row.parts.logits),
        total(lambda row: row.parts.arithmetic),
    )  # fmt: skip
    times = total(lambda row: row.run_ms), total(lambda row: row.floor_ms), total(lambda row: row.host_ms)
    counts = (
        sum(row.weight_bytes for row in rows), sum(row.kv_bytes for row in rows), sum(row.logit_bytes for row in rows),
        sum(row.flops for row in rows),
    )  # fmt: skip
    return LedgerSum(name, len(rows), *times, parts, *counts)


def by_group(rows: Sequence[LedgerRow]) -> list[LedgerSum]:
    """Sums by kind of step, decode by size of batch, in this order."""
    ordered = sorted(rows, key=lambda row: (KINDS.index(row.kind), _batch(row)))
    return [summed(list(alike), name) for name, alike in groupby(ordered, key=lambda row: row.group)]


def _batch(row: LedgerRow) -> int:
    return row.num_requests if row.kind == "decode" else 0
