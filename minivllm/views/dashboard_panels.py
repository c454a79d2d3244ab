"""The small plots of the dashboard: what each draws of the frames, and where it stands."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.course.engine_frames import Frame
from minivllm.views.sketch import WIDTH_PX, Line, Mark, Trail, Words
from minivllm.views.stacked_bars import tick_ms
from minivllm.views.theme import OWNER_COLOURS

RATE_S = 1.0  # over which rates are taken
NUM_POINTS = 60  # of a trail
COLUMNS, GAP, HEAD, PLOT, BELOW = 4, 12, 56, 62, 10
PANEL_WIDTH = (WIDTH_PX - GAP * (COLUMNS - 1)) / COLUMNS
PANEL_HEIGHT = HEAD + PLOT + BELOW
BLUE, ORANGE, GREEN, VERMILION = (OWNER_COLOURS[i] for i in (0, 1, 2, 5))
Value = float | None
Read = Callable[[Frame, Frame], Value]  # a frame about a second ago, and the frame


class Series(NamedTuple):
    """One line of a panel; thickness and dashes tell lines apart without their colours."""

    name: str
    read: Read
    ink: str
    thickness: float = 2
    is_dashed: bool = False


class Panel(NamedTuple):
    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Frames up to the chosen one, thinned out to what is drawn, each with the one that rates are taken from."""

    pairs: tuple[tuple[Frame, Frame], ...]
    start_s: float
    length_s: float

    @property
    def now(self) -> tuple[Frame, Frame]:
        return self.pairs[-1]

    def x(self, time_s: float) -> float:
        return (time_s - self.start_s) / self.length_s * PANEL_WIDTH


def window(frames: Sequence[Frame], index: int, length_s: float) -> Window:
    """The last seconds up to frame `index`. The same frames are picked while time goes on: the picture stays calm."""
    end_s = frames[index].time_s
    start_s = max(end_s - length_s, 0.0)
    first = bisect_left(frames, start_s, hi=index, key=lambda frame: frame.time_s)
    stride = max(1, -(-(index + 1 - first) // NUM_POINTS))
    places = [*range(-(-first // stride) * stride, index, stride), index]
    return Window(tuple((_before(frames, place), frames[place]) for place in places), start_s, length_s)


def _before(frames: Sequence[Frame], index: int) -> Frame:
    """The newest frame that is a second older, else the first."""
    older_s = frames[index].time_s - RATE_S + 1e-6
    return frames[max(bisect_right(frames, older_s, hi=index, key=lambda frame: frame.time_s) - 1, 0)]


def per_second(name: str) -> Read:
    """How fast a total grew."""

    def read(before: Frame, frame: Frame) -> Value:
        seconds = frame.time_s - before.time_s
        grown: float = getattr(frame, name) - getattr(before, name)
        return grown / seconds if seconds > 0 else None

    return read


def ratio(top: str, bottom: str, factor: float = 1.0) -> Read:
    """Growth of one total by that of another."""

    def read(before: Frame, frame: Frame) -> Value:
        of: float = getattr(frame, bottom) - getattr(before, bottom)
        grown: float = getattr(frame, top) - getattr(before, top)
        return factor * grown / of if of else None

    return read


def now(name: str) -> Read:
    def read(_: Frame, frame: Frame) -> Value:
        value: Value = getattr(frame, name)
        return value

    return read


PANELS = (
    Panel("tokens per second", (
        Series("out", per_second("output_tokens"), BLUE),
        Series("computed", per_second("computed_tokens"), ORANGE, 1.2, True),
    )),
    Panel("first token after, ms", (
        Series("half within", now("ttft_p50_ms"), BLUE), Series("95% within", now("ttft_p95_ms"), VERMILION, 1.2, True),
    )),
    Panel("between two tokens, ms", (
        Series("half within", now("gap_p50_ms"), BLUE), Series("95% within", now("gap_p95_ms"), VERMILION, 1.2, True),
    )),
    Panel("a step, ms", (
        Series("took", ratio("step_ms", "steps"), BLUE),
        Series("floor", ratio("floor_ms", "costed_steps"), GREEN, 1.2, True),
    )),
    Panel("requests", (
        Series("running", now("num_running"), BLUE), Series("waiting", now("num_waiting"), ORANGE, 1.2, True),
        Series("preempted", now("num_preempted"), VERMILION, 1),
    )),
    Panel("blocks", (
        Series("live", now("num_live"), BLUE), Series("cached", now("num_cached"), ORANGE, 1.2, True),
        Series("free", now("num_free"), GREEN, 1),
    )),
    Panel("prompt tokens found cached, %", (Series("hit rate", ratio("hit_tokens", "prompt_tokens", 100), BLUE),)),
    Panel("requests per second", (
        Series("arrived", per_second("arrived"), ORANGE, 1.2, True), Series("finished", per_second("finished"), BLUE),
        Series("turned away", per_second("refused"), VERMILION, 1),
    )),
)  # fmt: skip


def panel_marks(shown: Window) -> list[Mark]:
    """All panels, four in a row."""
    changed_s = [frame.time_s for (_, before), (_, frame) in zip(shown.pairs, shown.pairs[1:], strict=False)
                 if before.load != frame.load]  # fmt: skip
    marks: list[Mark] = []
    for i, panel in enumerate(PANELS):
        left, top = i % COLUMNS * (PANEL_WIDTH + GAP), i // COLUMNS * (PANEL_HEIGHT + GAP)
        marks += _panel(panel, shown, changed_s, left, top)
    return marks


def height() -> float:
    return -(-len(PANELS) // COLUMNS) * (PANEL_HEIGHT + GAP)


def amount(value: Value) -> str:
    """Three digits that matter: amount(12.34) == "12.3", amount(23456.7) == "23,457"; "-" where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _panel(panel: Panel, shown: Window, changed_s: Sequence[float], left: float, top: float) -> list[Mark]:
    lines = [[(shown.x(frame.time_s), s.read(before, frame)) for before, frame in shown.pairs] for s in panel.series]
    known = [value for line in lines for _, value in line if value is not None]
    highest = 5 * tick_ms(max(known, default=1) or 1)
    floor, right = top + HEAD + PLOT, left + PANEL_WIDTH
    marks: list[Mark] = [
        Words(left, top, panel.title, 11, "soft"),
        Line(left, floor, right, floor, "soft"),
        Line(left, floor - PLOT, right, floor - PLOT, "line", 0.4),
        Words(right, floor - PLOT + 1, amount(highest), 9, "soft", "end"),
    ]
    marks += [Line(left + shown.x(s), floor - PLOT, left + shown.x(s), floor, "pick", 1, True) for s in changed_s]
    for i, (series, line) in enumerate(zip(panel.series, lines, strict=True)):
        y = top + 14 + 13 * i
        marks.append(Line(left, y + 7, left + 16, y + 7, series.ink, series.thickness, series.is_dashed))
        marks.append(Words(left + 21, y, f"{series.name} {amount(line[-1][1])}", 12))
        marks += _trails(series, [(left + x, value) for x, value in line], floor, PLOT / highest)
    return marks


def _trails(series: Series, line: Sequence[tuple[float, Value]], floor: float, scale: float) -> list[Trail]:
    """A trail for each stretch of known values."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, value in line:
        if value is not None:
            stretches[-1].append((round(x, 1), round(floor - value * scale, 1)))
        elif stretches[-1]:
            stretches.append([])
    return [Trail(points, series.ink, series.thickness, series.is_dashed) for points in stretches if len(points) > 1]
