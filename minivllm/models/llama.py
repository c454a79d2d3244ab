"""One dense decoder for Llama 2/3, Mistral, Qwen2/2.5 and Qwen3: they differ in three switches of the config.

Qwen2 has a bias on q, k, v; Qwen3 normalises each head of q and k; Mistral lets a query see a window of keys.
"""

import torch
from torch import nn

from minivllm.attention import Attention
from minivllm.config import ModelConfig
from minivllm.models.decoder import Decoder
from minivllm.models.layers import GatedMLP, RMSNorm, rotate


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        qkv_size = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        self.qkv_proj = nn.Linear(config.hidden_size, qkv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_size, config.hidden_size, bias=config.output_bias)
        self.has_qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_size)  # [T, H + 2 Hkv, D]
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.has_qk_norm:
            qk = torch.cat((self.q_norm(qk[:, : self.num_heads]), self.k_norm(qk[:, self.num_heads :])), dim=1)
        q, k = rotate(qk, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
        return self.o_proj(attention.attend(self.layer, q, k, v).flatten(1))


def llama(config: ModelConfig) -> Decoder:
    """Build the decoder, its weights not set."""
    return Decoder(
        config,
        [
            (
                SelfAttention(config, layer),
                GatedMLP(config.hidden_size, config.intermediate_size, has_bias=config.mlp_bias),
            )
            for layer in range(config.num_layers)
        ],
    )
