"""Verification on the roofline: the batch moves it over the ridge, until the gain of speculation is a loss.

Above: the matrix products of a step without drafts and of one that checks them, on the chip's roof. Below: the speed-up
over the batch, drafting and checking counted, K and V read once for all places of a request. Recorded runs are dots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2, log10

from minivllm.course.calculators import accelerator, expected_tokens, ridge_point
from minivllm.course.calculators.units import plain
from minivllm.course.speculation import Verification, last_gain
from minivllm.course.speculation_records import SpeedRow, SpeedRuns
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
    Trail,
    Value,
    Words,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.step_work import chip_options, compute_dtype, model_options, ms
from minivllm.views.theme import OWNER_COLOURS, counted

BATCHES = tuple(2**k for k in range(11))  # 1 to 1,024
CONTEXTS = tuple(2**k for k in range(6, 16))
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12)
ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
COSTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
NONE = "none"
LEFT, RIGHT = 64.0, WIDTH_PX - 20.0
ROOF_TOP, ROOF_BOTTOM, GAIN_TOP, GAIN_BOTTOM = 22.0, 150.0, 206.0, 370.0
PLAIN, VERIFY = OWNER_COLOURS[1], OWNER_COLOURS[0]


@dataclass(frozen=True)
class BatchControls:
    """What the reader chose; `cost` is the drafter's time for a token, in steps without drafts of the same batch."""

    chip: str = "h100-sxm"
    model: str = "llama-3-70b"
    batch: int = 1
    num_drafts: int = 4
    context: int = 256
    alpha: float = 0.7
    cost: float = 0.05
    recorded: str = NONE

    def load(self, batch: int) -> Verification:
        return Verification(self.model, self.chip, batch, self.num_drafts, self.context)


class BatchPicture(SketchPicture):
    gains: dict[int, float]  # by batch
    ridge: float
    intensities: tuple[float, float]  # without drafts, and checking them
    last_gain: int  # the largest batch that still gains


class SpeculationBatch(SketchView):
    """`SpeculationBatch(SpeedRuns.recorded(), chip="h200-sxm", model="qwen3-8b", batch=64)`."""

    def __init__(self, runs: SpeedRuns | None = None, **chosen: Value) -> None:
        if runs is not None and not isinstance(runs, SpeedRuns):
            raise MiniVLLMError(f"SpeculationBatch draws SpeedRuns (SpeedRuns.load(path)), not {type(runs).__name__}")
        self._runs = runs or SpeedRuns(())
        self._controls = BatchControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> BatchPicture:
        return draw(self._controls, self._runs)

    def _moved(self, control: str, value: object) -> None:
        self._controls = with_control(self._controls, controls(self._controls, self._runs), control, value)


def controls(chosen: BatchControls, runs: SpeedRuns) -> list[Control]:
    recorded = [(NONE, "none"), *((name, name) for name in runs.series())]
    cost = f"{chosen.cost:g} steps a token"
    return [
        Choice("chip", "chip", chip_options(), chosen.chip),
        Choice("model", "target", model_options(), chosen.model),
        Slider("batch", "batch B", [*BATCHES], chosen.batch, counted(chosen.batch, "request")),
        Slider("num_drafts", "drafts k", [*LENGTHS], chosen.num_drafts, counted(chosen.num_drafts, "draft")),
        Slider("alpha", "acceptance", [*ALPHAS], chosen.alpha, f"{chosen.alpha:g}"),
        Slider("cost", "cost of a draft", [*COSTS], chosen.cost, cost),
        Slider("context", "context", [*CONTEXTS], chosen.context, counted(chosen.context, "token")),
        Choice("recorded", "recorded run", recorded, chosen.recorded),
    ]


