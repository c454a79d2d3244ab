# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · What does the cache buy, and what does it not change?
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/03_the_kv_cache.ipynb)
#
# A language model writes one token at a time, and each token depends on all before it. So does it read the whole
# text again for every word? Without a **KV cache** it does. Here we take the cache away from a real model, count
# what happens, and look for what changed: the work, the answer, the memory.
#
# Run the cells in order, and guess before you look.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
import gc
from dataclasses import replace

import numpy as np
import torch

from minivllm import LLM
from minivllm.course.calculators import (
    kv_bytes_per_token,
    token_forwards,
    tokens_where_kv_passes_weights,
    weight_bytes,
)
from minivllm.course.check import ask, check
from minivllm.course.exercises.nb03 import toy_forward
from minivllm.course.predict import predict
from minivllm.lab.uncached import (
    at_once,
    cached,
    in_transformers,
    load_transformers,
    logits_given,
    record_past,
    uncached,
    wrong_positions,
)
from minivllm.views.attention_triangle import AttentionTriangle, passes_of
from minivllm.views.bars import Bars
from minivllm.views.flash_cards import FlashCards
from minivllm.views.logit_difference import LogitDifference

# %% [markdown]
# ## Warm-up
#
# Two cards of earlier notebooks. Answer aloud before you open them.

# %%
FlashCards(cards=("A2", "F2"))

# %% [markdown]
# ## 1. How much work is it without a cache?
#
# We start from a prompt of one token, `Memory`, and take 19 steps: each step chooses one more token. A
# **token-forward** is one token that goes through the whole model once. Without a cache, step 1 sends 1 token
# through the model, step 2 sends 2, and so on.

# %%
work = predict(
    "03.p1",
    "19 steps from a prompt of one token, no cache: how many token-forwards in all?",
    ...,
    unit="token-forwards",
)
work

# %% [markdown]
# First a witness that we did not write: `transformers`, with `use_cache=False` and then with `True`. Nobody
# calculates here. Hooks on the model's own embedding, `k_proj` and `v_proj` count the rows that they compute
# ([`in_transformers`](../minivllm/lab/uncached.py)).

# %%
NUM_STEPS, PROMPT_IDS = 19, [26741]  # "Memory"
witness = load_transformers()
theirs_off = in_transformers(witness, PROMPT_IDS, NUM_STEPS, use_cache=False)
theirs_on = in_transformers(witness, PROMPT_IDS, NUM_STEPS, use_cache=True)
del witness
gc.collect()
print("tokens a step, no cache:", *(each.num_tokens for each in theirs_off.passes))
print("tokens a step, cache   :", *(each.num_tokens for each in theirs_on.passes))
work.reveal(theirs_off.num_token_forwards)

# %% [markdown]
# Now our engine. `cached` is its normal generation. `uncached` asks for each token with a new request that holds
# the whole text so far, and nothing of it is stored. (The engine also has a prefix cache *between* requests,
# notebook 08; here it is off.)

# %%
llm = LLM(
    "smollm2-135m",
    dtype="float32",
    num_blocks=8,
    enable_prefix_caching=False,
    show_progress=False,
)
reused = cached(llm, PROMPT_IDS, NUM_STEPS)
without = uncached(llm, PROMPT_IDS, NUM_STEPS)
print(repr(llm.tokenizer.decode(reused.token_ids)))
for name, run in {"without": without, "with": reused}.items():
    print(f"{name:8} {run.num_token_forwards:4} token-forwards,", end=" ")
    print(f"{run.num_kv_projections:,} rows of K and as many of V in 30 layers")

# %% [markdown]
# Counted twice, by two programs, and there is a closed form: 1 + 2 + ... + n = n (n + 1) / 2 without a cache, n with
# one. At 19 tokens that is a factor of 10, at 2,000 tokens a factor of 1,000.

# %%
worked = token_forwards(NUM_STEPS)
print(worked)
assert without.num_token_forwards == theirs_off.num_token_forwards == int(worked) == 190
assert reused.num_token_forwards == theirs_on.num_token_forwards == NUM_STEPS
assert without.num_kv_projections == theirs_off.num_kv_projections == 30 * 190
assert reused.num_kv_projections == theirs_on.num_kv_projections == 30 * 19

# %% [markdown]
# The triangle shows one step of either run: a row is a query, a column a key, and a query meets the keys up to its
# own. Hatched cells are keys that were computed before and are computed again. Move the step; then switch the run: what
# was hatched is grey, read from the cache, in the one row that is left to compute.

