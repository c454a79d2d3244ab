"""The picture of the block map: pool state in, plain JSON out; no widget here."""

from collections.abc import Mapping
from typing import NamedTuple, TypedDict

from minivllm.views.picture import Picture
from minivllm.views.pool_state import BlockState, PoolState, RequestState
from minivllm.views.theme import clipped, counted, owner_colour, owner_letter

WIDTH_PX = 720
MAX_HEIGHT_PX = 360
CELL_SIZES_PX = ((72, 44), (56, 38), (44, 32), (34, 26), (24, 20), (16, 14), (11, 10), (8, 8), (6, 6), (5, 5))
MIN_TEXT_PX = 34  # narrower cells carry no letters
TEXT_COLUMNS, TEXT_ROWS = 64, 16  # of the text twin


class Owner(TypedDict):
    """A request that holds blocks."""

    id: str
    letter: str
    colour: str
    words: str


class Cell(NamedTuple):
    """One block, a short list in JSON; `owners` are indexes into the picture's owners."""

    kind: str
    num_filled: int
    is_cached: bool
    owners: list[int]


class BlockMapPicture(Picture):
    """Everything the browser draws, and nothing it has to work out."""

    columns: int
    cell_width: int
    cell_height: int
    has_text: bool
    block_size: int
    cells: list[Cell]
    host: list[Cell]  # host blocks 1, 2 ...: on_host, or empty
    owners: list[Owner]
    legend: list[tuple[str, str]]  # (kind, words)
    decisions: list[str]
    detail: str
    selected: int | None
    selected_offset: int | None
    highlight: str | None
    step: int
    steps: tuple[int, int, int] | None  # of a replay: first, last, shown
    provenance: str


def draw(
    state: PoolState,
    block: int | None = None,
    offset: int | None = None,
    highlight: str | None = None,
    steps: tuple[int, int, int] | None = None,
    provenance: str = "",
) -> BlockMapPicture:
    """The pool as plain JSON: sentence, cells, legend, twin. `block` and `offset` are marked."""
    owners = state.owners
    columns, width, height = layout(state.num_blocks)
    return {
        "title": title(state),
        "aria": f"Block map. {title(state)} {' '.join(state.decisions[-2:])}",
        "text": text_twin(state),
        "status": "",
        "columns": columns,
        "cell_width": width,
        "cell_height": height,
        "has_text": width >= MIN_TEXT_PX,
        "block_size": state.block_size,
        "cells": _cells(state),
        "host": _host_cells(state),
        "owners": [_owner(request) for request in owners],
        "legend": _legend(state),
        "decisions": list(state.decisions),
        "detail": "" if block is None else block_sentence(state, state.blocks[block], offset),
        "selected": block,
        "selected_offset": offset,
        "highlight": highlight if any(r.request_id == highlight for r in owners) else None,
        "step": state.step,
        "steps": steps,
        "provenance": provenance,
    }


