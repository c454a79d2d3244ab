"""A round of flash cards as pure functions: (round, line typed) -> (round, text to show). No terminal in here.

A card in words is answered in one's head or in a line, then ticked off point by point; a numeric card is graded, a
wrong answer gets its slip's name and one more try. Each graded card is a review in `progress`, for the caller to save.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from minivllm.course.calculators.units import counted
from minivllm.course.deck import Card, chosen_cards, named_cards, next_due, problem_for
from minivllm.course.numeric_forms import Problem, grade
from minivllm.course.progress import Progress
from minivllm.course.questions import Question
from minivllm.course.spacing import AGAIN, EASY, GOOD, HARD, reviewed

Stage = Literal["asked", "ticking", "ended"]
MOST_TRIES = 2
MOST_REDRAWS = 50
HELP = "Commands: ? shows the answer, r draws other numbers, s skips the card, q ends the round."


@dataclass(frozen=True)
class Round:
    """The cards yet to come, the first of them on the table."""

    progress: Progress
    queue: tuple[Card, ...]
    stage: Stage
    num_reviewed: int = 0
    num_good: int = 0
    num_tries: int = 0
    num_redraws: int = 0
    slip: str = ""  # the first one made on this card
    is_fuzzed: bool = True

    @property
    def card(self) -> Card:
        return self.queue[0]

    @property
    def problem(self) -> Problem:
        """The numbers on the table, of a numeric card."""
        return problem_for(self.card, self.progress, self.num_redraws)


def begin(
    progress: Progress, now: datetime, letters: Collection[str] = (), num: int = 10, is_due_only: bool = False,
    is_fuzzed: bool = True, ids: Sequence[str] = (),
) -> tuple[Round, str]:  # fmt: skip
    """Choose the cards, or take those with these ids, and show the first one."""
    queue = named_cards(ids) or chosen_cards(progress, now, letters, num, is_due_only)
    round_ = Round(progress, queue, "asked" if queue else "ended", is_fuzzed=is_fuzzed)
    if not queue:
        due = next_due(progress, letters)
        later = f"; the next card is due {due:%Y-%m-%d %H:%M} UTC" if due else "; leave --due out to see new cards"
        return round_, f"Nothing is due{later}."
    return round_, f"{counted(len(queue), 'cards')}. {HELP}\n\n{shown(round_)}"


def answer(round_: Round, line: str, now: datetime) -> tuple[Round, str]:
    """Take one line from the learner: an answer, ticks, or a command."""
    text = line.strip()
    if round_.stage == "ended":
        return round_, "The round is over."
    match text.lower():
        case "q":
            return _ended(round_)
        case "s":
            return _next(round_, "Skipped.", is_reviewed=False)
        case "r" if round_.card.is_numeric:
            redrawn = _redrawn(round_)
            return redrawn, shown(redrawn)
    if round_.stage == "ticking":
        return _ticked(round_, text, now)
    return _number(round_, text, now) if round_.card.is_numeric else _words(round_)


def _redrawn(round_: Round) -> Round:
    """Other numbers: those just seen may be drawn again, and are passed over."""
    nexts = (replace(round_, num_redraws=round_.num_redraws + i, num_tries=0) for i in range(1, MOST_REDRAWS))
    return next((other for other in nexts if other.problem.ask != round_.problem.ask), round_)


def shown(round_: Round) -> str:
    """The card on the table, as text."""
    card = round_.card
    head = f"[{card.question.id} · {card.question.level}]"
    if card.is_numeric:
        return f"{head} {round_.problem.ask}\n(a number with its unit)"
    return f"{head} {card.question.stem}\n(say or type your answer, then Enter)"


def points(question: Question) -> str:
    """The key points with the numbers to tick."""
    return "\n".join(f"  {i}. {point}" for i, point in enumerate(question.points, 1))


def ticks_of(text: str, num_points: int) -> set[int] | None:
    """The points ticked: "1 3", "all", "none"; None for anything else."""
    words = text.lower().replace(",", " ").split()
    if words in (["all"], ["a"]):
        return set(range(1, num_points + 1))
    if words in (["none"], ["n"], ["0"]):
        return set()
    numbers = {int(word) for word in words if word.isdecimal() and len(word) < 3}
    is_whole = bool(words) and all(word.isdecimal() for word in words)
    return numbers if is_whole and numbers and numbers <= set(range(1, num_points + 1)) else None


def rating_of(num_ticked: int, num_points: int) -> int:
    """All points: easy; two thirds: good; a third: hard; less: again."""
    if num_ticked == num_points:
        return EASY
    return GOOD if 3 * num_ticked >= 2 * num_points else HARD if 3 * num_ticked >= num_points else AGAIN


def _words(round_: Round) -> tuple[Round, str]:
    question = round_.card.question
    return (
        replace(round_, stage="ticking"),
        f"Key points:\n{points(question)}\nWhich did you name? Numbers such as 1 3, all, or none.",
    )


def _ticked(round_: Round, text: str, now: datetime) -> tuple[Round, str]:
    question = round_.card.question
    ticks = ticks_of(text, len(question.points))
    if ticks is None:
        return round_, f"Type the numbers of the points that you named, 1 to {len(question.points)}, all, or none."
    links = ", ".join(map(str, question.links))
    after = f"{len(ticks)} of {len(question.points)}.\nFollow-up: {question.follow_up}\n  {question.answer}\n"
    after += f"Engine: {links}"
    return _graded(round_, rating_of(len(ticks), len(question.points)), after, now)


def _number(round_: Round, text: str, now: datetime) -> tuple[Round, str]:
    problem = round_.problem
    derivation = "\n".join(f"  {line}" for line in problem.truth.derivation)
    if text == "?":
        return _graded(round_, AGAIN, f"Worked out:\n{derivation}", now)
    verdict = grade(problem, text)
    if not verdict.is_answer:
        return round_, verdict.says
    slip = round_.slip or verdict.slip
    if verdict.is_right:
        return _graded(replace(round_, slip=slip), HARD if round_.num_tries else GOOD, verdict.says, now)
    tried = replace(round_, num_tries=round_.num_tries + 1, slip=slip)
    if tried.num_tries < MOST_TRIES:
        return tried, f"{verdict.says}\nTry once more, or ? for the answer."
    return _graded(tried, AGAIN, f"{verdict.says}\nWorked out:\n{derivation}", now)


def _graded(round_: Round, rating: int, says: str, now: datetime) -> tuple[Round, str]:
    progress = reviewed(round_.progress, round_.card.id, rating, now, round_.slip, round_.is_fuzzed)
    graded = replace(round_, progress=progress, num_good=round_.num_good + (rating >= GOOD))
    return _next(graded, says, is_reviewed=True)


def _next(round_: Round, says: str, *, is_reviewed: bool) -> tuple[Round, str]:
    after = replace(
        round_, queue=round_.queue[1:], stage="asked", num_reviewed=round_.num_reviewed + is_reviewed,
        num_tries=0, num_redraws=0, slip="",
    )  # fmt: skip
    if not after.queue:
        ended, summary = _ended(after)
        return ended, f"{says}\n\n{summary}"
    return after, f"{says}\n\n{shown(after)}"


def _ended(round_: Round) -> tuple[Round, str]:
    return replace(round_, stage="ended"), f"{round_.num_good} of {round_.num_reviewed} cards went well."
