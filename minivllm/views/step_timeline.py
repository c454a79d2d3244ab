"""W5, the step timeline: what every request did in every step, live or replayed; two runs on one axis to compare."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus
from minivllm.trace import Trace
from minivllm.views.block_map_picture import provenance
from minivllm.views.sketch import seek, with_control
from minivllm.views.sketch_view import SketchView
from minivllm.views.sources import LiveSource, Source, TraceSource
from minivllm.views.step_timeline_fold import TimelineFold, TimelineState
from minivllm.views.step_timeline_picture import Lane, TimelineControls, TimelinePicture, draw

TimelineSource = Source[TimelineState]


class StepTimeline(SketchView):
    """`StepTimeline.replay(static, continuous, names=("static", "continuous"))`; controls: step, rows, page."""

    def __init__(
        self, make_sources: Callable[[Callable[[], None]], Sequence[TimelineSource]], names: Sequence[str] = ("",)
    ) -> None:
        self._controls = TimelineControls()
        self._names = names
        self.sources = make_sources(self.refresh)
        super().__init__()

    @staticmethod
    def replay(*traces: Trace, names: Sequence[str] = ()) -> "StepTimeline":
        """Draw one recorded run, or two of them under each other."""
        if not 1 <= len(traces) <= 2 or not all(isinstance(trace, Trace) for trace in traces):
            raise MiniVLLMError("StepTimeline.replay draws one Trace or two: StepTimeline.replay(Trace.load(path))")
        given = names or (("first", "second") if len(traces) == 2 else ("",))
        if len(given) != len(traces):
            raise MiniVLLMError(f"names must be as many as the traces: {len(traces)}, not {len(given)}")
        sources = [TraceSource(lambda header: TimelineFold(header, None), trace) for trace in traces]
        return StepTimeline(lambda wake: sources, [str(name) for name in given])

    @staticmethod
    def follow(bus: EventBus, header: Mapping[str, object], past: Iterable[Event] = ()) -> "StepTimeline":
        """Draw a run while it goes on; its last steps can be looked at again."""
        return StepTimeline(lambda wake: [LiveSource(TimelineFold, bus, header, past, wake)])

    def drawn(self) -> TimelinePicture:
        lanes = [Lane(name, source.state()) for name, source in zip(self._names, self.sources, strict=True)]
        return draw(lanes, self._controls, provenance(self.sources[0].header))

    def stop(self) -> None:
        for source in self.sources:
            source.stop()
        super().stop()

    def _moved(self, control: str, value: object) -> None:
        picture = self.drawn()
        if control == "step":
            step = seek(picture["steps"], value)
            is_newest = picture["steps"] is not None and step == picture["steps"][1]
            self._controls = replace(self._controls, step=None if is_newest else step)
            return
        self._controls = with_control(self._controls, picture["controls"], control, value)
