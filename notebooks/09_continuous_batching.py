# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · Why does the batch keep changing?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/09_continuous_batching.ipynb)
#
# A **batch** is the set of requests that one step of the engine advances together. When you train a model, you
# choose it. When you serve one, it is chosen anew in every step, some hundred times a second, and nobody
# outside sees it.
#
# This notebook puts you into the engine room: a real engine under a load that you change while it runs.
# Run the cells in order, and guess before you look.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
import time
from collections import Counter

from minivllm import LLM, SamplingParams
from minivllm.course.calculators import continuous_steps, littles_law, static_steps
from minivllm.course.check import ask, check
from minivllm.course.engine_frames import Load
from minivllm.course.predict import predict
from minivllm.events import StepRan
from minivllm.lab.engine_room import EngineRoom
from minivllm.lab.engine_room_recordings import recordings
from minivllm.lab.invariants import check_invariants
from minivllm.views.dashboard import Dashboard
from minivllm.views.flash_cards import FlashCards

# %% [markdown]
# ## Warm-up
#
# Two cards about notebooks 03 and 05. Answer in your head or in a line, then tick the points that you named.

# %%
FlashCards(cards=("A1", "C1"))

# %% [markdown]
# ## 1. Three requests, step by step
#
# Requests A and B are there at the start and want 3 and 6 tokens. C comes after two steps and wants 3. There
# are two ways to serve them: batch by batch (C waits until A **and** B are done), or step by step (C joins
# when it comes). A prompt is short here, and gives its first token in the step that computes it.

# %%
guess_steps = predict("09.p1", "Step by step: how many steps for A, B and C?", ...)
guess_steps

# %%
llm = LLM(
    "smollm2-135m",
    dtype="float32",
    num_blocks=80,
    max_model_len=512,
    show_progress=False,
)


