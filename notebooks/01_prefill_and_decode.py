# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Why is decode starved while prefill is not?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/minivllm/minivllm/blob/main/notebooks/01_prefill_and_decode.ipynb)
#
# A model reads a prompt of a thousand tokens in about the time in which it writes ten. It is one network with one set
# of weights, on one chip. **Prefill** is the step that reads the prompt; **decode** is every later step, one new token
# for each request. What does the chip wait for in the second and not in the first?
#
# Run the cells in order, and guess before you look.

# %%
import importlib.util

if importlib.util.find_spec("minivllm") is None:  # Colab, or a bare Jupyter
    # %pip install -q "minivllm[lab] @ git+https://github.com/minivllm/minivllm"
    importlib.invalidate_caches()

# %%
from dataclasses import replace

from minivllm import LLM, SamplingParams
from minivllm.course import calculators as c
from minivllm.course.check import ask, check
from minivllm.course.predict import predict
from minivllm.lab.counted_steps import counted_steps
from minivllm.lab.forward_sweep import RECORDINGS, load_sweeps, shapes_of, sweep
from minivllm.lab.step_floor import ModelWork, measured_roofs
from minivllm.lab.training_card import count_passes
from minivllm.runner.device import choose_device
from minivllm.views.flash_cards import FlashCards
from minivllm.views.measured_points import MeasuredPoints
from minivllm.views.roofline import Roofline
from minivllm.views.step_regimes import StepRegimes
from minivllm.views.training_card import TrainingCard

# %% [markdown]
# ## Warm-up
#
# Two cards of notebook 00. Answer aloud, then look.

# %%
FlashCards(cards=("A1", "A2.num"))

# %% [markdown]
# ## 1. How much work is one step?
#
# A chip does two things in a step: it reads bytes and it multiplies numbers. Work is counted in **FLOP**, one
# multiplication or one addition; a weight costs 2 FLOPs for each token that passes through it. The **arithmetic
# intensity** of a step is its FLOPs divided by the bytes that it reads.
#
# The engine below is real; its weights are noise, for only the amount of work matters here. They are stored in fp32,
# 4 bytes each.

# %%
decode_intensity = predict(
    "01.p1",
    "One request decodes one token, all weights in fp32: FLOPs for each byte read?",
    ...,
    unit="FLOP/byte",
)
decode_intensity

# %% [markdown]
# First, what this machine reaches: the fastest of some large reads, and of some products of matrices
# ([`measured_roofs`](../minivllm/lab/step_floor.py)). Then one prompt of 64 tokens is prefilled and one token decoded,
# and the same for 4 and for 16 requests at once. [`counted_steps`](../minivllm/lab/counted_steps.py) puts torch's own
# FLOP counter round the engine's runner, and adds up the sizes of the tensors that a step reads.

# %%
ROOFS = measured_roofs(choose_device("auto"), "float32")
llm = LLM(
    "smollm2-135m",
    load_format="dummy",
    dtype="float32",
    num_blocks=132,
    enable_prefix_caching=False,
    show_progress=False,
)
two_tokens = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
counted = {}
for batch in (1, 4, 16):
    prompts = [[100 + i] * 64 for i in range(batch)]
    with counted_steps(llm) as steps:
        llm.generate(prompts, two_tokens, use_tqdm=False)
    counted[batch] = steps
prefill, decode = counted[1]
assert (prefill.num_tokens, decode.num_tokens) == (64, 1)
decode_intensity.reveal(round(decode.products / decode.weight_bytes, 2))

# %% [markdown]
# One weight of 4 bytes does 2 FLOPs for one token: half a FLOP for a byte. Here are all six steps. The column
# *calculated* comes from the model's sizes alone ([`ModelWork.floor`](../minivllm/lab/step_floor.py)); it counts the
# weights of the norms as if they multiplied, which they hardly do, hence the tolerance of 0.1%.

# %%
work = ModelWork("smollm2-135m", "float32")
print("step            products counted      calculated  bytes read  FLOP/byte")
for batch, steps in counted.items():
    for name, step in zip(("prefill", "decode"), steps, strict=True):
        floor = work.floor(step.scheduled, step.num_logits, ROOFS)
        pairs = [c.attention_flops("smollm2-135m", n, s - n) for n, s in step.scheduled]
        products = floor.flops - int(sum(pairs))
        num_bytes = step.weight_bytes + step.kv_bytes
        print(
            f"{name:7} of {batch:2}: {step.products:19,} {products:15,}"
            f" {num_bytes:11,} {step.products / num_bytes:10.2f}"
        )
        assert abs(step.products / products - 1) < 1e-3
        assert (step.weight_bytes, step.kv_bytes) == (
            floor.weight_bytes,
            floor.kv_bytes,
        )

