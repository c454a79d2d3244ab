"""The picture of the KV calculator: a bar for each kind of attention, the card's memory, the derivation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from minivllm.course.calculators import Worked, attention_shape, decimal_and_binary
from minivllm.views.sketch import WIDTH_PX, Box, Choice, Control, Key, Line, Mark, SketchPicture, Slider, Value, Words
from minivllm.views.sketch import table as text_table
from minivllm.views.step_work import (
    BATCHES,
    CONTEXTS,
    KV_DTYPES,
    WEIGHT_DTYPES,
    as_words,
    chip_options,
    model_options,
)
from minivllm.views.theme import FAINT, OWNER_COLOURS, counted, ink_on

LEFT, BAR_PX, ROW_PX = 150.0, 330.0, 30.0
PUBLISHED = "as published"
COLOURS = {
    PUBLISHED: OWNER_COLOURS[5], "MHA": OWNER_COLOURS[0], "GQA": OWNER_COLOURS[1], "MQA": OWNER_COLOURS[2],
    "MLA": OWNER_COLOURS[3],
}  # fmt: skip


@dataclass(frozen=True)
class KVControls:
    """What the reader chose. The six sizes describe `attention`, unless that is "as published"."""

    model: str = "llama-3-8b"
    attention: str = PUBLISHED
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    latent: int = 512
    rope: int = 64
    dtype: str = "bf16"
    weights: str = "bf16"
    context: int = 4096
    batch: int = 1
    chip: str = "h100-sxm"
    unit: str = "decimal"

    def of_model(self, name: str) -> "KVControls":
        """The sizes of a public model; a latent that it lacks stays as it was."""
        layer = attention_shape(name).first
        latent, rope = (layer.latent_size, layer.rope_size) if layer.latent_size else (self.latent, self.rope)
        head_size = layer.key_size - layer.rope_size
        return replace(
            self, model=name, attention=PUBLISHED, layers=attention_shape(name).num_keeping, heads=layer.num_heads,
            kv_heads=layer.num_kv_heads, head_size=head_size, latent=latent, rope=rope,
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What the calculators say."""

    per_token: Mapping[str, Worked]  # by kind of attention
    weights: Worked
    sequence: Worked  # bytes of one sequence
    card_bytes: int
    pool: Worked | None  # None: the weights alone do not fit
    num_fitting: int
    passing_context: int | None
    utilisation: float


class KVPicture(SketchPicture):
    bytes_per_token: dict[str, int]
    sequence_bytes: int
    num_fitting: int
    passing_context: int | None


def picture_of(chosen: KVControls, result: Result) -> KVPicture:
    """Everything the browser draws."""
    title = _title(chosen, result)
    bars = _bars(chosen, result)
    memory_top = 34 + len(result.per_token) * ROW_PX + 16
    return {
        "view": "kv-calculator", "title": title, "aria": f"KV calculator. {title}",
        "text": _text(title, chosen, result), "status": "", "width": WIDTH_PX, "height": memory_top + 84,
        "marks": [*bars, *_memory(chosen, result, memory_top)], "controls": _controls(chosen), "steps": None,
        "legend": [Key(OWNER_COLOURS[4], "solid", "weights"), Key(COLOURS[chosen.attention], "solid", "K and V"),
                   Key(FAINT, "hatch", "free for more sequences"), Key(FAINT, "outline", "kept out of the pool")],
        "lines": _lines(chosen, result), "lines_name": "derivation", "provenance": "",
        "bytes_per_token": {name: int(worked) for name, worked in result.per_token.items()},
        "sequence_bytes": int(result.sequence), "num_fitting": result.num_fitting,
        "passing_context": result.passing_context,
    }  # fmt: skip


def in_unit(num_bytes: int, unit: str) -> str:
    """in_unit(131_072, "binary") == "128 KiB"; in_unit(131_072, "decimal") == "131 kB"."""
    decimal, binary = decimal_and_binary(num_bytes).split(" = ")
    return binary if unit == "binary" else decimal


def _controls(chosen: KVControls) -> list[Control]:
    def sizes(name: str, label: str, values: list[int]) -> Slider:
        value = int(getattr(chosen, name))
        known: list[Value] = [*sorted({*values, value})]
        return Slider(name, label, known, value, f"{value:,}")

    shared = [n for n in range(1, chosen.heads + 1) if chosen.heads % n == 0]
    return [
        Choice("model", "model", model_options(), chosen.model),
        Choice("attention", "attention", as_words(list(COLOURS)), chosen.attention),
        Choice("dtype", "K and V in", as_words(KV_DTYPES), chosen.dtype),
        Choice("weights", "weights in", as_words(WEIGHT_DTYPES), chosen.weights),
        Choice("chip", "card", chip_options(), chosen.chip),
        Choice("unit", "units", [("decimal", "GB (1000³)"), ("binary", "GiB (1024³)")], chosen.unit),
        sizes("layers", "layers L", list(range(1, 129))),
        sizes("heads", "query heads", [1, 2, 4, 6, 8, 9, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128]),
        sizes("kv_heads", "KV heads", shared),
        sizes("head_size", "head size", [32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512]),
        sizes("latent", "latent d_c", [64, 128, 256, 384, 512, 768, 1024]),
        sizes("rope", "rotary key d_rope", [0, 16, 32, 64, 128]),
        Slider("context", "context", [*CONTEXTS], chosen.context, counted(chosen.context, "token")),
        Slider("batch", "batch", [*BATCHES], chosen.batch, counted(chosen.batch, "sequence")),
    ]


