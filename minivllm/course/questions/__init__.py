"""The question bank: one TOML file for each group, the numeric forms that go with them, and the slips by name."""

from functools import lru_cache
from pathlib import Path

from minivllm.course.numeric_forms import Form, Problem, drawn
from minivllm.course.questions import forms_hardware, forms_kv, forms_memory, forms_speculation, forms_time
from minivllm.course.questions.question import LEVELS, Group, Link, Question, read_group
from minivllm.errors import ConfigError, short

__all__ = ["FORMS", "LEVELS", "Group", "Link", "Problem", "Question", "groups", "problem_of", "question", "questions"]

FORMS: dict[str, Form] = {
    **forms_kv.FORMS,
    **forms_memory.FORMS,
    **forms_time.FORMS,
    **forms_speculation.FORMS,
    **forms_hardware.FORMS,
}


@lru_cache
def groups() -> dict[str, Group]:
    """Every group by its letter."""
    found = [read_group(path) for path in sorted(Path(__file__).parent.glob("*.toml"))]
    return {group.letter: group for group in found}


@lru_cache
def questions() -> dict[str, Question]:
    """Every question by its id, in the order of the files."""
    return {question.id: question for group in groups().values() for question in group.questions}


def question(question_id: str) -> Question:
    """One question: question("A2"). Raises ConfigError for an id that the bank lacks."""
    try:
        return questions()[question_id]
    except KeyError:
        raise ConfigError(
            f"no question is called {short(question_id)}; ids run from A1 to {list(questions())[-1]}"
        ) from None


def problem_of(question_id: str, seed: str) -> Problem:
    """The numeric form of a question with the parameters of this seed: the same seed gives the same numbers.

    Raises ConfigError where the question has no numeric form.
    """
    if question_id not in FORMS:
        raise ConfigError(f"question {short(question_id)} has no numeric form; these have: {', '.join(FORMS)}")
    return drawn(FORMS[question_id], f"{question_id}/{seed}")
