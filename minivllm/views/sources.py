"""Where a view's state comes from: a live bus or a recorded trace; both fold events and answer `state()`."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus
from minivllm.trace import Trace

State = TypeVar("State")
Seen = TypeVar("Seen", covariant=True)


class Fold(Protocol[Seen]):
    """Takes events in one by one and freezes what it knows."""

    @property
    def step(self) -> int: ...

    def apply(self, event: Event) -> None: ...

    def state(self) -> Seen: ...


MakeFold = Callable[[Mapping[str, object]], Fold[Seen]]  # from a trace's header


class Source(Protocol[Seen]):
    @property
    def header(self) -> Mapping[str, object]: ...

    def state(self) -> Seen: ...

    @property
    def steps(self) -> tuple[int, int, int] | None:
        """First and last step that can be shown and the one that is, or None when only the present can be."""
        ...

    def seek(self, step: int) -> None: ...

    def stop(self) -> None: ...


class LiveSource(Generic[State]):
    """Listens to a bus; the engine's thread only appends, whoever draws folds."""

    steps: tuple[int, int, int] | None = None

    def __init__(
        self,
        make_fold: MakeFold[State],
        bus: EventBus,
        header: Mapping[str, object],
        past: Iterable[Event],
        wake: Callable[[], None],
    ) -> None:
        self.header = {**header, "live": "live"}
        self._fold = make_fold(header)
        self._arrived: deque[Event] = deque(past)
        self._wake = wake
        self._lock = threading.Lock()
        self._state = self._fold.state()
        self._failure: MiniVLLMError | None = None
        self.stop = bus.listen(self._take, wants_hash=False)

    def state(self) -> State:
        """Fold what arrived since the last call. Raises MiniVLLMError, from then on, if the events contradict."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._arrived:
                self._catch_up()
                self._state = self._fold.state()
            return self._state

    def seek(self, step: int) -> None:
        """The present is all there is."""

    def _take(self, event: Event) -> None:
        self._arrived.append(event)
        self._wake()

    def _catch_up(self) -> None:
        try:
            while self._arrived:
                self._fold.apply(self._arrived.popleft())
        except MiniVLLMError as error:
            self._failure = error
            raise


class TraceSource(Generic[State]):
    """Shows a recorded trace at any step; forward is incremental, backward starts again."""

    def __init__(self, make_fold: MakeFold[State], trace: Trace) -> None:
        self.header = trace.header
        self._make_fold = make_fold
        self._events = tuple(trace.events)
        self._last = trace.last_step
        self._lock = threading.Lock()
        self._fold = make_fold(trace.header)
        self._num_applied = 0
        self._step = self._last
        self._shown: tuple[int, State] | None = None

    def state(self) -> State:
        with self._lock:
            if self._shown is None or self._shown[0] != self._step:
                self._shown = (self._step, self._folded(self._step))
            return self._shown[1]

    @property
    def steps(self) -> tuple[int, int, int] | None:
        return 0, self._last, self._step

    def seek(self, step: int) -> None:
        with self._lock:
            self._step = step

    def stop(self) -> None:
        """Nothing listens."""

    def _folded(self, step: int) -> State:
        if self._fold.step > step:
            self._fold, self._num_applied = self._make_fold(self.header), 0
        while self._num_applied < len(self._events) and self._events[self._num_applied].step <= step:
            self._fold.apply(self._events[self._num_applied])
            self._num_applied += 1
        return self._fold.state()
