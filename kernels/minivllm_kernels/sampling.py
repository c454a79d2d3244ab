"""One token a row in one pass over the logits: the Gumbel-max trick, without a softmax, a sum or a sort.

    logits [B, V], 1,024 consecutive tokens:   | 256 tokens | 256 tokens | 256 tokens | 256 tokens |
    Philox(seed; token block, position, lane) -->  word 0       word 1       word 2       word 3
                                                     |            |            |            |
    key = logit / temperature - log(E),  E ~ Exp(1) from the word; the largest key of the row wins

Grid (splits, B): a program holds its best key so far and walks every `splits`-th block; the last program of a row to
finish takes the best of all. A word depends on (seed, position, token) alone, hence so does the token drawn.

An exact key costs two logarithms and a series. A bound that is nearly as tight costs one logarithm: E = -log(1 - x) is
never below x. So a block is first bounded, and only a word whose bound reaches the best so far, about the 1st, 2nd,
4th, 8th ... block of a program, is computed exactly. Skipping is exact: what cannot win is not looked at.

Bytes per row: V * itemsize, read once. Filters read it 6 to 20 times more, from the L2 cache (sampling_filters.py).
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs
from minivllm_kernels.sampling_filters import find_floors, image

GROUP = tl.constexpr(256)  # tokens that take the same word of four: a warp's 16-byte loads of bf16
NOBODY = tl.constexpr(2**31 - 1)
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)
MAX_SPLITS = 128


@triton.jit
def _words(counter, position, seed):
    """Philox4x32-7 (Salmon et al. 2011; 7 rounds pass BigCrush): four words of 32 random bits a counter."""
    c0, c1, c2, c3 = counter.to(tl.uint32), position.to(tl.uint32), (position >> 32).to(tl.uint32), 0
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        a = c0.to(tl.uint64) * 0xD2511F53  # one instruction gives both halves, tl.philox takes two
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _log2(x):
    """The GPU's own logarithm, off by 2**-22; tl.log2 is exact and takes 20 instructions."""
    asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1) if HAS_PTX else tl.log2(x)


@triton.jit
def _placed_like(lane, logits):
    """`lane`, held by the threads that load `logits`: else every block's noise would move through shared memory."""
    asm: tl.constexpr = "mov.b32 $0, $1;"
    both = [lane, logits.to(tl.float32)]
    return tl.inline_asm_elementwise(asm, "=r,r,f", both, tl.int32, is_pure=True, pack=1) if HAS_PTX else lane


@triton.jit
def _bound(logits, word, scale):
    """No key is above this: E >= x >= the word's low 23 bits * 2**-23, which become a float's mantissa."""
    x = (word & 0x7FFFFF | 0x3F800000).to(tl.float32, bitcast=True) - 1
    return logits * scale - _log2(x)  # one FFMA


@triton.jit
def _exponential(word):
    """E = -log(1 - x) ~ Exp(1), x in (0, 1) in steps of 2**-32: small E, which win races, need their digits."""
    bits = (word << 9) | (word >> 23)  # the 23 bits of the bound come first
    x = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    series = x * (1 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4))))  # 1 - x would drop the digits of a small x
    return tl.where(x < 1 / 64, series, -0.6931471805599453 * _log2(1 - x))


@triton.jit
def _reaches(bound, best):
    """Whether a key under `bound` may be `best` or better; the margin covers the rounding of both."""
    return bound >= best - (tl.minimum(tl.abs(best), 1e30) * 2.0**-20 + 2.0**-16)


@triton.jit
def _take_record(best, winner, logits, bound, word, token, scale, is_greedy):
    """The best key and its token after these [COUNTERS]; of equal keys the lowest token wins."""
    if _reaches(tl.max(bound), best):
        noise = tl.where(is_greedy, 0.0, -_log2(_exponential(word)))
        key = tl.fma(logits, scale, noise)
        top = tl.max(key)
        if top >= best:
            first = tl.min(tl.where(key == top, token, NOBODY))
            winner = tl.where(top > best, first, tl.minimum(first, winner))
            best = top
    return best, winner


@triton.jit
def _load(row_ptr, token, V):
    """Logits of one word's tokens [COUNTERS], -inf past the vocabulary."""
    return tl.load(row_ptr + token, mask=token < V, other=float("-inf"))


@triton.jit
def _cut(logits, floor, HAS_FLOORS: tl.constexpr):
    """Logits in fp32, -inf at or below the row's floor."""
    logits = logits.to(tl.float32)
    return tl.where(logits > floor, logits, float("-inf")) if HAS_FLOORS else logits


