# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Where does 60-80% of KV memory go?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/04_wasted_memory.ipynb)
#
# In 2023 somebody measured what the KV memory of serving systems really held. Tokens filled 20 to 38 percent of it.
# The rest was paid for, taken, and empty. Nothing had leaked. So where was it?
#
# Run the cells in order, and guess before you look: put a number in place of the dots.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
import json
from statistics import mean

from minivllm import LLM
from minivllm.course import calculators as calc
from minivllm.course.check import ask, check
from minivllm.course.memory_use import average, memory_over_time, refusals, saturated
from minivllm.course.predict import predict
from minivllm.engine.allocators import Buddies, FirstFit, blocks_needed
from minivllm.events import Preempted
from minivllm.lab import allocator_study as paper
from minivllm.lab.allocator_room import ALL, answer, deal, play_room, serve, short_waits
from minivllm.views.flash_cards import FlashCards
from minivllm.views.memory_strip import MemoryStrip
from minivllm.views.waste_bars import WasteBars
from minivllm.views.widget import Panel

# %% [markdown]
# ## Warm-up
#
# Two cards of earlier notebooks. Answer in your head or in a line, then tick the points that you named.

# %%
FlashCards(cards=("A4", "K1"))

# %% [markdown]
# ## 1. Three names for an empty slot
#
# A **slot** is room for the K and V of one token. Suppose that a request must have all its slots in one row: one
# **contiguous stretch**, taken when it starts. How long must it be? At that moment nobody knows how much the model
# will write, so the server takes the longest request that it allows, `max_model_len`. (The engine's code calls a
# stretch a run. Here a **run** is one play of the engine, from its first step to its last.)
#
# Say 8,192 slots are reserved, the prompt has 2,000 tokens, the answer will have 1,000, and 400 are written by now.

# %%
now = calc.slots_of_request(2000, 400, 1000, 8192)
print(now)
never = calc.reservation_waste(8192, 2000 + 1000)
assert int(never) == int(now.parts["internal"]) == 5192

# %% [markdown]
# - **live**: holds a token.
# - **reserved**: empty now, and will be filled by its own request. Only too early; until then nobody else has it.
# - **internal** fragmentation: set aside, and never filled. It shows only when the request ends.
#
# A fourth name, **external** fragmentation, is for slots that nobody has and that still help nobody: holes of the
# wrong shape. The four have different causes and different cures, so keep them apart.
#
# ## 2. By hand, then by the engine
#
# The PagedAttention paper (Kwon et al., SOSP 2023) gives OPT-13B a pool of 15,728 slots on a 40 GB card. K and V of a
# token take 819,200 bytes in its 40 layers. The model's longest request has 2,048 tokens.

# %%
fit = predict(
    "04.p1",
    "How many requests run at once if each reserves 2,048 of 15,728 slots?",
    ...,
    unit="requests",
)
fit

# %%
by_hand = calc.contiguous_requests(paper.NUM_SLOTS, 2048)
first_fit, taken = FirstFit(paper.NUM_SLOTS), []
while first_fit.fits(2048):
    taken.append(first_fit.take(2048))
print(by_hand)
print("the engine's stretches:", taken[0], taken[1], "...", taken[-1])
print(calc.slots_to_bytes(paper.NUM_SLOTS, paper.BYTES_PER_SLOT))
assert paper.BYTES_PER_SLOT == 819_200 and len(taken) == int(by_hand) == 7
fit.reveal(len(taken))

# %% [markdown]
# Twelve gibibytes, seven requests. What they hold plays no part in that.
#
# That was [`FirstFit`](../minivllm/engine/allocators.py): the lowest hole that is long enough. Now let requests
# leave. Three stretches of 8 fill a row of 24; the outer two are let go. Does a stretch of 10 fit?

