"""What a learner typed, read as numbers: 128 KiB, 2.68 GB, 20.9 ms, 88%; the readings that a unit leaves open.

1 kB = 1000 B, 1 KiB = 1024 B. "KB" is printed for both: each reading is tried, and the verdict names the one that fits.
"""

import re
from dataclasses import dataclass

DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
BINARY_BYTES = tuple(f"{prefix}B" for prefix in BINARY)
PREFIXES = {**DECIMAL, **BINARY}

UNITS: dict[str, tuple[str, float]] = {  # name -> (what it measures, how many of the smallest)
    **{f"{prefix}B": ("bytes", factor) for prefix, factor in PREFIXES.items()},
    **{f"{prefix}bit": ("bytes", factor / 8) for prefix, factor in PREFIXES.items()},
    **{f"{prefix}B/s": ("bytes/s", factor) for prefix, factor in PREFIXES.items()},
    **{f"{prefix}bit/s": ("bytes/s", factor / 8) for prefix, factor in PREFIXES.items()},
    **{f"{prefix}bps": ("bytes/s", factor / 8) for prefix, factor in DECIMAL.items()},
    "bytes": ("bytes", 1), "byte": ("bytes", 1), "bits": ("bytes", 0.125), "bytes/s": ("bytes/s", 1),
    "s": ("time", 1e6), "ms": ("time", 1e3), "us": ("time", 1), "µs": ("time", 1), "μs": ("time", 1),
    "%": ("percent", 1), "x": ("factor", 1), "×": ("factor", 1), "times": ("factor", 1),
}  # fmt: skip
NUMBER = re.compile(r"([+-]?(?:\d[\d_]*(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*)")
LONGEST = 60  # characters of an answer that is a number


@dataclass(frozen=True)
class Given:
    """A number as it was typed, and what stood after it."""

    number: float
    unit: str


@dataclass(frozen=True)
class Reading:
    """One value that an answer can mean, in the smallest units, and what should be said about its unit."""

    value: float
    remark: str = ""


def parsed(text: str) -> Given | None:
    """parsed("327,680 B") == Given(327680.0, "B"); None for what is no number, 1,5 with a decimal comma too."""
    match = NUMBER.fullmatch(text.strip().removeprefix("~").removeprefix("≈").strip())
    if match is None or len(text) > LONGEST or match[2].startswith((",", ".")):
        return None
    return Given(float(match[1].replace(",", "").replace("_", "")), match[2].strip())


def measure_of(unit: str) -> tuple[str, float]:
    """What a unit measures and its size in the smallest one: measure_of("GiB/token") == ("bytes", 2**30).

    A unit of its own kind, such as "blocks", measures itself.
    """
    return UNITS.get(unit) or UNITS.get(unit.split("/")[0], (unit, 1.0))


def readings(given: Given, asked: str) -> list[Reading]:
    """The values that an answer to a question asked in `asked` may mean; none where its unit measures other things."""
    measure, size = measure_of(asked)
    unit = given.unit.removesuffix(".")
    if not unit:
        bare = [Reading(given.number * size)]
        as_share = Reading(given.number * 100, f"As a percentage {given.number:g} is {given.number * 100:.4g}%.")
        return [*bare, as_share] if measure == "percent" else bare
    if unit in ("KB", "KB/s", "K") and measure in ("bytes", "bytes/s"):
        binary = "By KB you mean 1024 bytes: that is KiB, and kB is 1000."
        return [Reading(given.number * 1000, "KB is read as kB, 1000 bytes."), Reading(given.number * 1024, binary)]
    if unit in UNITS or unit.split("/")[0] in UNITS:
        theirs, their_size = measure_of(unit)
        return [Reading(given.number * their_size)] if theirs == measure else []
    if unit in DECIMAL or unit == "K":
        return [Reading(given.number * DECIMAL[unit.replace("K", "k")] * size)]
    return [Reading(given.number * size)] if _stem(unit) == _stem(asked) else []


def unit_name(given: Given) -> str:
    """As UNITS has it: unit_name(Given(2.0, "gib")) == "GiB"; what it does not have, as it was typed."""
    typed = given.unit.removesuffix(".")
    return next((name for name in UNITS if name.lower() == typed.lower()), typed) if typed not in UNITS else typed


def in_unit(value: float, unit: str) -> float:
    """A value of smallest units in another: in_unit(2**20, "MiB") == 1."""
    return value / measure_of(unit)[1]


def _stem(unit: str) -> str:
    """Blocks, block: in_unit and people count both."""
    return unit.lower().split("/")[0].removesuffix("s")
