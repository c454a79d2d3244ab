"""Intensities and ridges: which work a chip computes and which it waits for (Williams et al., CACM 2009).

A kernel with more FLOPs per byte than the chip's FLOP/s per byte/s is bound by compute, one with fewer by bandwidth.
"""

from collections import Counter
from collections.abc import Iterable
from math import exp, inf

from minivllm.course.calculators.accelerators import Accelerator, accelerator
from minivllm.course.calculators.attention_shape import AttentionShape, attention_shape
from minivllm.course.calculators.checks import LARGEST, at_least, positive, share, whole
from minivllm.course.calculators.kv_bytes import Dtype, bits_of, size_of
from minivllm.course.calculators.model_fields import Config
from minivllm.course.calculators.units import plain, shown
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, scalar, work
from minivllm.errors import ConfigError, ModelError, short

Chip = str | Accelerator


def ridge_point(chip: Chip, dtype: str = "bf16") -> Worked:
    """FLOPs that the chip can do for each byte it can read: 295 for an H100 SXM in bf16."""
    card = accelerator(chip)
    return ridge_point_of(card.flops_of(dtype), card.bandwidth)


def ridge_point_of(flops_per_s: Amount, bytes_per_s: Amount) -> Worked:
    """FLOP/s over bytes/s, for a chip that the tables lack."""
    flops, bandwidth = positive("flops_per_s", flops_per_s), positive("bytes_per_s", bytes_per_s)
    formula = f"{shown(flops, 'FLOP/s')} / {shown(bandwidth, 'bytes/s')}"
    return work("ridge point", formula, flops / bandwidth, "FLOP/byte", flops_per_s, bytes_per_s)


def critical_batch(
    chip: Chip, weight_dtype: Dtype = "bf16", compute_dtype: str = "bf16", experts_per_used: Amount = 1
) -> Worked:
    """Tokens in a step from which its matrix products are bound by compute: ridge x weight bytes / 2.

    Each weight is read once and used for 2 FLOPs a token. A sparse model needs experts / experts used times as many.
    """
    ridge, size = ridge_point(chip, compute_dtype), bits_of(weight_dtype) / 8
    spread = at_least("experts_per_used", experts_per_used, 1)
    formula = f"{plain(float(ridge))} × {size_of(8 * size)} / 2 FLOPs" + (f" × {plain(spread)}" if spread > 1 else "")
    return work("critical batch", formula, float(ridge) * size / 2 * spread, "tokens", ridge)


def matmul_intensity(
    num_tokens: Amounts, width_in: Amount, width_out: Amount, weight_dtype: Dtype = "bf16", dtype: Dtype = "bf16"
) -> Worked:
    """FLOPs per byte of [B, D] x [D, F]: 2BDF / (bytes of both inputs and the output); close to B while B is small."""
    wide_in, wide_out = whole("width_in", width_in), whole("width_out", width_out)
    weight_size, size = bits_of(weight_dtype) / 8, bits_of(dtype) / 8

    def of_tokens(tokens: Amount) -> Worked:
        rows = whole("num_tokens", tokens)
        flops = 2 * rows * wide_in * wide_out
        num_bytes = size * rows * (wide_in + wide_out) + weight_size * wide_in * wide_out
        formula = f"2 × {rows} × {wide_in} × {wide_out} / {plain(num_bytes)} B"
        return work(f"intensity at B = {rows}", formula, flops / num_bytes, "FLOP/byte")

    return for_each(num_tokens, of_tokens)


