"""Where the KV memory goes under each allocator, beside the published bars; every slider plays the engine again.

A bar is the average over the steps with a full pool, folded from the events of a run. The published bars stand only
beside requests like theirs. The view imports no engine: the caller hands in the function that plays.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple, Protocol

from minivllm.course.calculators import contiguous_requests, tail_waste
from minivllm.course.memory_use import Shares, average, memory_over_time, saturated
from minivllm.trace import Trace
from minivllm.views.memory_strip_picture import USES
from minivllm.views.sketch import (
    WIDTH_PX,
    Box,
    Choice,
    Control,
    Key,
    Line,
    Mark,
    SketchPicture,
    Slider,
    Words,
    ink_for,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import counted

LENGTHS = {
    "sharegpt": "ShareGPT-like: long chats",
    "alpaca": "Alpaca-like: short instructions",
    "equal": "All lengths equal and known (ShareGPT's means)",
}
SPREADS = (0, 25, 50, 75, 100)  # percent of the trace's own
MAX_MODEL_LENS = (512, 1024, 2048, 4096)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
POOLS = (10_485, 15_728, 31_457)  # slots: 8, 12 and 24 GiB of OPT-13B; the paper's is the middle one
PARTS = ("live", "reserved", "internal", "external")
LEFT, TOP, BOTTOM = 40.0, 22.0, 232.0
BAR_PX, LEAST_SHARE = 46.0, 4.0  # percent, from which on a part has its number beside it


class Play(Protocol):
    """Plays every allocator on the same requests: events by allocator, in the order of the columns."""

    def __call__(
        self, *, lengths: str, spread: float, max_model_len: int, block_size: int, num_slots: int
    ) -> Mapping[str, Trace]: ...


@dataclass(frozen=True)
class WasteControls:
    """What the reader chose; at first the paper's own setting. Spread in percent of the trace's."""

    lengths: str = "sharegpt"
    spread: int = 100
    max_model_len: int = 2048
    block_size: int = 16
    num_slots: int = 15_728


class Column(NamedTuple):
    """One allocator: ours, and where there is one, the published bar (None for a part without a label)."""

    allocator: str
    shares: Shares
    num_steps: int  # that it took to write the same tokens
    published: Sequence[float | None] | None = None
    their_name: str = ""


class WastePicture(SketchPicture):
    columns: dict[str, dict[str, float]]  # by allocator: the fields of Shares, and num_steps
    gap: float  # requests at once in the last column, in those of the first


class WasteBars(SketchView):
    """`WasteBars(play_room, FIGURE_2, NAMES)`; controls: lengths, spread, max_model_len, block_size, num_slots."""

    def __init__(
        self, play: Play, published: Mapping[str, Sequence[float | None]], names: Mapping[str, str], **chosen: int | str
    ) -> None:
        self._play = play
        self._published, self._names = published, names
        self._controls = WasteControls()
        self._played: tuple[WasteControls, Mapping[str, Trace], list[Column]] | None = None
        self._play_lock = threading.Lock()  # whoever asks second waits for the run of the first
        super().__init__()
        self.choose(chosen)

    @property
    def traces(self) -> Mapping[str, Trace]:
        """The events behind the bars, by allocator."""
        return self._runs()[0]

    @property
    def columns(self) -> dict[str, Column]:
        """What is drawn, by allocator."""
        return {column.allocator: column for column in self._runs()[1]}

    def drawn(self) -> WastePicture:
        return draw(self._controls, self._runs()[1])

    def _runs(self) -> tuple[Mapping[str, Trace], list[Column]]:
        """Play, unless these controls were played last."""
        chosen = self._controls
        with self._play_lock:
            if self._played is None or self._played[0] != chosen:
                traces = self._play(
                    lengths="sharegpt" if chosen.lengths == "equal" else chosen.lengths, spread=chosen.spread / 100,
                    max_model_len=chosen.max_model_len, block_size=chosen.block_size, num_slots=chosen.num_slots,
                )  # fmt: skip
                self._played = chosen, traces, [self._column(*item, chosen) for item in traces.items()]
            return self._played[1:]

    def _column(self, allocator: str, trace: Trace, chosen: WasteControls) -> Column:
        shares = average(saturated(memory_over_time(trace)))
        published = self._published.get(allocator) if has_their_requests(chosen) else None
        return Column(allocator, shares, trace.last_step, published, self._names.get(allocator, ""))

    def _moved(self, control: str, value: object) -> None:
        chosen = with_control(self._controls, controls(self._controls), control, value)
        if control == "lengths" and chosen.lengths == "equal":
            chosen = replace(chosen, spread=0, max_model_len=MAX_MODEL_LENS[0])
        elif control == "lengths":
            chosen = replace(chosen, spread=100, max_model_len=WasteControls.max_model_len)
        elif control == "spread" and chosen.lengths == "equal" and chosen.spread:
            chosen = replace(chosen, lengths="sharegpt")
        self._controls = replace(chosen, max_model_len=max(chosen.max_model_len, _max_model_lens(chosen)[0]))


def has_their_requests(chosen: WasteControls) -> bool:
    """Whether the requests are like those of the published bars."""
    return (chosen.lengths, chosen.spread) == (WasteControls.lengths, WasteControls.spread)


def draw(chosen: WasteControls, columns: Sequence[Column]) -> WastePicture:
    """Two bars for each allocator, the paper's and ours; ours alone for other requests than the paper's."""
    gap = columns[-1].shares.num_requests / columns[0].shares.num_requests
    title = _title(chosen, columns, gap)
    width = (WIDTH_PX - LEFT) / len(columns)
    groups = (mark for i, column in enumerate(columns) for mark in _group(column, LEFT + i * width, width))
    return {
        "view": "waste-bars", "title": title, "aria": f"Memory by use. {title}", "text": _text(title, chosen, columns),
        "status": "", "width": WIDTH_PX, "height": BOTTOM + 66, "marks": [*_axis(), *groups],
        "controls": controls(chosen), "steps": None, "legend": _legend(), "lines": _lines(chosen, columns),
        "lines_name": "how to read it", "provenance": "ours: the engine's allocators with a runner that computes"
        " nothing; paper: Kwon et al., SOSP 2023, figure 2", "columns":
        {c.allocator: {**asdict(c.shares), "num_steps": c.num_steps} for c in columns}, "gap": gap,
    }  # fmt: skip


def controls(chosen: WasteControls) -> list[Control]:
    longest = _max_model_lens(chosen)
    return [
        Choice("lengths", "requests", list(LENGTHS.items()), chosen.lengths),
        Slider("spread", "spread of lengths", [*SPREADS], chosen.spread, f"{chosen.spread}% of the trace's"),
        Slider(
            "max_model_len", "max_model_len", [*longest], chosen.max_model_len, counted(chosen.max_model_len, "token")
        ),
        Slider("block_size", "block size", [*BLOCK_SIZES], chosen.block_size, counted(chosen.block_size, "slot")),
        Slider("num_slots", "pool", [*POOLS], chosen.num_slots, counted(chosen.num_slots, "slot")),
    ]


def _max_model_lens(chosen: WasteControls) -> tuple[int, ...]:
    """Chats of 500 tokens on average, and unequal, do not fit 512."""
    return MAX_MODEL_LENS[1:] if chosen.lengths != "alpaca" and chosen.spread else MAX_MODEL_LENS


def _title(chosen: WasteControls, columns: Sequence[Column], gap: float) -> str:
    first, last = columns[0], columns[-1]
    return (
        f"{LENGTHS[chosen.lengths].split(':')[0].split(' (')[0]}: {first.allocator} memory is {first.shares.live:.1f}%"
        f" live, {last.allocator} {last.shares.live:.1f}%; on the same bytes run {first.shares.num_requests:.1f}"
        f" requests at once or {last.shares.num_requests:.1f}, {gap:.1f} times as many."
    )


def _axis() -> list[Mark]:
    marks: list[Mark] = [Words(2, 0, "percent of the pool, all steps with a full one", 11)]
    for percent in range(0, 101, 20):
        y = _y(percent)
        marks += [Line(LEFT, y, WIDTH_PX, y, "line", 0.3), Words(LEFT - 5, y - 6, f"{percent}", 10, "soft", "end")]
    return [*marks, Line(LEFT, BOTTOM, WIDTH_PX, BOTTOM, "soft")]


def _y(percent: float) -> float:
    return BOTTOM - percent / 100 * (BOTTOM - TOP)


def _group(column: Column, left: float, width: float) -> list[Mark]:
    """The paper's bar and ours, and what stands below them."""
    ours = [getattr(column.shares, part) for part in PARTS]
    gap = (width - 2 * BAR_PX - 48) / 2
    marks = _bar("paper", column.published, left + gap, is_ours=False) if column.published else []
    marks += _bar("ours", ours, left + gap + BAR_PX + 6, is_ours=True)
    middle = left + gap + BAR_PX + 3
    below = [column.allocator + (f" = {column.their_name}" if column.their_name else "")]
    below += [f"{column.shares.num_requests:.1f} requests at once", f"{counted(column.num_steps, 'step')} for all"]
    return [*marks, *(Words(middle, BOTTOM + 20 + 14 * i, w, 11, "ink", "middle") for i, w in enumerate(below))]