def draw(chosen: BatchControls, runs: SpeedRuns) -> BatchPicture:
    """Both plots and their numbers."""
    gains = {batch: chosen.load(batch).speedup(chosen.alpha, chosen.cost) for batch in BATCHES}
    load = chosen.load(chosen.batch)
    ridge = float(ridge_point(chosen.chip, compute_dtype(chosen.chip, "bf16")))
    intensities = load.products(0).intensity, load.products(chosen.num_drafts).intensity
    limit = last_gain(load, chosen.alpha, chosen.cost)
    rows = runs.series().get(chosen.recorded, [])
    title = _title(chosen, gains[chosen.batch], intensities[1], ridge)
    keys = [
        Key(PLAIN, "solid", "a step without drafts (circle)"),
        Key(VERIFY, "solid", "a step that checks drafts (square)"),
    ]
    keys += [
        Key(OWNER_COLOURS[2], "solid", "recorded (diamond)"),
        Key(OWNER_COLOURS[3], "solid", "its formula (circle)"),
    ]
    return {
        "view": "speculation-batch", "title": title, "aria": f"Speculation over the batch. {title}",
        "text": _text(title, chosen, gains, rows), "status": "", "width": WIDTH_PX, "height": GAIN_BOTTOM + 44,
        "marks": [*_roof(chosen, intensities, ridge), *_gains(chosen, gains, rows)],
        "controls": controls(chosen, runs), "steps": None, "legend": keys[: 4 if rows else 2],
        "lines": _lines(chosen, load, limit), "lines_name": "how it was found",
        "provenance": runs.origin if rows else f"{accelerator(chosen.chip).source}: data sheet, not measured",
        "gains": gains, "ridge": ridge, "intensities": intensities, "last_gain": limit,
    }  # fmt: skip


def _title(chosen: BatchControls, gain: float, intensity: float, ridge: float) -> str:
    side = "right of" if intensity > ridge else "left of"
    what = f"gains: {gain:.2f} times as fast" if gain > 1 else f"loses: {gain:.2f}×"
    return (
        f"{chosen.model} on {chosen.chip}, batch {chosen.batch}: checking {counted(chosen.num_drafts, 'draft')} stands"
        f" {side} the ridge ({intensity:,.0f} against {ridge:,.0f} FLOP/byte), and speculation {what}."
    )


def _text(title: str, chosen: BatchControls, gains: dict[int, float], rows: Sequence[SpeedRow]) -> str:
    table = [["batch", *(f"{batch:,}" for batch in gains)], ["speed-up, floors", *(f"{g:.2f}" for g in gains.values())]]
    times = [chosen.load(batch) for batch in gains]
    table += [["without drafts ms", *(f"{t.plain_ms:.3g}" for t in times)]]
    table += [["checking them ms", *(f"{t.verify_ms:.3g}" for t in times)]]
    lines = [title, *text_table(table)]
    if rows:
        recorded = [["recorded at batch", *(f"{row.batch:,}" for row in rows)]]
        recorded += [["speed-up", *(f"{row.speedup:.2f}" for row in rows)]]
        recorded += [["its formula", *(f"{row.formula_speedup:.2f}" for row in rows)]]
        lines += text_table(recorded)
    return "\n".join(lines)


def _lines(chosen: BatchControls, load: Verification, limit: int) -> list[str]:
    drafting = chosen.num_drafts * chosen.cost * load.plain_ms
    gain = load.speedup(chosen.alpha, chosen.cost)
    found = [
        f"a step without drafts {ms(load.plain_ms)}, one that checks {chosen.num_drafts}: {ms(load.verify_ms)}, "
        f"drafting {ms(drafting)}",
        f"speed-up = {float(expected_tokens(chosen.alpha, chosen.num_drafts)):.3f} expected tokens × "
        f"{ms(load.plain_ms)} / {ms(load.round_ms(chosen.cost))} = {gain:.3f}",
    ]
    if limit >= 4096:
        return [*found, "it gains at every batch up to 4,096: reading K and V, which drafts share, is most of a step"]
    return [*found, f"it gains up to batch {limit}" if limit else "it loses even for one request"]


