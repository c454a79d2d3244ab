"""Linears, norms and MLPs whose rows keep their bits in every batch: each call sees one fixed shape of 16 rows.

A library picks its kernel by shape: MKL sums 3 rows in another order than 16, oneDNN a lone row in another than two.
So a token's numbers depend on how many others ran beside it. Here rows go through in tiles of TILE_ROWS, the last one
filled up with zeros: the shape never changes, and then only a row's place in its tile could matter, and it does not
(tests/test_batch_invariant.py). 16 rows hold a decode batch, and 16 rows of any even width end on a cache line, so
every tile is aligned like the first; 8 rows cost twice the time on prompts, 32 on small batches.

Of the pointwise steps, those of IEEE (add, multiply, round) need no care. exp, sin and cos do: their vector code and
the scalar code that finishes a vector's tail may differ in the last bit, and threads move the tails about.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.models.layers import GatedMLP, RMSNorm, RotaryEmbedding
from minivllm.transforms.prepack import PackedLinear

TILE_ROWS = 16
SILU_COLUMNS = 1024  # 16 x 1024 numbers stay below the 32,768 from which torch shares a pointwise step among threads


class RowTiles(nn.Module):
    """Runs a part on 16 rows at a time, always 16: x [T, ...] -> [T, ...]."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [self.part(tile) for tile in row_tiles(x)]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[: len(x)]


class TiledMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) of one tile; silu is computed in pieces that no threads share."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        self.gate_up_proj = mlp.gate_up_proj
        self.down_proj = mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        pieces = [F.silu(piece) for piece in gate.split(SILU_COLUMNS, dim=-1)]
        return self.down_proj(torch.cat(pieces, dim=-1) * up)


class TiledRotaryEmbedding(nn.Module):
    """The angles of 16 positions at a time."""

    def __init__(self, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.rope = rope

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin for every token: [T, 1, D] each."""
        tiles = [self.rope.angles(tile, dtype) for tile in row_tiles(positions)]
        cos, sin = (torch.cat(parts)[: len(positions)] for parts in zip(*tiles, strict=True))
        return cos, sin


def row_tiles(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [T, ...] cut into contiguous tiles of 16 rows, the last one filled up with zeros."""
    num_missing = -len(x) % TILE_ROWS
    whole = F.pad(x, (0, 0) * (x.dim() - 1) + (0, num_missing)) if num_missing else x.contiguous()
    return whole.split(TILE_ROWS)


def make_batch_invariant(model: nn.Module) -> None:
    """Swap, in place, all of a built model whose bits could depend on the batch; after prepack_linears, if at all."""
    for name, child in list(model.named_children()):
        if isinstance(child, GatedMLP):
            setattr(model, name, RowTiles(TiledMLP(child)))
        elif isinstance(child, nn.Linear | PackedLinear | RMSNorm):
            setattr(model, name, RowTiles(child))
        elif isinstance(child, RotaryEmbedding):
            setattr(model, name, TiledRotaryEmbedding(child))
        else:
            make_batch_invariant(child)
