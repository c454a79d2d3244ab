"""Buttons for a live engine: each calls a function that the notebook hands in, and says in words what came of it.

The view imports no engine. A function runs on the kernel thread that brought the click, while cells may run too:
it must be safe to call from any thread (LLM's are: a lock lets one in at a time).
"""

from collections.abc import Callable, Mapping

from PIL import Image

from minivllm.errors import MiniVLLMError
from minivllm.views.picture import Picture
from minivllm.views.png import Canvas
from minivllm.views.theme import NEUTRAL, clipped
from minivllm.views.widget import View, script

Action = Callable[[str], str]  # what was typed into the field -> what happened


class ButtonsPicture(Picture):
    """Everything the browser draws."""

    buttons: list[str]
    field: str | None
    said: str


class EngineButtons(View):
    """`EngineButtons({"one step": step, ...}, field="Once upon a time")`; an action may return "" to say nothing."""

    _esm = script("engine_buttons.js")

    def __init__(self, actions: Mapping[str, Action], field: str | None = None) -> None:
        self._actions = dict(actions)
        self._field = field
        self._said = "Press a button."
        super().__init__()

    def drawn(self) -> ButtonsPicture:
        names = list(self._actions)
        return {
            "title": "Drive the engine",
            "aria": f"Buttons that drive the engine: {', '.join(names)}. {self._said}",
            "text": f"[ {' ] [ '.join(names)} ]\n{self._said}",
            "status": "",
            "buttons": names,
            "field": self._field,
            "said": self._said,
        }

    def image(self) -> Image.Image:
        canvas, picture = Canvas(760, 62), self.drawn()
        x = 8.0
        for name in picture["buttons"]:
            end = canvas.text(x + 8, 10, name)
            canvas.box((x, 4, end - x + 8, 24), border=NEUTRAL)
            x = end + 14
        canvas.paragraph(8, 38, picture["said"], 740)
        return canvas.image

    def move(self, control: str, value: object) -> None:
        """Press a button: the control is its name, the value what the field holds. Acts outside the view's lock."""
        action = self._actions.get(control)
        if action is None:
            raise MiniVLLMError(f"there is no button {control!r}; there are: {', '.join(self._actions)}")
        said = action(value if isinstance(value, str) else "")
        with self._lock:
            self._said, self._failure = clipped(said, 200), ""
        self.refresh()
