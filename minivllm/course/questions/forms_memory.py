"""Numeric forms of groups B, C and D: what allocators waste, where a token lies, what sharing saves."""

from random import Random

from minivllm.course.calculators import (
    Worked,
    amdahl_speedup,
    blocks_needed,
    contiguous_requests,
    empty_slots,
    external_fragmentation,
    hit_rate_with_room_for_one,
    kv_bytes_of_sequence,
    memory_bar,
    optimal_hit_rate,
    prefix_hit_rate,
    shared_blocks,
    sharing_saving,
    slot_of,
    slots_of_request,
    tail_waste,
)
from minivllm.course.numeric_forms import Form, Problem, Slip
from minivllm.course.questions.models import GROUPED, any_of, in_words


def fragmentation_of_holes(random: Random) -> Problem:
    holes = [random.randint(2, 40) for _ in range(random.randint(4, 6))]
    truth = external_fragmentation(holes)
    ask = f"The free slots lie in holes of {in_words(holes)}. What percent of them can no contiguous request use?"
    slips = (
        Slip("longest run for fragmentation", 100 - float(truth)),
        Slip("holes counted", 100 * (1 - 1 / len(holes))),
    )
    return Problem(ask, "%", truth, slips)


def internal_slots(random: Random) -> Problem:
    prompt, output = random.randint(40, 400), random.randint(60, 400)
    now, reserved = random.randint(5, output - 20), random.choice([1024, 2048])
    truth = slots_of_request(prompt, now, output, reserved).parts["internal"]
    ask = (
        f"{reserved:,} slots were reserved. The prompt has {prompt} tokens, {now} tokens of output are written, and "
        f"the output will end at {output}. How many slots are internal fragmentation?"
    )
    slips = (
        Slip("reserved counted as wasted", reserved - prompt - now),
        Slip("reserved for internal", output - now),
        Slip("live counted as wasted", reserved),
    )
    return Problem(ask, "slots", truth, slips)


def waste_of_a_bar(random: Random) -> Problem:
    live, later = random.randint(15, 40), random.randint(8, 25)
    internal = random.randint(5, 100 - live - later - 5)
    outside = 100 - live - later - internal
    truth = memory_bar(live, later, internal, outside)
    ask = (
        f"Of the KV memory {live}% holds tokens, {later}% is reserved for later, {internal}% is internal and "
        f"{outside}% external fragmentation. What percent is waste, as figure 2 of the PagedAttention paper counts?"
    )
    slips = (
        Slip("live share for waste", live),
        Slip("external only", outside),
        Slip("reserved left out", internal + outside),
    )
    return Problem(ask, "%", truth, slips)


