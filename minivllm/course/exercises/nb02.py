"""Notebook 02, How many bytes does one token cost: K and V of any model, ratios, claims."""

from collections.abc import Sequence
from random import Random

from minivllm.course.calculators import (
    attention_shape,
    kv_bytes_per_token,
    mha_bytes_per_token,
    num_kv_heads_from_bytes,
    num_parameters,
)
from minivllm.course.exercises.claims import CLAIMS
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, Slip, named
from minivllm.course.exercises.place import Place

KV_BYTES = "minivllm.course.calculators.kv_bytes"


def bytes_of_a_config(random: Random, facts: Facts) -> Problem:
    """Bytes per token of a drawn GQA model."""
    kv_heads, group = random.choice((2, 4, 8)), random.choice((3, 4, 5, 7))
    layers, size = random.randrange(18, 81), random.choice((64, 96, 128))
    dtype = random.choice(("bf16", "fp8", "fp32"))
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads, "head_dim": size, "hidden_size": kv_heads * group * 64,
    }  # fmt: skip
    worked = kv_bytes_per_token(config, dtype)
    answer = int(worked)
    slips = {
        "query heads": answer * group,
        "missing factor 2": answer // 2,
        "layers forgotten": answer / layers,
        "bits for bytes": answer * 8,
        "unit left out": answer / 1024,
    }
    fields = ", ".join(f"{name} {value}" for name, value in config.items() if name != "model_type")
    question = f"A model has {fields}; K and V are kept in {dtype}. How many bytes does one token take?"
    return Problem(question, (Part(answer, named(slips), "bytes"),), worked.derivation, {"config": config})


def three_ratios(random: Random, facts: Facts) -> Problem:
    """DeepSeek-V2's three savings: same-shape MHA, DeepSeek 67B in bf16, and that with a cache of fewer bits."""
    bits = random.choice((4, 5, 6))
    small, fewer = kv_bytes_per_token("deepseek-v2"), kv_bytes_per_token("deepseek-v2", bits)
    bases = (
        ("the same heads as MHA, both in bf16", small, mha_bytes_per_token("deepseek-v2")),
        ("DeepSeek LLM 67B, both in bf16", small, kv_bytes_per_token("deepseek-llm-67b")),
        (f"DeepSeek LLM 67B in bf16, the latent in {bits} bits", fewer, kv_bytes_per_token("deepseek-llm-67b")),
    )
    parts, working = [], []
    for label, kept, base in bases:
        rest = float(kept) / float(base)
        answer = 100 * (1 - rest)
        slips = {
            "share for its complement": 100 * rest,
            "factor for percent: 1 − 1 / factor is the saving": 1 / rest,
            "share of 1 for percent: multiply by 100": 1 - rest,
            "latent counted twice": 100 * (1 - 2 * rest),
            "bits for bytes": 100 * (1 - rest / 8),
        }
        parts.append(Part(answer, named(slips), "%", label=label, share=0.004))
        working.append(f"{label}: 1 − {int(kept):,} / {int(base):,} = {answer:.3g}%")
    question = (
        "DeepSeek-V2 keeps (512 + 64) numbers per token and layer, in 60 layers. Its 128 heads have size 128. DeepSeek "
        "LLM 67B has 95 layers and 8 KV heads of size 128. How many percent less does V2 keep than\n"
        + "\n".join(f"{i}. {label}" for i, (label, _, _) in enumerate(bases, 1))
        + "\nGive a list of three."
    )
    return Problem(question, tuple(parts), tuple(working))


def infer_heads(random: Random, facts: Facts) -> Problem:
    """KV heads behind a size that somebody observed."""
    layers, size = random.choice((24, 28, 32, 40, 48)), random.choice((64, 128))
    kv_heads = random.choice((4, 8, 16))
    num_heads = kv_heads * random.choice((3, 5, 7))
    num_bytes = 2 * layers * kv_heads * size * 2
    worked = num_kv_heads_from_bytes(num_bytes, layers, size)
    answer = int(worked)
    slips = {
        "query heads": num_heads,
        "missing factor 2": answer * 2,
        "one byte for each number": answer * 4,
        "layers forgotten": answer * layers,
        "bits for bytes": answer * 16,
    }
    question = (
        f"A server with {num_heads} query heads of size {size}, {layers} layers and a bf16 cache reports {num_bytes:,} "
        "bytes for one token. How many KV heads has the model?"
    )
    return Problem(question, (Part(answer, named(slips), "KV heads"),), worked.derivation)


