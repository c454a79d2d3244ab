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
# In the time in which a model of 8 billion parameters reads a prompt of a thousand tokens it writes five: section 4 has
# the measurement. It is one network with one set of weights, on one chip. **Prefill** is the step that reads the
# prompt; **decode** is every later step, one new token for each request. What does the chip wait for in the second and
# not in the first?
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
# First, what this machine reaches: the fastest of some large reads, and of some products of two matrices, **products**
# for short ([`measured_roofs`](../minivllm/lab/step_floor.py)). Then one prompt of 64 tokens is prefilled and one token
# decoded, and the same for 4 and for 16 requests at once. [`counted_steps`](../minivllm/lab/counted_steps.py) puts
# torch's own FLOP counter round the engine's runner, and adds up the sizes of the tensors that a step reads.

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
# The bytes hardly differ, the FLOPs differ by hundreds. A step reads each weight that multiplies once, whether 1 token
# or 1,024 tokens pass through it. Decode is starved of arithmetic because each request brings one token to that read;
# batching gives decode what prefill has by itself.
#
# ## 2. Two roofs, and the ridge between them
#
# A chip reads at most so many bytes a second and does at most so many FLOPs a second. Their quotient is its **ridge
# point**: work with fewer FLOPs for a byte waits for memory, work with more waits for arithmetic. That picture is the
# **roofline** (Williams, Waterman and Patterson, 2009). Now on a data-centre GPU and in bf16, 2 bytes a number.
#
# Attention is a point of its own. A token asks with several **query heads**; its key and value are kept once for each
# **KV head**. In Llama-3-8B 32 query heads have 8 KV heads: 4 share each K and V. In Llama-2-7B every query head has its
# own K and V, which is called **MHA**, multi-head attention. DeepSeek-V3 keeps one row for all heads, its **latent**;
# notebook 02 explains it.

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
# The closed forms behind the points. A product of B rows does about B FLOPs for a byte while B is small beside the
# matrix. In attention T queries of one head against S keys do S T / (S + T): half a prompt in prefill, less than 1 in
# decode. If g heads share K and V, each key meets g T queries, and decode has nearly g: the 4 of above.

# %%
for rows in (1, 16, 512):
    print(c.matmul_intensity(rows, 4096, 14336).derivation[-1])
for queries in (2048, 1):
    print(c.attention_intensity(queries, 2048).derivation[-1])
shared = c.attention_intensity(1, 2048, queries_per_kv_head=4)
print("g = 4:", shared.derivation[-1])
assert c.attention_intensity(2048, 2048) == 1024
assert c.attention_intensity(1, 2048) < 1 and 3.9 < float(shared) < 4

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
# the arithmetic of an H100 and 1.43 times its bandwidth, and decode is what it sells. Here are the ridges of the makers'
# data sheets, FLOP/s without sparsity. The numbers beside them were divided by hand from the same sheets; Stanford's
# course CS336 prints 295 for the H100, and the book "How to Scale Your Model" (2025) 240 for the TPU.

# %%
by_hand = {"a100-40gb-sxm": 200.6, "a100-80gb-sxm": 153.0, "h100-sxm": 295.2}
by_hand |= {"h200-sxm": 206.0, "b200-sxm": 281, "tpu-v5e": 240}
for chip, ridge in by_hand.items():
    found = float(c.ridge_point(chip))
    print(f"{chip:14} ridge {found:6.1f}   by hand {ridge}")
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
#
# There each step was timed twice. A step is hundreds of small GPU programs, **kernels**. *As run*, Python launches them
# one by one. *At once*, it replays a **CUDA graph**: the same launches, recorded beforehand and started together. The
# prediction is about the second; section 6 asks what the first one costs.

# %%
small, large = load_sweeps(RECORDINGS / "forward_h200.json")
print(small.model, "and", large.model, "on", large.machine)
shortest, *_ = alone = large.series("decode", 128)
among_64 = next(step for step in alone if step.shape.num_requests == 64)
in_company = predict(
    "01.p4",
    f"{large.model}, one request: a step takes {shortest.graph_ms:.1f} ms as a "
    "CUDA graph. With 64 requests?",
    ...,
    unit="ms",
)
in_company

# %% tags=["nbval-ignore-output"]
here = sweep(llm, ROOFS, shapes_of(256, 16, [32, 128]), budget_s=0.3)
live = MeasuredPoints([here]).drawn()
print(live["text"], *live["lines"], sep="\n")

# %%
print(
    f"64 times the tokens in {among_64.graph_ms / shortest.graph_ms:.2f} times the time"
)
prefills = [step.graph_ms / step.shape.num_tokens for step in large.series("prefill")]
assert prefills[-1] < prefills[6] < prefills[0] / 32  # 4,096, 64 and 1 token in a step
written = 1024 * prefills[10] / shortest.graph_ms
print(f"1,024 tokens of a prompt take as long as {written:.1f} steps of one request")
assert 4.5 < written < 5.5
in_company.reveal(round(among_64.graph_ms, 1))

