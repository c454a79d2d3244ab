"""Judges an answer to a drawn problem: right, a slip by its name, unwritten, or how far off. It raises nothing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from minivllm.course.answer_units import in_unit, parsed, readings, unit_name
from minivllm.course.exercises.compare import LARGEST, agrees, is_sequence, list_of, plain
from minivllm.course.exercises.exercise import CodeProblem, Part, Problem, Slip
from minivllm.course.general_slips import fraction_slip, general_slips
from minivllm.course.learner_code import Outcome, matches, outcome, outcomes, same, shown_case
from minivllm.errors import short

State = Literal["empty", "malformed", "wrong", "right"]  # malformed: no answer at all, which costs no try
LETTERS = "abcdefghij"
WORD = re.compile(r"(a|[a-z]{2,})(?=[ ,:;'])")  # not n + 1, e^x or num_blocks


@dataclass(frozen=True, slots=True)
class Judgement:
    """What became of an answer, in lines; `slips` are the names of the mistakes that were recognised."""

    state: State
    lines: tuple[str, ...] = ()
    slips: tuple[str, ...] = ()


def judge(problem: Problem | CodeProblem, answer: object) -> Judgement:
    """The verdict on any object at all."""
    if is_unfilled(answer):
        return Judgement("empty")
    return judge_code(problem, answer) if isinstance(problem, CodeProblem) else judge_parts(problem, answer)


def is_unfilled(answer: object) -> bool:
    """None, ..., "" and lists of nothing but them: what an untouched notebook holds."""
    if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
        return True
    return is_sequence(answer) and bool(list_of(answer)) and all(is_unfilled(entry) for entry in list_of(answer))


def judge_parts(problem: Problem, answer: object) -> Judgement:
    """Each part by itself; right when all are."""
    parts = problem.parts
    if len(parts) == 1:
        return judge_part(parts[0], answer)
    if isinstance(answer, Mapping):
        answer = [answer.get(part.label) for part in parts]
    answer = split(answer)
    if not is_sequence(answer) or len(list_of(answer)) != len(parts):
        labels = ", ".join(part.label for part in parts)
        return Judgement("malformed", (f"Give a list of {len(parts)} answers ({labels}), not {short(answer)}.",))
    entries = list_of(answer)
    found = [judge_part(part, entry) for part, entry in zip(parts, entries, strict=True)]
    states = {j.state for j in found}
    state: State = "right" if states == {"right"} else "wrong" if "wrong" in states else "malformed"
    lines = [f"{p.label}: {' '.join(j.lines) or 'right'}" for p, j in zip(parts, found, strict=True)]
    lines = [line if j.state != "empty" else f"{p.label}: open" for p, j, line in zip(parts, found, lines, strict=True)]
    return Judgement(state, tuple(lines) if state != "right" else (), tuple(s for j in found for s in j.slips))


def split(answer: object) -> object:
    """ "a, b, c" as the list it stands for; numbers keep commas that have no space after them: "1,024, 3"."""
    if not isinstance(answer, str):
        return answer
    parts = re.split(r"[;,]\s+", answer.strip().strip("[]()"))
    if len(parts) == 1 and re.fullmatch(r"[A-Za-z](,[A-Za-z])+", parts[0]):
        parts = parts[0].split(",")
    return [number_or_words(part) for part in parts] if len(parts) > 1 else answer


def number_or_words(text: str) -> object:
    """An entry of a typed list: 12 and 1,024 as numbers, a letter or "3 GiB" as it stands."""
    try:
        return float(text.replace(",", "")) if "." in text else int(text.replace(",", ""))
    except ValueError:
        return text


def judge_part(part: Part, answer: object) -> Judgement:
    """One number, choice or list."""
    if is_unfilled(answer):
        return Judgement("empty")
    given = plain(answer)
    if callable(given):
        return Judgement("malformed", (f"An answer is wanted, not a function: call it, as in {_name(given)}(...).",))
    if isinstance(part.answer, str):
        given = _chosen(part, given)
    values = _values(part, given)
    if isinstance(values, str):
        return Judgement("malformed", (values,))
    if any(agrees(part.answer, value, max(part.tolerance, 1e-9)) for value in values):
        return Judgement("right")
    fits = ((s, v) for s in known_slips(part) for v in values)
    slip = next((s for s, v in fits if agrees(s.answer, v, max(part.tolerance, 1e-3))), fraction_slip(part, values[0]))
    if slip is not None:
        return Judgement("wrong", (diagnosis(slip),), (slip.name,))
    return Judgement("wrong", (_how_far(part, values[0]),))


def diagnosis(slip: Slip) -> str:
    """Name and reason as two sentences, each with one mark at its end; a reason's first word begins large."""
    why = slip.why
    why = why[:1].upper() + why[1:] if WORD.match(why) else why
    return " ".join(words if words.endswith((".", "?", "!")) else f"{words}." for words in (slip.name, why) if words)