# %%
row = FirstFit(24)
a, b, c = (row.take(8) for _ in range(3))
row.free(a)
row.free(c)
print("free: 8 + 8 = 16 slots; a stretch of 10 fits:", row.fits(10))
print("a stretch of 8 fits:", row.fits(8))
assert not row.fits(10) and row.fits(8)

# %% [markdown]
# Sixteen slots are free, ten are wanted, and the answer is no. This is **external fragmentation**.
#
# The second way to place stretches is by **buddies** ([`Buddies`](../minivllm/engine/allocators.py)). Every stretch has
# a length of 1, 2, 4, 8, ... One that is too long is split in halves; two halves that are both free again are merged.
# It is fast, and it rounds: who wants 25 gets 32.

# %%
heap = Buddies(16)
three, five = heap.take(3), heap.take(5)
print("3 ->", three, "   5 ->", five)
print("another 5 fits:", heap.fits(5), "   a 4 fits:", heap.fits(4))
assert not heap.fits(5) and heap.fits(4)
heap.free(five)
print("5 freed: a 16 fits:", heap.fits(16))  # 0 to 4 is taken: nothing to merge with
assert not heap.fits(16)
heap.free(three)  # 0 to 4 merges with 4 to 8, and that with 8 to 16
print("3 freed too: a 16 fits:", heap.fits(16))
assert heap.take(16) == range(16)
assert int(calc.next_power_of_two(25)) == 32

# %% [markdown]
# ## 3. A refusal, caught in the act
#
# Enough by hand: here is the engine, with a pool of 192 slots and a queue that never empties. Its runner computes
# nothing, for only lengths matter here; scheduler, allocators and events are the real ones. Three allocators serve the
# same requests.
#
# - `contiguous` reserves `max_model_len` (48) for each.
# - `oracle` is told every length beforehand, and reserves just that.
# - `paged` reserves nothing: one block of 4 slots at a time, any block, when it is needed.
#
# Requests are called r0, r1, r2, ... in the order in which they come. The deck is shuffled first, so r11 is not
# `small_deck[11]`.

# %%
small_deck = [(4 + i % 9, 4 + 7 * i % 29) for i in range(40)]  # (prompt, output)
sizes = {"max_model_len": 48, "block_size": 4, "num_slots": 192, "num_tokens": 300}
small = {
    name: serve(name, small_deck, **sizes) for name in ("contiguous", "oracle", "paged")
}
caught = refusals(small["oracle"])[0]
print(caught)
assert caught.largest_hole < caught.need <= caught.free
assert not refusals(small["paged"])  # any free block serves

# %%
strip = MemoryStrip.replay(**small)
strip.move("run", "oracle")
strip.move("step", caught.step)
Panel(strip)

# %% [markdown]
# Above, the pool by address; below, all steps of the run. Press play, drag, or click a column. In the step shown, a
# request waits although more slots are free than it needs: the grey pieces do not lie side by side.
#
# Then choose `contiguous`: about two fifths of the pool is hatched, more than holds a token. Choose `paged` and play
# it from the start: requests grow block by block, and any grey block serves. How fast did each write the same 300
# tokens?

# %%
means = {name: average(memory_over_time(trace)) for name, trace in small.items()}
print("mean of all steps, %:", *(f"{part:>9}" for part in paper.PARTS))
for name, trace in small.items():
    most = max(use.num_requests for use in memory_over_time(trace))
    cells = (f"{getattr(means[name], part):9.1f}" for part in paper.PARTS)
    print(f"{name:21}", *cells, f" {trace.last_step:3} steps, at most {most} at once")
steps = [trace.last_step for trace in small.values()]
assert steps == sorted(steps, reverse=True)
assert 35 < means["contiguous"].internal < 45
assert means["contiguous"].internal > means["contiguous"].live

# %% [markdown]
# Some grey is left when `paged`, and the strip counts it as external. It is no hole of the wrong shape: any free block
# would do. There are only **too few** of them for the first request of the queue, which needs room for its whole
# prompt at once. It waits, and the blocks with it. Here is every such wait:

