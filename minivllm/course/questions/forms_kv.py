"""Numeric forms of groups A and K: bytes of the cache, who fits, and what each kind of attention keeps."""

from random import Random

from minivllm.course.calculators import (
    accelerator,
    attention_shape,
    capacity,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    kv_bytes_per_token_per_gpu,
    mha_bytes_per_token,
    pool_bytes,
    ratio,
    saving,
    token_forwards,
    tokens_where_kv_passes_weights,
    weight_bytes,
)
from minivllm.course.numeric_forms import Form, Problem, Slip
from minivllm.course.questions.models import (
    CARDS,
    GROUPED,
    LARGE,
    ON_ONE_CARD,
    WINDOWED,
    any_of,
    facts,
    with_parameters,
)

BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


def recomputed_tokens(random: Random) -> Problem:
    num = random.randint(12, 400)
    ask = f"Without a cache, each step runs the whole text again. How many token-forwards for {num} tokens in all?"
    slips = (Slip("square for the sum", num**2), Slip("the last step's tokens", num))
    return Problem(ask, "token-forwards", token_forwards(num), slips)


def bytes_per_token(random: Random) -> Problem:
    layers, size, dtype = random.randint(16, 80), random.choice([64, 96, 128]), random.choice(list(BYTES))
    kv_heads, group = random.choice([2, 4, 8]), random.choice([3, 4, 5, 6, 7])
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads, "head_dim": size, "hidden_size": kv_heads * group * size,
    }  # fmt: skip
    truth = kv_bytes_per_token(config, dtype)
    ask = (
        f"A model has {layers} layers, hidden size {kv_heads * group * size:,}, {kv_heads * group} query heads, "
        f"{kv_heads} KV heads and head size {size}. How many bytes of cache does a token take in {dtype}?"
    )
    slips = (
        Slip("query heads", float(truth) * group),
        Slip("missing factor 2", float(truth) / 2),
        Slip("layers forgotten", float(truth) / layers),
    )
    return Problem(ask, "bytes", truth, slips)


def bytes_of_request(random: Random) -> Problem:
    model, tokens = any_of(random, LARGE), random.choice([2, 4, 8, 16, 32, 64]) * 1024
    truth = kv_bytes_of_sequence(model.name, tokens)
    ask = f"How much cache does one request of {tokens:,} tokens hold in bf16? {model}."
    slips = (
        Slip("query heads", float(truth) * model.group),
        Slip("missing factor 2", float(truth) / 2),
        Slip("layers forgotten", float(truth) / model.layers),
        Slip("one token", float(truth) / tokens),
    )
    return Problem(ask, "GB", truth, slips)


def after_changes(random: Random) -> Problem:
    model = any_of(random, GROUPED)
    longer, batch = random.choice([2, 3, 4]), random.choice([3, 5, 6])
    before = kv_bytes_of_sequence(model.name, 4096, "bf16")
    after = batch * kv_bytes_of_sequence(model.name, longer * 4096, "fp8")
    ask = (
        f"An operator serves {batch} requests for each one before, lets each grow {longer} times as long, and moves "
        "the cache from bf16 to fp8. By what factor does the memory of the cache change?"
    )
    truth = ratio(float(after), float(before))
    slips = (
        Slip("dtype forgotten", float(truth) * 2),
        Slip("one request", float(truth) / batch),
        Slip("ratio upside down", 1 / float(truth)),
    )
    return Problem(ask, "×", truth, slips)


