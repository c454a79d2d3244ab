"""Paged attention whose bits depend on a request's own tokens alone: one fixed shape of work, merged in one order.

torch_backend.py pads requests to the longest of their group and computes chunks of any length in one call, so the
order of summation, and with it the last bits, depends on the neighbours and on the chunks. Here all work is cut into
units that look the same for a lone decode and for a prompt of thousands:

    a unit          8 query rows (tokens x the query heads that share a KV head) of one request and one KV head
    a key tile      128 keys of that request, at positions 128 j .. 128 j + 127, whichever blocks hold them
    one call        16 units against one key tile each: scores [16, 8, 128] = q [16, 8, D] @ k^T [16, D, 128]

A row takes its key tiles in the order of their positions, with an online softmax (Milakov and Gimelshein 2018): best
score, sum of weights and weighted values so far. A tile of which it sees nothing multiplies all three by 1 and adds 0,
which changes no bit; so units of unlike lengths share a call, and tiles that no unit of it sees are skipped. Empty
places repeat the last row, the last unit, the null block's keys: the shape stays. All in fp32, whatever the cache
holds: a bf16 number is an fp32 number, and the one rounding comes at the end.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from minivllm.attention import ForwardBatch, LayerKV
from minivllm.config import ModelConfig

Window = int | None
ROWS = 8  # of a unit: 4 waste less on decodes and cost prompts twice the calls
KEYS = 128  # of a tile
UNITS = 16  # of a call: its 16,384 scores stay below the 32,768 from which torch shares a pointwise step among threads
LOWEST = torch.finfo(torch.float32).min  # best score of nothing: finite, since inf - inf is NaN


@dataclass(frozen=True)
class _KeyTile:
    """128 keys of each of 16 units, at the same positions: rows of the cache as [num_slots * Hkv, D]."""

    rows: torch.Tensor  # [UNITS * KEYS]
    hidden: dict[Window, torch.Tensor | None]  # [UNITS, ROWS, KEYS]; None where every row sees all; absent where none


@dataclass(frozen=True)
class _Units:
    """All units of a step, sorted by their last position; U is a multiple of UNITS."""

    requests: torch.Tensor  # [U]
    kv_heads: torch.Tensor  # [U]
    positions: torch.Tensor  # [U, ROWS]
    q_rows: torch.Tensor  # [U, ROWS] into q as [T * H, D]


class InvariantAttention:
    """One step's attention; what all layers share (units, gathers, masks) is worked out once, when it is built."""

    def __init__(self, config: ModelConfig, batch: ForwardBatch, layers: list[LayerKV]) -> None:
        self.config = config
        self.batch = batch
        self.layers = layers
        self.scale = config.head_size**-0.5
        self.windows: set[Window] = set(config.windows) or {None}
        with batch.slots.device:
            units = _units_of(config, batch)
            self.q_rows = units.q_rows.flatten()  # [U * ROWS]
            self.result_rows = torch.empty(len(batch.slots) * config.num_heads, dtype=torch.int64)  # each row's end
            self.result_rows[self.q_rows] = torch.arange(len(self.q_rows))  # a repeated row has equal results
            self.calls = [self._key_tiles(units, first) for first in range(0, len(units.requests), UNITS)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store the new K and V, then attend over all that is stored; [T, H, D] in and out."""
        kv, window = self.layers[layer], self.config.window_of(layer)
        kv.k.flatten(0, 1).index_copy_(0, self.batch.slots, k)
        kv.v.flatten(0, 1).index_copy_(0, self.batch.slots, v)
        keys, values = kv.k.flatten(0, 2), kv.v.flatten(0, 2)  # [num_slots * Hkv, D]
        rows = (q.flatten(0, 1).float() * self.scale).index_select(0, self.q_rows)
        calls = zip(rows.view(-1, UNITS, ROWS, q.shape[2]), self.calls, strict=True)
        results = torch.cat([_attend_units(part, keys, values, tiles, window) for part, tiles in calls])
        return results.flatten(0, 1).index_select(0, self.result_rows).view_as(q).to(q.dtype)

    def _key_tiles(self, units: _Units, first: int) -> list[_KeyTile]:
        """The tiles that units first .. first + 15 attend over, in the order of their positions."""
        part = slice(first, first + UNITS)
        positions = units.positions[part, :, None]  # [UNITS, ROWS, 1]
        widest = None if None in self.windows else max(window for window in self.windows if window)
        start = 0 if widest is None else max(0, int(positions.min()) - widest + 1) // KEYS
        tiles = []
        for tile in range(start, int(positions.max()) // KEYS + 1):
            keys = torch.arange(tile * KEYS, (tile + 1) * KEYS)
            hidden: dict[Window, torch.Tensor | None] = {}
            for window in self.windows:
                is_hidden = (keys > positions) if window is None else (keys > positions) | (keys <= positions - window)
                if not is_hidden.all():
                    hidden[window] = is_hidden if is_hidden.any() else None
            tiles.append(_KeyTile(self._cache_rows(units.requests[part], units.kv_heads[part], keys), hidden))
        return tiles

    def _cache_rows(self, requests: torch.Tensor, kv_heads: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Where each unit's keys lie in the cache as [num_slots * Hkv, D]; keys not there yet: in the null block."""
        block_size, table = self.layers[0].k.shape[1], self.batch.block_table[requests]
        columns = (keys // block_size).clamp(max=table.shape[1] - 1)
        slots = table[:, columns] * block_size + keys % block_size  # [UNITS, KEYS]
        slots = slots.where(keys < self.batch.num_tokens[requests, None], 0)
        return (slots * self.config.num_kv_heads + kv_heads[:, None]).flatten()


def _units_of(config: ModelConfig, batch: ForwardBatch) -> _Units:
    """Cut a step into units: 5 new tokens of 9 query heads over 3 KV heads are 15 rows a KV head: 6 units."""
    group = config.num_heads // config.num_kv_heads
    requests, positions, q_rows = [], [], []
    starts, num_tokens = batch.query_starts.tolist(), batch.num_tokens.tolist()
    for request, (start, end) in enumerate(pairwise(starts)):
        num_rows = (end - start) * group
        rows = torch.arange(-(-num_rows // ROWS) * ROWS).clamp(max=num_rows - 1).view(-1, ROWS)
        requests.append(torch.full((len(rows),), request))
        positions.append(num_tokens[request] - (end - start) + rows // group)
        q_rows.append((start + rows // group) * config.num_heads + rows % group)
    heads = torch.arange(config.num_kv_heads)
    every_position = torch.cat(positions).repeat_interleave(len(heads), 0)
    order = every_position[:, -1].argsort(stable=True)  # units of like lengths share a call
    order = order[torch.arange(-(-len(order) // UNITS) * UNITS).clamp(max=len(order) - 1)]
    return _Units(
        requests=torch.cat(requests).repeat_interleave(len(heads))[order],
        kv_heads=heads.repeat(len(every_position) // len(heads))[order],
        positions=every_position[order],
        q_rows=(torch.cat(q_rows)[:, None] + heads[:, None] * group).flatten(0, 1)[order],
    )


def _attend_units(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tiles: list[_KeyTile], window: Window
) -> torch.Tensor:
    """Online softmax of 16 units over their key tiles, in order: [UNITS, ROWS, D] in and out."""
    shape = (UNITS, KEYS, q.shape[2])
    best, total, out = q.new_full((UNITS, ROWS, 1), LOWEST), q.new_zeros(UNITS, ROWS, 1), torch.zeros_like(q)
    for tile in tiles:
        if window not in tile.hidden:
            continue
        scores = torch.bmm(q, keys.index_select(0, tile.rows).view(shape).float().transpose(1, 2))
        if (hidden := tile.hidden[window]) is not None:
            scores.masked_fill_(hidden, float("-inf"))
        new_best = torch.maximum(best, scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(new_best).exp_()
        shrink = (best - new_best).exp_()
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        out = out * shrink + torch.bmm(weights, values.index_select(0, tile.rows).view(shape).float())
        best = new_best
    return out / total
