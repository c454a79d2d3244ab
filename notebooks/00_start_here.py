# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Start: what will you be able to answer?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/00_start_here.ipynb)
#
# A language model writes one **token**, a piece of a word, at a time. A serving engine lets many people share one
# model, and most of its work is to remember what it has read: the **KV cache**, keys and values of all past tokens.
# This course opens such an engine, small enough to read in an evening, and asks the questions that people who
# build one must answer.
#
# Everything runs on your machine, with a real model; no GPU, no account. In a minute you will see it write a
# sentence, see where that sentence lies in memory, and learn with which notebook to start.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
import tempfile
from pathlib import Path

from minivllm import LLM, SamplingParams
from minivllm.course import calculators as calc
from minivllm.course.check import ask, check
from minivllm.course.predict import predict
from minivllm.course.progress import ProgressFile
from minivllm.course.records import Kept
from minivllm.lab.environment import environment, recorded_environment
from minivllm.trace import Trace
from minivllm.views.block_map import BlockMap
from minivllm.views.environment_card import EnvironmentCard
from minivllm.views.flash_cards import FlashCards
from minivllm.views.readiness import ReadinessRadar
from minivllm.views.unit_trainer import UnitTrainer
from minivllm.views.widget import Panel

# %% [markdown]
# ## Warm-up
#
# Every notebook begins with two cards. Answer aloud or in a word, then press the button and tick what you named.
# You need not know these yet: they are a taste of what comes.

# %%
FlashCards(cards=("A2", "F1"))

# %% [markdown]
# ## 1. A real model, in one line
#
# `LLM` is all you need to use the engine. The model has 135 million weights; the first time it is fetched (93 MB),
# with a progress bar. `kv_cache_memory` is the room for the cache: here 64 MiB, and no request longer than
# 512 tokens.

# %% tags=["nbval-ignore-output"]
llm = LLM(
    "smollm2-135m",
    dtype="float32",
    kv_cache_memory=64 * 2**20,
    max_model_len=512,
)

# %% [markdown]
# **Predict.** Before each run you write a number down; a guess that is far off teaches more than none. Put yours in
# place of the dots. It can be changed until the answer shows, and never after. Without a guess the answer stays
# folded away, and nothing is lost.
#
# The model will write one sentence on your machine. How long does one token take?

# %%
token_time = predict(
    "00.p1", "How many milliseconds does a token take?", ..., unit="ms"
)
token_time

# %%
question = [{"role": "user", "content": "Write one sentence about memory."}]
greedy = SamplingParams(temperature=0, max_tokens=48)
with llm.record() as trace:
    result = llm.chat(question, greedy, use_tqdm=False)[0]
num_prompt, num_new = len(result.prompt_token_ids), len(result.outputs[0].token_ids)
print(result.outputs[0].text)
print(f"{num_prompt} tokens of prompt, {num_new} new ones")
assert result.finished and 1 < num_new <= 48

# %% tags=["nbval-ignore-output"]
metrics = result.metrics
first_s = metrics.time_to_first_token
total_s = metrics.finished_time - metrics.arrival_time
per_token = calc.time_per_output_token_ms(total_s * 1e3, first_s * 1e3, num_new)
print(f"first token after {first_s * 1e3:.0f} ms: the whole prompt had to be read")
token_time.reveal(float(per_token))

# %% [markdown]
# The question has five words, the prompt many more tokens: the **chat template**, the frame that says who speaks, adds
# the rest. The first token waits for the whole prompt (**prefill**); each further one takes a step of its own (**decode**).
# Which of the two is wasteful, and why, is notebook 01.
#
# Where did the sentence lie while it was written? Each square below is a **block**, room for 16 tokens. It is drawn
# from events that the engine recorded: drag the slider, or press play.

# %%
blocks = BlockMap.replay(trace)
blocks.move("step", trace.last_step - 1)  # the last step but one: still running
Panel(blocks)

