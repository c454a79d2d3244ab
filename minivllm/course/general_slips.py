"""Mistakes that any number may suffer: a factor of two, bits for bytes, the other unit, rounding, one too many."""

from minivllm.course.answer_units import BINARY
from minivllm.course.exercises.exercise import Part, Slip, named

BYTE_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def general_slips(part: Part) -> list[Slip]:
    """Wrong values near or far from this part's answer, those of units first; none for lists and choices."""
    answer = part.answer
    if isinstance(answer, str | bool | tuple):
        return []
    wrong: dict[str, object] = {}
    if part.unit in BYTE_UNITS:
        wrong["bits for bytes"] = answer * 8
        wrong |= _other_units(part.unit, float(answer))
    if part.unit in ("ms", "s"):
        wrong |= {"unit left out": answer / 1000, f"another unit: give {part.unit}": answer * 1000}
    if part.unit == "%":
        wrong |= {"share of 1 for percent: multiply by 100": answer / 100, "share for its complement": 100 - answer}
    wrong["missing a factor of 2: is something counted once that is there twice?"] = answer / 2
    wrong["a factor of 2 too many: is something counted twice?"] = answer * 2
    if answer:
        wrong["upside down: above and below the fraction line are exchanged"] = 1 / answer
    slips = [slip for slip in named(wrong) if slip.answer != answer]
    if isinstance(answer, int):
        slips += [Slip("off by one", answer + step, "Count the ends again.") for step in (-1, 1)]
    return slips


def _other_units(unit: str, answer: float) -> dict[str, object]:
    """The same bytes in all other units: 128 for 131,072 bytes is right in KiB."""
    size = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    units = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, **{f"{p}B": n for p, n in BINARY.items()}}
    return {
        f"{name} for {unit}: the digits are right in {name}; the answer is asked for in {unit}": answer * size / other
        for name, other in units.items()
        if other != size
    }


def fraction_slip(part: Part, value: object) -> Slip | None:
    """A fraction within 1 of a whole answer: it was not rounded, or the wrong way."""
    if not isinstance(part.answer, int) or not isinstance(value, float) or value == int(value):
        return None
    if not 0 < abs(value - part.answer) < 1:
        return None
    return named({"floor forgotten" if value > part.answer else "rounded down": value})[0]