# %%
waits = short_waits(small["paged"])
for wait in waits[:4]:
    print(
        f"step {wait.step:2}: {wait.request_id} needs {wait.need}, {wait.free} are free"
    )
print(f"{len(waits)} waits; in each fewer slots are free than are needed")
assert waits and all(wait.free < wait.need for wait in waits)

# %% [markdown]
# ## 4. The figure of 2023, played again
#
# Now the paper's setting: 15,728 slots, and chats with lengths like those of ShareGPT, a collection of real ones. Ours
# are drawn, not copied: the means are the paper's, 161.31 tokens in and 337.99 out, and the tail is long.

# %%
deck = deal("sharegpt")
prompt_mean, output_mean = (mean(column) for column in zip(*deck, strict=True))
print(f"{len(deck)} requests: {prompt_mean:.1f} tokens in, {output_mean:.1f} out")
print("the longest:", max(map(sum, deck)), " the shortest:", min(map(sum, deck)))
assert abs(prompt_mean / 161.31 - 1) < 0.02 and abs(output_mean / 337.99 - 1) < 0.02

# %% [markdown]
# Four allocators serve them, from a queue that is never empty, until each has written 34,000 tokens. The paper calls
# them Orca (Max), Orca (Pow2), Orca (Oracle) and vLLM:
#
# | here | reserves | placed by |
# |---|---|---|
# | `contiguous` | `max_model_len` | first fit |
# | `power_of_two` | the prompt, and the output rounded up to a power of two | buddies |
# | `buddy` | the true length, told beforehand | buddies |
# | `paged` | nothing | any free block |

# %%
live = predict(
    "04.p2",
    "What percent of the pool holds tokens when every request reserves 2,048?",
    ...,
    unit="%",
)
live

# %%
times = predict(
    "04.p3",
    "On the same bytes: how many times as many requests run at once when paged?",
    ...,
    unit="times",
)
times

# %%
bars = WasteBars(play_room, paper.FIGURE_2, paper.NAMES)
traces, columns = bars.traces, bars.columns  # of this run, wherever the sliders go
for name, published in paper.FIGURE_2.items():
    for part, told in zip(paper.PARTS, published, strict=True):
        ours = getattr(columns[name].shares, part)
        assert told is None or abs(ours - told) <= paper.TOLERANCE, (name, part)
print(f"every part of every bar is within {paper.TOLERANCE:g} points of the paper's")
live.reveal(columns["contiguous"].shares.live)

# %%
at_once = {name: column.shares.num_requests for name, column in columns.items()}
gap = at_once["paged"] / at_once["contiguous"]
assert 4 < gap < 6  # the paper's figure 13 has 30.42 / 7.00 = 4.3
times.reveal(gap)

# %% tags=["readme:memory_strip"]
strip_of_bars = MemoryStrip.beside(bars)
Panel(bars, strip_of_bars)

# %% [markdown]
# The sliders play the engine again, all four allocators, and the strip below follows. The cells below keep to the
# first run. Try:
#
# - `max_model_len` 4,096: the same requests, a longer promise. What happens to `contiguous`, and what to `paged`?
# - the pool twice as large: does any *share* change?
# - Alpaca-like requests, of 78 tokens on average: who suffers most?
#
# So short a run is a small sample. Six recorded runs of 30,000 steps say how far to trust it. They have a fifth
# allocator, `oracle`: lengths told beforehand, as for `buddy`, but placed by first fit. The paper has no such bar.

# %%
rows = json.loads(paper.RECORDING.read_text())["rows"]
print(f"{'mean of six seeds, %':20}", *(f"{part:>9}" for part in paper.PARTS))
for name in paper.NAMES:
    means = [
        mean(r[part] for r in rows if r["allocator"] == name) for part in paper.PARTS
    ]
    print(f"{name:20}", *(f"{m:9.1f}" for m in means))
    for told, ours in zip(paper.FIGURE_2.get(name, [None] * 4), means, strict=True):
        assert told is None or abs(ours - told) <= paper.TOLERANCE