def attention_intensity(
    num_new: Amounts, num_context: Amount, queries_per_kv_head: Amount = 1, dtype: Dtype = "bf16"
) -> Worked:
    """FLOPs per byte of T queries against S keys in groups of g: S T g / (S + T g) in 2-byte numbers.

    Prefill (S = T) gives S / 2; decode (T = 1) less than g however large the batch: each sequence brings its own keys.
    """
    context, group = whole("num_context", num_context), positive("queries_per_kv_head", queries_per_kv_head)
    size = bits_of(dtype) / 8

    def of_new(new: Amount) -> Worked:
        queries = whole("num_new", new)
        value = context * queries * group / (context + queries * group) * 2 / size
        formula = f"{context} × {queries} × {plain(group)} / ({context} + {queries} × {plain(group)})"
        formula += "" if size == 2 else f" × 2 / {plain(size)} bytes"
        return work(f"intensity of T = {queries} against S = {context}", formula, value, "FLOP/byte")

    return for_each(num_new, of_new)


def decode_attention_intensity(config: Config | AttentionShape, dtype: Dtype = "bf16") -> Worked:
    """FLOPs per byte of cache in a decode step: g for grouped heads in bf16, 242 for DeepSeek-V3's absorbed MLA."""
    layer, size = attention_shape(config).first, bits_of(dtype) / 8
    if layer.latent_size:
        kept, used = layer.latent_size + layer.rope_size, layer.latent_size
        formula = f"2 × {layer.num_heads} heads × ({kept} for scores + {used} for values) / ({kept} × {plain(size)} B)"
        value = 2 * layer.num_heads * (kept + used) / (kept * size)
    else:
        formula = f"4 × {layer.num_heads} heads / (2 × {layer.num_kv_heads} KV heads × {plain(size)} B)"
        value = 2 * layer.num_heads / (layer.num_kv_heads * size)
    return work("intensity of decode attention", formula, value, "FLOP/byte")


def attention_flops(config: Config | AttentionShape, num_new: Amount, num_past: Amount = 0) -> Worked:
    """FLOPs of causal attention over all layers: 4 x heads x head size for each pair of a query and a key it sees."""
    new, past = whole("num_new", num_new), whole("num_past", num_past, 0)
    alike = Counter(
        (layer.num_heads * (layer.key_size + layer.value_size), layer.window, layer.kind == "linear")
        for layer in attention_shape(config).layers
    )
    total, terms = 0, []
    for (width, window, is_linear), num_layers in alike.items():
        if is_linear:
            raise ModelError("linear attention has no query-key pairs; its FLOPs are not of this kind")
        pairs = _pairs(new, past, window or past + new)
        total += num_layers * 2 * width * pairs
        terms.append(f"{num_layers} × 2 × {width:,} × {pairs:,}")
    name = "attention FLOPs = layers × 2 × heads × (key + value size) × pairs"
    return work(name, " + ".join(terms), total, "FLOP")


def _pairs(num_new: int, num_past: int, window: int) -> int:
    """Keys that the new queries see, summed: one more for each until the window is full, then the window."""
    growing = min(max(window - num_past, 0), num_new)
    return growing * num_past + growing * (growing + 1) // 2 + (num_new - growing) * window


def training_flops_per_token(num_parameters: Amount) -> Worked:
    """6 P: 2 forward, 4 backward; all tokens of a batch at once, so its intensity is that of prefill."""
    count = positive("num_parameters", num_parameters)
    return work("training FLOPs per token", f"6 × {plain(count)}", 6 * count, "FLOP", num_parameters)


def inference_flops_per_token(num_parameters: Amount) -> Worked:
    """2 P: a multiplication and an addition for each weight."""
    count = positive("num_parameters", num_parameters)
    return work("FLOPs per token", f"2 × {plain(count)}", 2 * count, "FLOP", num_parameters)


