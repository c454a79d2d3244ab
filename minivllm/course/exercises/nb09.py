"""Notebook 09, Why does the batch keep changing: steps of a refilled batch, Little's law, the limit that binds."""

from random import Random

from minivllm.course.calculators import continuous_steps, decode_limit, littles_law, static_steps
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, named
from minivllm.course.exercises.place import Place

ADMISSION = "minivllm.engine.admission"


def steps_of_two_batchings(random: Random, facts: Facts) -> Problem:
    """Decode steps of the same outputs, batch by batch and with seats that are refilled."""
    seats = random.choice((2, 3))
    lengths = [random.randrange(2, 30) for _ in range(seats * 3)]
    fixed, refilled = static_steps(lengths, seats), continuous_steps(lengths, seats)
    total, longest = sum(lengths), max(lengths)
    mean = -(-total // seats)
    fixed_slips = {
        "one after the other: a batch advances all its requests by one token in each step": total,
        "longest of all: each batch has a longest of its own, add them up": longest,
        "refilled seats: here nobody comes in before the whole batch is over": int(refilled),
        "shortest of each batch: a batch ends with its last request": sum(
            min(lengths[i : i + seats]) for i in range(0, len(lengths), seats)
        ),
        "evenly spread: that many steps would do if no seat were ever idle": mean,
    }
    refilled_slips = {
        "one after the other: a batch advances all its requests by one token in each step": total,
        "batch by batch: here the next request takes a seat as soon as one is free": int(fixed),
        "longest of all: others may still run, or begin, when it has ended": longest,
        "evenly spread: requests are whole, one seat may have more to do than another": mean,
        "one seat more: follow the seats one by one": int(continuous_steps(lengths, seats + 1)),
    }
    parts = (
        Part(int(fixed), named(fixed_slips), "steps", label="batch by batch"),
        Part(int(refilled), named(refilled_slips), "steps", label="refilled"),
    )
    question = (
        f"Requests want {lengths} output tokens, in this order; {seats} run at a time, and prompts cost no step. Give "
        "two numbers: the decode steps if each batch runs until its last request is done, and if a seat that becomes "
        "free is taken at once by the next in line."
    )
    working = (fixed.derivation[-1], refilled.derivation[-1])
    return Problem(question, parts, working, {"lengths": lengths, "seats": seats})


def requests_that_run(random: Random, facts: Facts) -> Problem:
    """Little's law for the batch: arrivals times the time that a request runs."""
    rate, outputs, step_ms = random.choice((2.5, 4, 6, 12)), random.randrange(40, 300), random.choice((8, 15, 25, 40))
    time_s = outputs * step_ms / 1000
    worked = littles_law(rate, time_s)
    answer = float(worked)
    slips = {
        "milliseconds for seconds: the rate is per second": answer * 1000,
        "divided instead of multiplied: more arrivals make more guests": rate / time_s,
        "outputs forgotten: a request runs for as many steps as it has tokens": rate * step_ms / 1000,
        "rate forgotten: that is how long one of them runs, in seconds": time_s,
        "steps for seconds: that counts a second for each step": rate * outputs,
        "half of it: everybody stays for all of his steps": answer / 2,
    }
    question = (
        f"{rate:g} requests come every second, each writes {outputs} tokens, a step takes {step_ms} ms and nobody "
        "waits. How many requests run at a time, on average?"
    )
    given = {"rate": rate, "output_tokens": outputs, "step_ms": step_ms}
    return Problem(question, (Part(answer, named(slips), "requests"),), worked.derivation, given)


def limit_that_binds(random: Random, facts: Facts) -> Problem:
    """Seats, token budget or pool: the tightest says how many decode at once."""
    seats, budget = random.choice((24, 48, 96, 160)), random.choice((32, 64, 128, 256))
    size, tokens = 16, random.randrange(200, 900)
    each = -(-tokens // size)
    num_blocks = each * random.randrange(20, 200) + random.randrange(1, each)
    pool = num_blocks // each
    worked = decode_limit(seats, budget, pool)
    answer = int(worked)
    slips = {
        "seats alone: the budget and the pool may be tighter": seats,
        "budget alone: a decode takes one token of it; seats and pool may be tighter": budget,
        "pool alone: seats and budget may be tighter": pool,
        "blocks for requests: a request needs several": num_blocks,
        "tokens for blocks: the pool is counted in blocks of 16 tokens": num_blocks // tokens,
        "added up: they are three limits on one number": seats + budget + pool,
    }
    slips = {name: value for name, value in slips.items() if value != answer}
    question = (
        f"max_num_seqs = {seats}, max_num_batched_tokens = {budget}, and {num_blocks:,} free blocks of {size} tokens. "
        f"Every request holds {tokens} tokens. How many can decode in one step?"
    )
    working = (f"pool: ⌊{num_blocks:,} / ⌈{tokens} / {size}⌉⌋ = {pool} requests", worked.derivation[-1])
    given = {"max_num_seqs": seats, "max_num_batched_tokens": budget, "num_blocks": num_blocks, "tokens": tokens}
    return Problem(question, (Part(answer, named(slips), "requests"),), working, given)


EXERCISES = (
    Exercise("09.1", "Steps, batch by batch and refilled", (
        "Draw the seats as rows and let each request take its steps.",
        "Batch by batch: cut the list into groups as large as the seats; each group takes as long as its longest.",
        "Refilled: give the next length to the seat that is free first; the answer is where the last seat ends.",
    ), Place(ADMISSION, "Admission._admit_waiting"), steps_of_two_batchings),
    Exercise("09.2", "How many run at a time?", (
        "How long does one request stay in the batch?",
        "Time in the batch = output tokens × time of a step, in seconds.",
        "Little's law: requests there = arrivals a second × seconds that each stays.",
    ), Place("minivllm.lab.room_load", "Guests.due"), requests_that_run),
    Exercise("09.3", "The limit that binds", (
        "Three limits hold at once: seats, tokens of a step, blocks.",
        "A decoding request takes one seat, one token of the budget, and ⌈tokens / 16⌉ blocks.",
        "min(max_num_seqs, max_num_batched_tokens, ⌊free blocks / ⌈tokens / 16⌉⌋)",
    ), Place(ADMISSION, "Admission._admit_after"), limit_that_binds),
)  # fmt: skip
