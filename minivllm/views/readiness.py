"""The readiness radar: twenty questions, a polygon of the share right by subject, and the notebook to start with.

Pick an answer (click a row, or the list), then hand it in; it counts once. The polygon's dashed ring is what guessing
gives. Answers are kept where guesses and tries are kept, and `begin again` draws other numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, pi, sin

from PIL import Image

from minivllm.course.diagnostic import Diagnostic, Item, Score, advice, scores
from minivllm.course.learner import open_records
from minivllm.course.multiple_choice import Option
from minivllm.course.records import Records
from minivllm.errors import MiniVLLMError
from minivllm.views.choice_rows import RIGHT, WRONG, answer_choice, rows
from minivllm.views.png import wrapped
from minivllm.views.sketch import (
    WIDTH_PX,
    Box,
    Choice,
    Control,
    Dot,
    Key,
    Line,
    Mark,
    SketchPicture,
    Slider,
    Words,
    accepted,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_png import sketch_image
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import FAINT, OWNER_COLOURS

SHAPE = OWNER_COLOURS[0]
RADIUS_PX, CENTRE_X, NOTHING_PX = 112.0, 190.0, 16.0  # 0% is a ring too: a polygon keeps its shape
LIST_X, SQUARE_PX = 400.0, 15.0
GUESSING = 0.25  # of four options
NUM_MISTAKES = 4  # below the pixels; the page and the text have all


@dataclass(frozen=True)
class RadarControls:
    """The question on the table, the option picked for it, and the question that was answered last."""

    item: int = 1
    picked: str = ""
    last: str = ""


class ReadinessPicture(SketchPicture):
    scores: list[Score]
    advice: str
    verdict: str


class ReadinessRadar(SketchView):
    """`ReadinessRadar()`: the learner's own; `ReadinessRadar(Kept("seed"))` keeps its answers nowhere."""

    def __init__(self, records: Records | None = None) -> None:
        self._diagnostic = Diagnostic(open_records() if records is None else records)
        self._controls = RadarControls(item=self._next_open(0))
        super().__init__()

    def drawn(self) -> ReadinessPicture:
        return draw(self._diagnostic.items, dict(self._diagnostic.answers), self._controls)

    def image(self) -> Image.Image:
        picture = self.drawn()
        picture["lines"] = picture["lines"][-NUM_MISTAKES:]
        return sketch_image(picture)

    def _moved(self, control: str, value: object) -> None:
        item = self._diagnostic.items[self._controls.item - 1]
        known = accepted(controls(self._diagnostic.items, self._diagnostic.answers, self._controls), control, value)
        if control == "item":
            self._controls = RadarControls(item=int(known))
        elif control == "answer":
            self._controls = replace(self._controls, picked=str(known), last="")
        elif control == "hand in" and known == "yes":
            if not self._controls.picked:
                raise MiniVLLMError("pick an answer first: click one of the rows, or use the list")
            self._diagnostic.hand_in(item.id, self._controls.picked)
            self._controls = RadarControls(item=self._next_open(self._controls.item), last=item.id)
        elif control == "begin again" and known == "yes":
            self._diagnostic.begin_again()
            self._controls = RadarControls()

    def _next_open(self, item: int) -> int:
        """The next question without an answer after number `item`, round the end; the last one when all are done."""
        names = [item.id for item in self._diagnostic.items]
        order = [*range(item + 1, len(names) + 1), *range(1, item + 1)]
        return next((i for i in order if names[i - 1] not in self._diagnostic.answers), len(names))


