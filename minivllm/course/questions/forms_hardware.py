"""Numeric forms of groups J and L: what a chip waits for, and what a kernel merges, splits and reads."""

from math import exp
from random import Random

from minivllm.course.calculators import (
    accelerator,
    achieved_share,
    decode_attention_intensity,
    expected_experts,
    itl_slope_us,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    matmul_intensity,
    merge_softmax,
    ratio,
    read_ms,
    ridge_point,
    splits_to_fill,
)
from minivllm.course.numeric_forms import Form, Problem, Slip
from minivllm.course.questions.models import CARDS, GROUPED, LARGE, any_of

CHIPS = ("a100-80gb-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "l40s", "tpu-v5e", "mi300x", "rtx-4090")
PAIRS = (("a100-80gb-sxm", "h100-sxm"), ("h100-sxm", "h200-sxm"), ("a100-80gb-sxm", "h200-sxm"), ("l4", "l40s"),
         ("h100-pcie", "h100-sxm"), ("h200-sxm", "b200-sxm"), ("tpu-v5e", "tpu-v5p"))  # fmt: skip


def ridge_of_a_chip(random: Random) -> Problem:
    card = accelerator(random.choice(CHIPS))
    truth = ridge_point(card)
    ask = (
        f"{card.name}: {card.flops_of() / 1e12:g} TFLOP/s dense in bf16, {card.bandwidth / 1e12:g} TB/s. "
        "Where is its ridge point?"
    )
    slips = (
        Slip("ridge upside down", 1 / float(truth)),
        Slip("sparse FLOPs", 2 * float(truth)),
        Slip("one FLOP for a multiply-add", float(truth) / 2),
    )
    return Problem(ask, "FLOP/byte", truth, slips)


def intensity_of_a_product(random: Random) -> Problem:
    rows = random.choice([128, 256, 512, 1024])
    width_in, width_out = random.choice([1024, 2048, 4096]), random.choice([1024, 2048, 4096])
    truth = matmul_intensity(rows, width_in, width_out)
    ask = (
        f"[{rows}, {width_in}] times [{width_in}, {width_out}], all in bf16, each number read or written once: "
        "how many FLOPs per byte?"
    )
    slips = (
        Slip("activations forgotten", rows),
        Slip("one FLOP for a multiply-add", float(truth) / 2),
        Slip("one byte for each number", float(truth) * 2),
    )
    return Problem(ask, "FLOP/byte", truth, slips)


def intensity_of_decode_attention(random: Random) -> Problem:
    model, batch = any_of(random, (*GROUPED, *LARGE)), random.choice([16, 32, 64])
    truth = decode_attention_intensity(model.name)
    ask = (
        f"{batch} requests decode with {model} and a long bf16 cache. "
        "How many FLOPs does attention do for each byte of cache?"
    )
    slips = (
        Slip("group forgotten", 1),
        Slip("batch moves attention", float(truth) * batch),
        Slip("query heads are not the group", model.query_heads),
    )
    return Problem(ask, "FLOP/byte", truth, slips)


def faster_by_another_chip(random: Random) -> Problem:
    old, new = map(accelerator, random.choice(PAIRS))
    tokens = random.randint(2, 9) * 10**9
    truth = ratio(read_ms(tokens, old), read_ms(tokens, new))

    def promise(chip: str) -> str:
        card = accelerator(chip)
        memory = f"{card.memory_bytes / 1e9:g} GB, {card.bandwidth / 1e12:g} TB/s"
        return f"{chip} ({card.flops_of() / 1e12:g} TFLOP/s, {memory})"

    ask = (
        f"From {promise(old.name)} to {promise(new.name)}: how many times as fast can a decode step of a small batch, "
        "which reads the same bytes, become at best?"
    )
    slips = (
        Slip("compute ratio", new.flops_of() / old.flops_of()),
        Slip("capacity for bandwidth", new.memory_bytes / old.memory_bytes),
        Slip("ratio upside down", 1 / float(truth)),
    )
    return Problem(ask, "×", truth, slips)


def slope_with_context(random: Random) -> Problem:
    model, chip, achieved = any_of(random, GROUPED), random.choice(CARDS), random.choice([0.7, 0.8, 0.9])
    truth = itl_slope_us(kv_bytes_per_token(model.name), chip, achieved=achieved)
    ask = (
        f"{model}, bf16 cache, on {chip} ({accelerator(chip).bandwidth / 1e12:g} TB/s), of which {achieved:.0%} is "
        "reached. By how many microseconds does each token of context lengthen a decode step?"
    )
    slips = (
        Slip("peak rate", float(truth) * achieved),
        Slip("query heads", float(truth) * model.group),
        Slip("missing factor 2", float(truth) / 2),
        Slip("layers forgotten", float(truth) / model.layers),
    )
    return Problem(ask, "µs", truth, slips)


def experts_of_a_batch(random: Random) -> Problem:
    experts, used = random.choice([(8, 2), (64, 6), (128, 8), (256, 8), (160, 6)])
    batch = random.choice([2, 4, 8, 16, 32])
    ask = (
        f"A layer has {experts} experts and sends each token to {used} of them, at random. How many different experts "
        f"does a decode step of {batch} requests read, on average?"
    )
    slips = (Slip("all experts at once", min(batch * used, experts)), Slip("one token's experts", used))
    return Problem(ask, "experts", expected_experts(experts, used, batch), slips)


def merged_partials(random: Random) -> Problem:
    low, sums = random.choice([0.0, 1.0, 2.0]), random.sample([2.0, 3.0, 4.0, 5.0], 2)
    values = random.choice([0.5, 1.0, 1.5]), random.choice([3.0, 4.0, 5.0])  # outputs once divided
    parts = [(low, sums[0], sums[0] * values[0]), (low + random.choice([1.0, 2.0]), sums[1], sums[1] * values[1])]
    top = max(m for m, _, _ in parts)
    ask = "Merge two parts of an online softmax, each (maximum, sum, output not yet divided): " + " and ".join(
        f"({m:g}, {part:g}, {o:g})" for m, part, o in parts
    )
    wrong = [(part * exp(top - m), o * exp(top - m)) for m, part, o in parts]
    slips = (
        Slip("sums added", sum(o for _, _, o in parts) / sum(part for _, part, _ in parts)),
        Slip("outputs averaged", sum(o / part for _, part, o in parts) / 2),
        Slip("scaled by the wrong sign", sum(o for _, o in wrong) / sum(part for part, _ in wrong)),
    )
    return Problem(f"{ask}. What is the output?", "", merge_softmax(*parts), slips)


def splits_of_a_context(random: Random) -> Problem:
    batch, heads, processors = random.choice([5, 7]), random.choice([2, 4, 8]), random.choice([78, 108, 132])
    truth = splits_to_fill(batch, heads, processors)
    ask = (
        f"{batch} requests decode with {heads} KV heads, one program for each request and KV head, on {processors} "
        "multiprocessors. Into how many parts must each context be split so that every multiprocessor has work?"
    )
    slips = (
        Slip("heads forgotten", -(-processors // batch)),
        Slip("batch not counted", -(-processors // heads)),
        Slip("rounded down", processors // (batch * heads)),
    )
    return Problem(ask, "splits", truth, slips)


def share_of_peak(random: Random) -> Problem:
    batch, tokens, heads = random.choice([8, 16, 32]), random.choice([2, 4, 8, 16]) * 1024, random.choice([2, 4, 8])
    chip, share, group = random.choice(CARDS), random.uniform(0.3, 0.95), random.choice([3, 4, 5, 7])
    layer = {
        "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": heads * group, "hidden_size": 4096,
        "num_key_value_heads": heads, "head_dim": 128,
    }  # fmt: skip
    moved = batch * kv_bytes_of_sequence(layer, tokens)
    time_us = round(1e3 * float(read_ms(moved, chip)) / share, 1)
    truth = achieved_share(moved, time_us / 1e3, chip)
    ask = (
        f"A decode kernel serves one layer with {heads * group} query heads, {heads} KV heads of size 128, "
        f"{batch} requests of {tokens:,} tokens, bf16, in {time_us:,} µs on {chip} "
        f"({accelerator(chip).bandwidth / 1e12:g} TB/s). What percent of peak bandwidth do its cache reads reach?"
    )
    slips = (
        Slip("K only", float(truth) / 2),
        Slip("query heads", float(truth) * group),
        Slip("one request", float(truth) / batch),
    )
    return Problem(ask, "%", truth, slips)


FORMS: dict[str, Form] = {
    "J1": ridge_of_a_chip, "J2": intensity_of_a_product, "J3": intensity_of_decode_attention,
    "J4": faster_by_another_chip, "J6": slope_with_context, "J8": experts_of_a_batch, "L1": merged_partials,
    "L2": splits_of_a_context, "L5": share_of_peak,
}  # fmt: skip
