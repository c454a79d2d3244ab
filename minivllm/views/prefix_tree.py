"""W7, the prefix tree: which beginnings are cached, who uses them, what a step found, added and forgot."""

from collections.abc import Callable, Iterable, Mapping

from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus
from minivllm.trace import Trace
from minivllm.views.block_map_picture import provenance
from minivllm.views.prefix_tree_fold import PrefixTreeFold
from minivllm.views.prefix_tree_picture import TokenTexts, TreeControls, TreePicture, draw
from minivllm.views.prefix_tree_state import TreeState
from minivllm.views.sketch import seek, with_control
from minivllm.views.sketch_view import SketchView
from minivllm.views.sources import LiveSource, Source, TraceSource
from minivllm.views.widget import in_words

MakeSource = Callable[[Callable[[], None]], Source[TreeState]]


class PrefixTree(SketchView):
    """`PrefixTree.follow(engine.events, header)`; controls: step (of a replay), request, page, depth."""

    def __init__(self, make_source: MakeSource, token_texts: TokenTexts | None = None) -> None:
        self._controls = TreeControls()
        self._token_texts = token_texts
        self.source = make_source(self.refresh)
        super().__init__()

    @staticmethod
    def follow(
        bus: EventBus, header: Mapping[str, object], past: Iterable[Event] = (), token_texts: TokenTexts | None = None
    ) -> "PrefixTree":
        """Draw a cache while it works; `past` are events from before."""
        PrefixTreeFold(header)  # refuse a wrong header before there is a widget to take down again
        return PrefixTree(lambda wake: LiveSource(PrefixTreeFold, bus, header, past, wake), token_texts)

    @staticmethod
    def replay(trace: Trace, token_texts: TokenTexts | None = None) -> "PrefixTree":
        """Draw a recorded run, at any of its steps."""
        if not isinstance(trace, Trace):
            raise MiniVLLMError(f"PrefixTree.replay draws a Trace (Trace.load(path)), not {type(trace).__name__}")
        source = TraceSource(PrefixTreeFold, trace)
        return PrefixTree(lambda wake: source, token_texts)

    @property
    def state(self) -> TreeState:
        return self.source.state()

    def drawn(self) -> TreePicture:
        state, steps, origin = self.state, self.source.steps, provenance(self.source.header)
        try:
            return draw(state, self._controls, self._token_texts, steps, origin)
        except Exception as error:  # of the caller's function: say it in the view, keep drawing the tree
            if self._token_texts is None:
                raise
            picture = draw(state, self._controls, None, steps, origin)
            picture["status"] = in_words(error)
            return picture

    def stop(self) -> None:
        self.source.stop()
        super().stop()

    def _moved(self, control: str, value: object) -> None:
        if control == "step":
            self.source.seek(seek(self.source.steps, value))
            return
        self._controls = with_control(self._controls, self.drawn()["controls"], control, value)
