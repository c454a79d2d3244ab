"""The kernels that fused steps call, in torch: an engine runs on them in seconds, under the interpreter in minutes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from minivllm_kernels.reference import (
    paged_attention_twin,
    rms_norm_twin,
    rope_twin,
    sample_twin,
    silu_and_mul_twin,
)


def use_twins(patch: pytest.MonkeyPatch) -> None:
    """Put the twins in the kernels' places, arguments and all."""
    fused = "minivllm.models.fused_llama."
    for kernel in (embed, rms_norm, add_rms_norm, silu_and_mul, qk_norm_rope_store):
        patch.setattr(fused + kernel.__name__, kernel)
    for row_kernel in (embed, row_product, row_gate, row_attention):
        patch.setattr("minivllm.models.one_row." + row_kernel.__name__, row_kernel)
    patch.setattr(fused + "fastest_decode", lambda *_: decode)
    patch.setattr(fused + "fastest_attention", lambda *_: attention)
    patch.setattr(fused + "shared_prefix_decode", shared_prefix_decode)
    patch.setattr("minivllm.runner.kernel_sampler.sample_rows", sample_rows)


def embed(token_ids: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    known = [token if token >= 0 else int(chosen[-1 - token]) for token in token_ids.tolist()]
    out.copy_(table[known])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float) -> None:
    out.copy_(rms_norm_twin(x, weight, eps))


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, eps: float
) -> None:
    residual += x
    rms_norm(residual, weight, out, eps=eps)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(silu_and_mul_twin(gate_up))


def row_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    *, plus: torch.Tensor | None = None, norm: torch.Tensor | None = None, eps: float = 0.0,
    add_to: torch.Tensor | None = None, early: bool = False,
) -> None:  # fmt: skip
    x = x if plus is None else x + plus
    x = x if norm is None else rms_norm_twin(x, norm, eps).to(x.dtype)
    product = torch.nn.functional.linear(x, weight, bias)
    out.copy_(product if add_to is None else product + add_to)


def row_gate(
    x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
    *, eps: float, early: bool = False,
) -> None:  # fmt: skip
    gate_up = torch.nn.functional.linear(rms_norm_twin(x, norm, eps).to(x.dtype), weight, bias)
    silu_and_mul(gate_up, out)


def row_attention(
    qkv: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, cos_sin: torch.Tensor,
    position: torch.Tensor, slot: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    block_table: torch.Tensor, num_tokens: torch.Tensor, out: torch.Tensor, workspace: object,
    *, eps: float, window: int | None = None, early: bool = False,
) -> None:  # fmt: skip
    q = torch.empty_like(out)
    qk_norm_rope_store(
        qkv, q_norm, k_norm, cos_sin, position, slot, q, k_cache, v_cache,
        num_heads=out.shape[1], num_kv_heads=k_cache.shape[2], eps=eps,
    )  # fmt: skip
    decode(q, k_cache, v_cache, block_table, num_tokens, out, workspace, window=window)


def qk_norm_rope_store(
    qkv: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, cos_sin: torch.Tensor,
    positions: torch.Tensor, slots: torch.Tensor, q_out: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    *, num_heads: int, num_kv_heads: int, eps: float,
) -> None:  # fmt: skip
    is_there, stored = positions >= 0, slots >= 0
    q, k, v = qkv.unflatten(1, (-1, q_out.shape[2])).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm_twin(q, q_weight, eps), rms_norm_twin(k, k_weight, eps)
    q, k = (rope_twin(x, cos_sin, positions.clamp(min=0)) for x in (q, k))
    q_out[is_there] = q.to(q_out.dtype)[is_there]
    for rows, cache in ((k, k_cache), (v, v_cache)):
        size = cache.shape[1]
        cache[slots[stored] // size, slots[stored] % size] = rows.to(cache.dtype)[stored]


def decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, num_tokens: torch.Tensor,
    out: torch.Tensor, workspace: object, *, window: int | None,
) -> None:  # fmt: skip
    starts = torch.arange(len(q) + 1)
    out.copy_(paged_attention_twin(q, k_cache, v_cache, block_table, num_tokens, starts, window=window))


def shared_prefix_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, num_tokens: torch.Tensor,
    prefix_tokens: torch.Tensor, group_starts: torch.Tensor, members: torch.Tensor, out: torch.Tensor,
    workspace: object, *, max_own_tokens: int,
) -> None:  # fmt: skip
    """The first blocks of a group are those of its first member, wrong or right."""
    table, alone = block_table.clone(), torch.ones(len(q), dtype=torch.bool)
    for first, end in pairwise(group_starts.tolist()):
        group = members[first:end].long()
        alone[group] = False
        if len(group):
            [num_shared] = set(prefix_tokens[group].tolist())
            num_blocks, rest = divmod(num_shared, k_cache.shape[1])
            assert rest == 0 and num_shared < int(num_tokens[group].min())
            table[group, :num_blocks] = table[group[0], :num_blocks]
    assert not prefix_tokens[alone].any() and int((num_tokens - prefix_tokens).max()) <= max_own_tokens
    decode(q, k_cache, v_cache, table, num_tokens, out, workspace, window=None)


def attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, num_tokens: torch.Tensor,
    query_starts: torch.Tensor, out: torch.Tensor, *, max_query_len: int, window: int | None,
) -> None:  # fmt: skip
    assert max_query_len >= int(query_starts.diff().max())
    out.copy_(paged_attention_twin(q, k_cache, v_cache, block_table, num_tokens, query_starts, window=window))


def sample_rows(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor,
    out: torch.Tensor, partial: torch.Tensor, arrivals: torch.Tensor, floors: torch.Tensor | None = None,
    **filters: Any,
) -> None:  # fmt: skip
    out.copy_(sample_twin(logits, temperatures, seeds, positions, **filters))