def tokens_where_kv_passes_weights(weight_bytes: Amount, kv_bytes_per_token: Amount) -> Worked:
    """Live tokens of all sequences from which a step reads more KV than weights: W / kv."""
    weights, per_token = positive("weight_bytes", weight_bytes), positive("kv_bytes_per_token", kv_bytes_per_token)
    formula = f"⌊{plain(weights)} B / {plain(per_token)} B⌋"
    return work("live tokens at which KV reads pass weight reads", formula, int(weights // per_token), "tokens",
                weight_bytes, kv_bytes_per_token)  # fmt: skip


def achieved_share(num_bytes: Amount, time_ms: Amount, chip: Chip) -> Worked:
    """Percent of the chip's bandwidth that a measured kernel reached: bytes / time / peak."""
    moved, time, card = positive("num_bytes", num_bytes), positive("time_ms", time_ms), accelerator(chip)
    formula = f"{plain(moved)} B / {plain(time)} ms / {shown(card.bandwidth, 'bytes/s')}"
    value = 100 * moved / (time / 1e3) / card.bandwidth
    return work("share of peak bandwidth", formula, value, "%", num_bytes)


def amdahl_speedup(affected_share: Amount, speedup: Amount) -> Worked:
    """Whole speed-up when a share p of the time gets s times faster: 1 / ((1 - p) + p / s)."""
    part, factor = share("affected_share", affected_share), positive("speedup", speedup)
    formula = f"1 / (1 − {plain(part)} + {plain(part)} / {plain(factor)})"
    return work("speed-up of the whole", formula, 1 / (1 - part + part / factor), "×", affected_share, speedup)


def merge_softmax(*partials: tuple[float, float, float]) -> Worked:
    """Combine (max, sum, output) of online softmax over disjoint keys; outputs are not yet divided by their sums.

    m = max m_i; l = sum l_i e^(m_i - m); o = sum o_i e^(m_i - m) / l. The value is the final output.
    """
    if not partials:
        raise ConfigError("no partial results were given; give at least one (max, sum, output)")
    given = [_partial(i, partial) for i, partial in enumerate(partials)]
    top = max(m for m, _, _ in given)
    total = sum(part * exp(m - top) for m, part, _ in given)
    output = sum(o * exp(m - top) for m, _, o in given) / positive("sum of exponentials", total)
    scales = [plain(exp(m - top)) for m, _, _ in given]
    sums = " + ".join(f"{plain(part)} × {scale}" for (_, part, _), scale in zip(given, scales, strict=True))
    outputs = " + ".join(f"{plain(o)} × {scale}" for (_, _, o), scale in zip(given, scales, strict=True))
    length = work("sum", f"{sums}, each scaled by e^(m − {plain(top)})", total, "")
    return work("merged output", f"({outputs}) / {plain(total)}", output, "", length)


def splits_to_fill(num_requests: Amounts, num_kv_heads: Amount, num_processors: Amount) -> Worked:
    """Parts of each context that keep a chip busy in decode: ceil(SMs / (B x H_kv)), with the programs in parts."""
    heads, processors = whole("num_kv_heads", num_kv_heads), whole("num_processors", num_processors)

    def of_batch(requests: Amount) -> Worked:
        batch = whole("num_requests", requests)
        splits = -(-processors // (batch * heads))
        programs = work("programs", f"{batch} × {heads} × {splits}", batch * heads * splits, "programs")
        formula = f"⌈{processors} / ({batch} requests × {heads} KV heads)⌉"
        return work("splits of each context", formula, splits, "splits", programs=programs)

    return for_each(num_requests, of_batch)


def _partial(index: int, partial: object) -> tuple[float, float, float]:
    """One (max, sum, output); the max of no keys at all is minus infinity."""
    numbers = list(partial) if isinstance(partial, Iterable) else []
    if len(numbers) != 3:
        raise ConfigError(
            f"partials[{index}] must be three numbers, (max, sum, output), an argument of its own, not {short(partial)}"
        )
    top = float(scalar(numbers[0]))
    if top != -inf:
        at_least(f"partials[{index}]: max", top, -LARGEST)
    rest = [float(at_least(f"partials[{index}]: {name}", number, -LARGEST))
            for name, number in zip(("sum", "output"), numbers[1:], strict=True)]  # fmt: skip
    return top, rest[0], rest[1]
