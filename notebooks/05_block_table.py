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
# A request's K and V look like one long array: position 0, 1, 2 ... In memory they are not. They lie in
# fixed-size **blocks**, scattered over one pool, and a small list, the **block table**, says which block
# holds which positions.
#
# Everything below is the state of a real engine that runs a real language model. Run the cells in order,
# and guess before you look.

# %%
import tempfile
from pathlib import Path

import numpy as np

from minivllm import LLM, SamplingParams
from minivllm.engine.allocators import blocks_needed
from minivllm.engine.tables import slot_of
from minivllm.trace import Trace
from minivllm.views.bars import Bars
from minivllm.views.block_map import BlockMap
from minivllm.views.block_table import BlockTable, SlotBytes
from minivllm.views.engine_buttons import EngineButtons
from minivllm.views.widget import Panel

# %% [markdown]
# `LLM` is what you would use; behind it, `llm.text_engine` lets us take single steps, and
# `llm.engine.kv.pool` is the pool of blocks. Ours is small enough to see: 23 blocks of 8 tokens. Block 0 is the
# **null block**: nobody owns it, it only pads tables to equal length.

# %%
llm = LLM(
    "smollm2-135m", dtype="float32", block_size=8, num_blocks=24, show_progress=False
)
text_engine, pool = llm.text_engine, llm.engine.kv.pool
print(
    f"{pool.num_usable} blocks x {llm.config.block_size} tokens = "
    f"{llm.config.capacity_tokens} tokens"
)
llm.generate(
    ["Once", "Twice", "Three times"],
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    use_tqdm=False,
)
llm.reset_prefix_cache()  # a pool that has worked: its free list is out of order
print(
    f"one token: {llm.trace_header()['kv_bytes_per_token']:,} bytes of K and V, "
    "over all 30 layers, in fp32"
)

# %% [markdown]
# ## 1. How many blocks?
#
# The first prompt has 21 tokens. How many blocks of 8 does it take, and how many slots stay empty?

# %%
my_blocks, my_empty_slots = 3, 3  # your guess

# %%
PROMPT = (
    "The block table of a request is a list of numbers. Each number names one block"
)
greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
trace = Trace(llm.trace_header())
llm.events.listen(trace)  # every view below draws these events, and nothing else

