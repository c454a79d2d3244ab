"""Runs what a learner wrote and lets nothing out: errors become one line that names the learner's own line.

A loop without end is stopped by counting its instructions, not by a clock: the verdict is the same on every machine.
"""

import io
import linecache
import sys
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import FrameType, FunctionType, TracebackType

from minivllm.course.exercises.compare import agrees
from minivllm.course.exercises.exercise import Case, CodeProblem, Subject
from minivllm.errors import short

MOST_INSTRUCTIONS = 300_000  # of the learner's code in one case; the longest right answer runs a few thousand


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case gave: a value, or an error in words."""

    value: object = None
    error: str = ""  # the type's name; "" when it returned
    words: str = ""  # one line: error, message, line
    is_unwritten: bool = False


class TooLongError(Exception):
    """The learner's code ran far longer than any right answer."""


def outcomes(problem: CodeProblem, subject: Subject) -> list[Outcome]:
    """Run every case; stop early where nothing is written or a loop does not end."""
    found: list[Outcome] = []
    for case in problem.cases:
        found.append(outcome(problem, subject, case))
        if found[-1].is_unwritten or found[-1].error == TooLongError.__name__:
            break
    return found


def outcome(problem: CodeProblem, subject: Subject, case: Case) -> Outcome:
    """One case. Only an interrupt of the kernel passes through."""
    trace_before = sys.gettrace()
    try:
        sys.settrace(_InstructionCounter(files_of(subject)))
        with redirect_stdout(io.StringIO()):
            value = problem.drive(subject, case)
    except NotImplementedError:
        return Outcome(error="NotImplementedError", is_unwritten=True)
    except (Exception, SystemExit) as error:
        return Outcome(error=type(error).__name__, words=described(error, subject))
    finally:
        sys.settrace(trace_before)
    return Outcome(value, is_unwritten=value is None)


def same(one: list[Outcome], other: list[Outcome], tolerance: float) -> bool:
    """Whether two programs did the same on every case; errors are equal when their types are."""
    return len(one) == len(other) and all(matches(a, b, tolerance) for a, b in zip(one, other, strict=True))


def matches(wanted: Outcome, got: Outcome, tolerance: float) -> bool:
    return wanted.error == got.error and (bool(wanted.error) or agrees(wanted.value, got.value, tolerance))


def described(error: BaseException, subject: Subject) -> str:
    """The error on one line, with the last line of the learner's that ran: "ZeroDivisionError: ... (line 3: x / 0)"."""
    message = short_text(str(error))
    words = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, TooLongError):
        words = f"more than {MOST_INSTRUCTIONS:,} instructions; a loop that does not end?"
    place = own_line(error.__traceback__, files_of(subject))
    return f"{words} ({place})" if place else words


def own_line(trace: TracebackType | None, files: frozenset[str]) -> str:
    """Number and text of the last line of these files in a traceback; a notebook's cell is a file of its own."""
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename in files]
    if not frames:
        return ""
    text = (frames[-1].line or linecache.getline(frames[-1].filename, frames[-1].lineno or 0)).strip()
    return f"line {frames[-1].lineno}: {short_text(text)}" if text else f"line {frames[-1].lineno}"


def files_of(subject: Subject) -> frozenset[str]:
    """Files in which a function, or the methods of a class, were written."""
    members = [subject, *(vars(subject).values() if isinstance(subject, type) else ())]
    return frozenset(member.__code__.co_filename for member in members if isinstance(member, FunctionType))


def shown_case(case: Case) -> str:
    """The arguments of a call, on one line."""
    return short_text(", ".join(short(value) for value in case), 160)


def short_text(text: str, most: int = 120) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


class _InstructionCounter:
    """A trace function that counts instructions of some files; `while True: pass` never reaches a new line."""

    def __init__(self, files: frozenset[str]) -> None:
        self._files = files
        self._num_run = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> "_InstructionCounter | None":
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._num_run += 1
        if self._num_run > MOST_INSTRUCTIONS:
            raise TooLongError
        return self
