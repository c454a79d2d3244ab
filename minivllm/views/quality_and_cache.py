"""Quality against cache: what published tables, and our own conversions, lost when they kept less of a token.

Every point is a variant of one study's model: to the left it keeps less than that study's MHA, further down it is
worse. With all studies each is compared with its own MHA, in percent; one study alone shows its own measure. The lines
below say who paid what: training from scratch, a share of it again, or a conversion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, floor, log10

from minivllm.course.calculators.units import plain
from minivllm.course.published_quality import Point, Study, published_studies
from minivllm.errors import MiniVLLMError
from minivllm.views.kv_calculator_picture import COLOURS
from minivllm.views.png import text_width
from minivllm.views.sketch import WIDTH_PX, Choice, Control, Dot, Key, Line, Mark, SketchPicture, Words, accepted
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.stacked_bars import tick_ms as tick_of

LEFT, RIGHT, TOP, BOTTOM = 64.0, WIDTH_PX - 20.0, 30.0, 330.0  # the plot, in pixels
ALL, CHANGE = "all", "change of quality"
LEAST_PERCENT = 1.0  # of MHA's cache: the left end of the logarithmic axis
SHAPES = {"mha": "circle", "gqa": "square", "mqa": "diamond", "mla": "circle"}  # MLA's has a dot inside
AXES = [("log", "logarithmic"), ("linear", "linear")]
Scale = Callable[[float], float]  # a number as pixels
PLACES = ((9.0, -7.0, "start"), (-9.0, -7.0, "end"), (0.0, -22.0, "middle"), (0.0, 9.0, "middle"),
          (9.0, -19.0, "start"), (-9.0, -19.0, "end"), (9.0, 5.0, "start"), (-9.0, 5.0, "end"),
          (0.0, -34.0, "middle"), (0.0, 21.0, "middle"), (9.0, 17.0, "start"), (-9.0, 17.0, "end"),
          (9.0, -31.0, "start"), (-9.0, -31.0, "end"))  # fmt: skip


@dataclass(frozen=True)
class QualityControls:
    """What the reader chose; the metric is one of the study's own."""

    study: str = ALL
    metric: str = CHANGE
    axis: str = "log"


@dataclass(frozen=True)
class Shown:
    """One point as it is drawn."""

    study: Study
    point: Point
    metric: str
    height: float  # on the axis: up is better
    label: str

    @property
    def value(self) -> float:
        return self.point.values[self.metric]

    @property
    def change(self) -> float:
        return self.study.change_percent(self.point, self.metric)


class QualityPicture(SketchPicture):
    changes: dict[str, float]  # "study/variant": percent of its study's MHA; negative is worse
    cache_percents: dict[str, float]


class QualityAndCache(SketchView):
    """`QualityAndCache([own_study()], study="ainslie-2023")`: the published tables, and further studies after them."""

    def __init__(self, further: Sequence[Study] = (), **chosen: str) -> None:
        self._studies = (*published_studies(), *further)
        self._controls = QualityControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> QualityPicture:
        return draw(self._controls, self._studies)

    def _moved(self, control: str, value: object) -> None:
        known = str(accepted(controls(self._controls, self._studies), control, value))
        before = self._controls
        match control:
            case "study":
                metrics = metrics_of(known, self._studies)
                metric = before.metric if before.metric in metrics else metrics[0]
                self._controls = replace(before, study=known, metric=metric)
            case "metric":
                self._controls = replace(before, metric=known)
            case _:
                self._controls = replace(before, axis=known)


def draw(chosen: QualityControls, studies: Sequence[Study]) -> QualityPicture:
    """The scatter, and who paid what. Raises MiniVLLMError without any study."""
    if not studies:
        raise MiniVLLMError("there is no study to draw; give at least one")
    shown = points_of(chosen, studies)
    title, paid = _title(chosen, shown), _paid(chosen, studies)
    return {
        "view": "quality-and-cache", "title": title, "aria": f"Quality against cache. {title}",
        "text": "\n".join([title, *_table(shown), *paid]), "status": "", "width": WIDTH_PX, "height": BOTTOM + 44,
        "marks": _marks(chosen, shown), "controls": controls(chosen, studies), "steps": None,
        "legend": [Key(COLOURS[name], "solid", words) for name, words in (
            ("MHA", "MHA: K and V for every head (round)"), ("GQA", "GQA: shared within groups (square)"),
            ("MQA", "MQA: one KV head (diamond)"), ("MLA", "MLA: one latent (round, a dot inside)"))],
        "lines": paid, "lines_name": "who paid what", "provenance": "",
        "changes": {f"{s.study.id}/{s.point.name}": s.change for s in shown},
        "cache_percents": {f"{s.study.id}/{s.point.name}": s.point.cache_percent for s in shown},
    }  # fmt: skip


