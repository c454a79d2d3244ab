# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Same equation, new addresses: the Triton kernel
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/06_paged_attention_kernel.ipynb)
#
# Notebook 05 cut K and V into blocks and scattered them over a pool. The formula of attention,
# softmax(q K / √d) V, knows nothing of blocks. So who puts the pieces together again, does the answer change, and
# what does it cost?
#
# The answer is one program for the GPU, a **kernel**. We step through the engine's own kernel, here, with or
# without a GPU. Run the cells in order, and guess before you look.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
import os

import numpy as np

from minivllm import LLM, SamplingParams
from minivllm.attention.reference import paged_attention_reference
from minivllm.bench.paging_cost import Settings, live_figures
from minivllm.course.calculators import (
    achieved_share,
    decode_attention_intensity,
    itl_slope_us,
    ridge_point,
    tile_padding,
)
from minivllm.course.check import ask, check
from minivllm.course.kernel_turns import LOG2_E, distinct_blocks
from minivllm.course.paging_cost import PagingCost, net_gain
from minivllm.course.predict import predict
from minivllm.lab.block_shuffle import LiveStep
from minivllm.lab.kernel_steps import stepped
from minivllm.views.block_shuffle import BlockShuffle
from minivllm.views.cost_curves import CostCurves
from minivllm.views.flash_cards import FlashCards
from minivllm.views.kernel_stepper import KernelStepper

# %% [markdown]
# ## Warm-up
#
# Two cards of notebook 05. Answer aloud before you open them.

# %%
FlashCards(cards=("C8", "C7"))

# %% [markdown]
# ## 1. Does it matter where the blocks lie?
#
# A real model writes three texts at once, in a pool of 23 blocks of 8 tokens. The pool has worked before, so its
# free blocks are out of order, and so are the block tables.

# %%
llm = LLM(
    "smollm2-135m", dtype="float32", block_size=8, num_blocks=24, show_progress=False
)
text_engine, pool = llm.text_engine, llm.engine.kv.pool
greedy = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
llm.generate(["Once", "Twice", "Three times"], greedy, use_tqdm=False)
llm.reset_prefix_cache()

PROMPTS = (
    "A block table is a list of numbers. Each number names one block of the pool, and"
    " the kernel that computes attention looks up where the next tokens lie",
    "The cat sat on the mat, looked at the dog, and then it said that",
    "One, two",
)
running = [text_engine.add(text_engine.check(prompt), greedy) for prompt in PROMPTS]
for _ in range(4):
    text_engine.step()
step = LiveStep(llm)  # the newest token of each request, once more, on a copy
for name, table, count in zip("ABC", step.tables, step.batch.num_tokens, strict=True):
    print(f"request {name}: {int(count):2} tokens in blocks {table}")

# %% [markdown]
# Now move the blocks. All 23 trade places, in every layer, and the tables are changed to match. Then the whole
# model computes the same step again: 30 layers, and for each request one number, a **logit**, for every word of the
# vocabulary.

# %%
changed = predict(
    "06.p1",
    "All blocks trade places and the tables follow. How many of the 147,456 logits "
    "change, if only in their last bit?",
    ...,
    unit="logits",
)
changed

# %%
shuffled = step.shuffle(num_moved=23, seed=0)
assert shuffled.num_different == 0 and shuffled.greatest_difference == 0
print("tables before:", shuffled.before)
print("tables after :", shuffled.after)
changed.reveal(shuffled.num_different)

# %% [markdown]
# Not "almost the same": **no bit** changed. The kernel reads the same numbers in the same order; only the addresses
# differ. Move the slider, try other shuffles. Then let the tables stay as they were, and see that the comparison
# can fail.

# %%
BlockShuffle(step.shuffle, step.num_blocks)

# %%
lost = step.shuffle(num_moved=23, seed=0, is_followed=False)
print(
    f"{lost.num_different:,} of {lost.num_values:,} logits differ when the tables stay"
)
assert lost.num_different > 0 and lost.greatest_difference > 0

