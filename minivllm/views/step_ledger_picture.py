"""Bars of a step ledger: of each step the floor by what it is spent on, and the remainder on top."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.course.calculators.units import plain
from minivllm.course.step_ledger import KINDS, FloorParts, LedgerRow, LedgerSum, by_group, summed
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Control, Key, Line, Mark, SketchPicture, Words
from minivllm.views.sketch import table as text_table
from minivllm.views.stacked_bars import tick_ms
from minivllm.views.step_work import ms
from minivllm.views.theme import FAINT, OWNER_COLOURS, counted

NUM_BARS = 80
NUM_LISTED = 12  # bars in the text twin
LEFT, RIGHT, TOP, BOTTOM = 62.0, WIDTH_PX - 8.0, 26.0, 270.0
HEIGHT = BOTTOM + 44
LAST = (30, 100, 300, 1000)
PARTS = {
    "weights": Key(OWNER_COLOURS[4], "solid", "moving weights"),
    "kv": Key(OWNER_COLOURS[5], "solid", "moving K and V"),
    "logits": Key(OWNER_COLOURS[3], "solid", "moving logits"),
    "arithmetic": Key(OWNER_COLOURS[2], "dots", "arithmetic: where dots are, the step is bound by compute"),
    "remainder": Key(FAINT, "hatch", "remainder: time beyond the floor"),
}
NAMES = {
    "weights": "weights",
    "kv": "K and V",
    "logits": "logits",
    "arithmetic": "arithmetic",
    "remainder": "remainder",
}


class Unit(NamedTuple):
    """What the height of a bar is, and the parts it is stacked of."""

    words: str
    axis: str
    parts_of: Callable[[LedgerSum], dict[str, float]]  # of one step on average


UNITS = {
    "ms": Unit("time", "milliseconds for each step", lambda mean: {**floor_parts(mean), "remainder": remainder(mean)}),
    "GB": Unit("bytes moved", "GB for each step", lambda mean: {
        "weights": mean.weight_bytes / 1e9, "kv": mean.kv_bytes / 1e9, "logits": mean.logit_bytes / 1e9}),
    "GFLOP": Unit("arithmetic", "GFLOP for each step", lambda mean: {"arithmetic": mean.flops / 1e9}),
    "share": Unit("share of the floor", "percent of the measured time", lambda mean: {
        name: 100 * part / max(mean.run_ms, mean.floor_ms, 1e-12) for name, part in
        {**floor_parts(mean), "remainder": remainder(mean)}.items()}),
}  # fmt: skip


@dataclass(frozen=True)
class LedgerControls:
    """What the reader chose; `step` ends the range, None: the newest."""

    steps: str = "all"  # or the last so many
    kind: str = "all"
    unit: str = "ms"
    step: int | None = None


class LedgerBar(NamedTuple):
    """A few steps in a row as one bar."""

    first_step: int
    last_step: int
    mean: LedgerSum  # of one of them
    parts: dict[str, float]  # in the chosen unit

    @property
    def label(self) -> str:
        return str(self.first_step) if self.first_step == self.last_step else f"{self.first_step}-{self.last_step}"


class LedgerPicture(SketchPicture):
    bars: list[LedgerBar]
    total: LedgerSum


def draw(rows: Sequence[LedgerRow], chosen: LedgerControls, origin: str = "", is_live: bool = False) -> LedgerPicture:
    """The chosen steps, at most NUM_BARS bars: where there are more steps, each bar is the mean of several."""
    shown, unit = chosen_rows(rows, chosen), UNITS[chosen.unit]
    bars, total, groups = bars_of(shown, unit), summed(shown), by_group(shown)
    per_bar = -(-len(shown) // NUM_BARS)
    title = _title(groups, total, chosen, is_live) if shown else _empty(chosen, is_live, has_rows=bool(rows))
    axis = f"{unit.axis}, means of {per_bar} in a row" if per_bar > 1 else unit.axis
    ends = (rows[0].step, rows[-1].step, min(chosen.step or rows[-1].step, rows[-1].step)) if rows else None
    kinds = {name for bar in bars for name in bar.parts}
    return {
        "view": "step-ledger", "title": title, "aria": f"Step ledger. {title}", "status": "",
        "text": _text(title, [*groups, total], bars, axis), "width": WIDTH_PX, "height": HEIGHT,
        "marks": _marks(bars, axis), "controls": controls(chosen), "steps": ends,
        "legend": [key for name, key in PARTS.items() if name in kinds], "lines": _lines(shown, groups),
        "lines_name": "by kind of step", "provenance": origin, "bars": bars, "total": total,
    }  # fmt: skip


def controls(chosen: LedgerControls) -> list[Control]:
    return [
        Choice("steps", "steps", [("all", "all"), *((str(n), f"the last {n}") for n in LAST)], chosen.steps),
        Choice("kind", "kind", [(name, name) for name in ("all", *KINDS)], chosen.kind),
        Choice("unit", "unit", [(name, f"{unit.words}: {unit.axis}") for name, unit in UNITS.items()], chosen.unit),
    ]


def chosen_rows(rows: Sequence[LedgerRow], chosen: LedgerControls) -> list[LedgerRow]:
    """Steps of the kind up to the one that ends the range, the last so many of them."""
    end = rows[-1].step if rows and chosen.step is None else chosen.step or 0
    found = [row for row in rows if row.step <= end and chosen.kind in ("all", row.kind)]
    return found if chosen.steps == "all" else found[-int(chosen.steps) :]


def bars_of(rows: Sequence[LedgerRow], unit: Unit) -> list[LedgerBar]:
    per_bar = max(-(-len(rows) // NUM_BARS), 1)
    parts = [rows[start : start + per_bar] for start in range(0, len(rows), per_bar)]
    means = [mean(part) for part in parts]
    return [
        LedgerBar(part[0].step, part[-1].step, one, unit.parts_of(one)) for part, one in zip(parts, means, strict=True)
    ]


def mean(rows: Sequence[LedgerRow]) -> LedgerSum:
    """What one of the steps is on average; bytes and FLOPs in whole ones."""
    total, n = summed(rows), len(rows)
    parts = FloorParts(*(part / n for part in total.parts))
    times = {name: getattr(total, name) / n for name in ("run_ms", "floor_ms", "host_ms")}
    counts = {name: getattr(total, name) // n for name in ("weight_bytes", "kv_bytes", "logit_bytes", "flops")}
    return total._replace(parts=parts, **times, **counts)


def floor_parts(each: LedgerSum) -> dict[str, float]:
    return each.parts._asdict()


def remainder(each: LedgerSum) -> float:
    """Above 0, or the steps ran faster than their floor: then nothing is drawn, and the title says so."""
    return max(each.remainder_ms, 0.0)


def _empty(chosen: LedgerControls, is_live: bool, *, has_rows: bool) -> str:
    told, kind = "Live" if is_live else "Recorded", "" if chosen.kind == "all" else f"{chosen.kind} "
    if has_rows:
        return f"{told}: up to this step there is no {kind}step; choose a later one or another kind."
    return f"{told}: no step has a cost; let keep_ledger(llm) listen while the engine runs."


def _title(groups: Sequence[LedgerSum], total: LedgerSum, chosen: LedgerControls, is_live: bool) -> str:
    told, what = "Live" if is_live else "Recorded", "step" if chosen.kind == "all" else f"{chosen.kind} step"
    steps = counted(total.num_steps, what)
    if chosen.unit == "GB":
        moved = sorted(((total.weight_bytes, "weights"), (total.kv_bytes, "K and V"), (total.logit_bytes, "logits")))
        shares = [f"{100 * part / sum(n for n, _ in moved):.0f}% {name}" for part, name in reversed(moved)]
        return f"{told}: {steps} had to move {amount(sum(n for n, _ in moved) / 1e9)} GB: {', '.join(shares)}."
    if chosen.unit == "GFLOP":
        return f"{told}: {steps} had to do {amount(total.flops / 1e9)} GFLOP, in {ms(total.run_ms)}{_bound(total)}."
    start = f"{told}: of {ms(total.run_ms)} in {steps}"
    if total.remainder_ms < 0:
        return f"{start} the floor is more than all, {ms(total.floor_ms)}: these steps ran on a faster machine."
    worst = max(groups, key=lambda each: each.remainder_ms)
    where = f", {ms(worst.remainder_ms)} of it in {worst.name}" if len(groups) > 1 else ""
    return (
        f"{start} the floor is {total.share:.0%}, most of it for {total.most_of_floor};"
        f" {ms(total.remainder_ms)} remain{where}."
    )


def _bound(total: LedgerSum) -> str:
    unhidden = total.parts.arithmetic
    return f"; moving hides all but {ms(unhidden)} of the arithmetic" if unhidden else "; moving hides all of it"


def _lines(rows: Sequence[LedgerRow], groups: Sequence[LedgerSum]) -> list[str]:
    """One for each kind of step, the most expensive first."""
    lines = [
        f"{each.name}: {counted(each.num_steps, 'step')}, {ms(each.run_ms)}, floor {each.share:.0%} (mostly"
        f" {each.most_of_floor}), remainder {ms(each.remainder_ms)}, host {ms(each.host_ms)}"
        for each in sorted(groups, key=lambda each: -each.run_ms)
    ]
    if too_fast := sum(row.remainder_ms < 0 for row in rows):
        lines.append(f"{counted(too_fast, 'step')} took less than the floor: is the machine the one they ran on?")
    return lines


def _text(title: str, sums: Sequence[LedgerSum], bars: Sequence[LedgerBar], axis: str) -> str:
    head = ("", "steps", "run ms", "floor ms", "share", "remainder ms", "GB", "TFLOP")
    lines = [title, *text_table([head, *(_cells(each) for each in sums)])]
    if bars:
        rows = [["step", *(NAMES[name] for name in bars[0].parts)]]
        rows += [[bar.label, *(f"{value:.3g}" for value in bar.parts.values())] for bar in bars[-NUM_LISTED:]]
        lines += [f"the last bars, {axis}:", *text_table(rows)]
    return "\n".join(lines)


def _cells(each: LedgerSum) -> tuple[str, ...]:
    num_bytes = each.weight_bytes + each.kv_bytes + each.logit_bytes
    times = (amount(each.run_ms), amount(each.floor_ms), f"{each.share:.0%}", amount(each.remainder_ms))
    return (each.name, f"{each.num_steps:,}", *times, amount(num_bytes / 1e9), amount(each.flops / 1e12))


def amount(value: float) -> str:
    """To three figures, without powers of ten where it is large: amount(16123.4) == "16,123"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _marks(bars: Sequence[LedgerBar], axis: str) -> list[Mark]:
    highest = max((sum(bar.parts.values()) for bar in bars), default=1.0) or 1.0
    tick = tick_ms(float(f"{highest:.6g}"))  # shares sum to 100, or a hair more
    marks: list[Mark] = [Words(4, 4, axis, 11), Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft")]
    for i in range(6):
        y = BOTTOM - i / 5 * (BOTTOM - TOP)
        marks += [Line(LEFT, y, RIGHT, y, "line", 0.3), Words(LEFT - 5, y - 6, plain(tick * i), 10, "soft", "end")]
    pitch = (RIGHT - LEFT) / max(len(bars), 1)
    every = max(-(-max((len(bar.label) for bar in bars), default=1) * 7 // int(pitch)), 1)
    for i, bar in enumerate(bars):
        left, floor = LEFT + i * pitch + pitch * 0.08, BOTTOM
        for name, value in bar.parts.items():
            height = value / (5 * tick) * (BOTTOM - TOP)
            if height > 0:
                floor -= height
                marks.append(
                    Box(left, floor, pitch * 0.84, height, PARTS[name].fill, PARTS[name].pattern, "", words(bar))
                )
        if i % every == 0 and left + len(bar.label) * 6 < RIGHT + 6:
            marks.append(Words(left, BOTTOM + 5, bar.label, 10, "soft"))
    return [*marks, Words((LEFT + RIGHT) / 2, BOTTOM + 22, "step", 11, "ink", "middle")]


def words(bar: LedgerBar) -> str:
    """What hovering tells."""
    m = bar.mean
    what = "step" if bar.first_step == bar.last_step else "mean of steps"
    bound = "compute" if m.parts.arithmetic > 0 else "memory"
    return (
        f"{what} {bar.label}: {ms(m.run_ms)}, floor {ms(m.floor_ms)} ({m.share:.0%}), bound by {bound};"
        f" weights {plain(round(m.weight_bytes / 1e9, 3))} GB, K and V {plain(round(m.kv_bytes / 1e9, 3))} GB, logits"
        f" {plain(round(m.logit_bytes / 1e9, 3))} GB, {plain(round(m.flops / 1e9))} GFLOP"
    )
