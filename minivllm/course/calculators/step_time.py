"""Floors of a step: the time in which a chip cannot do less, from bytes read and FLOPs done at its promised rates.

    decode step = KV read + max(weight read, matrix products)        (scaling book, chapter 7)
Weights are read once for the whole batch, KV once for each sequence; attention's own FLOPs hide behind its reads.
"""

from minivllm.course.calculators.accelerators import accelerator
from minivllm.course.calculators.checks import at_least, positive, share, whole
from minivllm.course.calculators.roofline import Chip
from minivllm.course.calculators.units import plain, shown
from minivllm.course.calculators.worked import Amount, Amounts, Worked, as_worked, for_each, work
from minivllm.errors import ConfigError


def read_ms(num_bytes: Amount, chip: Chip, num_chips: Amount = 1) -> Worked:
    """Time to read so many bytes, spread evenly over the chips: 4.79 ms for 16.06 GB on an H100."""
    return _read("time to read", f"{plain(at_least('num_bytes', num_bytes))} B", num_bytes, chip, num_chips)


def compute_ms(flops: Amount, chip: Chip, num_chips: Amount = 1, dtype: str = "bf16", efficiency: Amount = 1) -> Worked:
    """Time to do so many FLOPs at a share of the chips' rate (the MFU)."""
    text = shown(at_least("flops", flops), "FLOP")
    return _compute("time to compute", text, flops, chip, num_chips, dtype, efficiency)


def decode_bytes(weight_bytes: Amount, kv_bytes_per_sequence: Amount, batch_size: Amounts = 1) -> Worked:
    """Bytes that a step reads, and that memory holds: weights + batch x KV of a sequence."""
    weights, kv = at_least("weight_bytes", weight_bytes), at_least("kv_bytes_per_sequence", kv_bytes_per_sequence)

    def of_batch(batch: Amount) -> Worked:
        size = whole("batch_size", batch)
        value = weights + size * kv
        formula = f"{plain(weights)} + {size} × {plain(kv)}"
        return work("bytes per step", formula, int(value), "bytes", weight_bytes, kv_bytes_per_sequence)

    return for_each(batch_size, of_batch)


def decode_step_ms(
    weight_bytes: Amount, kv_bytes_per_sequence: Amount, chip: Chip, *, batch_size: Amounts = 1,
    num_parameters: Amount | None = None, num_chips: Amount = 1, compute_dtype: str = "bf16",
) -> Worked:  # fmt: skip
    """Floor of one decode step, with its parts `weight_read`, `kv_read`, `matmul` and `tokens_per_s`.

    `num_parameters` are those a token uses; without them the products count as free, as they are at small batch.
    """
    weights, kv = at_least("weight_bytes", weight_bytes), at_least("kv_bytes_per_sequence", kv_bytes_per_sequence)
    count = at_least("num_parameters", 0 if num_parameters is None else num_parameters)
    given = weight_bytes, kv_bytes_per_sequence, num_parameters

    def of_batch(batch: Amount) -> Worked:
        size = whole("batch_size", batch)
        kv_read = _read("KV read", f"{size} × {plain(kv)} B", size * kv, chip, num_chips)
        weight_read = _read("weight read", f"{plain(weights)} B", weights, chip, num_chips)
        text = f"2 × {size} × {plain(count)} FLOP"
        matmul = _compute("products", text, 2 * size * count, chip, num_chips, compute_dtype)
        kv_read, weight_read, matmul = (p if p else as_worked(0.0, "ms") for p in (kv_read, weight_read, matmul))
        value = float(kv_read) + max(float(weight_read), float(matmul))
        if not value:
            raise ConfigError("a step that reads and computes nothing takes no time; give weight_bytes above 0")
        longer = f"weights {plain(float(weight_read))}"
        if count:
            longer = f"max({longer}, products {plain(float(matmul))})"
        formula = f"KV {plain(float(kv_read))} + {longer}" if kv else longer
        rate = work("tokens per second", f"{size} / {plain(value)} ms", 1e3 * size / value, "tokens/s")
        return work(f"step of batch {size}", formula, value, "ms", *given, kv_read, weight_read, matmul,
                    weight_read=weight_read, kv_read=kv_read, matmul=matmul, tokens_per_s=rate)  # fmt: skip

    return for_each(batch_size, of_batch)


def overlapped_step_ms(
    num_bytes: Amount, flops: Amount, chip: Chip, num_chips: Amount = 1, dtype: str = "bf16"
) -> Worked:
    """The lowest floor: all reads behind all FLOPs or the other way round, max(bytes / bandwidth, FLOPs / rate)."""
    reading, computing = read_ms(num_bytes, chip, num_chips), compute_ms(flops, chip, num_chips, dtype)
    formula = f"max({plain(float(reading))} ms, {plain(float(computing))} ms)"
    return work("step, perfectly overlapped", formula, max(float(reading), float(computing)), "ms", reading, computing)


