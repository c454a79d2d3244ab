"""Percentiles of times over the last seconds, cheap to feed: counts by the logarithm of the time."""

from collections import Counter, deque
from math import exp, log

WIDTH = 0.02  # of a bucket, in logarithms: a percentile is off by 1 % at most
LEAST_S = 1e-6


class Latencies:
    """`add` as they happen, `roll` now and then: what is older than `window_s` leaves."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._fresh: Counter[int] = Counter()
        self._all: Counter[int] = Counter()  # of the window, those that are fresh left out
        self._past: deque[tuple[float, Counter[int]]] = deque()

    def add(self, seconds: float, count: int = 1) -> None:
        self._fresh[round(log(max(seconds, LEAST_S)) / WIDTH)] += count

    def roll(self, now_s: float) -> None:
        """Take in what came since the last call, let go of what is too old."""
        if self._fresh:
            self._all.update(self._fresh)
            self._past.append((now_s, self._fresh))
            self._fresh = Counter()
        while self._past and self._past[0][0] < now_s - self._window_s:
            self._all.subtract(self._past.popleft()[1])
            self._all = +self._all

    def percentiles_ms(self, *shares: float) -> tuple[float | None, ...]:
        """The time that a share of all stays within, by rank; None for each when there are none."""
        total, ordered = self._all.total(), sorted(self._all.items())
        return tuple(_at(ordered, share * total) for share in shares)


def _at(ordered: list[tuple[int, int]], rank: float) -> float | None:
    seen = 0
    for bucket, count in ordered:
        seen += count
        if seen >= rank:
            return exp(bucket * WIDTH) * 1e3
    return None
