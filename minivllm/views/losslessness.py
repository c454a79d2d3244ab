"""The losslessness lab: how often each outcome came under a rule of acceptance, beside what the target promises.

A chi-square test says whether the difference is more than chance. With few samples it lets a broken rule pass, so the
number of samples is a control: a test without power proves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.course.speculation_records import Trial
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
    Slider,
    Value,
    Words,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import OWNER_COLOURS

LEFT, RIGHT, TOP, BOTTOM = 52.0, WIDTH_PX - 16.0, 26.0, 230.0
EXPECTED, SEEN, FAR = OWNER_COLOURS[0], OWNER_COLOURS[1], OWNER_COLOURS[5]
LEVEL = 0.01  # below it the test fails


@dataclass(frozen=True)
class LabControls:
    rule: str
    samples: int


class LabPicture(SketchPicture):
    p_value: float
    is_passed: bool
    distance: float  # total variation


class Losslessness(SketchView):
    """`Losslessness(trials())`; controls: rule, samples."""

    def __init__(self, found: Sequence[Trial], **chosen: Value) -> None:
        if not found or not all(isinstance(one, Trial) for one in found):
            raise MiniVLLMError("Losslessness draws Trials (minivllm/lab/losslessness.py: trials())")
        self._found = {one.name: one for one in found}
        self._controls = LabControls(found[0].name, max(found[0].counts))
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> LabPicture:
        return draw(self._controls, self._found)

    def _moved(self, control: str, value: object) -> None:
        chosen = with_control(self._controls, controls(self._controls, self._found), control, value)
        counts = self._found[chosen.rule].counts
        samples = chosen.samples if chosen.samples in counts else max(counts)
        self._controls = LabControls(chosen.rule, samples)


def controls(chosen: LabControls, found: dict[str, Trial]) -> list[Control]:
    sizes: list[Value] = [*sorted(found[chosen.rule].counts)]
    return [
        Choice("rule", "rule", [(name, name) for name in found], chosen.rule),
        Slider("samples", "samples", sizes, chosen.samples, f"{chosen.samples:,} samples"),
    ]


def draw(chosen: LabControls, found: dict[str, Trial]) -> LabPicture:
    """Pairs of bars, and the test's verdict."""
    trial = found[chosen.rule]
    p_value, distance = trial.p_value(chosen.samples), trial.total_variation(chosen.samples)
    is_passed = p_value > LEVEL
    verdict = "passes" if is_passed else "fails"
    found_words = f"{p_words(p_value)}, total variation {distance:.4f}"
    title = f"“{chosen.rule}” {verdict} after {chosen.samples:,} samples: {found_words}."
    return {
        "view": "losslessness", "title": title, "aria": f"Losslessness. {title}", "text": _text(title, chosen, found),
        "status": "", "width": WIDTH_PX, "height": BOTTOM + 40, "marks": _marks(trial, chosen.samples),
        "controls": controls(chosen, found), "steps": None,
        "legend": [Key(EXPECTED, "solid", "chance under the target"), Key(SEEN, "hatch", "share seen"),
                   Key(FAR, "hatch", "seen, and more than 4 standard errors away")],
        "lines": _lines(trial, chosen.samples),
        "lines_name": "the test", "provenance": "minivllm/lab/losslessness.py, seeded",
        "p_value": p_value, "is_passed": is_passed, "distance": distance,
    }  # fmt: skip


def _lines(trial: Trial, num: int) -> list[str]:
    degrees = sum(chance > 0 for chance in trial.expected) - 1
    return [
        f"chi-square, the sum of (seen − expected)^2 / expected: {trial.chi_square(num):,.1f} with {degrees} degrees "
        f"of freedom; {p_words(trial.p_value(num))}; the test passes above {LEVEL}"
    ]


def p_words(p_value: float) -> str:
    """p_words(0.31) == "p = 0.31"; tiny ones are not printed to the last digit."""
    return f"p = {p_value:.2g}" if p_value >= 1e-6 else "p below one in a million"


def _text(title: str, chosen: LabControls, found: dict[str, Trial]) -> str:
    sizes = sorted(found[chosen.rule].counts)
    rows = [["p-value by samples", *(f"{size:,}" for size in sizes), "total variation"]]
    for name, trial in found.items():
        cells = [f"{trial.p_value(size):.2g}" if size in trial.counts else "–" for size in sizes]
        cells = ["< 1e-6" if cell != "–" and float(cell) < 1e-6 else cell for cell in cells]
        rows.append([name, *cells, f"{trial.total_variation(max(trial.counts)):.4f}"])
    return "\n".join([title, *text_table(rows)])


def _marks(trial: Trial, num: int) -> list[Mark]:
    seen = [count / num for count in trial.counts[num]]
    top = max(*seen, *trial.expected) * 1.1
    group = (RIGHT - LEFT) / len(seen)
    bar = group / 2 - 2

    def y_of(share: float) -> float:
        return BOTTOM - share / top * (BOTTOM - TOP)

    marks: list[Mark] = [Words(4, 4, "share of samples", 11), Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft")]
    for i in range(5):
        share = top * i / 4
        marks += [Line(LEFT, y_of(share), RIGHT, y_of(share), "line", 0.3)]
        marks += [Words(LEFT - 5, y_of(share) - 6, f"{share:.0%}", 10, "soft", "end")]
    for i, (word, chance, share) in enumerate(zip(trial.outcomes, trial.expected, seen, strict=True)):
        x = LEFT + i * group + 1
        error = (chance * (1 - chance) / num) ** 0.5
        fill = FAR if abs(share - chance) > 4 * error else SEEN
        told = f"{word}: expected {chance:.4f}, seen {share:.4f}"
        marks.append(Box(x, y_of(chance), bar, BOTTOM - y_of(chance), EXPECTED, "solid", "", told))
        marks.append(Box(x + bar, y_of(share), bar, BOTTOM - y_of(share), fill, "hatch", "", told))
        marks.append(Words(x + bar, BOTTOM + 4, word, 11, "ink", "middle"))
    return [*marks, Words((LEFT + RIGHT) / 2, BOTTOM + 22, "the two tokens of a sample", 11, "ink", "middle")]
