"""The speed-up of speculation over acceptance and draft length, at one drafter's cost, with the best length marked.

Every cell is Leviathan's theorem 3.8: expected tokens of a round over its time in target steps. A round gives one token
even where every draft is wrong, so a free drafter never loses; a costly one does, and longer drafts lose more.
"""

from dataclasses import dataclass, replace

from minivllm.course.calculators import best_gamma, expected_tokens, speedup
from minivllm.errors import MiniVLLMError
from minivllm.views.sketch import (
    WIDTH_PX,
    Box,
    Control,
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
from minivllm.views.theme import OWNER_COLOURS, SELECTED, counted, ink_on

ALPHAS = tuple(round(0.05 * i, 2) for i in range(1, 20))
LENGTHS = tuple(range(1, 17))
LABELLED = (1, 4, 8, 16)
COSTS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)
LEFT, TOP, CELL_W, CELL_H = 52.0, 40.0, 40.0, 17.0
BOTTOM = TOP + CELL_H * len(ALPHAS)
LOSS = OWNER_COLOURS[5]
STEPS = ((1.0, 0.12), (1.5, 0.3), (2.0, 0.5), (3.0, 0.75), (4.0, 1.0))  # from this speed-up on: how much blue


@dataclass(frozen=True)
class SurfaceControls:
    """The chosen point; `cost` is the drafter's time for a token, in target steps."""

    alpha: float = 0.7
    num_drafts: int = 4
    cost: float = 0.05


class SurfacePicture(SketchPicture):
    values: dict[float, list[float]]  # by alpha: the speed-up at each draft length
    best: dict[float, int]  # by alpha: the best draft length; 0 where drafting only loses
    chosen: float


class SpeedupSurface(SketchView):
    """`SpeedupSurface(alpha=0.7, num_drafts=4, cost=0.05)`; a click on a cell chooses it."""

    def __init__(self, **chosen: Value) -> None:
        self._controls = SurfaceControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> SurfacePicture:
        return draw(self._controls)

    def _moved(self, control: str, value: object) -> None:
        if control == "cell":
            self._controls = _at_cell(self._controls, value)
            return
        self._controls = with_control(self._controls, controls(self._controls), control, value)


def _at_cell(chosen: SurfaceControls, value: object) -> SurfaceControls:
    """The point of a clicked cell, "0.70 4"."""
    cells = {f"{alpha:.2f} {length}": (alpha, length) for alpha in ALPHAS for length in LENGTHS}
    if not isinstance(value, str) or value not in cells:
        raise MiniVLLMError("a cell is named by its acceptance and its draft length, such as '0.70 4'")
    alpha, length = cells[value]
    return replace(chosen, alpha=alpha, num_drafts=length)


def controls(chosen: SurfaceControls) -> list[Control]:
    cost = f"{chosen.cost:g} target steps a token"
    return [
        Slider("alpha", "acceptance (alpha)", [*ALPHAS], chosen.alpha, f"{chosen.alpha:.2f}"),
        Slider("num_drafts", "drafts (gamma)", [*LENGTHS], chosen.num_drafts, counted(chosen.num_drafts, "draft")),
        Slider("cost", "cost of a draft (c)", [*COSTS], chosen.cost, cost),
    ]


def best_length(alpha: float, cost: float) -> int:
    """The best draft length of those drawn: a free drafter would draft without end."""
    return min(int(best_gamma(alpha, cost)), LENGTHS[-1]) if cost else LENGTHS[-1]


def draw(chosen: SurfaceControls) -> SurfacePicture:
    """Cells, the line of the best length, and the chosen point's numbers."""
    values = {alpha: [float(speedup(alpha, length, chosen.cost)) for length in LENGTHS] for alpha in ALPHAS}
    best = {alpha: best_length(alpha, chosen.cost) for alpha in ALPHAS}
    here = values[chosen.alpha][chosen.num_drafts - 1]
    title = _title(chosen, here, best[chosen.alpha], values[chosen.alpha])
    gain = speedup(chosen.alpha, chosen.num_drafts, chosen.cost)
    lines = [*expected_tokens(chosen.alpha, chosen.num_drafts).derivation, gain.derivation[-1]]
    keys = [Key(_blue(share), "solid", f"{edge:g} times as fast, and more") for edge, share in STEPS]
    return {
        "view": "speedup-surface", "title": title, "aria": f"Speed-up of speculation. {title}",
        "text": _text(title, values, best), "status": "", "width": WIDTH_PX, "height": BOTTOM + 40,
        "marks": [*_cells(values), *_best_line(best), *_axes(chosen)], "controls": controls(chosen), "steps": None,
        "legend": [*keys, Key(LOSS, "outline", "a loss: slower than without"), Key(SELECTED, "outline", "chosen")],
        "lines": [line.replace("γ", "gamma") for line in lines], "lines_name": "how it was found",
        "provenance": "Leviathan et al., arXiv 2211.17192, theorem 3.8; every draft accepted with the same chance",
        "values": values, "best": best, "chosen": here,
    }  # fmt: skip


