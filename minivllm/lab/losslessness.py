"""The losslessness lab: a rule of acceptance, the engine's or a broken one, drawn 100,000 times against its target.

Tokens form a chain: the row p that a token is drawn from depends on the token before it, as in a language model, and so
does the drafter's q. Each sample is two tokens long, so the rule is used at a first place, at a second one, and where
the extra token follows an accepted draft. Small vocabulary, all samples at once in numpy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minivllm.course.speculation_records import Trial
from minivllm.errors import MiniVLLMError, short

Rows = np.ndarray  # of numbers, [vocabulary]
NUM_SAMPLES = (100, 1_000, 10_000, 100_000)
TARGET = np.array(
    [[0.40, 0.30, 0.20, 0.10], [0.10, 0.60, 0.20, 0.10], [0.25, 0.25, 0.25, 0.25], [0.70, 0.05, 0.05, 0.20]]
)
DRAFTER = np.array(
    [[0.55, 0.15, 0.10, 0.20], [0.30, 0.30, 0.30, 0.10], [0.10, 0.20, 0.30, 0.40], [0.40, 0.30, 0.10, 0.20]]
)
LETTERS = "ABCD"


def accept(p: Rows, q: Rows) -> Rows:
    """The chance that each token is accepted when it is drafted: min(1, p / q)."""
    return np.minimum(1, p / q)


def residual(p: Rows, q: Rows) -> Rows:
    """What a rejected draft is replaced from: max(p - q, 0), normalised."""
    left = np.maximum(p - q, 0)
    return left / left.sum()


def extra(p: Rows, q: Rows) -> Rows:
    """What the token after the last accepted draft is drawn from: p itself."""
    return p


@dataclass(frozen=True)
class Rule:
    """Three functions of p and q, rows over the vocabulary; a learner replaces any of them."""

    accept: Callable[..., object] = accept
    residual: Callable[..., object] = residual
    extra: Callable[..., object] = extra


RULES: Mapping[str, Rule] = {
    "as published": Rule(),
    "accept every draft": Rule(accept=lambda p, q: np.ones_like(p)),
    "accept with p, not p / q": Rule(accept=lambda p, q: p),
    "replace from p": Rule(residual=lambda p, q: p),
    "residual not normalised": Rule(residual=lambda p, q: np.maximum(p - q, 0)),
    "q subtracted without max": Rule(residual=lambda p, q: p - q),
    "extra token from q": Rule(extra=lambda p, q: q),
}


def trial(rule: Rule, name: str = "yours", num_samples: int = NUM_SAMPLES[-1], seed: int = 0) -> Trial:
    """Two tokens of each sample, counted by pair; heads of the samples are counted apart. Raises MiniVLLMError."""
    size = len(TARGET)
    rng = np.random.default_rng(seed)
    tables = [_table(name, rule, start) for start in range(size)]
    first, is_kept = _judged(tables, np.zeros(num_samples, dtype=int), rng)
    second = np.where(is_kept, _drawn(np.stack([t.extra for t in tables])[first], rng), _judged(tables, first, rng)[0])
    pairs = first * size + second
    chances = (TARGET[0][:, None] * TARGET).reshape(-1)
    sizes = [n for n in NUM_SAMPLES if n < num_samples] + [num_samples]
    counts = {n: tuple(np.bincount(pairs[:n], minlength=size * size).tolist()) for n in sizes}
    words = tuple(a + b for a in LETTERS for b in LETTERS)
    return Trial(name, words, tuple(chances.tolist()), counts)


def trials(rules: Mapping[str, Rule] = RULES, seed: int = 0) -> list[Trial]:
    """One trial for each rule, all of them on the same random numbers."""
    return [trial(rule, name, seed=seed) for name, rule in rules.items()]


@dataclass(frozen=True)
class _Table:
    """A rule's rows at one token: numbers a learner's function returned, checked."""

    accept: Rows
    residual: Rows
    extra: Rows


def _table(name: str, rule: Rule, before: int) -> _Table:
    rows = []
    for part in ("accept", "residual", "extra"):
        try:
            given = getattr(rule, part)(TARGET[before].copy(), DRAFTER[before].copy())
            row = np.asarray(given, dtype=float)
        except Exception as error:
            raise MiniVLLMError(f"{name}: {part}(p, q) ended with {type(error).__name__}: {error}") from error
        if row.shape != TARGET[before].shape or not np.isfinite(row).all():
            raise MiniVLLMError(f"{name}: {part}(p, q) must give {len(TARGET)} finite numbers, not {short(given)}")
        rows.append(row)
    return _Table(*rows)


def _judged(tables: Sequence[_Table], before: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A token of each sample after `before`, drafted and judged, and whether its draft was accepted."""
    drafts = _drawn(DRAFTER[before], rng)
    chances = np.stack([table.accept for table in tables])[before, drafts]
    is_kept = rng.random(len(before)) < chances
    replaced = _drawn(np.stack([table.residual for table in tables])[before], rng)
    return np.where(is_kept, drafts, replaced), is_kept


def _drawn(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A token of each row, as engines draw: where the running sum first passes a number in [0, 1), else the last."""
    passed = rng.random(len(rows))[:, None] < np.cumsum(rows, axis=1)
    return np.where(passed.any(axis=1), passed.argmax(axis=1), rows.shape[1] - 1)
