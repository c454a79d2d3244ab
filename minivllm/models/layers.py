"""The parts a decoder is made of: rotary embedding, norm and gated MLP; linears are torch's own."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_size: int) -> torch.Tensor:
    """Rotation per position of each pair of dimensions, [head_size / 2], fp32.

    llama3 (Llama 3.1) and yarn (Peng et al. 2023, section 3.2) slow the low frequencies by `factor`, keep the high
    ones, and blend those between: llama3 by frequency, yarn by the number of the pair.
    """
    pairs = torch.arange(0, head_size, 2, dtype=torch.int64, device="cpu")  # real numbers, in a model built on meta too
    freq = rope.theta ** -(pairs.float() / head_size)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position * freq / (2 * math.pi)  # full turns within the original context
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return torch.lerp(freq / rope.factor, freq, smooth.clamp(0, 1))
    if rope.kind == "yarn":
        first, last = _yarn_borders(rope, head_size)
        ramp = (torch.arange(len(freq), dtype=torch.float32, device="cpu") - first) / (last - first)
        return torch.lerp(freq, freq / rope.factor, ramp.clamp(0, 1))
    return freq


def _yarn_borders(rope: RopeConfig, head_size: int) -> tuple[float, float]:
    """Pairs between which yarn blends: (10, 23) of DeepSeek-V2's 32, which turn 32 times and once in 4096 tokens."""

    def pair_that_turns(times: float) -> float:
        return head_size * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    return first, last + 0.001 if first == last else last


class RotaryEmbedding(nn.Module):
    """Turns each head's pairs (i, i + D/2) by an angle that grows with the position (RoPE, Su et al. 2021)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inv_freq = inverse_frequencies(config.rope, config.rotary_size)
        self.magnitude = config.rope.magnitude

    def angles(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin for every token, shared by all layers of a step: [T, 1, D] each."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)  # once: a CUDA graph can hold no copy from the host
        turned = positions[:, None].float() * self.inv_freq
        cos, sin = turned.cos() * self.magnitude, turned.sin() * self.magnitude
        return torch.cat((cos, cos), dim=-1)[:, None].to(dtype), torch.cat((-sin, sin), dim=-1)[:, None].to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Turn x [T, heads, D]: (a, b) -> (a cos - b sin, b cos + a sin) for its halves a and b."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def pairs_to_halves(x: torch.Tensor) -> torch.Tensor:
    """Reorder dimensions (0, 1), (2, 3) ... as DeepSeek pairs them: [0, 1, 2, 3] -> [0, 2, 1, 3], fit for rotate."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with gate and up in one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, has_bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=has_bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=has_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
