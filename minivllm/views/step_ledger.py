"""The step ledger as a picture: of each step the bytes and FLOPs it needed, their floor, and what remains; live or not.

The events come from `keep_ledger` (lab/ledger.py), the rows from course/step_ledger.py; step_cost.py works the floors
out by itself, from a chip that is named.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from minivllm.course.step_ledger import LedgerFold, LedgerRow
from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus
from minivllm.trace import Trace
from minivllm.views.block_map_picture import provenance
from minivllm.views.sketch import seek, with_control
from minivllm.views.sketch_png import sketch_image
from minivllm.views.sketch_view import SketchView
from minivllm.views.sources import LiveSource, Source, TraceSource
from minivllm.views.step_ledger_picture import LedgerControls, LedgerPicture, controls, draw
from minivllm.views.widget import png_bytes, stacked

Rows = tuple[LedgerRow, ...]


class StepLedger(SketchView):
    """`StepLedger.replay(trace, unit="share", kind="decode")`; controls: steps, kind, unit, step."""

    def __init__(self, make_source: Callable[[Callable[[], None]], Source[Rows]], **chosen: str) -> None:
        self._controls = LedgerControls()
        self.source = make_source(self.refresh)
        super().__init__()
        self.choose(chosen)

    @staticmethod
    def replay(trace: Trace, **chosen: str) -> "StepLedger":
        """Draw a run that was recorded under `keep_ledger`."""
        if not isinstance(trace, Trace):
            raise MiniVLLMError(f"StepLedger.replay draws a Trace (Trace.load(path)), not {type(trace).__name__}")
        source = TraceSource(lambda header: LedgerFold(header, None), trace)
        return StepLedger(lambda wake: source, **chosen)

    @staticmethod
    def follow(bus: EventBus, header: Mapping[str, object], past: Iterable[Event] = (), **chosen: str) -> "StepLedger":
        """Draw steps while they run; the last ones can be looked at again."""
        return StepLedger(lambda wake: LiveSource(LedgerFold, bus, header, past, wake), **chosen)

    def drawn(self) -> LedgerPicture:
        header = self.source.header
        return draw(self.source.state(), self._controls, provenance(header), header.get("live") == "live")

    def stop(self) -> None:
        self.source.stop()
        super().stop()

    def _moved(self, control: str, value: object) -> None:
        if control == "step":
            steps = self.drawn()["steps"]
            step = seek(steps, value)
            is_newest = steps is not None and step == steps[1]
            self._controls = replace(self._controls, step=None if is_newest else step)
            return
        self._controls = with_control(self._controls, controls(self._controls), control, value)


def save_ledgers(path: Path, ledgers: Mapping[str, Rows], origin: str) -> Path:
    """One PNG of several runs, each by its name: in milliseconds, and below as shares. Raises MiniVLLMError."""
    images = []
    for name, rows in ledgers.items():
        times, shares = (draw(rows, LedgerControls(unit=unit), origin) for unit in ("ms", "share"))
        times["title"] = f"{name}, {origin}. {times['title']}"
        times["lines"], shares["title"] = [], f"{name}, as shares of the measured time."
        images += [sketch_image(times), sketch_image(shares)]
    try:
        path.write_bytes(png_bytes(stacked(images)))
    except OSError as error:
        raise MiniVLLMError(f"{path}: cannot save the picture ({error}); choose another place") from error
    return path
