"""What every picture has, whatever it shows, and every control with numbers."""

from typing import TypedDict

from minivllm.errors import MiniVLLMError


class Picture(TypedDict):
    """What every picture says: a sentence, its spoken form, its text twin, and what went wrong ("" if nothing)."""

    title: str
    aria: str
    text: str
    status: str


def whole_number(control: str, value: object, least: int, most: int) -> int:
    """A control's value as a whole number within its range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise MiniVLLMError(f"{control} must be a whole number from {least} to {most}, not {value!r}")
    return value
