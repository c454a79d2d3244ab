# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · Can checking be cheaper than writing?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/12_speculative_decoding.ipynb)
#
# A model writes one token a step, and each step reads all of its weights. **Speculative decoding** lets
# somebody cheap guess the next few tokens, the **drafts**, and lets the model check all of them in one step.
# What agrees is kept. The text stays what the model would have written, exactly.
#
# The model that checks is the **target**, who guesses is the **drafter**. Run the cells in order, and guess
# before you look.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
from minivllm import LLM, SamplingParams
from minivllm.course.calculators import acceptance, best_gamma, break_even_batch
from minivllm.course.calculators import residual, ridge_point, speedup
from minivllm.course.calculators import speedup_without_bonus
from minivllm.course.check import ask, check
from minivllm.course.predict import predict
from minivllm.course.speculation_records import SpeedRuns, positions_of
from minivllm.draft_events import BlocksTrimmed, DraftJudged
from minivllm.events import StepRan
from minivllm.lab.invariants import check_invariants
from minivllm.lab.losslessness import RULES, Rule, trial, trials
from minivllm.lab.speculation_rounds import real_rounds
from minivllm.speculative.eagle_model import WEIGHTS
from minivllm.views.flash_cards import FlashCards
from minivllm.views.losslessness import Losslessness
from minivllm.views.speculation_acceptance import AcceptanceBars
from minivllm.views.speculation_batch import SpeculationBatch
from minivllm.views.speculation_round import RoundStepper
from minivllm.views.speculation_surface import SpeedupSurface

# %% [markdown]
# ## Warm-up
#
# Two cards about notebooks 01 and 05. Answer in your head or in a line, then tick the points that you named.

# %%
FlashCards(cards=("F2", "C1"))

# %% [markdown]
# ## 1. A drafter without a model
#
# The simplest drafter is **prompt lookup** ([`lookup`](../minivllm/speculative/ngram.py)): find the last few
# tokens earlier in the text and propose what followed them there. It has no weights, and is good where the
# answer repeats the prompt. It is the first drafter of the engine below. The model copies a short text: 24 tokens, up to 4 drafts a step.

# %%
guess_steps = predict("12.p1", "24 tokens, 4 drafts a step: how many steps?", ...)
guess_steps

# %%
trained = []  # drafters that come with the package, if it holds their weights
if (WEIGHTS / "eagle_smollm2.safetensors").exists():
    trained.append({"method": "eagle", "num_speculative_tokens": 4})
if (WEIGHTS / "draft_smollm2.safetensors").exists():
    trained.append({"method": "draft_model", "model": "smollm2-draft"})
llm = LLM(
    "smollm2-135m",
    dtype="float32",
    num_blocks=128,
    max_model_len=512,
    show_progress=False,
    speculative_config=[
        {"method": "ngram", "num_speculative_tokens": 4},
        {"method": "early_exit", "num_speculative_tokens": 4, "num_layers": 24},
        *trained,
    ],
)
TEXT = (
    "The block table of a request is a list of numbers. Each number names one block of "
    "the pool. A block holds sixteen tokens."
)
USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
COPY = f"{USER}Repeat this text exactly, word for word:\n{TEXT}{END}"


