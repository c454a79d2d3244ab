"""The picture of the prefix tree: boxes are cached blocks, a box continues the one to its left that it hangs on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from minivllm.views.prefix_tree_state import NodeState, TreeState
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Control, Key, Line, Mark, SketchPicture, Slider, Words, ink_for
from minivllm.views.theme import FAINT, OWNER_COLOURS, clipped, counted, visible

TokenTexts = Callable[[str], Sequence[str]]  # request id -> the text of each of its tokens
NUM_COLUMNS, NUM_ROWS = 10, 14  # shown at once
PITCH_PX, BOX_PX, ROW_PX = WIDTH_PX / NUM_COLUMNS, 62.0, 38.0
TOP = 22.0
KINDS = {
    "hit": ("H", Key(OWNER_COLOURS[2], "solid", "H: found by a request in this step")),
    "new": ("N", Key(OWNER_COLOURS[4], "solid", "N: cached in this step")),
    "used": ("U", Key(OWNER_COLOURS[0], "solid", "U: in use by so many requests")),
    "idle": ("-", Key(FAINT, "outline", "-: nobody uses it; kept until the pool needs it")),
    "evicted": ("E", Key(OWNER_COLOURS[5], "cross", "E: evicted in this step")),
}


@dataclass(frozen=True)
class TreeControls:
    """What the reader chose: whose path stands out, and which part of a large tree is shown."""

    request: str = ""
    page: int = 0
    depth: int = 0


@dataclass(frozen=True)
class Placed:
    """A node on the grid of rows and columns."""

    node: NodeState
    row: int
    column: int


class TreePicture(SketchPicture):
    nodes: list[dict[str, int | str | bool | None]]  # all of them, drawn or not
    next_victim: int | None  # a block
    hit_rate: float


def draw(
    state: TreeState,
    chosen: TreeControls,
    token_texts: TokenTexts | None = None,
    steps: tuple[int, int, int] | None = None,
    origin: str = "",
) -> TreePicture:
    """The part of the tree that fits, with what the step did to it."""
    placed = layout([*state.nodes, *state.ghosts])
    num_rows = max((place.row for place in placed), default=-1) + 1
    num_columns = max((place.column for place in placed), default=-1) + 1
    num_pages = max(1, -(-num_rows // NUM_ROWS))
    deepest = max(0, num_columns - NUM_COLUMNS)
    page, depth = min(chosen.page, num_pages - 1), min(chosen.depth, deepest)
    rows = range(page * NUM_ROWS, min((page + 1) * NUM_ROWS, num_rows))
    shown = [p for p in placed if p.row in rows and depth <= p.column < depth + NUM_COLUMNS]
    texts = _texts(shown, state, token_texts)
    path = set(state.tables.get(chosen.request, ()))
    title = _title(state)
    victim = next((n.block_id for n in state.nodes if n.id == state.next_victim), None)
    return {
        "view": "prefix-tree", "title": title, "aria": f"Prefix tree. {title}", "text": _text(title, state, placed),
        "status": "", "width": WIDTH_PX, "height": TOP + max(len(rows), 1) * ROW_PX + 4,
        "marks": [Words(2, 2, _clock_words(state, victim), 11), *_edges(placed, rows, depth),
                  *(m for p in shown for m in _box(p, rows.start, depth, p.node.block_id in path, victim, texts))],
        "controls": _controls(state, chosen, page, num_pages, depth, deepest), "steps": steps,
        "legend": _legend(placed), "lines": list(state.decisions),
        "lines_name": "last decisions of the cache", "provenance": origin, "nodes": [_facts(p) for p in placed],
        "next_victim": victim, "hit_rate": state.hit_rate,
    }  # fmt: skip


def layout(nodes: Sequence[NodeState]) -> list[Placed]:
    """Depth first: a node's first child stands in its row, the others below; evicted ones where they were."""
    known = {node.id for node in nodes}
    children: dict[int | None, list[NodeState]] = {}
    for node in nodes:
        children.setdefault(node.parent if node.parent in known else None, []).append(node)
    placed: list[Placed] = []
    row = 0
    stack = [(node, True) for node in reversed(children.get(None, []))]
    while stack:
        node, is_first = stack.pop()
        row += not is_first or (node.parent not in known and bool(placed))
        placed.append(Placed(node, row, node.index))
        below = children.get(node.id, [])
        stack += [(child, child is below[0]) for child in reversed(below)]
    return placed


def _title(state: TreeState) -> str:
    kinds = [node.kind for node in state.nodes]
    now = [f"{kinds.count(kind)} {word}" for kind, word in (("hit", "found"), ("new", "new")) if kind in kinds]
    now += [f"{len(state.ghosts)} evicted"] if state.ghosts else []
    used = sum(node.num_owners > 0 for node in state.nodes)
    did = f" ({', '.join(now)} in this step)" if now else ""
    rate = f"{100 * state.hit_rate:.0f}% of {counted(state.num_prompt_tokens, 'prompt token')}"
    return (
        f"Step {state.step}: {counted(len(state.nodes), 'block')} cached{did}, {used} in use;"
        f" {rate} {'was' if state.num_prompt_tokens == 1 else 'were'} found instead of computed."
    )


def _clock_words(state: TreeState, victim: int | None) -> str:
    goes = f"; block {victim} goes next" if victim is not None else ""
    beside = f"; {state.num_beside} more of other layer groups" if state.num_beside else ""
    return f"LRU clock at {state.clock}{goes}{beside}. From left to right: {state.block_size} more tokens in each box."


