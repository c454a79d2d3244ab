"""A result with its derivation: a number, its unit, and the lines that a learner would write to get it.

Invariant: every line ends with the value it derives. A result may be given wherever a number is asked for; its lines
come first in the derivation of what follows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import total_ordering
from numbers import Integral, Real

from minivllm.course.calculators.units import over_unit, plain, shown, times_unit
from minivllm.errors import ConfigError, short

Number = int | float


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class Worked:
    """A value (or a tuple of them, one for each input), its unit, how it was found, and the parts it is made of.

    Compares and calculates like its value: `kv_bytes_per_token(config) * 4096 / 2**30`.
    """

    value: Number | tuple[Number, ...]
    unit: str
    derivation: tuple[str, ...]
    parts: Mapping[str, "Worked"] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([*self.derivation, *(f"  {line}" for line in self._asides())]) or shown(self.value, self.unit)

    def _repr_markdown_(self) -> str:
        """The result in bold, its derivation below: what Jupyter shows."""
        lines = [*(f"- {line}" for line in self.derivation), *(f"  - {line}" for line in self._asides())]
        text = "\n".join(lines).replace("*", r"\*").replace("_", r"\_")
        return f"**{shown(self.value, self.unit)}**\n\n{text}"

    def __float__(self) -> float:
        return float(self._scalar())

    def __int__(self) -> int:
        return int(self._scalar())

    def __bool__(self) -> bool:
        return bool(self.value)

    def __format__(self, spec: str) -> str:
        return format(self._scalar(), spec) if spec else str(self)

    def __index__(self) -> int:
        if not isinstance(self._scalar(), int):
            raise ConfigError(f"{shown(self.value, self.unit)} is no whole number; round it first")
        return int(self._scalar())

    def __round__(self, num_digits: int | None = None) -> Number:
        return round(self._scalar(), num_digits)

    def __iter__(self) -> Iterator[Number]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def __getitem__(self, index: int) -> Number:
        values = self._values()
        if isinstance(index, int) and not -len(values) <= index < len(values):
            raise ConfigError(f"this result holds {len(values)} values, counted from 0; there is no number {index}")
        return values[index]

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, Worked) else other))

    def __hash__(self) -> int:
        return hash(self.value)

    def __lt__(self, other: "Worked | Number") -> bool:
        return self._scalar() < scalar(other)

    def __add__(self, other: "Worked | Number") -> "Worked":
        return self._with("+", other, self._scalar() + scalar(other), self._same_unit(other, "added to"))

    def __sub__(self, other: "Worked | Number") -> "Worked":
        return self._with("−", other, self._scalar() - scalar(other), self._same_unit(other, "subtracted from"))

    def __mul__(self, other: "Worked | Number") -> "Worked":
        return self._with("×", other, self._scalar() * scalar(other), times_unit(self.unit, unit_of(other)))

    def __truediv__(self, other: "Worked | Number") -> "Worked":
        return self._with("/", other, self._scalar() / self._divisor(other), over_unit(self.unit, unit_of(other)))

    def __floordiv__(self, other: "Worked | Number") -> "Worked":
        return self._with("//", other, self._scalar() // self._divisor(other), over_unit(self.unit, unit_of(other)))

    def __mod__(self, other: "Worked | Number") -> "Worked":
        return self._with("mod", other, self._scalar() % self._divisor(other), self.unit)

    def __radd__(self, other: Number) -> "Worked":
        return self if other == 0 else self + other  # sum() begins with a bare 0

    __rmul__ = __mul__

    def __rsub__(self, other: Number) -> "Worked":
        return as_worked(other) - self

    def __rtruediv__(self, other: Number) -> "Worked":
        return as_worked(other) / self

    def __rfloordiv__(self, other: Number) -> "Worked":
        return as_worked(other) // self

    def _with(self, sign: str, other: "Worked | Number", value: Number, unit: str) -> "Worked":
        if not abs(value) <= 1e300:  # NaN too
            raise ConfigError(f"{_brief(self)} {sign} {_brief(other)} is no finite number")
        line = f"{_brief(self)} {sign} {_brief(other)} = {shown(value, unit)}"
        return Worked(value, unit, (*lines_of(self, other), line))

    def _asides(self) -> list[str]:
        """Lines of the parts that the derivation did not need."""
        return [line for line in lines_of(*self.parts.values()) if line not in self.derivation]

    def _scalar(self) -> Number:
        if isinstance(self.value, tuple):
            raise ConfigError(f"this result holds {len(self.value)} values; take one of them, such as list(result)[0]")
        return self.value

    def _values(self) -> tuple[Number, ...]:
        if isinstance(self.value, tuple):
            return self.value
        raise ConfigError("this result holds one value; give its calculator a list to get several")

    def _divisor(self, other: "Worked | Number") -> Number:
        if scalar(other) == 0:
            raise ConfigError(f"cannot divide {shown(self.value, self.unit)} by 0")
        return scalar(other)

    def _same_unit(self, other: "Worked | Number", verb: str) -> str:
        if isinstance(other, Worked) and other.unit != self.unit:
            raise ConfigError(f"a number of {other.unit or 'no unit'} cannot be {verb} one of {self.unit or 'no unit'}")
        return self.unit


Amount = int | float | Worked  # what every calculator takes where it asks for a number
Amounts = Amount | Iterable[Amount]  # one of them, or one for each case


def work(name: str, formula: str, value: Number, unit: str = "", *given: object, **parts: Worked) -> Worked:
    """A result with one line of its own, after the lines of those `given` that are results themselves."""
    middle = f" = {formula}" if formula else ""
    line = f"{name}{middle} = {shown(value, unit)}"
    return Worked(value, unit, (*lines_of(*given), line), parts)


def for_each(values: Amounts, calculate: Callable[[Amount], Worked]) -> Worked:
    """The result for one number, or the results for each of a list as one result with a tuple of values."""
    if isinstance(values, Worked) and isinstance(values.value, tuple):
        values = values.value
    if isinstance(values, int | float | Worked | str) or not isinstance(values, Iterable):
        return calculate(values)  # what is no number at all, the calculator's own check refuses
    if isinstance(values, bytes | Mapping | Set) or getattr(values, "shape", None) == ():  # an array of no dimension
        raise ConfigError(f"a number is needed, or a list of them in order, not {short(values)}")
    results = [calculate(value) for value in values]
    if not results:
        raise ConfigError("an empty list was given; give at least one number")
    return Worked(tuple(r._scalar() for r in results), results[0].unit, lines_of(*results))


def lines_of(*given: object) -> tuple[str, ...]:
    """Derivations of those that are results, one after the other, each line once."""
    lines = (line for each in given if isinstance(each, Worked) for line in each.derivation)
    return tuple(dict.fromkeys(lines))


def as_worked(value: Amount, unit: str = "") -> Worked:
    """A plain number as a result without derivation."""
    return value if isinstance(value, Worked) else Worked(value, unit, ())


def scalar(value: Amount) -> Number:
    """The one number behind an amount. Raises ConfigError for several, and for what is no number."""
    if isinstance(value, Worked):
        return value._scalar()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"a number is needed, not {short(value)}")
    return int(value) if isinstance(value, Integral) else float(value)  # numpy's numbers become Python's


def unit_of(value: Amount) -> str:
    return value.unit if isinstance(value, Worked) else ""


def _brief(value: Amount) -> str:
    """A number and its unit, without bytes written three ways."""
    return f"{plain(scalar(value))} {unit_of(value)}".rstrip()