# %%
texts = [llm.tokenizer.decode([token_id]) for token_id in reused.token_ids]
runs = {"without a cache": without.trace, "with the cache": reused.trace}
AttentionTriangle(runs, texts)

# %% [markdown]
# **Why it works:** a token may only look back. Later tokens cannot change what an earlier one is in any layer, so its
# K and V are final when they are made, and can be kept.
#
# In the engine: [`Scheduler._advance_running`](../minivllm/engine/scheduler.py) schedules only the tokens that are not
# computed yet, [`build_batches`](../minivllm/runner/batch.py) gives them their positions and slots, and
# [`TorchAttention.attend`](../minivllm/attention/torch_backend.py) stores their K and V and reads all that is stored.
#
# ## 2. Does the cache change the answer?
#
# A **logit** is the score of one token of the vocabulary; greedy decoding takes the best. We compare all 49,152 of
# them, at each of the 19 steps.

# %%
change = predict(
    "03.p2",
    "Logits with and without the cache: how far apart are they, at most?",
    ...,
    choices=(
        "equal in every bit",
        "by rounding: less than 0.001",
        "by an approximation: more than 0.001",
    ),
)
change


# %%
def greatest_difference(one: np.ndarray, other: np.ndarray) -> float:
    return np.abs(one - other).max().item()


TOLERANCE = 1e-3  # fp32; the logits themselves are as large as 30
assert reused.output_ids == without.output_ids  # all 19 tokens
assert reused.output_ids == theirs_on.output_ids == theirs_off.output_ids
greatest = greatest_difference(reused.logits, without.logits)
assert greatest < TOLERANCE < 20 < np.abs(reused.logits).max()
change.reveal("by rounding: less than 0.001" if greatest else "equal in every bit")

# %% [markdown]
# Below, the circles are the greatest difference of any logit, and the diamonds the lead of the best token over the
# second. A token can only change where twice the circle reaches the diamond. Choose another pair: `transformers`
# differs from itself by as much, and two programs *without* any cache do too.

# %% tags=["nbval-ignore-output"]
LogitDifference(
    {
        "engine: with the cache, without": (reused.logits, without.logits),
        "transformers: with, without": (theirs_on.logits, theirs_off.logits),
        "no cache: engine, transformers": (without.logits, theirs_off.logits),
    },
    llm.tokenizer.decode,
    TOLERANCE,
)

# %% [markdown]
# So what is this difference? The numbers that are added are the same, but one row at a time they are added in
# another order than 19 rows at a time, and a computer's sum depends on the order:

# %%
print((0.1 + 0.2) + 0.3, 0.1 + (0.2 + 0.3))
assert (0.1 + 0.2) + 0.3 != 0.1 + (0.2 + 0.3)

# %% [markdown]
# So the cache approximates nothing; only the order of sums moves. `LLM(batch_invariant=True)` fixes that order on a
# CPU, for some speed. It is an engine of its own, too large to stand beside this one, so no cell runs it: the
# [test of this notebook](../tests/test_uncached.py) does, with this model and prompt, and finds a difference of 0 in
# all 19 x 49,152 logits. `minivllm study equality` does it for the whole engine.
#
# ## 3. What does the cache not change?
#
# Each step now sends a single token through the model. Is a step then equally cheap, however long the text is?

# %%
keys = predict(
    "03.p3",
    "With the cache: how many keys does the query of step 19 read, in each layer?",
    ...,
    unit="keys",
)
keys

# %%
print("keys read by each step:", *reused.num_keys_read)
assert reused.num_keys_read == [*range(1, 20)] == without.num_keys_read
assert sum(reused.num_keys_read) == 190
for name, run in runs.items():
    scores = sum(each.num_scores for each in passes_of(name, run))
    print(f"{name:15} {scores:5,} scores in each head of a layer, 19 steps together")
keys.reveal(reused.num_keys_read[-1])

# %% [markdown]
# All of them. A **score** is one query that meets one key. Scores fall from 1,330, n (n + 1) (n + 2) / 6 or about
# n³ / 6, to 190, n (n + 1) / 2 or about n² / 2, as no old query is asked again. What stays is that step n reads n keys,
# each with its value. In bytes, as the engine's tensors hold them:

# %%
num_slots = llm.config.num_blocks * llm.config.block_size
bytes_per_token = llm.storage.num_bytes // num_slots
assert bytes_per_token == int(kv_bytes_per_token("smollm2-135m", "float32"))
read_kb = [num_keys * bytes_per_token / 1000 for num_keys in reused.num_keys_read]
shown = range(0, 19, 3)
Bars(
    "With the cache, a step reads all K and V there are: it grows with the text",
    "step",
    "kB read by attention in this step",
    [step + 1 for step in shown],
    {"K and V": [round(read_kb[step]) for step in shown]},
)

