"""What real runs of speculation say: acceptance by position, samples against the target, speed-ups that were recorded.

A result file of the last is {"provenance": {...}, "rows": [{model, batch, context, draft_length, planted_alpha, method,
tokens_per_s_on, tokens_per_s_off, speedup, formula_speedup}, ...]}; context may be absent, planted_alpha may be null.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from minivllm.course.calculators import tokens_per_round_from_shares
from minivllm.errors import MiniVLLMError
from minivllm.text_files import read_text

RECORDING = Path(__file__).parents[1] / "bench" / "results" / "speculation_h200.json"


class JudgedDraft(Protocol):
    """What the engine's event DraftJudged says of one request in one step."""

    @property
    def method(self) -> str: ...
    @property
    def draft_token_ids(self) -> Sequence[int]: ...
    @property
    def num_accepted(self) -> int: ...


@dataclass(frozen=True)
class Positions:
    """A proposer's drafts by position: how many were judged there, and how many of those accepted."""

    method: str
    reached: tuple[int, ...]
    accepted: tuple[int, ...]
    num_rounds: int

    def __post_init__(self) -> None:
        if any(a > r for a, r in zip(self.accepted, self.reached, strict=True)):
            raise MiniVLLMError(f"{self.method}: more drafts were accepted than judged at a position")
        if any(later > before for before, later in pairwise(self.accepted)) or self.reached[:1] > (self.num_rounds,):
            raise MiniVLLMError(f"{self.method}: a draft is judged only in a round whose earlier drafts were accepted")

    @property
    def rates(self) -> list[float]:
        """Accepted of judged at each position: all before it were accepted."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted, self.reached, strict=True)]

    @property
    def shares(self) -> list[float]:
        """The share of all rounds in which a position was accepted."""
        return [a / self.num_rounds if self.num_rounds else 0.0 for a in self.accepted]

    @property
    def alpha(self) -> float:
        """Accepted of judged over all positions: the one number that the formula wants."""
        return sum(self.accepted) / max(sum(self.reached), 1)

    @property
    def mean_length(self) -> float:
        """Tokens of a round, its last one included, as counted."""
        return float(tokens_per_round_from_shares(self.shares))


def positions_of(judged: Iterable[JudgedDraft]) -> list[Positions]:
    """Fold the engine's DraftJudged events, a proposer at a time; rounds without a draft say nothing of positions."""
    rounds: dict[str, list[tuple[int, int]]] = {}
    for one in judged:
        if one.draft_token_ids:
            rounds.setdefault(one.method, []).append((len(one.draft_token_ids), one.num_accepted))
    return [_positions(method, pairs) for method, pairs in rounds.items()]


def _positions(method: str, rounds: Sequence[tuple[int, int]]) -> Positions:
    longest = max(drafted for drafted, _ in rounds)
    reached = tuple(sum(i < drafted and i <= kept for drafted, kept in rounds) for i in range(longest))
    accepted = tuple(sum(i < kept for _, kept in rounds) for i in range(longest))
    seen = sum(n > 0 for n in reached)  # positions beyond were drafted and never judged
    return Positions(method, reached[:seen], accepted[:seen], len(rounds))


@dataclass(frozen=True)
class Trial:
    """How often each outcome came in so many samples, beside its chance under the target."""

    name: str
    outcomes: tuple[str, ...]
    expected: tuple[float, ...]  # chances
    counts: Mapping[int, tuple[int, ...]]  # by number of samples; the smaller ones are heads of the largest

    def chi_square(self, num_samples: int) -> float:
        return chi_square(self.counts[num_samples], self.expected)

    def p_value(self, num_samples: int) -> float:
        """The chance that a faultless rule strays at least so far."""
        return chi_square_p(self.chi_square(num_samples), sum(chance > 0 for chance in self.expected) - 1)

    def total_variation(self, num_samples: int) -> float:
        pairs = zip(self.counts[num_samples], self.expected, strict=True)
        return sum(abs(count / num_samples - chance) for count, chance in pairs) / 2


