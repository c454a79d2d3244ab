"""DeepSeek-V2 and V3: latent attention (MLA), and experts in the layers after the first few.

    x --kv_a_proj--> [latent r | rope key dr]    the latent normalised, the key turned: these r + dr numbers are cached
    x --(q_a, q_b)--> per head [q_nope dn | q_rope dr]

Head h would use key [W_UK_h latent | rope key] and value W_UV_h latent. Whether these are ever built ("expanded") or
W_UK and W_UV go to the query's and the output's side ("absorbed") is decided where attention is computed.
"""

import torch
from torch import nn

from minivllm.attention import LatentAttention
from minivllm.config import MlaConfig, ModelConfig
from minivllm.models.decoder import Decoder
from minivllm.models.layers import GatedMLP, RMSNorm, pairs_to_halves, rotate
from minivllm.models.moe import MixtureOfExperts

LATENT_EPS = 1e-6  # of the two norms on latents, whatever the config says for the others


class LatentSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, mla: MlaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.mla, self.num_heads = layer, mla, config.num_heads
        q_size, rank = config.num_heads * mla.qk_head_size, mla.q_lora_rank
        if rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, rank, bias=config.qkv_bias)
            self.q_a_norm = RMSNorm(rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(rank, q_size, bias=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, mla.row_size, bias=config.qkv_bias)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = LatentExpansion(config.num_heads, mla)
        self.o_proj = nn.Linear(config.num_heads * mla.v_head_size, config.hidden_size, bias=config.output_bias)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: LatentAttention
    ) -> torch.Tensor:
        mla = self.mla
        q = self.q_proj(x) if mla.q_lora_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(1, (self.num_heads, -1)).split((mla.nope_head_size, mla.rope_head_size), dim=-1)
        latent, k_rope = self.kv_a_proj(x).split((mla.kv_lora_rank, mla.rope_head_size), dim=-1)
        turned = torch.cat((q_rope, k_rope[:, None]), dim=1)  # [T, H + 1, dr]: every head's query, and the one key
        turned = rotate(pairs_to_halves(turned) if mla.interleaved_rope else turned, cos, sin)
        rows = torch.cat((self.kv_a_norm(latent), turned[:, -1]), dim=-1)  # [T, r + dr]
        w_uk, w_uv = self.kv_b_proj.matrices()
        out = attention.attend_latent(self.layer, q_nope, turned[:, :-1], rows, w_uk, w_uv)  # [T, H, dv]
        return self.o_proj(out.flatten(1))


class LatentExpansion(nn.Module):
    """W_UK and W_UV, from the latent to every head's key and value; no nn.Linear: each half is used by itself."""

    def __init__(self, num_heads: int, mla: MlaConfig) -> None:
        super().__init__()
        self.sizes = (mla.nope_head_size, mla.v_head_size)
        self.num_heads = num_heads
        self.weight = nn.Parameter(torch.empty(num_heads * sum(self.sizes), mla.kv_lora_rank))

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views w_uk [H, dn, r] and w_uv [H, dv, r]."""
        w_uk, w_uv = self.weight.unflatten(0, (self.num_heads, -1)).split(self.sizes, dim=1)
        return w_uk, w_uv


def deepseek(config: ModelConfig) -> Decoder:
    """Build the decoder, its weights not set."""
    assert config.mla is not None
    return Decoder(
        config,
        [(LatentSelfAttention(config, config.mla, layer), _mlp(config, layer)) for layer in range(config.num_layers)],
    )


def _mlp(config: ModelConfig, layer: int) -> nn.Module:
    if config.moe and config.moe.has_experts(layer):
        return MixtureOfExperts(config.moe, config.hidden_size, shared_bias=config.mlp_bias)
    return GatedMLP(config.hidden_size, config.intermediate_size, has_bias=config.mlp_bias)
