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
    """K and V of one layer, each [num_blocks, block_size, heads, size].

    Of a model with latent attention: k has one row of r + dr numbers for each token, v is a view of its first r.
    """

    @property
    def k(self) -> torch.Tensor: ...
    @property
    def v(self) -> torch.Tensor: ...


class Attention(Protocol):
    """What a model sees of one step: give a layer's q [T, H, D] and k, v [T, Hkv, D], get [T, H, D]."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


class LatentAttention(Protocol):
    """The same for latent attention (DeepSeek): queries of H heads in two parts, and new rows [T, r + dr] to store.

    w_uk [H, dn, r] and w_uv [H, dv, r] make head h's key and value of a latent: [w_uk latent | rope key], w_uv latent.
    Gives [T, H, dv]. Whether keys are built or w_uk goes to the query's side is the backend's choice, per request.
    """

    def attend_latent(
        self,
        layer: int,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        rows: torch.Tensor,
        w_uk: torch.Tensor,
        w_uv: torch.Tensor,
    ) -> torch.Tensor: ...


Backend = Callable[[ModelConfig, ForwardBatch, "list[LayerKV]"], Attention | LatentAttention]


def choose_backend(device: str, config: ModelConfig) -> Backend:
    """Our Triton kernels on a GPU, for the head sizes they have; torch's own operators anywhere else."""
    if config.mla:
        return _choose_latent_backend(device, config)
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


def _choose_latent_backend(device: str, config: ModelConfig) -> Backend:
    """The same choice for latent attention; the kernel's tiles are whole: it takes sizes that are powers of two."""
    if device.startswith("cuda") and find_spec("triton"):
        from minivllm.attention.latent_triton import TritonLatentBackend, fits_kernel

        if fits_kernel(config):
            return TritonLatentBackend(config, device)
    from minivllm.attention.latent_torch import TorchLatentAttention

    return TorchLatentAttention
