"""Where top_k, top_p and min_p cut a row: one floor per row, found by counting, not by sorting.

Every filter keeps the tokens above some logit (ties stand or fall together), so a row needs one number, its floor:

    logits   -9 ........ low =======|========|========|======= high ... top
             dropped, known         pivots: count or mass above         kept, known

A pivot is kept if the tokens above it number less than k, or hold less than top_p of the mass. One read of the row
judges four pivots, which shrinks the bracket (low, high] to a quarter of its width and to half of the floats in it.
The search ends when one token, or one value, is left in the bracket: after 4 to 9 reads, 33 at the very most.
Order and ties as in the engine: temperature, min_p, top_k, then top_p of the mass that is left.

One program per row, whose V * itemsize bytes stay in the L2 cache: one read for the largest logit, 4 to 9 for top_k,
as many and one for top_p. min_p costs no search.
Masses are sums in fp32: a token whose exact cumulative mass is within 1e-5 of top_p may fall on either side.
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs

PIVOTS = tl.constexpr(4)
FLOAT_STEPS = {torch.bfloat16: 2**16, torch.float16: 2**13, torch.float32: 1}  # fp32 images from a value to the next
MAX_COUNT = 2**24  # counts are sums of fp32 ones


@triton.jit
def image(x):
    """An int32 that is ordered as the fp32 `x` is."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_at(code):
    """The fp32 whose image is `code`: the same exchange of bits undoes itself."""
    code = code.to(tl.int32)
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sums_above(row_ptr, V, pivots, top, scale, TILE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Count and mass (the largest token's is 1) of the logits above each of pivots [P, 1]: two of [P]."""
    counts = tl.zeros((pivots.shape[0], TILE), tl.float32)
    masses = tl.zeros((pivots.shape[0], TILE), tl.float32)
    for first in tl.range(0, V, TILE, num_stages=3):
        token = first + tl.arange(0, TILE)[None, :]
        logits = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)  # [1, TILE]
        is_above = (logits > pivots).to(tl.float32)  # [P, TILE]; 0 or 1: one instruction, and a factor below
        counts += is_above
        if WEIGHTED:
            masses += is_above * tl.exp2((logits - top) * scale)
    return tl.sum(counts, axis=1), tl.sum(masses, axis=1)


@triton.jit
def _raise_floor(
    row_ptr, V, low, num_low, target, top, scale, STEP: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Raise `low` to just under the smallest logit with count or mass above it less than `target`; top is kept."""
    high, num_high = top, tl.zeros((), tl.float32)
    while (num_low - num_high > 1) & (image(high).to(tl.int64) - image(low).to(tl.int64) > STEP):
        step = tl.arange(0, PIVOTS)
        middle = _float_at((image(low).to(tl.int64) + image(high).to(tl.int64)) >> 1)  # bounds the number of reads
        pivots = tl.where(step == PIVOTS - 1, middle, low + (high - low) * ((step + 1) / PIVOTS))
        counts, masses = _sums_above(row_ptr, V, pivots[:, None], top, scale, TILE, WEIGHTED)
        is_kept = (masses if WEIGHTED else counts) < target
        low = tl.maximum(low, tl.max(tl.where(is_kept, low, pivots)))
        high = tl.minimum(high, tl.min(tl.where(is_kept, pivots, high)))
        num_low = tl.minimum(num_low, tl.min(tl.where(is_kept, num_low, counts)))
        num_high = tl.maximum(num_high, tl.max(tl.where(is_kept, counts, num_high)))
    return low


@triton.jit
def _extremes(row_ptr, V, TILE: tl.constexpr):
    """The row's smallest and largest logit above -1e30 (what lies lower means -inf), and how many there are."""
    lows, highs = tl.full((TILE,), float("inf"), tl.float32), tl.full((TILE,), float("-inf"), tl.float32)
    counts = tl.zeros((TILE,), tl.float32)
    for first in tl.range(0, V, TILE, num_stages=3):
        token = first + tl.arange(0, TILE)
        logits = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
        highs = tl.maximum(highs, logits)
        lows = tl.minimum(lows, tl.where(logits > -1e30, logits, float("inf")))
        counts += (logits > -1e30).to(tl.float32)
    return tl.min(lows), tl.max(highs), tl.sum(counts)


@triton.jit
def _floor_kernel(
    logits_ptr, temperatures_ptr, top_k_ptr, top_p_ptr, min_p_ptr, floors_ptr, logits_stride, V,
    STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program finds one row's floor: the row keeps the tokens above it."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride  # int64: B * V passes 2**31
    temperature = tl.load(temperatures_ptr + row)
    scale = 1.4426950408889634 / tl.maximum(temperature, 1e-5)
    top_k = tl.load(top_k_ptr + row) if top_k_ptr is not None else tl.zeros((), tl.int32)
    top_p = tl.load(top_p_ptr + row) if top_p_ptr is not None else tl.full((), 1.0, tl.float32)
    min_p = tl.load(min_p_ptr + row) if min_p_ptr is not None else tl.zeros((), tl.float32)
    floor = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1) | (min_p > 0)):
        bottom, top, count = _extremes(row_ptr, V, TILE)
        if (top > -1e30) & (top < 1e30):
            low = _float_at(image(bottom) - STEP)
            if min_p > 0:
                low = tl.maximum(low, _float_at(image(top + tl.log2(min_p) / scale) - 1))  # kept at equality
            if (min_p > 0) & (top_k > 0):
                counts, _ = _sums_above(row_ptr, V, tl.zeros((1, 1), tl.float32) + low, top, scale, TILE, False)
                count = tl.sum(counts)
            if (top_k > 0) & (top_k < count):  # else all that is left is among the first k
                low = _raise_floor(row_ptr, V, low, count, top_k, top, scale, STEP, TILE, False)
            if top_p < 1:
                counts, masses = _sums_above(row_ptr, V, tl.zeros((1, 1), tl.float32) + low, top, scale, TILE, True)
                target = top_p * tl.sum(masses)
                low = _raise_floor(row_ptr, V, low, tl.sum(counts), target, top, scale, STEP, TILE, True)
            floor = low
    tl.store(floors_ptr + row, floor)


def find_floors(
    logits: torch.Tensor, temperatures: torch.Tensor, floors: torch.Tensor, *,
    top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None,
    config: configs.SamplerConfig,
) -> None:  # fmt: skip
    """floors[b] = the logit that a token of logits [B, V] must exceed to be drawn; -inf where nothing is cut.

    temperatures and floors [B] fp32; filters [B] as in sampling.sample. Raises ValueError for other types or shapes.
    """
    checks.check_float("logits", logits)
    num_rows, vocab = logits.shape
    checks.require(vocab <= MAX_COUNT, f"filters count in fp32: {vocab} columns are more than {MAX_COUNT}")
    filters = {"top_k": (top_k, torch.int32), "top_p": (top_p, torch.float32), "min_p": (min_p, torch.float32)}
    for name, (values, dtype) in {"floors": (floors, torch.float32), **filters}.items():
        if values is not None:
            checks.require(tuple(values.shape) == (num_rows,), f"{name} must have shape ({num_rows},)")
            checks.require(values.dtype == dtype, f"{name} is {values.dtype}: pass {dtype}")
            checks.require(
                values.is_contiguous() and values.device == logits.device, f"{name}: contiguous, with logits"
            )
    _floor_kernel[(num_rows,)](
        logits, temperatures, top_k, top_p, min_p, floors, logits.stride(0), vocab,
        STEP=FLOAT_STEPS[logits.dtype], TILE=config.filter_tile, num_warps=config.filter_warps,
    )  # fmt: skip
