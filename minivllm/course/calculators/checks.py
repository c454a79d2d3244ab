"""The door: numbers that make no sense are refused in one line that names them and says what is allowed."""

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TypeVar

from minivllm.course.calculators.worked import Amount, Number, Worked, scalar
from minivllm.errors import ConfigError, short

T = TypeVar("T")
LARGEST = 1e30  # no count, byte or rate of this world is larger; beyond it floats would overflow
SMALLEST = 1e-30  # the same for what is divided by


def whole(name: str, value: Amount, least: int = 1) -> int:
    """A whole number of at least `least`; 4096.0 counts as one. Raises ConfigError."""
    amount = _amount(name, value, f"a whole number of at least {least}")
    if amount != int(amount) or amount < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {short(amount)}")
    return int(amount)


def positive(name: str, value: Amount) -> Number:
    """A finite number above 0. Raises ConfigError."""
    amount = _amount(name, value, "a number above 0")
    if amount <= 0:
        raise ConfigError(f"{name} must be above 0, not {short(amount)}")
    if amount < SMALLEST:
        raise ConfigError(f"{name} must be at least {SMALLEST:g}, not {short(amount)}; check its unit")
    return amount


def at_least(name: str, value: Amount, least: Number = 0) -> Number:
    """A finite number, `least` or more. Raises ConfigError."""
    amount = _amount(name, value, f"a number of at least {least}")
    if amount < least:
        raise ConfigError(f"{name} must be at least {least}, not {short(amount)}")
    return amount


def share(name: str, value: Amount, *, can_be_zero: bool = True, can_be_one: bool = True) -> Number:
    """A share of a whole: from 0 to 1. Raises ConfigError."""
    amount = _amount(name, value, "a number from 0 to 1")
    if not 0 <= amount <= 1 or (amount == 0 and not can_be_zero) or (amount == 1 and not can_be_one):
        low, high = "0" if can_be_zero else "above 0", "to 1" if can_be_one else "to below 1"
        raise ConfigError(f"{name} must be from {low} {high}, not {short(amount)}; write 90% as 0.9")
    return amount if can_be_zero else positive(name, amount)


def listed(name: str, values: Iterable[T], least: int = 1) -> list[T]:
    """The entries of a list with at least so many. Raises ConfigError."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"{name} must be a list, not {short(values)}")
    entries = list(values)
    if len(entries) < least:
        raise ConfigError(
            f"{name} must have at least {least} {'entry' if least == 1 else 'entries'}, not {len(entries)}"
        )
    return entries


def chosen(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of these words. Raises ConfigError."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {short(value)}")
    return value


def distribution(name: str, values: object) -> tuple[float, ...]:
    """Probabilities that sum to 1. Raises ConfigError."""
    if not isinstance(values, Iterable):
        raise ConfigError(f"{name} must be a list of probabilities, not {short(values)}")
    shares = tuple(float(share(f"{name}[{i}]", value)) for i, value in enumerate(listed(name, values)))
    if abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"{name} must sum to 1, not {sum(shares):.6g}")
    return shares


def _amount(name: str, value: Amount, wanted: str) -> Number:
    is_number = isinstance(value, Real | Worked) and not isinstance(value, bool)
    if not is_number:
        raise ConfigError(f"{name} must be {wanted}, not {short(value)}")
    if isinstance(value, Worked):
        _check_unit(name, value.unit)
    amount = scalar(value)
    if isinstance(amount, int) and abs(amount) > LARGEST:
        raise ConfigError(f"{name} must be at most {LARGEST:g}; check its unit")
    if not abs(amount) <= LARGEST:  # NaN too
        raise ConfigError(f"{name} must be {wanted}, not {amount}")
    return amount


def _check_unit(name: str, unit: str) -> None:
    """Tokens where bytes are asked for, or bytes where tokens are. A number without a unit is taken as it is."""
    is_bytes, asks_bytes = unit.startswith("byte"), "bytes" in name or name == "pool"
    if unit and asks_bytes and not is_bytes:
        raise ConfigError(f"{name} is asked for in bytes, not in {unit}; see slots_to_bytes and weight_bytes")
    if is_bytes and "token" in name and not asks_bytes:
        raise ConfigError(f"{name} is a number of tokens, not of {unit}; see tokens_in_pool")