wastes = [100 - published[0] for published in paper.FIGURE_2.values()]
print("published waste, %:", [round(waste, 1) for waste in wastes])
assert min(wastes[:3]) > 61 and max(wastes[:3]) < 80 and wastes[3] < 4

# %% [markdown]
# So 60 to 80 percent goes three ways. With the longest promise most of it is **internal**. With buddies most of it is
# **external**. And with known lengths and first fit, the best that a contiguous stretch can do, most of it is
# **reserved**: the whole stretch is taken at the first step, for tokens that come hundreds of steps later.
#
# ## 5. "KV is large" is not the whole story
#
# All four columns have the same 12 GiB, and a token costs the same in each. What differs is how many requests share
# the weights that a step reads.

# %%
print("OPT-66B:", calc.slots_to_bytes(9_700, 2_359_296))  # the paper prints 21 GB
print("paper's vLLM:", calc.mean_live_tokens(0.963, paper.NUM_SLOTS, 30.42))
for column in columns.values():
    shares = column.shares
    held = calc.mean_live_tokens(
        shares.live / 100, paper.NUM_SLOTS, shares.num_requests
    )
    print(
        f"{column.allocator:13} {shares.num_requests:4.1f} requests at once, "
        f"{float(held):3.0f} tokens each, {column.num_steps:5,} steps"
    )
steps = [column.num_steps for column in columns.values()]
assert steps[0] > 4 * steps[-1]

# %% [markdown]
# Each wrote the same 34,000 tokens. A decode step reads all weights once, whoever rides along: a sixth of the
# steps is where the throughput comes from. The cache did not get smaller; its empty part did.
# (The paper's bars imply requests of 498 tokens where ours hold 412, so 30 of them fit and 36 of ours.)
#
# ## 6. What paging leaves
#
# Two wastes remain, and one thing was never waste. First the **tail**: the last block of a request is only partly
# filled. That is less than one block for each request, at every step.

# %%
paged = memory_over_time(traces["paged"])
for use in paged:
    assert use.reserved + use.internal <= use.num_requests * (16 - 1)
shares = average(saturated(paged))
held = shares.live + shares.reserved + shares.internal
tail = 100 * (1 - shares.live / held)
print(f"blocks of 16: {tail:.2f}% of all held slots are empty")
print(calc.tail_waste(shares.live_slots_per_request, 16))
assert (
    tail < 4 and abs(tail - float(calc.tail_waste(shares.live_slots_per_request))) < 0.1
)

# %%
coarse = predict(
    "04.p4",
    "Blocks of 128 instead of 16: what percent of the held slots is then empty?",
    ...,
    unit="%",
)
coarse

# %%
wide = play_room(block_size=128, allocators=("paged",))["paged"]
shares = average(saturated(memory_over_time(wide)))
wide_tail = 100 * (1 - shares.live / (shares.live + shares.reserved + shares.internal))
assert abs(wide_tail - float(calc.tail_waste(shares.live_slots_per_request, 128))) < 0.5
coarse.reveal(wide_tail)

# %% [markdown]
# The formula, (block size − 1) / 2 empty slots for each request, is a mean. It is 1.5% for chats of 499 tokens in
# blocks of 16, and 8.8% for instructions of 78. One request can be checked exactly: 3,001
# tokens in blocks of 128.

# %%
print(calc.tail_waste(499, 16))
print(calc.tail_waste(77.8, 16))
print(blocks_needed(3001, 128), "blocks;", calc.empty_slots(3001, 128))
one = serve(
    "paged",
    ((3001, 1),),
    max_model_len=4096,
    block_size=128,
    num_slots=4096,
    num_tokens=1,
)
assert blocks_needed(3000, 128) == 24 and 24 * 128 == 3072
assert memory_over_time(one)[0].internal == int(calc.empty_slots(3001, 128)) == 71

