"""Pictures as lists of marks, and their controls as data: what W3 to W7 draw, in the browser and in pixels alike.

A mark is a short tuple that ends with its kind. Colours are hex, or roles that the page's theme fills in: ink, soft,
line, page, pick. A filled box has a pattern too, so that no meaning hangs on colour alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict, TypeVar

from minivllm.errors import MiniVLLMError, short
from minivllm.views.picture import Picture, whole_number
from minivllm.views.theme import ink_on

WIDTH_PX = 720
Value = int | float | str
Chosen = TypeVar("Chosen")
Place = tuple[str, Value]  # a control, and the value that a click on a mark gives it


class Box(NamedTuple):
    """A rectangle; `pattern` is solid, hatch, dots, cross or outline, `words` what hovering tells."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    pattern: str = "solid"
    border: str = ""
    words: str = ""
    click: Place | None = None
    kind: str = "box"


class Line(NamedTuple):
    x: float
    y: float
    to_x: float
    to_y: float
    ink: str = "line"
    thickness: float = 1
    is_dashed: bool = False
    kind: str = "line"


class Words(NamedTuple):
    """One line of text, its top at `y`; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    size: float = 11
    ink: str = "ink"
    anchor: str = "start"
    kind: str = "words"


class Dot(NamedTuple):
    """A point of a plot; `shape` is circle, square or diamond."""

    x: float
    y: float
    shape: str
    fill: str
    radius: float = 6
    words: str = ""
    kind: str = "dot"


class Trail(NamedTuple):
    """A line through points, each [x, y]."""

    points: Sequence[tuple[float, float]]
    ink: str
    thickness: float = 1.5
    is_dashed: bool = False
    kind: str = "trail"


class Choice(NamedTuple):
    """A list to choose one value from: (value, words)."""

    name: str
    label: str
    options: list[tuple[str, str]]
    value: str
    kind: str = "choice"


class Slider(NamedTuple):
    """Values in order; `shown` is the chosen one with its unit."""

    name: str
    label: str
    values: list[Value]
    value: Value
    shown: str
    kind: str = "slider"


class Press(NamedTuple):
    """A button; `value` is what a click sends, `is_down` says that it holds now."""

    name: str
    label: str
    is_down: bool = False
    value: str = "press"
    kind: str = "press"


class Key(NamedTuple):
    """A line of the legend."""

    fill: str
    pattern: str
    words: str


Mark = Box | Line | Words | Dot | Trail
Control = Choice | Slider | Press


class Pace(TypedDict, total=False):
    """How a replay plays: what a step is called, and the milliseconds between two; a step and 400 unless told."""

    step_word: str
    tick_ms: int


class SketchPicture(Picture, Pace):
    """Everything the browser draws, and nothing it has to work out."""

    view: str  # names the view in the page: "roofline"
    width: float
    height: float
    marks: Sequence[Mark]
    controls: Sequence[Control]
    steps: tuple[int, int, int] | None  # of a replay: first, last, shown
    legend: Sequence[Key]
    lines: list[str]  # below the picture: a derivation, or what was decided
    lines_name: str
    provenance: str


def accepted(controls: Sequence[Control], name: str, value: object) -> Value:
    """A value as its control takes it. Raises MiniVLLMError for an unknown control, or a value that it has not."""
    control = next((control for control in controls if control.name == name), None)
    if control is None:
        raise MiniVLLMError(f"there is no control {short(name)}; there are: {', '.join(c.name for c in controls)}")
    values = _values_of(control)
    for known in values:
        if known == value and isinstance(value, bool) is False:
            return known
    listed = ", ".join(map(str, values[:8])) + (f" … {values[-1]}" if len(values) > 8 else "")
    raise MiniVLLMError(f"{name} must be one of {listed}, not {short(value)}")


def _values_of(control: Control) -> Sequence[Value]:
    match control:
        case Slider():
            return control.values
        case Choice():
            return [option for option, _ in control.options]
        case Press():
            return [control.value]


def with_control(chosen: Chosen, controls: Sequence[Control], name: str, value: object) -> Chosen:
    """The frozen dataclass of a view's controls with one value changed. Raises MiniVLLMError as `accepted` does."""
    changed = {name: accepted(controls, name, value)}
    return replace(chosen, **changed)  # type: ignore[type-var]  # a dataclass


def seek(steps: tuple[int, int, int] | None, value: object) -> int:
    """A step that can be shown. Raises MiniVLLMError for others, and where only the present can be."""
    if steps is None:
        raise MiniVLLMError("a live view shows the present; record a Trace and replay it to go back")
    return whole_number("step", value, steps[0], steps[1])


def ink_for(fill: str, pattern: str) -> str:
    """Ink for letters in a box."""
    return ink_on(fill) if pattern == "solid" and fill.startswith("#") else "ink"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of text, columns aligned: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
