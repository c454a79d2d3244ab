"""The environment card: what computes here (a GPU, torch on a CPU, interpreted kernels) or what was recorded where.

It draws plain facts: those of `minivllm.lab.environment` for a live engine, the header for a Trace. One of four ways
holds; of the others it says what they would take. Below it, the pool, cut into requests of the longest length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.course.calculators import decimal_and_binary, max_concurrency
from minivllm.course.calculators.units import plain
from minivllm.errors import MiniVLLMError
from minivllm.views.block_map_picture import provenance
from minivllm.views.sketch import (
    WIDTH_PX,
    Box,
    Choice,
    Control,
    Line,
    Mark,
    SketchPicture,
    Words,
    ink_for,
    with_control,
)
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.theme import FAINT, OWNER_COLOURS, clipped

Facts = Mapping[str, object]
GPU, CPU = "live on a GPU", "torch on the CPU"  # the words of exercise 00.4
INTERPRETER, REPLAY = "Triton kernel, interpreted on the CPU", "replay of a recorded run"
COLOURS = {GPU: OWNER_COLOURS[2], CPU: OWNER_COLOURS[0], INTERPRETER: OWNER_COLOURS[3], REPLAY: OWNER_COLOURS[1]}
SHORT = {GPU: "GPU", CPU: "CPU, torch", INTERPRETER: "CPU, Triton interpreter", REPLAY: "replay"}
DOES = {
    GPU: "our kernels, compiled", CPU: "torch's own functions", INTERPRETER: "our kernels, exact, very slow",
    REPLAY: "draws recorded events",
}  # fmt: skip
TILE_PX, POOL_Y, FACTS_Y = 180.0, 96.0, 178.0
SHOWN = ("model", "dtype", "device", "gpu", "attention", "machine", "threads", "torch", "commit", "seed")


@dataclass(frozen=True)
class CardControls:
    """Which environment is shown, and in which units."""

    card: str
    unit: str = "decimal"


class Pool(NamedTuple):
    """The pool of an engine: its bytes, the tokens that requests can own, and how many of the longest fit."""

    num_bytes: int
    usable_tokens: int
    longest: int
    concurrency: float
    lines: tuple[str, ...]


class CardPicture(SketchPicture):
    mode: str
    card: str
    pool: Pool | None


class EnvironmentCard(SketchView):
    """`EnvironmentCard({"this engine": environment(llm), "a recorded run": trace.header})`; controls: card, unit."""

    def __init__(self, cards: Mapping[str, Facts], **chosen: str) -> None:
        if not cards:
            raise MiniVLLMError("EnvironmentCard needs at least one set of facts: environment(llm), or trace.header")
        self._cards = {name: dict(facts) for name, facts in cards.items()}
        self._controls = CardControls(next(iter(self._cards)))
        super().__init__()
        self.choose(chosen)

    @property
    def facts(self) -> dict[str, object]:
        """What exercise 00.4 asks about the card that is shown: its mode and its words."""
        shown = self._cards[self._controls.card]
        return {"mode": mode_of(shown), "card": words_of(shown)}

    def drawn(self) -> CardPicture:
        return draw(self._cards, self._controls)

    def _moved(self, control: str, value: object) -> None:
        self._controls = with_control(self._controls, controls(self._cards, self._controls), control, value)


def mode_of(facts: Facts) -> str:
    """Which of the four ways holds."""
    if facts.get("live") != "live":
        return REPLAY
    if "TRITON_INTERPRET" in str(facts.get("attention", "")):
        return INTERPRETER
    return GPU if str(facts.get("device", "")).startswith("cuda") else CPU


def words_of(facts: Facts) -> str:
    """The card in one line: device, live or recorded, and what attends."""
    device = facts.get("device", "unknown")
    if mode_of(facts) == REPLAY:
        return f"device: {device}; live: recorded; events only, no tensors behind them"
    return f"device: {device}; live: live; attention: {facts.get('attention', 'torch')}"


def pool_of(facts: Facts) -> Pool | None:
    """The pool behind the facts; None where they hold none, and for layers in groups whose tables differ."""
    names = ("num_blocks", "block_size", "kv_bytes_per_token", "max_model_len")
    sizes = [facts.get(name) for name in names]
    if not all(isinstance(size, int) for size in sizes) or list(_windows(facts)) != [None]:
        return None
    blocks, size, per_token, longest = (int(str(found)) for found in sizes)
    usable = (blocks - 1) * size
    worked = max_concurrency(usable, longest)
    num_bytes = blocks * size * per_token
    lines = (
        f"pool = {blocks:,} blocks × {size} tokens × {per_token:,} B = {num_bytes:,} B",
        f"tokens = ({blocks:,} − 1) blocks × {size} = {usable:,} (block 0 is nobody's: it pads block tables)",
        *worked.derivation,
    )
    return Pool(num_bytes, usable, longest, float(worked), lines)


def draw(cards: Mapping[str, Facts], chosen: CardControls) -> CardPicture:
    """Four tiles, one of them filled; the pool; the facts."""
    facts = cards[chosen.card]
    mode, pool = mode_of(facts), pool_of(facts)
    rows, title = _rows(facts), _title(facts, pool, chosen)
    return {
        "view": "environment-card", "title": title, "aria": f"Environment card. {title}",
        "text": _text(title, facts, rows, pool), "status": "", "width": WIDTH_PX,
        "height": FACTS_Y + 17 * -(-len(rows) // 2) + 6, "marks": [*_tiles(facts, mode), *_pool_marks(pool, chosen),
        *_fact_marks(rows)], "controls": controls(cards, chosen), "steps": None, "legend": [],
        "lines": list(pool.lines) if pool else [], "lines_name": "the pool", "provenance": provenance(facts),
        "mode": mode, "card": words_of(facts), "pool": pool,
    }  # fmt: skip


def controls(cards: Mapping[str, Facts], chosen: CardControls) -> list[Control]:
    return [
        Choice("card", "card of", [(name, name) for name in cards], chosen.card),
        Choice("unit", "units", [("decimal", "GB (1000³)"), ("binary", "GiB (1024³)")], chosen.unit),
    ]


def missing(mode: str, facts: Facts) -> str:
    """What another way would take, as far as the facts say; "" where nothing is known of it."""
    if mode == REPLAY:
        return "Trace.load(path)"
    if "gpu" not in facts or facts.get("live") != "live":  # the facts of another machine say nothing of this one
        return ""
    if mode == GPU:
        return "not here: no CUDA GPU" if not facts["gpu"] else "not chosen"
    if mode == INTERPRETER:
        return "not here: no triton" if not facts.get("triton") else "needs TRITON_INTERPRET=1"
    return "LLM(device='cpu')"


def _windows(facts: Facts) -> list[object]:
    """Of each group of layers; a saved header has a list, a live one a tuple."""
    found = facts.get("group_windows", (None,))
    return list(found) if isinstance(found, list | tuple) else [found]


def _title(facts: Facts, pool: Pool | None, chosen: CardControls) -> str:
    verb = "computed" if mode_of(facts) == REPLAY else "computes"
    where = {
        GPU: f"A GPU {verb} here", CPU: f"The CPU {verb} here, with torch",
        INTERPRETER: f"Triton's interpreter {verb} here, on the CPU",
        REPLAY: f"Nothing is computed here: this run was recorded on {_recorder(facts)}",
    }[mode_of(facts)]  # fmt: skip
    if pool is None:
        return f"{where}."
    size = f"{_sized(pool.num_bytes, chosen.unit)} of K and V hold {pool.usable_tokens:,} tokens"
    return f"{where}; {size}: {plain(pool.concurrency)} requests of {pool.longest:,}."


def _recorder(facts: Facts) -> str:
    device = str(facts.get("device", "an unknown device"))
    return f"{device}, {facts['gpu']}" if facts.get("gpu") and device.startswith("cuda") else device


def _sized(num_bytes: int, unit: str) -> str:
    decimal, binary = decimal_and_binary(num_bytes).split(" = ")
    return binary if unit == "binary" else decimal


def _rows(facts: Facts) -> list[tuple[str, str]]:
    """The facts that are known, in a fixed order."""
    return [(name, clipped(str(facts[name]), 48)) for name in SHOWN if facts.get(name) not in (None, "")]


def _text(title: str, facts: Facts, rows: list[tuple[str, str]], pool: Pool | None) -> str:
    ways = [
        [SHORT[mode], "here" if mode == mode_of(facts) else missing(mode, facts) or "unknown"] for mode in COLOURS
    ]  # fmt: skip
    listed = [f"{name}: {value}" for name, value in rows]
    return "\n".join([title, *text_table(ways), words_of(facts), *listed, *(pool.lines if pool else ())])


def _tiles(facts: Facts, mode: str) -> list[Mark]:
    marks: list[Mark] = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        x, is_here = i * TILE_PX, name == mode
        fill, pattern = (colour, "solid") if is_here else (FAINT, "outline")
        ink = ink_for(fill, pattern) if is_here else "soft"
        note = "here" if is_here else missing(name, facts)
        marks += [
            Box(x + 4, 4, TILE_PX - 8, 66, fill, pattern, "ink" if is_here else "", name),
            Words(x + TILE_PX / 2, 11, SHORT[name], 13, ink, "middle"),
            Words(x + TILE_PX / 2, 30, DOES[name], 11, ink, "middle"),
            Words(x + TILE_PX / 2, 48, note, 11, ink, "middle"),
        ]
    return marks


def _pool_marks(pool: Pool | None, chosen: CardControls) -> list[Mark]:
    """The pool from left to right: one box for each longest request that fits, hatched what is left over."""
    if pool is None:
        return [Words(4, POOL_Y, "No pool is drawn: these facts name none that all layers share.", 11, "soft")]
    whole, end = int(pool.concurrency), WIDTH_PX - 4.0
    scale = (end - 4) / max(pool.concurrency, 1e-9)
    marks: list[Mark] = [Words(4, POOL_Y - 16, f"The pool: {_sized(pool.num_bytes, chosen.unit)} of K and V", 12)]
    for i in range(min(whole, 64)):
        x = 4 + i * scale if whole <= 64 else 4 + i * (end - 4) / 64
        width = scale if whole <= 64 else (end - 4) / 64
        marks.append(Box(x, POOL_Y + 4, max(width - 2, 1), 26, OWNER_COLOURS[4], "solid", "", f"request {i + 1}"))
        if width > 110:
            marks.append(Words(x + 6, POOL_Y + 9, f"{pool.longest:,} tokens", 11, ink_for(OWNER_COLOURS[4], "solid")))
    left = 4 + whole * scale
    if whole <= 64 and end - left > 1:
        marks.append(Box(left, POOL_Y + 4, end - left, 26, FAINT, "hatch", "", "less than one longest request"))
    said = f"{pool.usable_tokens:,} tokens = {plain(pool.concurrency)} requests of the longest, {pool.longest:,} tokens"
    return [*marks, Words(4, POOL_Y + 36, said, 11), Line(4, FACTS_Y - 14, end, FACTS_Y - 14, "line", 0.5)]


def _fact_marks(rows: list[tuple[str, str]]) -> list[Mark]:
    """In two columns."""
    marks: list[Mark] = []
    half = -(-len(rows) // 2)
    for i, (name, value) in enumerate(rows):
        x, y = 80 + WIDTH_PX / 2 * (i // half), FACTS_Y + 17 * (i % half)
        marks += [Words(x, y, name, 11, "soft", "end"), Words(x + 12, y, value, 11)]
    return marks
