"""What every picture has, whatever it shows."""

from typing import TypedDict


class Picture(TypedDict):
    """What every picture says: a sentence, its spoken form, its text twin, and what went wrong ("" if nothing)."""

    title: str
    aria: str
    text: str
    status: str
