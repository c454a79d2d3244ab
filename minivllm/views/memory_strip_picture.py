"""The picture of the memory strip: the pool by address at one step, above the shares of all steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from minivllm.course.memory_use import MemoryUse
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Control, Key, Line, Mark, SketchPicture, Words, ink_for
from minivllm.views.sketch import table as text_table
from minivllm.views.theme import FAINT, OWNER_COLOURS, clipped, counted

USES = {  # one colour and one pattern for each use of a slot, here and in the bars
    "live": Key(OWNER_COLOURS[0], "solid", "live: holds the K and V of a token"),
    "reserved": Key(OWNER_COLOURS[4], "dots", "reserved: will be filled, by its own request only"),
    "internal": Key(OWNER_COLOURS[5], "hatch", "internal: set aside, and never filled"),
    "external": Key(FAINT, "solid", "external: no use to the next request, or only rounding"),
    "free": Key(FAINT, "outline", "free: the next request may have it"),
}
NUM_COLUMNS = 60  # of the shares over time
LEFT = 42.0  # of the shares: room for percent
ROW_PX, GAP_PX, AREA_PX = 15.0, 4.0, 110.0
MOST_ROWS, ROW_SLOTS = 8, 96  # the strip is folded into rows, short pools into few
LEAST_PX = 18.0  # a stretch that is wide enough for its request's name


class Segment(NamedTuple):
    """Neighbouring slots of one use; slot 0 is the first behind the null block."""

    start: int
    length: int
    kind: str
    request_id: str  # "" where blocks of many requests lie side by side, and where nobody holds them


class Refused(NamedTuple):
    """Who waits for blocks: `need` slots in a row (0 where any will do), of which so many are free."""

    request_id: str
    need: int
    free: int
    largest_hole: int
    is_by_buddies: bool


class StripState(NamedTuple):
    """One run at one step: all its steps, the one that is shown, and the pool by address there."""

    allocator: str
    uses: Sequence[MemoryUse]
    shown: int  # index into uses
    segments: list[Segment]
    refused: Refused | None


@dataclass(frozen=True)
class StripControls:
    """What the reader chose; `step` None is the last one."""

    step: int | None = None
    run: str = ""


class StripPicture(SketchPicture):
    step: int
    shares: dict[str, float]  # percent of the pool in this step, by use
    num_requests: int


def draw(state: StripState, chosen: StripControls, runs: Sequence[str], origin: str = "") -> StripPicture:
    """The pool by address at the chosen step, and below it the shares of every step."""
    use = state.uses[state.shown]
    shares = shares_of(use)
    title = _title(state, use, shares)
    strip, top = _strip(state.segments, use.num_slots)
    controls: list[Control] = []
    if len(runs) > 1:
        controls = [Choice("run", "run", [(name, name) for name in runs], chosen.run)]
    return {
        "view": "memory-strip", "title": title, "aria": f"Memory strip. {title}", "text": _text(title, state),
        "status": "", "width": WIDTH_PX, "height": top + AREA_PX + 42, "marks": [*strip, *_area(state, top + 20)],
        "controls": controls, "steps": (state.uses[0].step, state.uses[-1].step, use.step),
        "legend": [*USES.values()], "lines": _lines(state), "lines_name": "what this step says", "provenance": origin,
        "step": use.step, "shares": shares, "num_requests": use.num_requests,
    }  # fmt: skip


def shares_of(use: MemoryUse) -> dict[str, float]:
    """Percent of the pool by use; free slots are those with and without cached contents."""
    slots = {**{kind: getattr(use, kind) for kind in USES if kind != "free"}, "free": use.cached + use.empty}
    return {kind: 100 * number / use.num_slots for kind, number in slots.items()}


def _title(state: StripState, use: MemoryUse, shares: Mapping[str, float]) -> str:
    wasted = {kind: share for kind, share in shares.items() if kind != "live" and share >= 0.05}
    rest = ", ".join(f"{share:.1f}% {kind}" for kind, share in wasted.items())
    held = f"{shares['live']:.1f}% of {use.num_slots:,} slots hold a token of {counted(use.num_requests, 'request')}"
    return f"Step {use.step}, {state.allocator}: {held}{f'; {rest}' if rest else ''}."


def _strip(segments: Sequence[Segment], num_slots: int) -> tuple[list[Mark], float]:
    """The pool in rows from slot 0, and where the next part begins."""
    num_rows = min(MOST_ROWS, -(-num_slots // ROW_SLOTS))
    per_row = -(-num_slots // num_rows)
    marks: list[Mark] = [Words(2, 0, f"the pool by address, {per_row:,} slots a row", 11)]
    top, pitch = 18.0, (WIDTH_PX - 4) / per_row
    for segment in segments:
        fill, pattern, _ = USES[segment.kind]
        who = f"{clipped(segment.request_id, 20)}, " if segment.request_id else ""
        words = f"{who}{segment.kind}: slots {segment.start:,} to {segment.start + segment.length - 1:,}"
        for row, begin, end in _by_row(segment, per_row):
            x, width, y = 2 + begin * pitch, (end - begin) * pitch, top + row * (ROW_PX + GAP_PX)
            marks.append(Box(x, y, width, ROW_PX, fill, pattern, "", words))
            if begin and segment.request_id and segment.kind == "live":
                marks.append(Line(x, y - 1, x, y + ROW_PX + 1, "ink", 1.5))  # another run begins
            if segment.request_id and segment.kind == "live" and width >= LEAST_PX:
                name = clipped(segment.request_id, int(width / 7))
                marks.append(Words(x + 3, y + 2, name, 10, ink_for(fill, pattern)))
    return marks, top + num_rows * (ROW_PX + GAP_PX)


def _by_row(segment: Segment, per_row: int) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each piece; begin and end count from the row's first slot."""
    pieces, start, end = list[tuple[int, int, int]](), segment.start, segment.start + segment.length
    while start < end:
        row, begin = divmod(start, per_row)
        stop = min(end, (row + 1) * per_row)
        pieces.append((row, begin, begin + stop - start))
        start = stop
    return pieces


