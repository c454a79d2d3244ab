"""W2, the block table: click a token and follow it to its block, its slot and its bytes; linked to the block map.

The view imports no engine: the caller hands in functions that give a request's token texts and a slot's contents.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from minivllm.course.slot_bytes import SlotBytes
from minivllm.errors import MiniVLLMError, short
from minivllm.views.block_map import BlockMap
from minivllm.views.block_table_picture import (
    BlockTablePicture,
    TableControls,
    Translation,
    chosen_request,
    chosen_slot,
    chosen_table,
    draw,
    text_twin,
    translate,
)
from minivllm.views.block_table_png import block_table_image
from minivllm.views.group_words import group_words
from minivllm.views.os_words import OPERATING_SYSTEM, WORDS, as_paging, limits
from minivllm.views.picture import whole_number
from minivllm.views.pool_fold import header_count
from minivllm.views.pool_state import PoolState
from minivllm.views.widget import View, in_words, script

__all__ = ["BlockTable", "SlotBytes", "Translation", "draw", "translate"]

TokenTexts = Callable[[str], Sequence[str]]  # request id -> the text of each of its tokens
ReadSlot = Callable[[int, int], SlotBytes]  # (layer, slot) -> what is stored there


class BlockTable(View):
    """The table of one request; `read_slot` None (a recording) shows addresses but no bytes."""

    _esm = script("block_table.js")

    def __init__(self, block_map: BlockMap, token_texts: TokenTexts, read_slot: ReadSlot | None = None) -> None:
        self._block_map = block_map
        self._token_texts = token_texts
        self._read_slot = read_slot
        header = block_map.source.header
        self._num_layers = header_count(header, "num_layers")
        self._num_kv_heads = header_count(header, "num_kv_heads")
        self._controls = TableControls()
        super().__init__()
        block_map.link(self._slot_to_mark, self._show_block)
        block_map.follow_with(self.refresh)

    @property
    def translation(self) -> Translation | None:
        """Where the chosen token lives now."""
        return chosen_slot(self._block_map.state, self._controls)

    def move(self, control: str, value: object) -> None:
        """Controls: request (an id), group (of layers), token (a position), layer, kv_head, page, words (whose)."""
        if control == "token":
            self._keep_request()
        super().move(control, value)
        if control in ("request", "token", "group"):
            self._block_map.release_block()

    def drawn(self) -> BlockTablePicture:
        state, controls = self._block_map.state, self._controls
        place, request = chosen_slot(state, controls), chosen_request(state, controls)
        problems: list[str] = []
        texts: Sequence[str] = ()
        found = None
        try:
            texts = self._token_texts(request.request_id) if request else ()
            found = self._read_slot(controls.layer, place.slot) if self._read_slot and place else None
        except Exception as error:  # of the caller's functions: say it in the view, keep drawing the table
            problems.append(in_words(error))
        groups = group_words(self._block_map.source.header, state)
        picture = draw(state, controls, texts, found, self._num_layers, self._num_kv_heads, groups)
        picture["status"] = " ".join(problems)
        picture["choices_of_words"] = WORDS
        if controls.words == OPERATING_SYSTEM and request:
            picture["chain"] = as_paging(picture["chain"])
            picture["notes"] = limits(state, request, place, len(groups))
            table = chosen_table(state, controls)
            picture["text"] = text_twin(picture["title"], table, picture["chain"], picture["notes"])
        return picture

    def image(self) -> Image.Image:
        return block_table_image(self.drawn())

    def _moved(self, control: str, value: object) -> None:
        controls = self._controls
        match control:
            case "request" if isinstance(value, str):
                self._controls = replace(controls, request=value, token=0, page=None)
            case "token":
                token = whole_number("token", value, 0, 2**31)
                self._controls = replace(controls, token=token, page=None)
            case "group":
                last = len(self.picture["groups"]) - 1
                self._controls = replace(controls, group=whole_number("group", value, 0, last), page=None)
            case "layer":
                self._controls = replace(controls, layer=whole_number("layer", value, 0, self._num_layers - 1))
            case "kv_head":
                kv_head = whole_number("kv_head", value, 0, self._num_kv_heads - 1)
                self._controls = replace(controls, kv_head=kv_head)
            case "words" if isinstance(value, str) and value in dict(WORDS):
                self._controls = replace(controls, words=value)
            case "page":
                self._controls = replace(controls, page=whole_number("page", value, 0, 2**31))
            case _:
                raise MiniVLLMError(f"the block table has no control {short(control)} that takes {short(value)}")

    def _keep_request(self) -> None:
        """Whose token is chosen stays shown, even when it finishes and another holds blocks."""
        shown = chosen_request(self._block_map.state, self._controls)
        with self._lock:
            self._controls = replace(self._controls, request=shown.request_id if shown else None)

    def _slot_to_mark(self, state: PoolState) -> tuple[int, int] | None:
        """Where the map should point, for the state that it draws."""
        place = chosen_slot(state, self._controls)
        return (place.block_id, place.offset) if place else None

    def _show_block(self, block_id: int) -> None:
        """The reader chose a block on the map: show its first token, in the request shown if that holds it."""
        state = self._block_map.state
        owners = state.blocks[block_id].owners
        if not owners:
            return
        shown = chosen_request(state, self._controls)
        owner = shown.request_id if shown and shown.request_id in owners else owners[0]
        request = state.request(owner)
        assert request is not None, "an owner is a known request"
        group = next((i for i, table in enumerate(request.tables) if block_id in table), None)
        if group is None:  # reserved: in no table yet
            return
        token = request.tables[group].index(block_id) * state.block_size
        with self._lock:
            self._controls = replace(self._controls, request=owner, group=group, token=token, page=None)
        self.refresh()
