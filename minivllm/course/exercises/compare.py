"""Whether two answers are equal: numbers within a relative tolerance, sequences entry by entry, arrays as lists."""

from collections.abc import Mapping, Sequence, Set

LARGEST = 1e300


def plain(value: object) -> object:
    """What stands behind a result of a calculator, a NumPy number, an array or a tensor; all else as it is."""
    value = getattr(value, "value", value) if type(value).__name__ == "Worked" else value
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) and not isinstance(value, type) else value


def agrees(wanted: object, got: object, tolerance: float = 0.0) -> bool:
    """agrees([53, 0.5], (53, 0.5)); True and 1 differ, 2 and 2.0 do not; NaN equals NaN."""
    wanted, got = plain(wanted), plain(got)
    if isinstance(wanted, bool) or isinstance(got, bool):
        return isinstance(wanted, bool) and isinstance(got, bool) and wanted == got
    if isinstance(wanted, int | float) and isinstance(got, int | float):
        if not (abs(wanted) <= LARGEST and abs(got) <= LARGEST):  # NaN too; a longer integer has no float
            return wanted == got or (wanted != wanted and got != got)
        return abs(wanted - got) <= tolerance * max(abs(wanted), abs(got))
    if isinstance(wanted, str) or isinstance(got, str):
        return isinstance(wanted, str) and isinstance(got, str) and _word(wanted) == _word(got)
    if isinstance(wanted, Mapping) and isinstance(got, Mapping):
        return wanted.keys() == got.keys() and all(agrees(wanted[key], got[key], tolerance) for key in wanted)
    if is_sequence(wanted) and is_sequence(got):
        ours, theirs = list_of(wanted), list_of(got)
        return len(ours) == len(theirs) and all(agrees(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))
    return type(wanted) is type(got) and bool(wanted == got)


def is_sequence(value: object) -> bool:
    return isinstance(plain(value), Sequence | range) and not isinstance(value, str | bytes)


def list_of(value: object) -> list[object]:
    """The entries of a sequence, array or tensor; sets have no order and no place here."""
    value = plain(value)
    return list(value) if isinstance(value, Sequence | range) and not isinstance(value, Set) else [value]


def _word(text: str) -> str:
    return " ".join(text.lower().split())