# %% [markdown]
# The bytes hardly differ, the FLOPs differ by hundreds. A step reads all weights once, whether 1 token or 1,024 tokens
# pass through them. Decode is starved of arithmetic because each request brings one token to that read; batching gives
# decode what prefill has by itself.
#
# ## 2. Two roofs, and the ridge between them
#
# A chip reads at most so many bytes a second and does at most so many FLOPs a second. Their quotient is its **ridge
# point**: work with fewer FLOPs for a byte waits for memory, work with more waits for arithmetic. That picture is the
# **roofline** (Williams, Waterman and Patterson, 2009). Now on a data-centre GPU and in bf16, 2 bytes a number.

# %%
attention_gain = predict(
    "01.p2",
    "Batch 1 to batch 64: the intensity of decode's attention grows how many times?",
    ...,
    unit="×",
)
attention_gain

# %% [markdown]
# Move *batch*, then *context*, *weights*, *K and V* and *chip*. Say before each move which point will go where.

# %%
roofline = Roofline(model="llama-3-8b", chip="h100-sxm", batch=1, context=2048)
roofline

# %% [markdown]
# The same moves by code, so that nothing is left to the eye.

# %%
seen = {}
print("batch  products FLOP/byte  attention FLOP/byte  bound of the products")
for batch in (1, 16, 64, 256, 512):
    roofline.move("batch", batch)
    _, products, attention = roofline.drawn()["points"]
    seen[batch] = (products["intensity"], attention["intensity"])
    print(
        f"{batch:5} {seen[batch][0]:19.1f} {seen[batch][1]:20.1f}  {products['bound']}"
    )
assert all(
    abs(both[0] / (batch * seen[1][0]) - 1) < 1e-9 for batch, both in seen.items()
)
assert len({attention for _, attention in seen.values()}) == 1
attention_gain.reveal(seen[64][1] / seen[1][1])

# %% [markdown]
# Every request brings keys and values of its own, so the bytes of attention grow as fast as its FLOPs. The intensity of
# the products grows with the batch and crosses the ridge at 295 tokens; attention stays at 4, the number of query heads
# that share one KV head. More requests never repair it. Fewer bytes do:

# %%
for model, kv in (
    ("llama-2-7b", "bf16"),
    ("llama-3-8b", "bf16"),
    ("llama-3-8b", "fp8"),
):
    intensity = c.decode_attention_intensity(model, kv)
    print(f"{model}, K and V in {kv}: {float(intensity):.0f} FLOP/byte")
latent = c.decode_attention_intensity("deepseek-v3")
print(f"deepseek-v3, one latent for all heads: {float(latent):.0f} FLOP/byte")
assert round(float(latent)) == 242

# %% [markdown]
# The closed forms behind the points: a product of B rows does about B FLOPs for a byte while B is small beside the
# matrix; attention of T queries against S keys does S T / (S + T), half a prompt in prefill and less than 1 in decode.

# %%
for rows in (1, 16, 512):
    print(c.matmul_intensity(rows, 4096, 14336).derivation[-1])
for queries in (2048, 1):
    print(c.attention_intensity(queries, 2048).derivation[-1])
assert c.attention_intensity(2048, 2048) == 1024
assert c.attention_intensity(1, 2048) < 1

# %% [markdown]
# ## 3. Do more FLOP/s make decode faster?
#
# A shop offers two cards: one computes twice as fast as an H100, the other reads twice as fast. The **floor** is the
# least time that a step can take: its bytes at full bandwidth or its FLOPs at full rate, whichever takes longer.

# %%
doubled = predict(
    "01.p3",
    "Llama-3-8B decodes in 4.79 ms at least on an H100. And with twice the FLOP/s?",
    ...,
    unit="ms",
)
doubled

# %%
h100 = c.accelerator("h100-sxm")
twice = {dtype: 2 * rate for dtype, rate in h100.flops.items()}
cards = {
    "H100": h100,
    "twice the FLOP/s": replace(h100, flops=twice),
    "twice the bytes/s": replace(h100, bandwidth=2 * h100.bandwidth),
}
params = c.num_parameters("llama-3-8b")
decode_ms, prefill_ms = [], []
for name, chip in cards.items():
    decode_ms.append(float(c.decode_floor_ms("llama-3-8b", chip, 0)))
    prefill_ms.append(float(c.prefill_ms(params, 4096, chip)))
    times = f"decode {decode_ms[-1]:.2f} ms, prefill of 4,096 {prefill_ms[-1]:.1f} ms"
    print(f"{name:17}  ridge {float(c.ridge_point(chip)):5.1f}  {times}")

