# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · What exactly is a block table?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/05_block_table.ipynb)
#
# A request's K and V look like one long array: position 0, 1, 2 ... In memory they are not. They lie in
# fixed-size **blocks**, scattered over one pool, and a small list, the **block table**, says which block
# holds which positions.
#
# Everything below is the state of a real engine that runs a real language model. Run the cells in order,
# and guess before you look: put a number in place of the dots.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
import numpy as np

from minivllm import LLM
from minivllm.course.check import ask, check
from minivllm.course.predict import predict
from minivllm.engine.allocators import blocks_needed
from minivllm.engine.tables import slot_of
from minivllm.events import Preempted
from minivllm.lab.invariants import check_invariants
from minivllm.lab.live_table import GREEDY, LiveTable, resized
from minivllm.trace import Trace
from minivllm.views.bars import Bars
from minivllm.views.block_map import BlockMap
from minivllm.views.block_table import BlockTable
from minivllm.views.engine_buttons import EngineButtons
from minivllm.views.flash_cards import FlashCards
from minivllm.views.widget import Panel

# %% [markdown]
# ## Warm-up
#
# Two cards about notebook 04. Answer in your head or in a line, then tick the points that you named.

# %%
FlashCards(cards=("B1", "B4"))

# %% [markdown]
# ## 1. How many blocks?
#
# `LLM` is what you would use; behind it, `llm.text_engine` lets us take single steps, and
# `llm.engine.kv.pool` is the pool of blocks. Ours is small enough to see: 23 blocks of 8 tokens. Block 0 is the
# **null block**: nobody owns it, it only pads tables to equal length.

# %%
llm = LLM(
    "smollm2-135m", dtype="float32", block_size=8, num_blocks=24, show_progress=False
)
text_engine, pool = llm.text_engine, llm.engine.kv.pool
llm.generate(["Once", "Twice", "Three times"], GREEDY, use_tqdm=False)
llm.reset_prefix_cache()  # a pool that has worked: its free list is out of order
num_tokens = llm.config.capacity_tokens
print(
    f"{pool.num_usable} blocks x {llm.config.block_size} tokens = {num_tokens} tokens"
)
num_bytes = llm.trace_header()["kv_bytes_per_token"]
print(f"one token: {num_bytes:,} bytes of K and V, over all 30 layers, in fp32")

# %% [markdown]
# The first prompt has 21 tokens. Guess before you run the step.

# %%
guess_blocks = predict("05.p1", "How many blocks of 8 do 21 tokens take?", ...)
guess_blocks

# %%
guess_empty = predict("05.p2", "How many slots of those blocks stay empty?", ...)
guess_empty

# %%
PROMPT = (
    "The block table of a request is a list of numbers. Each number names one block"
)
trace = Trace(llm.trace_header())
llm.events.listen(trace)  # every view below draws these events, and nothing else

