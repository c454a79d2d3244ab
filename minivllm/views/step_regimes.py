"""W6 by calculation: what a decode step of any public model waits for, at every batch size.

    floor of a step = KV read + max(weight read, matrix products)        decode_step_ms, after the scaling book
A host that launches kernels slower than they run adds the difference: the overhead regime. Bars whose weights, K and V
together take more than all of the card's memory are marked.
"""

from dataclasses import dataclass, replace

from minivllm.course.calculators import (
    accelerator,
    compute_ms,
    decode_step_ms,
    kv_bytes_of_sequence,
    num_active_parameters,
    weight_bytes,
)
from minivllm.course.calculators.units import plain
from minivllm.course.step_work import counted_model
from minivllm.views.sketch import WIDTH_PX, Choice, Control, SketchPicture, Slider, with_control
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.stacked_bars import COLUMNS, HEIGHT, PARTS, Bar, StepParts, stacked_bars
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
from minivllm.views.theme import counted

HOST_MS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)
REGIMES = {
    "weights": "reading the weights, once for all sequences: a larger batch is almost free",
    "kv": "reading K and V, once for each sequence: a larger batch costs as much as it brings",
    "arithmetic": "arithmetic: a larger batch only takes longer",
    "overhead": "the host, which launches kernels slower than they run",
}


@dataclass(frozen=True)
class RegimeControls:
    """What the reader chose; `host_ms` is the time that the host needs to launch one step, an assumption."""

    model: str = "llama-3-8b"
    chip: str = "h100-sxm"
    batch: int = 32
    context: int = 4096
    weights: str = "bf16"
    kv: str = "bf16"
    host_ms: float = 0.0


class RegimesPicture(SketchPicture):
    parts: dict[int, StepParts]  # by batch size
    needed_bytes: dict[int, int]  # weights, K and V
    card_bytes: int
    regime: str


class StepRegimes(SketchView):
    """`StepRegimes(model="llama-3-8b", batch=8, context=32_768)`."""

    def __init__(self, **chosen: float | str) -> None:
        self._controls = RegimeControls()
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> RegimesPicture:
        return draw(self._controls)

    def _moved(self, control: str, value: object) -> None:
        self._controls = with_control(self._controls, controls(self._controls), control, value)


def draw(chosen: RegimeControls) -> RegimesPicture:
    """A bar for every batch size; the chosen one is framed."""
    parts = {batch: step_parts(replace(chosen, batch=batch)) for batch in BATCHES}
    needed = {batch: needed_bytes(replace(chosen, batch=batch)) for batch in BATCHES}
    card_bytes = accelerator(chosen.chip).memory_bytes
    here, room = parts[chosen.batch], {batch: room_words(num_bytes, card_bytes) for batch, num_bytes in needed.items()}
    title = (
        f"A decode step of {chosen.model} on {chosen.chip}, batch {chosen.batch}, context {chosen.context:,}, takes at"
        f" least {ms(here.total)} and waits for {REGIMES[here.regime]}."
        + (f" But it {room[chosen.batch]}." if needed[chosen.batch] > card_bytes else "")
    )
    bars = [
        Bar(str(batch), p, f"batch {batch}: {ms(p.total)}, it waits for {PARTS[p.regime].words}; {room[batch]}",
            ("batch", batch))
        for batch, p in parts.items()
    ]  # fmt: skip
    num_fitting = sum(num_bytes <= card_bytes for num_bytes in needed.values())
    return {
        "view": "step-regimes", "title": title, "aria": f"Step cost by batch size. {title}",
        "text": _text(title, chosen, parts, needed, card_bytes), "status": "", "width": WIDTH_PX, "height": HEIGHT,
        "marks": stacked_bars(bars, BATCHES.index(chosen.batch), "batch size (sequences)", num_fitting),
        "controls": controls(chosen), "steps": None, "legend": list(PARTS.values()), "lines": _lines(chosen),
        "lines_name": "derivation", "provenance": "calculated from data sheets; nothing here was measured",
        "parts": parts, "needed_bytes": needed, "card_bytes": card_bytes, "regime": here.regime,
    }  # fmt: skip


def step_parts(chosen: RegimeControls) -> StepParts:
    """The floor's parts, and what a slow host adds."""
    work = counted_model(chosen.model).products(chosen.batch, chosen.weights)
    held = kv_bytes_of_sequence(chosen.model, chosen.context, chosen.kv)
    step = decode_step_ms(work.num_bytes, held, chosen.chip, batch_size=chosen.batch)
    computing = float(compute_ms(work.flops, chosen.chip, dtype=compute_dtype(chosen.chip, "bf16")))
    weights, kv = float(step.parts["weight_read"]), float(step.parts["kv_read"])
    arithmetic = max(computing - weights, 0.0)
    return StepParts(weights, kv, arithmetic, max(chosen.host_ms - (weights + kv + arithmetic), 0.0))


def needed_bytes(chosen: RegimeControls) -> int:
    """All weights, and K and V of the whole batch."""
    held = kv_bytes_of_sequence(chosen.model, chosen.context, chosen.kv)
    return int(weight_bytes(chosen.model, chosen.weights)) + chosen.batch * int(held)


def room_words(num_bytes: int, card_bytes: int) -> str:
    """room_words(291 * 10**9, 141 * 10**9) == "does not fit: 291 GB of 141 GB"."""
    verdict = "does not fit" if num_bytes > card_bytes else "fits"
    return f"{verdict}: {num_bytes / 1e9:,.0f} GB of {card_bytes / 1e9:,.0f} GB"


def controls(chosen: RegimeControls) -> list[Control]:
    return [
        Choice("model", "model", model_options(), chosen.model),
        Choice("chip", "chip", chip_options(), chosen.chip),
        Slider("batch", "batch", [*BATCHES], chosen.batch, counted(chosen.batch, "sequence")),
        Slider("context", "context", [*CONTEXTS], chosen.context, counted(chosen.context, "token")),
        Choice("weights", "weights in", as_words(WEIGHT_DTYPES), chosen.weights),
        Choice("kv", "K and V in", as_words(KV_DTYPES), chosen.kv),
        Slider("host_ms", "host needs (assumed)", [*HOST_MS], chosen.host_ms, f"{chosen.host_ms:g} ms"),
    ]


def _text(
    title: str, chosen: RegimeControls, parts: dict[int, StepParts], needed: dict[int, int], card_bytes: int
) -> str:
    rows = [["batch", *(f"{COLUMNS[name]} ms" for name in StepParts._fields), "step ms", "tokens/s", "memory"]]
    for batch, p in parts.items():
        rate, room = f"{1e3 * batch / p.total:,.0f}", room_words(needed[batch], card_bytes)
        rows.append([str(batch), *(f"{value:.3g}" for value in p), f"{p.total:.3g}", rate, room])
    return "\n".join([title, f"weights {chosen.weights}, K and V {chosen.kv}", *text_table(rows)])


def _lines(chosen: RegimeControls) -> list[str]:
    work = counted_model(chosen.model).products(chosen.batch, chosen.weights)
    held = kv_bytes_of_sequence(chosen.model, chosen.context, chosen.kv)
    dtype = compute_dtype(chosen.chip, "bf16")
    step = decode_step_ms(
        work.num_bytes, held, chosen.chip, batch_size=chosen.batch,
        num_parameters=num_active_parameters(chosen.model), compute_dtype=dtype,
    )  # fmt: skip
    host = (
        [f"host {plain(chosen.host_ms)} ms − floor {plain(float(step))} ms, if more than 0"] if chosen.host_ms else []
    )
    return [*held.derivation, *step.derivation[-4:], *host]
