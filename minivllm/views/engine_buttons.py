"""Buttons and a slider for a live engine: each calls a function of the notebook, and says what came of it.

The view imports no engine. A function runs on the kernel thread that brought the click, while cells may run too:
it must be safe to call from any thread (LLM's are: a lock lets one in at a time).
"""

from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from minivllm.errors import MiniVLLMError, short
from minivllm.views.picture import Picture
from minivllm.views.png import Canvas
from minivllm.views.theme import NEUTRAL, clipped
from minivllm.views.widget import View, script

Action = Callable[[str], str]  # what was typed into the field -> what happened


class ButtonsPicture(Picture):
    """Everything the browser draws."""

    buttons: list[str]
    field: str | None
    slider: str | None
    values: list[int]
    chosen: int
    said: str


class EngineButtons(View):
    """`EngineButtons({"one step": step, "block size": restart}, field="Once", slider=("block size", [1, 4, 16], 4))`.

    Each action is a button, but the one that the slider names: it gets the slider's value. `field` is a text to
    start from, which the buttons hand to their actions.
    """

    _esm = script("engine_buttons.js")

    def __init__(
        self,
        actions: Mapping[str, Action],
        field: str | None = None,
        slider: tuple[str, Sequence[int], int] | None = None,
    ) -> None:
        self._actions = dict(actions)
        self._field = field
        self._slider = slider[0] if slider else None
        self._values = list(slider[1]) if slider else []
        self._chosen = slider[2] if slider else 0
        self._said = "Press a button."
        super().__init__()

    def drawn(self) -> ButtonsPicture:
        names = [name for name in self._actions if name != self._slider]
        place = f"[ {self._slider}: {self._chosen} of {self._values} ] " if self._slider else ""
        return {
            "title": "Drive the engine",
            "aria": f"Buttons that drive the engine: {', '.join(names)}. {self._said}",
            "text": f"{place}[ {' ] [ '.join(names)} ]\n{self._said}",
            "status": "",
            "buttons": names,
            "field": self._field,
            "slider": self._slider,
            "values": self._values,
            "chosen": self._chosen,
            "said": self._said,
        }

    def image(self) -> Image.Image:
        canvas, picture = Canvas(760, 62), self.drawn()
        x = 8.0
        if picture["slider"]:
            x = canvas.text(x, 10, f"{picture['slider']}: {picture['chosen']}") + 14
        for name in picture["buttons"]:
            end = canvas.text(x + 8, 10, name)
            canvas.box((x, 4, end - x + 8, 24), border=NEUTRAL)
            x = end + 14
        canvas.paragraph(8, 38, picture["said"], 740)
        return canvas.image

    def move(self, control: str, value: object) -> None:
        """Press a button or move the slider. The action runs outside the view's lock: it may take its time."""
        action = self._actions.get(control)
        if action is None:
            raise MiniVLLMError(f"there is no control {short(control)}; there are: {', '.join(self._actions)}")
        if control == self._slider and value not in self._values:
            raise MiniVLLMError(f"{control} must be one of {self._values}, not {short(value)}")
        said = action(str(value or ""))
        with self._lock:
            if control == self._slider and isinstance(value, int):
                self._chosen = value
            self._said, self._failure = clipped(said, 200), ""
        self.refresh()
