"""The training card: one model on the same tokens, written one by one, read at once, or trained on.

Draws passes that were counted elsewhere (minivllm/lab/training_card.py): FLOPs, bytes kept, FLOPs for each byte. The
lesson is in the slider: a backward pass triples the FLOPs, but it is the number of tokens at once that carries a pass
over the ridge; decode has one, however long its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10
from typing import Protocol

from minivllm.course.calculators import ridge_point
from minivllm.course.calculators.units import decimal_and_binary, plain
from minivllm.errors import MiniVLLMError
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
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.step_work import chip_options, compute_dtype
from minivllm.views.theme import OWNER_COLOURS, counted

LEFT, RIGHT = 150.0, WIDTH_PX - 120.0
ROW_PX, BAR_PX, TOP = 94.0, 18.0, 8.0
KEYS = {
    "decode": Key(OWNER_COLOURS[2], "dots", "decoded: one new token after the others, batch 1"),
    "off": Key(OWNER_COLOURS[4], "solid", "prefilled: forward alone, all tokens at once"),
    "on": Key(OWNER_COLOURS[1], "hatch", "trained: forward and backward, all at once"),
}
STATES = {"decode": "decode", "prefill": "off", "training": "on"}  # of the passes' kinds
BAR_WORDS = {"decode": "decoded", "off": "prefilled", "on": "trained"}
HIGHEST = 1e4  # FLOP/byte, where the logarithmic bars end


class CountedPass(Protocol):
    """What the card asks of a pass; bytes moved are weights, gradients, what is kept, and K and V that are read."""

    @property
    def model(self) -> str: ...
    @property
    def kind(self) -> str: ...  # decode, prefill or training
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_stored(self) -> int: ...
    @property
    def products(self) -> int: ...
    @property
    def attention(self) -> int: ...
    @property
    def kept_bytes(self) -> int: ...
    @property
    def moved_bytes(self) -> int: ...


@dataclass(frozen=True)
class CardControls:
    tokens: int
    backward: str = "off"
    chip: str = "h100-sxm"


class CardPicture(SketchPicture):
    flops_per_token: dict[str, float]  # by "decode", "off" and "on"
    kept_per_token: dict[str, float]
    intensity: dict[str, float]  # FLOP/byte
    ridge: float


class TrainingCard(SketchView):
    """`TrainingCard(count_passes("smollm2-135m", (1, 16, 256, 2048)), backward="on")`."""

    def __init__(self, passes: Sequence[CountedPass], **chosen: int | str) -> None:
        self._passes = {(p.num_stored, STATES[p.kind]): p for p in passes}
        self._lengths = sorted({num_stored for num_stored, _ in self._passes})
        if len(self._passes) != len(KEYS) * len(self._lengths) or not passes:
            raise MiniVLLMError("the training card needs each length counted as decode, as prefill and as training")
        self._controls = CardControls(self._lengths[-1])
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> CardPicture:
        chosen = {state: self._passes[self._controls.tokens, state] for state in KEYS}
        return draw(self._controls, chosen, self._lengths)

    def _moved(self, control: str, value: object) -> None:
        self._controls = with_control(self._controls, controls(self._controls, self._lengths), control, value)


def draw(chosen: CardControls, passes: dict[str, CountedPass], lengths: Sequence[int]) -> CardPicture:
    """Three rows of three bars; the chosen pass is framed."""
    flops = {state: (p.products + p.attention) / p.num_tokens for state, p in passes.items()}
    kept = {state: p.kept_bytes / p.num_tokens for state, p in passes.items()}
    intensity = {state: (p.products + p.attention) / p.moved_bytes for state, p in passes.items()}
    ridge = float(ridge_point(chosen.chip, compute_dtype(chosen.chip, "bf16")))
    title = _title(chosen, passes, flops, kept, intensity, ridge)
    rows = (
        ("FLOPs for each token", flops, {s: v / max(flops.values()) for s, v in flops.items()}, "FLOP"),
        ("bytes kept for each token", kept, {s: v / max(kept.values()) for s, v in kept.items()}, "bytes"),
        (
            "FLOPs for each byte moved, logarithmic",
            intensity,
            {s: _share(v) for s, v in intensity.items()},
            "FLOP/byte",
        ),
    )
    marks = [mark for i, row in enumerate(rows) for mark in _row(i, *row, chosen)]
    return {
        "view": "training-card", "title": title, "aria": f"Training card. {title}",
        "text": _text(title, chosen, flops, kept, intensity), "status": "", "width": WIDTH_PX,
        "height": TOP + 3 * ROW_PX + 6, "marks": [*marks, *_ridge(ridge, chosen.chip)],
        "controls": controls(chosen, lengths), "steps": None, "legend": list(KEYS.values()),
        "lines": _lines(passes), "lines_name": "how it was counted",
        "provenance": "counted on tensors by torch's FLOP counter and autograd's hooks; nothing was timed",
        "flops_per_token": flops, "kept_per_token": kept, "intensity": intensity, "ridge": ridge,
    }  # fmt: skip


def controls(chosen: CardControls, lengths: Sequence[int]) -> list[Control]:
    states = [("decode", "off: one token decoded"), ("off", "off: all prefilled"), ("on", "on: trained")]
    return [
        Slider("tokens", "tokens of the text", [*lengths], chosen.tokens, counted(chosen.tokens, "token")),
        Choice("backward", "backward", states, chosen.backward),
        Choice("chip", "chip", chip_options(), chosen.chip),
    ]


def _title(
    chosen: CardControls, passes: dict[str, CountedPass], flops: dict[str, float], kept: dict[str, float],
    intensity: dict[str, float], ridge: float,
) -> str:  # fmt: skip
    state = chosen.backward
    tokens = counted(chosen.tokens, "token")
    what = {
        "decode": f"Decoding the last of {tokens}", "off": f"Prefilling {tokens} at once",
        "on": f"Trained on {tokens} at once",
    }[state]  # fmt: skip
    where = "above" if intensity[state] >= ridge else "below"
    return (
        f"{what}, {passes[state].model} does {_value(flops[state], 'FLOP')}"
        f" and keeps {_value(kept[state], 'bytes')} for each token; {_value(intensity[state], 'FLOP/byte')} moved is"
        f" {where} the ridge of {chosen.chip} ({plain(round(ridge))})."
    )


def _row(
    index: int, name: str, values: dict[str, float], shares: dict[str, float], unit: str, chosen: CardControls
) -> list[Mark]:
    top = TOP + index * ROW_PX
    marks: list[Mark] = [Words(4, top, name, 12)]
    for i, (state, value) in enumerate(values.items()):
        y, width = top + 20 + i * (BAR_PX + 5), max(shares[state] * (RIGHT - LEFT), 1)
        key, words = KEYS[state], _value(value, unit)
        marks.append(Words(LEFT - 6, y + 3, BAR_WORDS[state], 11, "soft", "end"))
        marks.append(
            Box(LEFT, y, width, BAR_PX, key.fill, key.pattern, "", f"{key.words}: {words}", ("backward", state))
        )
        if state == chosen.backward:
            marks.append(Box(LEFT - 2, y - 2, width + 4, BAR_PX + 4, "pick", "outline", "pick"))
        marks.append(Words(LEFT + width + 7, y + 3, words, 11))
    return marks


def _value(value: float, unit: str) -> str:
    """_value(268959744, "FLOP") == "269 MFLOP"."""
    if unit == "FLOP":
        return f"{value / 1e6:,.0f} MFLOP"
    return decimal_and_binary(value) if unit == "bytes" else f"{plain(round(value, 1))} {unit}"


def _share(intensity: float) -> float:
    """Where a bar of intensity ends, from 0.1 FLOP/byte to HIGHEST: one decade, one step."""
    return min(max((log10(intensity) + 1) / (log10(HIGHEST) + 1), 0), 1)


def _ridge(ridge: float, chip: str) -> list[Mark]:
    x, top = LEFT + _share(ridge) * (RIGHT - LEFT), TOP + 2 * ROW_PX
    return [
        Line(x, top + 14, x, top + ROW_PX - 6, "ink", 2, True),
        Words(x, top, f"ridge of {chip}: {plain(round(ridge))}", 11, "ink", "middle"),
    ]


def _text(
    title: str, chosen: CardControls, flops: dict[str, float], kept: dict[str, float], intensity: dict[str, float]
) -> str:
    rows = [["", "FLOP per token", "bytes kept per token", "FLOP/byte"]]
    for state, key in KEYS.items():
        rows.append([key.words, f"{flops[state]:,.0f}", f"{kept[state]:,.0f}", plain(round(intensity[state], 1))])
    return "\n".join([title, *text_table(rows)])


def _lines(passes: dict[str, CountedPass]) -> list[str]:
    """The closed forms beside the count."""
    served, trained = passes["off"], passes["on"]
    count, tokens = served.products / (2 * served.num_tokens), counted(served.num_tokens, "token")
    ratio = plain(trained.products / served.products)
    each = _value(served.attention / served.num_tokens, "FLOP")
    return [
        f"products: {served.products:,} FLOP = 2 × {count:,.0f} weights × {tokens}; with backward {ratio} × as many",
        f"attention: {each} for each token, each query with all {tokens}, masked ones too; with backward 3.5 × as much",
        "moved: weights + K and V of all tokens; with backward 3 × weights (2 reads, 1 gradient) + 2 × what is kept",
    ]
