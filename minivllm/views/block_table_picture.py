"""The picture of the block table: one token's way from its position to its bytes; no widget here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from minivllm.course.slot_bytes import SlotBytes
from minivllm.errors import MiniVLLMError
from minivllm.views.picture import Picture
from minivllm.views.pool_state import NULL_BLOCK, PoolState, RequestState
from minivllm.views.theme import clipped, counted, owner_colour, owner_letter, visible

PAGE_TOKENS = 128  # shown at once
NUM_VALUES = 6  # of each vector


@dataclass(frozen=True, slots=True)
class Translation:
    """Where one position of a request lives."""

    position: int
    logical_block: int
    offset: int
    block_id: int
    slot: int


class Token(NamedTuple):
    position: int
    text: str
    is_stored: bool


class TableEntry(TypedDict):
    """One row of the block table with the tokens in its block."""

    logical: int
    physical: int
    ref_count: int
    tokens: list[Token]
    num_unused: int


class Link(NamedTuple):
    """One link of the chain from position to bytes."""

    label: str
    formula: str
    value: str


class BlockTablePicture(Picture):
    """Everything the browser draws."""

    requests: list[tuple[str, str]]  # (id, words)
    request: str | None
    groups: list[tuple[str, str]]  # (number, words): one where all layers share a table
    group: int
    colour: str
    entries: list[TableEntry]
    page: int
    num_pages: int
    token: int | None
    slot: int | None
    block: int | None
    chain: list[Link]
    address: str  # in this process's memory; not in the twins, which must repeat
    values: list[tuple[str, list[str]]]
    layer: int
    num_layers: int
    kv_head: int
    num_kv_heads: int
    words: str  # whose: the engine's, or an operating system's
    choices_of_words: list[tuple[str, str]]
    notes: list[str]  # where the analogy holds and where it breaks


@dataclass(frozen=True, slots=True)
class TableControls:
    """What the reader chose; `page` None follows the token."""

    request: str | None = None
    group: int = 0  # of layers
    token: int = 0
    layer: int = 0
    kv_head: int = 0
    page: int | None = None
    words: str = "engine"


def translate(position: int, block_ids: Sequence[int], block_size: int) -> Translation:
    """Position to slot: translate(37, [7, 1, 3], 16) is logical block 2, offset 5, block 3, slot 53."""
    if not 0 <= position < len(block_ids) * block_size:
        raise MiniVLLMError(
            f"position {position} is outside the block table: {counted(len(block_ids), 'block')} of"
            f" {counted(block_size, 'slot')} hold positions 0 to {len(block_ids) * block_size - 1}"
        )
    logical_block, offset = divmod(position, block_size)
    block_id = block_ids[logical_block]
    return Translation(position, logical_block, offset, block_id, block_id * block_size + offset)


def chosen_request(state: PoolState, controls: TableControls) -> RequestState | None:
    """The request that is shown: the chosen one while it is known, else the first that holds blocks."""
    chosen = state.request(controls.request) if controls.request is not None else None
    return chosen or next(iter(state.holders), None)


def chosen_table(state: PoolState, controls: TableControls) -> tuple[int, ...]:
    """The block table of the chosen request for the chosen group of layers; empty where there is none."""
    request = chosen_request(state, controls)
    tables = request.tables if request else ()
    return tables[controls.group] if controls.group < len(tables) else ()


def chosen_slot(state: PoolState, controls: TableControls) -> Translation | None:
    """Where the chosen token lives, or None when it has no block."""
    table = chosen_table(state, controls)
    if controls.token >= len(table) * state.block_size:
        return None
    place = translate(controls.token, table, state.block_size)
    return None if place.block_id == NULL_BLOCK else place


def draw(
    state: PoolState,
    controls: TableControls,
    texts: Sequence[str],
    found: SlotBytes | None,
    num_layers: int,
    num_kv_heads: int,
    groups: Sequence[str] = ("group 0",),
) -> BlockTablePicture:
    """The table of the chosen request, its tokens (`texts`), and the chain of the chosen token."""
    request = chosen_request(state, controls)
    table = chosen_table(state, controls)
    place = chosen_slot(state, controls)
    chain = _chain(state, controls, place, found)
    page_blocks = max(1, PAGE_TOKENS // state.block_size)
    num_pages = max(1, -(-len(table) // page_blocks))
    page = controls.token // state.block_size // page_blocks if controls.page is None else controls.page
    page = min(page, num_pages - 1)
    logical = range(page * page_blocks, (page + 1) * page_blocks)
    title = _title(state, controls, request, place, texts, groups)
    return {
        "title": title,
        "aria": f"Block table. {title}",
        "text": text_twin(title, table, chain),
        "status": "",
        "requests": [(r.request_id, request_words(r)) for r in _choices(state, request)],
        "request": request.request_id if request else None,
        "groups": [(str(i), words) for i, words in enumerate(groups)],
        "group": controls.group,
        "colour": owner_colour(request.ordinal) if request else "#888888",
        "entries": [_entry(state, request, table, i, texts) for i in logical if i < len(table)] if request else [],
        "page": page,
        "num_pages": num_pages,
        "token": place.position if place else None,
        "slot": place.slot if place else None,
        "block": place.block_id if place else None,
        "chain": chain,
        "address": _address(controls, found),
        "values": _values(controls, found),
        "layer": controls.layer,
        "num_layers": num_layers,
        "kv_head": controls.kv_head,
        "num_kv_heads": num_kv_heads,
        "words": controls.words,
        "choices_of_words": [],
        "notes": [],
    }


def request_words(request: RequestState) -> str:
    """A request in a list of choices: "A = request 0 (running, 21 tokens stored)"."""
    letter, name = owner_letter(request.ordinal), clipped(request.request_id, 24)
    return f"{letter} = request {name} ({request.status}, {counted(request.num_computed, 'token')} stored)"


def _choices(state: PoolState, chosen: RequestState | None) -> list[RequestState]:
    return [r for r in state.requests if r.block_ids or r is chosen]


def _entry(
    state: PoolState, request: RequestState, table: Sequence[int], logical: int, texts: Sequence[str]
) -> TableEntry:
    positions = range(logical * state.block_size, (logical + 1) * state.block_size)
    block_id = table[logical]
    num_stored = request.num_computed if block_id != NULL_BLOCK else 0
    tokens = [
        Token(position, visible(clipped(texts[position], 40)), position < num_stored)
        for position in positions
        if position < len(texts)
    ]
    return {
        "logical": logical,
        "physical": block_id,
        "ref_count": state.blocks[block_id].ref_count,
        "tokens": tokens,
        "num_unused": state.block_size - len(tokens),
    }


def _title(
    state: PoolState,
    controls: TableControls,
    request: RequestState | None,
    place: Translation | None,
    texts: Sequence[str],
    groups: Sequence[str],
) -> str:
    if request is None:
        return f"Step {state.step}: no request holds a block table."
    name = f"request {clipped(request.request_id, 24)}"
    layers = f" (layer {groups[controls.group]})" if len(groups) > 1 else ""
    table = chosen_table(state, controls)
    if place is None and controls.token < len(table) * state.block_size:
        return (
            f"Step {state.step}: token {controls.token} of {name} has left the window{layers}: its block was dropped."
        )
    if place is None:
        holds = f"its table has {counted(len(table), 'block')}"
        return f"Step {state.step}: token {controls.token} of {name} has no slot; {holds}."
    text = f" “{visible(clipped(texts[place.position], 40))}”" if place.position < len(texts) else ""
    when = "" if place.position < request.num_computed else ", reserved but not stored yet"
    where = f"physical block {place.block_id}, slot {place.slot}{layers}{when}"
    return f"Token {place.position}{text} of {name} lives in {where}."


def _chain(state: PoolState, controls: TableControls, place: Translation | None, found: SlotBytes | None) -> list[Link]:
    if place is None:
        return []
    size = state.block_size
    links = [
        Link("position", "", str(place.position)),
        Link("logical block", f"{place.position} // {size} =", str(place.logical_block)),
        Link("offset", f"{place.position} % {size} =", str(place.offset)),
        Link("physical block", f"block_table[{place.logical_block}] =", str(place.block_id)),
        Link("slot", f"{place.block_id} × {size} + {place.offset} =", str(place.slot)),
    ]
    if found is None:
        return links
    start = found.byte_offset + controls.kv_head * found.head_stride_bytes
    label = f"bytes in layer {controls.layer}'s K, KV head {controls.kv_head}"
    return [*links, Link(label, f"{found.num_bytes} bytes from", f"{start:,}")]


def _address(controls: TableControls, found: SlotBytes | None) -> str:
    return f"0x{found.address + controls.kv_head * found.head_stride_bytes:x}" if found else ""


def _values(controls: TableControls, found: SlotBytes | None) -> list[tuple[str, list[str]]]:
    if found is None:
        return []
    vectors = (("K", found.k[controls.kv_head]), ("V", found.v[controls.kv_head]))
    return [(name, [f"{value:+.3f}" for value in vector[:NUM_VALUES]]) for name, vector in vectors]


def text_twin(title: str, table: Sequence[int], chain: list[Link], notes: Sequence[str] = ()) -> str:
    """Only whole numbers: values and addresses differ between machines."""
    pairs = [f"{i}→{block_id}" for i, block_id in enumerate(table)]
    more = f" and {len(pairs) - 32} more" if len(pairs) > 32 else ""
    lines = [title, f"  table (logical→physical): {' '.join(pairs[:32])}{more}"]
    lines += [f"  {link.label}: {link.formula} {link.value}".replace(":  ", ": ") for link in chain]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])
