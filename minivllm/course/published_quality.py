"""What smaller caches did to quality, as published: one study for each table, each point with what was paid for it.

The numbers are in published_quality.json, with the table that each was copied from. Studies differ in model, data and
measure, so quality is compared with the same study's MHA only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypedDict

from minivllm.errors import ConfigError, short

DATA = Path(__file__).with_name("published_quality.json")


@dataclass(frozen=True, slots=True)
class Point:
    """One variant of a study's model."""

    name: str
    kind: str  # mha, gqa, mqa or mla
    label: str
    cache_percent: float  # of what the study's MHA keeps of a token
    values: Mapping[str, float]  # by metric
    paid: str  # training from scratch, uptraining, conversion


@dataclass(frozen=True, slots=True)
class Study:
    """One table: variants of one model, judged alike."""

    id: str
    label: str
    source: str
    metrics: tuple[str, ...]
    baseline: str  # name of the point with MHA
    is_higher_better: bool
    points: tuple[Point, ...]

    def point(self, name: str) -> Point:
        """A variant by its name. Raises ConfigError for one there is not."""
        found = next((point for point in self.points if point.name == name), None)
        if found is None:
            known = ", ".join(point.name for point in self.points)
            raise ConfigError(f"{self.label} has no variant {short(name)}; there are: {known}")
        return found

    def change_percent(self, point: Point, metric: str) -> float:
        """How much better than MHA, in percent of MHA's value; negative is worse, also where less is better."""
        base = self.point(self.baseline).values[metric]
        change = 100 * (point.values[metric] - base) / base
        return (change if self.is_higher_better else -change) + 0.0  # no -0


class RawPoint(TypedDict):
    """A point of the file; `cache_numbers` are kept of a token, in the study's `cache_unit`."""

    name: str
    kind: str
    label: str
    cache_numbers: int
    values: dict[str, float]
    paid: str


class RawStudy(TypedDict):
    """A study of the file."""

    id: str
    label: str
    source: str
    metrics: list[str]
    is_higher_better: bool
    baseline: str
    cache_unit: str
    points: list[RawPoint]


@cache
def published_studies() -> tuple[Study, ...]:
    """The tables of the literature, in order of their year."""
    return tuple(_study(raw) for raw in json.loads(DATA.read_text(encoding="utf-8")))


def _study(raw: RawStudy) -> Study:
    whole = next(point["cache_numbers"] for point in raw["points"] if point["name"] == raw["baseline"])
    points = tuple(
        Point(p["name"], p["kind"], p["label"], 100 * p["cache_numbers"] / whole, p["values"], p["paid"])
        for p in raw["points"]
    )
    return Study(raw["id"], raw["label"], raw["source"], tuple(raw["metrics"]), raw["baseline"],
                 raw["is_higher_better"], points)  # fmt: skip