# %% [markdown]
# Is every one of them needed? An experiment: take the pass of step 19, and set the K of one old token to zero in all
# layers. Each of the 18 old tokens gets its turn. A blank key still gets a score, 0, and its value is still read; but
# if some key were not read, blanking it would change nothing.

# %%
known = reused.token_ids[:-1]  # the 19 tokens that the last step stands on
past = record_past(llm, known)  # Q, K and V of the 18 old ones, by layer
plain = logits_given(llm, known, past)
moved = []
for position in range(18):
    blank = torch.tensor([position], device=past.k[0].device)
    blanked = [k.index_fill(0, blank, 0) for k in past.k]
    logits = logits_given(llm, known, replace(past, k=blanked))
    moved.append(greatest_difference(logits, plain))
num_read = sum(distance > 100 * TOLERANCE for distance in moved)
print(f"{num_read} of 18 old keys matter, by more than {100 * TOLERANCE} in some logit")
assert num_read == 18

# %% [markdown]
# The other thing that grows is memory: what a step reads must lie somewhere. The cache trades arithmetic for bytes.
# On a serving GPU it shares the memory with the weights, the activations of the largest step, captured graphs and the
# kernels' workspaces.

# %%
weights = weight_bytes("smollm2-135m", "float32")
held = reused.num_keys_read[-1] * bytes_per_token
print(f"K and V of 19 tokens {held:13,} bytes")
print(f"weights              {int(weights):13,} bytes")
border = tokens_where_kv_passes_weights(weights, bytes_per_token)
print(border)
assert held == 19 * bytes_per_token < int(weights)

# %% [markdown]
# So a short text is cheap to read: the weights are read in every step too, and weigh more until the requests together
# hold that many tokens. Which requests share that memory, and how it is wasted, is notebook 04.
#
# ## 4. Why K and V, but not Q?
#
# All three are rows that a token's hidden state is projected to, by one matrix
# ([`SelfAttention.forward`](../minivllm/models/llama.py)). The engine stores two of them. The experiment: leave the K
# and V of the 18 old tokens as the cache holds them, and replace only their queries.

# %%
queries = predict(
    "03.p4",
    "Keep the cached K and V of the old tokens; replace only their queries by noise, "
    "in all layers. What happens to the next token?",
    ...,
    choices=("its logits do not change", "they change a little", "it is nonsense"),
)
queries

# %% [markdown]
# The noise is ten times too large, in all 30 layers. Then the same with the keys instead, and with one single value of
# the oldest token.

# %%
torch.manual_seed(0)
noise = {
    name: [10 * torch.randn_like(rows) for rows in getattr(past, name)] for name in "qk"
}
first = torch.tensor([0], device=past.v[0].device)
values = [
    v.index_fill(0, first, 0) if layer == 5 else v for layer, v in enumerate(past.v)
]
by_queries = logits_given(llm, known, replace(past, q=noise["q"]))
by_keys = logits_given(llm, known, replace(past, k=noise["k"]))
by_one_value = logits_given(llm, known, replace(past, v=values))
print("old queries are noise:", greatest_difference(by_queries, plain))
assert greatest_difference(by_queries, plain) == 0
assert greatest_difference(by_keys, plain) > 1
assert greatest_difference(by_one_value, plain) > TOLERANCE
queries.reveal("its logits do not change")

# %% [markdown]
# **Why:** the newest token brings its own query. An old query was used once, in its own step; what it found went into
# the K and V of the layers above, and those are kept. The storage has no plane for it:
# [`KVStorage`](../minivllm/runner/kv_storage.py).

# %%
num_layers, num_planes = llm.storage.data.shape[:2]
print(f"{num_layers} layers x {num_planes} planes: K and V")
assert (num_layers, num_planes) == (30, 2)

# %% [markdown]
# ## 5. A bug that nobody reports
#
# A new token must get its true position, the number of tokens stored before it: RoPE turns query and key by an angle
# for it ([`rotate`](../minivllm/models/layers.py)). RoPE is **relative**: a score depends only on the difference of the
# two angles, so on how far apart query and key stand. A shift of all positions alike would change nothing.
#
# We now plant a classic mistake in the engine: the prompt's token keeps its position, and every decoded token gets one
# that is one too large. Slots and tables stay right, so nothing crashes. Which distances are wrong then?

# %%
bug = predict(
    "03.p5",
    "With positions one too large: how many of the 19 greedy tokens stay the same?",
    ...,
    unit="tokens",
)
bug

