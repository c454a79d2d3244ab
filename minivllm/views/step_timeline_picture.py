"""The picture of the step timeline: rows are requests or seats, columns are steps, cells say what was done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minivllm.views.sketch import WIDTH_PX, Box, Choice, Control, Key, Line, Mark, SketchPicture, Slider, Words, ink_for
from minivllm.views.step_timeline_fold import COMPUTED, Row, Run, StepFacts, TimelineState
from minivllm.views.theme import FAINT, OWNER_COLOURS, clipped, counted, owner_letter

NUM_COLUMNS = 48  # steps shown at once
LEFT, ROW_PX = 112.0, 17.0
PITCH_PX = (WIDTH_PX - LEFT) / NUM_COLUMNS
ROWS_SHOWN = {1: 20, 2: 10}  # by number of lanes
KINDS = {
    "prefill": ("P", Key(OWNER_COLOURS[0], "solid", "P: the whole prompt at once")),
    "chunk": ("C", Key(OWNER_COLOURS[4], "solid", "C: a part of the prompt")),
    "decode": ("D", Key(OWNER_COLOURS[2], "solid", "D: one more token")),
    "recompute": ("R", Key(OWNER_COLOURS[5], "solid", "R: computed again after a preemption")),
    "preempted": ("x", Key(OWNER_COLOURS[5], "hatch", "x: preempted, its blocks are gone")),
    "swapped": ("s", Key(OWNER_COLOURS[3], "hatch", "s: swapped out, its blocks wait on the host")),
    "paused": ("-", Key(FAINT, "dots", "-: has a seat, computes nothing")),
    "waiting": ("w", Key(FAINT, "outline", "w: waits in the queue")),
    "idle": (".", Key(FAINT, "hatch", ".: a seat that nobody uses")),
}


@dataclass(frozen=True)
class TimelineControls:
    """What the reader chose; `step` None follows the newest."""

    step: int | None = None
    rows: str = "requests"
    page: int = 0


@dataclass(frozen=True)
class Lane:
    """One run on the timeline."""

    name: str
    state: TimelineState


class TimelinePicture(SketchPicture):
    step: int
    cells: list[dict[str, str]]  # by lane: row -> one letter for each step shown
    idle_share: list[float]  # by lane: of all seats and steps up to the one shown


def draw(lanes: Sequence[Lane], chosen: TimelineControls, origin: str = "") -> TimelinePicture:
    """All lanes on one axis of steps, up to the chosen step."""
    first = min((lane.state.first_step for lane in lanes if lane.state.steps), default=0)
    last = max(lane.state.last_step for lane in lanes)
    step = last if chosen.step is None else min(max(chosen.step, first), last)
    start = max(first, min(step - NUM_COLUMNS * 3 // 4, last - NUM_COLUMNS + 1))
    shown = range(start, min(start + NUM_COLUMNS, step + 1))
    num_rows = ROWS_SHOWN[len(lanes)]
    all_rows = [_rows(lane.state, shown, chosen.rows) for lane in lanes]
    num_pages = max(1, *(-(-len(rows) // num_rows) for rows in all_rows))
    page = min(chosen.page, num_pages - 1)
    pages = [rows[page * num_rows : (page + 1) * num_rows] for rows in all_rows]
    marks, height = _marks(lanes, pages, shown, step)
    title = _title(lanes, step)
    return {
        "view": "step-timeline", "title": title, "aria": f"Step timeline. {title}",
        "text": _text(title, lanes, pages, shown), "status": "", "width": WIDTH_PX, "height": height, "marks": marks,
        "controls": _controls(chosen, page, num_pages), "steps": (first, last, step),
        "legend": _legend(pages, chosen.rows),
        "lines": _said(lanes, step),
        "lines_name": "what was decided in this step", "provenance": origin,
        "step": step, "cells": [{row.name: row.letters.rstrip() for row in rows} for rows in pages],
        "idle_share": [_idle_share(lane.state, step) for lane in lanes],
    }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    kind: str
    step: int
    words: str
    letter: str


@dataclass(frozen=True)
class ShownRow:
    """A row of cells; None where there is nothing: not arrived, or gone."""

    name: str
    cells: tuple[Cell | None, ...]

    @property
    def letters(self) -> str:
        return "".join(cell.letter if cell else " " for cell in self.cells)


def _rows(state: TimelineState, shown: range, kind: str) -> list[ShownRow]:
    return list(_seat_rows(state, shown) if kind == "seats" else _request_rows(state, shown))


def _request_rows(state: TimelineState, shown: range) -> Iterator[ShownRow]:
    for row in state.rows:
        if row.runs[0].first_step < shown.stop and row.runs[-1].last_step >= shown.start:
            cells = tuple(_cell(row, step, row.at(step)) for step in shown)
            yield ShownRow(f"{owner_letter(row.ordinal)} {row.request_id}", cells)


def _seat_rows(state: TimelineState, shown: range) -> Iterator[ShownRow]:
    """Who sat where: the letter in a cell is the request's, the colour says what it did."""
    taken: dict[tuple[int, int], Cell] = {}
    for row in state.rows:
        for run in row.runs:
            for step in range(max(run.first_step, shown.start), min(run.last_step + 1, shown.stop)):
                if run.seat is not None and (cell := _cell(row, step, run)) is not None:
                    letter = owner_letter(row.ordinal)[-1]
                    taken[run.seat, step] = Cell(cell.kind, step, cell.words, letter)
    idle = KINDS["idle"][0]
    ran = {facts.step for facts in state.steps}
    for seat in range(state.num_seats):
        cells = tuple(
            taken.get((seat, step), Cell("idle", step, f"step {step}: seat {seat} is idle", idle))
            if step in ran
            else None
            for step in shown
        )
        yield ShownRow(f"seat {seat}", cells)