def metrics_of(study: str, studies: Sequence[Study]) -> tuple[str, ...]:
    """What a study can be judged by; of all together, the change alone."""
    return next((known.metrics for known in studies if known.id == study), (CHANGE,))


def controls(chosen: QualityControls, studies: Sequence[Study]) -> list[Control]:
    metrics = metrics_of(chosen.study, studies)
    return [
        Choice("study", "study", [(ALL, "all, each beside its own MHA"), *((s.id, s.label) for s in studies)],
               chosen.study),
        Choice("metric", "quality by", [(name, name) for name in metrics], chosen.metric),
        Choice("axis", "cache axis", AXES, chosen.axis),
    ]  # fmt: skip


def points_of(chosen: QualityControls, studies: Sequence[Study]) -> list[Shown]:
    """Every variant that is drawn, with its height: a change in percent, or the study's own measure, up is better."""
    if chosen.study == ALL:
        metrics = [(study, study.metrics[0]) for study in studies]
        return [
            Shown(study, point, metric, study.change_percent(point, metric),
                  "MHA" if point.name == study.baseline else f"{study.label} {point.label}")
            for study, metric in metrics for point in study.points
        ]  # fmt: skip
    study = next(known for known in studies if known.id == chosen.study)
    sign = 1 if study.is_higher_better else -1
    return [
        Shown(study, p, chosen.metric, sign * p.values[chosen.metric], f"{p.label} {p.values[chosen.metric]:.4g}")
        for p in study.points
    ]


def _title(chosen: QualityControls, shown: Sequence[Shown]) -> str:
    if chosen.study == ALL:
        worst, best = (pick(shown, key=lambda s: s.change) for pick in (min, max))
        return (
            f"A smaller cache is not free, and not always worse: beside its own MHA, {best.label} is "
            f"{_verdict(best.change)}, {worst.label} {_verdict(worst.change)}."
        )
    least, study = min(shown, key=lambda s: s.point.cache_percent), shown[0].study
    base = study.point(study.baseline).values[chosen.metric]
    return (
        f"{study.label}: with {least.point.cache_percent:.3g}% of MHA's cache, {least.point.label} has "
        f"{chosen.metric} {least.value:.4g} instead of {base:.4g}, {_verdict(least.change)}."
    )


def _verdict(change: float) -> str:
    """_verdict(-1.26) == "1.3% worse"."""
    return f"{abs(change):.1f}% {'worse' if change < 0 else 'better'}"


def _table(shown: Sequence[Shown]) -> list[str]:
    rows = [["study and variant", "of MHA's cache", "measure", "value", "beside MHA"]]
    rows += [
        [f"{s.study.label}, {s.point.label}", f"{s.point.cache_percent:.3g}%", s.metric, f"{s.value:.4g}",
         f"{s.change:+.1f}%"] for s in shown
    ]  # fmt: skip
    return text_table(rows)


def _paid(chosen: QualityControls, studies: Sequence[Study]) -> list[str]:
    """One line a study: what each variant was paid with, and the table that says so."""
    lines = []
    for study in studies:
        if chosen.study in (ALL, study.id):
            groups = [(paid, [p.label for p in points]) for paid, points in groupby(study.points, key=lambda p: p.paid)]
            words = "; ".join(f"{', '.join(labels)}: {paid}" for paid, labels in groups)
            lines.append(f"{study.label}. {words}. [{study.source}]")
    return lines


