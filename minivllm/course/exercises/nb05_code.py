"""Functions of notebook 05: right ones, which use the engine's, and versions that are wrong in typical ways."""

from random import Random

from minivllm.course.exercises.exercise import Case, CodeProblem, Facts, Subject, call, named
from minivllm.course.exercises.place import Place

SLOT_OF = Place("minivllm.engine.tables", "slot_of")


def engine_slot(position: int, block_ids: list[int], block_size: int) -> int:
    """The engine's slot_of, looked up when it is called: the course imports no engine."""
    slot = SLOT_OF.load()(position, block_ids, block_size)
    assert isinstance(slot, int), "slot_of gives a whole number"
    return slot


def append_slot(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    """The slot of the next token; a full table takes the first free block."""
    if num_tokens == len(block_ids) * block_size:
        block_ids.append(free_ids.pop(0))
    return engine_slot(num_tokens, block_ids, block_size)


def _always_takes(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    block_ids.append(free_ids.pop(0))
    return engine_slot(num_tokens, block_ids, block_size)


def _never_takes(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    return engine_slot(num_tokens, block_ids, block_size)


def _takes_last(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    if num_tokens == len(block_ids) * block_size:
        block_ids.append(free_ids.pop())
    return engine_slot(num_tokens, block_ids, block_size)


def _leaves_free(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    if num_tokens == len(block_ids) * block_size:
        block_ids.append(free_ids[0])
    return engine_slot(num_tokens, block_ids, block_size)


def _previous_slot(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    if num_tokens == len(block_ids) * block_size:
        block_ids.append(free_ids.pop(0))
    return engine_slot(num_tokens - 1, block_ids, block_size) if num_tokens else block_ids[0] * block_size


def _early(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
    if num_tokens + 1 >= len(block_ids) * block_size:
        block_ids.append(free_ids.pop(0))
    return engine_slot(num_tokens, block_ids, block_size)


def run_append(subject: Subject, case: Case) -> object:
    """Slots of several tokens in a row, and the table and free list they leave."""
    block_ids, num_tokens, block_size, free_ids, num_steps = case
    assert isinstance(block_ids, tuple) and isinstance(free_ids, tuple), "cases hold tuples"
    assert isinstance(num_tokens, int) and isinstance(num_steps, int), "and whole numbers"
    table, free = list(block_ids), list(free_ids)
    slots = [subject(table, num_tokens + i, block_size, free) for i in range(num_steps)]
    if None in slots:
        raise NotImplementedError
    return slots, table, free


def append_slot_problem(random: Random, facts: Facts) -> CodeProblem:
    """Tables in all states: empty, partly filled, exactly full."""
    cases: list[Case] = [((), 0, 4, (2, 1), 1), ((5,), 3, 4, (2, 9), 1), ((5,), 4, 4, (2, 9), 1)]
    for _ in range(40):
        size, num_blocks = random.choice((1, 2, 4, 8)), random.randrange(1, 6)
        ids = random.sample(range(1, 60), num_blocks + 14)
        num_tokens = random.randrange((num_blocks - 1) * size + 1, num_blocks * size + 1)
        cases.append((tuple(ids[:num_blocks]), num_tokens, size, tuple(ids[num_blocks:]), random.randrange(1, 13)))
    wrong = {
        "a block for every token: take one only when all slots of the table are full": _always_takes,
        "never a new block: when the table is full, the next token needs one": _never_takes,
        "last free block taken: the engine takes the first; the last was cached most recently": _takes_last,
        "block left in the free list: somebody else will take it too": _leaves_free,
        "slot of the last stored token: the next token has the position num_tokens": _previous_slot,
        "block taken one token too early: num_tokens slots are used, and one more is asked for": _early,
    }
    question = (
        "append_slot returns the slot of the next token of a request that has num_tokens stored. If its blocks are "
        "full, it first moves a block from the front of free_ids to the end of block_ids (change both lists)."
    )
    stub = "def append_slot(block_ids, num_tokens, block_size, free_ids):\n    ..."
    return CodeProblem(question, stub, append_slot, tuple(cases), named(wrong), run_append)


def slot_mapping(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    """Slots of the tokens of this step: positions num_computed .. num_computed + num_new − 1."""
    positions = range(num_computed, num_computed + num_new)
    return [engine_slot(position, block_ids, block_size) for position in positions]


def _from_zero(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    return slot_mapping(block_ids, 0, num_new, block_size)


def _all_positions(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    return slot_mapping(block_ids, 0, num_computed + num_new, block_size)


def _consecutive(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    first = engine_slot(num_computed, block_ids, block_size)
    return list(range(first, first + num_new))


def _no_table(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    return list(range(num_computed, num_computed + num_new))


def _blocks_only(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    return [block_ids[p // block_size] for p in range(num_computed, num_computed + num_new)]


def _no_offset(block_ids: list[int], num_computed: int, num_new: int, block_size: int) -> list[int]:
    return [block_ids[p // block_size] * block_size for p in range(num_computed, num_computed + num_new)]


def slot_mapping_problem(random: Random, facts: Facts) -> CodeProblem:
    """Prefill, chunks and decode steps, with tables out of order."""
    cases: list[Case] = [([7, 1, 3], 37, 1, 16), ([4], 0, 3, 4), ([9, 2], 3, 3, 4)]
    for _ in range(40):
        size, num_blocks = random.choice((1, 2, 4, 16)), random.randrange(1, 7)
        num_tokens = random.randrange((num_blocks - 1) * size + 1, num_blocks * size + 1)
        num_new = random.randrange(1, num_tokens + 1)
        cases.append((random.sample(range(1, 60), num_blocks), num_tokens - num_new, num_new, size))
    wrong = {
        "started at position 0: the new tokens come after num_computed others": _from_zero,
        "all tokens mapped: only the new ones are stored in this step": _all_positions,
        "slots in a row: at a block's end the next position lies in another block of the table": _consecutive,
        "logical block for physical": _no_table,
        "block for slot: multiply by block_size and add the offset": _blocks_only,
        "offset forgotten": _no_offset,
    }
    question = (
        "slot_mapping returns the list of slots into which this step's new tokens are stored: num_new tokens, after "
        "num_computed that are stored already."
    )
    stub = "def slot_mapping(block_ids, num_computed, num_new, block_size):\n    ..."
    return CodeProblem(question, stub, slot_mapping, tuple(cases), named(wrong), call)


def is_sound(tables: list[list[int]], free_ids: list[int], num_blocks: int) -> bool:
    """Every block but the null block is free or in one table, once."""
    return sorted([*free_ids, *(i for table in tables for i in table)]) == list(range(1, num_blocks))


def _sums_only(tables: list[list[int]], free_ids: list[int], num_blocks: int) -> bool:
    return sum(map(len, tables)) + len(free_ids) == num_blocks - 1


def _sets_only(tables: list[list[int]], free_ids: list[int], num_blocks: int) -> bool:
    return {*free_ids, *(i for table in tables for i in table)} == set(range(1, num_blocks))


def _no_double_only(tables: list[list[int]], free_ids: list[int], num_blocks: int) -> bool:
    held = [*free_ids, *(i for table in tables for i in table)]
    return len(set(held)) == len(held)


def _counts_null(tables: list[list[int]], free_ids: list[int], num_blocks: int) -> bool:
    return sorted([*free_ids, *(i for table in tables for i in table)]) == list(range(num_blocks))


def _tables_only(tables: list[list[int]], free_ids: list[int], num_blocks: int) -> bool:
    held = [i for table in tables for i in table]
    return len(set(held)) == len(held)


def is_sound_problem(random: Random, facts: Facts) -> CodeProblem:
    """Sound pools, and pools with a block lost, owned twice, free and owned, or the null block handed out."""
    cases: list[Case] = [([[1], [2]], [3], 4), ([[1], [1]], [2, 3], 4), ([[1]], [3], 4), ([[1], [2]], [2, 3], 4)]
    cases += [([[0], [1]], [2, 3], 4), ([[1], [1]], [3], 4), ([], [1, 2, 3], 4)]
    for _ in range(40):
        num_blocks = random.randrange(6, 14)
        ids = random.sample(range(1, num_blocks), num_blocks - 1)
        cut, middle = random.randrange(2, len(ids)), random.randrange(1, 3)
        tables, free = [ids[:middle], ids[middle:cut]], ids[cut:]
        match random.randrange(5):
            case 1:
                tables[0][0] = tables[1][0] if tables[1] else ids[-1]  # owned twice, one lost
            case 2:
                free = [*free, ids[0]]  # owned and free
            case 3:
                tables[0].pop()  # lost
            case 4:
                tables[0].append(0)  # the null block
        cases.append((tables, free, num_blocks))
    wrong = {
        "only the sum checked: one block owned twice and another lost leave the sum as it is": _sums_only,
        "only a set checked: a set forgets that a block stands in it twice": _sets_only,
        "only doubles checked: a lost block stands nowhere": _no_double_only,
        "null block counted: block 0 is neither free nor anybody's": _counts_null,
        "free list forgotten: a block may be owned and free at once": _tables_only,
    }
    question = (
        "is_sound says whether a pool without sharing is in order: blocks 1 .. num_blocks − 1 are each free or in one "
        "table, once, and block 0 is nowhere. tables is a list of lists of block ids."
    )
    stub = "def is_sound(tables, free_ids, num_blocks):\n    ..."
    return CodeProblem(question, stub, is_sound, tuple(cases), named(wrong), call)
