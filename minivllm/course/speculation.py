"""One round of speculation in plain Python, and what a chip makes of it; closed forms: calculators/speculation.py.

A round drafts tokens from q, looks at the target's p for every one of them, keeps a head, and adds one token of p's
own. `judge_round` is that rule with its random numbers given, so a picture can show them and tests can hold it against
the engine's (minivllm/speculative/verify.py). Probabilities are rows over a small vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from minivllm.course.calculators import accelerator, compute_ms, expected_tokens, read_ms, residual
from minivllm.course.calculators.checks import distribution, share, whole
from minivllm.course.step_work import Work, counted_model
from minivllm.errors import ConfigError

Row = Sequence[float]


@dataclass(frozen=True)
class Judged:
    """One draft: accepted where u is below its chance min(1, p / q)."""

    token_id: int
    target: tuple[float, ...]
    drafter: tuple[float, ...]
    chance: float
    u: float

    @property
    def is_accepted(self) -> bool:
        return self.u < self.chance

    @property
    def residual(self) -> tuple[float, ...]:
        """What replaces it if it is rejected: max(p - q, 0), normalised."""
        return _row(residual(self.target, self.drafter).value)


@dataclass(frozen=True)
class Round:
    """Drafts up to the first rejected one, and the token after them, drawn from `last_row`."""

    drafts: tuple[int, ...]
    judged: tuple[Judged, ...]
    last_row: tuple[float, ...]
    last_token: int

    @property
    def num_accepted(self) -> int:
        return sum(one.is_accepted for one in self.judged)

    @property
    def is_complete(self) -> bool:
        """Whether every draft was accepted, so that the last token is the extra one."""
        return self.num_accepted == len(self.drafts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What the round yields: always one more than was accepted."""
        return (*self.drafts[: self.num_accepted], self.last_token)


def acceptance_chance(p: float, q: float) -> float:
    """min(1, p / q) of a draft that was drawn, so q is above 0."""
    if q <= 0:
        raise ConfigError("a token with q = 0 cannot have been drafted; give its draft a chance above 0")
    return min(1.0, p / q)


def judge_round(
    targets: Sequence[Row], drafters: Sequence[Row], drafts: Sequence[int], chances: Sequence[float], last_u: float
) -> Round:
    """Leviathan's algorithm 1 with its random numbers given, each in [0, 1).

    targets: k + 1 rows of p. drafters: k rows of q. drafts: k tokens. chances: k numbers u. Raises ConfigError.
    """
    num_drafts = len(drafts)
    if len(targets) != num_drafts + 1 or len(drafters) != num_drafts or len(chances) != num_drafts:
        raise ConfigError(f"{num_drafts} drafts need as many q and u and one more p: verification sees one more place")
    rows = [distribution("target", row) for row in targets]
    judged: list[Judged] = []
    for p, q_row, token_id, u in zip(rows, drafters, drafts, chances, strict=False):
        q = distribution("drafter", q_row)
        judged.append(Judged(token_id, p, q, acceptance_chance(p[token_id], q[token_id]), u))
        if not judged[-1].is_accepted:
            return Round(tuple(drafts), tuple(judged), judged[-1].residual, token_at(judged[-1].residual, last_u))
    return Round(tuple(drafts), tuple(judged), rows[-1], token_at(rows[-1], last_u))


def token_at(row: Row, u: float) -> int:
    """The token at which the running sum of a row first passes u; the last one that has a chance, if none does."""
    total = 0.0
    for token_id, chance in enumerate(row):
        total += chance
        if u < total:
            return token_id
    return max((i for i, chance in enumerate(row) if chance > 0), default=len(row) - 1)


def drafts_of(drafters: Sequence[Row], numbers: Sequence[float]) -> list[int]:
    """One token of each row of q, at these numbers in [0, 1)."""
    return [token_at(row, u) for row, u in zip(drafters, numbers, strict=True)]


def normalised(weights: Row) -> tuple[float, ...]:
    """Weights as chances. Raises ConfigError where all are 0."""
    total = sum(weights)
    if total <= 0 or min(weights) < 0:
        raise ConfigError("weights must be 0 or more, and one of them above 0")
    return tuple(weight / total for weight in weights)


@dataclass(frozen=True)
class Verification:
    """A batch whose every request has so many drafts checked in one step, on a chip at its data sheet's rates."""

    model: str
    chip: str
    batch: int
    num_drafts: int
    context: int = 1024
    dtype: str = "bf16"  # of weights, K and V, and of the products

    @property
    def plain_ms(self) -> float:
        """A step without drafts: one token of each request."""
        return _floor_ms(self.model, self.chip, self.batch, 1, self.context, self.dtype)

    @property
    def verify_ms(self) -> float:
        """A step that checks all drafts: num_drafts + 1 tokens of each request."""
        return _floor_ms(self.model, self.chip, self.batch, self.num_drafts + 1, self.context, self.dtype)

    def products(self, num_drafts: int) -> Work:
        """The matrix products of a step; their intensity says on which side of the ridge it is."""
        return counted_model(self.model).products(self.batch * (num_drafts + 1), self.dtype)

    def round_ms(self, cost: float) -> float:
        """Drafting and checking; `cost` is the drafter's time for a token in plain steps of this batch."""
        return self.num_drafts * cost * self.plain_ms + self.verify_ms

    def speedup(self, alpha: float, cost: float) -> float:
        """Tokens a second with drafts over those without; below 1 it is a loss."""
        accepted = share("alpha", alpha)
        return float(expected_tokens(accepted, self.num_drafts)) * self.plain_ms / self.round_ms(cost)


def last_gain(load: Verification, alpha: float, cost: float, most: int = 4096) -> int:
    """The largest batch of which all smaller ones gain, too; 0 where one request alone loses, `most` if none does."""
    low, high = 0, most + 1
    while high - low > 1:  # the gain falls with the batch, for reading is shared and arithmetic is not
        middle = (low + high) // 2
        fitted = Verification(load.model, load.chip, middle, load.num_drafts, load.context, load.dtype)
        low, high = (middle, high) if fitted.speedup(alpha, cost) > 1 else (low, middle)
    return min(low, most)


@lru_cache(maxsize=8192)
def _floor_ms(model: str, chip: str, batch: int, num_new: int, context: int, dtype: str) -> float:
    """Products and attention one after the other; each waits for its bytes or for its arithmetic."""
    counted, card = counted_model(model), accelerator(chip)
    requests = whole("batch", batch)
    one = counted.attention([num_new], [context + num_new], dtype)
    attention = Work(one.num_bytes * requests, one.flops * requests)
    works = (counted.products(requests * num_new, dtype), attention)
    rate = dtype if dtype in card.flops else "bf16" if "bf16" in card.flops else next(iter(card.flops))
    return sum(max(float(read_ms(w.num_bytes, chip)), float(compute_ms(w.flops, chip, dtype=rate))) for w in works)


def _row(value: object) -> tuple[float, ...]:
    assert isinstance(value, tuple), "a residual is a row"
    return tuple(float(entry) for entry in value)
