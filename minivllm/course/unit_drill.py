"""Questions on units, drawn one after the other: kB and KiB, GB and GiB, bits and bytes, and what papers print.

    drill("GB and GiB", "seed", 3).ask    # "1.125 GiB are how many GB?"

A figure of a paper is worked out by the calculators; only what was printed is quoted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from minivllm.course.answer_units import in_unit, measure_of
from minivllm.course.calculators import Worked, kv_bytes_of_sequence, kv_bytes_per_token, required_bandwidth
from minivllm.course.calculators.units import plain
from minivllm.course.exercises.exercise import Part, named
from minivllm.course.multiple_choice import MultipleChoice, Option, of_part, shuffled
from minivllm.errors import ConfigError, short

PREFIXES = ("k", "M", "G", "T")
EXCESS = {prefix: (1024 / 1000) ** power for power, prefix in enumerate(PREFIXES, 1)}  # binary over decimal


@dataclass(frozen=True, slots=True)
class Drill:
    """One question; `prefix` is the k, M, G or T it turns on, "" where it is about bits."""

    prefix: str
    question: MultipleChoice


@dataclass(frozen=True, slots=True)
class Printed:
    """A published figure: what it is, the text of the source, and the source's unit as it should be called."""

    what: str
    printed: str
    unit: str
    source: str
    find: Callable[[], Worked]


def published() -> list[Printed]:
    """Figures that print one unit and mean another, or mean what they print."""
    return [
        Printed("K and V of one token of OPT-13B", "800 KB", "KiB", "Kwon et al. 2023",
                lambda: kv_bytes_per_token("opt-13b")),
        Printed("K and V of 2,048 tokens of OPT-13B", "1.6 GB", "GiB", "Kwon et al. 2023",
                lambda: kv_bytes_of_sequence("opt-13b", 2048)),
        Printed("K and V of 2,048 tokens of OPT-13B", "1.7 GB", "GB", "vLLM's launch post, 2023",
                lambda: kv_bytes_of_sequence("opt-13b", 2048)),
        Printed("K and V of 512 tokens of OPT-66B", "1.13 GB", "GiB", "DistServe, 2024",
                lambda: kv_bytes_of_sequence("opt-66b", 512)),
        Printed("K and V of one token of DeepSeek-V3", "70.272 KB", "kB", "DeepSeek-V3 hardware paper, 2025",
                lambda: kv_bytes_per_token("deepseek-v3")),
        Printed("The link for 10 requests a second of 512 tokens of OPT-66B", "90 Gbps", "Gibit/s", "DistServe, 2024",
                lambda: required_bandwidth(kv_bytes_per_token("opt-66b"), 512, 10)),
    ]  # fmt: skip


def _to_decimal(random: Random, prefix: str) -> Drill:
    """GiB to GB."""
    size, decimal, binary = _size(random), f"{prefix}B", f"{_binary(prefix)}B"
    answer = size * EXCESS[prefix]
    wrong = {
        f"{binary} for {decimal}": size,
        f"divided instead of multiplied: 1 {decimal} is less than 1 {binary}, so there are more of them": size
        / EXCESS[prefix],
        "bits for bytes": answer * 8,
        **_one_step(size * 1.024, prefix),
    }
    ask = f"{size:g} {binary} are how many {decimal}?"
    return _drill(prefix, ask, answer, decimal, wrong, size * measure_of(binary)[1], random)


def _to_binary(random: Random, prefix: str) -> Drill:
    """GB to GiB."""
    size, decimal, binary = _size(random), f"{prefix}B", f"{_binary(prefix)}B"
    answer = size / EXCESS[prefix]
    wrong = {
        f"{decimal} for {binary}": size,
        f"multiplied instead of divided: 1 {binary} is more than 1 {decimal}, so there are fewer of them": size
        * EXCESS[prefix],
        "bits for bytes": answer * 8,
        **_one_step(size / 1.024, prefix),
    }
    ask = f"{size:g} {decimal} are how many {binary}?"
    return _drill(prefix, ask, answer, binary, wrong, size * measure_of(decimal)[1], random)