def add(name: str, num_tokens: int) -> None:
    """Queue a request that writes so many tokens."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    prompt = llm.text_engine.check(f"Request {name} asks:")
    llm.text_engine.add(prompt, params, request_id=name)


# %%
with llm.record() as trace:
    add("A", 3)
    add("B", 6)
    while len(trace.of(StepRan)) < 2:
        llm.text_engine.step()
    add("C", 3)
    while llm.text_engine.has_work:
        llm.text_engine.step()

batches = [dict(step.new_tokens).keys() for step in trace.of(StepRan)]
print([" ".join(batch) for batch in batches])
guess_steps.reveal(len(batches))

# %% [markdown]
# Five of the steps have company, and the batch changed three times: C came, A went, C went. Batch by batch it
# would have been 6 + 3 = 9 steps. This is **continuous batching** (iteration-level scheduling): who runs is
# decided in [`Scheduler.schedule`](../minivllm/engine/scheduler.py), before each step. The price is a scheduler
# that must be fast, because it runs that often.

# %%
print(static_steps((3, 6, 3), num_slots=2))
print(continuous_steps((3, 6, 3), num_slots=2))
assert len(batches) == 6 and [len(batch) for batch in batches].count(1) == 1

# %% [markdown]
# ## 2. The engine room
#
# [`EngineRoom`](../minivllm/lab/engine_room.py) lets requests come at random (Poisson) times and drives the
# engine from a thread of its own. For now it counts each step as a tenth of a second, so that you and we see
# the same run: two requests a second, 8 to 24 tokens each.
#
# A request that nobody delays stays for 16 steps on average.

# %%
guess_running = predict("09.p2", "2 a second, 1.6 s each: how many run at a time?", ...)
guess_running

# %%
load = Load(rate=2, prompt_tokens=32, output_tokens=16)
room = EngineRoom(llm, load, seed=26, step_s=0.1)
frames = room.run(100)
mean_running = sum(frame.num_running for frame in frames) / len(frames)
last = frames[-1]
print(f"{last.arrived} came, {last.finished} are done, {last.num_running} run")
print("batch sizes:", dict(sorted(Counter(f.num_running for f in frames).items())))
print(littles_law(2, 1.6))
assert 2 < mean_running < 5 and len({frame.num_running for frame in frames}) > 3
guess_running.reveal(round(mean_running, 1))

# %% [markdown]
# **Little's law**: those who are there = arrivals a second × the seconds that each stays. The mean says little
# about any one step: the batch breathes with the arrivals. That is what the dashboard shows, ten times a
# second, drawn from the engine's events:

# %% tags=["nbval-ignore-output"]
dashboard = Dashboard.follow(room)
dashboard

# %% [markdown]
# Press *one step*, or move a slider: a click only leaves a wish in a queue, and the engine's thread reads it
# between two steps ([`EngineRoom.ask`](../minivllm/lab/engine_room.py)). The table says what was decided last and why.
# The cells below move the same sliders; after you have played, run `room.reset()` and the cell above again.
#
# ## 3. Too few seats
#
# The **batch limit** (`max_num_seqs`) is the number of requests that may run at a time. We lower it to 2, which
# is less than the load needs.

# %%
guess_waiting = predict("09.p3", "2 seats for 60 steps (6 s): how many wait then?", ...)
guess_waiting

# %%
before = room.frames[-1]
frames = room.run(60, batch_limit=2)
after = frames[-1]
reasons = Counter(d.reason for f in frames for d in f.decisions if d.what == "waits")
print(f"{after.arrived - before.arrived} came, {after.finished - before.finished} done")
print("why the head of the queue waits:", dict(reasons))
assert set(reasons) == {"no_seat"} and after.num_waiting > 2
guess_waiting.reveal(after.num_waiting)

# %% [markdown]
# Two seats serve 2 / 1.6 = 1.25 requests a second, and 2 a second come. The queue grows for as long as that
# lasts: no batching policy helps against too much load. Meanwhile most of the pool of blocks is unused, so
# memory was not the limit here.

# %%
print(f"blocks: {after.num_live} live of {llm.engine.kv.pool.num_usable}")
assert after.num_live < llm.engine.kv.pool.num_usable / 4

# %%
guess_empty = predict(
    "09.p4", "All seats back: in how many steps is the queue empty?", ...
)
guess_empty

# %%
num_steps = 0
while room.frames[-1].num_waiting:
    frames = room.run(1, batch_limit=256)
    num_steps += 1
print(f"{after.num_waiting} waited, now {frames[-1].num_running} run")
assert num_steps <= 2
guess_empty.reveal(num_steps)

# %% [markdown]
# All of them were admitted together: the step held their prompts and one token of each who ran before. A
# batch is not one shape. Each request brings as many tokens as it lacks, and the kernel reads a ragged list
# ([`Scheduler.schedule`](../minivllm/engine/scheduler.py)).
#
# ## 4. Too small a budget
#
# The **token budget** (`max_num_batched_tokens`) is the number of tokens that one step computes at most. Now
# prompts are longer and the budget is 16: a prompt is cut into **chunks**, beside the running decodes.

# %%
before = room.run(100, prompt_tokens=64)[-1]  # ten seconds: the queue is forgotten
with llm.record() as trace:
    after = room.run(60, token_budget=16)[-1]
steps = [[num_new for _, num_new, _ in step.scheduled] for step in trace.of(StepRan)]
print("tokens of each request in some steps:", steps[10:14])
print(f"95% of the first tokens came within {before.ttft_p95_ms:.0f} ms before,")
print(f"and within {after.ttft_p95_ms:.0f} ms with the small budget")
assert max(map(sum, steps)) <= 16 and after.ttft_p95_ms > before.ttft_p95_ms
assert any(len(set(step)) > 1 for step in steps)  # chunks beside single tokens

# %% [markdown]
# The time to the **first token** rises: prompts queue for the budget. The time **between two tokens** of those
# who run stays one step (in seconds such a step is shorter, too). Notebook 10 is about this trade.
#
# ## 5. What was computed once
#
# Give all prompts the same 64 tokens in front, as a system prompt does, and the budget back.

# %%
before = room.frames[-1]
after = room.run(60, token_budget=2048, shared_tokens=64, prompt_tokens=32)[-1]
found = after.hit_tokens - before.hit_tokens
asked = after.prompt_tokens - before.prompt_tokens
print(f"{found} of {asked} prompt tokens were found in the cache: {found / asked:.0%}")
assert found % 16 == 0 and found / asked > 0.2  # whole blocks of 16
check_invariants(llm.engine)

# %% [markdown]
# In the dashboard below, the dashed upright lines are the moments when a slider was moved. Read the plots from left to
# right: the batch limit made the queue, the budget delayed first tokens, the shared prefix raised the hit rate.
#
# ## 6. Now you, in real time
#
# From here on a second is a second of your machine, GPU or CPU. Press **start**, then move sliders while it runs. Find
# the rate at which the queue begins to grow. *save* writes the run to a file that `Dashboard.replay` shows again.
# (The cell after the view presses start for two seconds, to show that it works.)

# %% tags=["nbval-ignore-output"]
room.count_steps(None)
dashboard

# %%
num_frames = len(room.frames)
room.ask("start")  # what the button does
time.sleep(2)
room.stop()
assert room.failure == "" and len(room.frames) > num_frames + 5
assert room.frames[-1].num_live <= llm.engine.kv.pool.num_usable

# %% [markdown]
# ## 7. The same view of other machines
#
# These runs were recorded, and say so, with their machine, commit and seed. One script makes them again:
# `python -m minivllm.lab.engine_room_recordings`. Choose a run, press play, or drag the frame.

# %% tags=["readme:dashboard"]
runs = recordings()
replay = Dashboard.replay(runs)
replay

# %% [markdown]
# On the H200, SmolLM2 keeps up with 128 requests a second: some twenty run at once, and nobody waits. The 8B
# shape gets 32 a second and keeps up, until only 16 seats are left. When the seats come back, those who waited enter
# and all grow, the 3,071 blocks run out, and a few requests are **preempted**: they give their blocks back and are
# computed again later.
#
# The floor differs as well. A step of the 8B shape has 16 GB of weights to read, and the floor is more than half of
# its time. One of SmolLM2 has 0.3 GB, read in a small part of the millisecond that it takes: the rest is kernels that
# begin and end.

# %%
small, large = (
    next(
        run
        for title, run in runs.items()
        if title.startswith(start) and "H200" in title
    )
    for start in ("SmolLM2-135M", "shape of Qwen3-8B")
)
for run in (small, large):
    last = run.frames[-1]
    most = max(frame.num_live for frame in run.frames)
    print(f"{run.header['model']}: {last.preemptions} preemptions,", end=" ")
    print(f"{most:,} of {run.header['num_blocks'] - 1:,} blocks at most,", end=" ")
    print(f"the floor is {last.floor_ms / last.costed_ms:.0%} of the time of steps")
assert large.frames[-1].preemptions > 0 == small.frames[-1].preemptions

# %% [markdown]
# ## Exercises
#
# Red until you work. Each wrong answer gets the name of its slip and the next hint; `check.redraw("09.1")` draws
# other numbers.

# %%
ask("09.1")

# %%
check("09.1", ...)  # two numbers

# %%
ask("09.2")

# %%
check("09.2", ...)

# %%
ask("09.3")

# %%
check("09.3", ...)

# %% [markdown]
# ## Not true
#
# - "Continuous batching is a bigger batch." Section 1: the batch was never larger than three, and three steps
#   fewer were enough because no seat stood idle. The batch *changes*; its size is what the load makes of it.
# - "The throughput comes from PagedAttention alone." Section 3: the same paged blocks, and two seats less than
#   the load needs were enough to lose it. Policy, lengths, allocator and prefix reuse each have their share.
# - "All requests of a batch must have the same shape." Section 4: one step held chunks of prompts and single
#   tokens, side by side.
#
# **Say it out loud, in 60 seconds:** who decides which requests a step computes, which three limits does it keep,
# and what does a user notice of each?
#
# ## Exit quiz
#
# Three cards and one with numbers; they join the deck of `minivllm quiz`.

# %%
FlashCards(cards=("E2", "E5", "E9", "E14.num"))

# %%
predict.calibration("09")

# %%
room.empty()  # what it shows stays, and so do the sliders
pool = llm.engine.kv.pool
assert pool.num_free == pool.num_usable and not llm.engine.has_work  # nothing leaked