def tokens_per_s(batch_size: Amount, step_ms: Amount) -> Worked:
    """Throughput of a batch: one token for each sequence and step."""
    size, time = whole("batch_size", batch_size), positive("step_ms", step_ms)
    return work("tokens per second", f"{size} / {plain(time)} ms", 1e3 * size / time, "tokens/s", step_ms)


def prefill_ms(
    num_parameters: Amount, num_tokens: Amounts, chip: Chip, num_chips: Amount = 1, efficiency: Amount = 1,
    dtype: str = "bf16", attention_flops: Amount = 0,
) -> Worked:  # fmt: skip
    """Floor of a prefill: (2 P T + attention) / (chips x rate x efficiency)."""
    count, extra = positive("num_parameters", num_parameters), at_least("attention_flops", attention_flops)

    def of_tokens(tokens: Amount) -> Worked:
        size = whole("num_tokens", tokens)
        flops = 2 * count * size + extra
        formula = f"2 × {plain(count)} × {size:,}" + (f" + {plain(extra)}" if extra else "")
        total = work("prefill FLOPs", formula, flops, "FLOP", num_parameters, attention_flops)
        return compute_ms(total, chip, num_chips, dtype, efficiency)

    return for_each(num_tokens, of_tokens)


def itl_slope_us(kv_bytes_per_token: Amount, chip: Chip, num_chips: Amount = 1, achieved: Amount = 1) -> Worked:
    """How much each token of context adds to a decode step, in microseconds: kv / bandwidth."""
    per_token, card = positive("kv_bytes_per_token", kv_bytes_per_token), accelerator(chip)
    chips, used = whole("num_chips", num_chips), share("achieved", achieved, can_be_zero=False)
    formula = f"{plain(per_token)} B / {_rate(chips, card.bandwidth, 'bytes/s', used)}"
    value = 1e6 * per_token / (chips * card.bandwidth * used)
    return work("slope", formula, value, "µs/token", kv_bytes_per_token)


def break_even_length(extra_ms: Amount, saved_ms_per_token: Amount) -> Worked:
    """Context from which a format that costs more at once but less per token wins: extra / saved per token."""
    extra, saved = at_least("extra_ms", extra_ms), positive("saved_ms_per_token", saved_ms_per_token)
    formula = f"{plain(extra)} ms / {plain(saved)} ms per token"
    return work("break-even context", formula, extra / saved, "tokens", extra_ms, saved_ms_per_token)


def all_reduce_ms(
    num_tokens: Amount, hidden_size: Amount, num_gpus: Amount, link_bytes_per_s: Amount, bytes_per_element: Amount = 2
) -> Worked:
    """Bandwidth floor of one ring all-reduce of [tokens, hidden]: 2 (n - 1) / n x bytes / link."""
    tokens, hidden = whole("num_tokens", num_tokens), whole("hidden_size", hidden_size)
    gpus = whole("num_gpus", num_gpus)
    size, link = positive("bytes_per_element", bytes_per_element), positive("link_bytes_per_s", link_bytes_per_s)
    value = 1e3 * 2 * (gpus - 1) / gpus * tokens * hidden * size / link
    formula = f"2 × {gpus - 1}/{gpus} × {tokens} × {hidden} × {plain(size)} B / {shown(link, 'bytes/s')}"
    return work("all-reduce", formula, value, "ms")


def _read(name: str, text: str, num_bytes: Amount, chip: Chip, num_chips: Amount) -> Worked:
    moved, card, chips = at_least("num_bytes", num_bytes), accelerator(chip), whole("num_chips", num_chips)
    value = 1e3 * moved / (chips * card.bandwidth)
    return work(name, f"{text} / {_rate(chips, card.bandwidth, 'bytes/s')}", value, "ms", num_bytes)


def _compute(
    name: str, text: str, flops: Amount, chip: Chip, num_chips: Amount, dtype: str = "bf16", efficiency: Amount = 1
) -> Worked:
    done, card, chips = at_least("flops", flops), accelerator(chip), whole("num_chips", num_chips)
    used, rate = share("efficiency", efficiency, can_be_zero=False), card.flops_of(dtype)
    value = 1e3 * done / (chips * rate * used)
    return work(name, f"{text} / {_rate(chips, rate, 'FLOP/s', used)}", value, "ms", flops)


def _rate(chips: int, rate: float, unit: str, used: float = 1) -> str:
    """What all chips do, as a divisor: "3.35 TB/s", "(8 × 820 GB/s)"."""
    factors = [*([str(chips)] if chips > 1 else []), shown(rate, unit), *([plain(used)] if used < 1 else [])]
    return factors[0] if len(factors) == 1 else f"({' × '.join(factors)})"
