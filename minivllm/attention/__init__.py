"""Attention over a paged KV cache: the seam between a model and the backend that computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch

from minivllm.config import ModelConfig


@dataclass(frozen=True)
class ForwardBatch:
    """One step's requests, flattened: row r of `block_table` and queries starts[r] .. starts[r+1] belong together.

    Every request brings its new tokens as queries against all its tokens so far; prefill, chunk and decode differ
    only in how many queries that is. T new tokens, B requests, M blocks in the longest table.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] where each new token's K and V are stored
    block_table: torch.Tensor  # [B, M], padded with the null block
    query_starts: torch.Tensor  # [B + 1]
    num_tokens: torch.Tensor  # [B] keys each request sees, the new ones included
    logit_rows: torch.Tensor  # [R] the tokens whose logits are wanted


class LayerKV(Protocol):
    """K and V of one layer, each [num_blocks, block_size, num_kv_heads, head_size]."""

    @property
    def k(self) -> torch.Tensor: ...
    @property
    def v(self) -> torch.Tensor: ...


class Attention(Protocol):
    """What a model sees of one step: give a layer's q [T, H, D] and k, v [T, Hkv, D], get [T, H, D]."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


Backend = Callable[[ModelConfig, ForwardBatch, "list[LayerKV]"], Attention]


def choose_backend(device: str, config: ModelConfig) -> Backend:
    """Our Triton kernels on a GPU, for the head sizes they have; torch's own operators anywhere else."""
    if config.batch_invariant:
        from minivllm.attention.invariant_backend import InvariantAttention

        return InvariantAttention
    if device.startswith("cuda") and find_spec("triton"):
        from minivllm_kernels.checks import HEAD_SIZES  # lazily: a CPU needs no triton

        from minivllm.attention.triton_backend import TritonBackend

        if config.head_size in HEAD_SIZES:
            return TritonBackend(config, device)
    from minivllm.attention.torch_backend import TorchAttention

    return TorchAttention
