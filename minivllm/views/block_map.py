"""W1, the block map: every physical block of the pool, who owns it and how full it is, live or replayed.

`draw` is pure: state in, picture (plain JSON) out. The browser and the PNG twin both draw that picture.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from PIL import Image

from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus
from minivllm.trace import Trace
from minivllm.views.block_map_picture import BlockMapPicture, draw, provenance
from minivllm.views.block_map_png import block_map_image
from minivllm.views.picture import whole_number
from minivllm.views.pool_fold import PoolFold
from minivllm.views.pool_state import PoolState
from minivllm.views.sources import LiveSource, Source, TraceSource
from minivllm.views.widget import View, script

__all__ = ["BlockMap", "draw"]


@dataclass(frozen=True, slots=True)
class Controls:
    """What the reader chose: a block, a slot in it, a request to stand out."""

    block: int | None = None
    highlight: str | None = None


Pointer = Callable[[PoolState], tuple[int, int] | None]  # (block, offset) that a linked view points at


class BlockMap(View):
    """The pool on screen: `BlockMap.follow(engine.events, header)` live, `BlockMap.replay(trace)` recorded."""

    _esm = script("block_map.js")

    def __init__(self, make_source: Callable[[Callable[[], None]], Source[PoolState]]) -> None:
        self._controls = Controls()
        self._pointer: Pointer = lambda state: None
        self._on_block: Callable[[int], None] = lambda block_id: None
        self.source = make_source(self.refresh)
        super().__init__()

    @staticmethod
    def follow(bus: EventBus, header: Mapping[str, object], past: Iterable[Event] = ()) -> "BlockMap":
        """Draw a pool while it works; `past` are events from before, if any blocks are taken already."""
        PoolFold(header)  # refuse a wrong header before there is a widget to take down again
        return BlockMap(lambda wake: LiveSource(PoolFold, bus, header, past, wake))

    @staticmethod
    def replay(trace: Trace) -> "BlockMap":
        """Draw a recorded run, at any of its steps."""
        if not isinstance(trace, Trace):
            raise MiniVLLMError(f"BlockMap.replay draws a Trace (Trace.load(path)), not {type(trace).__name__}")
        source = TraceSource(PoolFold, trace)
        return BlockMap(lambda wake: source)

    def watch(self, bus: EventBus, header: Mapping[str, object], past: Iterable[Event] = ()) -> None:
        """Turn to another engine: a new one, of another block size."""
        self.source.stop()
        self._controls = Controls()
        self.source = LiveSource(PoolFold, bus, header, past, self.refresh)
        self.refresh()

    @property
    def state(self) -> PoolState:
        return self.source.state()

    def link(self, pointer: Pointer, on_block: Callable[[int], None]) -> None:
        """Let another view point at a slot, and tell it which block the reader chose here."""
        self._pointer, self._on_block = pointer, on_block
        self.refresh()

    def release_block(self) -> None:
        """Forget the block chosen here, so that the linked view's pointer counts."""
        with self._lock:
            self._controls = replace(self._controls, block=None)
        self.refresh()

    def move(self, control: str, value: object) -> None:
        """Controls: step (of a replay), block (a number or None), highlight (a request id or None)."""
        super().move(control, value)
        if control == "block" and isinstance(value, int):
            self._on_block(value)

    def drawn(self) -> BlockMapPicture:
        state, controls = self.state, self._controls
        pointed = self._pointer(state) if controls.block is None else (controls.block, None)
        block, offset = pointed or (None, None)
        return draw(state, block, offset, controls.highlight, self.source.steps, provenance(self.source.header))

    def image(self) -> Image.Image:
        return block_map_image(self.drawn())

    def stop(self) -> None:
        self.source.stop()
        super().stop()

    def _moved(self, control: str, value: object) -> None:
        match control:
            case "step":
                if self.source.steps is None:
                    raise MiniVLLMError("a live map shows the present; record a Trace and replay it to go back")
                first, last, _ = self.source.steps
                self.source.seek(whole_number("step", value, first, last))
            case "block":
                last = len(self.picture["cells"]) - 1
                block = None if value is None else whole_number("block", value, 0, last)
                self._controls = replace(self._controls, block=block)
            case "highlight" if value is None or isinstance(value, str):
                self._controls = replace(self._controls, highlight=value)
            case _:
                raise MiniVLLMError(f"the block map has no control {control!r} that takes {value!r}")
