"""How numbers and their units are written: bytes always in decimal and in binary units, side by side.

1 kB = 1000 B and 1 KiB = 1024 B. Published figures mix the two under one name, so neither is ever shown alone.
"""

from collections import Counter
from collections.abc import Iterable
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import SupportsFloat

from minivllm.errors import ConfigError, short

DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
RATES = {"byte/s": "B/s", "bytes/s": "B/s", "FLOP/s": "FLOP/s", "bit/s": "bit/s", "FLOP": "FLOP"}
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"))
FOUR_DIGITS = Context(prec=4, rounding=ROUND_HALF_UP)  # 1.125 GiB is 1.13, as people round, and not 1.12
ALL_DIGITS = Context(prec=400, rounding=ROUND_HALF_UP)
MOST_TERMS = 12
UNCOUNTED = ("s", "ms", "µs", "FLOP", "bit/s", "%", "×")


def shown(value: int | float | tuple[int | float, ...], unit: str = "") -> str:
    """A value as a derivation prints it: shown(819200, "bytes/token") == "819,200 bytes/token (819 kB = 800 KiB)"."""
    if isinstance(value, tuple):
        return f"({listing(map(plain, value))}) {unit}".rstrip()
    if unit == "s" or (unit == "ms" and 0 < abs(value) < 1e-3):
        return duration(value if unit == "s" else value / 1e3)
    if unit in RATES and abs(value) >= 1e9:
        scale, prefix = next(pair for pair in PREFIXES if abs(value) >= pair[0])
        return f"{plain(value / scale)} {prefix}{RATES[unit]}"
    text = f"{plain(value)}{unit}" if unit in ("×", "%") else f"{plain(value)} {_counted(value, unit)}".rstrip()
    is_bytes = unit.split("/")[0] in ("byte", "bytes") and not unit.endswith("/s")
    return f"{text} ({_both(float(value))})" if is_bytes and abs(value) >= 1000 else text


def decimal_and_binary(num_bytes: SupportsFloat) -> str:
    """decimal_and_binary(1_677_721_600) == "1.68 GB = 1.56 GiB". Raises ConfigError for what is no number of bytes."""
    is_huge = isinstance(num_bytes, int) and abs(num_bytes) > 1e300
    if is_huge or not isinstance(num_bytes, SupportsFloat) or not abs(float(num_bytes)) <= 1e300:
        raise ConfigError(f"num_bytes must be a number of bytes, not {'one so large' if is_huge else short(num_bytes)}")
    return _both(float(num_bytes))


def plain(value: int | float) -> str:
    """Whole numbers in full with commas, others to four digits: 131,072 and 4.793."""
    if isinstance(value, int) or (abs(value) < 1e15 and value == int(value)):
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e12:
        return f"{value:,.1f}".removesuffix(".0")
    return f"{float(FOUR_DIGITS.create_decimal(value)):.4g}"


def listing(terms: Iterable[str], separator: str = ", ") -> str:
    """Terms in a row; of very many the first, the last and how many they are: a vocabulary fills no line."""
    all_terms = list(terms)
    if len(all_terms) <= MOST_TERMS:
        return separator.join(all_terms)
    shown_terms = [*all_terms[: MOST_TERMS - 2], f"… [{len(all_terms):,} in all]", all_terms[-1]]
    return separator.join(shown_terms)


def counted(number: int, noun: str) -> str:
    """counted(1, "KV heads") == "1 KV head"."""
    return f"{number:,} {noun.removesuffix('s') if number == 1 else noun}"


def duration(seconds: int | float) -> str:
    """Seconds, milliseconds or microseconds, whichever reads best: duration(0.00479) == "4.79 ms"."""
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(seconds) >= scale:
            return f"{plain(seconds / scale)} {unit}"
    return f"{plain(seconds * 1e6)} µs" if seconds else "0 s"


def times_unit(left: str, right: str) -> str:
    """The unit of a product: times_unit("bytes/token", "tokens") == "bytes"."""
    (up, down), (up2, down2) = _parsed(left), _parsed(right)
    return _written(up + up2, down + down2)


def over_unit(left: str, right: str) -> str:
    """The unit of a quotient: over_unit("bytes", "bytes/token") == "tokens"."""
    (up, down), (up2, down2) = _parsed(left), _parsed(right)
    return _written(up + down2, down + up2)


def _parsed(unit: str) -> tuple[Counter[str], Counter[str]]:
    above, _, below = unit.partition("/")
    return _words(above), _words(below)


def _words(text: str) -> Counter[str]:
    return Counter(w if w in UNCOUNTED else w.removesuffix("s") for w in text.split("·") if w not in ("", "1"))


def _written(up: Counter[str], down: Counter[str]) -> str:
    above, below = sorted((up - down).elements()), sorted((down - up).elements())
    if above and above[0] not in UNCOUNTED:
        above[0] += "s"
    top = "·".join(above) or ("1" if below else "")
    return f"{top}/{'·'.join(below)}" if below else top


def _counted(value: int | float, unit: str) -> str:
    """One block, two blocks."""
    above, slash, below = unit.partition("/")
    return above.removesuffix("s") + slash + below if value == 1 and above not in UNCOUNTED else unit


def _both(num_bytes: float) -> str:
    return f"{_scaled(num_bytes, 1000, DECIMAL)} = {_scaled(num_bytes, 1024, BINARY)}"


def _scaled(num_bytes: float, step: int, names: tuple[str, ...]) -> str:
    value, k = num_bytes, 0
    while abs(value) >= step - 0.5 and k < len(names) - 1:
        value, k = value / step, k + 1
    digits = 0 if k == 0 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    text = f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), context=ALL_DIGITS):,f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {names[k]}"
