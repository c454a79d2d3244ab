"""Where top_k, top_p and min_p cut a row: one floor per row, found by counting, not by sorting.

Every filter keeps the tokens above some logit (ties stand or fall together), so a row needs one number, its floor:

    logits   -9 ........ low =======|========|========|======= high ... top
             dropped, known         pivots: count or mass above         kept, known

A pivot is kept if the tokens above it number less than k, or hold less than top_p of the mass. One read of the row
judges four pivots, which shrinks the bracket (low, high] to a quarter of its width or to half of the floats in it.
The search ends when one token, or one value, is left in the bracket.
Most of it is over before it starts: the first read leaves the largest logit of each of TILE groups in registers, and
what lies above a pivot there lies above it in the row. Few tokens share a group with a larger one, so the floor that
these few call for is a `low` that only misses by those, and the next of them a good first pivot.
Order and ties as in the engine: temperature, min_p, top_k, then top_p of the mass that is left.

One program per row. Reads of V * itemsize bytes, from the L2 cache in part: one for the groups, 1 or 2 for top_k, one
and 1 or 2 for top_p; up to 8 where the floor lies deep among many tokens, as top_p of a nearly flat row does.
min_p costs no search.
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
def _image(x):
    """An int32 that is ordered as the fp32 `x` is."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_at(code):
    """The fp32 whose image is `code`: the same exchange of bits undoes itself."""
    code = code.to(tl.int32)
    return (code ^ ((code >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load(row_ptr, first, V, TILE: tl.constexpr):
    """Logits [1, TILE / 8, 8] from `first` on, eight in a row to a thread, -inf past the vocabulary."""
    token = first + tl.arange(0, TILE // 8)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    return tl.load(row_ptr + token, mask=token < V, other=float("-inf"))


@triton.jit
def _sums_above(row_ptr, V, pivots, top, scale, TILE: tl.constexpr, WEIGHTED: tl.constexpr):
    """Count and mass (the largest token's is 1) of the logits above each of pivots [P]: two of [P]."""
    counts = tl.zeros((pivots.shape[0], TILE // 8), tl.float32)
    masses = tl.zeros((pivots.shape[0], TILE // 8), tl.float32)
    tile = _load(row_ptr, 0, V, TILE)
    for first in range(0, V, TILE):
        logits = tile.to(tl.float32)
        tile = _load(row_ptr, first + TILE, V, TILE)  # on its way while this one is counted
        is_above = (logits > pivots[:, None, None]).to(tl.float32)  # [P, TILE / 8, 8]; 0 or 1, and a factor below
        counts += tl.sum(is_above, axis=2)
        if WEIGHTED:
            masses += tl.sum(is_above * tl.exp2((logits - top) * scale), axis=2)
    return tl.sum(counts, axis=1), tl.sum(masses, axis=1)


@triton.jit
def _raise_in_groups(groups, low, target, top, scale, STEP: tl.constexpr, WEIGHTED: tl.constexpr):
    """Raise `low` as far as the largest logits of the groups alone hold `target` above it."""
    high = top
    while _image(high).to(tl.int64) - _image(low).to(tl.int64) > STEP:
        middle = _float_at((_image(low).to(tl.int64) + _image(high).to(tl.int64)) >> 1)
        value = tl.exp2((groups - top) * scale) if WEIGHTED else 1.0
        is_kept = tl.sum(tl.where(groups > middle, value, 0.0)) < target
        low, high = tl.where(is_kept, low, middle), tl.where(is_kept, middle, high)
    return low


@triton.jit
def _raise_floor(
    row_ptr, V, groups, low, target, top, scale, STEP: tl.constexpr, TILE: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Raise `low` to just under the smallest logit with count or mass above it less than `target`; top is kept."""
    low = _raise_in_groups(groups, low, target, top, scale, STEP, WEIGHTED)
    high, num_low, num_high = top, tl.full((), float("inf"), tl.float32), tl.zeros((), tl.float32)
    while (num_low - num_high > 1) & (_image(high).to(tl.int64) - _image(low).to(tl.int64) > STEP):
        step = tl.arange(0, PIVOTS)
        middle = _float_at((_image(low).to(tl.int64) + _image(high).to(tl.int64)) >> 1)  # bounds the number of reads
        following = tl.min(tl.where(groups > low, groups, high))  # the next token, unless a group hides it
        guess = tl.where(following < high, following, middle)
        pivots = tl.where(step == 0, guess, low + (high - low) * (step / PIVOTS))
        counts, masses = _sums_above(row_ptr, V, pivots, top, scale, TILE, WEIGHTED)
        is_kept = (masses if WEIGHTED else counts) < target
        low = tl.maximum(low, tl.max(tl.where(is_kept, low, pivots)))
        high = tl.minimum(high, tl.min(tl.where(is_kept, pivots, high)))
        num_low = tl.minimum(num_low, tl.min(tl.where(is_kept, num_low, counts)))
        num_high = tl.maximum(num_high, tl.max(tl.where(is_kept, counts, num_high)))
    return low


@triton.jit
def _groups(row_ptr, V, TILE: tl.constexpr):
    """The largest logit of each group [1, TILE / 8, 8], and the row's smallest above -1e30 (lower means -inf)."""
    lows = tl.full((1, TILE // 8, 8), float("inf"), tl.float32)
    highs = tl.full((1, TILE // 8, 8), float("-inf"), tl.float32)
    tile = _load(row_ptr, 0, V, TILE)
    for first in range(0, V, TILE):
        logits = tile.to(tl.float32)
        tile = _load(row_ptr, first + TILE, V, TILE)
        highs = tl.maximum(highs, logits)
        lows = tl.minimum(lows, tl.where(logits > -1e30, logits, float("inf")))
    return highs, tl.min(lows)


@triton.jit
def _below(logit, STEP: tl.constexpr):
    """The next number down, STEP images on; below 0 that is no -0, which 0 does not exceed."""
    return tl.where(logit == 0.0, -1.1754943508222875e-38, _float_at(_image(logit) - STEP))


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
        groups, bottom = _groups(row_ptr, V, TILE)
        top = tl.max(groups)
        if (top > -1e30) & (top < 1e30):
            low = _below(bottom, STEP)
            if min_p > 0:
                low = tl.maximum(low, _below(top + tl.log2(min_p) / scale, 1))  # kept at equality
            if (top_k > 0) & (top_k < V):
                low = _raise_floor(row_ptr, V, groups, low, top_k, top, scale, STEP, TILE, False)
            if top_p < 1:
                _, mass = _sums_above(row_ptr, V, tl.full((1,), 0.0, tl.float32) + low, top, scale, TILE, True)
                low = _raise_floor(row_ptr, V, groups, low, top_p * tl.sum(mass), top, scale, STEP, TILE, True)
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