def _title(chosen: SurfaceControls, here: float, best: int, row: list[float]) -> str:
    point = f"At acceptance {chosen.alpha:.2f}, {counted(chosen.num_drafts, 'draft')} that cost {chosen.cost:g} each"
    verdict = f"make it {here:.2f} times as fast" if here >= 1 else f"are a loss, {here:.2f}×"
    if not best:
        return f"{point} {verdict}; every draft length loses here."
    if best == chosen.num_drafts:
        return f"{point} {verdict}, and no other length drawn here does better."
    return f"{point} {verdict}; the best is {counted(best, 'draft')}, {row[best - 1]:.2f}×."


def _text(title: str, values: dict[float, list[float]], best: dict[float, int]) -> str:
    rows = [["alpha", *(f"{length} drafts" for length in LABELLED), "best"]]
    for alpha in ALPHAS[1::2]:
        rows.append([f"{alpha:.2f}", *(f"{values[alpha][length - 1]:.2f}" for length in LABELLED), f"{best[alpha]}"])
    return "\n".join([title, *text_table(rows)])


def _blue(share: float) -> str:
    """The first colour of the theme on white, so much of it."""
    channels = [int(OWNER_COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - share * (255 - channel)):02x}" for channel in channels)


def _cells(values: dict[float, list[float]]) -> list[Mark]:
    marks: list[Mark] = []
    for alpha, row in values.items():
        y = _y(alpha)
        for length, value in zip(LENGTHS, row, strict=True):
            x, click = _x(length), ("cell", f"{alpha:.2f} {length}")
            words = f"acceptance {alpha:.2f}, {counted(length, 'draft')}: {value:.3f}×"
            is_loss = value < 1 - 1e-9
            fill = LOSS if is_loss else _blue(max(share for edge, share in STEPS if value >= edge - 1e-9))
            marks.append(Box(x, y, CELL_W - 1, CELL_H - 1, fill, "outline" if is_loss else "solid", "", words, click))
            if length in LABELLED:
                ink = "ink" if is_loss else ink_on(fill)
                marks.append(Words(x + CELL_W / 2, y + 2, f"{value:.2f}", 10, ink, "middle"))
    return marks


def _best_line(best: dict[float, int]) -> list[Mark]:
    """A frame round the best cell of each row that has one."""
    return [
        Box(_x(n) - 1, _y(alpha) - 1, CELL_W + 1, CELL_H + 1, "page", "outline", "ink", f"best at {alpha:.2f}: {n}")
        for alpha, n in best.items()
        if n
    ]


def _axes(chosen: SurfaceControls) -> list[Mark]:
    x, y = _x(chosen.num_drafts), _y(chosen.alpha)
    edges = [(x - 2, y - 2), (x + CELL_W + 1, y - 2), (x + CELL_W + 1, y + CELL_H + 1), (x - 2, y + CELL_H + 1)]
    marks: list[Mark] = [Line(*a, *b, "pick", 3) for a, b in zip(edges, [*edges[1:], edges[0]], strict=True)]
    marks += [Words(LEFT - 6, _y(alpha) + 2, f"{alpha:.2f}", 10, "soft", "end") for alpha in ALPHAS]
    marks += [Words(_x(n) + CELL_W / 2, BOTTOM + 4, f"{n}", 10, "soft", "middle") for n in LENGTHS]
    middle = LEFT + CELL_W * len(LENGTHS) / 2
    marks += [Words(middle, BOTTOM + 20, "drafts in a round (gamma)", 11, "ink", "middle")]
    return [*marks, Words(4, 4, "acceptance of a draft (alpha); framed: the best number of drafts of a row", 11)]


def _x(length: int) -> float:
    return LEFT + (length - 1) * CELL_W


def _y(alpha: float) -> float:
    """Higher acceptance is further up."""
    return BOTTOM - (ALPHAS.index(alpha) + 1) * CELL_H