# %% [markdown]
# The code that computed this depends on your machine: torch's operators on a CPU
# ([`TorchAttention`](../minivllm/attention/torch_backend.py)), our kernel on a GPU
# ([`TritonAttention`](../minivllm/attention/triton_backend.py)). For the kernel on a GPU there is a recording too.
# One H200 read the same keys from blocks of 1, 8, 16 ... 256 tokens, scattered and in order, and from contiguous
# memory, for 15 pairs of a batch and a length:

# %%
recorded = PagingCost.load()  # plain: our portable kernel; engine: the one for Hopper
points = recorded.same_bits("plain")
print(f"{len(points)} points, {points[0][2]} layouts each: all bits equal")
assert len(points) == 15 and {layouts for _, _, layouts in points} == {11}

# %% [markdown]
# What would change bits is another order of additions. The kernel for Hopper GPUs takes smaller tiles where blocks
# have 8 tokens, so there its last bits differ from those in larger blocks, and are as good.

# %%
hopper = [recorded.row("engine", "scattered", 8, 4096, size) for size in (8, 16, 64)]
for row in hopper:
    print(f"blocks of {row.block_size:2}: checksum {row.bits}, error {row.error}")
assert len({row.bits for row in hopper}) > 1

# %% [markdown]
# ## 2. The equation, twice
#
# So is it the right answer? Here are one layer's queries and cache from the step above. First as a textbook would
# have it: put the request's keys side by side, then softmax. Then
# [`paged_attention_reference`](../minivllm/attention/reference.py), which follows the block table for every single
# token.

# %%
inputs = step.inputs(layer=10)  # q, k_cache, v_cache, block_table, num_tokens


def textbook(inputs, request):
    """softmax(q K / √d) V over contiguous keys, [heads, head size], in float64."""
    count = int(inputs.num_tokens[request])
    table = inputs.block_table[request].numpy()
    q = inputs.q[request].double().numpy()
    k, v = (
        cache.double().numpy()[table].reshape(-1, *cache.shape[2:])[:count]
        for cache in (inputs.k_cache, inputs.v_cache)
    )
    group = len(q) // k.shape[1]  # query heads that share a KV head
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("hd,thd->ht", q, k) / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("ht,thd->hd", weights / weights.sum(1, keepdims=True), v)


# %%
def by_table(inputs):
    """The same, token by token through the block table, [requests, heads, size]."""
    tables, counts = inputs.block_table.tolist(), inputs.num_tokens.tolist()
    ones = [1] * len(counts)
    return paged_attention_reference(*inputs.tensors[:3], tables, ones, counts).numpy()


paged = by_table(inputs)
contiguous = np.stack([textbook(inputs, request) for request in range(len(inputs.q))])
assert np.abs(paged - contiguous).max() < 1e-12
print("greatest difference: less than 0.000000000001")

# %% [markdown]
# What is left, around 10⁻¹⁶, is the order of additions in float64. Paged attention **is** attention: every key is used,
# none is skipped, nothing is estimated.
#
# ## 3. What one program does
#
# A kernel is launched as many **programs**; on a GPU they run side by side. Each knows only its number, the
# *program id*, and must find its own work. Ours is [`stream_kernel`](../kernels/minivllm_kernels/paged_decode.py).
# Its work is a line of **tiles**: 16 tokens of one request, for one KV head. Every program gets an equal stretch of
# the line.
#
# Without a GPU, the same source runs in Triton's **interpreter**: each program becomes a Python function, one
# after the other. The interpreter must be chosen when Python starts. So a second process runs it, watches the
# kernel's variables at every turn of its loop ([`KernelWatch`](../minivllm/lab/kernel_steps.py)), and this
# notebook's engine keeps the kernels it had.

# %%
mode = os.environ.get("TRITON_INTERPRET")
inputs, steps = stepped(inputs)  # without triton: a recorded launch, and its inputs
assert os.environ.get("TRITON_INTERPRET") == mode
case = steps.case
print(steps.origin)
tiles = predict(
    "06.p2",
    f"Requests of {', '.join(map(str, case.num_tokens))} tokens, {case.num_kv_heads} "
    f"KV heads, tiles of {case.tile} tokens. How many tiles are there in all?",
    ...,
    unit="tiles",
)
tiles

