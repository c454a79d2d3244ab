"""What reading through a block table costs (EC1): measured times over context and block size, paged and contiguous.

Controls choose what is shown (time, extra time over contiguous keys, share of the copy's bandwidth) and along what.
Two more, attention's share of a step and how many more requests paging admits, turn extra time into tokens a second.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import log2, log10
from typing import NamedTuple

from minivllm.course.calculators import achieved_share
from minivllm.course.calculators.units import plain
from minivllm.course.paging_cost import CostRow, PagingCost, net_gain
from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import (
    WIDTH_PX,
    Choice,
    Control,
    Dot,
    Key,
    Line,
    Mark,
    SketchPicture,
    Slider,
    Value,
    Words,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.stacked_bars import tick_ms
from minivllm.views.theme import OWNER_COLOURS, counted

LEFT, RIGHT, TOP, BOTTOM = 64.0, WIDTH_PX - 18.0, 26.0, 290.0
SHOWN = {"extra": "extra time over contiguous", "time": "time", "share": "share of copy bandwidth"}
ALONG = {"block_size": "block size", "context": "context"}
SHARES, FACTORS = (5, 10, 20, 40, 60, 80), (1.0, 1.02, 1.05, 1.1, 1.5, 2.0, 3.0)


class Curve(NamedTuple):
    """A kernel on a layout, and how it is drawn."""

    kernel: str
    layout: str
    words: str
    shape: str
    colour: str
    is_extra: bool  # whether its extra time is shown: a rival's says nothing about the table


CURVES = (
    Curve("plain", "scattered", "our kernel, blocks scattered", "circle", OWNER_COLOURS[0], True),
    Curve("plain", "in order", "our kernel, the same blocks in order", "square", OWNER_COLOURS[4], True),
    Curve("plain", "contiguous", "our kernel, contiguous keys", "diamond", OWNER_COLOURS[1], True),
    Curve("engine", "scattered", "the engine's kernel for this GPU, scattered", "square", OWNER_COLOURS[2], True),
    Curve("SDPA cuDNN", "contiguous", "torch (cuDNN), contiguous keys", "diamond", OWNER_COLOURS[5], False),
    Curve("gather, then SDPA flash", "scattered", "torch: copy the blocks together, then attend", "circle",
          OWNER_COLOURS[3], False),
)  # fmt: skip


@dataclass(frozen=True)
class CostControls:
    """What the reader chose; `attention` is a percentage of a step, `factor` requests with paging over without."""

    shown: str = "extra"
    along: str = "block_size"
    batch: int = 8
    context: int = 16384
    block_size: int = 16
    attention: int = 20
    factor: float = 1.5


class CostPicture(SketchPicture):
    extra: float  # of our kernel at the chosen point, a share
    gain: float
    break_even: float
    curves: dict[str, list[tuple[int, float]]]  # by words: (x, y)


class CostCurves(SketchView):
    """`CostCurves(PagingCost.load(), batch=8)`."""

    def __init__(self, cost: PagingCost, **chosen: Value) -> None:
        if not isinstance(cost, PagingCost):
            raise MiniVLLMError(f"CostCurves draws a PagingCost (PagingCost.load(path)), not {type(cost).__name__}")
        self._cost = cost
        self._controls = first_controls(cost)
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> CostPicture:
        return draw(self._cost, self._controls)

    def _moved(self, control: str, value: object) -> None:
        chosen = with_control(self._controls, controls(self._cost, self._controls), control, value)
        self._controls = fitted(self._cost, chosen)


def first_controls(cost: PagingCost) -> CostControls:
    """The usual choice, or what is nearest among what was measured."""
    batch = min(cost.batches, key=lambda b: abs(b - 8))
    block_size = min(cost.block_sizes, key=lambda size: abs(size - 16))
    return fitted(cost, CostControls(batch=batch, block_size=block_size))


def fitted(cost: PagingCost, chosen: CostControls) -> CostControls:
    """Controls whose context was measured at their batch."""
    contexts = cost.contexts(chosen.batch)
    nearest = min(contexts, key=lambda context: abs(log2(context / chosen.context)))
    return CostControls(**{**vars(chosen), "context": nearest})


def controls(cost: PagingCost, chosen: CostControls) -> list[Control]:
    contexts = cost.contexts(chosen.batch)
    return [
        Choice("shown", "show", list(SHOWN.items()), chosen.shown),
        Choice("along", "along", list(ALONG.items()), chosen.along),
        Slider("batch", "batch", [*cost.batches], chosen.batch, counted(chosen.batch, "request")),
        Slider("context", "context", [*contexts], chosen.context, counted(chosen.context, "token")),
        Slider("block_size", "block size", [*cost.block_sizes], chosen.block_size, counted(chosen.block_size, "token")),
        Slider("attention", "attention in a step", [*SHARES], chosen.attention, f"{chosen.attention}%"),
        Slider("factor", "requests that fit", [*FACTORS], chosen.factor, f"{chosen.factor:g} × as many"),
    ]


def draw(cost: PagingCost, chosen: CostControls) -> CostPicture:
    """The curves, and what the chosen point means for a step."""
    row = cost.row("plain", "scattered", chosen.batch, chosen.context, chosen.block_size)
    extra, share = cost.overhead(row), chosen.attention / 100
    curves = {curve: points(cost, chosen, curve) for curve in CURVES}
    curves = {curve: found for curve, found in curves.items() if found}
    title = _title(cost, chosen)
    return {
        "view": "cost-curves", "title": title, "aria": f"Cost curves. {title}", "text": _text(title, chosen, curves),
        "status": "", "width": WIDTH_PX, "height": BOTTOM + 40, "marks": _marks(chosen, curves),
        "controls": controls(cost, chosen), "steps": None,
        "legend": [Key(curve.colour, "solid", f"{curve.words} ({curve.shape})") for curve in curves],
        "lines": lines(cost, chosen, row), "lines_name": "what it means for a step", "provenance": cost.origin,
        "extra": extra, "gain": net_gain(extra, share, chosen.factor), "break_even": 1 + extra * share,
        "curves": {curve.words: found for curve, found in curves.items()},
    }  # fmt: skip


def points(cost: PagingCost, chosen: CostControls, curve: Curve) -> list[tuple[int, float]]:
    """(block size or context, value) of a curve, as far as it was measured; contiguous keys have any block size."""
    if chosen.shown == "extra" and not curve.is_extra:
        return []
    places = cost.block_sizes if chosen.along == "block_size" else cost.contexts(chosen.batch)
    found = []
    for place in places:
        size, context = (place, chosen.context) if chosen.along == "block_size" else (chosen.block_size, place)
        row = cost.find(curve.kernel, curve.layout, chosen.batch, context, size)
        if row:
            found.append((place, value_of(cost, chosen, row)))
    return found


def value_of(cost: PagingCost, chosen: CostControls, row: CostRow) -> float:
    """Microseconds, or percent."""
    return {"time": row.us, "share": 100 * row.share, "extra": 100 * cost.overhead(row)}[chosen.shown]


def lines(cost: PagingCost, chosen: CostControls, row: CostRow) -> list[str]:
    """From extra time to tokens a second, and the bytes against the data sheet."""
    extra, share = cost.overhead(row), chosen.attention / 100
    step, gain = 1 + extra * share, net_gain(extra, share, chosen.factor)
    verdict = "paging gains" if gain > 1 else "paging loses" if gain < 1 else "nothing is gained or lost"
    found = [
        f"attention takes {percent(extra)} longer, a step 1 + {extra:.4f} × {share:g} = {step:.4f} times as long",
        f"tokens a second: × {chosen.factor:g} / {step:.4f} = {gain:.3f}: {verdict}; it breaks even where "
        f"{step:.4f} times as many requests fit",
    ]  # fmt: skip
    moved = cost.num_bytes(row)
    rates = f"{row.gbps:,.0f} GB/s, {100 * row.share:.1f}% of a copy on this GPU"
    if cost.chip:
        sheet = achieved_share(moved, row.us / 1e3, cost.chip)
        rates += f", {float(sheet):.1f}% of the data sheet's peak"
    return [*found, f"{moved / 1e6:,.1f} MB in {row.us:g} µs: {rates}"]


def percent(share: float) -> str:
    """percent(0.0312) == "3.1%"; small ones keep two digits."""
    return f"{100 * share:.2g}%" if abs(share) < 0.01 else f"{100 * share:.1f}%"


def _title(cost: PagingCost, chosen: CostControls) -> str:
    """What the chosen point says, in the terms of what is shown."""
    batch, context, size = chosen.batch, chosen.context, chosen.block_size
    point = f"With {counted(batch, 'request')} of {counted(context, 'token')}"
    row, base = cost.row("plain", "scattered", batch, context, size), cost.row("plain", "contiguous", batch, context)
    if chosen.shown == "time":
        copied = cost.find("gather, then SDPA flash", "scattered", batch, context, size)
        more = f", and {copied.us:,.4g} µs if the blocks are first copied together" if copied else ""
        times = f"{row.us:,.4g} µs in blocks of {size}, {base.us:,.4g} µs on contiguous keys"
        return f"{point}, our kernel takes {times}{more}."
    if chosen.shown == "share":
        share = f"{percent(row.share)} of the bandwidth of a copy on {cost.gpu}"
        return f"{point}, our kernel reads blocks of {size} at {share}."
    rows = [cost.find("plain", "scattered", batch, context, block_size) for block_size in cost.block_sizes]
    worst = max((found for found in rows if found), key=cost.overhead)
    return (
        f"{point}, our kernel takes {percent(cost.overhead(row))} longer through blocks of {size} than on contiguous "
        f"keys; the most is {percent(cost.overhead(worst))}, in blocks of {worst.block_size}."
    )


def _text(title: str, chosen: CostControls, curves: dict[Curve, list[tuple[int, float]]]) -> str:
    unit = "µs" if chosen.shown == "time" else "%"
    places = sorted({place for found in curves.values() for place, _ in found})
    rows = [[f"{SHOWN[chosen.shown]} ({unit}) by {ALONG[chosen.along]}", *(f"{place:,}" for place in places)]]
    for curve, found in curves.items():
        values = dict(found)
        rows.append([curve.words, *(f"{values[place]:.4g}" if place in values else "–" for place in places)])
    return "\n".join([title, *text_table(rows)])


def _marks(chosen: CostControls, curves: dict[Curve, list[tuple[int, float]]]) -> list[Mark]:
    places = sorted({place for found in curves.values() for place, _ in found})
    values = [value for found in curves.values() for _, value in found]
    axis = Axis.of(values, is_log=chosen.shown == "time")
    low, high = log2(places[0]), log2(places[-1])

    def x_of(place: float) -> float:
        return LEFT + 14 + (log2(place) - low) / max(high - low, 1) * (RIGHT - LEFT - 28)

    marks: list[Mark] = [Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft"), Line(LEFT, TOP, LEFT, BOTTOM, "soft")]
    for tick in axis.ticks:
        y = axis.y(tick)
        marks += [Line(LEFT, y, RIGHT, y, "line", 1 if tick == 0 else 0.3)]
        marks += [Words(LEFT - 5, y - 6, plain(tick), 10, "soft", "end")]
    marks += [Words(x_of(place), BOTTOM + 5, f"{place:,}", 10, "soft", "middle") for place in places]
    unit = {"time": "µs", "extra": "% longer than our kernel on contiguous keys", "share": "% of copy bandwidth"}
    now = chosen.block_size if chosen.along == "block_size" else chosen.context
    marks += [Words(4, 6, unit[chosen.shown], 11), Line(x_of(now), TOP, x_of(now), BOTTOM, "pick", 1, True)]
    marks += [Words((LEFT + RIGHT) / 2, BOTTOM + 22, f"{ALONG[chosen.along]} (tokens)", 11, "ink", "middle")]
    for curve, found in curves.items():
        spots = [(x_of(place), axis.y(value), f"{curve.words}: {value:.4g}") for place, value in found]
        pairs = pairwise(spots)
        is_dashed = curve.layout == "contiguous"
        marks += [Line(a[0], a[1], b[0], b[1], curve.colour, 1.5, is_dashed) for a, b in pairs]
        marks += [Dot(x, y, curve.shape, curve.colour, 5, words) for x, y, words in spots]
    return marks


@dataclass(frozen=True)
class Axis:
    """From values to pixels, linear from 0 or below, or in decades."""

    ticks: list[float]
    is_log: bool

    @classmethod
    def of(cls, values: list[float], is_log: bool) -> "Axis":
        if is_log:
            low, high = (int(log10(edge) // 1) for edge in (min(values), max(values)))
            return cls([10.0**power for power in range(low, high + 2)], True)
        step = tick_ms(max(*values, 1.0) - min(*values, 0.0))
        first = int(min(*values, 0.0) // step)
        last = int(-(-max(*values, 1.0) // step))
        return cls([step * i for i in range(first, last + 1)], False)

    def y(self, value: float) -> float:
        low, high, at = self.ticks[0], self.ticks[-1], value
        if self.is_log:
            low, high, at = log10(low), log10(high), log10(value)
        return BOTTOM - (at - low) / (high - low) * (BOTTOM - TOP)