# %% [markdown]
# Second: the free blocks of section 3, too few for the prompt at the head of the queue. They are the external part of
# `paged`.
#
# And the history is still there. Paging removes the empty slots, not the full ones: a pool of honest tokens runs out
# too. Then a running request gives its blocks back and starts again later. It is **preempted** (notebook 11).

# %%
preempted = [e for e in traces["paged"] if isinstance(e, Preempted)]
fullest = max(paged, key=lambda use: use.live)
print(f"{len(preempted)} preemptions; at the fullest step {fullest.live:,} slots live")
assert preempted and fullest.live > 0.98 * paper.NUM_SLOTS
assert not [e for e in traces["contiguous"] if isinstance(e, Preempted)]

# %% [markdown]
# A reservation never has to be taken back: that is the one thing it buys.
#
# ## 7. What if all lengths are equal?
#
# Paging pays because nobody knows how long a request will be. So squeeze the lengths towards their means, step by
# step, until all requests have 162 tokens in and 335 out; and each time let the server promise no more than the longest.
# How much does paging still gain at the end?

# %%
equal_gap = predict(
    "04.p5",
    "All lengths equal and known: how many times as many requests when paged?",
    ...,
    unit="times",
)
equal_gap

# %%
gaps = []
for spread in (1.0, 0.75, 0.5, 0.25, 0.0):
    squeezed = deal("sharegpt", spread)
    longest = 16 * blocks_needed(max(map(sum, squeezed)), 16)
    sizes = {"max_model_len": longest, "block_size": 16, "num_slots": paper.NUM_SLOTS}
    runs = [
        serve(n, squeezed, num_tokens=34_000, **sizes) for n in ("contiguous", "paged")
    ]
    num_fit, paged_fit = (
        average(saturated(memory_over_time(r))).num_requests for r in runs
    )
    gaps.append(paged_fit / num_fit)
    print(
        f"spread {spread:4.0%}, longest {longest:5,}: {num_fit:4.1f} requests at once, "
        f"{paged_fit:.1f} when paged, {gaps[-1]:.2f} times"
    )
assert gaps == sorted(gaps, reverse=True) and gaps[0] > 4 and gaps[-1] < 1.6
equal_gap.reveal(gaps[-1])

# %% [markdown]
# The same as a picture: "All lengths equal" in the list of requests. The paper measured no such requests, so its bars
# are not there.

# %%
equal = WasteBars(play_room, paper.FIGURE_2, paper.NAMES, lengths="equal")
assert len(set(deal("sharegpt", spread=0, max_model_len=512))) == 1
wasted = [column.shares.internal for column in equal.columns.values()]
assert max(wasted) < 4 and equal.drawn()["gap"] < gap / 3
assert abs(equal.drawn()["gap"] - gaps[-1]) < 0.01
assert all(column.published is None for column in equal.columns.values())

# %%
Panel(equal)

# %% [markdown]
# The gap falls from five to one and a half. Hatched and grey are nearly gone; what is left is dotted: room for the
# output, taken at the first step. So the rest of the gain should go away when there is hardly any output to wait
# for. Equal requests again, now with 480 tokens in and 20 out:

# %%
brief = {
    name: serve(
        name,
        ((480, 20),),
        max_model_len=512,
        block_size=16,
        num_slots=paper.NUM_SLOTS,
        num_tokens=10_000,
    )
    for name in ("contiguous", "paged")
}
uses = [average(saturated(memory_over_time(trace))) for trace in brief.values()]
num_fit, paged_fit = (shares.num_requests for shares in uses)
print(f"{num_fit:.1f} requests at once, or {paged_fit:.1f} when paged")
assert 1 <= paged_fit / num_fit < 1.05