# %%
assert decode_ms[1] == decode_ms[0] == 2 * decode_ms[2]  # FLOP/s do nothing here
assert prefill_ms[2] == prefill_ms[0] == 2 * prefill_ms[1]  # bytes/s do nothing here
doubled.reveal(round(decode_ms[1], 2))

# %% [markdown]
# Twice the FLOP/s moves the ridge to the right and leaves decode exactly where it was. This shop exists: an H200 has
# the arithmetic of an H100 and 1.43 times its bandwidth, and decode is what it sells. Here are the figures of data
# sheets that the course uses, each worked out again; the numbers beside them are those that were published.

# %%
published = {"a100-40gb-sxm": 200.6, "a100-80gb-sxm": 153.0, "h100-sxm": 295.2}
published |= {"h200-sxm": 206.0, "b200-sxm": 281, "tpu-v5e": 240}
for chip, ridge in published.items():
    found = float(c.ridge_point(chip))
    print(f"{chip:14} ridge {found:6.1f}   published {ridge}")
    assert abs(found / ridge - 1) < 0.005
floors = {
    x: float(c.decode_floor_ms("llama-3-8b", x, 0)) for x in ("a100", "h100", "h200")
}
print(
    "floor of Llama-3-8B, one request:", {x: f"{ms:.2f} ms" for x, ms in floors.items()}
)
assert [round(ms, 2) for ms in floors.values()] == [7.88, 4.79, 3.35]
assert round(float(c.ridge_point("h100", "fp8"))) == 591
assert c.ridge_point_of(312e12, 1.5e12) == 208
assert round(float(c.read_ms(140e9, "h100", 2)), 1) == 20.9  # 70B on two of them
print(c.critical_batch("tpu-v5e", "int8", "bf16").derivation[-1])
assert round(float(c.critical_batch("tpu-v5e", "int8", "bf16"))) == 120

# %% [markdown]
# ## 4. Measured: a token costs less in company
#
# Floors are promises of arithmetic. [`sweep`](../minivllm/lab/forward_sweep.py) times the engine's own forward pass: one
# prompt of 1, 2, 4 ... tokens, then 1, 2, 4 ... requests that decode. The same program ran on an H200 with two models;
# its recording is in the package, with machine, commit and command.

# %%
small, large = load_sweeps(RECORDINGS / "forward_h200.json")
print(small.model, "and", large.model, "on", large.machine)
shortest, *_ = alone = large.series("decode", 128)
among_64 = next(step for step in alone if step.shape.num_requests == 64)
in_company = predict(
    "01.p4",
    f"{large.model}, one request: {shortest.graph_ms:.1f} ms for a step. 64 requests?",
    ...,
    unit="ms",
)
in_company

# %% tags=["nbval-ignore-output"]
here = sweep(llm, ROOFS, shapes_of(256, 16, [32, 128]), budget_s=0.3)
MeasuredPoints([here])

# %%
print(
    f"64 times the tokens in {among_64.graph_ms / shortest.graph_ms:.2f} times the time"
)
prefills = [step.graph_ms / step.shape.num_tokens for step in large.series("prefill")]
assert prefills[-1] < prefills[6] < prefills[0] / 32  # 4,096, 64 and 1 token in a step
in_company.reveal(round(among_64.graph_ms, 1))

# %% [markdown]
# Above, this machine; below, the H200. Dashes are the floor; solid lines are the step's kernels launched all at once.
# The curves of prefill and of decode lie on each other as long as the context is short: a token is a token to the
# weights. They fall until the ridge, and from there on prefill pays full price for each token.

# %%
measured = MeasuredPoints([large, small])
measured

# %% [markdown]
# Move *show* to the roofline, and *measured* to the smaller model. How much of the arithmetic do they use?

# %%
longest = large.series("prefill")[-1]
for step in (shortest, longest):
    share = f"{large.share_of_flops(step):5.2f}% of the FLOP/s"
    print(f"{step.shape.num_tokens:5} tokens: {step.intensity:7.1f} FLOP/byte, {share}")
assert shortest.intensity < large.flops_per_s / large.bandwidth < longest.intensity

# %% [markdown]
# ## 5. The same decode at two contexts
#
# 256 requests decode one token each. In the first run each holds 128 tokens, in the second 2,048. The weights are the
# same, so are the products; only attention has more to do.

