"""What all live views share: one picture, drawn purely, pushed at most ten times a second, with fixed twins.

A view keeps its controls in a frozen dataclass and draws a `Picture` from them and from events. The browser gets
that picture as one trait and answers with messages {control, value}; a kernel subshell thread handles those while
cells and engine run, so controls are swapped under a lock and every error ends in the status line, never in a print.
"""

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import anywidget
import ipywidgets
import traitlets
from PIL import Image

from minivllm.errors import MiniVLLMError
from minivllm.views.picture import Picture
from minivllm.views.publisher import Publisher
from minivllm.views.theme import clipped

STATIC = Path(__file__).parent / "static"
MimeBundle = tuple[dict[str, object], dict[str, object]]


def script(name: str) -> str:
    """The JavaScript of a view as one module: the shared helpers, then its own file."""
    return (STATIC / "dom.js").read_text() + (STATIC / name).read_text()


class View(anywidget.AnyWidget):
    """A widget that draws itself from events; subclasses say `drawn`, `image` and `_moved`."""

    _css = (STATIC / "views.css").read_text()
    picture = traitlets.Dict().tag(sync=True)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failure = ""
        self._followers: list[Callable[[], None]] = []
        self._publisher = Publisher(self._publish)
        super().__init__()
        self.picture = dict(self.drawn())
        self.on_msg(self._receive)

    def drawn(self) -> Picture:
        """The picture of this moment."""
        raise NotImplementedError

    def image(self) -> Image.Image:
        """The picture of this moment as pixels, for places that run no script."""
        raise NotImplementedError

    def move(self, control: str, value: object) -> None:
        """Set a control, as a click in the browser does. Raises MiniVLLMError for what the control cannot take."""
        with self._lock:
            self._moved(control, value)
            self._failure = ""
        self.refresh()

    def refresh(self) -> None:
        """Redraw soon, from the publisher's thread."""
        self._publisher.request()

    def flush(self) -> None:
        """Wait until the browser was sent what is true now."""
        self._publisher.flush()

    def follow_with(self, follower: Callable[[], None]) -> None:
        """Call `follower` after each new picture."""
        self._followers.append(follower)

    def stop(self) -> None:
        """Send the last picture and end the thread; the view stays where it is."""
        self._publisher.stop()

    def close(self) -> None:
        if hasattr(self, "_publisher"):  # a view whose making failed has none, and is closed all the same
            self.stop()
        super().close()

    def png(self) -> bytes:
        return png_bytes(self.image())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.drawn()['title']})"

    def _repr_mimebundle_(self, **options: dict[str, object]) -> MimeBundle:
        return with_twins(super()._repr_mimebundle_(**options), self.drawn()["text"], self.image())

    def _moved(self, control: str, value: object) -> None:
        """Swap the controls for new ones; called with the lock held, so it asks no other view."""
        raise NotImplementedError

    def _receive(self, _widget: object, content: object, _buffers: object) -> None:
        """A message of the browser, on whatever thread the kernel runs it."""
        try:
            if not isinstance(content, Mapping) or not isinstance(content.get("control"), str):
                raise MiniVLLMError("the page sent a message that is not {control, value}")
            self.move(content["control"], content.get("value"))
        except Exception as error:
            with self._lock:
                self._failure = in_words(error)
            self.refresh()

    def _publish(self) -> None:
        try:
            picture = dict(self.drawn())
            picture["status"] = self._failure or picture["status"]
        except Exception as error:
            picture = {**self.picture, "status": in_words(error)}
        self.picture = picture
        for follower in self._followers:
            follower()


class Panel(ipywidgets.VBox):
    """Views one above the other, with one text and one PNG twin."""

    def __init__(self, *views: View) -> None:
        super().__init__(children=views)
        self.views = views

    def __repr__(self) -> str:
        return f"Panel({', '.join(map(repr, self.views))})"

    def _repr_mimebundle_(self, **options: dict[str, object]) -> MimeBundle:
        bundle = super()._repr_mimebundle_(**options)
        pair = (bundle, {}) if isinstance(bundle, dict) else bundle
        text = "\n\n".join(view.drawn()["text"] for view in self.views)
        return with_twins(pair, text, stacked([view.image() for view in self.views]))


def in_words(error: Exception) -> str:
    """An error as one line for the status of a view."""
    words = str(error) if isinstance(error, MiniVLLMError) else f"{type(error).__name__}: {error}"
    return clipped(" ".join(words.split()), 300)


def with_twins(bundle: object, text: str, image: Image.Image) -> MimeBundle:
    """A widget's bundle with its text and its PNG beside the live view."""
    data = dict(bundle[0]) if isinstance(bundle, tuple) else {}
    data |= {"text/plain": text, "image/png": png_bytes(image)}
    return data, {"image/png": {"width": image.width // 2}}  # drawn at twice the size, for sharp screens


def stacked(images: list[Image.Image]) -> Image.Image:
    """Images under each other, left-aligned."""
    whole = Image.new("RGBA", (max(i.width for i in images), sum(i.height for i in images)), (0, 0, 0, 0))
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    return whole


def png_bytes(image: Image.Image) -> bytes:
    """A small PNG; the same image gives the same bytes."""
    buffer = io.BytesIO()
    image.quantize(96, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