# %% [markdown]
# Three percent. Paging pays where requests are long-lived, of unlike lengths, and grow. Where they are not, it does
# no harm, and there is little to gain. (Sharing a prompt between requests still needs blocks: notebook 07.)
#
# ## 8. The same equation, another layout
#
# Does any of this touch the answers? A real model, 160 slots, six prompts. For each allocator the same weights, the
# same runner and the same KV tensors; only the policy object is exchanged ([`answer`](../minivllm/lab/allocator_room.py)).

# %%
llm = LLM(
    "smollm2-135m",
    dtype="float32",
    block_size=8,
    num_blocks=21,
    max_model_len=64,
    show_progress=False,
)
prompts = ["The capital of France is", "A paged KV cache", "Once upon a time there was"]
prompts += ["1, 2, 3, 4,", "Water boils at", "The block table says"]
answers = {name: answer(llm, name, prompts, max_tokens=12) for name in ALL}
for name, told in answers.items():
    print(
        f"{name:13} at once {told.most_at_once}, steps {told.num_steps}, "
        f"blocks of the last prompt {told.tables[-1]}"
    )

# %%
assert len({told.tokens for told in answers.values()}) == 1
assert len({told.tables for told in answers.values()}) == len(ALL) == 5
assert answers["contiguous"].most_at_once == 160 // 64 == 2
assert answers["paged"].most_at_once == len(prompts)
print(repr(llm.get_tokenizer().decode(answers["paged"].tokens[0])))

# %% [markdown]
# Five layouts, one text. Contiguous stretches are consecutive block ids, paged tables are scattered, and attention computes
# the same sums over the same keys. An explanation of PagedAttention that changes the equation is wrong; one that only
# says "there is a cache" has not begun.
#
# ## Exercises
#
# Red until you work. Each wrong answer gets the name of its slip and the next hint; `check.redraw("04.1")` draws
# other numbers.

# %%
ask("04.1")

# %%
check("04.1", ...)  # a list of two

# %%
ask("04.2")

# %%
check("04.2", ...)

# %%
ask("04.3")


# %%
class MyBuddies:
    """Stretches of 2**k places: split in halves to fit, merged when both are free."""

    def __init__(self, num_places):
        self.starts = {num_places: [0]}  # of the free stretches, by length

    def take(self, size): ...

    def free(self, stretch): ...


check("04.3", MyBuddies)

# %%
ask("04.4")

# %%
check("04.4", ...)

# %%
ask("04.5")

# %%
check("04.5", ...)

# %% [markdown]
# ## Not true
#
# - "Waste is waste." Section 1 counts three kinds in one request, and in section 4 each loses most to another:
#   `contiguous` to internal waste, `buddy` to external, `oracle` to reservation. Shorter promises cure the first,
#   equal pieces the second, and only giving memory out late cures the third.
# - "Paging removes all waste." Section 6: the tail stays, below one block for each request, and it grows with the
#   block size. A full pool of live tokens stays full, too.
# - "KV is large, that is the problem." Section 5: equal bytes for each token, equal pools, and five times as many
#   requests. How large a token is decides one factor; how the pool is handed out decides another.
# - "It is enough to know the lengths." Orca (Oracle) knew them all, and 61.8% of its pool was not live.
#
# **Say it out loud, in 60 seconds each:**
#
# 1. What problem does paged attention solve that plain KV caching does not?
# 2. Why does fragmentation matter in a serving engine?
#
# A good answer names the four uses of a slot, says which one each allocator loses to, and ends with the number of
# requests that fit.
#
# ## Exit quiz
#
# Cards of this notebook, two of them with numbers; they join the deck of `minivllm quiz`.

# %%
FlashCards(cards=("B3", "B2.num", "B5", "B6.num", "B7", "B8"))

# %%
predict.calibration("04")

# %%
pool = llm.engine.kv.pool
assert not llm.engine.has_work and pool.num_free == pool.num_usable  # nothing leaked
