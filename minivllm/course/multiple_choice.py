"""A question with a few answers to choose from, each wrong one with the line that says what went wrong.

A numeric question becomes one by its slips: what a wrong formula gives with the same numbers stands beside the truth.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from minivllm.course.answer_units import in_unit
from minivllm.course.calculators.units import plain
from minivllm.course.exercises.exercise import Part, Slip
from minivllm.course.general_slips import general_slips
from minivllm.course.judge import LETTERS
from minivllm.course.numeric_forms import Problem, all_slips
from minivllm.course.questions import problem_of
from minivllm.errors import MiniVLLMError

MOST_OPTIONS = 4


@dataclass(frozen=True, slots=True)
class Option:
    """One answer; `slip` names the mistake behind it and `why` sets it right, both "" for the right answer."""

    words: str
    slip: str = ""
    why: str = ""

    @property
    def is_right(self) -> bool:
        return not self.slip and not self.why

    @property
    def diagnosis(self) -> str:
        """What went wrong, in one line; "" for the right answer."""
        line = ": ".join(filter(None, (self.slip, self.why)))
        return line if not line or line.endswith((".", "?")) else f"{line}."


@dataclass(frozen=True, slots=True)
class MultipleChoice:
    """What is asked, the options in the order shown, and how the answer is found."""

    ask: str
    options: tuple[Option, ...]
    working: str

    @property
    def right(self) -> Option:
        return next(option for option in self.options if option.is_right)

    def by_letter(self, letter: str) -> Option:
        """The option behind a, b, c, d. Raises MiniVLLMError for another letter."""
        if len(letter) != 1 or letter not in LETTERS[: len(self.options)]:
            raise MiniVLLMError(f"answer with a letter from a to {LETTERS[len(self.options) - 1]}, not {letter[:20]!r}")
        return self.options[LETTERS.index(letter)]

    def lettered(self) -> list[tuple[str, str]]:
        """The options as (letter, "a) words")."""
        return [(letter, f"{letter}) {o.words}") for letter, o in zip(LETTERS, self.options, strict=False)]


def shuffled(ask: str, right: str, wrong: Iterable[Option], working: str, random: Random) -> MultipleChoice:
    """The right answer among the wrong ones that read differently, at most MOST_OPTIONS in all, in random order."""
    options = {right: Option(right)}
    for option in wrong:
        if len(options) < MOST_OPTIONS:
            options.setdefault(option.words, option)
    order = list(options.values())
    random.shuffle(order)
    return MultipleChoice(ask, tuple(order), working)


def of_part(ask: str, part: Part, working: Sequence[str], random: Random) -> MultipleChoice:
    """A number among its slips: those of the part first, then those that any number of its unit may suffer."""

    def words(value: object) -> str:
        assert isinstance(value, int | float), "numbers only: lists and words are asked elsewhere"
        return f"{plain(value)}{part.unit}" if part.unit in ("%", "×") else f"{plain(value)} {part.unit}".rstrip()

    found: list[Slip] = [*part.slips, *general_slips(part)]
    wrong = (Option(words(slip.answer), slip.name, slip.why) for slip in found)
    return shuffled(ask, words(part.answer), wrong, working[-1], random)


def of_bank(question_id: str, seed: str) -> MultipleChoice:
    """A numeric question of the bank, drawn from a seed. Raises ConfigError where it has no numeric form."""
    problem = problem_of(question_id, seed)
    own = [Slip(slip.name, _asked(problem, slip.value), slip.why) for slip in all_slips(problem)]
    part = Part(_asked(problem, float(problem.truth)), tuple(own), problem.unit)
    return of_part(problem.ask, part, problem.truth.derivation, Random(f"{question_id}/{seed}"))


def _asked(problem: Problem, value: float) -> int | float:
    """A value of the truth's unit in the unit that is asked for, whole where it is whole."""
    asked = in_unit(problem.smallest(value), problem.unit)
    return int(asked) if abs(asked) < 1e15 and asked == int(asked) else asked