# %%
short, long = (large.series("decode", length)[-1] for length in (128, 2048))
assert short.shape.num_requests == long.shape.num_requests == 256
more_flops = long.flops / short.flops
longer = predict(
    "01.p5",
    f"Context 128 to 2,048: {more_flops:.2f} times the FLOPs. How many times the time?",
    ...,
    unit="×",
)
longer

# %%
more_bytes = (long.weight_bytes + long.kv_bytes) / (short.weight_bytes + short.kv_bytes)
slower = long.graph_ms / short.graph_ms
print(f"FLOPs × {more_flops:.2f}, bytes × {more_bytes:.2f}, time × {slower:.2f}")
per_token = c.kv_bytes_per_token("llama-3-8b")
crossing = c.tokens_where_kv_passes_weights(16.06e9, per_token)  # Llama-3-8B in bf16
print(crossing.derivation[-1])
assert int(crossing) == 122_528
assert more_flops < 1.1 < 1.5 < slower < more_bytes
longer.reveal(round(slower, 2))

# %% [markdown]
# Hardly more FLOPs, far more time: who counts only FLOPs cannot explain decode. 256 requests of 2,048 tokens hold four
# times the 122,528 tokens from which reading K and V takes longer than reading the weights.
#
# ## 6. The third regime: nobody launches the kernels
#
# A step of a model is hundreds of small programs, **kernels**, and the host launches each from Python. If a kernel ends
# before the next one is launched, the GPU waits for neither bytes nor FLOPs: it waits for the host. A **CUDA graph**
# records the launches and replays them as one.

# %%
print(f"{'':12} batch   as run  at once    floor")
for swept in (small, large):
    for step in swept.series("decode", 128)[::4]:
        times = f"{step.ms:8.2f} {step.graph_ms:8.2f} {step.floor_ms:8.2f} ms"
        print(f"{swept.model:12} {step.shape.num_requests:5} {times}")
        assert step.floor_ms < step.graph_ms < step.ms
flat = [step.ms for step in small.series("decode", 128)]
assert max(flat) < 4 * min(flat)  # 256 times the tokens

# %% [markdown]
# The sign of this regime is a time that does not move, whatever the batch. Below, all three regimes by calculation.
# *host needs* is the time that the host takes for the launches of one step. Move it, then *batch* and *context*.

# %%
regimes = StepRegimes(model="llama-3-8b", chip="h200-sxm", context=1024)
found = {}
for name, controls in {
    "slow host, batch 16": {"host_ms": 20.0, "batch": 16},
    "graph, batch 16": {"host_ms": 0.0},
    "batch 256, context 8,192": {"batch": 256, "context": 8192},
    "batch 1,024, context 128": {"batch": 1024, "context": 128},
}.items():
    for control, value in controls.items():
        regimes.move(control, value)
    found[name] = regimes.drawn()["regime"]
    print(f"{name:26} waits for {found[name]}")
assert [*found.values()] == ["overhead", "weights", "kv", "arithmetic"]
regimes.choose({"host_ms": 5.0, "batch": 16, "context": 1024})
regimes

# %% [markdown]
# *weights* and *kv* are the two faces of the bandwidth regime, *arithmetic* is the compute regime, *overhead* is the
# host's. What helps in one does nothing in the next: a larger batch against *weights*, fewer bytes of cache against
# *kv*, more FLOP/s against *arithmetic*, a graph or fused kernels against *overhead*.
#
# ## 7. Is a busy chip an efficient chip?
#
# Tools show a **utilisation**: on a GPU, the share of time in which at least one kernel runs; on a CPU, the share in
# which its threads work. First this machine: how busy it was in section 4, and how much of its FLOP/s it used.

# %% tags=["nbval-ignore-output"]
for step in (here.steps[0], here.series("decode", 128)[0], here.series("prefill")[-1]):
    busy = "not asked" if step.busy is None else f"{step.busy:.0f}% busy"
    share = f"{here.share_of_flops(step):.1f}% of the FLOP/s"
    print(f"{step.shape.kind:7} of {step.shape.num_tokens:3} tokens: {busy}, {share}")

# %% [markdown]
# Then the H200, as `nvidia-smi` saw it while each step ran again and again: as the engine runs it, and as a graph.

# %%
print(f"{'':24}   as run  as a graph  of FLOP/s  of bytes/s")
used = {}
for step in (s for s in large.steps if s.busy is not None):
    of_bytes = 100 * step.num_bytes / step.best_s / large.bandwidth
    busy = step.busy if step.graph_busy is None else step.graph_busy
    graph = "-" if step.graph_busy is None else f"{busy:.0f}%"
    name = f"{step.shape.kind} {step.shape.num_tokens:5} at {step.shape.num_stored:5}"
    used[name] = (busy, large.share_of_flops(step))
    shares = f"{used[name][1]:9.1f}% {of_bytes:9.1f}%"
    print(f"{name:24} {step.busy:7.0f}% {graph:>11} {shares}")
