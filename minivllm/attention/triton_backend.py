"""Paged attention with our own Triton kernels: one launch a layer to store, one to attend.

Requests with one query each go through a decode kernel, anything else through a ragged one.
"""

import torch
from minivllm_kernels.fastest import fastest_attention, fastest_decode
from minivllm_kernels.store_kv import store_kv
from minivllm_kernels.workspace import SplitWorkspace

from minivllm.attention import ForwardBatch, LayerKV
from minivllm.config import ModelConfig


class TritonBackend:
    """Makes each step's attention; owns the workspace that all layers and steps share."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        group = config.num_heads // config.num_kv_heads
        self.workspace = SplitWorkspace.allocate(torch.device(device), 0, group, config.head_size)

    def __call__(self, config: ModelConfig, batch: ForwardBatch, layers: list[LayerKV]) -> "TritonAttention":
        return TritonAttention(config, batch, layers, self.workspace)


class TritonAttention:
    """One step's attention; the kernels read 32-bit integers."""

    def __init__(
        self, config: ModelConfig, batch: ForwardBatch, layers: list[LayerKV], workspace: SplitWorkspace
    ) -> None:
        self.config = config
        self.layers = layers
        self.workspace = workspace
        self.slots = batch.slots.int()
        self.block_table = batch.block_table.int()
        self.num_tokens = batch.num_tokens.int()
        self.query_starts = batch.query_starts.int()
        is_single = len(batch.token_ids) == len(batch.num_tokens)  # then nobody waits for the device
        self.max_query_len = 1 if is_single else int(batch.query_starts.diff().max())

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store the new K and V, then attend over all that is stored; [T, H, D] in and out."""
        kv, window = self.layers[layer], self.config.window_of(layer)
        store_kv(k, v, kv.k, kv.v, self.slots)
        out = torch.empty_like(q)
        inputs = (q, kv.k, kv.v, self.block_table, self.num_tokens)
        if self.max_query_len == 1:
            fastest_decode(q, kv.k, kv.v)(*inputs, out, self.workspace, window=window)
        else:
            kernel = fastest_attention(q, kv.k, kv.v, len(self.num_tokens), self.max_query_len)
            kernel(*inputs, self.query_starts, out, max_query_len=self.max_query_len, window=window)
        return out