# %% [markdown]
# Above, this machine as numbers; below, the H200, and this machine under *measured*. Dots are steps as run, solid lines
# the same as graphs, dashes the floor. The solid lines of prefill and of decode lie on each other as long as the context
# is short: a token is a token to the weights. They fall until the ridge; from there on each further token of a prefill
# costs as much as the one before.
#
# The floor here is 3.51 ms, in section 3 it is 3.35. This one takes the roofs that were measured on that card, 4.28 TB/s
# instead of the data sheet's 4.8. And it counts the bytes that a step really reads, 15.01 GB instead of 16.06: of
# Llama-3's table of embeddings a step reads one row for each token. On a machine that others use too, a step may pass
# the measured roof; then the roof is raised to that step, whose 100% and whose floor hold by construction.

# %% tags=["nbval-ignore-output"]
measured = MeasuredPoints([large, small, here])
measured

# %% [markdown]
# Move *show* to the roofline, and *measured* to the smaller model. How much of the arithmetic do the larger one's
# shortest and longest steps use, as graphs?

# %%
longest = large.series("prefill")[-1]
for step in (shortest, longest):
    share = f"{large.share_of_flops(step):5.2f}% of the FLOP/s"
    print(f"{step.shape.num_tokens:5} tokens: {step.intensity:7.1f} FLOP/byte, {share}")
assert shortest.intensity < large.flops_per_s / large.bandwidth < longest.intensity
sheet_ms = c.read_ms(c.weight_bytes("llama-3-8b"), "h200-sxm")  # section 3's floor
assert (round(float(sheet_ms), 2), round(shortest.floor_ms, 2)) == (3.35, 3.51)

# %% [markdown]
# ## 5. The same decode at two contexts
#
# 256 requests decode one token each. In the first run each holds 128 tokens, in the second 2,048. The weights are the
# same, so are the products; only attention has more to do. Both were timed as graphs.

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
crossing = c.tokens_where_kv_passes_weights(c.weight_bytes("llama-3-8b"), per_token)
print(crossing.derivation[-1])
assert int(crossing) == 122_532
assert more_flops < 1.1 < 1.5 < slower < more_bytes
for name, step in (("short", short), ("long", long)):
    over = step.graph_ms / step.floor_ms
    print(f"{name:5} {step.intensity:5.1f} FLOP/byte, {over:.2f} times its floor")
assert short.graph_ms / short.floor_ms > 2 > 1.3 > long.graph_ms / long.floor_ms
longer.reveal(round(slower, 2))

# %% [markdown]
# Hardly more FLOPs, far more time: who counts only FLOPs cannot explain decode. 256 requests of 2,048 tokens hold four
# times the 122,532 tokens from which reading K and V takes longer than reading the weights.
#
# Why 2.44 and not 4.34? The short run has 200 FLOP/byte, and the measured ridge is at 182: bytes and arithmetic take
# about as long there, and the step takes twice its floor. So its time is not its bytes. The long run's nearly is.
#
# ## 6. The third regime: nobody launches the kernels
#
# As run, the host launches each of a step's hundreds of kernels from Python. If a kernel ends before the next one is
# launched, the GPU waits for neither bytes nor FLOPs: it waits for the host. At once, as a CUDA graph, it does not.

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
# The sign of this regime is a time that does not move, whatever the batch. As run, even the model of 8 billion parameters
# is in it: 22 ms for a step of one request, 5.3 as a graph.
#
# Below, all three regimes by calculation. *host needs* is the time that the host takes for the launches of one step.
# Move it, then *batch* and *context*. Right of the dashes, weights, K and V are more than the card's memory.
#
# The floor of this picture is the stricter of two: reading K and V, **plus** the longer of reading the weights and
# computing the products, for attention and products take turns. The floors of sections 3 and 4 let everything overlap.
# Green is only what the products take beyond the read of the weights.

# %%
regimes = StepRegimes(model="llama-3-8b", chip="h200-sxm", context=1024)
found = {}
for name, controls in {
    "slow host, batch 16": {"host_ms": 20.0, "batch": 16},
    "graph, batch 16": {"host_ms": 0.0, "batch": 16},
    "batch 64, context 8,192": {"batch": 64, "context": 8192},
    "batch 1,024, context 128": {"batch": 1024, "context": 128},
}.items():
    for control, value in controls.items():
        regimes.move(control, value)
    drawn = regimes.drawn()
    found[name] = drawn["regime"]
    needed = drawn["needed_bytes"][controls["batch"]]
    print(f"{name:24} waits for {found[name]:10} needs {needed / 1e9:.0f} GB")
    assert needed < drawn["card_bytes"]
assert [*found.values()] == ["overhead", "weights", "kv", "arithmetic"]
regimes.choose({"host_ms": 5.0, "batch": 16, "context": 1024})
regimes

# %% [markdown]
# *weights* and *kv* are the two faces of the bandwidth regime, *arithmetic* is the compute regime, *overhead* is the
# host's. What helps in one does nothing in the next: a larger batch against *weights*, fewer bytes of cache against
# *kv*, more FLOP/s against *arithmetic*; against *overhead* a graph, or fewer kernels that each do the work of several.
#
# ## 7. Is a busy chip an efficient chip?
#
# Tools show a **utilisation**: on a GPU, the share of time in which at least one kernel runs; on a CPU, the share in
# which its threads work. First this machine: how busy it was in section 4, and how much of its FLOP/s it used. Exactly
# 100% would be the step that set the roof itself.

