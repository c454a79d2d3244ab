"""What an exercise is: a question with numbers drawn for one learner, its answer, typical wrong ones, hints, a place.

Invariant: the wrong answers of a problem (its slips) differ from the right one and from each other, or the numbers are
drawn again; so each diagnosis is the only one that fits. Slips of a code exercise are functions: what a learner wrote
is recognised by what it does.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random

from minivllm.course.exercises.compare import agrees
from minivllm.course.exercises.place import Place
from minivllm.course.slips import EXPLANATIONS

Value = float | int | str | bool | tuple["Value", ...]
Facts = Mapping[str, object]  # what a live engine says of itself, such as llm.trace_header(); may be empty
Case = tuple[object, ...]  # the arguments of one call
Subject = Callable[..., object]  # the function or class that a learner writes
Drive = Callable[[Subject, Case], object]  # runs it on one case and returns all that is compared
MOST_DRAWS = 200


@dataclass(frozen=True, slots=True)
class Slip:
    """A typical wrong answer, or a function that is wrong in a typical way; its name is the question bank's."""

    name: str
    answer: object
    reason: str = ""

    @property
    def why(self) -> str:
        return self.reason or EXPLANATIONS.get(self.name, "")


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that is asked for: a number, a choice, or a list of them. Whole numbers and lists must be exact."""

    answer: Value
    slips: tuple[Slip, ...]
    unit: str = ""
    label: str = ""
    choices: tuple[str, ...] = ()
    share: float = 0.01  # of a fraction by which it may be off
    refused_units: tuple[str, ...] = ()  # where converting is what is asked: an answer in these is none

    @property
    def tolerance(self) -> float:
        return self.share if isinstance(self.answer, float) else 0.0

    @property
    def is_clear(self) -> bool:
        """Whether every slip can be told from the answer and from every other slip."""
        answers = [self.answer, *(slip.answer for slip in self.slips)]
        pairs = [(one, other) for i, one in enumerate(answers) for other in answers[:i]]
        return not any(agrees(one, other, 2 * self.tolerance) for one, other in pairs)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its numbers: `given` holds them for the learner's own code, `working` leads to the answer."""

    question: str
    parts: tuple[Part, ...]
    working: tuple[str, ...]
    given: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """A function to write: it must do on every case what `reference` does."""

    question: str
    stub: str  # the first lines, to copy
    reference: Subject
    cases: tuple[Case, ...]  # from short to long: the first that fails is shown
    slips: tuple[Slip, ...]
    drive: Drive
    tolerance: float = 1e-9


@dataclass(frozen=True, slots=True)
class Exercise:
    """A problem for every draw of a random generator, three hints, and where the engine does the same."""

    id: str  # notebook and number: "05.2"
    title: str
    hints: tuple[str, str, str]
    place: Place
    pose: Callable[[Random, Facts], Problem | CodeProblem]

    @property
    def notebook(self) -> str:
        return self.id.partition(".")[0]


def draw(exercise: Exercise, seed: str, facts: Facts) -> Problem | CodeProblem:
    """The learner's problem: the same for the same seed, and drawn again until no two slips give the same answer."""
    random = Random(f"{exercise.id}:{seed}")  # a string's seed does not depend on PYTHONHASHSEED
    for _ in range(MOST_DRAWS):
        problem = exercise.pose(random, facts)
        if isinstance(problem, CodeProblem) or all(part.is_clear for part in problem.parts):
            break
    return problem  # facts of a run stay as they are: there the first slip that fits is named


def next_draw(exercise: Exercise, seed: str, number: int) -> int:
    """The number of the next draw that poses another problem than draw `number`, where there is another."""
    before = draw(exercise, f"{seed}:{number}", {})
    later = range(number + 1, number + 1 + MOST_DRAWS)
    return next((i for i in later if _asks_other(draw(exercise, f"{seed}:{i}", {}), before)), number + 1)


def _asks_other(one: Problem | CodeProblem, other: Problem | CodeProblem) -> bool:
    """Other numbers, or other lines; the same choices in another order are the same problem."""
    if isinstance(one, CodeProblem) or isinstance(other, CodeProblem):
        return getattr(one, "cases", ()) != getattr(other, "cases", ())
    return (one.question, [p.answer for p in one.parts]) != (other.question, [p.answer for p in other.parts])


def named(wrong: Mapping[str, object]) -> tuple[Slip, ...]:
    """Slips from "name" (explained by the question bank) or "name: why" to the wrong answer."""
    split = ((words.partition(": "), answer) for words, answer in wrong.items())
    return tuple(Slip(name, answer, reason) for (name, _, reason), answer in split)


def choice(answer: str, wrong: Mapping[str, str], random: Random, label: str = "") -> Part:
    """A question with choices in random order; `wrong` says of each other choice what is wrong with it."""
    choices = [answer, *wrong]
    random.shuffle(choices)
    found = tuple(Slip(f"“{words}”", words, why) for words, why in wrong.items())
    return Part(answer, found, label=label, choices=tuple(choices))


def call(subject: Subject, case: Case) -> object:
    """Run a function on its own copy of the arguments: the usual drive."""
    return subject(*deepcopy(case))
