"""Flash cards in a notebook: the round of `minivllm quiz` behind fields and buttons, saved to the same file.

The round itself is course/quiz.py's pure functions; this view turns a round into a picture and a click into a line.
"""

import os
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from minivllm.course import quiz
from minivllm.course.learner import EXAMPLE
from minivllm.course.progress import Progress, ProgressFile
from minivllm.course.quiz import Round
from minivllm.errors import MiniVLLMError
from minivllm.views.picture import Picture
from minivllm.views.png import Canvas
from minivllm.views.theme import NEUTRAL, counted
from minivllm.views.widget import View, script

WIDTH_PX = 760
DRAWABLE = str.maketrans({"²": "^2", "√": "root of ", "ρ": "rho"})  # not in the PNG's font
COMMANDS = {"show points": "", "give up": "?", "other numbers": "r", "skip": "s", "end": "q"}


class CardsPicture(Picture):
    """Everything the browser draws. `key` changes when the form under the question must be a new one."""

    key: str
    kind: str  # words, number, ticking or ended
    head: str
    ask: str
    points: list[str]
    said: str
    left: str


def cards_picture(round_: Round, said: str) -> CardsPicture:
    """The card on the table, and what was said of the answer before."""
    left = f"{counted(len(round_.queue), 'card')} to come, {round_.num_good} of {round_.num_reviewed} went well"
    if round_.stage == "ended":
        kind, head, ask, points = "ended", "The round is over", "Press “another round” for the next cards.", []
    else:
        question = round_.card.question
        is_ticking = round_.stage == "ticking"
        kind = "ticking" if is_ticking else "number" if round_.card.is_numeric else "words"
        head = f"{question.id} · {question.level}"
        ask = round_.problem.ask if round_.card.is_numeric else question.stem
        points = list(question.points) if is_ticking else []
    boxes = "".join(f"\n[ ] {i}. {point}" for i, point in enumerate(points, 1))
    place = f"{round_.card.id}/{round_.num_redraws}" if round_.queue else ""
    return {
        "title": f"Flash cards: {head}",
        "aria": f"Flash card {head}. {ask} {said}",
        "text": "\n".join(filter(None, [said, f"[{head}] {ask}{boxes}", left])),
        "status": "",
        "key": f"{round_.num_reviewed}/{len(round_.queue)}/{kind}/{place}/{round_.num_tries}",
        "kind": kind, "head": head, "ask": ask, "points": points, "said": said, "left": left,
    }  # fmt: skip


class FlashCards(View):
    """`FlashCards("C")`: a round on group C, spaced by what earlier rounds and the terminal have left to review.

    `FlashCards(cards=("A1", "B2.num"))` asks these cards, whether due or not. Raises ConfigError for one there is not.
    """

    _esm = script("flash_cards.js")

    def __init__(
        self, group: str = "", num: int = 10, is_due_only: bool = False, store: ProgressFile | None = None,
        cards: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._store = store or _own_store()
        self._choice, self._cards = (group.upper(), num, is_due_only), tuple(cards)
        self._round, self._said = self._begin()
        super().__init__()

    @property
    def progress(self) -> Progress:
        """What the round has made of the progress so far."""
        return self._round.progress

    def drawn(self) -> CardsPicture:
        return cards_picture(self._round, self._said)

    def image(self) -> Image.Image:
        picture = self.drawn()
        canvas = Canvas(WIDTH_PX, 600)
        canvas.text(8, 6, picture["title"], 13)
        y = canvas.paragraph(8, 28, picture["ask"], WIDTH_PX - 16, 13) + 6
        for point in picture["points"]:
            canvas.box((10, y + 2, 10, 10), border=NEUTRAL)
            y = canvas.paragraph(28, y, point.translate(DRAWABLE), WIDTH_PX - 40) + 2
        for line in picture["said"].translate(DRAWABLE).split("\n"):
            y = canvas.paragraph(8, y, line, WIDTH_PX - 16)
        y = canvas.paragraph(8, y + 4, picture["left"], WIDTH_PX - 16, 11)
        return canvas.image.crop((0, 0, canvas.image.width, min(canvas.image.height, int(2 * y) + 8)))

    def _begin(self) -> tuple[Round, str]:
        letters, num, is_due_only = self._choice
        round_, text = quiz.begin(self._store.load(), datetime.now(UTC), letters, num, is_due_only, ids=self._cards)
        return round_, text if round_.stage == "ended" else ""

    def _moved(self, control: str, value: object) -> None:
        if control == "another round":
            self._round, self._said = self._begin()
            return
        after, text = quiz.answer(self._round, _line(control, value), datetime.now(UTC))
        self._store.save_reviews(self._round.progress, after.progress)
        self._round, self._said = after, _without_card(after, text)


def _own_store() -> ProgressFile:
    """The learner's file; while notebooks are built, one that nobody has learned with."""
    is_example = os.environ.get(EXAMPLE) == "example"
    return ProgressFile(Path(tempfile.mkdtemp()) / "progress.json" if is_example else None)


def _line(control: str, value: object) -> str:
    """A click as the line that a terminal would send. Raises MiniVLLMError for a control that there is not."""
    if control == "answer" and isinstance(value, str):
        return value[:200]
    if control == "ticks" and isinstance(value, Sequence) and all(isinstance(tick, int) for tick in value):
        return " ".join(map(str, value)) or "none"
    if control in COMMANDS:
        return COMMANDS[control]
    raise MiniVLLMError(f"there is no control {control!r} for {value!r}; answer with a number and its unit")


def _without_card(round_: Round, text: str) -> str:
    """What was said, without the next card and the key points: the view draws those itself."""
    if round_.stage == "ticking":
        return ""
    return text if round_.stage == "ended" else text.removesuffix(quiz.shown(round_)).rstrip()
