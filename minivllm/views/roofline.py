"""W3, the roofline: what a chip can do at most, and where prefill, decode and attention of a model stand under it.

Under the slope a kernel waits for bytes, under the flat part for arithmetic (Williams et al., CACM 2009). Batching
moves the matrix products of decode to the right; it leaves attention where it is, for each sequence reads its own K, V.
"""

from dataclasses import dataclass, replace
from math import log10
from typing import TypedDict

from minivllm.course.calculators import accelerator, compute_ms, critical_batch, read_ms, ridge_point
from minivllm.course.calculators.units import plain, shown
from minivllm.course.step_work import Work, counted_model
from minivllm.views.sketch import WIDTH_PX, Choice, Control, Dot, Line, Mark, SketchPicture, Slider, Words, with_control
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.step_work import (
    BATCHES,
    CONTEXTS,
    KV_DTYPES,
    WEIGHT_DTYPES,
    as_words,
    chip_options,
    compute_dtype,
    model_options,
    ms,
)
from minivllm.views.theme import OWNER_COLOURS, counted

LEFT, RIGHT, TOP, BOTTOM = 70.0, WIDTH_PX - 26.0, 24.0, 330.0  # the plot, in pixels
INTENSITIES = (0.1, 1e5)  # FLOP/byte
STYLES = {
    "prefill products": ("square", OWNER_COLOURS[0]),
    "decode products": ("circle", OWNER_COLOURS[1]),
    "decode attention": ("diamond", OWNER_COLOURS[2]),
}


@dataclass(frozen=True)
class RooflineControls:
    """What the reader chose; `compute` is the type that the chip multiplies in."""

    chip: str = "h100-sxm"
    model: str = "llama-3-8b"
    batch: int = 32
    context: int = 4096
    weights: str = "bf16"
    kv: str = "bf16"
    compute: str = "bf16"


class Point(TypedDict):
    """One kind of work on the chip: the least time it takes, and what it waits for."""

    name: str
    intensity: float  # FLOP/byte
    flops: int
    num_bytes: int
    attainable: float  # FLOP/s
    floor_ms: float
    bound: str  # compute or bandwidth


class RooflinePicture(SketchPicture):
    points: list[Point]
    ridge: float
    critical_batch: float


class Roofline(SketchView):
    """`Roofline(model="llama-3-8b", chip="h100-sxm", batch=32)`."""

    def __init__(self, **chosen: int | str) -> None:
        self._controls = RooflineControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> RooflinePicture:
        return draw(self._controls)

    def _moved(self, control: str, value: object) -> None:
        chosen = with_control(self._controls, controls(self._controls), control, value)
        self._controls = replace(chosen, compute=compute_dtype(chosen.chip, chosen.compute))


def draw(chosen: RooflineControls) -> RooflinePicture:
    """The chip's roofs and three points, with the numbers they stand for."""
    ridge = float(ridge_point(chosen.chip, chosen.compute))
    limit = float(critical_batch(chosen.chip, chosen.weights, chosen.compute))
    points = [_point(name, work, chosen) for name, work in works(chosen).items()]
    title = _title(chosen, points, ridge)
    return {
        "view": "roofline", "title": title, "aria": f"Roofline. {title}", "text": _text(title, chosen, points),
        "status": "", "width": WIDTH_PX, "height": BOTTOM + 44, "marks": [*_axes(chosen), *_roofs(chosen, ridge),
        *(mark for point in points for mark in _point_marks(point, chosen))], "controls": controls(chosen),
        "steps": None, "legend": [], "lines": _lines(chosen), "lines_name": "how it was found", "provenance":
        f"{accelerator(chosen.chip).source}: what the data sheet promises, not measured", "points": points,
        "ridge": ridge, "critical_batch": limit,
    }  # fmt: skip


def works(chosen: RooflineControls) -> dict[str, Work]:
    """Prefill of one prompt of `context` tokens; one decode step of `batch` sequences of that length."""
    model = counted_model(chosen.model)
    return {
        "prefill products": model.products(chosen.context, chosen.weights),
        "decode products": model.products(chosen.batch, chosen.weights),
        "decode attention": model.decode_attention(chosen.batch, chosen.context, chosen.kv),
    }


def controls(chosen: RooflineControls) -> list[Control]:
    rates = as_words(list(accelerator(chosen.chip).flops))
    return [
        Choice("model", "model", model_options(), chosen.model),
        Choice("chip", "chip", chip_options(), chosen.chip),
        Slider("batch", "batch B", [*BATCHES], chosen.batch, counted(chosen.batch, "sequence")),
        Slider("context", "context T", [*CONTEXTS], chosen.context, counted(chosen.context, "token")),
        Choice("weights", "weights in", as_words(WEIGHT_DTYPES), chosen.weights),
        Choice("kv", "K and V in", as_words(KV_DTYPES), chosen.kv),
        Choice("compute", "multiply in", rates, chosen.compute),
    ]


def _point(name: str, work: Work, chosen: RooflineControls) -> Point:
    reading = float(read_ms(work.num_bytes, chosen.chip))
    computing = float(compute_ms(work.flops, chosen.chip, dtype=chosen.compute))
    floor = max(reading, computing)
    return {
        "name": name, "intensity": work.intensity, "flops": work.flops, "num_bytes": work.num_bytes,
        "attainable": work.flops / (floor / 1e3), "floor_ms": floor,
        "bound": "compute" if computing >= reading else "bandwidth",
    }  # fmt: skip


