"""One token a row in one pass over the logits, with neither softmax nor sort: first a tile of the row, then its token.

    logits [V]      | 1,024 tokens | 1,024 tokens | 1,024 tokens | ...     weight of a token: 2 ** ((logit - largest) c)
    read once:        largest, mass  largest, mass  largest, mass          mass of a tile: the sum of its weights
    last program:     mass / E       mass / E     **mass / E**   ...       E ~ Exp(1): the noise of (position, tile)
    of the row                                         |
                      read again:    weight / E, weight / E, **weight / E**, ...   the noise of (position, token)

The largest weight / E wins item i with probability weight_i / sum of weights, so a race among tiles and then one inside
the winner draw a token with its softmax probability (up to the rounding of an fp32 sum of 1,024 terms, 1e-6 of it).
Noise is Philox(seed; what it is for), and tiles are a part of the definition: who else is in the batch, how rows are
shared among programs and tuning change nothing. Greedy rows take the largest tile, then its largest token.

Grid (splits, B). A warp holds a tile: it needs no other, and its sums have one order.
Bytes per row: V * itemsize. Filters read it some times more, from the L2 cache in part (sampling_filters.py).
"""

import torch
import triton
import triton.language as tl

from minivllm_kernels import checks, configs
from minivllm_kernels.sampling_filters import find_floors

TILE = tl.constexpr(1024)
MAX_TILES = 512  # of a row: 2**19 tokens
NOBODY = tl.constexpr(2**31 - 1)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _load(row_ptr, token, V, floor, HAS_FLOORS: tl.constexpr):
    """Logits of some tokens in fp32, -inf at or below the row's floor and past the vocabulary."""
    logits = tl.load(row_ptr + token, mask=token < V, other=float("-inf")).to(tl.float32)
    return tl.where(logits > floor, logits, float("-inf")) if HAS_FLOORS else logits


@triton.jit
def _weights(logits, largest, scale):
    """2 ** ((logits - largest) * scale) in [0, 1]; 0 for -inf, whatever the largest is, and for NaN."""
    largest = tl.maximum(tl.minimum(largest, LARGEST_FLOAT), -LARGEST_FLOAT)  # inf - inf would be NaN
    return tl.maximum(tl.exp2((logits - largest) * scale), 0.0)


@triton.jit
def _exponential(seed, position, item, KIND: tl.constexpr):
    """E ~ Exp(1) of each item: -log of a uniform number of (0, 1), in steps of 2**-32."""
    word, _, _, _ = tl.philox(
        seed, item.to(tl.uint32), position.to(tl.uint32), (position >> 32).to(tl.uint32), tl.full((), KIND, tl.uint32)
    )
    x, rest = (word.to(tl.float32) + 0.5) * 2.0**-32, ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
    series = x * (1 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4))))  # 1 - x has lost the digits of a small x,
    return tl.where(x < 1 / 64, series, -tl.log(rest))  # and small E win


@triton.jit
def _first_of_largest(values, item):
    """The lowest item with the largest value; NOBODY if all are NaN."""
    return tl.min(tl.where(values == tl.max(values), item, NOBODY))


