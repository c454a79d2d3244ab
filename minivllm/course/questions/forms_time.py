"""Numeric forms of groups E and F: steps, limits and queues; prefill against decode, and the link between them."""

from random import Random

from minivllm.course.calculators import (
    accelerator,
    chunk_steps,
    compute_ms,
    continuous_steps,
    critical_batch,
    decode_bytes,
    decode_limit,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    littles_law,
    md1_ttft_s,
    num_parameters,
    prefill_workers_per_decode_worker,
    ratio,
    read_ms,
    recompute_us_per_token,
    required_bandwidth,
    saving,
    sequences_in_pool,
    static_idle_share,
    static_steps,
    swap_us_per_token,
    weight_bytes,
)
from minivllm.course.numeric_forms import Form, Problem, Slip
from minivllm.course.questions.models import CARDS, LARGE, ON_ONE_CARD, any_of, in_words, with_parameters


def idle_in_a_batch(random: Random) -> Problem:
    lengths = [random.randint(5, 200) for _ in range(random.randint(4, 6))]
    truth = static_idle_share(lengths)
    ask = f"A static batch generates {in_words(lengths)} tokens. What percent of its slots' steps are idle?"
    slips = (
        Slip("share for its complement", 100 - float(truth)),
        Slip("shortest for mean", 100 * (1 - min(lengths) / max(lengths))),
    )
    return Problem(ask, "%", truth, slips)