def draw(items: tuple[Item, ...], answers: Mapping[str, Option], chosen: RadarControls) -> ReadinessPicture:
    """The question on the table, the radar below it, and beside the radar a square for each question."""
    found = scores(items, answers)
    said, verdict, title = advice(found), _verdict(items, answers, chosen.last), _title(found)
    top = max(rows(item.question, 4, ())[1] for item in items)  # the same for every question: nothing jumps
    centre_y = top + 40 + 24 + RADIUS_PX
    return {
        "view": "readiness", "title": f"{title} {said}", "aria": f"Readiness radar. {title} {said}",
        "text": _text(items, answers, chosen, found, verdict), "status": "", "width": WIDTH_PX,
        "height": centre_y + 148,
        "marks": [*_question_marks(items, answers, chosen), *_verdict_marks(verdict, top), *_radar(found, centre_y),
                  *_list(items, answers, found, chosen, centre_y - RADIUS_PX - 6)],
        "controls": controls(items, answers, chosen), "steps": None,
        "legend": [Key(RIGHT, "solid", "right"), Key(WRONG, "hatch", "wrong"), Key(FAINT, "outline", "open")],
        "lines": _mistakes(items, answers), "lines_name": "what went wrong", "provenance": "", "scores": found,
        "advice": said, "verdict": verdict,
    }  # fmt: skip


def controls(items: tuple[Item, ...], answers: Mapping[str, Option], chosen: RadarControls) -> list[Control]:
    item = items[chosen.item - 1]
    is_over = item.id in answers
    hand_in = [("no", "done" if is_over else "not yet"), *([] if is_over else [("yes", "hand it in")])]
    return [
        Slider("item", "question", [*range(1, len(items) + 1)], chosen.item, f"{chosen.item} of {len(items)}"),
        answer_choice(item.question, chosen.picked, is_over),
        Choice("hand in", "hand in", hand_in, "no"),
        Choice("begin again", "begin again", [("no", "no"), ("yes", "forget my answers")], "no"),
    ]


def _title(found: list[Score]) -> str:
    right, answered = (sum(getattr(s, name) for s in found) for name in ("num_right", "num_answered"))
    total = sum(score.num_items for score in found)
    if not answered:
        return f"{total} questions, none answered yet."
    return f"{right} of {answered} right{'' if answered == total else f', {total - answered} to come'}."


def _verdict(items: tuple[Item, ...], answers: Mapping[str, Option], last: str) -> str:
    """One line on the question that was just answered."""
    for number, item in enumerate(items, 1):
        if item.id == last:
            option = answers[last]
            end = f"Right: {item.question.working}" if option.is_right else f"Not so. {option.diagnosis}"
            return f"Question {number}: {end}"
    return ""


def _mistakes(items: tuple[Item, ...], answers: Mapping[str, Option]) -> list[str]:
    """A line for each wrong answer: what was chosen, why it is wrong, and what is right."""
    return [
        f"{number}. “{given.words.removesuffix('.')}”: {given.diagnosis} Right: {item.question.right.words}"
        for number, item in enumerate(items, 1)
        if (given := answers.get(item.id)) and not given.is_right
    ]


def _text(
    items: tuple[Item, ...], answers: Mapping[str, Option], chosen: RadarControls, found: list[Score], verdict: str
) -> str:
    item = items[chosen.item - 1]
    head = [f"{_title(found)} {advice(found)}", verdict, f"Question {chosen.item}: {item.question.ask}"]
    options = [f"  {words}{_mark(answers.get(item.id), words[3:])}" for _, words in item.question.lettered()]
    table = [["subject", "right", "answered", "questions"]]
    table += [[f"{s.group} {s.title}", str(s.num_right), str(s.num_answered), str(s.num_items)] for s in found]
    return "\n".join([*filter(None, head), *options, *text_table(table), *_mistakes(items, answers)])


def _mark(answer: Option | None, words: str) -> str:
    if answer is None or answer.words != words:
        return ""
    return "  (right)" if answer.is_right else "  (wrong)"


def _question_marks(items: tuple[Item, ...], answers: Mapping[str, Option], chosen: RadarControls) -> list[Mark]:
    item = items[chosen.item - 1]
    letters = {option.words: letter for (letter, _), option in zip(
        item.question.lettered(), item.question.options, strict=True)}  # fmt: skip
    given = answers.get(item.id)
    tried = {letters[given.words], letters[item.question.right.words]} if given else set()
    marks, end = rows(item.question, 4, tried, chosen.picked, is_over=given is not None)
    if given:
        return marks
    ink = "ink" if chosen.picked else "soft"
    return [
        *marks,
        Words(68, end + 7, "hand it in", 12, ink, "middle"),
        Box(8, end + 2, 120, 24, FAINT, "outline", "pick" if chosen.picked else "", "counts once", ("hand in", "yes")),
    ]


