"""Bytes of K and V: of one token, of a sequence behind windows, on one GPU of several, and under other attentions.

bytes per token = 2 x layers x KV heads x head size x bytes per element; query heads do not matter (Kwon et al., SOSP
2023, section 3). MLA keeps (latent + rotary key) per layer instead, once for all heads (arXiv 2405.04434, table 1).
"""

from dataclasses import replace
from itertools import groupby

from minivllm.course.calculators.attention_shape import AttentionShape, Layer, attention_shape
from minivllm.course.calculators.checks import positive, whole
from minivllm.course.calculators.model_fields import Config
from minivllm.course.calculators.units import counted, plain
from minivllm.course.calculators.worked import Amount, Amounts, Number, Worked, for_each, lines_of, unit_of, work
from minivllm.errors import ConfigError, ModelError, short

# Bits per element; the micro-scaled formats with one 8-bit scale for each block of 16 or 32 elements.
BITS = {
    "float32": 32.0, "fp32": 32.0, "bfloat16": 16.0, "bf16": 16.0, "float16": 16.0, "fp16": 16.0,
    "fp8": 8.0, "fp8_e4m3": 8.0, "fp8_e5m2": 8.0, "int8": 8.0, "int4": 4.0, "int3": 3.0, "int2": 2.0,
    "float8_e4m3fn": 8.0, "float8_e4m3fnuz": 8.0, "float8_e5m2": 8.0, "float8_e5m2fnuz": 8.0, "uint8": 8.0,
    "half": 16.0, "float": 32.0, "fp4": 4.0, "mxfp8": 8.25, "nvfp4": 4.5, "mxfp4": 4.25,
}  # fmt: skip
Dtype = str | int | float | Worked  # a name above, or bits per element, scales included: 4.5


def kv_bytes_per_token(config: Config | AttentionShape, dtype: Dtype = "bfloat16") -> Worked:
    """K and V of one token over all layers: kv_bytes_per_token("llama-3-8b") == 131_072.

    Windowed layers count in full: this is what a sequence grows by until its windows are full. `dtype` is a name, or
    bits per element: 16 and not 2 for bf16.
    """
    shape, bits = attention_shape(config), bits_of(dtype)
    merged = _merged(shape, bits)
    if not merged:
        return work("KV bytes per token", "no layer keeps K or V", 0, "bytes/token")
    if len(merged) == 1:
        return replace(merged[0], derivation=lines_of(dtype, merged[0]))
    total = sum(int(part) for part in merged)
    formula = " + ".join(plain(int(part)) for part in merged)
    return work("KV bytes per token", formula, total, "bytes/token", dtype, *merged)


def kv_bytes_of_sequence(config: Config | AttentionShape, num_tokens: Amounts, dtype: Dtype = "bfloat16") -> Worked:
    """Bytes that a sequence holds: per layer min(tokens, window) tokens. Several lengths give several results."""
    shape, bits = attention_shape(config), bits_of(dtype)

    def of_length(length: Amount) -> Worked:
        size = whole("num_tokens", length, 0)
        held = [(layer.tokens_kept(size), layer.elements_per_token) for layer in shape.layers]
        num_bytes = _in_bytes(sum(tokens * elements for tokens, elements in held), bits)
        per_token = kv_bytes_per_token(shape, dtype)
        if all(tokens == size or not elements for tokens, elements in held):
            return work(
                "KV of the sequence", f"{counted(size, 'tokens')} × {int(per_token):,} B", num_bytes, "bytes", per_token
            )
        text = " + ".join(
            f"{len(list(group))} × {kept:,} tokens × {plain(_in_bytes(elements, bits))} B"
            for (kept, elements), group in groupby(sorted(held, reverse=True))
            if elements
        )
        return work(f"KV of {size:,} tokens, layers × min(tokens, window)", text, num_bytes, "bytes")

    return for_each(num_tokens, of_length)


def state_bytes(config: Config | AttentionShape, dtype: Dtype = "bfloat16") -> Worked:
    """What linear-attention layers keep of a sequence, however long it is; 0 where there are none."""
    shape, bits = attention_shape(config), bits_of(dtype)
    states = [layer.state_elements for layer in shape.layers if layer.state_elements]
    if not states:
        return work("constant state of a sequence", "no linear layers", 0, "bytes")
    formula = f"{counted(len(states), 'linear layers')} × {states[0]:,} elements × {size_of(bits)}"
    return work("constant state of a sequence", formula, _in_bytes(sum(states), bits), "bytes")