# %% [markdown]
# ## 2. What computes here?
#
# The same notebook runs in four ways: on a GPU with our own kernels, on a CPU with torch's functions, on a CPU with
# those kernels in Triton's interpreter (exact, very slow), or as a **replay** of what another machine recorded. A
# time means something only with the machine beside it, so look at this card first. Switch it to one of the recordings.

# %% tags=["nbval-ignore-output"]
card = EnvironmentCard(
    {
        "this engine": environment(llm),
        "the run above, recorded": trace.header,
        "an H200, recorded": recorded_environment(),
    }
)
card

# %% [markdown]
# A recording needs no model to be drawn. The trace below is this process's own, saved and loaded again: its card names
# the device that computed it a minute ago. The last line is of steps that were timed on another machine, a GPU that you
# need not have; notebook 01 draws them.

# %% tags=["nbval-ignore-output"]
with tempfile.TemporaryDirectory() as folder:
    loaded = Trace.load(trace.save(Path(folder) / "run.json"))
assert loaded.events == trace.events
for facts in (loaded.header, recorded_environment()):
    replayed = EnvironmentCard({"the file": facts})
    print(facts.get("gpu") or facts["machine"], "|", replayed.facts["card"])
    assert replayed.facts["mode"] == "replay of a recorded run"

# %% [markdown]
# `minivllm doctor`, in a terminal, says what else your machine has and lacks. The words come from
# [`environment`](../minivllm/lab/environment.py) and [`LLM.trace_header`](../minivllm/llm.py).
#
# ## 3. How much fits?
#
# One token of this model takes 46,080 bytes of K and V in fp32. The pool has 64 MiB, cut into blocks of 16 tokens,
# and block 0 is set aside: it only pads tables.

# %%
pool_tokens = predict(
    "00.p2", "How many tokens does the pool hold?", ..., unit="tokens"
)
pool_tokens

# %%
config, header = llm.config, llm.trace_header()
concurrency = config.capacity_tokens / config.max_model_len
print(f"pool: {calc.decimal_and_binary(llm.storage.num_bytes)}")
print(f"{config.num_blocks - 1} blocks x {config.block_size} tokens")
print(
    f"maximum concurrency: {concurrency:.2f} requests of {config.max_model_len} tokens"
)
per_token_bytes = header["kv_bytes_per_token"]
budget_tokens = 64 * 2**20 // per_token_bytes
print(f"without blocks it would be {budget_tokens:,} tokens")
assert config.capacity_tokens == (config.num_blocks - 1) * config.block_size
assert 0 <= budget_tokens - config.capacity_tokens < 2 * config.block_size
pool_tokens.reveal(config.capacity_tokens)

# %% [markdown]
# ⌊pool / bytes of one token⌋, less what does not fill a block, less block 0: that is all there is to it, on a laptop
# and on a rack. What the token costs is notebook 02, how the pool is wasted notebook 04. The pool counts its usable
# blocks in [`BlockPool.num_usable`](../minivllm/engine/block_pool.py).
#
# ## 4. GB is not GiB
#
# 1 GB is 1000³ bytes. 1 GiB is 1024³ bytes, with an i as in "binary". Papers print both under one name, and a wrong
# unit shifts a capacity by 7%.

# %%
in_mb = predict(
    "00.p3", "The pool was given 64 MiB. How many MB is that?", ..., unit="MB"
)
in_mb

# %%
print(calc.decimal_and_binary(64 * 2**20))
in_mb.reveal(64 * 2**20 / 1e6)

# %% [markdown]
# Four printed figures, worked out again. OPT-13B is the model of the PagedAttention paper, OPT-66B that of DistServe.