first = text_engine.add(
    text_engine.check(PROMPT + " of the pool."), greedy, request_id="first"
)
text_engine.step()
request = first.samples[0].request
num_tokens, num_blocks = request.num_computed, len(request.block_ids)
print(f"{num_tokens} tokens stored in {num_blocks} blocks: {request.block_ids}")
num_empty_slots = num_blocks * 8 - num_tokens
print(f"empty slots: {num_empty_slots}")
is_right = (my_blocks, my_empty_slots) == (num_blocks, num_empty_slots)
print("Your guess was right." if is_right else "Your guess was different: why?")
assert num_blocks == blocks_needed(num_tokens, 8) == -(-num_tokens // 8)

# %% [markdown]
# The waste is only ever in the **last** block, so it is below one block per request, however long it grows.
#
# ## 2. Follow one token to its bytes
#
# Click a token. The chain under it reads: position → logical block and offset → the table's entry → slot →
# the byte in the layer's K tensor, and the numbers that stand there. The hatched last token was just chosen by the
# model: it is known, but its K and V are computed only by the next step.


# %%
def read_slot(layer: int, slot: int, of: LLM = llm) -> SlotBytes:
    """The bytes behind a slot, from the live tensors."""
    k, v = of.storage.slot(layer, slot)
    start = of.storage.layers[layer].k.data_ptr()
    offset, head_bytes = k.data_ptr() - start, k.stride(0) * k.itemsize
    return SlotBytes(
        offset,
        k.data_ptr(),
        head_bytes,
        head_bytes,
        *(tuple(map(tuple, x.tolist())) for x in (k, v)),
    )


def token_texts(request_id: str, of: LLM = llm) -> list[str]:
    """What the tokens of a request say."""
    known = [*of.engine.requests.values(), request]
    token_ids = next((r.token_ids for r in known if r.id == request_id), [])
    return [llm.tokenizer.decode([token_id]) for token_id in token_ids]


# %%
block_map = BlockMap.follow(llm.events, llm.trace_header(), past=trace.events)
block_table = BlockTable(block_map, token_texts, read_slot)
Panel(block_map, block_table)

# %% [markdown]
# The same walk by hand, for position 19. No view, no engine: one division.

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
# what the engine says it stored.

# %%
layer_k = llm.storage.layers[0].k  # [num_blocks, block_size, num_kv_heads, head_size]
flat = layer_k.numpy().reshape(-1)
values_per_slot = 3 * 64  # KV heads x head size
from_memory = flat[slot * values_per_slot :][:values_per_slot]
assert np.array_equal(from_memory, layer_k[physical_block, offset].numpy().reshape(-1))
assert np.abs(from_memory).max() > 0
byte = slot * values_per_slot * 4
print(
    f"byte {byte:,} of layer 0's K: {values_per_slot} values of 4 bytes each, "
    "and the same in V and in 29 more layers"
)

# %% [markdown]
# ## 3. Growing, one block at a time
#
# Each step stores one more token. On most steps the table does not change. When does it?

# %%
lengths = []
for _ in range(12):
    lengths.append((request.num_computed, len(request.block_ids)))
    text_engine.step()
print("tokens stored, blocks:", lengths)
assert all(blocks == blocks_needed(tokens, 8) for tokens, blocks in lengths)

# %% [markdown]
# ## 4. A second request: same opening, same blocks
#
# The next prompt starts with the same 16 tokens. Which of its blocks are new?

# %%
second = text_engine.add(
    text_engine.check(PROMPT + ", and two tables may name the same."),
    greedy,
    request_id="second",
)
text_engine.step()
table_1, table_2 = request.block_ids, second.samples[0].request.block_ids
shared = [block_id for block_id in table_2 if block_id in table_1]
print("first :", table_1)
print("second:", table_2)
print(
    "shared:",
    shared,
    "with reference counts",
    [pool.blocks[block_id].ref_count for block_id in shared],
)
assert shared == table_1[: len(shared)] and len(shared) == 2

# %% [markdown]
# Two tables, one copy: **full** blocks with equal tokens before them are shared. A shared block is never written
# again, so nobody can disturb anybody.
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

# %%
third = text_engine.add(
    text_engine.check("One, two, three, four, five, six, seven, eight, nine"),
    greedy,
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
# same code as the live map. A saved file does as well:

# %%
with tempfile.TemporaryDirectory() as folder:
    path = trace.save(Path(folder) / "run.json")
    loaded = Trace.load(path)
print(f"{len(loaded)} events of {loaded.last_step} steps")
assert loaded.events == trace.events and loaded.state_hashes() == trace.state_hashes()

# %% [markdown]
# ## 6. Drive it yourself
#
# Type a prompt, add it, take a step, let one finish. Move the slider to start over with another block size.


# %%
class Room:
    """The LLM behind the buttons: the one above, until the slider asks for another."""

    llm = llm


def add(prompt: str) -> str:
    generation = Room.llm.text_engine.add(Room.llm.text_engine.check(prompt), greedy)
    num_tokens = len(generation.prompt.token_ids)
    return f"request {generation.request_id} waits with {num_tokens} tokens"


def step(_: str) -> str:
    Room.llm.text_engine.step()
    running = Room.llm.engine.scheduler.running
    return (
        ", ".join(
            f"{r.id}: {r.num_computed} tokens in {len(r.block_ids)} blocks"
            for r in running
        )
        or "idle"
    )


def finish(_: str) -> str:
    oldest = next(iter(Room.llm.engine.requests), None)
    return (
        f"request {oldest} finished"
        if oldest and Room.llm.text_engine.end(oldest)
        else "nothing runs"
    )


def restart(size: str) -> str:
    num_blocks = 1 + 184 // int(size)
    Room.llm = LLM(
        "smollm2-135m",
        dtype="float32",
        block_size=int(size),
        num_blocks=num_blocks,
        show_progress=False,
    )
    live_map.watch(Room.llm.events, Room.llm.trace_header())
    return f"a new pool: {num_blocks - 1} blocks of {size}; add a request"


actions = {
    "add": add,
    "one step": step,
    "finish the oldest": finish,
    "block size": restart,
}
live_map = BlockMap.follow(llm.events, llm.trace_header(), past=trace.events)
live_table = BlockTable(
    live_map,
    lambda id_: token_texts(id_, Room.llm),
    lambda layer, slot: read_slot(layer, slot, Room.llm),
)
buttons = EngineButtons(
    actions, "Paris is the capital of", slider=("block size", [1, 2, 4, 8, 16, 32], 8)
)
Panel(buttons, live_map, live_table)

# %% [markdown]
# ## 7. Which block size?
#
# Small blocks waste little and make long tables; large ones the reverse. Here are three prompts of 21, 70 and 130
# tokens at five sizes, right after their first step (random weights: only the lengths matter).

# %%
sizes, num_blocks_used, num_empty = [1, 4, 16, 64, 256], [], []
prompts = [list(range(100, 100 + n)) for n in (21, 70, 130)]
for size in sizes:
    small = LLM(
        "smollm2-135m",
        load_format="dummy",
        block_size=size,
        num_blocks=1 + 768 // size,
        show_progress=False,
    )
    for prompt in prompts:
        small.text_engine.add(small.text_engine.check(prompt), greedy)
    small.text_engine.step()
    tables = [
        (r.num_computed, len(r.block_ids)) for r in small.engine.scheduler.running
    ]
    num_blocks_used.append(sum(blocks for _, blocks in tables))
    num_empty.append(sum(blocks * size - tokens for tokens, blocks in tables))
print("block size   ", sizes)
print("table entries", num_blocks_used)
print("empty slots  ", num_empty)
assert num_empty[0] == 0 and all(
    empty < 3 * size for size, empty in zip(sizes, num_empty, strict=True)
)

# %%
Bars(
    "Larger blocks: shorter tables, more empty slots",
    "block size (tokens)",
    "slots, entries",
    sizes,
    {"empty slots": num_empty, "table entries": num_blocks_used},
)

# %% [markdown]
# ## Where the analogy with an operating system holds, and where it breaks
#
# | operating system | here |
# |---|---|
# | page, frame | logical block, physical block |
# | page table, one per process | block table, one per request (one for all layers and heads) |
# | byte in a page | token in a block |
# | shared pages, reference counts | shared prefixes, reference counts |
# | page fault: load on access | **none**: every block of a running request is in memory |
# | evicts any page | evicts a whole request (preemption), or free cached blocks |
# | hardware walks the table | the kernel reads the table: software translation |
#
# **Not true:** "paging swaps to the CPU" · "each layer and head has a table" · "K and V of a request must be
# contiguous somewhere".
#
# Read it in the engine: [`slot_of`](../minivllm/engine/kv_manager.py) translates,
# [`BlockPool`](../minivllm/engine/block_pool.py) owns the free list,
# [`KVManager.grow`](../minivllm/engine/kv_manager.py) extends a table.
#
# **Say it out loud, in 60 seconds:** what does a block table map, who owns the blocks, and what did *not* change
# about attention?

# %%
for request_id in list(llm.engine.requests):
    text_engine.end(request_id)
assert pool.num_free == pool.num_usable  # nothing leaked