first = text_engine.add(
    text_engine.check(PROMPT + " of the pool."), GREEDY, request_id="first"
)
text_engine.step()
request = first.samples[0].request
num_tokens, num_blocks = request.num_computed, len(request.block_ids)
print(f"{num_tokens} tokens stored in {num_blocks} blocks: {request.block_ids}")
assert num_blocks == blocks_needed(num_tokens, 8) == -(-num_tokens // 8)
guess_blocks.reveal(num_blocks)

# %%
guess_empty.reveal(num_blocks * 8 - num_tokens)

# %% [markdown]
# The waste is only ever in the **last** block, so it is below one block per request, however long it grows:
# [`blocks_needed`](../minivllm/engine/allocators.py) rounds up once.
#
# ## 2. Follow one token to its bytes
#
# Click a token. The chain under it reads: position → logical block and offset → the table's entry → slot →
# the byte in the layer's K tensor, and the numbers that stand there. The hatched last token was just chosen by
# the model: it is known, but its K and V are computed only by the next step.

# %%
room = LiveTable(llm)
block_map = BlockMap.follow(llm.events, llm.trace_header(), past=trace.events)
block_table = BlockTable(block_map, room.token_texts, room.read_slot)
Panel(block_map, block_table)

# %% [markdown]
# The same walk by hand, for position 19. No view, no engine: one division. In the engine it is
# [`slot_of`](../minivllm/engine/tables.py), one line long.

# %%
position, block_size = 19, 8
logical_block, offset = divmod(position, block_size)
physical_block = request.block_ids[logical_block]
slot = physical_block * block_size + offset
print(f"position {position} -> logical block {logical_block}, offset {offset}")
print(
    f"table[{logical_block}] = {physical_block} -> "
    f"slot {physical_block} x {block_size} + {offset} = {slot}"
)
assert slot == slot_of(position, request.block_ids, block_size)

# %% [markdown]
# And is that where the bytes are? Read the pool's memory as one flat array, jump to the slot, and compare with
# what the engine says it stored ([`KVStorage`](../minivllm/runner/kv_storage.py) owns that memory).

# %%
layer_k = llm.storage.layers[0].k  # [num_blocks, block_size, num_kv_heads, head_size]
flat = layer_k.cpu().numpy().reshape(-1)
values_per_slot = 3 * 64  # KV heads x head size
from_memory = flat[slot * values_per_slot :][:values_per_slot]
stored = layer_k[physical_block, offset].cpu().numpy().reshape(-1)
assert np.array_equal(from_memory, stored)
assert np.abs(from_memory).max() > 0
byte = slot * values_per_slot * 4
print(
    f"byte {byte:,} of layer 0's K: {values_per_slot} values of 4 bytes each, "
    "and the same in V and in 29 more layers"
)

# %% [markdown]
# ## 3. Growing, one block at a time
#
# Each step stores one more token. On most steps the table does not change.

# %%
guess_growth = predict("05.p3", "12 more steps, blocks of 8: how many new blocks?", ...)
guess_growth

# %%
lengths = [(request.num_computed, len(request.block_ids))]
for _ in range(12):
    text_engine.step()
    lengths.append((request.num_computed, len(request.block_ids)))
print("tokens stored, blocks:", lengths)
assert all(blocks == blocks_needed(tokens, 8) for tokens, blocks in lengths)
guess_growth.reveal(len(request.block_ids) - num_blocks)

# %% [markdown]
# [`KVManager.grow`](../minivllm/engine/kv_manager.py) asks the pool for a block when the last one is full, and
# appends its number to the table. The new block may lie anywhere.
#
# ## 4. A second request: same opening, same blocks
#
# The next prompt starts with the same 16 tokens.

# %%
guess_shared = predict("05.p4", "How many blocks will both tables name?", ...)
guess_shared

# %%
second = text_engine.add(
    text_engine.check(PROMPT + ", and two tables may name the same."),
    GREEDY,
    request_id="second",
)
text_engine.step()
table_1, table_2 = request.block_ids, second.samples[0].request.block_ids
shared = [block_id for block_id in table_2 if block_id in table_1]
print("first :", table_1)
print("second:", table_2)
counts = [pool.blocks[block_id].ref_count for block_id in shared]
print("shared:", shared, "with reference counts", counts)
assert shared == table_1[: len(shared)] and len(shared) == 2
guess_shared.reveal(len(shared))

# %% [markdown]
# Two tables, one copy: **full** blocks with equal tokens before them are shared. A shared block is never written
# again, so nobody can disturb anybody. Notebook 07 is about this.
#
# ## 5. Finish, and the blocks come back
#
# The first request ends. What happens to the shared blocks? And where will a third request live?

# %%
private = [block_id for block_id in table_1 if block_id not in shared]
num_free_before = pool.num_free
text_engine.abort(first)
print(f"free blocks: {num_free_before} -> {pool.num_free}")
print("owners of the shared ones:", [pool.blocks[i].ref_count for i in shared])
assert pool.num_free == num_free_before + len(private)

# %% tags=["readme:block_map"]
third = text_engine.add(
    text_engine.check("One, two, three, four, five, six, seven, eight, nine"),
    GREEDY,
    request_id="third",
)
for _ in range(3):
    text_engine.step()
table_3 = third.samples[0].request.block_ids
print("third:", table_3)
assert set(table_3) & set(private)  # blocks that the first request owned
Panel(BlockMap.replay(trace))

# %% [markdown]
# That picture is a **replay**: drag the step slider, or press play. It is drawn from the recorded events by the
# same code as the live map. The third request has a block that the first one had, and two
# others: [`BlockPool`](../minivllm/engine/block_pool.py) hands out whatever is free, and remembers no neighbours.
#
# ## 6. Drive it yourself
#
# Type a prompt, add it, take a step, let one finish. Move the slider to start over with another block size.

# %%
room = LiveTable(llm)
live_map = BlockMap.follow(llm.events, llm.trace_header(), past=trace.events)
live_table = BlockTable(live_map, room.token_texts, room.read_slot)
sizes = [1, 2, 4, 8, 16, 32]
buttons = EngineButtons(
    room.actions(live_map), "Paris is the capital of", slider=("block size", sizes, 8)
)
Panel(buttons, live_map, live_table)

# %% [markdown]
# ## 7. Which block size?
#
# Small blocks waste little and make long tables; large ones the reverse. Here are three prompts of 21, 70 and 130
# tokens at five sizes, right after their first step. Each size gets an engine of its own, on the same weights.


# %%
def tables_of(block_size: int) -> list[tuple[int, int]]:
    """Tokens stored and blocks taken by three prompts, after one step."""
    small = resized(llm, block_size, num_slots=768)
    for num_tokens in (21, 70, 130):
        prompt = [num_tokens + i for i in range(num_tokens)]
        small.text_engine.add(small.text_engine.check(prompt), GREEDY)
    small.text_engine.step()
    running = small.engine.scheduler.running
    return [(r.num_computed, len(r.block_ids)) for r in running]


# %%
sizes = [1, 4, 16, 64, 256]
tables = {size: tables_of(size) for size in sizes}
num_entries = [sum(blocks for _, blocks in tables[size]) for size in sizes]
num_empty = [
    sum(blocks * size - tokens for tokens, blocks in tables[size]) for size in sizes
]
assert num_empty[0] == 0
assert all(n < 3 * size for n, size in zip(num_empty, sizes, strict=True))
Bars(
    "Larger blocks: shorter tables, more empty slots",
    "block size (tokens)",
    "slots, entries",
    sizes,
    {"empty slots": num_empty, "table entries": num_entries},
)

# %% [markdown]
# On average the last block is half empty: (B − 1) / 2 slots for each request, 7.5 of them at B = 16.
#
# ## 8. An operating system's words, and where they break
#
# Paging in an operating system is where the idea comes from. In the view of section 2 choose the words
# *an operating system's*: the same chain, said as paging would say it, and what is no longer true.

# %%
block_table.move("request", "second")
block_table.move("token", 19)
block_table.move("words", "operating system")
block_table

# %% [markdown]
# | operating system | here |
# |---|---|
# | page, frame | logical block, physical block |
# | page table, one per process | block table, one per request, for all layers and heads |
# | byte in a page | token in a block |
# | shared pages, reference counts | shared prefixes, reference counts |
# | page fault: load on access | **none**: every block of a running request is in memory |
# | evicts any page | evicts a whole request (preemption), or free cached blocks |
# | hardware walks the table | the kernel reads the table: software translation |
#
# Is the first break real? A request that finds no free block does not fault in the middle of a step: it
# is not scheduled, or another one gives back **all** its blocks. Let us fill the pool and see.

# %%
for i in range(4):
    prompt = [1000 + 100 * i + j for j in range(45)]
    text_engine.add(text_engine.check(prompt), GREEDY, request_id=f"crowd {i}")
for _ in range(30):
    text_engine.step()
    check_invariants(llm.engine)  # no block is lost, none has two owners unawares
preempted = [event for event in trace.events if isinstance(event, Preempted)]
for event in preempted[:2]:
    print(f"step {event.step}: {event.request_id!r} gave back every block")
assert preempted

# %% [markdown]
# ## Exercises
#
# Red until you work. Each wrong answer gets the name of its slip and the next hint; `check.redraw("05.1")` draws
# other numbers, `check.solution("05.2")` shows the engine's own function.

# %%
ask("05.1")

# %%
check("05.1", ...)  # a list of ten slots

# %%
ask("05.2")


# %%
def append_slot(block_ids, num_tokens, block_size, free_ids):
    """The slot of the next token; may take a block from free_ids."""
    ...


check("05.2", append_slot)

# %%
ask("05.3")


# %%
def slot_mapping(block_ids, num_computed, num_new, block_size):
    """The slots of the new tokens."""
    ...


check("05.3", slot_mapping)

# %%
ask("05.4")


# %%
def is_sound(tables, free_ids, num_blocks):
    """Whether every block but 0 has exactly one owner, or is free."""
    ...


check("05.4", is_sound)

# %%
ask("05.5")

# %%
check("05.5", ...)

# %%
ask("05.6")

# %%
check("05.6", ...)

# %% [markdown]
# ## Not true
#
# - "Paging swaps the cache to the CPU." Nothing left the pool in any cell above; section 8 shows what happens
#   instead when it is full. (Swapping to host memory exists, as one way to preempt: notebook 11.)
# - "Each layer and each head has its own table." Section 2: one table, and the layer picker of the view only
#   changes the tensor that is read. Only models that mix kinds of layers have several tables, one for each kind.
# - "K and V must be contiguous somewhere." Section 4: table 2 names blocks that are not
#   neighbours. What is stored stays there for good. (On a CPU torch's operators copy a request's blocks together in
#   each step and drop the copy; the kernel of notebook 06 does not even do that.)
#
# **Say it out loud, in 60 seconds:** what does a block table map, who owns the blocks, and what did *not* change
# about attention?
#
# ## Exit quiz
#
# Three cards and one with numbers; they join the deck of `minivllm quiz`.

# %%
FlashCards(cards=("C1", "C3", "C7", "C8.num"))

# %%
predict.calibration("05")

# %%
for request_id in list(llm.engine.requests):
    text_engine.end(request_id)
assert pool.num_free == pool.num_usable  # nothing leaked