# %% tags=["nbval-ignore-output"]
for step in (here.steps[0], here.series("decode", 128)[0], here.series("prefill")[-1]):
    busy = "not asked" if step.busy is None else f"{step.busy:.0f}% busy"
    share = f"{here.share_of_flops(step):.1f}% of the FLOP/s"
    print(f"{step.shape.kind:7} of {step.shape.num_tokens:3} tokens: {busy}, {share}")

# %% [markdown]
# Then the H200, as `nvidia-smi` saw it while each step ran again and again: as the engine runs it, and as a graph.

# %%
print(f"{'':22}utilisation            as a graph, of")
print(f"{'':22} as run  as a graph   FLOP/s  bytes/s")
rows = []
for step in (s for s in large.steps if s.graph_busy is not None):
    of_bytes = 100 * step.num_bytes / (step.graph_ms / 1e3) / large.bandwidth
    of_flops = 100 * step.flops / (step.graph_ms / 1e3) / large.flops_per_s
    name = f"{step.shape.kind:7} {step.shape.num_tokens:5} at {step.shape.num_stored:5}"
    rows.append((step.busy, step.graph_busy, of_flops))
    busy = f"{step.busy:6.0f}% {step.graph_busy:10.0f}%"
    print(f"{name:22}{busy} {of_flops:7.1f}% {of_bytes:7.1f}%")
as_run, as_graph, of_flops = (max(x) / min(x) for x in zip(*rows, strict=True))
print("most / least: utilisation", end=" ")
print(f"{as_run:.1f} as run, {as_graph:.2f} as a graph; FLOP/s {of_flops:.0f}")
assert as_run > 4 and as_graph < 1.02 and of_flops > 100

# %% [markdown]
# Low utilisation finds a slow host: as run, the short steps leave the GPU idle for most of the time. 100% proves nothing:
# replayed as graphs, all six show 99% or 100%, while their use of the FLOP/s differs 193-fold. Ask for the share of a
# roof instead, and name the roof.
#
# ## 8. Why training does not starve
#
# Take the same small model, and switch the backward pass on. [`count_passes`](../minivllm/lab/training_card.py) counts
# on tensors without numbers: the FLOPs, and the bytes that have to be kept until they are used again.
#
# Serving keeps K and V of a token: 30 layers of 2 times 192 numbers, 2 bytes each. A backward pass needs, of each
# operation, what went in: for every token the inputs of all products, norms and functions between them. These are the
# **activations**. A layer here is 576 wide, its MLP 1,536; and the last product makes 49,152 scores for each token.

# %%
kept = predict(
    "01.p6",
    "Bytes kept for each token: activations are how many times as many as K and V?",
    ...,
    unit="×",
)
kept

# %%
passes = count_passes("smollm2-135m", (1, 16, 256, 2048))
N = int(c.num_matrix_parameters("smollm2-135m"))
for done in passes:
    per_token = done.products // done.num_tokens
    assert per_token == (6 if done.kind == "training" else 2) * N  # to the last FLOP
decoded, served, trained = passes[-3:]
assert served.kept_bytes == 2048 * int(c.kv_bytes_per_token("smollm2-135m", "bf16"))
print(f"N = {N:,} weights in matrices; products of a token:")
print(f"2 N = {2 * N / 1e6:.0f} MFLOP served, 6 N = {6 * N / 1e6:.0f} MFLOP trained")
for done in (served, trained):
    print(f"attention of a token, {done.kind}: {done.attention / 2048 / 1e6:.0f} MFLOP")
kept.reveal(round(trained.kept_bytes / served.kept_bytes, 1))

# %%
card = TrainingCard(passes, backward="on", tokens=2048)
card

# %% [markdown]
# The first bars are products and attention together: 269 + 142 MFLOP served. Attention is counted as torch's kernels are,
# each query with all 2,048 keys, masked ones too.
#
# The backward pass triples the products, yet it is not what feeds the chip: set *tokens of the text* to 1, and training
# starves too. Training has whole texts and knows every next token, so thousands pass through one read of the weights;
# so they do in a prefill. Decode has to write a token before it can read it: one for each read, 1.3 FLOP/byte. What
# training keeps, its activations, is dropped after the step.

# %%
for tokens in (1, 16, 256, 2048):
    card.move("tokens", tokens)
    intensity = card.drawn()["intensity"]
    decoded, served, trained = (intensity[state] for state in ("decode", "off", "on"))
    print(f"{tokens:5} tokens: decoded {decoded:.1f}", end=" ")
    print(f"prefilled {served:7.1f} trained {trained:6.1f} FLOP/byte")
assert decoded < 2 < card.drawn()["ridge"] < min(served, trained)
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
# - "The GPU is 100% utilised, so it is efficient." Section 7: low utilisation finds a slow host, but as a graph a step
#   that uses 0.4% of the arithmetic shows 99%, and one that uses 71% shows 100%.
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
