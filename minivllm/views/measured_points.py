"""Measured forward passes (lab/forward_sweep.py) beside their floors: time per token, time per step, or the roofline.

dots      each step as the engine runs it          solid lines    its kernels launched at once, where that was timed
dashes    the floor at the roofs that were measured in the same process
Titles and the text twin give a step's best time, launched at once where that was timed, and say so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, log10
from typing import Protocol

from minivllm.course.calculators.units import plain, shown
from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import WIDTH_PX, Choice, Control, Dot, Key, Line, Mark, SketchPicture, Words, with_control
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.step_work import ms
from minivllm.views.theme import OWNER_COLOURS, counted

BY_ITSELF = 100 * (1 - 1e-9)  # percent of a roof: the step that sets it
LEFT, RIGHT, TOP, BOTTOM = 74.0, WIDTH_PX - 26.0, 24.0, 330.0
STYLES = (("square", OWNER_COLOURS[0]), ("circle", OWNER_COLOURS[1]), ("diamond", OWNER_COLOURS[2]))
SHOWN = [("per token", "time per token"), ("per step", "time per step"), ("roofline", "FLOP/s by intensity")]


class MeasuredShape(Protocol):
    @property
    def num_requests(self) -> int: ...
    @property
    def num_stored(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def kind(self) -> str: ...


class MeasuredStep(Protocol):
    @property
    def shape(self) -> MeasuredShape: ...
    @property
    def flops(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def intensity(self) -> float: ...
    @property
    def floor_ms(self) -> float: ...
    @property
    def ms(self) -> float: ...
    @property
    def graph_ms(self) -> float | None: ...
    @property
    def best_s(self) -> float: ...


class MeasuredSweep(Protocol):
    """One model on one machine."""

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def machine(self) -> str: ...
    @property
    def bandwidth(self) -> float: ...  # bytes/s
    @property
    def flops_per_s(self) -> float: ...
    @property
    def steps(self) -> Sequence[MeasuredStep]: ...
    @property
    def provenance(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class PointsControls:
    sweep: str
    show: str = "per token"


@dataclass(frozen=True)
class Axes:
    """Two logarithmic axes of whole decades."""

    x: tuple[int, int]  # powers of ten
    y: tuple[int, int]

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (log10(x) - self.x[0]) / (self.x[1] - self.x[0])
        up = (log10(y) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - min(max(up, 0), 1) * (BOTTOM - TOP)


class PointsPicture(SketchPicture):
    series: dict[str, list[tuple[float, float]]]  # what the dots stand for


class MeasuredPoints(SketchView):
    """`MeasuredPoints(load_sweeps(path), show="roofline")`; controls: sweep ("model, machine") and show."""

    def __init__(self, sweeps: Sequence[MeasuredSweep], **chosen: str) -> None:
        self._sweeps = {f"{sweep.model}, {sweep.machine}": sweep for sweep in sweeps if sweep.steps}
        if not self._sweeps:
            raise MiniVLLMError("there is no measured step to draw; give sweeps of lab/forward_sweep.py")
        self._controls = PointsControls(next(iter(self._sweeps)))
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> PointsPicture:
        return draw(self._controls, self._sweeps[self._controls.sweep], list(self._sweeps))

    def _moved(self, control: str, value: object) -> None:
        self._controls = with_control(self._controls, controls(self._controls, list(self._sweeps)), control, value)


def draw(chosen: PointsControls, sweep: MeasuredSweep, names: Sequence[str]) -> PointsPicture:
    """All series of one sweep in the chosen axes."""
    series = series_of(sweep)
    x_of, y_of = _measures(chosen.show)
    axes = _axes_of(chosen, sweep, x_of, y_of)
    title = _title(chosen, sweep, series)
    marks = [*_grid(axes, chosen), *(_roofs(axes, sweep) if chosen.show == "roofline" else [])]
    for (shape, colour), steps in zip(STYLES, series.values(), strict=False):
        marks += _series(axes, steps, x_of, y_of, shape, colour, has_floor=chosen.show != "roofline")
    keys = [Key(colour, "solid", f"{shape}s: {name}") for (shape, colour), name in zip(STYLES, series, strict=False)]
    origin = f"{sweep.provenance.get('command')}, commit {sweep.provenance.get('commit')}"
    return {
        "view": "measured-points", "title": title, "aria": f"Measured steps. {title}",
        "text": _text(title, series, sweep), "status": "", "width": WIDTH_PX, "height": BOTTOM + 44, "marks": marks,
        "controls": controls(chosen, names), "steps": None, "legend": keys, "lines": _lines(sweep),
        "lines_name": "how it was measured", "provenance": origin,
        "series": {name: [(x_of(s), y_of(s, s.ms)) for s in steps] for name, steps in series.items()},
    }  # fmt: skip


def controls(chosen: PointsControls, names: Sequence[str]) -> list[Control]:
    return [
        Choice("sweep", "measured", [(name, name) for name in names], chosen.sweep),
        Choice("show", "show", SHOWN, chosen.show),
    ]


def series_of(sweep: MeasuredSweep) -> dict[str, list[MeasuredStep]]:
    """Prefill, and decode at each context, by the number of tokens; as many series as there are styles."""
    series: dict[str, list[MeasuredStep]] = {}
    for step in sorted(sweep.steps, key=lambda s: (s.shape.kind != "prefill", s.shape.num_tokens)):
        is_prefill = step.shape.kind == "prefill"
        name = "prefill of one prompt" if is_prefill else f"decode, context {step.shape.num_stored:,}"
        series.setdefault(name, []).append(step)
    return dict(list(series.items())[: len(STYLES)])


X = Callable[[MeasuredStep], float]
Y = Callable[[MeasuredStep, float], float]  # of a step, and a time in ms


def _measures(show: str) -> tuple[X, Y]:
    if show == "roofline":
        return (lambda s: s.intensity), (lambda s, time_ms: s.flops / (time_ms / 1e3))
    if show == "per step":
        return (lambda s: float(s.shape.num_tokens)), (lambda s, time_ms: time_ms)
    return (lambda s: float(s.shape.num_tokens)), (lambda s, time_ms: time_ms / s.shape.num_tokens)


def _axes_of(chosen: PointsControls, sweep: MeasuredSweep, x_of: X, y_of: Y) -> Axes:
    xs = [x_of(step) for step in sweep.steps]
    ys = [y_of(step, time) for step in sweep.steps for time in _times(step)]
    if chosen.show == "roofline":
        xs.append(sweep.flops_per_s / sweep.bandwidth)
        ys.append(sweep.flops_per_s)
    return Axes(_decades(xs), _decades(ys))


def _times(step: MeasuredStep) -> list[float]:
    return [step.ms, step.floor_ms, *([step.graph_ms] if step.graph_ms else [])]


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """_decades([3, 250]) == (0, 3)."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return low, max(high, low + 1)


