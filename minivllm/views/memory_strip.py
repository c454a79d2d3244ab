"""The memory strip: every slot of the pool by address and by use, step by step, folded from the events of a run.

    live      holds the K and V of a token               internal  set aside, and never filled
    reserved  will be filled before its block is let go  external  of no use to the next request, or only rounding
    free      the next request may have it

What was reserved and what was wasted only the rest of the run can tell, so the strip replays traces. Its sums are those
of course/memory_use.py, which knows no addresses; but for a last block that several requests share, or that is found in
a cache: who will fill it, the strip takes from its holders.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from minivllm.course.memory_fold import Holding, MemoryFold, power_of_two
from minivllm.course.memory_use import BY_BUDDIES, MemoryUse, follow, memory_over_time
from minivllm.errors import MiniVLLMError
from minivllm.events import BlocksReleased, Finished, StepRan, Waited
from minivllm.trace import Trace
from minivllm.views.block_map_picture import provenance
from minivllm.views.memory_strip_picture import Refused, Segment, StripControls, StripPicture, StripState, draw
from minivllm.views.sketch import seek, with_control
from minivllm.views.sketch_view import SketchView
from minivllm.views.waste_bars import WasteBars

__all__ = ["MemoryStrip", "StripFold", "draw"]

Runs = Mapping[str, Trace]  # by the allocator's name
Use = tuple[int, int, int]  # of a block: slots that are filled, that will be, that were asked for


class StripFold:
    """One run, at any step. Raises MiniVLLMError for a trace that began in the middle, or in which no step ran."""

    def __init__(self, trace: Trace) -> None:
        self.uses: list[MemoryUse] = memory_over_time(trace)
        if not self.uses:
            raise MiniVLLMError("no step ran in this trace; record some before drawing where the memory went")
        self.trace = trace
        self._index_of = {use.step: index for index, use in enumerate(self.uses)}
        self._ends = _ends(trace)
        self._finished = {event.request_id: event.step for event in trace if isinstance(event, Finished)}
        waited = [event for event in trace if isinstance(event, Waited) and event.reason == "no_blocks"]
        self._waiting = {event.step: event.request_id for event in waited}
        self._begin()

    def state(self, step: int) -> StripState:
        """The last step that ran up to this one."""
        first = self.uses[0].step
        step = next(s for s in range(max(step, first), first - 1, -1) if s in self._index_of)
        self._go_to(step)
        index = self._index_of[step]
        segments = self._segments(step, is_short=self.uses[index].is_short)
        return StripState(self._fold.allocator, self.uses, index, segments, self._refused(step, segments))

    def _begin(self) -> None:
        self._fold = MemoryFold(self.trace.header)
        self._steps: Iterator[StepRan] = follow(self._fold, self.trace)
        self._at = -1

    def _go_to(self, step: int) -> None:
        """Forward is incremental, backward starts again."""
        if step < self._at:
            self._begin()
        while self._at < step:
            self._at = next(self._steps).step

    def _segments(self, step: int, *, is_short: bool) -> list[Segment]:
        """Stretches of equal use by address; those of different requests apart where each has one run."""
        size, is_paged = self._fold.block_size, self._fold.allocator == "paged"
        blocks: dict[int, tuple[str, Use]] = {}
        for id_, holding in self._fold.requests.items():
            for block_id, use in self._held(id_, holding, step):
                others = blocks.get(block_id, ("", (0, 0, 0)))[1]
                blocks[block_id] = "" if is_paged else id_, _widest(use, others)
        free = "external" if is_short else "free"
        found: list[Segment] = []
        for block_id in range(1, self._fold.num_blocks):  # the null block holds nothing
            is_pinned = block_id not in blocks and bool(self._fold.holders[block_id])
            nothing = ("", (size, size, size) if is_pinned else (0, 0, 0))
            id_, (filled, later, asked) = blocks.get(block_id, nothing)
            edges = [("live", 0, filled), ("reserved", filled, later), ("internal", later, asked)]
            edges.append(("external" if block_id in blocks else free, asked, size))
            start = (block_id - 1) * size
            for kind, begin, end in edges:
                if end > begin:
                    _extend(found, Segment(start + begin, end - begin, kind, id_))
        return found

    def _held(self, id_: str, holding: Holding, step: int) -> Iterator[tuple[int, Use]]:
        """A request's blocks in order, and the use of each."""
        size, has_ended = self._fold.block_size, self._finished.get(id_, step) < step
        for group, table in (holding.tables or {0: list[int]()}).items():
            block_ids = [*table, *(holding.reserved_ids if group == 0 else ())]
            asked = len(block_ids) * size - holding.num_rounded
            end = self._end(id_, holding, step)
            for i, block_id in enumerate(block_ids):
                filled, later, wanted = (min(max(n - i * size, 0), size) for n in (holding.num_stored, end, asked))
                if block_id:
                    later = max(filled, later)
                    yield block_id, (0, 0, max(later, wanted)) if has_ended else (filled, later, max(later, wanted))

    def _end(self, id_: str, holding: Holding, step: int) -> int:
        """Tokens stored when the request lets go of what it holds; where the trace ends first, what it asked for."""
        known = next((stored for released, stored in self._ends[id_] if released >= step), None)
        return holding.num_prompt + holding.max_tokens - 1 if known is None else known

    def _refused(self, step: int, segments: list[Segment]) -> Refused | None:
        """Who waits for blocks in this step, how many slots in a row it needs, and what is free."""
        id_ = self._waiting.get(step)
        if id_ is None:
            return None
        free = [s.length for s in segments if s.kind in ("free", "external") and not s.request_id]
        hole, allocator, size = max(free, default=0), self._fold.allocator, self._fold.block_size
        if allocator == "paged":
            return Refused(id_, 0, sum(free), hole, is_by_buddies=False)
        num_blocks = -(-self._fold.num_asked(id_) // size)
        is_by_buddies = allocator in BY_BUDDIES
        need = (power_of_two(num_blocks) if is_by_buddies else num_blocks) * size
        return Refused(id_, need, sum(free), hole, is_by_buddies)


class MemoryStrip(SketchView):
    """`MemoryStrip.replay(trace)`, or `.replay(paged=trace, buddy=other)`; controls: step, run."""

    def __init__(self, read: Callable[[], Runs]) -> None:
        self._read = read
        self._controls = StripControls()
        self._folds: dict[str, StripFold] = {}
        self._fold_lock = threading.Lock()  # browser and publisher draw on threads of their own
        super().__init__()

    @staticmethod
    def replay(trace: Trace | None = None, **traces: Trace) -> "MemoryStrip":
        """One recorded run, or several by name to choose from."""
        runs = {"": trace, **traces} if trace is not None else traces
        if not runs or not all(isinstance(run, Trace) for run in runs.values()):
            raise MiniVLLMError("MemoryStrip.replay draws traces: MemoryStrip.replay(Trace.load(path))")
        return MemoryStrip(lambda: runs)

    @staticmethod
    def beside(bars: WasteBars) -> "MemoryStrip":
        """The runs behind bars: it follows their sliders."""
        strip = MemoryStrip(lambda: bars.traces)
        bars.follow_with(strip.refresh)
        return strip

    def drawn(self) -> StripPicture:
        runs, controls = self._read(), self._controls
        name = controls.run if controls.run in runs else next(iter(runs))
        with self._fold_lock:
            fold = self._folds.get(name)
            if fold is None or fold.trace is not runs[name]:
                self._folds[name] = fold = StripFold(runs[name])
            state = fold.state(fold.uses[-1].step if controls.step is None else controls.step)
        return draw(state, replace(controls, run=name), list(runs), provenance(fold.trace.header))

    def _moved(self, control: str, value: object) -> None:
        picture = self.drawn()
        if control == "step":
            step = seek(picture["steps"], value)
            is_last = picture["steps"] is not None and step == picture["steps"][1]
            self._controls = replace(self._controls, step=None if is_last else step)
            return
        self._controls = with_control(self._controls, picture["controls"], control, value)


def _ends(trace: Trace) -> Mapping[str, list[tuple[int, int]]]:
    """By request: (step in which it let go of its blocks, tokens stored by then), once for each time it did."""
    ran = [event for event in trace if isinstance(event, StepRan)]
    scheduled = {event.step: {id_: num_stored for id_, _, num_stored in event.scheduled} for event in ran}
    stored: dict[str, int] = {}
    ends: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for event in trace:
        if isinstance(event, BlocksReleased):
            id_ = event.request_id
            ends[id_].append((event.step, scheduled.get(event.step, {}).get(id_, stored.get(id_, 0))))
        elif isinstance(event, StepRan):
            stored |= scheduled[event.step]
    return ends


def _widest(one: Use, other: Use) -> Use:
    """A shared block is used as far as any of its holders does."""
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])


def _extend(found: list[Segment], segment: Segment) -> None:
    """Append, or lengthen the last one if it goes on."""
    last = found[-1] if found else None
    if last and (last.kind, last.request_id) == (segment.kind, segment.request_id):
        found[-1] = last._replace(length=last.length + segment.length)
    else:
        found.append(segment)