@triton.jit
def _pick(
    row_ptr, tiles_ptr, seed, position, scale, floor, is_greedy, V,
    HAS_FLOORS: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """The token of a row whose tiles are all summed."""
    tile, num_tiles = tl.arange(0, PADDED_TILES), tl.cdiv(V, TILE)
    # .cg: other programs wrote these, past this one's L1 cache
    largest = tl.load(tiles_ptr + 2 * tile, tile < num_tiles, other=float("-inf"), cache_modifier=".cg")
    mass = tl.load(tiles_ptr + 2 * tile + 1, tile < num_tiles, other=0.0, cache_modifier=".cg")
    mass *= _weights(largest, tl.max(largest), scale)
    winner = _first_of_largest(tl.where(is_greedy, largest, mass / _exponential(seed, position, tile, 1)), tile)
    token = tl.minimum(winner, num_tiles - 1) * TILE + tl.arange(0, TILE)
    logits = _load(row_ptr, token, V, floor, HAS_FLOORS)
    weights = _weights(logits, tl.max(logits), scale)
    winner = _first_of_largest(tl.where(is_greedy, logits, weights / _exponential(seed, position, token, 0)), token)
    return tl.minimum(winner, V - 1)


@triton.jit
def _sample_kernel(
    logits_ptr, temperatures_ptr, seeds_ptr, positions_ptr, floors_ptr, out_ptr, partial_ptr, arrivals_ptr,
    logits_stride, partial_stride, V, splits,
    HAS_FLOORS: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """One program sums every `splits`-th group of TILES tiles of one row; the row's last to finish picks the token."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride  # int64: B * V passes 2**31
    tiles_ptr = partial_ptr + row * partial_stride  # largest logit and mass of each tile
    temperature = tl.load(temperatures_ptr + row)
    # Read now, for the end: there nothing else would run beside it.
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row).to(tl.int64)
    scale = 1.4426950408889634 / tl.maximum(temperature, 1e-5)
    floor = tl.load(floors_ptr + row) if HAS_FLOORS else 0.0
    # A warp's 16-byte loads take RUN tokens; runs are so ordered that those of a tile fall to one warp.
    RUN: tl.constexpr = 32 * 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    run = tl.arange(0, TILES * (TILE // RUN))[:, None]
    offset = run % TILES * TILE + run // TILES * RUN + tl.arange(0, RUN)[None, :]
    num_tiles = tl.cdiv(V, TILE)
    for first in tl.range(split * TILES, num_tiles, splits * TILES, num_stages=STAGES):
        logits = _load(row_ptr, first * TILE + offset, V, floor, HAS_FLOORS)
        logits = logits.reshape(TILE // RUN, TILES, RUN)
        largest = tl.max(tl.max(logits, axis=0, keep_dims=True), axis=2, keep_dims=True)  # [1, TILES, 1]
        mass = tl.sum(tl.sum(_weights(logits, largest, scale), axis=0, keep_dims=True), axis=2, keep_dims=True)
        pair = 2 * (first + tl.arange(0, TILES)[None, :, None, None]) + tl.arange(0, 2)
        tl.store(tiles_ptr + pair, tl.join(largest, mass), pair < 2 * num_tiles)
    tl.debug_barrier()  # every warp has stored its tiles before one thread says so
    if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == splits - 1:
        token = _pick(row_ptr, tiles_ptr, seed, position, scale, floor, temperature == 0, V, HAS_FLOORS, PADDED_TILES)
        tl.store(out_ptr + row, token)
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
    Workspace: partial [B, MAX_TILES] int64, two fp32 a tile; arrivals [B] int32, zeroed once by the caller, zero again
    after each launch; with filters also floors [B] fp32.
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
    num_tiles = triton.cdiv(vocab, TILE.value)
    splits = max(1, min(triton.cdiv(num_tiles, chosen.tiles), chosen.programs(logits.device) // num_rows))
    _sample_kernel[(splits, num_rows)](
        logits, temperatures, seeds, positions, floors if has_filters else None, out, partial.view(torch.float32),
        arrivals, logits.stride(0), 2 * partial.stride(0), vocab, splits,
        HAS_FLOORS=has_filters, TILES=chosen.tiles, STAGES=chosen.stages,
        PADDED_TILES=triton.next_power_of_2(num_tiles), num_warps=chosen.num_warps,
    )  # fmt: skip


def check_rows(logits: torch.Tensor, **rows: torch.Tensor) -> None:
    """Logits [B, V] and what there is one of per row."""
    checks.check_float("logits", logits)
    checks.require(logits.ndim == 2, f"logits have {logits.ndim} dimensions, expected [B, V]")
    most = MAX_TILES * TILE.value
    checks.require(0 < logits.shape[1] <= most, f"logits have {logits.shape[1]} columns, expected 1 to {most}")
    types = {"temperatures": (torch.float32,), "seeds": (torch.int64,), "partial": (torch.int64,),
             "arrivals": (torch.int32,)}  # fmt: skip
    for name, tensor in rows.items():
        shape = (len(logits), MAX_TILES) if name == "partial" else (len(logits),)
        expected = types.get(name, (torch.int32, torch.int64))
        checks.require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        checks.require(tensor.dtype in expected, f"{name} is {tensor.dtype}, expected {expected}")
        checks.require(tensor.is_contiguous(), f"{name} must be contiguous")
        checks.require(tensor.device == logits.device, f"{name} is on {tensor.device}, the logits on {logits.device}")
