"""Faults that engines had, to switch on one at a time and to watch how long they stay unseen.

A fault is switched on by patching the engine, which nothing else may do: the engine itself shall not know a wrong way,
and a copy of it with faults built in would soon be another engine. `switched_on` takes the patch off again, whatever
happens, and it holds for the whole process: no other engine may run in it meanwhile.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from random import Random
from statistics import median

from tqdm import tqdm

from minivllm.config import require_integers
from minivllm.errors import ConfigError
from minivllm.lab.faults import FAULTS, Fault
from minivllm.lab.random_life import live_at_random


@dataclass(frozen=True)
class Caught:
    """In which step a fault was seen, by which invariant, and in which words."""

    step: int
    invariant: str  # "none" where an assertion without a name or another error stopped the engine
    message: str


MUSEUM: dict[str, Fault] = {fault.name: fault for fault in FAULTS}


@contextmanager
def switched_on(name: str) -> Iterator[Fault]:
    """Run the block with a fault in the engine, in this process and every thread of it.

    Raises ConfigError for a name that is not in the museum.
    """
    fault = _named(name)
    originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in fault.patches]
    try:
        for owner, attribute, mutant in fault.patches:
            setattr(owner, attribute, mutant)
        yield fault
    finally:
        for owner, attribute, original in originals:
            setattr(owner, attribute, original)


def hunt(name: str | None, seed: int = 0, most_steps: int | None = None) -> Caught | None:
    """Random lives of an engine with a fault (None: as it is) until an invariant objects; None when none does.

    By default the hunt ends after the steps that the fault has, 1000 for the engine as it is. Raises ConfigError for an
    unknown fault and for less than one step.
    """
    fault = _named(name) if name is not None else None
    if most_steps is None:
        most_steps = fault.within_steps if fault else 1000
    _require_one(most_steps=most_steps)
    seen: Counter[str] = Counter()
    with switched_on(fault.name) if fault else nullcontext():
        try:
            live_at_random(Random(seed), most_steps, seen, **(fault.options if fault else {}))
        except (AssertionError, LookupError) as error:
            named = re.match(r"I\d+", str(error))
            return Caught(seen["steps"], named[0] if named else "none", str(error))
    return None


def study(num_seeds: int = 3, most_steps: int = 20_000) -> str:
    """Hunt every fault with several seeds: by which invariant each is caught and after how many steps."""
    _require_one(num_seeds=num_seeds, most_steps=most_steps)
    rows = [("fault", "where it happened", "caught by", "after steps")]
    for fault in tqdm(MUSEUM.values(), desc="faults", leave=False):
        hunts = [hunt(fault.name, seed, most_steps) for seed in range(num_seeds)]
        names = sorted({caught.invariant if caught else "nothing" for caught in hunts})
        steps = [caught.step if caught else most_steps for caught in hunts]
        spread = f"{median(steps):,.0f} ({min(steps):,} to {max(steps):,})"
        rows.append((fault.name, fault.source, ", ".join(names), spread))
    survived = [hunt(None, seed, most_steps) for seed in range(num_seeds)]
    names = sorted({caught.invariant if caught else "nothing" for caught in survived})
    rows.append(("none: the engine as it is", "", ", ".join(names), f"{num_seeds * most_steps:,} lived through"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _named(name: str) -> Fault:
    if name not in MUSEUM:
        raise ConfigError(f"museum: no fault is called {name!r}; there are: {', '.join(MUSEUM)}")
    return MUSEUM[name]


def _require_one(**counts: int) -> None:
    require_integers(**counts)
    for name, number in counts.items():
        if number < 1:
            raise ConfigError(f"museum: {name} must be at least 1, not {number}")