def chi_square(counts: Sequence[int], expected: Sequence[float]) -> float:
    """Sum of (seen - expected)^2 / expected; infinite where something came that cannot."""
    num = sum(counts)
    total = 0.0
    for count, chance in zip(counts, expected, strict=True):
        if chance > 0:
            total += (count - num * chance) ** 2 / (num * chance)
        elif count:
            return math.inf
    return total


def chi_square_p(statistic: float, degrees: int) -> float:
    """Upper tail of the chi-square distribution: Q(degrees / 2, statistic / 2), the incomplete gamma function."""
    a, x = degrees / 2, statistic / 2
    if x <= 0:
        return 1.0
    if x > 700:  # far beyond what a float can tell from 0
        return 0.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    return 1 - scale * _series(a, x) if x < a + 1 else scale * _fraction(a, x)


def _series(a: float, x: float) -> float:
    """Of the lower tail, for small x."""
    term = total = 1 / a
    n = a
    while abs(term) > 1e-16 * abs(total):
        n += 1
        term *= x / n
        total += term
    return total


def _fraction(a: float, x: float) -> float:
    """Of the upper tail, for large x: a continued fraction, from its far end."""
    value = 0.0
    for i in range(200, 0, -1):
        value = i * (i - a) / (x + 2 * i + 1 - a - value)
    return 1 / (x + 1 - a - value)


@dataclass(frozen=True)
class SpeedRow:
    """One model, batch and proposer, with drafts and without in the same run."""

    model: str
    batch: int
    draft_length: int
    method: str
    tokens_per_s_on: float
    tokens_per_s_off: float
    speedup: float
    formula_speedup: float
    planted_alpha: float | None = None
    context: int = 0

    def __post_init__(self) -> None:
        if abs(self.speedup - self.tokens_per_s_on / self.tokens_per_s_off) > 0.02 * self.speedup:
            raise MiniVLLMError(
                f"{self.model} at batch {self.batch}: speedup is not tokens_per_s_on / tokens_per_s_off"
            )


@dataclass(frozen=True)
class SpeedRuns:
    """All rows of one machine."""

    rows: tuple[SpeedRow, ...]
    facts: Mapping[str, object] = field(default_factory=dict)

    @staticmethod
    def load(path: str | Path = RECORDING) -> "SpeedRuns":
        """Read a result file. Raises MiniVLLMError that begins with the path for anything else."""
        return read_text(path, _parsed, "recorded speed-ups")

    @staticmethod
    def recorded() -> "SpeedRuns":
        """The runs that the package holds; none, where it holds none."""
        return SpeedRuns.load() if RECORDING.exists() else SpeedRuns(())

    @property
    def origin(self) -> str:
        """One line: which machine, commit and command."""
        if not self.rows:
            return "no run is recorded: floors of the data sheet only"
        gpu, commit = self.facts.get("gpu", "an unknown GPU"), self.facts.get("commit")
        return f"{gpu}, commit {commit}, seed {self.facts.get('seed')}: {self.facts.get('command')}"

    def series(self) -> dict[str, list[SpeedRow]]:
        """Rows by what was run, each series by its batch."""
        found: dict[str, list[SpeedRow]] = {}
        for row in sorted(self.rows, key=lambda r: r.batch):
            planted = "" if row.planted_alpha is None else f", α {row.planted_alpha:g}"
            found.setdefault(f"{row.model}, {row.method}, {row.draft_length} drafts{planted}", []).append(row)
        return found


def _parsed(text: str) -> SpeedRuns:
    known = set(SpeedRow.__dataclass_fields__)
    try:
        raw = json.loads(text)
        rows = [SpeedRow(**{key: value for key, value in row.items() if key in known}) for row in raw["rows"]]
        return SpeedRuns(tuple(rows), raw["provenance"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise MiniVLLMError(f"these are no recorded speed-ups ({type(error).__name__}: {error})") from error
