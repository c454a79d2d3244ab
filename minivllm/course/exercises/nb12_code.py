"""Functions of notebook 12: the rule of one draft, and versions of it that are wrong in typical ways."""

from collections.abc import Sequence
from random import Random

from minivllm.course.exercises.exercise import Case, CodeProblem, Facts, Subject, named
from minivllm.course.speculation import token_at
from minivllm.course.speculation_records import chi_square, chi_square_p

Row = list[float]
NUM_SAMPLES = 600
SAMPLED = "600 samples"


def judge(p: Row, q: Row, draft: int, u: float) -> Row:
    """What this place's token is drawn from: the draft for certain, or the residual."""
    if u * q[draft] < p[draft]:
        return [float(token == draft) for token in range(len(p))]
    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    return [weight / sum(left) for weight in left]


def _residual(p: Row, q: Row) -> Row:
    left = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
    return [weight / sum(left) for weight in left]


def _kept(p: Row, draft: int) -> Row:
    return [float(token == draft) for token in range(len(p))]


def _always(p: Row, q: Row, draft: int, u: float) -> Row:
    return _kept(p, draft)


def _by_p(p: Row, q: Row, draft: int, u: float) -> Row:
    return _kept(p, draft) if u < p[draft] else _residual(p, q)


def _upside_down(p: Row, q: Row, draft: int, u: float) -> Row:
    return _kept(p, draft) if u * p[draft] < q[draft] else _residual(p, q)


def _from_p(p: Row, q: Row, draft: int, u: float) -> Row:
    return _kept(p, draft) if u * q[draft] < p[draft] else list(p)


def _not_normalised(p: Row, q: Row, draft: int, u: float) -> Row:
    if u * q[draft] < p[draft]:
        return _kept(p, draft)
    return [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]


def _no_max(p: Row, q: Row, draft: int, u: float) -> Row:
    if u * q[draft] < p[draft]:
        return _kept(p, draft)
    return [a - b for a, b in zip(p, q, strict=True)]


def _draft_left_out(p: Row, q: Row, draft: int, u: float) -> Row:
    if u * q[draft] < p[draft]:
        return _kept(p, draft)
    left = [0.0 if token == draft else chance for token, chance in enumerate(p)]
    return [weight / sum(left) for weight in left]


def run_judge(subject: Subject, case: Case) -> object:
    """One call; or, for the last case, many samples and whether a chi-square test takes them for the target's."""
    if case[0] != SAMPLED:
        return subject(*case)
    _, p, q, numbers = case
    assert isinstance(p, list) and isinstance(q, list) and isinstance(numbers, tuple), "a case of samples"
    counts = [0] * len(p)
    for draft_u, u, last_u in numbers:
        row = subject(list(p), list(q), token_at(q, draft_u), u)
        if not isinstance(row, Sequence):
            raise NotImplementedError
        counts[token_at(row, last_u)] += 1
    return "the target's" if chi_square_p(chi_square(counts, p), len(p) - 1) > 0.01 else f"not the target's: {counts}"


def judge_problem(random: Random, facts: Facts) -> CodeProblem:
    """Two tokens (N61), drafts that are sure to stand, and rows of four; then a test of many samples."""
    cases: list[Case] = [([0.6, 0.4], [0.8, 0.2], 0, 0.5), ([0.6, 0.4], [0.8, 0.2], 0, 0.9)]
    cases += [([0.6, 0.4], [0.8, 0.2], 1, 0.99)]
    for _ in range(40):
        p, q = _row(random, 4), _row(random, 4)
        cases.append((p, q, random.randrange(4), random.random()))
    p, q = [0.5, 0.2, 0.2, 0.1], [0.2, 0.5, 0.1, 0.2]
    numbers = tuple((random.random(), random.random(), random.random()) for _ in range(NUM_SAMPLES))
    samples: Case = (SAMPLED, p, q, numbers)
    cases += [samples] if run_judge(judge, samples) == "the target's" else []  # one draw in a hundred strays by chance
    wrong = {
        "every draft accepted: it stands with chance min(1, p / q) only": _always,
        "accepted with p: a draft was proposed with chance q already, so divide by it": _by_p,
        "ratio upside down": _upside_down,
        "replaced from p: accepted drafts have had their part of p; draw from max(p − q, 0)": _from_p,
        "residual not normalised: its weights must sum to 1": _not_normalised,
        "q subtracted without max: a chance below 0 is none; where q is larger, nothing is left": _no_max,
        "only the draft left out: that is the residual of a certain draft; with q known, subtract q": _draft_left_out,
    }
    question = (
        "judge returns the row from which this place's token is drawn. The target says p, the drafter said q (lists of "
        "chances), `draft` is its token, u is a number from [0, 1). If the draft is accepted (u < p / q), the row is 1 "
        "for the draft and 0 elsewhere; if not, it is the residual. The last case is a chi-square test of 600 samples."
    )
    return CodeProblem(question, "def judge(p, q, draft, u):\n    ...", judge, tuple(cases), named(wrong), run_judge)


def _row(random: Random, size: int) -> Row:
    weights = [random.uniform(0.05, 1) for _ in range(size)]
    return [weight / sum(weights) for weight in weights]
