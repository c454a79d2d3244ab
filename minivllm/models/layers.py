"""The parts a decoder is made of: rotary embedding and gated MLP; norms and linears are torch's own."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_size: int) -> torch.Tensor:
    """Rotation per position of each pair of dimensions, [head_size / 2], fp32.

    llama3 (Llama 3.1) slows the low frequencies by `factor`, keeps the high ones, and blends those between.
    """
    pairs = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu")  # real numbers, in a model built on meta too
    freq = rope.theta ** -(pairs.float() / head_size)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position * freq / (2 * math.pi)  # full turns within the original context
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return torch.lerp(freq / rope.factor, freq, smooth.clamp(0, 1))
    return freq


class RotaryEmbedding(nn.Module):
    """Turns each head's pairs (i, i + D/2) by an angle that grows with the position (RoPE, Su et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(config.rope, config.head_size)

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin for every token, shared by all layers of a step: [T, 1, D] each."""
        turned = positions[:, None].float() * self.inv_freq.to(positions.device)
        cos, sin = turned.cos(), turned.sin()
        return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Turn x [T, heads, D]: (a, b) -> (a cos - b sin, b cos + a sin) for its halves a and b."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