def known_slips(part: Part) -> list[Slip]:
    """The exercise's own, then those of units, factors and rounding that any number may suffer."""
    return [*part.slips, *general_slips(part)]


def judge_code(problem: CodeProblem, subject: object) -> Judgement:
    """Run a learner's function or class on every case, beside the reference and the wrong versions."""
    if not callable(subject):
        name = problem.stub.split("(")[0].split(":")[0].split()[-1]
        return Judgement("malformed", (f"Pass the function itself, {name} without brackets, not {short(subject)}.",))
    got = outcomes(problem, subject)
    if any(found.is_unwritten for found in got):
        first = got[0].is_unwritten
        return Judgement("empty" if first else "wrong", () if first else ("For some arguments it returns None.",))
    wanted = outcomes(problem, problem.reference)
    index = next((i for i, found in enumerate(got) if not matches(wanted[i], found, problem.tolerance)), None)
    if index is None:
        return Judgement("right", (f"The same as the engine's on {len(got)} cases.",))
    slip = next((s for s in problem.slips if _does(problem, s, got)), None)
    found = got[index]
    result = found.words or f"gives {short(plain(found.value))}, wanted {short(plain(wanted[index].value))}"
    example = f"For ({shown_case(problem.cases[index])}) it {result}." if not found.error else f"It stopped: {result}."
    named = (diagnosis(slip),) if slip else ()
    return Judgement("wrong", (*named, example), (slip.name,) if slip else ())


def _does(problem: CodeProblem, slip: Slip, got: list[Outcome]) -> bool:
    assert callable(slip.answer), "the slips of a code exercise are functions"
    return same([outcome(problem, slip.answer, case) for case in problem.cases[: len(got)]], got, problem.tolerance)


def _chosen(part: Part, given: object) -> object:
    """A choice by its letter, its number from 1, or its words."""
    if isinstance(given, str) and len(given.strip()) == 1 and given.strip().lower() in LETTERS[: len(part.choices)]:
        return part.choices[LETTERS.index(given.strip().lower())]
    if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= len(part.choices):
        return part.choices[given - 1]
    return given


def _values(part: Part, given: object) -> list[object] | str:
    """What the answer may mean: for text such as "128 KiB" its readings; or one line on why it is no answer."""
    if isinstance(part.answer, str):
        known = any(agrees(choice, given) for choice in part.choices)
        return [given] if known else f"Answer with a letter from a to {LETTERS[len(part.choices) - 1]}."
    if isinstance(part.answer, tuple):
        given = split(given)
        if not is_sequence(given) or len(list_of(given)) != len(part.answer):
            return f"Give a list of {len(part.answer)} entries, not {short(given)}."
        return [given]
    if isinstance(given, str):
        number = parsed(given)
        if number and unit_name(number) in part.refused_units:
            return f"That is still {unit_name(number)}; convert it to {part.unit}."
        means = readings(number, part.unit) if number else []
        if not means:
            return f"Give a number in {part.unit or 'plain digits'}, not {short(given)}."
        return [in_unit(reading.value, part.unit) for reading in means]
    if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= LARGEST:
        return f"Give one number{f' of {part.unit}' if part.unit else ''}, not {short(given)}."
    return [given]


def _how_far(part: Part, given: object) -> str:
    if isinstance(part.answer, tuple):
        pairs = list(zip(part.answer, list_of(given), strict=True))
        wrong = [i for i, (a, b) in enumerate(pairs, 1) if not agrees(a, b)]
        return (
            f"{len(pairs) - len(wrong)} of {len(pairs)} entries are right; the first that is not is number {wrong[0]}."
        )
    truth, value = part.answer, given
    assert isinstance(truth, int | float) and isinstance(value, int | float), "choices are slips of their own"
    if truth > 0 and value > 0:
        factor = max(value, truth) / min(value, truth)
        return f"Too {'large' if value > truth else 'small'} by a factor of {factor:.3g}; no slip that is known here."
    return "No slip that is known here: write the formula down first, then the numbers."


def _name(subject: object) -> str:
    return str(getattr(subject, "__name__", "f"))
