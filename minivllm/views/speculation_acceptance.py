"""Acceptance by position, as an engine counted it: bars with their number of drafts, beside the formula's one alpha.

The closed form takes every draft to be accepted with the same chance. Counted, later positions differ: drafts lean on
drafts, and what got that far was easy. Mean tokens of a round are shown by both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.course.calculators import expected_tokens
from minivllm.course.speculation_records import Positions
from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import (
    WIDTH_PX,
    Box,
    Choice,
    Control,
    Key,
    Line,
    Mark,
    SketchPicture,
    Words,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import OWNER_COLOURS, clipped, counted

LEFT, RIGHT, TOP, BOTTOM = 52.0, WIDTH_PX - 16.0, 30.0, 240.0
PATTERNS = ("solid", "hatch", "dots", "outline")
SHOWN = {"rates": "of those judged at the position", "shares": "of all rounds"}
ALL = "all"


@dataclass(frozen=True)
class AcceptanceControls:
    method: str = ALL
    show: str = "rates"


class AcceptancePicture(SketchPicture):
    bars: dict[str, list[float]]  # by method
    means: dict[str, tuple[float, float]]  # tokens of a round: counted, by the formula


class AcceptanceBars(SketchView):
    """`AcceptanceBars(positions_of(trace.of(DraftJudged)))`; controls: method, show."""

    def __init__(self, found: Sequence[Positions], **chosen: str) -> None:
        if not found or not all(isinstance(one, Positions) for one in found):
            raise MiniVLLMError(
                "AcceptanceBars draws Positions (positions_of(events)), one for each proposer that drafted"
            )
        self._found = {one.method: one for one in found[: len(PATTERNS)]}
        self._controls = AcceptanceControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> AcceptancePicture:
        return draw(self._controls, self._found)

    def _moved(self, control: str, value: object) -> None:
        self._controls = with_control(self._controls, controls(self._controls, self._found), control, value)


def controls(chosen: AcceptanceControls, found: dict[str, Positions]) -> list[Control]:
    options = [(ALL, "all"), *((name, name) for name in found)]
    return [
        Choice("method", "proposer", options, chosen.method),
        Choice("show", "accepted", list(SHOWN.items()), chosen.show),
    ]


def draw(chosen: AcceptanceControls, found: dict[str, Positions]) -> AcceptancePicture:
    """Bars by position, and the mean tokens of a round."""
    shown = {name: one for name, one in found.items() if chosen.method in (ALL, name)}
    bars = {name: getattr(one, chosen.show) for name, one in shown.items()}
    means = {name: (one.mean_length, by_formula(one)) for name, one in shown.items()}
    title = _title(shown, means)
    styles = _styles(found)
    return {
        "view": "acceptance-bars", "title": title, "aria": f"Acceptance by position. {title}",
        "text": _text(title, chosen, shown), "status": "", "width": WIDTH_PX, "height": BOTTOM + 40,
        "marks": _marks(chosen, shown, styles), "controls": controls(chosen, found), "steps": None,
        "legend": [Key(*styles[name], f"{name}; dashed line: alpha {one.alpha:.2f} at every position") for name, one in
                   shown.items()],
        "lines": [_counted_line(name, one) for name, one in shown.items()],
        "lines_name": "tokens of a round", "provenance": "counted from the engine's events DraftJudged",
        "bars": bars, "means": means,
    }  # fmt: skip


def _counted_line(name: str, one: Positions) -> str:
    alpha = f"{sum(one.accepted)} / {sum(one.reached)}"
    formula = f"{by_formula(one):.3f} by (1 − alpha^(k+1)) / (1 − alpha) with alpha = {alpha}"
    return f"{name}: {one.mean_length:.3f} tokens a round as counted, {formula}"


def by_formula(one: Positions) -> float:
    """Expected tokens with one alpha for all positions; shorter rounds make it an upper figure."""
    return float(expected_tokens(min(one.alpha, 1.0), len(one.reached)))


def _styles(found: dict[str, Positions]) -> dict[str, tuple[str, str]]:
    return {name: (OWNER_COLOURS[i], PATTERNS[i]) for i, name in enumerate(found)}


def _title(shown: dict[str, Positions], means: dict[str, tuple[float, float]]) -> str:
    parts = [
        f"{name} kept {one.rates[0]:.0%} of its first drafts and {one.rates[-1]:.0%} of those at position"
        f" {len(one.rates)} that were reached: {means[name][0]:.2f} tokens a round"
        for name, one in shown.items()
    ]
    return clipped("; ".join(parts) + ".", 260)


def _text(title: str, chosen: AcceptanceControls, shown: dict[str, Positions]) -> str:
    longest = max(len(one.reached) for one in shown.values())
    rows = [[f"accepted, {SHOWN[chosen.show]}", *(f"{i + 1}" for i in range(longest)), "mean", "formula"]]
    for name, one in shown.items():
        whole = one.reached if chosen.show == "rates" else (one.num_rounds,) * len(one.reached)
        cells = [f"{kept}/{n}" for kept, n in zip(one.accepted, whole, strict=True)]
        cells += ["–"] * (longest - len(cells))
        rows.append([name, *cells, f"{one.mean_length:.2f}", f"{by_formula(one):.2f}"])
    return "\n".join([title, *text_table(rows)])


def _marks(chosen: AcceptanceControls, shown: dict[str, Positions], styles: dict[str, tuple[str, str]]) -> list[Mark]:
    longest = max(len(one.reached) for one in shown.values())
    group = (RIGHT - LEFT) / longest
    bar = min(54.0, (group - 14) / len(shown))
    marks: list[Mark] = [Words(4, 4, f"accepted, {SHOWN[chosen.show]}", 11), Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft")]
    for tick in (0.25, 0.5, 0.75, 1.0):
        y = _y(tick)
        marks += [Line(LEFT, y, RIGHT, y, "line", 0.3), Words(LEFT - 5, y - 6, f"{tick:.0%}", 10, "soft", "end")]
    for i in range(longest):
        start = LEFT + i * group + (group - bar * len(shown)) / 2
        marks.append(Words(LEFT + (i + 0.5) * group, BOTTOM + 5, f"{i + 1}", 11, "soft", "middle"))
        for j, (name, one) in enumerate(shown.items()):
            if i < len(one.reached):
                marks += _bar(chosen, one, i, start + j * bar, bar, styles[name])
    for name, one in shown.items():
        powers = [i + 1 if chosen.show == "shares" else 1 for i in range(len(one.reached))]
        spots = [(LEFT + i * group, _y(one.alpha**power)) for i, power in enumerate(powers)]
        marks += [Line(x, y, x + group, y, styles[name][0], 2, True) for x, y in spots]
    return [*marks, Words((LEFT + RIGHT) / 2, BOTTOM + 22, "position of the draft in its round", 11, "ink", "middle")]


def _bar(
    chosen: AcceptanceControls, one: Positions, i: int, x: float, width: float, style: tuple[str, str]
) -> list[Mark]:
    value: float = getattr(one, chosen.show)[i]
    num = one.reached[i] if chosen.show == "rates" else one.num_rounds
    words = f"{one.method}, position {i + 1}: {one.accepted[i]} of {counted(num, 'draft')}"
    return [
        Box(x, _y(value), width - 4, BOTTOM - _y(value), *style, "", words),
        Words(x + width / 2 - 2, _y(value) - 25, f"{value:.0%}", 11, "ink", "middle"),
        Words(x + width / 2 - 2, _y(value) - 13, f"n {num}", 9, "soft", "middle"),
    ]


def _y(share: float) -> float:
    return BOTTOM - share * (BOTTOM - TOP - 26)