def _bar(label: str, parts: Sequence[float | None], x: float, *, is_ours: bool) -> list[Mark]:
    """Parts from the bottom; the live share within, those of ours beside it."""
    marks: list[Mark] = [Words(x + BAR_PX / 2, BOTTOM + 4, label, 10, "soft", "middle")]
    total = 0.0
    for part, share in zip(PARTS, parts, strict=True):
        if not share:
            continue
        y, height = _y(total + share), share / 100 * (BOTTOM - TOP)
        fill, pattern, _ = USES[part]
        marks.append(Box(x, y, BAR_PX, height, fill, pattern, "", f"{label}, {part}: {share:.1f}%"))
        if part == "live":
            marks.append(Words(x + BAR_PX / 2, y + 3, f"{share:.1f}", 11, ink_for(fill, pattern), "middle"))
        elif is_ours and share >= LEAST_SHARE:
            marks.append(Words(x + BAR_PX + 4, y + height / 2 - 6, f"{share:.1f}", 10, "soft"))
        total += share
    if None in parts:
        rest = f"{label}: {100 - total:.1f}% without labels"
        marks.append(Box(x, _y(100), BAR_PX, (100 - total) / 100 * (BOTTOM - TOP), "line", "outline", "", rest))
    return marks


def _legend() -> list[Key]:
    return [USES[part] for part in PARTS[:3]] + [USES["external"]._replace(words="external: all that is not set aside")]


