"""Notebook 04, Where does 60-80% of KV memory go: contiguous reservations by hand, buddies, the bar turned round."""

from math import floor
from random import Random

from minivllm.course.calculators import contiguous_requests, mean_live_tokens, tail_waste, tokens_in_pool
from minivllm.course.exercises.buddies import buddy_heap
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, named
from minivllm.course.exercises.place import Place

ALLOCATORS = "minivllm.engine.allocators"
CAPACITY = "minivllm.course.calculators.capacity"
HALF_A_DECIMAL = 0.0501  # percent: 3.1 for 3.05


def longest_reservations(random: Random, facts: Facts) -> Problem:
    """Requests that fit when each reserves max_model_len, and the percent left over."""
    slots, longest = random.randrange(9_000, 30_000), random.choice((1024, 1536, 2048, 3072))
    worked = contiguous_requests(slots, longest)
    fit, left = int(worked), float(worked.parts["left_over"])
    slips = {
        "floor forgotten": slots / longest,
        "rounded up: a request that fits in part does not fit": fit + 1,
        "slots for requests: divide by max_model_len": slots - fit * longest,
        "one kept back: the remainder is below one reservation, so all of these fit": fit - 1,
        "blocks for requests: contiguous allocators know no blocks of 16": slots // 16,
    }
    slips_left = {
        "used share: that is what the reservations take": 100 - left,
        "share of one reservation: the remainder counts against the whole pool": 100 * (slots % longest) / longest,
        "slots for percent: divide by the pool and multiply by 100": float(slots % longest),
        "share of 1 for percent: multiply by 100": left / 100,
        "share of what is reserved: divide by the pool": 100 * (slots % longest) / (fit * longest),
    }
    question = (
        f"A pool of {slots:,} slots; every request reserves max_model_len = {longest:,} slots in one stretch. How many "
        "requests fit, and what percent of the pool is left over, useless for another? One decimal is enough for the "
        "percent. Give a list of two."
    )
    parts = (
        Part(fit, named(slips), "requests", label="requests"),
        Part(left, named(slips_left), "%", label="left over", share=max(0.01, HALF_A_DECIMAL / max(left, 1))),
    )
    working = (*worked.derivation, *worked.parts["left_over"].derivation)
    return Problem(question, parts, working, {"num_slots": slots, "max_model_len": longest})


def slots_of_memory(random: Random, facts: Facts) -> Problem:
    """GiB of KV memory to slots; the paper's GB are GiB."""
    gib, per_token = random.randrange(20, 200) / 4, random.choice((819_200, 524_288, 327_680, 2_359_296))
    worked = tokens_in_pool(gib * 2**30, per_token)
    answer = int(worked)
    slips = {
        "GB for GiB": int(gib * 1e9 // per_token),
        "rounded up: part of a slot holds no token": answer + 1,
        "K and V counted twice: the bytes of a token hold both already": answer // 2,
        "bits for bytes": answer * 8,
        "blocks for slots": answer // 16,
    }
    question = f"{gib:g} GiB are left for K and V, and a token takes {per_token:,} bytes. How many slots is that?"
    return Problem(question, (Part(answer, named(slips), "slots"),), worked.derivation)


def invert_the_bar(random: Random, facts: Facts) -> Problem:
    """From the live share of a measured bar back to tokens per request."""
    percent, slots, requests = random.randrange(150, 450) / 10, random.randrange(9_000, 30_000), random.randrange(5, 15)
    worked = mean_live_tokens(percent / 100, slots, requests)
    answer = float(worked)
    slips = {
        "live share for waste": (1 - percent / 100) * slots / requests,
        "one request: divide by the number of requests": percent / 100 * slots,
        "share forgotten: only the live share holds tokens": slots / requests,
        "percent for share: 20% is 0.2": percent * slots / requests,
        "divided by the share: slots × share are live": slots / requests / (percent / 100),
    }
    question = (
        f"A bar says that {percent:g}% of a pool of {slots:,} slots is live while {requests} requests run. How many "
        "tokens does a request hold on average?"
    )
    return Problem(question, (Part(answer, named(slips), "tokens"),), worked.derivation)


def spread_where_paging_gains_little(random: Random, facts: Facts) -> Problem:
    """Lengths m − s .. m + s: up to which s do 5% fewer slots not pay for paging?"""
    mean, size = random.randrange(300, 1500, 10), random.choice((16, 32))
    held = mean + (size - 1) / 2
    answer = floor(1.05 * held - mean)
    slips = {
        "tail waste forgotten: paged requests hold (B − 1) / 2 empty slots too": floor(0.05 * mean),
        "waste of a whole block": floor(1.05 * (mean + size) - mean),
        "whole range for half of it: lengths reach from m − s to m + s, so the longest is m + s": floor(
            1.05 * held - mean
        )
        * 2,
        "longest for spread: subtract the mean": floor(1.05 * held),
        "5% of the longest: the gain is longest / held − 1, below 0.05": floor(0.05 * held),
    }
    question = (
        f"Lengths are spread evenly over {mean} − s .. {mean} + s tokens. Contiguous memory reserves {mean} + s for "
        f"each request; paging with blocks of {size} holds on average {mean} + ({size} − 1) / 2 slots. Up to which "
        "whole s does paging fit less than 5% more requests?"
    )
    working = (
        *tail_waste(mean, size).derivation,
        f"({mean} + s) / {held:g} < 1.05, so s < 1.05 × {held:g} − {mean} = {1.05 * held - mean:.4g}",
    )
    return Problem(question, (Part(answer, named(slips), "tokens"),), working, {"mean": mean, "block_size": size})


EXERCISES = (
    Exercise("04.1", "Every request reserves the longest", (
        "A reservation is one stretch; only whole ones help.",
        "⌊slots / max_model_len⌋ requests; what remains is smaller than one of them.",
        "percent = 100 × (1 − requests × max_model_len / slots).",
    ), Place(ALLOCATORS, "whole_context"), longest_reservations),
    Exercise("04.2", "From memory to slots", (
        "Which unit is it: GiB or GB?",
        "Bytes = GiB × 2^30; then divide by the bytes of one token.",
        "Only whole slots count: round down.",
    ), Place(CAPACITY, "tokens_in_pool"), slots_of_memory),
    Exercise("04.3", "Split and merge buddies", (
        "Free stretches have lengths 2^k. Take the smallest that is long enough; of those the lowest.",
        "Too long? Give its upper half back to the free ones and go on with the lower one, until it fits.",
        "A buddy starts at start ^ length. If it is free, take it out, and go on with both as one stretch.",
    ), Place(ALLOCATORS, "Buddies"), buddy_heap),
    Exercise("04.4", "Turn the bar round", (
        "Live slots = live share × all slots.",
        "All running requests share them.",
        "tokens = share × slots / requests.",
    ), Place(CAPACITY, "mean_live_tokens"), invert_the_bar),
    Exercise("04.5", "When lengths are equal", (
        "Who needs more slots for one request, and how many more?",
        "The gain is (slots that contiguous memory reserves) / (slots that paging holds) − 1.",
        "(m + s) / (m + (B − 1) / 2) < 1.05; solve for s and round down.",
    ), Place(CAPACITY, "tail_waste"), spread_where_paging_gains_little),
)  # fmt: skip