def _cell(row: Row, step: int, run: Run | None) -> Cell | None:
    if run is None:
        return None
    stored = counted(run.stored_after(step), "token")
    done = f"computed {run.num_new:,}, {stored} stored" if run.kind in COMPUTED else run.kind
    return Cell(run.kind, step, f"step {step}, {clipped(row.request_id, 24)}: {run.kind}, {done}", KINDS[run.kind][0])


def _marks(lanes: Sequence[Lane], pages: list[list[ShownRow]], shown: range, step: int) -> tuple[list[Mark], float]:
    marks: list[Mark] = []
    top = 0.0
    for lane, rows in zip(lanes, pages, strict=True):
        marks.append(Words(2, top + 2, _lane_words(lane, step), 12))
        top += 20
        for row in rows:
            marks.append(Words(2, top + 1, clipped(row.name, 15), 11, "soft"))
            for i, cell in enumerate(row.cells):
                if cell is not None:
                    marks += _cell_marks(cell, LEFT + i * PITCH_PX, top)
            top += ROW_PX
        x = LEFT + len(shown) * PITCH_PX - 0.5
        marks.append(Line(x, top - len(rows) * ROW_PX, x, top, "pick", 2))  # the step that is shown
        top += 8
    for i, number in enumerate(shown):
        if number % 5 == 0 or number == step:
            ink = "ink" if number == step else "soft"
            marks.append(Words(LEFT + (i + 0.5) * PITCH_PX, top, str(number), 9, ink, "middle"))
    return [*marks, Words(2, top, "step", 10, "soft")], top + 16


def _cell_marks(cell: Cell, x: float, y: float) -> list[Mark]:
    fill, pattern, _ = KINDS[cell.kind][1]
    marks: list[Mark] = [
        Box(x, y, PITCH_PX - 1, ROW_PX - 2, fill, pattern, "", cell.words, ("step", cell.step)),
    ]
    if pattern in ("solid", "outline") and cell.letter != ".":
        marks.append(Words(x + PITCH_PX / 2 - 0.5, y + 2, cell.letter, 9, ink_for(fill, pattern), "middle"))
    return marks


def _controls(chosen: TimelineControls, page: int, num_pages: int) -> list[Control]:
    words = [("requests", "requests, in order of arrival"), ("seats", "seats of the batch")]
    controls: list[Control] = [Choice("rows", "rows", words, chosen.rows)]
    if num_pages > 1:
        controls.append(Slider("page", "page of rows", [*range(num_pages)], page, f"{page + 1} of {num_pages}"))
    return controls


def _facts(state: TimelineState, step: int) -> StepFacts | None:
    return next((facts for facts in state.steps if facts.step == step), None)


def _idle_share(state: TimelineState, step: int) -> float:
    """Of all seats in all kept steps up to this one, how many computed nothing."""
    done = [facts for facts in state.steps if facts.step <= step]
    seats = state.num_seats * len(done)
    return 1 - sum(facts.num_busy for facts in done) / seats if seats else 0.0


def _lane_words(lane: Lane, step: int) -> str:
    state = lane.state
    name = f"{lane.name}: " if lane.name else ""
    done = [facts for facts in state.steps if facts.step <= step]
    outputs = sum(facts.num_outputs for facts in done)
    idle = f"{100 * _idle_share(state, step):.0f}% of {counted(state.num_seats, 'seat')} idle so far"
    return f"{name}{counted(outputs, 'token')} out in {counted(len(done), 'step')}, {idle}"


def _title(lanes: Sequence[Lane], step: int) -> str:
    said = [_lane_title(lane, step) for lane in lanes]
    return f"Step {step}: {'; '.join(said)}."


def _lane_title(lane: Lane, step: int) -> str:
    name, facts = f"{lane.name} " if lane.name else "", _facts(lane.state, step)
    if facts is None:
        return f"{name}had ended" if lane.state.steps else f"{name}has not run yet"
    kinds = [run.kind for row in lane.state.rows if (run := row.at(step)) is not None]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds) or "nobody there"
    idle = max(lane.state.num_seats - facts.num_busy, 0)
    return f"{name}computed {counted(facts.num_tokens, 'token')} ({counts}), {counted(idle, 'seat')} idle"


def _said(lanes: Sequence[Lane], step: int) -> list[str]:
    lines = []
    for lane in lanes:
        facts = _facts(lane.state, step)
        name = f"{lane.name}: " if lane.name else ""
        lines += [f"{name}{words}" for words in facts.sentences[-8:]] if facts else []
    return lines


def _legend(pages: list[list[ShownRow]], rows_are: str) -> list[Key]:
    """Of what is shown. The letters of seats are those of requests, so they are no keys."""
    kinds = {cell.kind for rows in pages for row in rows for cell in row.cells if cell}
    keys = [key for kind, (_, key) in KINDS.items() if kind in kinds]
    return [key._replace(words=key.words.split(": ", 1)[1]) for key in keys] if rows_are == "seats" else keys


def _text(title: str, lanes: Sequence[Lane], pages: list[list[ShownRow]], shown: range) -> str:
    lines = [title]
    for lane, rows in zip(lanes, pages, strict=True):
        lines.append(_lane_words(lane, shown[-1] if shown else 0))
        lines += [f"  {clipped(row.name, 15):15} {row.letters}".rstrip() for row in rows]
    steps = f"steps {shown.start} to {shown.stop - 1}" if shown else "no step yet"
    kinds = "; ".join(key.words for key in _legend(pages, "requests"))
    return "\n".join([*lines, f"  {steps}; {kinds}" if kinds else f"  {steps}"])