RANKED = ("qwen3-0.6b", "llama-2-7b", "qwen2.5-7b", "llama-3-8b", "llama-3.2-1b", "opt-13b", "smollm2-135m",
          "tinyllama-1.1b", "qwen2.5-72b", "gemma-7b", "qwen3-8b", "deepseek-v2")  # fmt: skip


def rank_models(random: Random, facts: Facts) -> Problem:
    """Six public models by bytes per token: size says little, layers × KV heads × head size say all."""
    names = random.sample(RANKED, 6)
    size = {name: int(kv_bytes_per_token(name)) for name in names}
    shape = {name: attention_shape(name) for name in names}

    def ranked(keys: dict[str, int]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda name: (-keys[name], name)))

    answer = ranked(size)
    slips = (
        Slip("ranked by parameters", ranked({n: int(num_parameters(n)) for n in names}),
             "A bigger model is not a bigger cache: layers × KV heads × head size decide."),
        Slip("query heads", ranked({n: int(mha_bytes_per_token(n)) for n in names})),
        Slip("upside down", answer[::-1], "The largest cache comes first."),
        Slip("ranked by layers", ranked({n: len(shape[n].layers) for n in names}),
             "Layers are one factor of three: KV heads and head size are the others."),
        Slip("layers forgotten", ranked({n: size[n] // len(shape[n].layers) for n in names})),
    )  # fmt: skip
    question = f"Rank by KV bytes per token in bf16, the largest first: {', '.join(names)}. Give a list of six names."
    working = tuple(f"{name}: {size[name]:,} bytes/token" for name in answer)
    return Problem(question, (Part(answer, slips),), working, {"models": names})


def audit(random: Random, facts: Facts) -> Problem:
    """Four published claims; the right number for each."""
    drawn = random.sample(CLAIMS, 4)
    parts: Sequence[Part] = [claim.part() for claim in drawn]
    lines = "\n".join(f"{i}. {claim.words} [{claim.source}] In {claim.unit}?" for i, claim in enumerate(drawn, 1))
    question = f"Each of these was published, and each is wrong. Give the right numbers, as a list of four:\n{lines}"
    return Problem(question, tuple(parts), tuple(claim.conclusion for claim in drawn))


EXERCISES = (
    Exercise("02.1", "Bytes of one token", (
        "What is kept of a token: K and V, in every layer, for every KV head.",
        "Which of the two numbers of heads counts? The one in the name num_key_value_heads.",
        "2 × layers × KV heads × head size × bytes per number.",
    ), Place(KV_BYTES, "kv_bytes_per_token"), bytes_of_a_config),
    Exercise("02.2", "One cache, three savings", (
        "The saving is 1 − kept / base; only the base differs.",
        "MHA keeps 2 × 128 heads × 128 numbers per token and layer; 67B keeps 2 × 8 × 128 in each of 95 layers.",
        "The third cache takes bits / 16 of V2's bytes in bf16; its base stays in bf16.",
    ), Place(KV_BYTES, "mha_bytes_per_token"), three_ratios),
    Exercise("02.3", "Infer the heads", (
        "Turn the formula round: bytes = 2 × layers × KV heads × head size × 2.",
        "Query heads do not enter: they are never kept.",
        "KV heads = bytes / (2 × layers × head size × 2 bytes).",
    ), Place(KV_BYTES, "num_kv_heads_from_bytes"), infer_heads),
    Exercise("02.4", "Rank six models", (
        "Look up layers, KV heads and head size of each: public_config(name).",
        "The number of parameters does not appear in the formula.",
        "Sort by layers × KV heads × head size; for DeepSeek, (latent + rotary) / 2 stands for KV heads × size.",
    ), Place("minivllm.course.calculators.attention_shape", "attention_shape"), rank_models),
    Exercise("02.5", "Audit four claims", (
        "Write down the config behind each claim, then the formula with units.",
        "Whoever was wrong took query heads, a wrong unit, another model, or forgot a factor.",
        "Compute each with the calculators: kv_bytes_per_token, mha_bytes_per_token, ratio.",
    ), Place(KV_BYTES, "kv_bytes_per_token"), audit),
)  # fmt: skip