@triton.jit
def _sample_kernel(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, floors_ptr, out_ptr, partial_ptr, arrivals_ptr,
    logits_stride, partial_stride, V, splits,
    HAS_FLOORS: tl.constexpr, COUNTERS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program takes every `splits`-th run of 4 * COUNTERS tokens of one row."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride  # int64: B * V passes 2**31
    temperature = tl.load(temperatures_ptr + row)
    is_greedy = temperature == 0
    # Greedy keys have no noise; a power of two keeps their order and makes the bound's noise small beside them.
    scale = tl.where(is_greedy, 2.0**60, 1.4426950408889634 / tl.maximum(temperature, 1e-5))
    seed, position = tl.load(seeds_ptr + row).to(tl.int64), tl.load(positions_ptr + row).to(tl.int64)
    floor = tl.load(floors_ptr + row) if HAS_FLOORS else 0.0
    lane = tl.arange(0, COUNTERS)
    token = lane // GROUP * (4 * GROUP) + lane % GROUP + split * (4 * COUNTERS)  # of word 0; word w: + w * GROUP
    best, winner = tl.full((), float("-inf"), tl.float32), tl.full((), NOBODY, tl.int32)
    n0 = _load(row_ptr, token, V)
    n1 = _load(row_ptr, token + GROUP, V)
    n2 = _load(row_ptr, token + 2 * GROUP, V)
    n3 = _load(row_ptr, token + 3 * GROUP, V)
    lane = _placed_like(lane, n0)
    for first in range(split * COUNTERS, (V + 3) // 4, splits * COUNTERS):
        x0, x1 = _cut(n0, floor, HAS_FLOORS), _cut(n1, floor, HAS_FLOORS)
        x2, x3 = _cut(n2, floor, HAS_FLOORS), _cut(n3, floor, HAS_FLOORS)
        after = token + splits * (4 * COUNTERS)  # on its way while this run is looked at
        n0 = _load(row_ptr, after, V)
        n1 = _load(row_ptr, after + GROUP, V)
        n2 = _load(row_ptr, after + 2 * GROUP, V)
        n3 = _load(row_ptr, after + 3 * GROUP, V)
        w0, w1, w2, w3 = _words(first + lane, position, seed)
        b0, b1, b2, b3 = _bound(x0, w0, scale), _bound(x1, w1, scale), _bound(x2, w2, scale), _bound(x3, w3, scale)
        if _reaches(tl.max(tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))), best):
            best, winner = _take_record(best, winner, x0, b0, w0, token, scale, is_greedy)
            best, winner = _take_record(best, winner, x1, b1, w1, token + GROUP, scale, is_greedy)
            best, winner = _take_record(best, winner, x2, b2, w2, token + 2 * GROUP, scale, is_greedy)
            best, winner = _take_record(best, winner, x3, b3, w3, token + 3 * GROUP, scale, is_greedy)
        token = after
    # Key and inverted token in one integer: the largest has the best key and the lowest of its tokens. + 0.0: no -0.
    code = (image(best + 0.0).to(tl.int64) << 32) | (winner ^ NOBODY)
    tl.store(partial_ptr + row * partial_stride + split, code)
    if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == splits - 1:  # all programs of the row have stored theirs
        part = tl.arange(0, PADDED_SPLITS)
        codes = tl.load(partial_ptr + row * partial_stride + part, part < splits, other=-(2**63), cache_modifier=".cg")
        tl.store(out_ptr + row, tl.minimum((tl.max(codes) & NOBODY) ^ NOBODY, V - 1))
        tl.store(arrivals_ptr + row, 0)  # ready for the next launch


def sample(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor,
    out: torch.Tensor, partial: torch.Tensor, arrivals: torch.Tensor,
    floors: torch.Tensor | None = None, *,
    top_k: torch.Tensor | None = None, top_p: torch.Tensor | None = None, min_p: torch.Tensor | None = None,
    config: configs.SamplerConfig | None = None,
) -> None:  # fmt: skip
    """out[b] (int32 or int64) = a token of row b of logits [B, V], drawn with the noise of (seeds[b], positions[b]).

    temperatures [B] fp32, 0 takes the largest logit; seeds [B] int64; positions [B] int32 or int64.
    Filters [B], any of them: top_k int32 (0 is off), top_p fp32 (1 is off), min_p fp32 (0 is off).
    Workspace: partial [B, MAX_SPLITS] int64; arrivals [B] int32, zeroed once by the caller, zero again after each
    launch; with filters also floors [B] fp32.
    A row of -inf gives token 0; NaN never wins, unless there is nothing else. Raises ValueError for anything else.
    """
    check_rows(logits, out=out, partial=partial, arrivals=arrivals, temperatures=temperatures, seeds=seeds,
               positions=positions)  # fmt: skip
    if len(logits) == 0:
        return
    chosen = config or configs.sampler_config(logits.device)
    has_filters = any(values is not None for values in (top_k, top_p, min_p))
    if has_filters:
        checks.require(floors is not None, "filters need floors [B] in fp32 as workspace: pass it")
        assert floors is not None
        find_floors(logits, temperatures, floors, top_k=top_k, top_p=top_p, min_p=min_p, config=chosen)
    num_rows, vocab = logits.shape
    runs = triton.cdiv(vocab, 4 * chosen.counters)
    splits = max(1, min(runs, MAX_SPLITS, chosen.programs(logits.device) // num_rows))  # one wave
    _sample_kernel[(splits, num_rows)](
        logits, temperatures, seeds, positions, floors if has_filters else None, out, partial, arrivals,
        logits.stride(0), partial.stride(0), vocab, splits,
        HAS_FLOORS=has_filters, COUNTERS=chosen.counters, PADDED_SPLITS=triton.next_power_of_2(splits),
        num_warps=chosen.num_warps,
    )  # fmt: skip


def check_rows(logits: torch.Tensor, **rows: torch.Tensor) -> None:
    """Logits [B, V] and what there is one of per row."""
    checks.check_float("logits", logits)
    checks.require(logits.ndim == 2, f"logits have {logits.ndim} dimensions, expected [B, V]")
    checks.require(0 < logits.shape[1] < 2**30, f"logits have {logits.shape[1]} columns, expected 1 to 2**30 - 1")
    types = {"temperatures": (torch.float32,), "seeds": (torch.int64,), "partial": (torch.int64,),
             "arrivals": (torch.int32,)}  # fmt: skip
    for name, tensor in rows.items():
        shape = (len(logits), MAX_SPLITS) if name == "partial" else (len(logits),)
        expected = types.get(name, (torch.int32, torch.int64))
        checks.require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        checks.require(tensor.dtype in expected, f"{name} is {tensor.dtype}, expected {expected}")
        checks.require(tensor.is_contiguous(), f"{name} must be contiguous")
        checks.require(tensor.device == logits.device, f"{name} is on {tensor.device}, the logits on {logits.device}")