def kv_bytes_per_token_per_gpu(
    config: Config | AttentionShape, tensor_parallel: Amount, dtype: Dtype = "bfloat16"
) -> Worked:
    """One GPU's share: KV heads are dealt out, then copied where GPUs outnumber them; an MLA latent is on every GPU."""
    shape, num_gpus = attention_shape(config), whole("tensor_parallel", tensor_parallel)
    total = kv_bytes_per_token(shape, dtype)
    if num_gpus == 1:
        return total
    layer = shape.first
    if layer.num_heads % num_gpus:
        raise ModelError(f"{layer.num_heads} query heads do not divide over {num_gpus} GPUs; choose a divisor")
    if shape.is_mla:
        return work(f"on each of {num_gpus} GPUs", "the latent serves all heads: a full copy", int(total),
                    "bytes/token", total)  # fmt: skip
    num_kv_heads = layer.num_kv_heads
    if num_kv_heads % num_gpus and num_gpus % num_kv_heads:
        raise ModelError(f"{num_kv_heads} KV heads neither divide over {num_gpus} GPUs nor repeat evenly on them")
    ways = min(num_gpus, num_kv_heads)
    formula = f"{int(total):,} / min({num_gpus} GPUs, {num_kv_heads} KV heads)"
    return work("on each GPU", formula, int(total) // ways, "bytes/token", total)


def mha_bytes_per_token(config: Config | AttentionShape, dtype: Dtype = "bfloat16") -> Worked:
    """The same model with K and V for every query head: 2,621,440 for Llama-2-70B.

    For MLA, heads of the size without rotary part, as DeepSeek-V2 compares them: 2 x heads x 128.
    """
    shape, bits = attention_shape(config), bits_of(dtype)
    layer, num_layers = shape.first, shape.num_keeping
    size = layer.key_size - layer.rope_size
    value = _in_bytes(num_layers * layer.num_heads * (size + layer.value_size), bits)
    formula = f"{num_layers} layers × {layer.num_heads} heads × ({size} + {layer.value_size}) × {size_of(bits)}"
    return work("KV bytes per token with MHA", formula, value, "bytes/token")


def mqa_bytes_per_token(config: Config | AttentionShape, dtype: Dtype = "bfloat16") -> Worked:
    """The same model with one KV head: 31,232 for DeepSeek-V3's shape, less than its MLA's 70,272."""
    shape, bits = attention_shape(config), bits_of(dtype)
    layer, num_layers = shape.first, shape.num_keeping
    size = layer.key_size - layer.rope_size
    value = _in_bytes(num_layers * (size + layer.value_size), bits)
    formula = f"{num_layers} layers × 1 head × ({size} + {layer.value_size}) × {size_of(bits)}"
    return work("KV bytes per token with MQA", formula, value, "bytes/token")


def expanded_mla_bytes_per_token(config: Config | AttentionShape, dtype: Dtype = "bfloat16") -> Worked:
    """MLA cached naively, K and V of every head after up-projection: what absorbing the weights avoids."""
    shape, bits = attention_shape(config), bits_of(dtype)
    if not shape.is_mla:
        raise ModelError("only a model with kv_lora_rank has an expanded form; use mha_bytes_per_token for others")
    layer, num_layers = shape.first, len(shape.layers)
    value = _in_bytes(num_layers * layer.num_heads * (layer.key_size + layer.value_size), bits)
    formula = (
        f"{num_layers} layers × {layer.num_heads} heads × (key {layer.key_size} + value {layer.value_size})"
        f" × {size_of(bits)}"
    )
    return work("KV bytes per token, expanded MLA", formula, value, "bytes/token")


def mla_in_gqa_groups(config: Config | AttentionShape) -> Worked:
    """KV heads that would keep as much: (latent + rotary key) / (2 x head size) == 2.25 for DeepSeek-V2."""
    layer = attention_shape(config).first
    if not layer.latent_size:
        raise ModelError("this model has no kv_lora_rank: it keeps KV heads, not a latent; there is nothing to compare")
    value = layer.elements_per_token / (2 * layer.value_size)
    formula = f"({layer.latent_size} + {layer.rope_size}) / (2 × {layer.value_size})"
    return work("MLA in groups of GQA", formula, value, "KV heads")


def num_kv_heads_from_bytes(
    bytes_per_token: Amount, num_layers: Amount, head_size: Amount, dtype: Dtype = "bfloat16"
) -> Worked:
    """KV heads behind an observed size, for telling GQA from MHA. Raises ConfigError where none fits."""
    num_bytes = positive("bytes_per_token", bytes_per_token)
    layers, size, bits = whole("num_layers", num_layers), whole("head_size", head_size), bits_of(dtype)
    heads = num_bytes * 8 / (2 * layers * size * bits)
    if heads != int(heads) or not heads:
        raise ConfigError(f"{num_bytes:,} bytes per token give {heads:.4g} KV heads; check layers, head size and dtype")
    formula = f"{num_bytes:,} / (2 × {layers} × {size} × {size_of(bits)})"
    return work("KV heads", formula, int(heads), "KV heads", bytes_per_token)


def ratio(larger: Amount, smaller: Amount) -> Worked:
    """How many times the one is the other: ratio(mha_bytes_per_token(c), kv_bytes_per_token(c)) == 8."""
    above, below = positive("larger", larger), positive("smaller", smaller)
    if unit_of(larger) != unit_of(smaller) and isinstance(larger, Worked) and isinstance(smaller, Worked):
        raise ConfigError(f"{unit_of(larger)} and {unit_of(smaller)} have no common ratio; give two of one unit")
    return work("ratio", f"{plain(above)} / {plain(below)}", above / below, "×", larger, smaller)


def saving(smaller: Amount, larger: Amount) -> Worked:
    """Percent saved: 1 - smaller / larger."""
    less, more = positive("smaller", smaller), positive("larger", larger)
    if less > more:
        raise ConfigError(f"smaller is {plain(less)} and larger {plain(more)}: nothing is saved; are they swapped?")
    return work("saved", f"1 − {plain(less)} / {plain(more)}", 100 * (1 - less / more), "%", smaller, larger)


def bits_of(dtype: Dtype) -> float:
    """Bits per element, scales included where a format has them: bits_of("bf16") == 16. Raises ConfigError."""
    is_number = isinstance(dtype, int | float | Worked)
    name = "" if is_number else str(dtype).lower().removeprefix("torch.")  # torch.bfloat16 itself serves too
    if name in BITS:
        return BITS[name]
    if isinstance(dtype, str):
        raise ConfigError(f"dtype {short(dtype)} is unknown; use one of {', '.join(BITS)}, or a number of bits")
    return float(positive("dtype (bits per element)", dtype))


def size_of(bits: float) -> str:
    """Bits per element as a factor: "2 bytes", "4.5 bits / 8"."""
    if bits < 8:
        return f"{plain(bits)} bits / 8"
    return "1 byte" if bits == 8 else f"{plain(bits / 8)} bytes"


def _merged(shape: AttentionShape, bits: float) -> list[Worked]:
    """One result for all layers that keep the same."""
    keeping = sorted((layer for layer in shape.layers if layer.elements_per_token), key=_kept)
    groups = [list(group) for _, group in groupby(keeping, key=_kept)]
    return [_layers_bytes(_name_of(group[0], len(groups)), group[0], len(group), bits) for group in groups]


def _name_of(layer: Layer, num_groups: int) -> str:
    if num_groups == 1:
        return "KV bytes per token"
    return f"{'windowed' if layer.window else 'full'} layers, per token"


def _kept(layer: Layer) -> tuple[int, int]:
    return layer.window or 0, layer.elements_per_token


def _layers_bytes(name: str, layer: Layer, num_layers: int, bits: float) -> Worked:
    if layer.latent_size:
        kept = f"(latent {layer.latent_size} + rotary key {layer.rope_size})"
    elif layer.key_size == layer.value_size:
        kept = f"2 (K and V) × {counted(layer.num_kv_heads, 'KV heads')} × {layer.key_size}"
    else:
        kept = f"{layer.num_kv_heads} KV heads × (key {layer.key_size} + value {layer.value_size})"
    kind = counted(num_layers, "layers") + (f" of window {layer.window:,}" if layer.window else "")
    value = _in_bytes(num_layers * layer.elements_per_token, bits)
    return work(name, f"{kind} × {kept} × {size_of(bits)}", value, "bytes/token")


def _in_bytes(num_elements: Number, bits: float) -> int:
    """Whole bytes that hold so many elements."""
    exact = int(bits) if bits == int(bits) else bits  # large products of floats would lose their last digits
    return int(-(-num_elements * exact // 8))