def _grid(axes: Axes, chosen: PointsControls) -> list[Mark]:
    marks: list[Mark] = [Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft"), Line(LEFT, TOP, LEFT, BOTTOM, "soft")]
    for power in range(axes.x[0], axes.x[1] + 1):
        x, _ = axes.place(10.0**power, 10.0 ** axes.y[0])
        marks += [Line(x, TOP, x, BOTTOM, "line", 0.3), Words(x, BOTTOM + 5, plain(10.0**power), 10, "soft", "middle")]
    is_roofline = chosen.show == "roofline"
    for power in range(axes.y[0], axes.y[1] + 1):
        _, y = axes.place(10.0 ** axes.x[0], 10.0**power)
        words = shown(10.0**power, "FLOP/s").removesuffix("FLOP/s") if is_roofline else plain(10.0**power)
        marks += [Line(LEFT, y, RIGHT, y, "line", 0.3), Words(LEFT - 5, y - 6, words, 10, "soft", "end")]
    across = "intensity: FLOPs for each byte of weights, K and V" if is_roofline else "tokens in the step"
    up = {"roofline": "FLOP/s", "per step": "ms per step", "per token": "ms per token"}[chosen.show]
    return [*marks, Words((LEFT + RIGHT) / 2, BOTTOM + 22, across, 11, "ink", "middle"), Words(LEFT - 68, 4, up, 11)]


def _roofs(axes: Axes, sweep: MeasuredSweep) -> list[Mark]:
    ridge = sweep.flops_per_s / sweep.bandwidth
    left = max(10.0 ** axes.x[0], 10.0 ** axes.y[0] / sweep.bandwidth)
    corner, start = axes.place(ridge, sweep.flops_per_s), axes.place(left, left * sweep.bandwidth)
    return [
        Line(*start, *corner, "ink", 2), Line(*corner, RIGHT, corner[1], "ink", 2),
        Line(*corner, corner[0], BOTTOM, "soft", 1, True),
        Words(corner[0] + 4, BOTTOM - 16, f"ridge {plain(round(ridge, 1))}", 10, "soft"),
        Words(RIGHT, corner[1] + 5, shown(sweep.flops_per_s, "FLOP/s"), 11, "ink", "end"),
    ]  # fmt: skip


def _series(
    axes: Axes, steps: Sequence[MeasuredStep], x_of: X, y_of: Y, shape: str, colour: str, *, has_floor: bool
) -> list[Mark]:
    marks: list[Mark] = []
    for before, after in pairwise(steps):
        if has_floor:
            ends = [axes.place(x_of(s), y_of(s, s.floor_ms)) for s in (before, after)]
            marks.append(Line(*ends[0], *ends[1], colour, 1, True))
        if before.graph_ms and after.graph_ms:
            graphs = [(before, before.graph_ms), (after, after.graph_ms)]
            ends = [axes.place(x_of(s), y_of(s, time)) for s, time in graphs]
            marks.append(Line(*ends[0], *ends[1], colour, 2))
    for step in steps:
        words = f"{_what(step)}: {ms(step.ms)}, floor {ms(step.floor_ms)}"
        marks.append(Dot(*axes.place(x_of(step), y_of(step, step.ms)), shape, colour, 5, words))
    return marks


def _what(step: MeasuredStep) -> str:
    shape = step.shape
    if shape.kind == "prefill":
        return f"prefill of {counted(shape.num_tokens, 'token')}"
    return f"decode of {counted(shape.num_requests, 'request')} at {shape.num_stored:,}"


def _title(chosen: PointsControls, sweep: MeasuredSweep, series: dict[str, list[MeasuredStep]]) -> str:
    steps = next(iter(series.values()))
    first, last = steps[0], steps[-1]
    start = f"{sweep.model} on {sweep.machine}:"
    if chosen.show == "roofline":
        shares = [f"{_what(s)} reaches {_percent(_share(s, sweep))}" for s in (last, list(series.values())[-1][0])]
        return f"{start} {' and '.join(shares)} of the FLOP/s that were measured here."
    how = ", launched at once" if first.graph_ms and last.graph_ms else ", as the engine runs it"
    if chosen.show == "per step":
        times = [ms(1e3 * s.best_s) for s in (first, last)]
        return f"{start} {_what(first)} takes {times[0]}, {_what(last)} {times[1]}{how}."
    each = [ms(1e3 * s.best_s / s.shape.num_tokens) for s in (first, last)]
    words = "a token costs {} alone and {} among {}".format(*each, f"{last.shape.num_tokens:,}")
    return f"{start} {words}{how}; the weights are read once either way."


def _share(step: MeasuredStep, sweep: MeasuredSweep) -> float:
    return 100 * step.flops / step.best_s / sweep.flops_per_s


def _percent(value: float) -> str:
    """Two figures: _percent(99.96) == "100%", _percent(0.372) == "0.37%"."""
    return f"{plain(float(f'{value:.2g}'))}%"


def _text(title: str, series: dict[str, list[MeasuredStep]], sweep: MeasuredSweep) -> str:
    rows = [["", "tokens", "FLOP/byte", "as run ms", "at once ms", "floor ms", "ms per token", "of FLOP/s"]]
    for name, steps in series.items():
        for step in [*steps[:-1:2], steps[-1]]:  # every second, and the largest
            each_ms = 1e3 * step.best_s / step.shape.num_tokens
            graph = f"{step.graph_ms:.3g}" if step.graph_ms else "-"
            rows.append([
                name, f"{step.shape.num_tokens:,}", f"{step.intensity:.3g}", f"{step.ms:.3g}", graph,
                f"{step.floor_ms:.3g}", f"{each_ms:.3g}", _percent(_share(step, sweep)),
            ])  # fmt: skip
    return "\n".join([title, *text_table(rows)])


def _lines(sweep: MeasuredSweep) -> list[str]:
    shares = {
        "FLOP/s": max(_share(step, sweep) for step in sweep.steps),
        "bytes/s": max(100 * step.num_bytes / step.best_s / sweep.bandwidth for step in sweep.steps),
    }
    raised = [
        f"the roof of {name} is the rate of the fastest step itself, which passed the one measured before: its"
        " 100% and its floor hold by construction"
        for name, share in shares.items()
        if share > BY_ITSELF
    ]
    return [
        f"{sweep.machine}, {sweep.dtype}: {shown(sweep.bandwidth, 'bytes/s')} and {shown(sweep.flops_per_s, 'FLOP/s')},"
        " measured in the same process",
        "dots: the step as the engine runs it; solid: its kernels launched at once, where timed so; dashed: its floor",
        *raised,
    ]
