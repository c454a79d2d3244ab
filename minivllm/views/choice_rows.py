"""A multiple-choice question as marks: what is asked, a row for each option, and what became of an answer."""

from collections.abc import Collection

from minivllm.course.judge import LETTERS
from minivllm.course.multiple_choice import MultipleChoice
from minivllm.views.png import wrapped
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Mark, Place, Words
from minivllm.views.theme import FAINT, OWNER_COLOURS

RIGHT, WRONG = OWNER_COLOURS[2], OWNER_COLOURS[5]
ROW_PX, LINE_PX = 26.0, 18.0
TEXT_PX = WIDTH_PX - 90.0  # browsers' letters are wider than the PNG's


def rows(
    question: MultipleChoice, top: float, tried: Collection[str], picked: str = "", *, is_over: bool = False
) -> tuple[list[Mark], float]:
    """The marks from `top` on, and where they end; `tried` letters show their verdict, the others can be clicked."""
    marks: list[Mark] = []
    y = top
    for line in wrapped(question.ask, TEXT_PX, 13):
        marks.append(Words(8, y, line, 13))
        y += LINE_PX
    y += 6
    for letter, option in zip(LETTERS, question.options, strict=False):
        verdict = _verdict(letter in tried, option.is_right)
        click = None if is_over or verdict else ("answer", letter)
        marks += _row(f"{letter}) {option.words}", y, verdict, click, is_picked=letter == picked)
        y += ROW_PX
    return marks, y


def answer_choice(question: MultipleChoice, value: str, is_over: bool) -> Choice:
    """The same options as a list, for the keyboard; nothing to choose once it is answered."""
    nothing = [("", "answered" if is_over else "choose …")]
    return Choice("answer", "answer", nothing if is_over else [*nothing, *question.lettered()], value)


def _verdict(is_tried: bool, is_right: bool) -> str:
    return ("right" if is_right else "wrong") if is_tried else ""


def _row(words: str, y: float, verdict: str, click: Place | None, *, is_picked: bool) -> list[Mark]:
    """One option: green and solid when right, hatched when wrong, framed when picked, and in words."""
    fill, pattern = {"right": (RIGHT, "solid"), "wrong": (WRONG, "hatch"), "": (FAINT, "outline")}[verdict]
    said = verdict or ("picked" if is_picked else "")
    marks: list[Mark] = [Box(8, y, 20, ROW_PX - 5, fill, pattern)] if verdict else []
    marks += [
        Words(34, y + 4, said, 11),
        Words(78, y + 4, words, 12),
        # last, so that a click on the letters is a click on the row
        Box(8, y, WIDTH_PX - 16, ROW_PX - 5, FAINT, "outline", "pick" if is_picked else "", "", click),
    ]
    return marks
