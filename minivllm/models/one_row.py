"""One request's decode step in five launches a layer: what FusedLlama.body and head do when there is a single row.

    residual --norm, qkv--> norm, RoPE, K and V stored, attention --o--> added to residual
             --norm, gate and up, silu * up--> --down--> added to residual

Each product reads its matrix once, and at a row that is all the time there is: so kernels are few, and each begins
while the one in front still runs (minivllm_kernels/early_launch.py). The first is launched in the plain way: it waits
for all that was computed before, and what it waited for the others may read early.
"""

from typing import TYPE_CHECKING

import torch
from minivllm_kernels.embedding import embed
from minivllm_kernels.row_attention import row_attention
from minivllm_kernels.row_gate import row_gate
from minivllm_kernels.row_product import row_product

from minivllm.attention.kernel_batch import KernelBatch

if TYPE_CHECKING:
    from minivllm.models.fused_llama import FusedLlama


def one_row_body(model: "FusedLlama", batch: KernelBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """All layers for a token: what the last one adds and the residual it is added to, both [1, hidden]."""
    config, eps = model.config, model.config.rms_norm_eps
    residual = model.embeddings.new_empty(1, model.embeddings.shape[1])
    embed(batch.token_ids, batch.chosen, model.embeddings, residual)
    x = torch.empty_like(residual)
    attended = x.new_empty(1, config.num_heads, config.head_size)
    gated = x.new_empty(1, config.intermediate_size)
    for number, (weights, kv) in enumerate(zip(model.weights, model.layers, strict=True)):
        is_first, is_last = number == 0, number == len(model.weights) - 1
        qkv = x.new_empty(1, len(weights.qkv[0]))
        row_product(residual, *weights.qkv, qkv, norm=weights.input_norm, eps=eps, early=not is_first)
        row_attention(
            qkv, weights.q_norm, weights.k_norm, model.cos_sin, batch.positions, batch.slots, kv.k, kv.v,
            batch.singles.block_table, batch.singles.num_tokens, attended, model.workspace,
            eps=eps, window=config.window_of(number), early=True,
        )  # fmt: skip
        row_product(attended.flatten(1), *weights.o, residual, add_to=residual, early=True)
        row_gate(residual, weights.mlp_norm, *weights.gate_up, gated, eps=eps, early=True)
        if is_last:
            row_product(gated, *weights.down, x, early=True)
        else:
            row_product(gated, *weights.down, residual, add_to=residual, early=True)
    return x, residual


def one_row_head(model: "FusedLlama", x: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
    """Logits [1, vocab] into `out`, from a row of what a body gave."""
    eps = model.config.rms_norm_eps
    row_product(x, model.lm_head, None, out, plus=residual, norm=model.norm, eps=eps, early=True)