def _roof(chosen: BatchControls, intensities: tuple[float, float], ridge: float) -> list[Mark]:
    """The roof in units of the chip's peak, over intensity from 0.5 to 16,384."""
    marks: list[Mark] = [Words(4, 4, "share of peak FLOP/s", 11), Line(LEFT, ROOF_BOTTOM, RIGHT, ROOF_BOTTOM, "soft")]
    for power in range(0, 15, 2):
        marks.append(Words(_roof_x(2**power), ROOF_BOTTOM + 4, f"{2**power:,}", 10, "soft", "middle"))
    marks.append(Words((LEFT + RIGHT) / 2, ROOF_BOTTOM + 18, "FLOPs for each byte of weights", 11, "ink", "middle"))
    corner = _roof_x(ridge), _roof_y(1.0)
    marks += [Line(_roof_x(0.5), _roof_y(0.5 / ridge), *corner, "ink", 2), Line(*corner, RIGHT, corner[1], "ink", 2)]
    marks += [Line(*corner, corner[0], ROOF_BOTTOM, "soft", 1, True)]
    marks += [Words(corner[0] + 4, ROOF_BOTTOM - 15, f"ridge {plain(round(ridge))}", 10, "soft")]
    styles = (("circle", PLAIN, "without drafts"), ("square", VERIFY, "checking them"))
    for (shape, colour, words), intensity in zip(styles, intensities, strict=True):
        x, y = _roof_x(intensity), _roof_y(min(1.0, intensity / ridge))
        marks += [Line(x, y, x, ROOF_BOTTOM, colour, 1, True)]
        marks += [Dot(x, y, shape, colour, 7, f"{words}: {intensity:,.1f} FLOP/byte")]
    return marks


def _roof_x(intensity: float) -> float:
    share = (log2(min(max(intensity, 0.5), 16384)) + 1) / 15
    return LEFT + share * (RIGHT - LEFT)


def _roof_y(share: float) -> float:
    """Three decades below the peak."""
    return ROOF_BOTTOM - (max(log10(share), -3) + 3) / 3 * (ROOF_BOTTOM - ROOF_TOP)


def _gains(chosen: BatchControls, gains: dict[int, float], rows: Sequence[SpeedRow]) -> list[Mark]:
    recorded = [value for row in rows for value in (row.speedup, row.formula_speedup)]
    top = max(1.5, *gains.values(), *recorded)

    def place(batch: int, gain: float) -> tuple[float, float]:
        x = LEFT + 12 + log2(batch) / log2(BATCHES[-1]) * (RIGHT - LEFT - 24)
        return x, GAIN_BOTTOM - gain / top * (GAIN_BOTTOM - GAIN_TOP)

    one = place(1, 1.0)[1]
    marks: list[Mark] = [Words(4, GAIN_TOP - 20, "speed-up", 11), Line(LEFT, GAIN_BOTTOM, RIGHT, GAIN_BOTTOM, "soft")]
    marks += [Line(LEFT, one, RIGHT, one, "ink", 1.5, True), Words(RIGHT, one + 3, "below: a loss", 11, "ink", "end")]
    for tick in range(int(top) + 1):
        y = place(1, tick)[1]
        marks += [Line(LEFT, y, RIGHT, y, "line", 0.3), Words(LEFT - 5, y - 6, f"{tick}", 10, "soft", "end")]
    marks += [Words(place(b, 0)[0], GAIN_BOTTOM + 5, f"{b:,}", 10, "soft", "middle") for b in BATCHES]
    marks += [Words((LEFT + RIGHT) / 2, GAIN_BOTTOM + 22, "batch (requests)", 11, "ink", "middle")]
    marks.append(Trail([place(batch, gain) for batch, gain in gains.items()], VERIFY, 2))
    spots = {"diamond": (OWNER_COLOURS[2], "speedup"), "circle": (OWNER_COLOURS[3], "formula_speedup")}
    for shape, (colour, name) in spots.items():
        found = [(*place(row.batch, getattr(row, name)), getattr(row, name)) for row in rows]
        marks += [Line(*a[:2], *b[:2], colour, 1.5, shape == "circle") for a, b in pairwise(found)]
        marks += [Dot(x, y, shape, colour, 5, f"{name}: {value:.2f}") for x, y, value in found]
    x, y = place(chosen.batch, gains[chosen.batch])
    marks += [Line(x, GAIN_TOP, x, GAIN_BOTTOM, "pick", 1, True), Dot(x, y, "square", VERIFY, 7)]
    return [*marks, Words(x + 9, y - 18, f"{gains[chosen.batch]:.2f}×", 12)]