def _verdict_marks(verdict: str, top: float) -> list[Mark]:
    """Beside the button: two lines, for the answer before."""
    lines = wrapped(verdict, WIDTH_PX - 200, 12)[:2] if verdict else []
    return [Words(140, top + 2 + 16 * i, line, 12) for i, line in enumerate(lines)]


def _radar(found: list[Score], centre_y: float) -> list[Mark]:
    """Rings at 25, 50 and 100%, an axis for each subject, and the polygon of those that were asked."""
    marks: list[Mark] = []
    for share in (GUESSING, 0.5, 1.0):
        ring = [_point(i, len(found), share, centre_y) for i in range(len(found))]
        is_guessing = share == GUESSING
        ink, thickness = ("soft", 1.0) if is_guessing else ("line", 0.5)
        marks += [Line(*a, *b, ink, thickness, is_guessing) for a, b in zip(ring, [*ring[1:], ring[0]], strict=True)]
    ends = [_point(i, len(found), 1.0, centre_y) for i in range(len(found))]
    starts = [_point(i, len(found), 0.0, centre_y) for i in range(len(found))]
    marks += [Line(*start, *end, "line", 0.5) for start, end in zip(starts, ends, strict=True)]
    corners = [_point(i, len(found), score.share, centre_y) for i, score in enumerate(found)]
    marks += [Line(*a, *b, SHAPE, 2.5) for a, b in zip(corners, [*corners[1:], corners[0]], strict=True)]
    for i, score in enumerate(found):
        if score.num_answered:
            shape = "circle" if score.num_answered == score.num_items else "diamond"
            words = f"{score.title}: {score.num_right} of {score.num_answered} right"
            marks.append(Dot(*corners[i], shape, SHAPE, 5, words))
        marks.append(_label(i, len(found), score, centre_y))
    caption = "Outer ring: all right; dashed: by guessing. Diamond: more to come. ?: none yet."
    return [*marks, Words(8, centre_y + RADIUS_PX + 18, caption, 10, "soft")]


def _label(index: int, number: int, score: Score, centre_y: float) -> Words:
    x, y = _point(index, number, 1.0, centre_y)
    aside = x - CENTRE_X
    anchor = "middle" if abs(aside) < 20 else "start" if aside > 0 else "end"
    share = f"{100 * score.share:.0f}%" if score.num_answered else "?"
    shift = {"middle": 0, "start": 7, "end": -7}[anchor]
    up = -18 if y < centre_y - RADIUS_PX + 5 else 4 if y > centre_y + 0.8 * RADIUS_PX else -7
    return Words(x + shift, y + up, f"{score.group}: {share}", 12, "ink", anchor)


def _point(index: int, number: int, share: float, centre_y: float) -> tuple[float, float]:
    """Axes go round from the top, clockwise."""
    angle = 2 * pi * index / number - pi / 2
    radius = NOTHING_PX + share * (RADIUS_PX - NOTHING_PX)
    return round(CENTRE_X + radius * cos(angle), 1), round(centre_y + radius * sin(angle), 1)


def _list(
    items: tuple[Item, ...], answers: Mapping[str, Option], found: list[Score], chosen: RadarControls, top: float
) -> list[Mark]:
    """A row for each subject: its letter, a square for each of its questions, its name. A square opens its question."""
    marks: list[Mark] = []
    for row, score in enumerate(found):
        y = top + row * 27
        marks += [Words(LIST_X, y, score.group, 12), Words(LIST_X + 78, y + 1, score.title, 11, "soft")]
        own = [(number, item) for number, item in enumerate(items, 1) if item.group == score.group]
        for column, (number, item) in enumerate(own):
            given = answers.get(item.id)
            fill, pattern = (FAINT, "outline") if given is None else (RIGHT, "solid") if given.is_right else (
                WRONG, "hatch")  # fmt: skip
            border = "pick" if number == chosen.item else ""
            words = f"question {number}"
            x = LIST_X + 18 + column * (SQUARE_PX + 4)
            marks.append(Box(x, y, SQUARE_PX, SQUARE_PX, fill, pattern, border, words, ("item", number)))
    return marks
