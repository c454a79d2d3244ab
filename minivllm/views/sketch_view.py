"""A view whose picture is a sketch: subclasses say only what they draw and how their controls change."""

from collections.abc import Mapping

from PIL import Image

from minivllm.views.sketch import SketchPicture, Value
from minivllm.views.sketch_png import sketch_image
from minivllm.views.widget import View, script


class SketchView(View):
    """Draws a SketchPicture; W3 to W7 are its subclasses."""

    _esm = script("sketch.js")

    def drawn(self) -> SketchPicture:
        raise NotImplementedError

    def choose(self, chosen: Mapping[str, Value]) -> None:
        """Set controls at the start, in this order. Raises MiniVLLMError as `move` does."""
        for control, value in chosen.items():
            self._moved(control, value)
        self.picture = dict(self.drawn())

    def image(self) -> Image.Image:
        return sketch_image(self.drawn())