# %%
both, of_66b = calc.decimal_and_binary, calc.kv_bytes_per_token("opt-66b")
per_token = calc.kv_bytes_per_token("opt-13b")
long = calc.kv_bytes_of_sequence("opt-13b", 2048)
short = calc.kv_bytes_of_sequence("opt-66b", 512)
link = calc.required_bandwidth(of_66b, 512, 10)  # ten requests of 512 tokens a second
gbit, gibit = (float(link.parts[name]) for name in ("gbit_per_s", "gibit_per_s"))
print(f"one token of OPT-13B: printed 800 KB, is {both(per_token)}")
print(f"2,048 tokens of OPT-13B: printed 1.6 GB, is {both(long)}")
print(f"512 tokens of OPT-66B: printed 1.13 GB, is {both(short)}")
print(f"ten such a second: printed 90 Gbps, is {gbit:.1f} Gbit/s, {gibit:.0f} Gibit/s")
assert per_token == 819_200 == 800 * 1024 and long == 1_677_721_600
assert round(long / 2**30, 1) == 1.6 and round(long / 1e9, 1) == 1.7
assert short / 2**30 == 1.125 and round(gbit, 1) == 96.6 and round(gibit) == 90

# %% [markdown]
# All four are **binary** units under decimal names, and the last one is in bits. This course writes kB and KiB apart,
# and gives both where it matters. Train it: click an answer (or choose it in the list, which opens with the space
# bar), and each wrong one tells you which slip it is.

# %%
UnitTrainer("GB and GiB")

# %% [markdown]
# ## 5. What can you answer already?
#
# Twenty questions, drawn for you. Pick an answer, hand it in; it counts once. The polygon shows the share right for
# each subject, and the line above it says where to start. There is no need to finish: the first ten touch every
# subject. `begin again` draws other numbers.

# %%
ReadinessRadar()

# %% [markdown]
# How good is a polygon? Here is the one of somebody who knows nothing and always takes the first answer. The numbers
# of this learner differ from yours, and nothing is stored.

# %%
guesser = ReadinessRadar(Kept("a guesser"))
for _ in range(20):
    guesser.move("answer", "a")
    guesser.move("hand in", "yes")
subjects = guesser.drawn()["scores"]
print(f"best subject {max(subject.share for subject in subjects):.0%}", end=", ")
print(f"total {sum(s.num_right for s in subjects)} of 20")
guesser

# %% [markdown]
# With four answers to choose from, guessing gets a quarter right on average. Still the guesser's polygon has corners
# far outside the dashed ring: two or three questions cannot tell. Trust only the total, and take the corners as a hint
# of where to begin. Note that each wrong number has a name. The same names count in the exercises and in the quiz, so
# you will see which slip is yours.
#
# ## 6. The questions of the course
#
# | | question | you will be able to say |
# |---|---|---|
# | 00 | [Start: what will you be able to answer?](00_start_here.ipynb) | what a pool holds, in the right unit |
# | 01 | [Why is decode starved while prefill is not?](01_prefill_and_decode.ipynb) | what a step waits for |
# | 02 | [How many bytes does one token cost?](02_bytes_per_token.ipynb) | MHA, GQA, MQA, MLA in bytes |
# | 03 | [What does the cache buy, and what does it not change?](03_the_kv_cache.ipynb) | why K and V, not Q |
# | 04 | [Where does 60-80% of KV memory go?](04_wasted_memory.ipynb) | reserved, internal, external |
# | 05 | [What exactly is a block table?](05_block_table.ipynb) | from a position to its bytes |
# | 06 | [Same equation, new addresses: the Triton kernel](06_paged_attention_kernel.ipynb) | how a kernel reads it |
# | 07 | When can two requests own one block? | what is copied, and when |
# | 08 | Whose prefix is already computed? | hash chain and radix tree |
# | 09 | Why does the batch keep changing? | where a gain in throughput comes from |
# | 10 | Who pays when a long prompt arrives? | what chunks cost, and whom |
# | 11 | What happens when the pool is full? | whom to preempt, and how |
# | 12 | [Can checking be cheaper than writing?](12_speculative_decoding.ipynb) | when speculation pays |
# | 13 | Which bits can go? | what fewer bits speed up |
# | 14 | One pool or two? | when to split prefill from decode |
# | 15 | Defend a design | all of it, in 45 minutes |
#
# Rows without a link are being written.
#
# ## 7. How you practise, and what is kept
#
# - `predict(...)` writes a guess down before the answer; `predict.calibration("00")` shows how good your guesses were.
# - `ask("00.1")` poses an exercise with numbers of your own, `check("00.1", answer)` judges it: a wrong answer gets
#   its slip's name and the next of three hints. `check.redraw("00.1")` draws other numbers, `solution` shows the way.
# - `FlashCards("A")` here, or `minivllm quiz` in a terminal: cards come back when you are about to forget them.
#   `minivllm quiz --mock 30` is a timed interview.
#
# All of it goes into **one file on this machine**: `progress.json` in `~/.local/share/minivllm`, or in the folder that
# `MINIVLLM_DATA` names. There is no account, and nothing is sent. `minivllm quiz --export FILE`, `--import FILE` and
# `--delete` do what they say; the same from Python, on a file of its own:

# %%
with tempfile.TemporaryDirectory() as folder:
    mine, copy = (
        ProgressFile(Path(folder) / "progress.json"),
        Path(folder) / "copy.json",
    )
    mine.write("guess", "00.p3", {"guess": 64.0, "truth": 67.1})
    mine.export(copy)
    print("deleted:", mine.delete())
    print("after deleting:", dict(mine.read_all("guess")))
    mine.import_from(copy)
    print("after import:  ", dict(mine.read_all("guess")))

# %% [markdown]
# ## Exercises
#
# Red until you work. Put your answer in place of the dots, with or without its unit.

# %%
ask("00.1")

# %%
check("00.1", ...)

# %% [markdown]
# The next one asks about the engine that runs above: `facts=` gives its numbers to the exercise.

# %%
ask("00.2", facts=llm.trace_header())

# %%
check("00.2", ..., facts=llm.trace_header())

# %% [markdown]
# And this one about the sentence that it wrote, with the times of your machine.

# %% tags=["nbval-ignore-output"]
run = {
    "first_s": first_s,
    "total_s": total_s,
    "num_prompt": num_prompt,
    "num_new": num_new,
}
ask("00.3", facts=run)

# %% tags=["nbval-ignore-output"]
check("00.3", ..., facts=run)

# %% [markdown]
# The last one is on the environment card, as it stands above: switch it, and the question changes.

# %% tags=["nbval-ignore-output"]
ask("00.4", facts=card.facts)

# %% tags=["nbval-ignore-output"]
check("00.4", ..., facts=card.facts)

# %% [markdown]
# ## Not true
#
# **"GB = GiB."** Section 4 shows it: 64 MiB are 67 MB, and "1.6 GB" and "1.7 GB" were both printed for the same
# 1,677,721,600 bytes. At k the gap is 2.4%, at G 7.4%, at T 10%. When a figure is 7% off, ask for the unit first.

# %%
gaps = [1024**power / 1000**power - 1 for power in (1, 2, 3, 4)]
print(", ".join(f"{name}: {gap:.1%}" for name, gap in zip("kMGT", gaps, strict=True)))
assert gaps == sorted(gaps) and round(100 * gaps[2], 1) == 7.4

# %% [markdown]
# **Say it out loud, in 60 seconds:** what does a serving engine keep for each token, how many tokens does your pool
# hold, and in which unit did you just say that?
#
# ## Exit quiz
#
# Three cards that join the deck, the last two with numbers of your own.

# %%
FlashCards(cards=("A1", "A2.num", "A9.num"))

# %% [markdown]
# Your guesses beside the truth: on this axis, half and twice are equally far from the middle.

# %% tags=["nbval-ignore-output"]
predict.calibration("00")

# %%
pool = llm.engine.kv.pool
assert not llm.engine.requests and pool.num_free == pool.num_usable  # nothing leaked