# %%
bugs = {"one too large": lambda p: p + 1, "always 0": lambda p: p * 0}
broken = {}
for name, wrong in bugs.items():
    with wrong_positions(llm, wrong):
        broken[name] = cached(llm, PROMPT_IDS, NUM_STEPS)
    print(f"{name:13}", repr(llm.tokenizer.decode(broken[name].output_ids)))
pairs = zip(broken["one too large"].output_ids, reused.output_ids, strict=True)
num_same = sum(a == b for a, b in pairs)
by_bug = greatest_difference(broken["one too large"].logits[1], reused.logits[1])
assert by_bug > 1000 * TOLERANCE
bug.reveal(num_same)

# %% [markdown]
# Among the decoded tokens all distances are right; here just those to the one token of the prompt are one too large.
# That is why the text can look right. With "always 0" every distance among the decoded tokens is gone, and it still
# writes English. The logits tell at once: they are off by thousands of tolerances. This is why an uncached run is worth having: it is the slow twin that is obviously right.

# %% tags=["nbval-ignore-output"]
LogitDifference(
    {
        f"positions {name}, and right": (run.logits, reused.logits)
        for name, run in broken.items()
    },
    llm.tokenizer.decode,
    TOLERANCE,
)

# %% [markdown]
# ## 6. Is the cache for training, too?
#
# In training the text is known before the model runs: every token is there, and at each position the model is asked
# for the next one.

# %%
training = predict(
    "03.p6",
    "The same 19 tokens, all known at once: how many token-forwards for all 19 "
    "predictions, without any cache?",
    ...,
    unit="token-forwards",
)
training

# %%
once = at_once(llm, known)
[only_pass] = once.passes
print(f"{len(once.passes)} pass, {only_pass.num_tokens} token-forwards", end=", ")
print(f"logits for {len(only_pass.logits)} positions")
assert greatest_difference(only_pass.logits, reused.logits) < TOLERANCE
assert only_pass.logits.argmax(axis=1).tolist() == reused.output_ids
training.reveal(once.num_token_forwards)

# %% [markdown]
# One pass gives what 19 steps gave, and each token goes through the model once in any case: there is no repetition
# to save. After the optimizer's step the weights are others, and every stored K and V would be out of date. The
# triangle has this pass as a third run. A prompt is computed in the same way, which is why it goes fast.

# %%
AttentionTriangle({"all at once, as in training": once.trace, **runs}, texts)

# %% [markdown]
# ## Exercises
#
# Red until you work. Another try gives another hint; `check.redraw("03.2")` draws other numbers.
#
# **03.1** `toy_forward` stands in for the model. It appends the "K and V" of the tokens it is given to the cache, and
# its answer depends on all that is there and on the positions. Fill in the loop: the tokens of the slow loop, no
# position computed twice. Begin with an empty `cache` and a copy of the prompt.

# %%
cache = []
print("next token:", toy_forward([5, 7], cache, 0), "cache:", cache)
ask("03.1")


# %%
def generate(forward, prompt, num_new):
    """The num_new greedy tokens after the prompt, each position computed once."""
    ...


check("03.1", generate)

# %% [markdown]
# **03.2** The count, for another length. `token_forwards` shows its working when you are done.

# %%
ask("03.2")

# %%
check("03.2", ...)  # [without, with]

# %% [markdown]
# **03.3** Section 4, as an interviewer asks it.

# %%
ask("03.3")

# %%
check("03.3", ...)  # a letter

# %% [markdown]
# **03.4** One line of a decode step was changed. Which? Think of section 5, but it need not be the position.

# %%
ask("03.4")

# %%
check("03.4", ...)  # the number of a line

# %% [markdown]
# ## Not true
#
# - "The cache approximates." Section 2: all tokens equal, logits apart by rounding, as two programs without any cache
#   are. (In a fixed order of sums by nothing, says the test.)
# - "The cache removes the cost of attention." Section 3: step n still reads n keys and values, and blanking any one
#   moves the logits. It removes what was repeated: the work in all the matrices, and the scores of old queries.
# - "The cache is for training." Section 6: 19 token-forwards with no cache at all.
#
# **Say it out loud, in 60 seconds:** what is stored and why not Q, what falls from n (n + 1) / 2 to n, what still grows
# with every token, and how you would find a position that is off by one.
#
# ## Exit quiz

# %%
FlashCards(cards=("A1", "A8", "A9", "A10"))

# %%
predict.calibration("03")

# %%
pool, modules = llm.engine.kv.pool, llm.runner.model.modules()
assert pool.num_free == pool.num_usable  # no block leaked
assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)  # no hook
