"""Bits after quantization, scales by hand, and what a small float format can hold, from its exponent and mantissa."""

from collections.abc import Sequence

from minivllm.course.calculators.checks import LARGEST, at_least, chosen, listed, positive, whole
from minivllm.course.calculators.kv_bytes import Dtype, bits_of
from minivllm.course.calculators.units import plain
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work
from minivllm.errors import ConfigError

# What the highest exponent means: "ieee" infinities and NaNs; "fn" numbers but one NaN per sign; "fnuz" numbers only,
# NaN in the place of -0 and a bias one larger; "all" numbers only (OCP's 4- and 6-bit formats).
SPECIALS = ("ieee", "fn", "fnuz", "all")
FORMATS = {
    "float16": (5, 10, "ieee"), "bfloat16": (8, 7, "ieee"), "float32": (8, 23, "ieee"),
    "float8_e4m3fn": (4, 3, "fn"), "float8_e4m3fnuz": (4, 3, "fnuz"),
    "float8_e5m2": (5, 2, "ieee"), "float8_e5m2fnuz": (5, 2, "fnuz"), "float4_e2m1fn": (2, 1, "all"),
}  # fmt: skip


def effective_bits(bits: Amount, group_size: Amounts, scale_bits: Amount = 16, zero_point_bits: Amount = 16) -> Worked:
    """Bits per weight with the numbers stored beside each group: 4 + 32 / 128 == 4.25."""
    plain_bits, scale = positive("bits", bits), at_least("scale_bits", scale_bits)
    zero = at_least("zero_point_bits", zero_point_bits)

    def of_group(group: Amount) -> Worked:
        size = whole("group_size", group)
        formula = f"{plain(plain_bits)} + ({plain(scale)} + {plain(zero)}) / {size}"
        return work("effective bits", formula, plain_bits + (scale + zero) / size, "bits")

    return for_each(group_size, of_group)


def compression(key_dtype: Dtype, value_dtype: Dtype, from_dtype: Dtype = "bf16") -> Worked:
    """How many times smaller a cache gets: 16 / ((8 + 4) / 2) == 2.67 for 8-bit keys and 4-bit values."""
    before, keys, values = bits_of(from_dtype), bits_of(key_dtype), bits_of(value_dtype)
    formula = f"{plain(before)} / (({plain(keys)} + {plain(values)}) / 2)"
    return work("compression", formula, 2 * before / (keys + values), "×")


def largest(format_name: str) -> Worked:
    """The largest finite number: 448 for float8_e4m3fn, 240 for float8_e4m3fnuz, 57,344 for float8_e5m2."""
    return largest_of(*_format(format_name))


def largest_of(exponent_bits: Amount, mantissa_bits: Amount, specials: str) -> Worked:
    """The same from the layout: highest mantissa x 2^(highest exponent - bias)."""
    wide, fine, kind = _layout(exponent_bits, mantissa_bits, specials)
    bias = _bias(wide, kind)
    top = 2**wide - (2 if kind == "ieee" else 1) - bias
    steps = 2**fine - (2 if kind == "fn" else 1)
    value = (1 + steps / 2**fine) * 2.0**top
    return work("largest", f"(1 + {steps}/{2**fine}) × 2^{top}, bias {bias}", value, "")


def smallest_normal(format_name: str) -> Worked:
    """The smallest number with full precision: 2^(1 - bias)."""
    wide, _, kind = _format(format_name)
    return work("smallest normal", f"2^(1 − {_bias(wide, kind)})", 2.0 ** (1 - _bias(wide, kind)), "")


def smallest_subnormal(format_name: str) -> Worked:
    """The smallest number above 0: 2^(1 - bias - mantissa bits)."""
    wide, fine, kind = _format(format_name)
    bias = _bias(wide, kind)
    return work("smallest above 0", f"2^(1 − {bias} − {fine})", 2.0 ** (1 - bias - fine), "")


def relative_step(format_name: str) -> Worked:
    """From 1 to the next number: 2^-mantissa bits; the largest rounding error of a normal number is half of it."""
    _, fine, _ = _format(format_name)
    return work("step at 1", f"2^−{fine}", 2.0**-fine, "")


def scale_of(values: Sequence[Amount], bits: Amount = 8, is_symmetric: bool = True) -> Worked:
    """The step between neighbours, and (in parts) the zero point.

    Symmetric: largest |x| / (2^(b-1) - 1). Asymmetric: (max - min) / (2^b - 1), zero point round(-min / scale).
    """
    numbers = [float(at_least(f"values[{i}]", v, -LARGEST)) for i, v in enumerate(listed("values", values))]
    width = _bits("bits", bits, 2)
    low, high = min(numbers), max(numbers)
    spread, levels = (max(abs(low), abs(high)), 2 ** (width - 1) - 1) if is_symmetric else (high - low, 2**width - 1)
    if not spread:
        raise ConfigError("all values are equal: there is no range to divide; store the one value instead")
    scale = spread / levels
    formula = f"{plain(spread)} / {levels}" if is_symmetric else f"({plain(high)} − {plain(low)}) / {levels}"
    zero = 0 if is_symmetric else round(-low / scale)
    text = "symmetric" if is_symmetric else f"round({plain(-low)} / {plain(scale)})"
    return work("scale", formula, scale, "", zero_point=work("zero point", text, zero, ""))


def rounding_error(value: Amount, scale: Amount, zero_point: Amount = 0) -> Worked:
    """What is lost of one number: its place on the grid, back again, minus itself; at most half a scale."""
    number, step = float(at_least("value", value, -LARGEST)), positive("scale", scale)
    zero = whole("zero_point", zero_point, 0)
    code = round(number / step) + zero
    formula = f"({code} − {zero}) × {plain(step)} − {plain(number)}"
    lost = (code - zero) * step - number
    is_exact = abs(lost) < 1e-12 * max(abs(number), step)  # what remains is the float's own dust
    return work("rounding error", formula, 0.0 if is_exact else lost, "", scale)


def _format(name: str) -> tuple[int, int, str]:
    return FORMATS[chosen("format_name", name, tuple(FORMATS))]


def _layout(exponent_bits: Amount, mantissa_bits: Amount, specials: str) -> tuple[int, int, str]:
    wide, fine = _bits("exponent_bits", exponent_bits, 2, 10), _bits("mantissa_bits", mantissa_bits, 1)
    return wide, fine, chosen("specials", specials, SPECIALS)


def _bias(exponent_bits: int, specials: str) -> int:
    return 2 ** (exponent_bits - 1) - (0 if specials == "fnuz" else 1)


def _bits(name: str, bits: Amount, least: int, most: int = 32) -> int:
    """A number of bits that a format may have; more, and the numbers it writes grow beyond all use."""
    count = whole(name, bits, least)
    if count > most:
        raise ConfigError(f"{name} must be at most {most}, not {count}; give bits, not bytes or values")
    return count