def _to_bytes(random: Random, _: str) -> Drill:
    """Gbit/s to GB/s."""
    rate = random.choice((10, 25, 40, 50, 100, 200, 400, 800))
    wrong = {
        "bits for bytes": rate,
        "multiplied instead of divided: one byte is 8 bits, so there are fewer bytes than bits": rate * 8,
        "GiB for GB": rate / 8 / EXCESS["G"],
    }
    return _drill(
        "", f"A link of {rate} Gbit/s carries how many GB/s?", rate / 8, "GB/s", wrong, rate * 1e9 / 8, random
    )


def _to_bits(random: Random, _: str) -> Drill:
    """GB/s to Gbit/s."""
    rate = random.randrange(5, 200) / 4
    wrong = {
        "bytes for bits": rate,
        "divided instead of multiplied: one byte is 8 bits, so there are more bits than bytes": rate / 8,
        "GiB for GB": rate * 8 / EXCESS["G"],
    }
    ask = f"Caches of {rate:g} GB arrive each second. How many Gbit/s must the link carry?"
    return _drill("", ask, rate * 8, "Gbit/s", wrong, rate * 1e9, random)


def _as_printed(random: Random, _: str) -> Drill:
    """Which unit a published figure is really in."""
    figure = random.choice(published())
    worked = figure.find()
    is_rate, num_bytes = worked.unit.endswith("/s"), float(worked)
    names = ("Gbit/s", "Gibit/s", "GB/s", "GiB/s") if is_rate else _four_units(figure.unit)
    values = {name: in_unit(num_bytes, name) for name in names}
    said = figure.printed.split()[0]
    wrong = [
        Option(name, f"{name} for {figure.unit}", f"That would be {plain(values[name])} {name}, printed was {said}")
        for name in names
        if name != figure.unit
    ]
    size = f"{num_bytes:,.0f} bytes{'/s' if is_rate else ''}"
    ask = f"{figure.what}: {size}. {figure.source}, prints “{figure.printed}”. In which unit is that right?"
    working = f"{size} = {plain(values[names[0]])} {names[0]} = {plain(values[names[1]])} {names[1]}"
    prefix = {"K": "k"}.get(figure.unit[0], figure.unit[0])
    return Drill(prefix, shuffled(ask, figure.unit, wrong, working, random))


MEMORY = {f"{p}B and {_p}B": p for p, _p in zip(PREFIXES, ("Ki", "Mi", "Gi", "Ti"), strict=True)}
TOPICS = ("all", *MEMORY, "bits and bytes", "as papers print it")


def drill(topic: str, seed: str, number: int) -> Drill:
    """Question `number` of a topic: the same for the same seed. Raises ConfigError for a topic that there is not."""
    if topic not in TOPICS:
        raise ConfigError(f"topic must be one of {', '.join(TOPICS)}, not {short(topic)}")
    random = Random(f"{seed}/{topic}/{number}")
    one = random.choice(TOPICS[1:]) if topic == "all" else topic
    if one in MEMORY:
        return random.choice((_to_decimal, _to_binary))(random, MEMORY[one])
    return _as_printed(random, "") if one == TOPICS[-1] else random.choice((_to_bytes, _to_bits))(random, "")


def _drill(
    prefix: str, ask: str, answer: float, unit: str, wrong: dict[str, float], num_bytes: float, random: Random
) -> Drill:
    part = Part(answer, named(wrong), unit)
    working = f"{num_bytes:,.0f} bytes{'/s' if unit.endswith('/s') else ''} = {plain(answer)} {unit}"
    return Drill(prefix, of_part(ask, part, [working], random))


def _size(random: Random) -> float:
    """A number whose digits differ in both units: 1.125 to 99.875."""
    return random.randrange(9, 800) / 8


def _binary(prefix: str) -> str:
    """_binary("k") == "Ki"."""
    return f"{prefix.upper()}i"


def _one_step(value: float, prefix: str) -> dict[str, float]:
    """The factor of kB and KiB, taken for larger units."""
    steps = PREFIXES.index(prefix) + 1
    reason = f"there are {steps} steps of 1024 beside 1000, not one"
    return {f"one step of 1024 only: {reason}": value} if steps > 1 else {}


def _four_units(unit: str) -> tuple[str, ...]:
    prefix = {"K": "k"}.get(unit[0], unit[0])
    return f"{prefix}B", f"{_binary(prefix)}B", f"{prefix}bit", f"{_binary(prefix)}bit"
