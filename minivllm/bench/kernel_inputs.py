"""Random paged attention inputs of a shape, the bytes and FLOPs it cannot do without, and the error of an output."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from minivllm_kernels.reference import paged_attention_twin

CHECKED_QUERIES = 64  # of a request; float64 scores of a whole prompt would not fit


@dataclass(frozen=True)
class AttentionShape:
    """Requests as (new tokens, all tokens), and the model's heads."""

    requests: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_size: int = 128
    block_size: int = 64

    @property
    def num_bytes(self) -> int:
        """K and V once, q and out, the block table: ideal bytes of one layer in bf16."""
        keys = sum(total for _, total in self.requests)
        queries = sum(new for new, _ in self.requests)
        blocks = sum(-(-total // self.block_size) for _, total in self.requests)
        return 4 * self.head_size * (keys * self.kv_heads + queries * self.heads) + 4 * blocks

    @property
    def flops(self) -> int:
        """4 * D for each query head and key that it sees, nothing for the masked half."""
        seen = sum(new * (total - new) + new * (new + 1) // 2 for new, total in self.requests)
        return 4 * self.heads * self.head_size * seen


@dataclass(frozen=True)
class Attention:
    """One layer's inputs of a step, as the kernels take them; K and V head-major in memory."""

    shape: AttentionShape
    q: torch.Tensor  # [T, H, D]
    k_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [B, M] int32
    num_tokens: torch.Tensor  # [B] int32
    query_starts: torch.Tensor  # [B + 1] int32
    out: torch.Tensor

    @property
    def max_query_len(self) -> int:
        return max(new for new, _ in self.shape.requests)

    @property
    def max_tokens(self) -> int:
        return max(total for _, total in self.shape.requests)

    def error(self) -> float:
        """Of the last queries of the first, the longest and the last request, against the float64 twin."""
        totals = [total for _, total in self.shape.requests]
        rows = sorted({0, totals.index(max(totals)), len(totals) - 1})
        new = [min(self.shape.requests[row][0], CHECKED_QUERIES) for row in rows]
        ends = [int(self.query_starts[row + 1]) for row in rows]
        tokens = torch.cat([torch.arange(end - n, end, device=self.q.device) for end, n in zip(ends, new, strict=True)])
        starts = torch.tensor([0, *new]).cumsum(0).int().to(self.q.device)
        expected = paged_attention_twin(
            self.q[tokens], self.k_cache, self.v_cache, self.block_table[rows], self.num_tokens[rows], starts
        )
        return relative_error(self.out[tokens], expected)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def attention_inputs(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, seed: int, num_shared: int = 0
) -> Attention:
    """Normal random q, K and V; blocks permuted over a pool a quarter larger than used.

    All block tables begin with the blocks of the first `num_shared` tokens of request 0.
    """
    random = torch.Generator(device).manual_seed(seed)
    columns = [-(-total // shape.block_size) for _, total in shape.requests]
    pool = sum(columns) * 5 // 4 + 1
    size = (pool, shape.kv_heads, shape.block_size, shape.head_size)
    k_cache, v_cache = (torch.randn(size, dtype=dtype, device=device, generator=random).transpose(1, 2) for _ in "kv")
    order = torch.randperm(pool, generator=random, device=device).int()
    table = torch.zeros(len(columns), max(columns), dtype=torch.int32, device=device)
    for row, (first, count) in enumerate(zip(starts_of(columns), columns, strict=True)):
        table[row, :count] = order[first : first + count]
    table[:, : num_shared // shape.block_size] = table[0, : num_shared // shape.block_size]
    starts = torch.tensor([*starts_of([new for new, _ in shape.requests]), sum(new for new, _ in shape.requests)])
    q_size = (int(starts[-1]), shape.heads, shape.head_size)
    q = torch.randn(q_size, dtype=dtype, device=device, generator=random)
    totals = torch.tensor([total for _, total in shape.requests], dtype=torch.int32, device=device)
    out = torch.full_like(q, torch.nan)
    return Attention(shape, q, k_cache, v_cache, table, totals, starts.int().to(device), out)


def starts_of(counts: Sequence[int]) -> list[int]:
    """Where each run begins when they lie one behind the other: [3, 1, 2] -> [0, 3, 4]."""
    return [sum(counts[:position]) for position in range(len(counts))]
