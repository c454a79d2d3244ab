"""Stacked bars of milliseconds with a chosen one: what both pictures of step cost share."""

from collections.abc import Sequence
from typing import NamedTuple

from minivllm.views.sketch import WIDTH_PX, Box, Key, Line, Mark, Place, Words
from minivllm.views.theme import FAINT, OWNER_COLOURS

PARTS = {
    "weights": Key(OWNER_COLOURS[4], "solid", "reading the weights"),
    "kv": Key(OWNER_COLOURS[5], "solid", "reading K and V"),
    "arithmetic": Key(OWNER_COLOURS[2], "solid", "arithmetic that no read hides"),
    "overhead": Key(FAINT, "hatch", "overhead: time beyond the floor"),
}
COLUMNS = {"weights": "weights", "kv": "K and V", "arithmetic": "unhidden arithmetic", "overhead": "overhead"}
LEFT, TOP, BOTTOM = 56.0, 26.0, 270.0
HEIGHT = BOTTOM + 44


class StepParts(NamedTuple):
    """Milliseconds of one step; the first three sum to its floor."""

    weights: float
    kv: float
    arithmetic: float
    overhead: float = 0.0

    @property
    def floor(self) -> float:
        return self.weights + self.kv + self.arithmetic

    @property
    def total(self) -> float:
        return self.floor + self.overhead

    @property
    def regime(self) -> str:
        """The part that the step waits for: the host if it is late, else whichever is longer, K and V or products."""
        if self.overhead:
            return "overhead"
        if self.kv >= self.weights + self.arithmetic:
            return "kv"
        return "arithmetic" if self.arithmetic else "weights"


class Bar(NamedTuple):
    """One step, or one setting, of the chart."""

    label: str
    parts: StepParts
    words: str
    click: Place


def stacked_bars(bars: Sequence[Bar], chosen: int, x_label: str, num_fitting: int | None = None) -> list[Mark]:
    """Bars from left to right, linear from 0; the chosen one is framed. Labels where there is room.

    A dashed line stands behind the first `num_fitting` bars: what the others keep does not fit the card.
    """
    tick = tick_ms(max((bar.parts.total for bar in bars), default=1.0))
    highest = tick * 5
    marks: list[Mark] = [Words(4, 4, "milliseconds", 11), Line(LEFT, BOTTOM, WIDTH_PX - 8, BOTTOM, "soft")]
    for i in range(6):
        y = BOTTOM - i / 5 * (BOTTOM - TOP)
        marks += [Line(LEFT, y, WIDTH_PX - 8, y, "line", 0.3)]
        marks += [Words(LEFT - 5, y - 6, f"{tick * i:g}", 10, "soft", "end")]
    pitch = (WIDTH_PX - 8 - LEFT) / max(len(bars), 1)
    every = -(-34 // int(pitch)) if pitch >= 1 else len(bars)
    for i, bar in enumerate(bars):
        left, width = LEFT + i * pitch + pitch * 0.1, pitch * 0.8
        marks += _bar(bar, left, width, highest)
        if i == chosen:
            height = bar.parts.total / highest * (BOTTOM - TOP)
            marks.append(Box(left - 2, BOTTOM - height - 2, width + 4, height + 4, "pick", "outline", "pick"))
        if i % every == 0:
            marks.append(Words(left + width / 2, BOTTOM + 5, bar.label, 10, "soft", "middle"))
    if num_fitting is not None and num_fitting < len(bars):
        x = LEFT + num_fitting * pitch
        words = Words(WIDTH_PX - 8, 4, "right of the dashes: does not fit the card", 11, "ink", "end")
        marks += [Line(x, TOP - 6, x, BOTTOM, "ink", 2, True), words]
    return [*marks, Words((LEFT + WIDTH_PX) / 2, BOTTOM + 22, x_label, 11, "ink", "middle")]


def tick_ms(highest: float) -> float:
    """A fifth of the axis, 1, 2 or 5 times a power of ten: tick_ms(8.3) == 2."""
    power = 10.0**-9
    while True:
        for factor in (1, 2, 5):
            if 5 * factor * power >= highest:
                return float(f"{factor * power:.0e}")
        power *= 10


def _bar(bar: Bar, left: float, width: float, highest: float) -> list[Mark]:
    marks: list[Mark] = []
    floor = BOTTOM
    for name, value in zip(bar.parts._fields, bar.parts, strict=True):
        height = value / highest * (BOTTOM - TOP)
        if height > 0:
            floor -= height
            fill, pattern, _ = PARTS[name]
            marks.append(Box(left, floor, width, height, fill, pattern, "", bar.words, bar.click))
    return marks
