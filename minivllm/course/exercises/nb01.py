"""Notebook 01, Why is decode starved while prefill is not: ridges, critical batches, intensities, floors."""

from random import Random

from minivllm.course.calculators import (
    accelerators,
    critical_batch,
    decode_floor_ms,
    matmul_intensity,
    num_parameters,
    ridge_point,
)
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, Slip, named
from minivllm.course.exercises.place import Place

CHIPS = ("a100-40gb-sxm", "a100-80gb-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "l4", "l40s", "a10g", "rtx-4090")
MODELS = ("llama-3-8b", "llama-2-7b", "llama-2-13b", "qwen2.5-7b", "mistral-7b-v0.1", "qwen3-14b", "smollm2-1.7b")
ROOFLINE = "minivllm.course.calculators.roofline"


def ridges(random: Random, facts: Facts) -> Problem:
    """Ridge points of three chips in bf16, dense."""
    names = random.sample(CHIPS, 3)
    parts, working, lines = [], [], []
    for name in names:
        chip, worked = accelerators()[name], ridge_point(name)
        answer, flops, bandwidth = float(worked), chip.flops_of("bf16"), chip.bandwidth
        slips = {
            "ridge upside down": 1 / answer,
            "sparse FLOPs": 2 * answer,
            "one FLOP for a multiply-add": answer / 2,
            "TB for TiB: the data sheet's TB/s are decimal; do not use 2^40": flops / (bandwidth * 2**40 / 1e12),
            "bits for bytes": answer / 8,
        }
        parts.append(Part(answer, named(slips), "FLOP/byte", label=name))
        working.append(f"{name}: {worked.derivation[-1]}")
        lines.append(f"{name}: {flops / 1e12:,.4g} TFLOP/s dense bf16, {bandwidth / 1e9:,.4g} GB/s")
    question = "Give the ridge points, in this order, as a list of three:\n" + "\n".join(lines)
    return Problem(question, tuple(parts), tuple(working), {"chips": names})


def batch_for_int8_weights(random: Random, facts: Facts) -> Problem:
    """From which batch on int8 weights with bf16 products are bound by compute."""
    name = random.choice(CHIPS)
    worked = critical_batch(name, "int8", "bf16")
    ridge = float(ridge_point(name))
    answer = float(worked)
    slips = {
        "bf16 weights: int8 weights are half as many bytes, so half the batch is enough": ridge,
        "int8 products: the weights are int8, but the products are computed in bf16": 2 * ridge,
        "halved twice: 1 byte for each weight and 2 FLOPs for each token: ridge × 1 / 2": ridge / 4,
        "ridge upside down": 1 / answer,
        "bits for bytes": 8 * answer,
    }
    question = (
        f"{name}: ridge point {ridge:.4g} FLOP/byte in bf16. Weights are int8, products are computed in bf16. "
        "From which batch size (tokens in a step) on are the matrix products bound by compute?"
    )
    return Problem(question, (Part(answer, named(slips), "tokens"),), worked.derivation, {"chip": name})


def intensity(random: Random, facts: Facts) -> Problem:
    """FLOPs per byte of a matrix product whose batch is not small against its widths."""
    tokens, wide_in, wide_out = random.choice((256, 384, 512, 768)), *random.choices((1024, 1536, 2048, 3072), k=2)
    worked = matmul_intensity(tokens, wide_in, wide_out)
    answer, flops = float(worked), 2 * tokens * wide_in * wide_out
    num_elements = tokens * wide_in + wide_in * wide_out + tokens * wide_out
    slips = {
        "activations forgotten": float(tokens),
        "one FLOP for a multiply-add": answer / 2,
        "one byte for each number": flops / num_elements,
        "output forgotten: the result is written too": flops / (2 * (num_elements - tokens * wide_out)),
        "bits for bytes": answer / 8,
    }
    question = (
        f"[{tokens}, {wide_in}] × [{wide_in}, {wide_out}], all in bf16. How many FLOPs for each byte moved, "
        "both inputs read and the output written once?"
    )
    given = {"num_tokens": tokens, "width_in": wide_in, "width_out": wide_out}
    return Problem(question, (Part(answer, named(slips), "FLOP/byte"),), worked.derivation, given)


def floor_of_a_step(random: Random, facts: Facts) -> Problem:
    """Least time of a decode step with an empty cache: all weights are read once."""
    model, name = random.choice(MODELS), random.choice(CHIPS)
    worked = decode_floor_ms(model, name, 0)
    chip, count = accelerators()[name], int(num_parameters(model))
    answer = float(worked)
    slips = {
        "one byte for each number": answer / 2,
        "compute instead of memory": 2e3 * count / chip.flops_of("bf16"),
        "unit left out": answer / 1e3,
        "bits for bytes": answer * 8,
        "GiB for GB": answer * 1e9 / 2**30,
    }
    question = (
        f"{model} has {count:,} parameters in bf16; the chip {name} reads {chip.bandwidth / 1e9:,.4g} GB/s, computes "
        f"{chip.flops_of('bf16') / 1e12:,.4g} TFLOP/s. What is the floor of a decode step of one short request, in ms?"
    )
    given = {"model": model, "chip": name}
    return Problem(question, (Part(answer, named(slips), "ms"),), worked.derivation, given)


BOUNDS = ("compute", "bandwidth", "overhead")
WORKLOADS = (
    ("prefill of one prompt of 8,192 tokens, 8B model, H100", "compute"),
    ("prefill of 64 prompts of 500 tokens in one step, 8B model, H100", "compute"),
    ("training step, batch of 4M tokens, 8B model", "compute"),
    ("decode of one request at 1k context, 8B model, H100, with a CUDA graph", "bandwidth"),
    ("decode of 32 requests at 500 tokens, 8B model, H100, with a CUDA graph", "bandwidth"),
    ("attention of 256 requests decoding at 8k context, as many KV heads as query heads, CUDA graph", "bandwidth"),
    ("decode of one request, 135M model, PyTorch on an H100, each kernel launched by itself", "overhead"),
    ("decode of 4 requests, 100M model that drafts tokens for a larger one, no CUDA graph, H100", "overhead"),
)


def classify(random: Random, facts: Facts) -> Problem:
    """Which limit holds for six workloads."""
    while True:
        drawn = random.sample(WORKLOADS, 6)
        kinds = tuple(kind for _, kind in drawn)
        if set(kinds) == set(BOUNDS) and any("attention of" in words for words, _ in drawn):
            break
    swap = {"compute": "bandwidth", "bandwidth": "compute", "overhead": "overhead"}
    is_decode = [("decod" in words) for words, _ in drawn]
    slips = (
        Slip("compute and bandwidth swapped", tuple(swap[k] for k in kinds),
             "Many tokens share one read of the weights in prefill: that is bound by compute; decode waits for bytes."),
        Slip("overhead overlooked", tuple("bandwidth" if k == "overhead" else k for k in kinds),
             "A tiny model reads its weights faster than Python launches its kernels: the GPU waits for the CPU."),
        Slip("batch moves attention",
             tuple("compute" if "attention of" in words else kind for words, kind in drawn)),
        Slip("everything bound by bandwidth", ("bandwidth",) * 6,
             "Prefill has hundreds of FLOPs for each byte: it is bound by compute."),
        Slip("every decode bound by overhead", tuple("overhead" if d else k for d, k in zip(is_decode, kinds,
             strict=True)), "A CUDA graph launches all kernels of a step at once: reading 16 GB then takes longer."),
        Slip("memory for bandwidth", tuple("memory" if kind == "bandwidth" else kind for kind in kinds),
             "Say bandwidth: these wait for the rate at which memory is read, not for its size."),
    )  # fmt: skip
    lines = "\n".join(f"{i}. {words}" for i, (words, _) in enumerate(drawn, 1))
    question = f"What bounds each: compute, bandwidth or overhead? Give a list of six words.\n{lines}"
    working = tuple(f"{words}: {kind}" for words, kind in drawn)
    return Problem(question, (Part(kinds, slips),), working)


EXERCISES = (
    Exercise("01.1", "Ridge points of three chips", (
        "The ridge is where the two roofs of the roofline meet: bytes take as long as FLOPs.",
        "Divide the dense bf16 FLOP/s by the bytes/s. TFLOP is 10^12 and GB 10^9.",
        "For an H100 SXM: 989.5e12 / 3.35e12 = 295.",
    ), Place(ROOFLINE, "ridge_point"), ridges),
    Exercise("01.2", "Smallest compute-bound batch, int8 weights", (
        "Each weight is read once in a step and used once for every token in it.",
        "A token costs 2 FLOPs for each weight; an int8 weight is 1 byte. So B tokens give 2 B FLOPs a byte.",
        "Solve 2 B / 1 byte = ridge.",
    ), Place(ROOFLINE, "critical_batch"), batch_for_int8_weights),
    Exercise("01.3", "Intensity of a matrix product", (
        "FLOPs above, bytes below. FLOPs: 2 × B × D × F.",
        "Three matrices move: B × D and D × F are read, B × F is written.",
        "2 B D F / (2 (B D + D F + B F)).",
    ), Place(ROOFLINE, "matmul_intensity"), intensity),
    Exercise("01.4", "Floor of a decode step", (
        "One token needs every weight once. What takes longer: reading them or computing with them?",
        "Bytes of the weights = parameters × 2.",
        "milliseconds = parameters × 2 bytes / (bytes per second) × 1000.",
    ), Place("minivllm.course.calculators.planning", "decode_floor_ms"), floor_of_a_step),
    Exercise("01.5", "Classify six workloads", (
        "How many tokens use each byte that is read? Compare that with the ridge.",
        "Batching lets many tokens share the weights, but every request reads its own K and V.",
        "A model of 0.1B parameters is read in 0.1 ms; launching its hundreds of kernels one by one takes longer.",
    ), Place(ROOFLINE, "attention_intensity"), classify),
)  # fmt: skip