# %%
def greedy(num_tokens: int, **more: object) -> SamplingParams:
    """The likeliest token every time, and so many of them."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, **more)


def run(prompt: str, params: SamplingParams) -> tuple[list[int], list[int]]:
    """The tokens, and how many of them each step gave."""
    with llm.record() as trace:
        [output] = llm.generate([prompt], params, use_tqdm=False)
    steps = [sum(len(new) for _, new in step.new_tokens) for step in trace.of(StepRan)]
    return output.outputs[0].token_ids, steps


# %%
tokens, steps = run(COPY, greedy(24))
plain_tokens, plain_steps = run(COPY, greedy(24, speculative_method="off"))
print("tokens of each step:", steps)
print(llm.tokenizer.decode(tokens))
assert tokens == plain_tokens  # token for token what the model writes alone
assert len(steps) < len(plain_steps) == 24
guess_steps.reveal(len(steps))

# %% [markdown]
# A step that checks 4 drafts may give **5** tokens: at the place behind the last accepted draft the target has
# spoken, too, so its own token comes for nothing. Even where every draft is wrong, a step gives one. The rule
# is [`verify`](../minivllm/speculative/verify.py).
#
# ## 2. One round, step by step
#
# The engine's event `DraftJudged` tells what became of each round. These are rounds of the run above; the bars
# are the chances that the target gave to its likeliest tokens.

# %% tags=["nbval-ignore-output"]
rounds = real_rounds(llm, COPY, greedy(48))
whole = [one for one in rounds if one.num_accepted == len(one.drafts)]
partly = [one for one in rounds if one.num_accepted < len(one.drafts)]
ladder = RoundStepper([*whole[:2], *partly[:2]], round="3")
ladder.move("step", ladder.drawn()["steps"][1])
ladder

# %% [markdown]
# Prompt lookup is certain of its drafts. A drafter that is a model has chances **q** of its own, as the target
# has **p**, and draws its drafts from q. Then a draft stands with chance min(1, p / q). A rejected one is
# replaced by a draw from the **residual**: max(p − q, 0), made to sum to 1.
#
# In the view below p and q are yours to set. Press play, or take the stages one by one.

# %%
guess_alpha = predict(
    "12.p2", "p = .4 .3 .2 .1 and q = .5 .1 .1 .3: which share of drafts stands?", ...
)
guess_alpha

# %% tags=["readme:speculation"]
playground = RoundStepper(numbers=4)
playground.move("step", 4)
playground

# %%
p, q = (0.4, 0.3, 0.2, 0.1), (0.5, 0.1, 0.1, 0.3)
print(acceptance(p, q))
print(residual(p, q))
guess_alpha.reveal(round(float(acceptance(p, q)), 3))

# %% [markdown]
# That share is the **acceptance** alpha. Why is the output still p? A token comes as an accepted draft with chance
# q · min(1, p / q) = min(p, q), and as a replacement with chance max(p − q, 0). Their sum is p.
#
# ## 3. Break it: the losslessness lab
#
# Leave out any part of the rule, and the output is another distribution. That is not to be seen in a few
# samples: a **chi-square test** compares counts with what the target promises. A p-value below 0.01 is a fail.
# Each sample is two tokens long, so first places, second places and extra tokens are all tested.

# %%
guess_small = predict("12.p3", "6 broken rules, 100 samples: how many pass?", ...)
guess_small

# %%
found = trials()
broken = found[1:]
passed = {n: [t.name for t in broken if t.p_value(n) > 0.01] for n in broken[0].counts}
print({n: len(names) for n, names in passed.items()}, passed[100])
assert found[0].p_value(100_000) > 0.01 and not passed[100_000]
guess_small.reveal(len(passed[100]))

# %% [markdown]
# A test without **power** proves nothing: with 100 samples a broken rule may pass. Now write a rule of your own.
# `accept` and `residual` get p and q as arrays over the four tokens. Here is a tempting one, which asks a fifth less of
# each draft. Change it, run the cell, and choose rules and numbers of samples in the view.


# %%
def accept(p, q):
    """The chance that each token stands when it is drafted."""
    return (1.25 * p / q).clip(max=1)


mine = trial(Rule(accept=accept), "yours")
distance = {n: round(mine.total_variation(n), 3) for n in mine.counts}
print("total variation by samples:", distance)
assert mine.p_value(100_000) < 0.01
Losslessness([mine, *found], samples=1000)

# %% [markdown]
# (That is **lenience**: faster, and no longer the target's text. It has its use, but lossless it is not.)
#
# ## 4. How long should drafts be?
#
# If each draft stands with chance alpha, gamma drafts give (1 − alpha^(gamma+1)) / (1 − alpha) tokens a round. A draft
# costs c target steps, so a round takes gamma · c + 1 of them. Tokens over time is the **speed-up**.

# %%
guess_best = predict("12.p4", "alpha 0.75, c 0.03: how many drafts are best?", ...)
guess_best

# %%
best = best_gamma(0.75, 0.03)
print(best)
print(speedup(0.75, 4, 0.03))
print(speedup_without_bonus(0.8, 4, 0.1), "- seen in print;", speedup(0.8, 4, 0.1))
guess_best.reveal(int(best))

# %%
SpeedupSurface(alpha=0.75, num_drafts=4, cost=0.03)

# %% [markdown]
# Later drafts are seldom reached and cost the same, so each row has one best length (framed). The last line above is
# what is lost if the extra token is forgotten.
#
# ## 5. Acceptance by position, counted
#
# The formula takes one alpha for all positions. Let us count, on a prompt that copies, one that edits, and one that
# asks for something new. Beside prompt lookup now a drafter that computes: **early exit** takes the first 24 of the
# model's own 30 layers and goes straight to the logits ([`EarlyExitProposer`](../minivllm/speculative/early_exit.py)).

# %%
guess_exit = predict(
    "12.p5", "24 of 30 layers: which share of first drafts stands?", ...
)
guess_exit

# %%
EDIT = f"{USER}Repeat this text, but say page instead of block:\n{TEXT}{END}"
CHAT = f"{USER}Why is the sky blue? Explain it in a few sentences.{END}"
with llm.record() as trace:
    for method in ("ngram", "early_exit", *(each["method"] for each in trained)):
        params = greedy(24, speculative_method=method)
        llm.generate([COPY, EDIT, CHAT], params, use_tqdm=False)
judged = trace.of(DraftJudged)
counts, exits, *others = positions_of(judged)
for one in (counts, exits, *others):
    print(f"{one.method}: {one.accepted} of {one.reached} judged")
bars = [sum(one.accepted) for one in (counts, exits, *others)]
assert sum(bars) == sum(event.num_accepted for event in judged)
guess_exit.reveal(round(exits.rates[0], 2))

# %%
AcceptanceBars([counts, exits, *others], method="early_exit")

# %% [markdown]
# Early exit falls with the position: its later drafts stand on its own earlier ones. Prompt lookup does not (choose it
# above): who was right twice is in the middle of a copy. If your package holds trained drafters, they were counted,
# too: an **EAGLE head**, which drafts from the target's last hidden states, and a small model. These are few rounds;
# [their card](../minivllm/speculative/weights/MODEL_CARD.md) has many, on held-out prompts.
#
# So one alpha is a summary, and the counted tokens of a round may lie above or
# below the formula's.
#
# And was it worth it? A draft by 24 of 30 layers costs c = 0.8 target steps.

# %%
costs = {"ngram": 0.0, "early_exit": 24 / 30}
for one in (counts, exits):
    gain = one.mean_length / (4 * costs[one.method] + 1)
    print(f"{one.method}: {one.mean_length:.2f} a round, {gain:.2f}x by the formula")
assert exits.mean_length / (4 * costs["early_exit"] + 1) < 1 < counts.mean_length

# %% [markdown]
# A drafter that is right more often than a small model would be, and it loses: it costs nearly as much as the target.
#
# [`SpeculationStats`](../minivllm/engine/drafting.py) keeps these counts for you while the engine runs.
#
# ## 6. Where do the drafts live?
#
# K and V of drafts are stored like those of any token, in blocks of the request's table. What becomes of them when they
# are rejected? A request may ask for longer drafts than the engine's:

# %%
with llm.record() as trace:
    params = greedy(64, num_speculative_tokens=12)
    llm.generate([EDIT], params, use_tqdm=False)
tails = {e.step: len(e.draft_token_ids) - e.num_accepted for e in trace.of(DraftJudged)}
num_blocks = sum(len(e.block_ids) for e in trace.of(BlocksTrimmed) if e.step in tails)
print(f"{sum(tails.values())} drafts rejected, {num_blocks} blocks given back")
assert 0 < num_blocks < sum(tails.values())
check_invariants(llm.engine)

# %% [markdown]
# Few: slots behind the last valid token are written over by the next step. Only a block without any valid token
# goes back ([`KVManager.trim`](../minivllm/engine/kv_manager.py)). And no draft ever enters the prefix cache: only what
# was accepted is published.
#
# ## 7. When does it hurt?
#
# Checking is free as long as the step waits for the weights. But every request brings k + 1 tokens. At the **ridge**
# (notebook 01) arithmetic begins to cost.

# %%
guess_batch = predict("12.p6", "H100, 4 drafts: up to which batch is it free?", ...)
guess_batch

# %%
free = break_even_batch(4, ridge_point("h100"))
print(free)
guess_batch.reveal(int(free))

# %% tags=["nbval-ignore-output"]
runs = SpeedRuns.recorded()  # empty where the package holds no recorded run
names = [name for name in runs.series() if "planted" in name] or list(runs.series())
busy = SpeculationBatch(runs, batch=256, recorded=names[0] if names else "none")
busy

# %%
gains = busy.drawn()["gains"]
assert gains[1] > 2 and gains[256] < 1
long_text = SpeculationBatch(model="llama-3-8b", context=32768).drawn()["gains"]
assert long_text[256] > 1
print(f"short context, 1 request: {gains[1]:.2f}x, 256 requests: {gains[256]:.2f}x")
print(f"llama-3-8b with 32,768 tokens each, 256 requests: {long_text[256]:.2f}x")

# %% [markdown]
# Move the batch slider: the square passes the ridge, and the curve falls below 1. Now lengthen the context: K and V of a
# request are read once for all of its drafts, so with long contexts checking stays cheap at any batch.
#
# An engine can notice: `"adaptive": True` in `speculative_config` shortens drafts where few stand and stops
# where the batch alone fills the machine ([`Drafting.plan`](../minivllm/engine/drafting.py)).

# %% [markdown]
# ## Exercises
#
# Red until you work. Each wrong answer gets the name of its slip and the next hint; `check.redraw("12.1")` draws
# other numbers.

# %%
ask("12.1")

# %%
check("12.1", ...)  # two numbers

# %%
ask("12.2")


# %%
def judge(p, q, draft, u):
    """The row that this place's token is drawn from."""
    ...


