"""A recorded run: its events in order, saved as compact JSON and loaded again."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from minivllm.draft_events import BlocksTrimmed, DraftJudged, StepSpeculated
from minivllm.errors import MiniVLLMError
from minivllm.events import (
    Added,
    Admitted,
    BlockCached,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksReserved,
    BlocksTaken,
    Event,
    Evicted,
    Finished,
    Forked,
    Pinned,
    Preempted,
    PrefixHit,
    Refused,
    StepCosted,
    StepRan,
    SwappedIn,
    SwappedOut,
    Unpinned,
    Waited,
)
from minivllm.text_files import read_text, write_text

KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Added, Waited, PrefixHit, Admitted, Evicted, BlocksTaken, BlockCached, BlocksReleased, Preempted, Finished,
        Refused, StepRan, Forked, BlockCopied, BlockExchanged, BlocksReserved, BlocksDropped, SwappedOut, SwappedIn,
        Pinned, Unpinned, StepCosted, DraftJudged, BlocksTrimmed, StepSpeculated,
    )
}  # fmt: skip


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
        return write_text(path, json.dumps(document, separators=(",", ":")) + "\n", "trace")

    @staticmethod
    def load(path: str | Path) -> "Trace":
        """Read what `save` wrote. Raises MiniVLLMError when the file is not a trace of this version."""
        return read_text(path, _parsed, "trace")


def _parsed(text: str) -> Trace:
    try:
        document = json.loads(text)
        if document["minivllm_trace"] != Trace.VERSION:
            raise MiniVLLMError(f"trace version {document['minivllm_trace']}, not {Trace.VERSION}; record it again")
        kinds = dict(enumerate(_kind(name, names) for name, names in document["kinds"].items()))
        return Trace({**document["header"]}, [_event(kinds[row[0]], row[1:]) for row in document["events"]])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise MiniVLLMError(f"not a minivllm trace ({error}); record it again") from error


def _kind(name: str, field_names: Iterable[str]) -> type[Event]:
    kind = KINDS.get(name)
    if kind is None or [f.name for f in fields(kind)] != list(field_names):
        raise MiniVLLMError(f"recorded with other fields of {name}; record it again")
    return kind


def _event(kind: type[Event], values: list[object]) -> Event:
    event = kind(*map(_frozen, values))  # type: ignore[arg-type]  # as many as the fields: else a TypeError
    if not isinstance(event.step, int):
        raise TypeError(f"{kind.__name__} in step {event.step!r}")
    return event


def _frozen(value: object) -> object:
    """JSON's lists become the tuples they were."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