def _area(state: StripState, top: float) -> list[Mark]:
    """Mean shares of up to 60 groups of steps, stacked from the bottom; a click goes there."""
    bottom = top + AREA_PX
    marks: list[Mark] = [Words(2, top - 18, "percent of the pool, step by step", 11)]
    for percent in (0, 50, 100):
        y = bottom - percent / 100 * AREA_PX
        marks += [Line(LEFT, y, WIDTH_PX, y, "line", 0.3), Words(LEFT - 5, y - 6, f"{percent}", 10, "soft", "end")]
    num = len(state.uses)
    bounds = [num * i // min(num, NUM_COLUMNS) for i in range(min(num, NUM_COLUMNS) + 1)]
    pitch = (WIDTH_PX - 2 - LEFT) / (len(bounds) - 1)
    for i, (begin, end) in enumerate(pairwise(bounds)):
        marks += _column(state.uses[begin:end], LEFT + i * pitch, pitch, bottom)
    column = next(i for i, end in enumerate(bounds[1:]) if state.shown < end)
    here = (state.shown - bounds[column] + 0.5) / (bounds[column + 1] - bounds[column])
    x = LEFT + (column + here) * pitch
    first, last = state.uses[0].step, state.uses[-1].step
    marks += [
        Words(LEFT, bottom + 5, str(first), 10, "soft"),
        Words(WIDTH_PX - 2, bottom + 5, str(last), 10, "soft", "end"),
    ]
    marks.append(Words((LEFT + WIDTH_PX) / 2, bottom + 5, "step", 11, "ink", "middle"))
    return [*marks, Line(x, top - 3, x, bottom + 3, "pick", 2.5)]


def _column(uses: Sequence[MemoryUse], x: float, width: float, bottom: float) -> list[Mark]:
    totals = [shares_of(use) for use in uses]
    shares = {kind: sum(t[kind] for t in totals) / len(totals) for kind in USES}
    step = uses[len(uses) // 2].step
    words = f"step {step}: " + ", ".join(f"{kind} {share:.1f}%" for kind, share in shares.items() if share)
    marks: list[Mark] = []
    for kind, share in shares.items():
        height = share / 100 * AREA_PX
        bottom -= height
        fill, pattern, _ = USES[kind]
        if height > 0:
            marks.append(Box(x, bottom, width, height, fill, pattern, "", words, ("step", step)))
    return marks


def _lines(state: StripState) -> list[str]:
    use, refused = state.uses[state.shown], state.refused
    lines = [
        f"{counted(use.live, 'slot')} live, {use.live / max(use.num_requests, 1):,.0f} for each request on average"
    ]
    if refused is None:
        return lines
    free = f"{counted(refused.free, 'slot')} free, the longest hole {refused.largest_hole:,}"
    if not refused.need:
        return [*lines, f"{refused.request_id} waits: {free}: too few, or kept for those that run to grow"]
    where = " at a multiple of that" if refused.is_by_buddies else ""
    kind = " (external fragmentation)" if refused.free >= refused.need else ""
    return [*lines, f"{refused.request_id} waits: it needs {refused.need:,} in a row{where}; {free}{kind}"]


def _text(title: str, state: StripState) -> str:
    """The shown step, and six others spread over the run."""
    num = len(state.uses)
    shown = sorted({state.shown, *(round(i * (num - 1) / 5) for i in range(6))})
    rows = [["step", "requests", *(f"{kind} %" for kind in USES)]]
    for index in shown:
        use = state.uses[index]
        mark = "> " if index == state.shown else ""
        rows.append([f"{mark}{use.step}", str(use.num_requests), *(f"{s:.1f}" for s in shares_of(use).values())])
    return "\n".join([title, *text_table(rows), *_lines(state)])