def layout(num_blocks: int) -> tuple[int, int, int]:
    """Columns, cell width and cell height in pixels: the largest cells with which the pool fits the picture."""
    for width, height in CELL_SIZES_PX:
        columns = WIDTH_PX // width
        if -(-num_blocks // columns) * height <= MAX_HEIGHT_PX:
            break
    return min(columns, num_blocks), width, height


def title(state: PoolState) -> str:
    """The state of the pool as one sentence with its numbers."""
    shared = f" ({state.num_shared} shared)" if state.num_shared else ""
    reserved = f" {state.num_reserved:,} reserved," if state.num_reserved else ""
    host = f" On the host, {state.num_on_host:,} of {counted(len(state.host), 'block')} wait." if state.host else ""
    usable, slots = counted(state.num_blocks - 1, "block"), counted(state.num_live_slots, "live slot")
    return (
        f"Step {state.step}: {state.num_live:,} of {usable} live{shared},{reserved} {state.num_cached_free:,} free but"
        f" still cached, {state.num_empty:,} empty; {state.num_wasted_slots:,} of {slots}"
        f" hold nothing yet.{host}"
    )


def block_sentence(state: PoolState, block: BlockState, offset: int | None = None) -> str:
    """What is to know about one block."""
    name = f"Block {block.block_id}" + ("" if offset is None else f", offset {offset}")
    if block.kind == "null":
        return f"{name} is the null block: it pads block tables and is never handed out."
    if block.kind == "empty":
        return f"{name} is free and empty."
    if block.kind == "cached":
        return f"{name} is free, but its {block.num_filled} tokens stay findable until the block is needed."
    owners = ", ".join(f"{_letter(state, owner)} (request {clipped(owner, 24)})" for owner in block.owners)
    if block.kind == "reserved":
        return f"{name} is set aside for {owners}: nobody else can have it, and it holds nothing yet."
    published = " Others may find its contents." if block.is_cached else ""
    return (
        f"{name} is held by {owners}: reference count {block.ref_count}, "
        f"{block.num_filled} of {state.block_size} slots filled.{published}"
    )


def text_twin(state: PoolState) -> str:
    """The map as characters: the owner's letter, lower case while slots are empty, * shared, ~ cached, . empty."""
    marks = [_mark(state, block) for block in state.blocks]
    rows = [marks[i : i + TEXT_COLUMNS] for i in range(0, len(marks), TEXT_COLUMNS)]
    lines = [f"{i * TEXT_COLUMNS:>6} {''.join(row)}" for i, row in enumerate(rows[:TEXT_ROWS])]
    if len(rows) > TEXT_ROWS:
        lines.append(f"       and {counted(len(marks) - TEXT_ROWS * TEXT_COLUMNS, 'more block')}")
    lines += [f"  host {row}" for row in _host_rows(state)]
    owners = [f"       {_owner(r)['letter']} = {_owner(r)['words']}" for r in state.owners[:TEXT_ROWS]]
    key = "       capital: full, small: has empty slots, *: shared, ~: free but cached, .: empty, 0: null block"
    if state.num_reserved:
        key += ", -: reserved"
    return "\n".join([title(state), *lines, *owners, key])


def provenance(header: Mapping[str, object]) -> str:
    """Live or recorded, and on what."""
    facts = [str(header.get("live", ""))]
    facts += [
        f"{key} {header[key]}"
        for key in ("model", "dtype", "machine", "commit", "seed")
        if header.get(key) not in (None, "")
    ]
    if header.get("command") and header.get("live") != "live":
        facts.append(f"made by: {header['command']}")
    return " · ".join(fact for fact in facts if fact)


def _cells(state: PoolState) -> list[Cell]:
    index = {request.request_id: i for i, request in enumerate(state.holders)}
    return [
        Cell(block.kind, block.num_filled, block.is_cached, [index[owner] for owner in block.owners])
        for block in state.blocks
    ]


def _host_cells(state: PoolState) -> list[Cell]:
    index = {request.request_id: i for i, request in enumerate(state.owners)}
    size = state.block_size
    return [Cell("empty", 0, False, []) if owner is None else Cell("on_host", size, False, [index[owner]])
            for owner in state.host]  # fmt: skip


def _host_rows(state: PoolState) -> list[str]:
    """Host blocks 1, 2 ... as letters, at most one row."""
    if not state.host:
        return []
    marks = "".join(_letter(state, owner)[-1] if owner else "." for owner in state.host[:TEXT_COLUMNS])
    more = len(state.host) - TEXT_COLUMNS
    return [f"{marks} and {more:,} more" if more > 0 else marks]


def _owner(request: RequestState) -> Owner:
    held = [counted(len(request.block_ids), "block")]
    held += [f"{len(request.reserved_ids):,} reserved"] if request.reserved_ids else []
    held += [f"{len(request.host_ids):,} on the host"] if request.host_ids else []
    return {
        "id": request.request_id,
        "letter": owner_letter(request.ordinal),
        "colour": owner_colour(request.ordinal),
        "words": f"request {clipped(request.request_id, 24)}: {', '.join(held)}, "
        f"{counted(request.num_computed, 'token')} stored",
    }


def _legend(state: PoolState) -> list[tuple[str, str]]:
    reserved = [("reserved", f"reserved for later ({state.num_reserved:,})")] if state.num_reserved else []
    host = [("on_host", f"swapped out: waits in host memory ({state.num_on_host:,})")] if state.host else []
    return [
        ("filled", "slots that hold K and V"),
        ("unfilled", f"slots not filled yet ({state.num_wasted_slots:,})"),
        ("shared", f"thick border: held by more than one request ({state.num_shared})"),
        ("published", "corner: contents published in the prefix cache"),
        ("cached", f"free, contents still cached ({state.num_cached_free:,})"),
        ("empty", f"free and empty ({state.num_empty:,})"),
        ("null", "null block, never handed out"),
        *reserved,
        *host,
    ]


def _mark(state: PoolState, block: BlockState) -> str:
    if block.kind != "live":
        return {"null": "0", "empty": ".", "cached": "~", "reserved": "-"}[block.kind]
    if block.ref_count > 1:
        return "*"
    letter = _letter(state, block.owners[0])[-1]
    return letter if block.num_filled == state.block_size else letter.lower()


def _letter(state: PoolState, request_id: str) -> str:
    request = state.request(request_id)
    return owner_letter(request.ordinal) if request else "?"