def _edges(placed: Sequence[Placed], rows: range, depth: int) -> list[Mark]:
    """Right angles from a parent's right edge down to its child's left one."""
    by_id = {p.node.id: p for p in placed}
    marks: list[Mark] = []
    for child in placed:
        x, y = _x(child.column, depth), _y(child.row, rows.start) + 13
        if child.row not in rows or not depth <= child.column < depth + NUM_COLUMNS:
            continue
        parent = by_id.get(child.node.parent) if child.node.parent is not None else None
        if parent is None:
            if child.node.index and child.column > depth:  # cut off, or its parent is not known
                marks.append(Line(x - 8, y, x, y, "soft", 1.5, True))
            continue
        top = max(_y(parent.row, rows.start) + 13, TOP)
        if child.column > depth:
            marks += [Line(x - 5, top, x - 5, y, "soft"), Line(x - 5, y, x, y, "soft")]
            marks += [Line(x - PITCH_PX + BOX_PX, top, x - 5, top, "soft")] if parent.row in rows else []
    return marks


def _x(column: int, depth: int) -> float:
    return 4 + (column - depth) * PITCH_PX


def _y(row: int, first: int) -> float:
    return TOP + (row - first) * ROW_PX


def _box(
    place: Placed, first: int, depth: int, is_on_path: bool, victim: int | None, texts: Mapping[int, str]
) -> list[Mark]:
    node = place.node
    letter, (fill, pattern, _) = KINDS[node.kind]
    x, y = _x(place.column, depth), _y(place.row, first)
    is_next = node.block_id == victim and not node.is_evicted
    border = "ink" if is_on_path and not node.is_evicted else "pick" if is_next else ""
    owners = f" ×{node.num_owners}" if node.num_owners else ""
    ink = ink_for(fill, pattern)
    return [
        Box(x, y, BOX_PX, 26, fill, pattern, border, _hover(node, texts.get(node.id, ""))),
        Words(x + 4, y + 1, f"{letter} {node.block_id}{owners}{' next' if is_next else ''}", 10, ink),
        Words(x + 4, y + 13, clipped(texts.get(node.id, ""), 9), 9, ink),
    ]


def _hover(node: NodeState, text: str) -> str:
    parts = [f"block {node.block_id}, written by request {clipped(node.writer, 24)}", node.kind]
    parts += [counted(node.num_owners, "user"), counted(node.num_hits, "hit"), f"last used at tick {node.last_use}"]
    parts += ["its start was evicted: nothing finds it"] if node.is_cut else []
    parts += [] if node.is_parent_known else ["a duplicate stands before it: its parent is not known"]
    return "; ".join([*parts, text] if text else parts)


def _texts(shown: Sequence[Placed], state: TreeState, token_texts: TokenTexts | None) -> dict[int, str]:
    """What the tokens of the shown nodes say, as long as their writers are known."""
    if token_texts is None:
        return {}
    size, words = state.block_size, {p.node.writer: [*token_texts(p.node.writer)] for p in shown}
    return {
        p.node.id: visible("".join(words[p.node.writer][p.node.index * size : (p.node.index + 1) * size]))
        for p in shown
        if len(words[p.node.writer]) >= (p.node.index + 1) * size
    }


def _controls(
    state: TreeState, chosen: TreeControls, page: int, num_pages: int, depth: int, deepest: int
) -> list[Control]:
    there = [*state.tables] if chosen.request in (*state.tables, "") else [*state.tables, chosen.request]
    named = [(request, f"request {clipped(request, 24)}") for request in there]
    controls: list[Control] = [Choice("request", "path of", [("", "nobody"), *named], chosen.request)]
    if num_pages > 1:
        controls.append(Slider("page", "page of rows", [*range(num_pages)], page, f"{page + 1} of {num_pages}"))
    if deepest:
        controls.append(Slider("depth", "first column", [*range(deepest + 1)], depth, f"block {depth}"))
    return controls


def _facts(place: Placed) -> dict[str, int | str | bool | None]:
    node = place.node
    return {
        "id": node.id, "block": node.block_id, "parent": node.parent, "kind": node.kind, "owners": node.num_owners,
        "row": place.row, "column": place.column, "is_cut": node.is_cut, "is_parent_known": node.is_parent_known,
    }  # fmt: skip


def _legend(placed: Sequence[Placed]) -> list[Key]:
    kinds = {place.node.kind for place in placed}
    return [key for kind, (_, key) in KINDS.items() if kind in kinds]


def _text(title: str, state: TreeState, placed: Sequence[Placed]) -> str:
    """The tree with a line for each branch: letter, block, users."""
    lines: dict[int, list[Placed]] = {}
    for place in placed:
        lines.setdefault(place.row, []).append(place)
    rows = []
    for places in list(lines.values())[: 2 * NUM_ROWS]:
        indent = "      " * places[0].column
        boxes = (f"{KINDS[p.node.kind][0]}{p.node.block_id}" + _users(p.node) for p in places)
        rows.append(f"  {indent}{' - '.join(boxes)}")
    more = [f"  and {len(lines) - 2 * NUM_ROWS} more branches"] if len(lines) > 2 * NUM_ROWS else []
    victim = next((n.block_id for n in state.nodes if n.id == state.next_victim), None)
    key = "; ".join(key.words for key in _legend(placed))
    return "\n".join([title, _clock_words(state, victim), *rows, *more, f"  {key}".rstrip()])


def _users(node: NodeState) -> str:
    return f"x{node.num_owners}" if node.num_owners else ""