def users_on_a_card(random: Random) -> Problem:
    model, card = any_of(random, ON_ONE_CARD), accelerator(random.choice(CARDS))
    tokens = random.choice([4096, 6000, 8192, 16384])
    truth = capacity(model.name, card, tokens)
    each, weights = float(kv_bytes_of_sequence(model.name, tokens)), float(weight_bytes(model.name))
    pool = 0.9 * card.memory_bytes - weights
    ask = (
        f"How many requests of {tokens:,} tokens fit a card of {card.memory_bytes / 1e9:g} GB, of which the engine may "
        f"use 90%? {with_parameters(model)}; the cache is bf16 too."
    )
    slips = (
        Slip("floor forgotten", pool / each),
        Slip("weights forgotten", 0.9 * card.memory_bytes // each),
        Slip("utilisation forgotten", (card.memory_bytes - weights) // each),
        Slip("query heads", pool // (each * model.group)),
        Slip("missing factor 2", pool // (each / 2)),
    )
    return Problem(ask, "requests", truth, slips)


def small_against_large(random: Random) -> Problem:
    pairs = [("qwen3-0.6b", "qwen2.5-7b"), ("qwen3-4b", "qwen2.5-7b"), ("opt-1.3b", "llama-3-8b"),
             ("llama-2-7b", "llama-3-70b"), ("gpt2-xl", "llama-3-8b"), ("olmo-1b", "qwen2.5-14b")]  # fmt: skip
    small, large = map(facts, random.choice(pairs))
    above, below = kv_bytes_per_token(small.name), kv_bytes_per_token(large.name)
    truth = ratio(above, below)
    ask = f"How many times the cache per token of the second does the first keep, both in bf16? {small}; {large}."
    slips = (
        Slip("ratio upside down", 1 / float(truth)),
        Slip("query heads", small.layers * small.query_heads * small.head_size
             / (large.layers * large.query_heads * large.head_size)),
        Slip("layers forgotten", small.kv_heads * small.head_size / (large.kv_heads * large.head_size)),
    )  # fmt: skip
    return Problem(ask, "×", truth, slips)


def live_tokens_past_weights(random: Random) -> Problem:
    model = any_of(random, ON_ONE_CARD)
    weights, per_token = weight_bytes(model.name), kv_bytes_per_token(model.name)
    truth = tokens_where_kv_passes_weights(weights, per_token) + 0.0  # a share of it may be off
    ask = (
        "From how many live tokens, over all requests, does a decode step read more cache than weights? "
        f"{with_parameters(model)}; the cache is bf16."
    )
    slips = (
        Slip("query heads", float(truth) / model.group),
        Slip("missing factor 2", float(truth) * 2),
        Slip("layers forgotten", float(truth) * model.layers),
    )
    return Problem(ask, "tokens", truth, slips)


def pool_of_a_card(random: Random) -> Problem:
    model, card = any_of(random, ON_ONE_CARD), accelerator(random.choice(CARDS))
    share, workspace = random.choice([0.8, 0.85, 0.9, 0.92]), random.choice([4, 5, 6]) * 10**9
    weights = weight_bytes(model.name)
    truth = pool_bytes(card.memory_bytes, weights, share, workspace)
    ask = (
        f"A card has {card.memory_bytes / 1e9:g} GB; the engine may use {share:.0%} of it and needs "
        f"{workspace / 1e9:g} GB for activations and graphs. How large is the KV pool? {with_parameters(model)}."
    )
    slips = (
        Slip("utilisation forgotten", card.memory_bytes - float(weights) - workspace),
        Slip("weights forgotten", share * card.memory_bytes - workspace),
        Slip("utilisation after weights", share * (card.memory_bytes - float(weights) - workspace)),
        Slip("workspace forgotten", share * card.memory_bytes - float(weights)),
    )
    return Problem(ask, "GB", truth, slips)


def windowed_request(random: Random) -> Problem:
    model, tokens = any_of(random, WINDOWED), random.choice([16, 24, 32, 64]) * 1024
    layers = attention_shape(model.name).layers
    windows = [layer.window for layer in layers if layer.window]
    window, per_token = windows[0], float(kv_bytes_per_token(model.name))
    truth = kv_bytes_of_sequence(model.name, tokens)
    ask = (
        f"{len(windows)} of the layers have a window of {window:,} tokens. How much cache does a request of "
        f"{tokens:,} tokens hold in bf16, if windowed layers keep no more than they need? {model}."
    )
    slips = (
        Slip("all layers full", per_token * tokens),
        Slip("all layers windowed", per_token * window),
        Slip("query heads", float(truth) * model.group),
        Slip("missing factor 2", float(truth) / 2),
    )
    return Problem(ask, "GB", truth, slips)


def bytes_on_each_gpu(random: Random) -> Problem:
    names = [("qwen2.5-1.5b", 4), ("qwen2.5-3b", 4), ("qwen2.5-3b", 8), ("llama-3-8b", 16), ("llama-3-70b", 32),
             ("qwen2.5-72b", 16), ("llama-3.1-405b", 16), ("tinyllama-1.1b", 8), ("qwen3-8b", 16)]  # fmt: skip
    name, num_gpus = random.choice(names)
    model = facts(name)
    truth = kv_bytes_per_token_per_gpu(name, num_gpus)
    total = float(kv_bytes_per_token(name))
    ask = f"Tensor parallelism over {num_gpus} GPUs: how many bytes of cache per token on each, in bf16? {model}."
    slips = (
        Slip("divided by all GPUs", total / num_gpus),
        Slip("not divided", total),
        Slip("layers forgotten", float(truth) / model.layers),
    )
    return Problem(ask, "bytes", truth, slips)


def grouping_factor(random: Random) -> Problem:
    model = any_of(random, (*GROUPED, *LARGE))
    truth = ratio(mha_bytes_per_token(model.name), kv_bytes_per_token(model.name))
    ask = f"By what factor do grouped queries shrink the cache of {model}, beside K and V for every head?"
    slips = (
        Slip("ratio upside down", 1 / float(truth)),
        Slip("query heads are not the group", model.query_heads),
        Slip("missing factor 2", float(truth) / 2),
    )
    return Problem(ask, "×", truth, slips)


def latent_bytes(random: Random) -> Problem:
    layers, heads = random.randint(24, 64), random.choice([16, 64, 128])
    latent, rotary = random.choice([256, 384, 512]), random.choice([32, 64])
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": 4096,
        "kv_lora_rank": latent, "qk_rope_head_dim": rotary, "qk_nope_head_dim": 128, "v_head_dim": 128,
    }  # fmt: skip
    truth = kv_bytes_per_token(config)
    ask = (
        f"MLA with {layers} layers, {heads} heads, a latent of {latent} and a rotary key of {rotary}: how many bytes "
        "of cache does a token take in bf16?"
    )
    slips = (
        Slip("rotary part forgotten", layers * latent * 2),
        Slip("latent counted twice", layers * (2 * latent + rotary) * 2),
        Slip("kept for every head", float(truth) * heads),
        Slip("layers forgotten", float(truth) / layers),
    )
    return Problem(ask, "bytes", truth, slips)


def saved_by_latent(random: Random) -> Problem:
    latent = random.choice(["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"])
    other = any_of(random, ("deepseek-llm-67b", "llama-3-70b", "llama-3.1-405b", "qwen2.5-72b", "mistral-large-2407"))
    layer, layers = attention_shape(latent).first, len(attention_shape(latent).layers)
    above, below = float(kv_bytes_per_token(other.name)), float(kv_bytes_per_token(latent))
    truth = saving(below, above)
    ask = (
        f"How much smaller, in percent, is the cache per token of {latent} ({layers} layers, latent "
        f"{layer.latent_size}, rotary key {layer.rope_size}) than that of {other}, both in bf16?"
    )
    doubled = layers * (2 * layer.latent_size + layer.rope_size) * 2
    slips = (
        Slip("share for its complement", 100 - float(truth)),
        Slip("query heads", 100 * (1 - below / above / other.group)),
        Slip("latent counted twice", 100 * (1 - doubled / above)),
    )
    return Problem(ask, "%", truth, slips)


def windows_factor(random: Random) -> Problem:
    model, tokens = any_of(random, WINDOWED), random.choice([24, 32, 64, 128]) * 1024
    windows = [layer.window for layer in attention_shape(model.name).layers if layer.window]
    full, held = tokens * float(kv_bytes_per_token(model.name)), kv_bytes_of_sequence(model.name, tokens)
    truth = ratio(full, held)
    ask = (
        f"{len(windows)} of the {model.layers} layers of {model.name} have a window of {windows[0]:,} tokens, all are "
        f"of one width. At {tokens:,} tokens, by what factor do the windows shrink the cache that a step reads?"
    )
    slips = (
        Slip("all layers windowed", tokens / windows[0]),
        Slip("ratio upside down", 1 / float(truth)),
        Slip("windows cost nothing", model.layers / (model.layers - len(windows))),
    )
    return Problem(ask, "×", truth, slips)


FORMS: dict[str, Form] = {
    "A1": recomputed_tokens, "A2": bytes_per_token, "A3": bytes_of_request, "A4": after_changes,
    "A5": users_on_a_card, "A6": small_against_large, "A7": live_tokens_past_weights, "A9": pool_of_a_card,
    "A11": windowed_request, "A12": bytes_on_each_gpu, "K1": grouping_factor, "K3": latent_bytes,
    "K5": saved_by_latent, "K8": windows_factor,
}  # fmt: skip