def _title(chosen: RooflineControls, points: list[Point], ridge: float) -> str:
    _, decode, attention = points
    waits = "is bound by compute" if decode["bound"] == "compute" else "waits for bytes"
    return (
        f"On {chosen.chip}, decode of {chosen.model} at batch {chosen.batch} {waits}: its matrix products do"
        f" {plain(round(decode['intensity'], 1))} FLOPs for each byte and the ridge is at {plain(round(ridge))};"
        f" attention does {plain(round(attention['intensity'], 1))}, whatever the batch."
    )


def _text(title: str, chosen: RooflineControls, points: list[Point]) -> str:
    facts = f"batch {chosen.batch}, context {chosen.context:,}, weights {chosen.weights}, K and V {chosen.kv}"
    rows = [["", "FLOP/byte", "FLOP/s at most", "bound by", "floor"]]
    rows += [
        [p["name"], plain(p["intensity"]), shown(p["attainable"], "FLOP/s"), p["bound"], ms(p["floor_ms"])]
        for p in points
    ]
    return "\n".join([title, facts, *text_table(rows)])


def _lines(chosen: RooflineControls) -> list[str]:
    limit = critical_batch(chosen.chip, chosen.weights, chosen.compute)
    done, read = f"{chosen.compute} FLOP/s", "weights once a step; activations, small beside them, left out"
    return [*limit.derivation, f"roof = min({done}, intensity × bytes/s); products read the {read}"]


def _x(intensity: float) -> float:
    low, high = (log10(edge) for edge in INTENSITIES)
    share = (log10(intensity) - low) / (high - low)
    return LEFT + min(max(share, 0), 1) * (RIGHT - LEFT)


def _rates(chosen: RooflineControls) -> tuple[float, float]:
    """Lowest and highest FLOP/s of the plot, whole decades."""
    card = accelerator(chosen.chip)
    return 10 ** int(log10(card.bandwidth * INTENSITIES[0])), 10 ** -(-log10(1.2 * max(card.flops.values())) // 1)


def _y(rate: float, chosen: RooflineControls) -> float:
    low, high = (log10(edge) for edge in _rates(chosen))
    return BOTTOM - min(max((log10(rate) - low) / (high - low), 0), 1) * (BOTTOM - TOP)


def _axes(chosen: RooflineControls) -> list[Mark]:
    marks: list[Mark] = [Line(LEFT, BOTTOM, RIGHT, BOTTOM, "soft"), Line(LEFT, TOP, LEFT, BOTTOM, "soft")]
    for power in range(-1, 6):
        x = _x(10.0**power)
        marks += [Line(x, TOP, x, BOTTOM, "line", 0.3), Words(x, BOTTOM + 5, plain(10.0**power), 10, "soft", "middle")]
    low, high = (round(log10(edge)) for edge in _rates(chosen))
    for power in range(low, high + 1):
        y = _y(10.0**power, chosen)
        marks += [Line(LEFT, y, RIGHT, y, "line", 0.3)]
        marks += [Words(LEFT - 5, y - 6, _rate_words(power), 10, "soft", "end")]
    marks += [Words((LEFT + RIGHT) / 2, BOTTOM + 22, "intensity: FLOPs for each byte read", 11, "ink", "middle")]
    return [*marks, Words(LEFT - 64, 4, "FLOP/s at most", 11)]


def _rate_words(power: int) -> str:
    """_rate_words(13) == "10 T"."""
    scale = power // 3
    return f"{10 ** (power % 3)} {'KMGTPE'[scale - 1]}"


def _roofs(chosen: RooflineControls, ridge: float) -> list[Mark]:
    card = accelerator(chosen.chip)
    marks: list[Mark] = []
    for dtype, rate in card.flops.items():
        is_chosen, corner = dtype == chosen.compute, rate / card.bandwidth
        ink, thickness = ("ink", 2.0) if is_chosen else ("soft", 1.0)
        y, x = _y(rate, chosen), _x(corner)
        marks.append(Line(x, y, RIGHT, y, ink, thickness, not is_chosen))
        if is_chosen:
            low = max(INTENSITIES[0], _rates(chosen)[0] / card.bandwidth)
            marks.append(Line(_x(low), _y(low * card.bandwidth, chosen), x, y, ink, thickness))
            marks.append(Line(x, y, x, BOTTOM, "soft", 1, True))
            marks.append(Words(x + 4, BOTTOM - 16, f"ridge {plain(round(ridge, 1))}", 10, "soft"))
            marks.append(Words(RIGHT, y - 15, f"{dtype}: {shown(rate, 'FLOP/s')}", 11, "ink", "end"))
    slope = shown(card.bandwidth, "bytes/s")
    return [*marks, Words(_x(0.6), _y(0.6 * card.bandwidth, chosen) + 6, slope, 11)]


def _point_marks(point: Point, chosen: RooflineControls) -> list[Mark]:
    shape, colour = STYLES[point["name"]]
    x, y = _x(point["intensity"]), _y(point["attainable"], chosen)
    words = f"{point['name']}: {plain(point['intensity'])} FLOP/byte, bound by {point['bound']}"
    shift, anchor = {
        "prefill products": (14.0, "start"), "decode products": (-34.0, "end"), "decode attention": (10.0, "start"),
    }[point["name"]]  # fmt: skip
    left = x - 8 if anchor == "end" else min(x + 8, RIGHT - 130)
    label = [point["name"], f"at least {ms(point['floor_ms'])}"]
    return [
        Line(x, y, x, BOTTOM, colour, 1, True),
        Dot(x, y, shape, colour, 7, words),
        *(Words(left, y + shift + 13 * i, line, 11, "ink", anchor) for i, line in enumerate(label)),
    ]
