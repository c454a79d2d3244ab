"""A numeric question drawn from a seed: its true answer, and the slips that wrong answers are told apart by.

The truth is what a calculator of the course works out. A slip is the value that a wrong formula gives with the same
parameters, so a learner who typed it is told what went wrong, in one line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from minivllm.course.answer_units import BINARY, Reading, in_unit, measure_of, parsed, readings
from minivllm.course.calculators import Worked
from minivllm.course.calculators.units import plain
from minivllm.course.slips import EXPLANATIONS

BYTES_TOLERANCE, TOLERANCE = 0.005, 0.02  # shares of the truth; counts must be exact
LEAST_GAP = 1e-3  # of two values that a learner who writes four digits can tell apart
MOST_DRAWS = 50


@dataclass(frozen=True)
class Slip:
    """A known mistake, by its name in slips.py, and the value it gives in the unit of the truth."""

    name: str
    value: float

    @property
    def why(self) -> str:
        return EXPLANATIONS[self.name]


@dataclass(frozen=True)
class Problem:
    """One drawn question: what is asked, in which unit a bare number is read, the truth and the known slips."""

    ask: str
    unit: str
    truth: Worked
    slips: tuple[Slip, ...]

    @property
    def value(self) -> float:
        """The truth in the smallest units of its measure."""
        return self.smallest(float(self.truth))

    @property
    def tolerance(self) -> float:
        """How far off an answer may be, as a share of the truth."""
        if measure_of(self.unit)[0] in ("bytes", "bytes/s"):
            return BYTES_TOLERANCE
        return 0.0 if isinstance(self.truth.value, int) else TOLERANCE

    def smallest(self, value: float) -> float:
        return value * measure_of(self.truth.unit)[1]


@dataclass(frozen=True)
class Verdict:
    """What became of an answer. What is no answer at all (`is_answer` False) costs no try."""

    is_answer: bool
    is_right: bool
    says: str
    slip: str = ""


Form = Callable[[Random], Problem]


def drawn(form: Form, seed: str) -> Problem:
    """The problem of this seed, drawn again while a slip happens to equal the truth or another slip."""
    random = Random(seed)
    for _ in range(MOST_DRAWS):
        problem = form(random)
        if not clashes(problem):
            return problem
    raise AssertionError(f"{form.__name__}: {MOST_DRAWS} draws had slips that cannot be told apart")


def clashes(problem: Problem) -> list[str]:
    """Pairs of the truth and the slips with values too close to tell apart, in words."""
    named = [("the truth", problem.value), *((s.name, problem.smallest(s.value)) for s in problem.slips)]
    pairs = [(one, other) for i, one in enumerate(named) for other in named[i + 1 :]]
    return [f"{a} = {b}" for (a, x), (b, y) in pairs if not _can_tell_apart(x, y, problem.tolerance)]


def grade(problem: Problem, text: str) -> Verdict:
    """Judge what was typed: right, a slip by its name, or how far off; or say why it is no answer."""
    given = parsed(text)
    if given is None:
        return Verdict(False, False, f"Write one number, such as 1,234.5 {problem.unit}, with a point for decimals.")
    means = readings(given, problem.unit)
    if not means:
        return Verdict(False, False, f"The answer is asked for in {problem.unit}, not in {given.unit[:20]}.")
    for reading in means:
        if _is_close(reading.value, problem.value, problem.tolerance):
            return Verdict(True, True, " ".join(filter(None, ("Right:", conclusion(problem), reading.remark))))
    slip = _diagnosed(problem, means, bool(given.unit))
    if slip is not None:
        return Verdict(True, False, f"Not yet: {slip.name}. {slip.why}", slip.name)
    return Verdict(True, False, _how_far(means[0].value, problem.value))


def conclusion(problem: Problem) -> str:
    """The last line of the derivation, which holds the answer."""
    return problem.truth.derivation[-1]


def all_slips(problem: Problem, with_unit: bool = False) -> list[Slip]:
    """The slips of the form, then those of units that differ from them; an answer without unit may have lost it."""
    slips = list(problem.slips)
    for slip in _unit_slips(problem, with_unit):
        others = [float(problem.truth), *(s.value for s in slips)]
        if all(_can_tell_apart(slip.value, other, problem.tolerance) for other in others):
            slips.append(slip)
    return slips


def _unit_slips(problem: Problem, with_unit: bool) -> list[Slip]:
    """Mistakes of units, for bytes and times: bits for bytes, GiB for GB, a unit left out."""
    measure, truth = measure_of(problem.unit)[0], float(problem.truth)
    size = measure_of(problem.unit)[1]
    slips = []
    if measure in ("bytes", "bytes/s"):
        slips.append(Slip("bits for bytes", 8 * truth))
        for power, prefix in enumerate(BINARY, 1):
            if with_unit or size in (1000.0**power, 1024.0**power):
                slips.append(Slip(f"{prefix}B for {prefix[0].replace('K', 'k')}B", truth * (1000 / 1024) ** power))
                slips.append(Slip(f"{prefix[0].replace('K', 'k')}B for {prefix}B", truth * (1024 / 1000) ** power))
    if with_unit or measure not in ("bytes", "bytes/s", "time"):
        return slips
    bases = (1000, 1024) if measure.startswith("bytes") else (1000,)
    shifts = [base**power for base in bases for power in (-3, -2, -1, 1, 2, 3)]
    return slips + [Slip("unit left out", truth * shift) for shift in shifts]


def _diagnosed(problem: Problem, means: list[Reading], with_unit: bool) -> Slip | None:
    """The known slip nearest to the answer, if one is near."""
    reach = max(problem.tolerance, LEAST_GAP / 2)
    near = [
        (abs(value - reading.value), slip)
        for slip in all_slips(problem, with_unit)
        for value in [problem.smallest(slip.value)]
        for reading in means
        if _is_close(reading.value, value, reach)
    ]
    return min(near, key=lambda pair: pair[0])[1] if near else None


def _how_far(value: float, truth: float) -> str:
    if value <= 0 or truth <= 0:
        return "Not yet, and no slip that is known here: write the formula down first, then the numbers."
    factor = max(value, truth) / min(value, truth)
    direction = "large" if value > truth else "small"
    return f"Not yet: too {direction} by a factor of {plain(factor)}, and no slip that is known here."


def _is_close(value: float, truth: float, tolerance: float) -> bool:
    return abs(value - truth) <= max(tolerance * abs(truth), 1e-9 * abs(truth), 1e-12)


def _can_tell_apart(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) > max(2 * tolerance, LEAST_GAP) * max(abs(one), abs(other))


def written(problem: Problem, value: float) -> str:
    """A value of the truth's unit as a learner would type it: written(p, 2.68e9) == "2.68435 GB"."""
    return f"{in_unit(problem.smallest(value), problem.unit):.10g} {problem.unit}".rstrip()
