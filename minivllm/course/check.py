"""Exercises in a notebook: `ask("05.1")` shows one, `check("05.1", answer)` judges, `check.solution("05.1")` shows how.

    ask("05.1").given["positions"]     the numbers drawn for this learner, for use in code
    check("05.2", append_slot)         a function is run beside the engine's
    check.redraw("05.1")               other numbers, and the tries start again

Nothing raises: an unfilled notebook runs through and shows red. Each further call with a wrong answer gives the next of
three hints. Facts of a live engine (`facts=llm.trace_header()`) replace drawn numbers where an exercise measures.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import getsource

from minivllm.course.card import Card
from minivllm.course.exercises import find
from minivllm.course.exercises.exercise import CodeProblem, Exercise, Facts, Part, Problem, draw, next_draw
from minivllm.course.judge import LETTERS, Judgement, judge
from minivllm.course.learner import open_records
from minivllm.course.records import Record, Records
from minivllm.errors import MiniVLLMError

KIND = "exercise"


@dataclass(frozen=True, slots=True)
class Asked(Card):
    """The card of a question, and its numbers for the learner's own code."""

    given: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        return Card.__repr__(self)


class Check:
    """The verbs of a notebook over one learner's records; the default records are opened at the first call."""

    def __init__(self, records: Callable[[], Records]) -> None:
        self._records = records

    @property
    def records(self) -> Records:
        return self._records()

    def __call__(self, exercise_id: str, answer: object = None, *, facts: Facts | None = None) -> Card:
        """Judge an answer, remember the try, and say what went wrong."""
        return self._safely(exercise_id, lambda exercise: self._check(exercise, answer, facts or {}))

    def ask(self, exercise_id: str, *, facts: Facts | None = None) -> Card:
        """The question with this learner's numbers."""
        return self._safely(exercise_id, lambda exercise: self._ask(exercise, facts or {}))

    def redraw(self, exercise_id: str) -> Card:
        """New numbers for this exercise; tries and hints start again, what was solved stays solved."""
        return self._safely(exercise_id, self._redraw)

    def solution(self, exercise_id: str, *, facts: Facts | None = None) -> Card:
        """The working with this learner's numbers, or the engine's own function."""
        return self._safely(exercise_id, lambda exercise: self._solution(exercise, facts or {}))

    def problem(self, exercise: Exercise, facts: Facts) -> Problem | CodeProblem:
        """What this learner is asked."""
        return draw(exercise, f"{self.records.seed}:{count(self.record(exercise), 'draw')}", facts)

    def record(self, exercise: Exercise) -> Record:
        return self.records.read(KIND, exercise.id) or {}

    def _check(self, exercise: Exercise, answer: object, facts: Facts) -> Card:
        problem = self.problem(exercise, facts)
        found = judge(problem, answer)
        title = f"{exercise.id} {exercise.title}"
        if found.state == "empty":
            how = f'Put your answer in place of the dots; ask("{exercise.id}") shows the question.'
            return Card("open", f"{title}: not answered yet", (how,))
        if found.state == "malformed":
            return Card("wrong", f"{title}: not yet", found.lines)
        record = self._remember(exercise, found)
        if found.state == "right":
            after = " (after its solution)" if record.get("saw_solution") else ""
            working = problem.working if isinstance(problem, Problem) else ()
            return Card("right", f"{title}: right{after}", (*found.lines, *working), link=link_of(exercise))
        return Card("wrong", f"{title}: not yet", (*found.lines, hint_of(exercise, count(record, "tries"))))

    def _remember(self, exercise: Exercise, found: Judgement) -> Record:
        record = self.record(exercise)
        counts = record.get("slips")
        slips = dict(counts) if isinstance(counts, dict) else {}
        for name in found.slips:
            slips[name] = slips.get(name, 0) + 1
        record["slips"] = slips
        if found.state == "right":
            record["is_solved"] = True
        else:
            record["tries"] = count(record, "tries") + 1
        self.records.write(KIND, exercise.id, record)
        return record

    def _ask(self, exercise: Exercise, facts: Facts) -> Card:
        problem = self.problem(exercise, facts)
        given = problem.given if isinstance(problem, Problem) else {}
        lines = (problem.question, *choices_of(problem))
        return Asked("plain", f"{exercise.id} {exercise.title}", lines, stub_of(problem), given=given)

    def _redraw(self, exercise: Exercise) -> Card:
        record = self.record(exercise)
        record |= {"draw": next_draw(exercise, str(self.records.seed), count(record, "draw")), "tries": 0}
        self.records.write(KIND, exercise.id, record)
        return self._ask(exercise, {})

    def _solution(self, exercise: Exercise, facts: Facts) -> Card:
        problem = self.problem(exercise, facts)
        record = self.record(exercise)
        if not record.get("is_solved"):
            record["saw_solution"] = True
            self.records.write(KIND, exercise.id, record)
        title = f"{exercise.id} {exercise.title}: solution"
        if isinstance(problem, CodeProblem):
            return Card("plain", title, (exercise.hints[-1],), solution_of(problem, exercise), link_of(exercise))
        return Card("plain", title, (problem.question, *problem.working), link=link_of(exercise))

    def _safely(self, exercise_id: str, act: Callable[[Exercise], Card]) -> Card:
        """A wrong id, or records that cannot be read, become a red card."""
        try:
            return act(find(exercise_id))
        except MiniVLLMError as error:
            return Card("wrong", f"{exercise_id}: {error}")


def hint_of(exercise: Exercise, num_tries: int) -> str:
    """The hint after so many wrong tries; when all are used, where the solution is."""
    if num_tries > len(exercise.hints):
        return (
            f'All three hints are given. check.solution("{exercise.id}") shows the way, '
            f'check.redraw("{exercise.id}") draws other numbers.'
        )
    return f"Hint {num_tries} of {len(exercise.hints)}: {exercise.hints[max(num_tries, 1) - 1]}"


def choices_of(problem: Problem | CodeProblem) -> tuple[str, ...]:
    """The choices of a question, one a line, each with its letter."""
    parts: tuple[Part, ...] = problem.parts if isinstance(problem, Problem) else ()
    return tuple(f"{letter}) {words}" for part in parts for letter, words in zip(LETTERS, part.choices, strict=False))


def stub_of(problem: Problem | CodeProblem) -> str:
    return problem.stub if isinstance(problem, CodeProblem) else ""


def solution_of(problem: CodeProblem, exercise: Exercise) -> str:
    """The engine's own function; before it the twin with the exercise's arguments, where those differ."""
    own = getsource(problem.reference).rstrip()
    is_engines = own.strip() == exercise.place.source.strip()
    return own if is_engines else f"{own}\n\n# {exercise.place.relative_path}\n{exercise.place.source}"


def link_of(exercise: Exercise) -> tuple[str, str]:
    """File, line and name in the engine, as a link that works from a notebook."""
    place = exercise.place
    return f"{place.relative_path}:{place.line} {place.name}", f"../{place.relative_path}#L{place.line}"


def count(record: Record, name: str) -> int:
    value = record.get(name)
    return value if isinstance(value, int) else 0


check = Check(open_records)
ask, solution = check.ask, check.solution
