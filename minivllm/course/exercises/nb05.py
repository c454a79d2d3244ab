"""Notebook 05, What exactly is a block table: translate, append, map slots, own, count, find a double free."""

from random import Random

from minivllm.course.calculators import blocks_needed, slot_of
from minivllm.course.exercises import nb05_code
from minivllm.course.exercises.exercise import Exercise, Facts, Part, Problem, Slip, named
from minivllm.course.exercises.place import Place

TABLES, POOL = "minivllm.engine.tables", "minivllm.engine.block_pool"


def translate(random: Random, facts: Facts) -> Problem:
    """Ten positions to slots."""
    size, num_blocks = random.choice((4, 8, 16)), random.randrange(4, 7)
    table = random.sample(range(1, 40), num_blocks)
    positions = sorted(random.sample(range(num_blocks * size), 10))
    worked = [slot_of(position, table, size) for position in positions]
    slips = {
        "logical block for physical": tuple(positions),
        "offset forgotten": tuple(table[p // size] * size for p in positions),
        "block forgotten: that is the offset inside the block; add block × block size": tuple(
            p % size for p in positions
        ),
        "block for slot: multiply the table's entry by the block size": tuple(table[p // size] for p in positions),
        "counted from one: positions and offsets are counted from 0": tuple(
            table[p // size] * size + p % size + 1 for p in positions
        ),
        "next block": tuple(table[(p // size + 1) % num_blocks] * size + p % size for p in positions),
    }
    answer = tuple(int(slot) for slot in worked)
    question = f"Block size {size}, block table {table}. In which slots do these positions lie: {positions}?"
    working = (worked[-1].derivation[-1], f"all ten: {list(answer)}")
    given = {"block_size": size, "block_table": table, "positions": positions}
    return Problem(question, (Part(answer, named(slips), "slots"),), working, given)


def blocks_after_a_trace(random: Random, facts: Facts) -> Problem:
    """Blocks in use after requests came, grew and left."""
    size = random.choice((8, 16))
    num_requests = random.randrange(3, 5)
    prompts = [random.randrange(5, 90) for _ in range(num_requests)]
    steps = [random.randrange(2, 40) for _ in range(num_requests)]
    finished = random.randrange(num_requests)
    stored = [prompt + num_steps for prompt, num_steps in zip(prompts, steps, strict=True)]
    live = [tokens for i, tokens in enumerate(stored) if i != finished]
    counts = [int(blocks_needed(tokens, size)) for tokens in live]
    answer = sum(counts)
    slips = {
        "all tokens pooled: blocks are not shared, each request has its own last block": int(
            blocks_needed(sum(live), size)
        ),
        "rounded down": sum(tokens // size for tokens in live),
        "finished request counted: it gave its blocks back": answer + int(blocks_needed(stored[finished], size)),
        "prompts only: every decode step stores one token more": sum(
            int(blocks_needed(prompt, size)) for i, prompt in enumerate(prompts) if i != finished
        ),
        "one block too many: count the last block of each request once": answer + len(live),
        "slots for blocks: divide by the block size": sum(live),
    }
    lines = [
        f"{name}: a prompt of {prompt} tokens was stored, then {num_steps} decode steps stored one token each"
        for name, prompt, num_steps in zip("ABCD", prompts, steps, strict=False)
    ]
    lines.append(f"{'ABCD'[finished]} finished and was freed")
    question = f"Block size {size}, nothing is shared.\n" + "\n".join(lines) + "\nHow many blocks are in use?"
    working = tuple(f"⌈{tokens} / {size}⌉ = {n} blocks" for tokens, n in zip(live, counts, strict=True))
    given = {"block_size": size, "stored": live}
    return Problem(question, (Part(answer, named(slips), "blocks"),), (*working, f"sum: {answer} blocks"), given)


def double_free(random: Random, facts: Facts) -> Problem:
    """A log of takes and frees; which line frees a block that is free?"""
    lines: list[str] = []
    owner: dict[int, str] = {}
    free = list(range(1, 7))
    was_freed: list[int] = []
    bad = random.randrange(5, 8)
    for number in range(1, 9):
        if number == bad:
            lines.append(f"{random.choice('AB')} frees block {random.choice(was_freed)}")
        elif owner and (number == bad - 1 or (number > 2 and random.random() < 0.3)):
            block = random.choice(list(owner))
            lines.append(f"{owner.pop(block)} frees block {block}")
            free.append(block)
            was_freed.append(block)
        else:
            block = free.pop(0)
            owner[block] = random.choice("AB")
            lines.append(f"{owner[block]} takes block {block}")
            was_freed = [id_ for id_ in was_freed if id_ != block]
    reasons = {i: line for i, line in enumerate(lines, 1) if i != bad}
    wrong = tuple(
        Slip(f"line {i} is right", i, f"“{words}”: follow that block from the top; it was in the right hands.")
        for i, words in reasons.items()
    )
    listing = "\n".join(f"{i}  {line}" for i, line in enumerate(lines, 1))
    question = f"Blocks 1 to 6 are free at first. One line frees a block that is free already. Which line?\n{listing}"
    working = (f"line {bad}: {lines[bad - 1]}, which nobody holds at that moment",)
    return Problem(question, (Part(bad, wrong),), working, {"log": lines})


EXERCISES = (
    Exercise("05.1", "Translate ten positions", (
        "A position splits in two: which logical block, and which place inside it.",
        "Logical block = position // block size; offset = position % block size.",
        "slot = block_table[position // size] × size + position % size.",
    ), Place(TABLES, "slot_of"), translate),
    Exercise("05.2", "append_slot", (
        "When does the table need a new block? Compare num_tokens with the slots it has.",
        "A new block comes from the front of the free list, and goes to the end of the table.",
        "if num_tokens == len(block_ids) * block_size: block_ids.append(free_ids.pop(0)); then translate num_tokens.",
    ), Place("minivllm.engine.kv_manager", "KVManager.grow"), nb05_code.append_slot_problem),
    Exercise("05.3", "slot_mapping", (
        "The new tokens have the positions num_computed .. num_computed + num_new − 1.",
        "Each position goes through the table; two neighbours may lie in blocks far apart.",
        "[block_ids[p // size] * size + p % size for p in range(num_computed, num_computed + num_new)]",
    ), Place(TABLES, "slot_of"), nb05_code.slot_mapping_problem),
    Exercise("05.4", "Whose block is it?", (
        "Every block but 0 is either free or in exactly one place of one table (nothing is shared here).",
        "Collect all ids of the tables and of the free list in one list.",
        "sorted(all ids) == list(range(1, num_blocks)): then none is missing, double, or the null block.",
    ), Place("minivllm.lab.invariants", "_check_ownership"), nb05_code.is_sound_problem),
    Exercise("05.5", "Blocks after a trace", (
        "Who still holds blocks at the end?",
        "Tokens stored by each: its prompt and one for each decode step.",
        "Add up ⌈tokens / block size⌉ over the requests that are left.",
    ), Place("minivllm.engine.allocators", "blocks_needed"), blocks_after_a_trace),
    Exercise("05.6", "Diagnose a double free", (
        "Keep a list of who holds which block, line by line.",
        "A block may be freed only between a take and the next free of the same block.",
        "Look for the first free of a block that stands in nobody's list.",
    ), Place(POOL, "BlockPool.release"), double_free),
)  # fmt: skip