# %%
print(
    f"{len(steps.turns)} tiles, {case.num_programs} programs, {case.share} tiles each"
)
rows = [int(tile_padding(count, case.tile)) for count in case.num_tokens]
print("rows computed for each KV head:", rows)
assert len(steps.turns) * case.tile == sum(rows) * case.num_kv_heads
tiles.reveal(len(steps.turns))

# %% [markdown]
# A request fills whole tiles, as a prompt fills whole blocks: 17 tokens cost as much as 32. Now step. Choose a program
# and a turn, or press play.
#
# Look at five things. Which entries of the table are read? Where do these blocks lie? What is masked? How do the
# running maximum and sum change? And how close is the output so far to the finished one?

# %% tags=["readme:kernel_stepper"]
KernelStepper(steps, program=0, turn=2)

# %% [markdown]
# ### Look-up
#
# The only line that knows of blocks: slot = table[token // block size] · block size + token % block size. The kernel
# reads one entry for each token of the tile, and neighbours may lie anywhere. Here is the same line in Python, for
# every turn of every program.

# %%
for turn in steps.turns:
    table = case.block_tables[turn.request]
    tokens = range(turn.start, turn.start + len(turn.slots))
    b = case.block_size
    assert list(turn.slots) == [table[t // b] * b + t % b for t in tokens]
num_jumps = sum(len(distinct_blocks(turn, case.block_size)) for turn in steps.turns)
print(f"{len(steps.turns)} tiles lay in {num_jumps} pieces, and no program minded")

# %% [markdown]
# ### Mask
#
# The last tile of a request is seldom full. Behind the last token lie slots that hold garbage, even NaN. Their
# score becomes −∞, so their weight is e^−∞ = 0. The stepper hatches them.

# %%
masked = [case.tile - len(turn.slots) for turn in steps.turns]
print("masked places, tile by tile:", masked)
ends = [(-count) % case.tile for count in case.num_tokens]
assert sum(masked) == case.num_kv_heads * sum(ends)

# %% [markdown]
# ### Group
#
# Several query heads share one KV head (**GQA**, notebook 02). One program handles them together, so that a key is
# read once for all of them.

# %%
reads = predict(
    "06.p3",
    "If every query head had a program of its own, how many times as many bytes of "
    "K and V would be read? "
    f"({case.num_heads} query heads, {case.num_kv_heads} KV heads)",
    ...,
    unit="times",
)
reads

# %%
keys_read = [offset for turn in steps.turns for offset in turn.k_offsets]
assert len(keys_read) == len(set(keys_read))  # every row of K once, by one program
assert all(len(turn.scores) == case.group for turn in steps.turns)  # for all its heads
num_rows = case.num_kv_heads * sum(case.num_tokens)
print(f"{len(keys_read)} rows of K were read, {num_rows} are stored")
reads.reveal(len(keys_read) * case.group / num_rows)

# %% [markdown]
# ### Online softmax
#
# Softmax needs the sum over *all* keys, but a program sees 16 at a time. It keeps a running maximum m, a sum l and
# an output o. When a larger score comes, all that was summed before shrinks by e^(old m − new m). Below, three
# lines of numpy repeat each turn of the kernel from its scores.

# %%
values = inputs.v_cache.numpy().reshape(-1, case.num_kv_heads, case.head_size)
before, worst = None, 0.0
for stage in steps.stages:
    if not hasattr(stage, "scores"):  # a pair is done
        before = None
        continue
    scores = np.array(stage.scores) / LOG2_E  # the kernel counts in powers of two
    m, total, out = before or (np.full(case.group, -np.inf), 0.0, 0.0)
    new = np.maximum(m, scores.max(axis=1))
    p, shrink = np.exp(scores - new[:, None]), np.exp(m - new)
    total = total * shrink + p.sum(axis=1)
    out = shrink[:, None] * out + p @ values[list(stage.slots), stage.kv_head]
    errors = np.abs(total - stage.total).max(), np.abs(out - stage.output).max()
    worst, before = max(worst, *errors), (new, total, out)
print("repeated", len(steps.turns), "turns")
assert worst < 1e-4  # fp32 in the kernel, float64 here

# %% [markdown]
# ### Split and merge
#
# A stretch may end in the middle of a request. Then each program stores a **part**: its output, and the logarithm of
# its sum. Whoever stores the last part adds them up, each with the weight of its sum
# ([`merge_partials`](../kernels/minivllm_kernels/split_kv.py)). This is split-K: a single long request can keep the
# whole GPU busy.
#
# The output of a stored part is already divided by its own sum, so it is weighed as a whole. Exercise 06.5 hands you
# parts one step earlier, (m, l, o) with o **not** divided: there numerators and sums are added, and divided once.

# %%
parts = {end.slot: end for end in steps.ends if end.slot is not None}
for end in (end for end in steps.ends if end.merged_slots):
    merged = [parts[slot] for slot in end.merged_slots]
    lse = np.array([part.lse for part in merged])  # [parts, group]
    weights = 2 ** (lse - lse.max(axis=0))
    weights /= weights.sum(axis=0)
    output = np.einsum(
        "pg,pgd->gd", weights, np.array([part.output for part in merged])
    )
    first = end.kv_head * case.group
    kernel = np.array(steps.out[end.request][first : first + case.group])
    assert np.abs(output - kernel).max() < 1e-5
    names = " + ".join(f"program {part.program}" for part in merged)
    print(f"request {'ABC'[end.request]}, KV head {end.kv_head}: {names}")

# %% [markdown]
# On the H200 the engine has a kernel that does *not* split, for steps in which some request brings many queries. One
# long request shows what splitting is worth:

# %%
for kernel in ("ragged", "plain", "engine"):
    found = recorded.row(kernel, "scattered", batch=1, context=65536, block_size=16)
    print(f"{kernel:6}: {found.us:5.1f} µs, {100 * found.share:4.1f} % of a copy")

# %% [markdown]
# And the whole launch against the token-by-token reference:

# %%
reference = by_table(inputs)
difference = np.abs(np.array(steps.out) - reference).max() / np.abs(reference).max()
assert difference < 1e-5
print("kernel and reference agree to 5 digits and more")

# %% [markdown]
# ## 4. What does the look-up cost?
#
# In 2023 the first paged kernel was 20 to 26 % slower than a contiguous one
# ([Kwon et al., section 7.1](https://arxiv.org/abs/2309.06180)). What is it on our kernel, on one H200? The
# rival is the same kernel on contiguous keys: one "block" that holds the whole request.

# %%
cost = predict(
    "06.p4",
    "8 requests of 16,384 tokens, 32 query heads, 8 KV heads of size 128, bf16, blocks "
    "of 16. How much longer does our kernel take than on contiguous keys?",
    ...,
    unit="%",
)
cost

# %%
row = recorded.row("plain", "scattered", batch=8, context=16384, block_size=16)
base = recorded.row("plain", "contiguous", batch=8, context=16384)
print(recorded.origin)
print(f"{row.us:.1f} µs in blocks of 16, {base.us:.1f} µs on contiguous keys")
cost.reveal(round(100 * recorded.overhead(row), 1))

# %% [markdown]
# Look at all of it: over block sizes and lengths, at batch 1, 8 and 64. Two sliders at the end turn extra time into
# tokens per second: attention's share of a step, and how many more requests fit because memory is not wasted
# (notebook 04).

# %%
CostCurves(recorded)

# %% [markdown]
# One corner is worse: 64 requests of 65,536 tokens. Is it the scattering? The same blocks *in order* tell.

# %%
for layout in ("in order", "scattered"):
    found = recorded.row("plain", layout, batch=64, context=65536, block_size=256)
    print(f"{layout:9}: {100 * recorded.overhead(found):.1f} % longer, blocks of 256")
engine = recorded.row("engine", "scattered", batch=64, context=65536, block_size=16)
print(f"the kernel that the engine calls: {100 * recorded.overhead(engine):.1f} %")

# %% [markdown]
# No: blocks in order cost as much. A KV head's keys are no longer one long stretch of memory there, and the portable
# kernel feels it; the one for Hopper ([`paged_decode_hopper`](../kernels/minivllm_kernels/paged_decode_hopper.py)),
# which fetches far ahead, hardly does.
#
# ### Why so little?
#
# An entry is 4 bytes, and it leads to 16 tokens of 4,096 bytes of K and V each. Decode attention
# waits for bytes in any case: it does 4 FLOPs for each, and the H200 could do 206. So a look-up hides in the wait,
# as long as each piece is long enough to read at full speed.

# %%
table_bytes, kv_bytes = 4, 16 * 2 * 8 * 128 * 2
print(f"table: {table_bytes / kv_bytes:.4%} of the bytes")
print("decode attention:", decode_attention_intensity("llama-3-8b"))
print("ridge of the chip:", ridge_point(recorded.chip))
for size in recorded.block_sizes:
    found = recorded.row("plain", "scattered", 8, 16384, size)
    print(f"blocks of {size:3}: {100 * recorded.overhead(found):5.1f} % longer")

# %% [markdown]
# From 16 tokens on it hardly matters, and that is vLLM's default. (The paper found 16 to 128 good for long chats and 16
# to 32 for short ones: larger blocks waste more.) The alternative to a paged kernel is to copy the blocks together
# first, and then to attend as usual:

# %%
copying = predict(
    "06.p5",
    "Same shape: first copy each request's blocks together, then torch's attention. "
    "How many times as long as our paged kernel?",
    ...,
    unit="times",
)
copying

# %%
gathered = recorded.row("gather, then SDPA flash", "scattered", 8, 16384, 16)
print(f"{gathered.us:.0f} µs against {row.us:.0f} µs")
copying.reveal(round(gathered.us / row.us, 1))

# %% [markdown]
# ### How close to the memory's speed?
#
# The **share of peak** is bytes moved over time, over the chip's bandwidth. Two peaks are in use: the data sheet's
# 4.8 TB/s, and what a plain copy reaches on the same GPU. And the **slope**: what one more token of context adds to
# the time of a layer. The chip's bandwidth sets a floor for that, too.

# %%
num_bytes = recorded.num_bytes(row)  # K and V, and q and out of one token each
assert num_bytes == 8 * (16384 * 2 * 8 * 128 + 2 * 32 * 128) * 2
share = achieved_share(num_bytes, row.us / 1e3, recorded.chip)
print(f"{share} by the data sheet, {100 * row.share:.1f} % of a copy")
long = recorded.row("plain", "scattered", batch=8, context=65536, block_size=16)
slope = (long.us - row.us) / (8 * (65536 - 16384))
floor = float(itl_slope_us(2 * 8 * 128 * 2, recorded.chip))
print(f"one token more: {1e3 * slope:.3f} ns, at least {1e3 * floor:.3f} ns")
assert slope > floor

# %% [markdown]
# Reading can even beat a copy, which must write as well: at batch 64 some shares pass 100 %. Take a share for what it
# is compared with.
#
# ### When is it not worth it?
#
# The look-up always costs a little; what it buys is room. If no more requests fit or come, there is nothing to
# win: short answers of known length, a pool that is never full, a step where attention is all.

# %%
ours = [r for r in recorded.rows if (r.kernel, r.layout) == ("plain", "scattered")]
worst = max(ours, key=recorded.overhead)
print(
    f"2023, memory was the limit: 25% slower, tokens/s × {net_gain(0.25, 0.2, 2):.3f}"
)
worst_of_16 = max((r for r in ours if r.block_size == 16), key=recorded.overhead)
for label, found, part, times in (
    ("the same on our kernel", row, 0.2, 2.0),
    ("nobody waits for memory", row, 0.2, 1.0),
    ("worst in blocks of 16, attention is all", worst_of_16, 1.0, 1.0),
    ("worst of all, attention is all", worst, 1.0, 1.0),
):
    extra = recorded.overhead(found)
    shape = f"{found.batch} × {found.context:,}, blocks of {found.block_size},"
    gain = net_gain(extra, part, times)
    print(f"{label:39} {shape:26} {extra:5.1%} slower, tokens/s × {gain:.3f}")
assert net_gain(0.25, 0.2, 1.0) < 1 < net_gain(0.25, 0.2, 1.1)
hopper = [r for r in recorded.rows if (r.kernel, r.layout) == ("engine", "scattered")]
assert max(recorded.overhead(r) for r in hopper if r.block_size >= 16) < 0.03

# %% [markdown]
# Where nobody waits for memory, a usual step loses less than a percent. The worst point that was measured loses a fifth
# of its tokens: the portable kernel, blocks of 8 tokens or fewer, 64 requests of 65,536 tokens, and a step that is
# nothing but attention. Engines page all the same: in blocks of 16 or more, with a kernel made for the GPU, most of
# that loss is gone: 3% longer at most.
#
# With a GPU in this machine, the next cell measures it; without one, the recording stands in for it.

# %% tags=["nbval-ignore-output"]
figures = live_figures(Settings(batches=(8,), contexts=(16384,), block_sizes=(16, 64)))
here = PagingCost.of(figures) if figures else recorded
measured = here.find("plain", "scattered", 8, 16384, 16)
print(
    "measured here" if figures else "no GPU here: these are the H200's figures",
    measured,
)

# %% [markdown]
# ## Exercises
#
# Five pieces of the kernel, each with hidden tests, and one measurement. Red until you work. Another try gives
# another hint; `check.redraw("06.1")` draws other numbers, `solution("06.1")` from `minivllm.course.check` shows the
# way.

# %%
ask("06.1")

# %%
check("06.1", ...)  # your function for the dots

# %%
ask("06.2")

# %%
check("06.2", ...)

# %%
ask("06.3")

# %%
check("06.3", ...)

# %%
ask("06.4")

# %%
check("06.4", ...)

# %%
ask("06.5")

# %%
check("06.5", ...)

# %% [markdown]
# The last one asks about the measurement above: yours if this machine has a GPU, else the H200's.

# %% tags=["nbval-ignore-output"]
facts = here.exercise_facts(measured) if measured else {}
ask("06.6", facts=facts)

# %% tags=["nbval-ignore-output"]
check("06.6", ..., facts=facts)

# %% [markdown]
# ## Not true
#
# - **"PagedAttention approximates", "it is sparse attention".** Sparse attention skips keys. Section 3 counted: every
#   stored row of K was read exactly once. Section 1: no bit changed.
# - **"PagedAttention is FlashAttention."** FlashAttention is the loop of section 3: tiles and an online softmax, so that
#   the table of all scores is never written to memory. PagedAttention is where the tiles are read from. Each works
#   without the other, and the next cell has both halves: the tile loop without blocks (contiguous), and blocks
#   without a tile loop (the reference of section 2).

# %%
tiles_only = recorded.row("plain", "contiguous", 8, 16384)  # the same loop, no paging
both = recorded.row("plain", "scattered", 8, 16384, 16)
print("tile loop, no blocks :", tiles_only.bits)
print("tile loop and blocks :", both.bits)
assert tiles_only.bits == both.bits
print("blocks, no tile loop : by_table(inputs) of section 2, equal to the textbook")
assert np.abs(paged - contiguous).max() < 1e-12

# %% [markdown]
# **Say it out loud, in 60 seconds:** PagedAttention changes neither the formula nor the result. What, then, does the
# kernel do that a contiguous one does not, where does the time go, and when would you rather not page?
#
# ## Exit quiz

# %%
FlashCards(cards=("C9", "C10", "C11.num", "L1", "L2"))

# %%
predict.calibration("06")

# %%
for generation in running:
    text_engine.abort(generation)
llm.reset_prefix_cache()
assert pool.num_free == pool.num_usable  # nothing leaked
