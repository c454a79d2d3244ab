"""Puzzles of notebook 06 in plain Python: what one program of the paged decode kernel does, and five ways to miss it.

The right versions are slow twins of parts of `attend_tiles` and `merge_partials` (minivllm_kernels/split_kv.py),
in float64 and with e instead of 2 as the base; tests hold them against those kernels' own twin.
"""

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]
State = tuple[float, float, list[float]]  # running maximum, sum of exponentials, output not yet divided
Tile = tuple[list[float], list[list[float]]]  # scores, rows of V
NEVER = -math.inf


def dot(a: Row, b: Row) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def masked_scores(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    """One score for each row of a tile that begins at token `start`; rows beyond num_tokens hold garbage."""
    return [dot(q, k) if start + i < num_tokens else NEVER for i, k in enumerate(k_tile)]


def _unmasked(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    return [dot(q, k) for k in k_tile]


def _zero_score(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    return [dot(q, k) if start + i < num_tokens else 0.0 for i, k in enumerate(k_tile)]


def _one_too_many(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    return [dot(q, k) if start + i <= num_tokens else NEVER for i, k in enumerate(k_tile)]


def _start_forgotten(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    return [dot(q, k) if i < num_tokens else NEVER for i, k in enumerate(k_tile)]


def _multiplied(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    return [dot(q, k) * (start + i < num_tokens) for i, k in enumerate(k_tile)]


def _divided_by_root(q: list[float], k_tile: list[list[float]], start: int, num_tokens: int) -> list[float]:
    return [score / math.sqrt(len(q)) for score in masked_scores(q, k_tile, start, num_tokens)]


MASK_SLIPS: dict[str, object] = {
    "no mask: the last block is only partly filled; rows beyond num_tokens hold garbage": _unmasked,
    "score 0 for −inf: e^0 = 1 is a weight; only −inf has weight 0": _zero_score,
    "one token too many: tokens are counted from 0, so the last one is num_tokens − 1": _one_too_many,
    "counted from the tile's start: row i of the tile is token start + i": _start_forgotten,
    "mask multiplied: garbage × 0 is NaN where the garbage is NaN or infinite; choose instead": _multiplied,
    "divided by √d: the plain dot product is asked for; the kernel divides q beforehand": _divided_by_root,
}


def gather(cache: list[Row], block_ids: list[int], block_size: int, start: int, tile: int) -> list[Row]:
    """Rows of the cache (one for each slot) for tokens start .. start + tile − 1 of a request."""
    return [cache[block_ids[t // block_size] * block_size + t % block_size] for t in range(start, start + tile)]


def _contiguous(cache: list[Row], block_ids: list[int], block_size: int, start: int, tile: int) -> list[Row]:
    return cache[start : start + tile]


def _first_block_only(cache: list[Row], block_ids: list[int], block_size: int, start: int, tile: int) -> list[Row]:
    first = block_ids[start // block_size] * block_size + start % block_size
    return cache[first : first + tile]


def _no_offset(cache: list[Row], block_ids: list[int], block_size: int, start: int, tile: int) -> list[Row]:
    return [cache[block_ids[t // block_size] * block_size] for t in range(start, start + tile)]


def _from_table_start(cache: list[Row], block_ids: list[int], block_size: int, start: int, tile: int) -> list[Row]:
    return gather(cache, block_ids, block_size, 0, tile)


def _block_as_row(cache: list[Row], block_ids: list[int], block_size: int, start: int, tile: int) -> list[Row]:
    return [cache[block_ids[t // block_size] + t % block_size] for t in range(start, start + tile)]


GATHER_SLIPS: dict[str, object] = {
    "no table: the request's tokens do not lie at their positions": _contiguous,
    "one look into the table for the whole tile: a tile may span several blocks": _first_block_only,
    "offset forgotten": _no_offset,
    "start forgotten: the tile begins at token `start`, not at 0": _from_table_start,
    "block for slot: multiply the block id by block_size": _block_as_row,
}


def online_update(peak: float, total: float, output: list[float], scores: list[float], values: list[Row]) -> State:
    """Add a tile to the running maximum, sum and output of a softmax (Milakov and Gimelshein 2018)."""
    new_peak = max(peak, *scores)
    shrink = math.exp(peak - new_peak)
    probs = [math.exp(score - new_peak) for score in scores]
    columns = zip(*values, strict=True)
    return new_peak, total * shrink + sum(probs), [o * shrink + dot(probs, c) for o, c in zip(output, columns,
                                                                                              strict=True)]  # fmt: skip


def _updated(peaks: tuple[float, float, float], total_shrinks: bool, output_shrinks: bool) -> Callable[..., State]:
    """A version that differs in what is rescaled; `peaks` weighs (old maximum, tile's, new) for the exponent."""

    def update(peak: float, total: float, output: list[float], scores: list[float], values: list[Row]) -> State:
        new_peak = max(peak, *scores)
        shrink = math.exp(peak - new_peak)
        pivot = sum(weight * p for weight, p in zip(peaks, (peak, max(scores), new_peak), strict=True) if weight)
        probs = [math.exp(min(score - pivot, 700.0)) for score in scores]
        columns = zip(*values, strict=True)
        summed = total * (shrink if total_shrinks else 1.0) + sum(probs)
        return new_peak, summed, [
            o * (shrink if output_shrinks else 1.0) + dot(probs, c) for o, c in zip(output, columns, strict=True)
        ]  # fmt: skip

    return update


def _keeps_peak(peak: float, total: float, output: list[float], scores: list[float], values: list[Row]) -> State:
    _, new_total, new_output = online_update(peak, total, output, scores, values)
    return max(scores), new_total, new_output


def _divides(peak: float, total: float, output: list[float], scores: list[float], values: list[Row]) -> State:
    new_peak, new_total, new_output = online_update(peak, total, output, scores, values)
    return new_peak, new_total, [o / new_total for o in new_output]


UPDATE_SLIPS: dict[str, object] = {
    "sum not rescaled: when the maximum grows, what was summed shrinks by e^(old − new)": _updated(
        (0, 0, 1), False, True
    ),
    "output not rescaled: it is a sum of the same exponentials, and shrinks with them": _updated(
        (0, 0, 1), True, False
    ),
    "nothing rescaled: sum and output belong to the old maximum": _updated((0, 0, 1), False, False),
    "tile's own maximum: exponents are taken against the larger of old and new maximum": _updated(
        (0, 1, 0), True, True
    ),
    "old maximum forgotten: the running maximum never falls": _keeps_peak,
    "divided too early: divide once, after the last tile": _divides,
}


def kv_head_of(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    """The KV head that a query head reads: neighbours share one."""
    return query_head // (num_heads // num_kv_heads)


def _modulo(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    return query_head % num_kv_heads


def _own_head(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    return query_head


def _by_kv_heads(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    return query_head // num_kv_heads


def _in_group(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    return query_head % (num_heads // num_kv_heads)


def _first_head(query_head: int, num_heads: int, num_kv_heads: int) -> int:
    return 0


HEAD_SLIPS: dict[str, object] = {
    "dealt out in turn: query heads 0, 1, 2 ... of a group are neighbours and share one KV head": _modulo,
    "query heads": _own_head,
    "divided by KV heads: the group has num_heads / num_kv_heads members; divide by that": _by_kv_heads,
    "place in the group: that is which member of its group the head is": _in_group,
    "one KV head for all: that is MQA": _first_head,
}


def merge(parts: list[State]) -> list[float]:
    """Combine partial softmaxes over disjoint keys and divide once: the output of all keys."""
    peak = max(m for m, _, _ in parts)
    total = sum(part * math.exp(m - peak) for m, part, _ in parts)
    size = len(parts[0][2])
    return [sum(o[j] * math.exp(m - peak) for m, _, o in parts) / total for j in range(size)]


def _merged(scale: Callable[[float, float], float], divides: bool = True) -> Callable[[list[State]], list[float]]:
    def merge_scaled(parts: list[State]) -> list[float]:
        peak = max(m for m, _, _ in parts)
        total = sum(part * scale(m, peak) for m, part, _ in parts) if divides else 1.0
        return [sum(o[j] * scale(m, peak) for m, _, o in parts) / total for j in range(len(parts[0][2]))]

    return merge_scaled


def _averages(parts: list[State]) -> list[float]:
    return [sum(o[j] / part for _, part, o in parts) / len(parts) for j in range(len(parts[0][2]))]


def _scales_output_only(parts: list[State]) -> list[float]:
    peak, total = max(m for m, _, _ in parts), sum(part for _, part, _ in parts)
    return [sum(o[j] * math.exp(m - peak) for m, _, o in parts) / total for j in range(len(parts[0][2]))]


def _weighed(weight: Callable[[float, float], float]) -> Callable[[list[State]], list[float]]:
    """Outputs weighed as if each were divided already; `weight` is of a part's maximum and sum."""

    def merge_weighed(parts: list[State]) -> list[float]:
        weights = [weight(m, total) for m, total, _ in parts]
        size = len(parts[0][2])
        return [sum(w * o[j] for w, (_, _, o) in zip(weights, parts, strict=True)) / sum(weights) for j in range(size)]

    return merge_weighed


def _by_log_sum(m: float, total: float) -> float:
    return math.exp(m) * total


def _by_maximum(m: float, total: float) -> float:
    return math.exp(m)


MERGE_SLIPS: dict[str, object] = {
    "sums added": _merged(lambda m, peak: 1.0),
    "outputs averaged": _averages,
    "scaled by the wrong sign": _merged(lambda m, peak: math.exp(peak - m)),
    "never divided: divide by the merged sum, once": _merged(lambda m, peak: math.exp(m - peak), divides=False),
    "sums not rescaled: outputs shrink with their maximum, and so do the sums": _scales_output_only,
    "outputs taken for divided: the kernel's stored parts are, and weighed by log-sum; here o is not": _weighed(
        _by_log_sum
    ),
    "maximum taken for log-sum: the third number is not divided, and l counts too: scale both by e^(m_i − m)": _weighed(
        _by_maximum
    ),
    "2 for e: the kernel counts in powers of two; m and l of these parts belong to e": _merged(
        lambda m, peak: 2 ** (m - peak)
    ),
}