def steps_with_free_slots(random: Random) -> Problem:
    slots, lengths = random.choice([2, 3, 4]), [random.randint(5, 90) for _ in range(random.randint(7, 9))]
    ask = (
        f"Requests of {in_words(lengths)} output tokens wait in this order for {slots} slots. A free slot is filled "
        "at once, a step makes one token for each running request. How many decode steps in all?"
    )
    slips = (
        Slip("static for continuous", float(static_steps(lengths, slots))),
        Slip("sum of all lengths", sum(lengths)),
        Slip("longest only", max(lengths)),
        Slip("perfect packing", -(-sum(lengths) // slots)),
    )
    return Problem(ask, "steps", continuous_steps(lengths, slots), slips)


def tightest_limit(random: Random) -> Problem:
    each = random.choice([500, 1000, 2000])
    pool_tokens, slots = random.randint(20, 400) * 997, random.choice([32, 64, 128, 256])
    budget = random.choice([48, 96, 512, 2048])
    pool = sequences_in_pool(pool_tokens, each)
    truth = decode_limit(slots, budget, pool)
    ask = (
        f"max_num_seqs = {slots}, max_num_batched_tokens = {budget}, a pool of {pool_tokens:,} tokens, and requests "
        f"that hold {each:,} tokens each. How many of them can decode in one step?"
    )
    looser = sorted({slots, budget, int(pool)} - {int(truth)})
    return Problem(ask, "requests", truth, tuple(Slip("looser limit", limit) for limit in looser))


def recompute_against_swap(random: Random) -> Problem:
    model, chip = any_of(random, ON_ONE_CARD), random.choice(CARDS)
    link, efficiency = random.choice([12e9, 25e9, 50e9]), random.choice([0.4, 0.6])
    count, per_token = num_parameters(model.name), kv_bytes_per_token(model.name)
    truth = ratio(recompute_us_per_token(count, chip, efficiency), swap_us_per_token(per_token, link, 2))
    ask = (
        f"How many times as long as swapping a token's cache out and back in does recomputing it take? "
        f"{with_parameters(model)}, cache in bf16, {chip} ({accelerator(chip).flops_of() / 1e12:g} TFLOP/s) at "
        f"{efficiency:.0%} of its rate, link of {link / 1e9:g} GB/s."
    )
    slips = (
        Slip("one way only", 2 * float(truth)),
        Slip("one parameter one FLOP", float(truth) / 2),
        Slip("efficiency forgotten", float(truth) * efficiency),
        Slip("ratio upside down", 1 / float(truth)),
    )
    return Problem(ask, "×", truth, slips)


def requests_present(random: Random) -> Problem:
    rate, ttft, tpot, tokens = (
        random.choice([2, 3, 5, 8, 12]), random.choice([0.2, 0.4, 0.6]), random.choice([0.02, 0.03, 0.05]),
        random.randint(80, 400),
    )  # fmt: skip
    time = ttft + (tokens - 1) * tpot
    ask = (
        f"{rate} requests/s arrive; each waits {ttft * 1e3:g} ms for its first of {tokens} tokens and "
        f"{tpot * 1e3:g} ms for every further one. How many are in the system on average?"
    )
    slips = (
        Slip("generated tokens forgotten", rate * ttft),
        Slip("rate over time", rate / time),
        Slip("one token", rate * (ttft + tpot)),
    )
    return Problem(ask, "requests", littles_law(rate, time), slips)


def kv_share_of_a_step(random: Random) -> Problem:
    model, batch = any_of(random, ON_ONE_CARD), random.choice([4, 8, 16, 32])
    tokens = random.choice([1024, 2048, 4096, 8192])
    weights, held = weight_bytes(model.name), kv_bytes_of_sequence(model.name, tokens)
    truth = saving(weights, decode_bytes(weights, held, batch))

    def share(cache: float) -> float:
        return 100 * cache / (float(weights) + cache)

    ask = (
        f"{batch} requests decode at {tokens:,} tokens each. What percent of the bytes that a step reads is cache? "
        f"{with_parameters(model)}; the cache is bf16."
    )
    slips = (
        Slip("share for its complement", 100 - float(truth)),
        Slip("batch forgotten", share(float(held))),
        Slip("query heads", share(batch * float(held) * model.group)),
        Slip("missing factor 2", share(batch * float(held) / 2)),
    )
    return Problem(ask, "%", truth, slips)


def tokens_to_fill_the_chip(random: Random) -> Problem:
    chip, dtype = random.choice(["a100", "h100", "h200", "b200", "l40s", "v5e"]), random.choice(["int8", "int4"])
    card = accelerator(chip)
    truth = critical_batch(chip, dtype)
    ask = (
        f"{card.name}: {card.flops_of() / 1e12:g} TFLOP/s in bf16, {card.bandwidth / 1e12:g} TB/s. Weights are stored "
        f"in {dtype} and multiplied in bf16. From how many tokens in a step does computing take longer than reading "
        "the weights?"
    )
    slips = (
        Slip("weight size forgotten", card.flops_of() / card.bandwidth),
        Slip("ridge upside down", 1 / float(truth)),
    )
    return Problem(ask, "tokens", truth, slips)


def decode_floor(random: Random) -> Problem:
    model, chip, num_gpus = any_of(random, LARGE), random.choice(CARDS), random.choice([4, 8])
    card, count = accelerator(chip), num_parameters(model.name)
    weights = weight_bytes(model.name)
    truth = read_ms(weights, chip, num_gpus)
    ask = (
        f"What is the floor of a decode step at batch 1 and short context on {num_gpus} × {card.name} "
        f"({card.bandwidth / 1e12:g} TB/s each)? {with_parameters(model)}."
    )
    slips = (
        Slip("one GPU", float(truth) * num_gpus),
        Slip("one byte for each number", float(truth) / 2),
        Slip("compute instead of memory", float(compute_ms(2 * float(count), chip, num_gpus))),
    )
    return Problem(ask, "ms", truth, slips)


def steps_of_a_prompt(random: Random) -> Problem:
    prompt, budget = random.randint(5_000, 60_000), random.choice([512, 1024, 2048])
    decodes = random.randint(40, budget // 4)
    ask = (
        f"Each step has a budget of {budget:,} tokens, and {decodes} requests decode meanwhile. In how many steps is a "
        f"prompt of {prompt:,} tokens prefilled?"
    )
    slips = (
        Slip("decodes forgotten", -(-prompt // budget)),
        Slip("decodes added", -(-prompt // (budget + decodes))),
        Slip("rounded down", prompt // (budget - decodes)),
    )
    return Problem(ask, "steps", chunk_steps(prompt, budget, decodes), slips)


def link_between_pools(random: Random) -> Problem:
    model, prompt, rate = any_of(random, LARGE), random.choice([512, 1024, 2048, 4000]), random.randint(2, 20)
    truth = required_bandwidth(kv_bytes_per_token(model.name), prompt, rate)
    ask = (
        f"Prefill workers send the cache of {rate} prompts/s, {prompt:,} tokens each, to decode workers. How many "
        f"Gbit/s must the link carry, in bf16? {model}."
    )
    slips = (
        Slip("bytes for bits", float(truth) / 8),
        Slip("missing factor 2", float(truth) / 2),
        Slip("query heads", float(truth) * model.group),
        Slip("one token", float(truth) / prompt),
    )
    return Problem(ask, "Gbit/s", truth, slips)


def first_token_under_load(random: Random) -> Problem:
    prefill, busy = random.choice([0.05, 0.1, 0.2, 0.4]), random.choice([0.4, 0.5, 0.6, 0.7, 0.8])
    truth = md1_ttft_s(busy / prefill, prefill)
    wait = float(truth) - prefill
    ask = (
        f"Prompts arrive at random, {busy / prefill:g} a second; each prefill takes {prefill * 1e3:g} ms and one runs "
        "at a time. What is the mean time to the first token?"
    )
    slips = (
        Slip("no queue", prefill),
        Slip("wait without service", wait),
        Slip("twice the wait", prefill + 2 * wait),
    )
    return Problem(ask, "ms", truth, slips)


def workers_for_a_decoder(random: Random) -> Problem:
    prefill, step = random.randint(100, 900), random.choice([12, 15, 20, 30])
    batch, output = random.choice([16, 32, 64]), random.choice([128, 200, 300, 512])
    truth = prefill_workers_per_decode_worker(prefill, batch, step, output)
    ask = (
        f"A prefill takes {prefill} ms; a decode worker runs batches of {batch}, {step} ms a step, {output} tokens a "
        "request. How many prefill workers keep one decode worker busy, as a fraction?"
    )
    slips = (
        Slip("workers upside down", 1 / float(truth)),
        Slip("batch forgotten", float(truth) / batch),
        Slip("generated tokens forgotten", float(truth) * output),
    )
    return Problem(ask, "workers", truth, slips)


FORMS: dict[str, Form] = {
    "E1": idle_in_a_batch, "E6": steps_with_free_slots, "E9": tightest_limit, "E11": recompute_against_swap,
    "E14": requests_present, "F2": kv_share_of_a_step, "F3": tokens_to_fill_the_chip, "F4": decode_floor,
    "F6": steps_of_a_prompt, "F11": link_between_pools, "F12": first_token_under_load, "F13": workers_for_a_decoder,
}  # fmt: skip
