"""The report of a mock interview: key points by category and level, numbers and how fast they came, slips."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from minivllm.course.calculators.units import counted
from minivllm.course.questions import LEVELS, groups

TARGET_S = 60  # to the first number; longer, and an interviewer begins to help


@dataclass(frozen=True)
class Asked:
    """What became of one question."""

    id: str
    level: str
    num_points: int
    has_number: bool
    num_ticked: int = 0
    is_number_right: bool = False
    seconds_to_number: float | None = None
    slip: str = ""
    has_followed_up: bool = False


def report(done: Sequence[Asked], num_left: int, minutes: int) -> str:
    """The report as text; an interview that ended early says how many questions were left."""
    if not done:
        return "Report: no question was answered to the end."
    lines = [f"Report: {counted(len(done), 'questions')} answered, {num_left} left, {minutes} minutes planned."]
    lines += _coverage("by category", done, lambda asked: f"{asked.id[0]} {groups()[asked.id[0]].title}", ())
    lines += _coverage("by level", done, lambda asked: asked.level, LEVELS)
    lines.append(f"Follow-ups answered: {sum(asked.has_followed_up for asked in done)} of {len(done)}.")
    numeric = [asked for asked in done if asked.has_number]
    if numeric:
        lines.append(f"Numbers right: {sum(asked.is_number_right for asked in numeric)} of {len(numeric)}.")
    times = [asked.seconds_to_number for asked in numeric if asked.seconds_to_number is not None]
    if times:
        lines.append(f"Time to the first number: median {median(times):.0f} s; aim for {TARGET_S} s.")
    slips = Counter(asked.slip for asked in done if asked.slip)
    lines += [f"Slip: {name} ({count} times)" if count > 1 else f"Slip: {name}" for name, count in slips.most_common()]
    return "\n".join(lines)


def _coverage(title: str, done: Sequence[Asked], key: Callable[[Asked], str], order: Sequence[str]) -> list[str]:
    """Key points named, for each category or level that came up."""
    kinds = sorted({key(asked) for asked in done}, key=lambda kind: order.index(kind) if order else kind)
    lines = [f"Key points named, {title}:"]
    for kind in kinds:
        of_kind = [asked for asked in done if key(asked) == kind]
        ticked, points = sum(a.num_ticked for a in of_kind), sum(a.num_points for a in of_kind)
        lines.append(f"  {ticked:2d} of {points:2d}  {kind}")
    return lines
