# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # NN · TITLE
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/NN_name.ipynb)
#
# Two or three sentences: what the reader sees every day, and what about it is strange. No answer yet.
#
# Run the cells in order, and guess before you look.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
from minivllm import LLM, SamplingParams
from minivllm.course.check import ask, check
from minivllm.course.predict import predict
from minivllm.trace import Trace
from minivllm.views.block_map import BlockMap
from minivllm.views.flash_cards import FlashCards
from minivllm.views.widget import Panel

# %% [markdown]
# ## Warm-up
#
# Two cards of earlier notebooks.

# %%
FlashCards(cards=("A1", "B1"))

# %% [markdown]
# ## 1. One question
#
# What the engine below does, in two sentences. Every mechanism is linked to the function that does it:
# [`KVManager.grow`](../minivllm/engine/kv_manager.py).

# %%
blocks = predict("NN.1", "How many blocks of 8 do 21 tokens take?", ..., unit="blocks")
blocks

# %%
llm = LLM(
    "smollm2-135m",
    load_format="dummy",
    block_size=8,
    num_blocks=24,
    show_progress=False,
)
trace = Trace(llm.trace_header())
llm.events.listen(trace)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
generation = llm.text_engine.add(llm.text_engine.check(list(range(21))), params)
llm.text_engine.step()
num_blocks = len(generation.samples[0].request.block_ids)
assert num_blocks == 3  # what repeats is asserted; what does not is tagged
blocks.reveal(num_blocks)

# %% [markdown]
# Say why in one sentence. Then the picture: a title that is a sentence, drawn from events.

# %%
Panel(BlockMap.replay(trace))

# %% tags=["nbval-ignore-output"]
# Milliseconds and other measurements stand in cells with this tag.
print(llm.trace_header()["device"])

# %% [markdown]
# ## Exercises
#
# Red until you work. Another try gives another hint; `check.redraw("NN.1")` draws other numbers.

# %%
ask("NN.1")

# %%
check("NN.1", ...)  # your answer for the dots

# %% [markdown]
# ## Not true
#
# "A sentence that people say" · "Another one". Each with the cell above that shows why.
#
# **Say it out loud, in 60 seconds:** the question of this notebook.
#
# ## Exit quiz
#
# Three cards that join the deck: `minivllm quiz`.

# %%
FlashCards(cards=("C1", "C3", "C8.num"))

# %%
predict.calibration("NN")

# %%
llm.text_engine.abort(generation)
pool = llm.engine.kv.pool
assert pool.num_free == pool.num_usable  # nothing leaked
