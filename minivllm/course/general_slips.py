"""Mistakes that any number may suffer: a factor of two, bits for bytes, the other unit, rounding, one too many."""

from minivllm.course.answer_units import BINARY, DECIMAL, UNITS
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
        wrong |= {"unit left out": answer / 1000, f"another unit: Give it in {part.unit}": answer * 1000}
    if part.unit == "%":
        wrong |= {"share of 1 for percent: Multiply by 100": answer / 100, "share for its complement": 100 - answer}
    wrong["missing a factor of 2: Look for what is there twice and was counted once"] = answer / 2
    wrong["a factor of 2 too many: Look for what was counted twice"] = answer * 2
    if answer:
        wrong["upside down: Above and below the fraction line are exchanged"] = 1 / answer
    if part.unit in BYTE_UNITS and isinstance(answer, int):  # exact, so 2.4% off is no rounding
        wrong |= _other_thousand(part.unit, answer)
    slips = [slip for slip in named(wrong) if slip.answer != answer]
    if isinstance(answer, int):
        slips += [Slip("off by one", answer + step, "Count the ends again.") for step in (-1, 1)]
    return slips


def _other_units(unit: str, answer: float) -> dict[str, object]:
    """The same bytes in all other units: 128 for 131,072 bytes is right in KiB."""
    size = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    units = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, **{f"{p}B": n for p, n in BINARY.items()}}
    return {
        f"{name} for {unit}: The digits are right in {name}; the answer is asked for in {unit}": answer * size / other
        for name, other in units.items()
        if other != size
    }


def _other_thousand(unit: str, answer: int) -> dict[str, object]:
    """1000 taken for 1024 or the other way: 592 kB where 592 KiB is right, 2.4% apart at k, 10% at T."""
    num_bytes = answer * UNITS[unit][1]
    wrong: dict[str, object] = {}
    for decimal, binary in zip("kMGT", BINARY, strict=True):
        ratio = BINARY[binary] / DECIMAL[decimal]
        if num_bytes >= DECIMAL[decimal]:
            wrong |= {f"{decimal}B for {binary}B": answer / ratio, f"{binary}B for {decimal}B": answer * ratio}
    return wrong


def fraction_slip(part: Part, value: object) -> Slip | None:
    """A fraction within 1 of a whole answer, not rounded or the wrong way; or two digits of one that needs three."""
    if isinstance(part.answer, float) and value in {float(f"{part.answer:.{digits}g}") for digits in (1, 2)}:
        return named({"rounded too far": value})[0]
    if not isinstance(part.answer, int) or not isinstance(value, float) or value == int(value):
        return None
    if not 0 < abs(value - part.answer) < 1:
        return None
    return named({"floor forgotten" if value > part.answer else "rounded down": value})[0]
