"""Two runs of one text, step by step: how far their logits lie apart, beside what decides which token is chosen.

A token can only change where twice the greatest difference reaches the lead of the best logit over the second.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log10
from typing import NamedTuple

import numpy as np

from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Dot, Key, Line, Mark, SketchPicture, Words, seek, with_control
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import OWNER_COLOURS, clipped, counted, visible

LEFT, RIGHT, TOP, BOTTOM = 64.0, WIDTH_PX - 12.0, 24.0, 250.0  # the plot, in pixels
LOW, HIGH = -8, 2  # powers of ten of the axis; what is less stands at its foot
Logits = np.ndarray  # [steps, vocab]
TokenText = Callable[[int], str]
KEYS = {
    "difference": Key(OWNER_COLOURS[0], "solid", "circle: greatest difference of any logit"),
    "lead": Key(OWNER_COLOURS[1], "solid", "diamond: lead of the best logit over the second"),
    "equal": Key(OWNER_COLOURS[2], "solid", "bar: both chose this token"),
    "unequal": Key(OWNER_COLOURS[5], "cross", "crossed bar: they chose different tokens"),
}


class Difference(NamedTuple):
    """One step of two runs."""

    step: int
    greatest: float  # of |one - other| over the vocabulary
    largest: float  # of |one|
    lead: float  # best minus second of `one`
    chosen: tuple[int, int]  # token ids

    @property
    def is_equal(self) -> bool:
        return self.chosen[0] == self.chosen[1]


@dataclass(frozen=True)
class DifferenceControls:
    """What the reader chose."""

    pair: str
    step: int


class DifferencePicture(SketchPicture):
    step: int
    differences: list[Difference]
    tolerance: float


class LogitDifference(SketchView):
    """`LogitDifference({"with and without": (logits, logits)}, llm.tokenizer.decode)`; controls: pair, step.

    Logits are [steps, vocab], from which each token was chosen. Behind the first step where the tokens differ the two
    runs continue different texts, so nothing is compared there.
    """

    def __init__(
        self, pairs: Mapping[str, tuple[Logits, Logits]], token_text: Callable[[list[int]], str] | None = None,
        tolerance: float = 1e-3,
    ) -> None:  # fmt: skip
        if not pairs:
            raise MiniVLLMError("LogitDifference draws one pair at least: give {name: (logits, logits)}")
        if not tolerance > 0:
            raise MiniVLLMError(f"tolerance must be above 0, not {tolerance!r}")
        self._measured = {name: measure(name, *pair) for name, pair in pairs.items()}
        self._text: TokenText = lambda token_id: visible(token_text([token_id])) if token_text else str(token_id)
        self._tolerance = tolerance
        first = next(iter(self._measured))
        self._controls = DifferenceControls(first, len(self._measured[first]))
        super().__init__()

    def drawn(self) -> DifferencePicture:
        return draw(self._measured, self._text, self._tolerance, self._controls)

    def _moved(self, control: str, value: object) -> None:
        picture = self.drawn()
        if control == "step":
            self._controls = replace(self._controls, step=seek(picture["steps"], value))
        else:
            self._controls = with_control(self._controls, picture["controls"], control, value)


def measure(name: str, one: Logits, other: Logits) -> list[Difference]:
    """Compare step by step, up to the first that chose different tokens. Raises MiniVLLMError for other shapes."""
    if one.ndim != 2 or one.shape != other.shape or one.shape[0] < 1 or one.shape[1] < 2:
        raise MiniVLLMError(f"{name}: give two arrays [steps, vocab] alike, not {one.shape} and {other.shape}")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise MiniVLLMError(f"{name}: logits must be finite numbers; take them before tokens are ruled out")
    found: list[Difference] = []
    for step, (a, b) in enumerate(zip(one.astype(np.float64), other.astype(np.float64), strict=True), 1):
        second, best = np.partition(a, -2)[-2:]
        chosen = int(a.argmax()), int(b.argmax())
        found.append(
            Difference(step, np.abs(a - b).max().item(), np.abs(a).max().item(), (best - second).item(), chosen)
        )
        if not found[-1].is_equal:
            break
    return found


def draw(
    measured: Mapping[str, list[Difference]], text: TokenText, tolerance: float, chosen: DifferenceControls
) -> DifferencePicture:
    """All steps of one pair on a logarithmic axis, and one of them in words."""
    differences = measured[chosen.pair]
    step = min(chosen.step, len(differences))
    title = _title(chosen.pair, differences, step, text)
    marks = [*_axes(tolerance), *_steps(differences, step, text)]
    kinds = ["difference", "lead", "equal", *([] if differences[-1].is_equal else ["unequal"])]
    return {
        "view": "logit-difference", "title": title, "aria": f"Differences of logits. {title}",
        "text": "\n".join([title, *text_table(_table(differences, text)), *_lines(differences, tolerance)]),
        "status": "", "width": WIDTH_PX, "height": BOTTOM + 74, "marks": marks,
        "controls": [Choice("pair", "compare", [(name, name) for name in measured], chosen.pair)],
        "steps": (1, len(differences), step), "legend": [KEYS[kind] for kind in kinds],
        "lines": _lines(differences, tolerance), "lines_name": "over all steps", "provenance": "",
        "step": step, "differences": differences, "tolerance": tolerance,
    }  # fmt: skip


def _title(pair: str, differences: Sequence[Difference], step: int, text: TokenText) -> str:
    at = differences[step - 1]
    num_equal = sum(each.is_equal for each in differences)
    apart = f"differ by {_number(at.greatest)} at most" if at.greatest else "are equal in every bit"
    one, other = (clipped(text(token_id), 16) for token_id in at.chosen)
    said = f"both choose {one}" if at.is_equal else f"one chooses {one}, the other {other}"
    return (
        f"{pair}, step {step}: logits as large as {at.largest:.1f} {apart}, the best leads by {_number(at.lead)}:"
        f" {said}. {num_equal} of {counted(len(differences), 'token')} {'is' if num_equal == 1 else 'are'} equal."
    )


def _lines(differences: Sequence[Difference], tolerance: float) -> list[str]:
    greatest = max(each.greatest for each in differences)
    within = "below" if greatest < tolerance else "NOT below"
    closest = min(differences, key=lambda each: each.lead - 2 * each.greatest)
    verdict = "could not have changed the token" if 2 * closest.greatest < closest.lead else "could have changed it"
    lines = [
        f"greatest difference of all steps: {_number(greatest)}, {within} the tolerance of {_number(tolerance)}",
        f"closest call: step {closest.step}, where the best leads by {_number(closest.lead)};"
        f" twice the difference, {_number(2 * closest.greatest)}, {verdict}",
    ]
    if not differences[-1].is_equal:
        lines.append(f"compared up to step {differences[-1].step}: from there on the texts are different")
    return lines


def _axes(tolerance: float) -> Iterator[Mark]:
    yield Words(4, 2, "logits, log scale", 11)
    limit = _y(tolerance)
    for power in range(LOW, HIGH + 1, 2):
        y = _y(10.0**power)
        yield Line(LEFT, y, RIGHT, y, "line", 0.3)
        if abs(y - limit) > 12:
            yield Words(LEFT - 6, y - 6, f"1e{power}" if power else "1", 10, "soft", "end")
    yield Line(LEFT, limit, RIGHT, limit, "ink", 1, True)
    yield Words(LEFT - 6, limit - 6, "tolerance", 10, "ink", "end")
    yield Words((LEFT + RIGHT) / 2, BOTTOM + 54, "step, and the token it chose", 11, "ink", "middle")


def _steps(differences: Sequence[Difference], shown: int, text: TokenText) -> Iterator[Mark]:
    pitch = (RIGHT - LEFT) / len(differences)
    for i, at in enumerate(differences):
        left, middle = LEFT + i * pitch, LEFT + (i + 0.5) * pitch
        said = " / ".join(dict.fromkeys(text(token_id) for token_id in at.chosen))
        words = f"step {at.step}, {said}: differ by {_number(at.greatest)}, the best leads by {_number(at.lead)}"
        is_shown = at.step == shown
        yield Box(left + 1, TOP - 6, pitch - 2, BOTTOM + 54 - TOP, "page", "solid", "pick" if is_shown else "", words,
                  ("step", at.step))  # fmt: skip
        yield Line(middle, _y(at.greatest), middle, _y(at.lead), "line", 1)
        yield Dot(middle, _y(at.lead), "diamond", KEYS["lead"].fill, 6, words)
        yield Dot(middle, _y(at.greatest), "circle", KEYS["difference"].fill, 5, words)
        if not at.greatest:
            yield Words(middle + 7, _y(0) - 14, "0", 10)
        fill, pattern, _ = KEYS["equal" if at.is_equal else "unequal"]
        yield Box(left + 3, BOTTOM + 8, pitch - 6, 8, fill, pattern, "", words, ("step", at.step))
        yield Words(middle, BOTTOM + 18, clipped(said, max(int(pitch / 5.6), 1)), 9, "ink", "middle")
        if len(differences) <= 32 or at.step % 5 == 0:
            yield Words(middle, BOTTOM + 30, str(at.step), 9, "ink" if is_shown else "soft", "middle")


def _table(differences: Sequence[Difference], text: TokenText) -> list[list[str]]:
    rows = [["step", "greatest difference", "lead of the best", "tokens"]]
    for at in differences:
        both = " ≠ ".join(dict.fromkeys(text(token_id) for token_id in at.chosen))
        rows.append([str(at.step), _number(at.greatest), _number(at.lead), both])
    return rows


def _y(value: float) -> float:
    """Pixels from the top; what is below the axis stands at its foot."""
    share = (log10(max(value, 10.0**LOW)) - LOW) / (HIGH - LOW)
    return BOTTOM - min(share, 1) * (BOTTOM - TOP)


def _number(value: float) -> str:
    """_number(0.000031) == "3.1e-05"; _number(11.22) == "11.2"."""
    return f"{value:.1e}" if 0 < value < 0.01 else f"{value:.3g}"