by_busy, by_flops = (max(x) / min(x) for x in zip(*used.values(), strict=True))
print(f"most / least: utilisation {by_busy:.1f}, use of the FLOP/s {by_flops:.0f}")
assert by_flops > 20 * by_busy

# %% [markdown]
# Utilisation says that something runs, not what it achieves: between these steps it differs by a small factor, and the
# use of the arithmetic by more than a hundred. Ask for the share of a roof instead, and name the roof.
#
# ## 8. Why training does not starve
#
# Take the same small model, and switch the backward pass on. [`count_passes`](../minivllm/lab/training_card.py) counts
# both on tensors without numbers: the FLOPs, and the bytes that have to be kept until they are used again.

# %%
kept = predict(
    "01.p6",
    "Bytes kept for each token: training keeps how many times as many as serving?",
    ...,
    unit="×",
)
kept

# %%
passes = count_passes("smollm2-135m", (1, 16, 256, 2048))
N = int(c.num_matrix_parameters("smollm2-135m"))
for done in passes:
    per_token = done.products // done.num_tokens
    assert per_token == (6 if done.has_backward else 2) * N  # to the last FLOP
served, trained = passes[-2:]
assert served.kept_bytes == 2048 * int(c.kv_bytes_per_token("smollm2-135m", "bf16"))
print(f"N = {N:,} weights in matrices; FLOPs of a token: 2 N served, 6 N trained")
kept.reveal(round(trained.kept_bytes / served.kept_bytes, 1))

# %%
card = TrainingCard(passes, backward="on", tokens=2048)
card

# %% [markdown]
# The backward pass triples the FLOPs, yet it is not what feeds the chip: set *tokens at once* to 1, and training starves
# too. Training has whole texts and knows every next token, so thousands pass through one read of the weights. Serving
# has to write a token before it can read it. What training keeps instead, its activations, is many times a token's K
# and V, and it is dropped after the step.

# %%
for tokens in (1, 16, 256, 2048):
    card.move("tokens", tokens)
    intensity = card.drawn()["intensity"]
    served, trained = intensity["off"], intensity["on"]
    print(f"{tokens:5} tokens: served {served:8.1f}, trained {trained:8.1f} FLOP/byte")
assert card.drawn()["ridge"] < min(intensity.values())
card.move("tokens", 1)
assert max(card.drawn()["intensity"].values()) < 1.01

# %% [markdown]
# ## Exercises
#
# Red until you work. Another try gives another hint; `check.redraw("01.1")` draws other numbers.

# %%
ask("01.1")

# %%
check("01.1", ...)  # [ridge of the first chip, of the second, of the third]

# %%
ask("01.2")

# %%
check("01.2", ...)  # tokens in a step

# %%
ask("01.3")

# %%
check("01.3", ...)  # FLOP/byte

# %%
ask("01.4")

# %%
check("01.4", ...)  # milliseconds

# %%
ask("01.5")

# %%
check("01.5", ...)  # ["compute", "bandwidth", ...], six words

# %% [markdown]
# ## Not true
#
# - "More FLOP/s make decode faster." Section 3: twice the FLOP/s, and the floor stays at 4.79 ms to the last digit.
# - "Batching fixes attention." Section 2: from batch 1 to 512 its intensity does not move, and section 5 shows the time.
# - "The GPU is 100% utilised, so it is efficient." Section 7: utilisation hardly tells a step that uses most of the
#   arithmetic from one that uses less than 1% of it.
# - "Decode reads only the cache." Section 1: at short context nearly all bytes are weights; section 5 says from when on
#   the cache is more.
#
# ## Say it out loud, in 60 seconds
#
# A colleague says: "We trained this model on these very cards and they were full. Now they serve it, and most of their
# arithmetic is idle. Is the engine broken?" Explain what is different, with the ridge, with the number of tokens for
# each read of the weights, with what a batch repairs, and with what it does not.
#
# ## Exit quiz

# %%
FlashCards(cards=("F3", "J1.num", "J3", "F4.num", "J5", "J7"))

# %%
predict.calibration("01")

# %%
pool = llm.engine.kv.pool
assert pool.num_free == pool.num_usable  # no block leaked
assert llm.engine.runner is llm.runner  # no counter left behind
