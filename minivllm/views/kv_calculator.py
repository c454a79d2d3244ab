"""W4, the KV calculator: bytes of K and V per token under four kinds of attention, and what a card then holds.

Pick a model, or move its sizes: layers, query heads, KV heads, head size, latent and rotary key. Nothing but the
calculators is computed here; their lines are shown below the picture.
"""

from dataclasses import replace

from minivllm.course.calculators import (
    AttentionShape,
    Layer,
    Worked,
    accelerator,
    attention_shape,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    pool_bytes,
    state_bytes,
    weight_bytes,
)
from minivllm.errors import ConfigError
from minivllm.views.kv_calculator_picture import PUBLISHED, KVControls, KVPicture, Result, picture_of
from minivllm.views.sketch import accepted
from minivllm.views.sketch_view import SketchView

SHAPE = ("layers", "heads", "kv_heads", "head_size", "latent", "rope")  # controls that make the model another one
UTILISATION = 0.9  # of the card's memory, as servers take it
LONGEST = 2**40  # tokens: longer contexts are "never"


class KVCalculator(SketchView):
    """`KVCalculator(model="deepseek-v3", dtype="fp8", unit="binary")`."""

    def __init__(self, **chosen: int | str) -> None:
        self._controls = KVControls().of_model(KVControls.model)
        super().__init__()
        self.choose(chosen)

    def drawn(self) -> KVPicture:
        return draw(self._controls)

    def _moved(self, control: str, value: object) -> None:
        known = accepted(self.drawn()["controls"], control, value)
        if control == "model":
            self._controls = self._controls.of_model(str(known))
            return
        before = self._controls
        if control in SHAPE and before.attention == PUBLISHED:
            before = replace(before, attention=kind_of(before))
        changed: dict[str, int | float | str] = {control: known}
        chosen = replace(before, **changed)  # type: ignore[arg-type]  # one of the control's own values
        shared = [n for n in range(1, chosen.heads + 1) if chosen.heads % n == 0 and n <= chosen.kv_heads]
        self._controls = replace(chosen, kv_heads=shared[-1])  # query heads share KV heads evenly


def draw(chosen: KVControls) -> KVPicture:
    """Bars, memory of the card, and the lines that lead to them."""
    return picture_of(chosen, results(chosen))


def kind_of(chosen: KVControls) -> str:
    """MHA, GQA, MQA or MLA: what the chosen attention is."""
    return attention_shape(chosen.model).kind if chosen.attention == PUBLISHED else chosen.attention


def shapes(chosen: KVControls) -> dict[str, AttentionShape]:
    """The model as published, and its sizes under each kind of attention."""
    size, heads = chosen.head_size, chosen.heads
    layers = {
        "MHA": Layer("full", heads, heads, size, size),
        "GQA": Layer("full", heads, chosen.kv_heads, size, size),
        "MQA": Layer("full", heads, 1, size, size),
        "MLA": Layer("full", heads, heads, size + chosen.rope, size, None, chosen.latent, chosen.rope),
    }
    made = {name: AttentionShape((layer,) * chosen.layers) for name, layer in layers.items()}
    return {PUBLISHED: attention_shape(chosen.model), **made}


def results(chosen: KVControls) -> Result:
    """All numbers of the picture, by the calculators."""
    per_token = {name: kv_bytes_per_token(shape, chosen.dtype) for name, shape in shapes(chosen).items()}
    shape, card = shapes(chosen)[chosen.attention], accelerator(chosen.chip)
    weights = weight_bytes(chosen.model, chosen.weights)
    each = kv_bytes_of_sequence(shape, chosen.context, chosen.dtype)
    state = state_bytes(shape, chosen.dtype)
    each = each + state if int(state) else each
    try:
        pool: Worked | None = pool_bytes(card.memory_bytes, weights, UTILISATION)
    except ConfigError:
        pool = None
    return Result(
        per_token=per_token, weights=weights, sequence=each, card_bytes=card.memory_bytes, pool=pool,
        num_fitting=int(pool) // int(each) if pool is not None else 0,
        passing_context=passing_context(shape, int(weights), chosen), utilisation=UTILISATION,
    )  # fmt: skip


def passing_context(shape: AttentionShape, num_weight_bytes: int, chosen: KVControls) -> int | None:
    """Longest context at which K and V of the batch take no more than the weights; None where windows keep it so."""

    def passes(context: int) -> bool:
        return chosen.batch * int(kv_bytes_of_sequence(shape, context, chosen.dtype)) > num_weight_bytes

    low, high = 0, 1
    while not passes(high):
        low, high = high, 2 * high
        if high > LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return low