def requests_reserved_in_full(random: Random) -> Problem:
    slots, longest = random.randint(6_000, 40_000), random.choice([1024, 2048, 4096])
    used = random.randint(200, 700)
    ask = (
        f"A pool of {slots:,} slots; each request reserves {longest:,} slots, and uses {used} on average. "
        "How many requests run at once?"
    )
    slips = (Slip("floor forgotten", slots / longest), Slip("used for reserved", slots // used))
    return Problem(ask, "requests", contiguous_requests(slots, longest), slips)


def mean_tail_waste(random: Random) -> Problem:
    size, tokens = random.choice([32, 64, 128, 256]), random.randint(60, 600)
    tail = (size - 1) / 2
    ask = (
        f"Requests hold {tokens} tokens on average, in blocks of {size}; every length is equally likely. "
        "What percent of the slots held is empty?"
    )
    slips = (
        Slip("waste of a whole block", 100 * size / (tokens + size)),
        Slip("waste as a share of the tokens", 100 * tail / tokens),
    )
    return Problem(ask, "%", tail_waste(tokens, size), slips)


def bytes_of_a_block(random: Random) -> Problem:
    model, size = any_of(random, GROUPED), random.choice([8, 16, 32, 64])
    truth = kv_bytes_of_sequence(model.name, size)
    ask = f"How many KiB does a block of {size} tokens hold, over all layers, in bf16? {model}."
    slips = (
        Slip("query heads", float(truth) * model.group),
        Slip("missing factor 2", float(truth) / 2),
        Slip("layers forgotten", float(truth) / model.layers),
        Slip("one token", float(truth) / size),
    )
    return Problem(ask, "KiB", truth, slips)


def entries_of_a_table(random: Random) -> Problem:
    size, tokens = random.choice([16, 32, 64, 128]), random.randint(300, 5_000)
    truth = blocks_needed(tokens, size)
    ask = f"How many entries has the block table of a request of {tokens:,} tokens, with blocks of {size}?"
    slips = (
        Slip("rounded down", tokens // size),
        Slip("floor forgotten", tokens / size),
        Slip("slots for blocks", int(truth) * size),
    )
    return Problem(ask, "blocks", truth, slips)


def empty_slots_of_requests(random: Random) -> Problem:
    size, lengths = random.choice([16, 32, 64]), [random.randint(10, 400) for _ in range(4)]
    empty = empty_slots(lengths, size)
    truth = Worked(sum(map(int, empty)), "slots", (*empty.derivation, f"empty slots in all = {sum(map(int, empty))}"))
    ask = f"Four requests hold {in_words(lengths)} tokens in blocks of {size}. How many slots are empty in all?"
    slips = (
        Slip("waste of a whole block", size * len(lengths)),
        Slip("mean for these lengths", (size - 1) / 2 * len(lengths)),
    )
    return Problem(ask, "slots", truth, slips)


def slot_of_a_position(random: Random) -> Problem:
    size, table = random.choice([8, 16, 32]), random.sample(range(2, 60), 5)
    position = random.randint(size + 1, 4 * size - 1)
    index, offset = divmod(position, size)
    ask = f"Blocks of {size}, block table {table}. In which slot does position {position} lie?"
    slips = (
        Slip("logical block for physical", position),
        Slip("offset forgotten", table[index] * size),
        Slip("next block", table[index + 1] * size + offset),
    )
    return Problem(ask, "", slot_of(position, table, size), slips)


def worth_of_indirection(random: Random) -> Problem:
    slower, part = random.choice([0.20, 0.22, 0.24, 0.26]), random.choice([0.15, 0.2, 0.25, 0.3, 0.4])
    more = random.choice([1.8, 2.2, 2.6, 3.0])
    step = amdahl_speedup(part, 1 / (1 + slower))
    ask = (
        f"A paged kernel is {slower:.0%} slower than a contiguous one, attention is {part:.0%} of the step, and paging "
        f"lets {more:g} times as many requests run. Steps are otherwise as long as before: by what factor does "
        "throughput change?"
    )
    slips = (
        Slip("whole step slowed", more / (1 + slower)),
        Slip("gain forgotten", float(step)),
        Slip("loss forgotten", more),
    )
    return Problem(ask, "×", step * more, slips)


def saved_by_samples(random: Random) -> Problem:
    samples, part = random.choice([2, 3, 4, 5, 6, 8]), random.choice([0.1, 0.15, 0.3, 0.45, 0.6, 0.8])
    ask = (
        f"{samples} samples of one prompt share the prompt's blocks; the prompt is {part:.0%} of each sequence. "
        "What percent of the cache does sharing save?"
    )
    slips = (
        Slip("all samples counted", 100 * part),
        Slip("share not multiplied", 100 * (samples - 1) / samples),
    )
    return Problem(ask, "%", sharing_saving(part, samples), slips)


def hit_rate_of_a_preamble(random: Random) -> Problem:
    requests, shared, own = random.randint(3, 12), random.randint(100, 800), random.randint(20, 400)
    ask = (
        f"{requests} requests arrive one after the other. They share their first {shared} tokens and bring {own} of "
        "their own. What percent of all prompt tokens does a token-level prefix cache find?"
    )
    slips = (
        Slip("first request counted", 100 * shared / (shared + own)),
        Slip("share not multiplied", 100 * (requests - 1) / requests),
    )
    return Problem(ask, "%", prefix_hit_rate(requests, shared, own), slips)


def tokens_found_in_blocks(random: Random) -> Problem:
    shared, size = random.randint(50, 900), random.choice([16, 32, 64])
    blocks = shared_blocks(shared, size)
    ask = (
        f"Two prompts share their first {shared} tokens and then differ. Blocks hold {size}. How many tokens does the "
        "second one find in a hash-chain cache of full blocks?"
    )
    slips = (
        Slip("block rounding forgotten", shared),
        Slip("blocks for slots", int(blocks)),
        Slip("rounded up", (int(blocks) + 1) * size),
    )
    return Problem(ask, "tokens", blocks * Worked(size, "tokens/block", ()), slips)


def best_order(random: Random) -> Problem:
    stems = ["".join(random.choices("ABCD", k=random.randint(3, 5))) for _ in range(3)]
    prompts = [random.choice(stems) + "".join(random.choices("EFG", k=random.randint(1, 3))) for _ in range(5)]
    as_numbers = [[ord(letter) for letter in prompt] for prompt in prompts]
    truth = optimal_hit_rate(as_numbers)
    ask = (
        f"Five prompts, a letter for each token: {', '.join(prompts)}. The cache has room for one prompt. What hit "
        "rate, in percent of all prompt tokens, does the best order reach?"
    )
    slips = (
        Slip("order as given", float(hit_rate_with_room_for_one(as_numbers))),
        Slip("share for its complement", 100 - float(truth)),
    )
    return Problem(ask, "%", truth, slips)


FORMS: dict[str, Form] = {
    "B2": fragmentation_of_holes, "B3": internal_slots, "B5": waste_of_a_bar, "B6": requests_reserved_in_full,
    "B8": mean_tail_waste, "C2": bytes_of_a_block, "C3": entries_of_a_table, "C6": empty_slots_of_requests,
    "C8": slot_of_a_position, "C11": worth_of_indirection, "D3": saved_by_samples, "D7": hit_rate_of_a_preamble,
    "D9": tokens_found_in_blocks, "D11": best_order,
}  # fmt: skip
