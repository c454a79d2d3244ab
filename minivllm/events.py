"""What happened, as frozen facts in the past tense; and Trace, which records, saves, loads and replays them.

Events hold ids and counts, never live objects: whoever draws them cannot disturb what runs.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from minivllm.errors import MiniVLLMError


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in step `step`; steps count from 1, and 0 is before the first."""

    step: int


@dataclass(frozen=True, slots=True)
class Added(Event):
    """A request arrived and waits."""

    request_id: str
    num_prompt: int
    max_tokens: int
    priority: int


@dataclass(frozen=True, slots=True)
class Waited(Event):
    """The head of the queue was not admitted; `reason` is no_seat, no_budget, no_blocks or just_preempted."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PrefixHit(Event):
    """The first blocks of an admitted request were found in the prefix cache, in table order."""

    request_id: str
    block_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Admitted(Event):
    """A waiting request began (or, after a preemption, began again) with `num_computed` tokens already stored."""

    request_id: str
    num_computed: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """A free block lost its cached contents because the pool needed it."""

    block_id: int


@dataclass(frozen=True, slots=True)
class BlocksTaken(Event):
    """Blocks left the free list and were appended to a request's block table."""

    request_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockCached(Event):
    """A full block entered the prefix cache under its chained hash."""

    request_id: str
    block_id: int
    block_hash: int


@dataclass(frozen=True, slots=True)
class BlocksReleased(Event):
    """A request let go of its whole table, in table order; a block nobody else holds becomes free."""

    request_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preempted(Event):
    """A running request lost its blocks to make room; `num_computed` tokens must be computed again."""

    request_id: str
    num_computed: int


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """A request left: reason is stop, length or abort."""

    request_id: str
    reason: str
    num_output: int


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A request was turned away at the door."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepRan(Event):
    """One step ended. `scheduled` holds (request id, new tokens, tokens stored after it); times in milliseconds."""

    scheduled: tuple[tuple[str, int, int], ...]
    new_tokens: tuple[tuple[str, tuple[int, ...]], ...]
    num_running: int
    num_waiting: int
    num_free: int
    schedule_ms: float
    run_ms: float
    update_ms: float
    state_hash: str


KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Added, Waited, PrefixHit, Admitted, Evicted, BlocksTaken, BlockCached, BlocksReleased, Preempted, Finished,
        Refused, StepRan,
    )
}  # fmt: skip

Listener = Callable[[Event], None]


class EventBus:
    """Hands each event to whoever listens; with nobody there `emit` is one test of an empty list."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with every event from now on; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)


@dataclass
class Trace:
    """A recorded run: a header of plain facts (pool size, machine, commit, seed) and the events in order."""

    header: dict[str, object] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    VERSION: ClassVar[int] = 1

    def __call__(self, event: Event) -> None:
        """Be a listener: `engine.events.listen(trace)`."""
        self.events.append(event)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    @property
    def last_step(self) -> int:
        return self.events[-1].step if self.events else 0

    def until(self, step: int) -> list[Event]:
        """Events up to and including `step`."""
        return [event for event in self.events if event.step <= step]

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]

    def state_hashes(self) -> list[str]:
        return [event.state_hash for event in self.events if isinstance(event, StepRan)]

    def save(self, path: str | Path) -> Path:
        """Write compact JSON: the names of the fields once, then one short list for each event."""
        names = list(KINDS)
        document = {
            "minivllm_trace": self.VERSION,
            "header": self.header,
            "kinds": {name: [f.name for f in fields(kind)] for name, kind in KINDS.items()},
            "events": [[names.index(type(event).__name__), *astuple(event)] for event in self.events],
        }
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, separators=(",", ":")) + "\n")
        except OSError as error:
            raise MiniVLLMError(f"{path}: cannot save the trace ({error}); choose another place") from error
        return path

    @staticmethod
    def load(path: str | Path) -> "Trace":
        """Read what `save` wrote. Raises MiniVLLMError when the file is not a trace of this version."""
        try:
            document = json.loads(Path(path).read_text())
            if document["minivllm_trace"] != Trace.VERSION:
                raise MiniVLLMError(
                    f"{path}: trace version {document['minivllm_trace']}, not {Trace.VERSION}; record it again"
                )
            kinds = dict(enumerate(_kind(name, names, path) for name, names in document["kinds"].items()))
            return Trace({**document["header"]}, [_event(kinds[row[0]], row[1:]) for row in document["events"]])
        except (OSError, UnicodeDecodeError) as error:
            raise MiniVLLMError(f"{path}: cannot read the trace ({error})") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise MiniVLLMError(f"{path}: not a minivllm trace ({error}); record it again") from error


def _kind(name: str, field_names: Iterable[str], path: str | Path) -> type[Event]:
    kind = KINDS.get(name)
    if kind is None or [f.name for f in fields(kind)] != list(field_names):
        raise MiniVLLMError(f"{path}: recorded with other fields of {name}; record it again")
    return kind


def _event(kind: type[Event], values: list[object]) -> Event:
    event = kind(*map(_frozen, values))  # type: ignore[arg-type]  # as many as the fields: else a TypeError
    if not isinstance(event.step, int):
        raise TypeError(f"{kind.__name__} in step {event.step!r}")
    return event


def _frozen(value: object) -> object:
    """JSON's lists become the tuples they were."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
