"""Latent attention with our Triton kernel for requests with one query; prompts and chunks go through torch.

The kernel takes absorbed queries and reads each cache row once for all heads, as key and as value.
"""

import torch
from minivllm_kernels.checks import BLOCK_SIZES
from minivllm_kernels.fastest import fastest_mla
from minivllm_kernels.workspace import SplitWorkspace

from minivllm.attention import ForwardBatch, LayerKV
from minivllm.attention.latent_torch import TorchLatentAttention
from minivllm.config import ModelConfig

SMALLEST = 16  # columns of a tensor core's operand
HEADS_AT_ONCE = 16  # query heads of one of the kernel's programs, for whose parts there must be room


def fits_kernel(config: ModelConfig) -> bool:
    """Whether the kernel has tiles of this model's latent and rope key."""
    mla = config.mla
    return mla is not None and all(
        size >= SMALLEST and size & (size - 1) == 0 for size in (mla.kv_lora_rank, mla.rope_head_size)
    )


class TritonLatentBackend:
    """Makes each step's attention; owns the workspace that all layers and steps share."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        assert config.mla is not None
        self.workspace = SplitWorkspace.allocate(torch.device(device), 0, HEADS_AT_ONCE, config.mla.kv_lora_rank)

    def __call__(self, config: ModelConfig, batch: ForwardBatch, layers: list[LayerKV]) -> TorchLatentAttention:
        if layers[0].k.shape[1] not in BLOCK_SIZES:
            return TorchLatentAttention(config, batch, layers)
        return TorchLatentAttention(config, batch, layers, TritonLatentDecode(config, batch, self.workspace))


class TritonLatentDecode:
    """A step's single queries through mla_decode, which reads 32-bit integers."""

    def __init__(self, config: ModelConfig, batch: ForwardBatch, workspace: SplitWorkspace) -> None:
        assert config.mla is not None
        self.rank, self.scale, self.workspace = config.mla.kv_lora_rank, config.softmax_scale, workspace
        is_single = batch.query_starts.diff() == 1
        self.block_table = batch.block_table[is_single].int()
        self.num_tokens = batch.num_tokens[is_single].int()

    def __call__(self, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """Absorbed queries [b, H, r + dr] of all singles; gives [b, H, r]."""
        q_latent, q_rope = q[..., : self.rank], q[..., self.rank :]
        rows = cache[:, :, 0]  # [num_blocks, block_size, r + dr]
        out = q.new_empty(*q_latent.shape)
        kernel = fastest_mla(q_latent, q_rope, rows)
        kernel(q_latent, q_rope, rows, self.block_table, self.num_tokens, out, self.workspace, scale=self.scale)
        return out