def _lines(chosen: WasteControls, columns: Sequence[Column]) -> list[str]:
    worked = contiguous_requests(chosen.num_slots, chosen.max_model_len)
    held = columns[-1].shares.live_slots_per_request
    return [
        *worked.derivation, *worked.parts["left_over"].derivation, *tail_waste(held, chosen.block_size).derivation,
        _whose_bars(chosen),
    ]  # fmt: skip


def _whose_bars(chosen: WasteControls) -> str:
    theirs = "ShareGPT, max_model_len 2,048 and 15,728 slots"
    if has_their_requests(chosen):
        return f"the paper's bars stay those of {theirs}, wherever the sliders are"
    return f"the paper's bars are left out: they are of {theirs}, and these requests are others"


def _text(title: str, chosen: WasteControls, columns: Sequence[Column]) -> str:
    """A row for each allocator: ours, and the published figure in brackets."""
    corner = "ours (paper), % of the pool" if has_their_requests(chosen) else "ours, % of the pool"
    rows = [[corner, *PARTS, "at once", "steps"]]
    for column in columns:
        told = column.published or (None,) * len(PARTS)
        cells = [_beside(getattr(column.shares, part), figure) for part, figure in zip(PARTS, told, strict=True)]
        name = column.allocator + (f" = {column.their_name}" if column.their_name else "")
        rows.append([name, *cells, f"{column.shares.num_requests:.1f}", f"{column.num_steps:,}"])
    return "\n".join([title, *text_table(rows), _whose_bars(chosen)])


def _beside(ours: float, published: float | None) -> str:
    return f"{ours:.1f}" + (f" ({published:.1f})" if published is not None else "")