def _marks(chosen: QualityControls, shown: Sequence[Shown]) -> list[Mark]:
    low, high, tick = _span([s.height for s in shown])
    lowest = LEAST_PERCENT if chosen.axis == "log" else 0.0

    def x(percent: float) -> float:
        share = log10(percent / lowest) / 2 if chosen.axis == "log" else percent / 100
        return LEFT + min(max(share, 0), 1) * (RIGHT - 40 - LEFT)

    def y(height: float) -> float:
        return BOTTOM - (height - low) / (high - low) * (BOTTOM - TOP)

    places = [(x(s.point.cache_percent), y(s.height)) for s in shown]
    marks = _axes(chosen, shown[0], (low, high, tick), x, y)
    for s, place in zip(shown, places, strict=True):
        marks += _dot(s, *place)
    return [*marks, *_labels(shown, places)]


def _axes(chosen: QualityControls, first: Shown, span: tuple[float, float, float], x: Scale, y: Scale) -> list[Mark]:
    low, high, tick = span
    percents = (1, 2, 5, 10, 20, 50, 100) if chosen.axis == "log" else (0, 20, 40, 60, 80, 100)
    marks: list[Mark] = [Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft"), Line(LEFT, TOP, LEFT, BOTTOM, "soft")]
    for percent in percents:
        marks += [Line(x(percent), TOP, x(percent), BOTTOM, "line", 0.3)]
        marks += [Words(x(percent), BOTTOM + 5, f"{percent}%", 10, "soft", "middle")]
    is_change = chosen.study == ALL
    for i in range(round((high - low) / tick) + 1):
        height = low + i * tick
        shown = height if is_change or first.study.is_higher_better else -height
        words = f"{shown:+g}%" if is_change and round(shown, 9) else plain(round(shown, 9))
        marks += [
            Line(LEFT, y(height), RIGHT, y(height), "soft" if is_change and not round(height, 9) else "line", 0.3)
        ]
        marks += [Words(LEFT - 5, y(height) - 6, words, 10, "soft", "end")]
    name = "quality beside MHA of the same study" if is_change else chosen.metric
    marks.append(Words(4, 6, f"{name}; up is better", 11))
    kept = "kept of a token, percent of the same model's MHA"
    return [*marks, Words((LEFT + RIGHT) / 2, BOTTOM + 22, kept, 11, "ink", "middle")]


def _dot(shown: Shown, x: float, y: float) -> list[Mark]:
    point = shown.point
    words = f"{shown.study.label}, {point.label}: {shown.metric} {shown.value:.4g} at {point.cache_percent:.3g}%"
    dot = Dot(x, y, SHAPES[point.kind], COLOURS[point.kind.upper()], 6, f"{words}; {point.paid}")
    return [dot, Dot(x, y, "circle", "ink", 2.5)] if point.kind == "mla" else [dot]


def _labels(shown: Sequence[Shown], places: Sequence[tuple[float, float]]) -> list[Mark]:
    """A label beside each dot, where it covers neither a dot nor another label; else where it covers the fewest."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    marks, known = list[Mark](), set[str]()
    for s, (x, y) in sorted(zip(shown, places, strict=True), key=lambda each: -each[1][1]):  # lowest first
        if s.label in known:  # all studies' MHA are one point
            continue
        known.add(s.label)
        width, options = text_width(s.label, 10) + 2, list[tuple[int, int]]()
        for i, (dx, dy, anchor) in enumerate(PLACES):
            box = _box(x + dx, y + dy, width, anchor)
            outside = box[0] < LEFT or box[2] > WIDTH_PX or box[1] < TOP - 12 or box[3] > BOTTOM
            options.append((sum(_meet(box, other) for other in taken) + 9 * outside, i))
        dx, dy, anchor = PLACES[min(options)[1]]
        taken.append(_box(x + dx, y + dy, width, anchor))
        marks.append(Words(x + dx, y + dy, s.label, 10, "ink", anchor))
    return marks


def _box(x: float, y: float, width: float, anchor: str) -> tuple[float, float, float, float]:
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor] * width
    return left, y, left + width, y + 12


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _span(heights: Sequence[float]) -> tuple[float, float, float]:
    """Ends of the axis, and the distance of its ticks: whole ticks round all heights."""
    tick = tick_of(max(heights) - min(heights) or abs(heights[0]) or 1.0)
    low, high = floor(min(heights) / tick - 0.3) * tick, ceil(max(heights) / tick + 0.3) * tick
    return low, high, tick