check("12.2", judge)

# %%
ask("12.3")

# %%
check("12.3", ...)

# %%
live = {
    "num_rounds": counts.num_rounds,
    "accepted_by_position": list(counts.accepted),
}
ask("12.4", facts=live)

# %%
check("12.4", ..., facts=live)

# %%
ask("12.5")

# %%
check("12.5", ...)

# %%
ask("12.6")

# %%
check("12.6", ...)

# %% [markdown]
# ## Not true
#
# - "It is lossy: the small model writes a part of the text." Section 1: the tokens are those without drafts. Section 3: with
#   chances, the distribution is the target's, and a test with power tells when it is not.
# - "More drafts are better." Section 4: each row of the surface has one best length.
# - "A bigger drafter is better." Its c grows as well; section 5, where most of the model drafted and nothing was
#   gained. T5-large was accepted more often than T5-small and gave half its speed-up (card G12).
# - "It helps under load." Section 7: with 256 requests it was a loss.
# - "A round gives what was accepted." And one token more, always: section 1.
#
# **Say it out loud, in 60 seconds:** why is checking cheaper than writing, why is the text still the target's, and
# when would you turn speculation off?
#
# ## Exit quiz
#
# Three cards and two with numbers; they join the deck of `minivllm quiz`.

# %%
FlashCards(cards=("G1", "G6", "G13", "G5.num", "G11.num"))

# %%
predict.calibration("12")

# %%
pool = llm.engine.kv.pool
assert pool.num_free == pool.num_usable and not llm.engine.has_work  # nothing leaked
assert set(RULES) == {each.name for each in found}