def _title(chosen: KVControls, result: Result) -> str:
    each, name = result.per_token[chosen.attention], chosen.model
    if chosen.attention != PUBLISHED:
        name += f" with {chosen.attention}"
    start = f"One token of {name} takes {in_unit(int(each), chosen.unit)} of K and V in {chosen.dtype}; "
    if result.pool is None:
        return f"{start}{chosen.chip} cannot hold the weights, {in_unit(int(result.weights), chosen.unit)}."
    held = counted(result.num_fitting, "sequence")
    return f"{start}beside the weights {chosen.chip} holds {held} of {counted(chosen.context, 'token')}."


def _passing(chosen: KVControls, result: Result) -> str:
    who = counted(chosen.batch, "sequence")
    if result.passing_context is None:
        return f"K and V of {who} stay below the weights, however long the context."
    return f"K and V of {who} pass the weights at a context of {counted(result.passing_context, 'token')}."


def _text(title: str, chosen: KVControls, result: Result) -> str:
    rows = [["attention", "bytes per token", "", "of MHA"]]
    most = int(result.per_token["MHA"])
    for name, worked in result.per_token.items():
        size = in_unit(int(worked), chosen.unit)
        rows.append([name, f"{int(worked):,}", size, f"{100 * int(worked) / most:.3g}%"])
    weights = f"weights: {in_unit(int(result.weights), chosen.unit)}; one sequence: "
    weights += f"{in_unit(int(result.sequence), chosen.unit)} of K and V"
    return "\n".join([title, *text_table(rows), weights, _passing(chosen, result)])


def _lines(chosen: KVControls, result: Result) -> list[str]:
    lines = [*result.per_token[chosen.attention].derivation, *result.sequence.derivation, *result.weights.derivation]
    if result.pool is not None:
        lines += [result.pool.derivation[-1]]
        lines += [f"sequences = ⌊{int(result.pool):,} / {int(result.sequence):,}⌋ = {result.num_fitting:,}"]
    return [*dict.fromkeys(lines), _passing(chosen, result)]


def _bars(chosen: KVControls, result: Result) -> list[Mark]:
    longest = max(int(worked) for worked in result.per_token.values())
    marks: list[Mark] = [Words(4, 6, "K and V of one token", 12), Line(LEFT, 28, LEFT, 32 + 5 * ROW_PX, "soft")]
    for i, (name, worked) in enumerate(result.per_token.items()):
        y, width = 32 + i * ROW_PX, max(1.0, BAR_PX * int(worked) / longest)
        is_chosen = name == chosen.attention
        size = in_unit(int(worked), chosen.unit)
        marks += [
            Words(LEFT - 8, y + 4, name, 12, "ink" if is_chosen else "soft", "end"),
            Box(LEFT, y, width, ROW_PX - 8, COLOURS[name], "solid", "ink" if is_chosen else "",
                f"{name}: {int(worked):,} bytes per token", ("attention", name)),
            Words(LEFT + width + 8, y + 4, f"{size} ({int(worked):,} B)", 11),
        ]  # fmt: skip
    return marks


def _memory(chosen: KVControls, result: Result, top: float) -> list[Mark]:
    """The card from left to right: weights, K and V of the batch, room for more, what the pool leaves alone."""
    scale = (WIDTH_PX - 8) / result.card_bytes
    weights, batch = int(result.weights), chosen.batch * int(result.sequence)
    usable = result.card_bytes * result.utilisation
    marks: list[Mark] = [Words(4, top, f"Memory of {chosen.chip}: {in_unit(result.card_bytes, chosen.unit)}", 12)]
    y, height, end = top + 20, 28.0, WIDTH_PX - 4.0
    marks.append(Box(4, y, min(weights * scale, end - 4), height, OWNER_COLOURS[4], "solid", "",
                     f"weights: {in_unit(weights, chosen.unit)}"))  # fmt: skip
    marks.append(Words(8, y + 7, f"weights {in_unit(weights, chosen.unit)}", 11, ink_on(OWNER_COLOURS[4])))
    start, stop = 4 + weights * scale, 4 + usable * scale
    if start < stop:
        filled = min(batch * scale, stop - start)
        marks.append(Box(start, y, filled, height, COLOURS[chosen.attention], "solid", "",
                         f"K and V: {in_unit(batch, chosen.unit)}"))  # fmt: skip
        marks.append(Box(start + filled, y, stop - start - filled, height, FAINT, "hatch"))
    marks.append(Box(max(stop, 4 + weights * scale), y, max(end - max(stop, start), 0), height, FAINT, "outline"))
    held = f"K and V of {counted(chosen.batch, 'sequence')} of {chosen.context:,}: {in_unit(batch, chosen.unit)}"
    fits = "" if weights + batch <= usable else ", which does not fit"
    return [*marks, Words(4, y + height + 8, f"{held}{fits}.", 11)]
