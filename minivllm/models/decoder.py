"""The skeleton every family shares: embedding, layers of attention and MLP round a residual stream, logits."""

import torch
from torch import nn

from minivllm.attention import Attention, LatentAttention
from minivllm.config import ModelConfig
from minivllm.models.layers import RMSNorm, RotaryEmbedding


class DecoderLayer(nn.Module):
    """One layer; `attention` takes (x, cos, sin, the step's attention), `mlp` takes x, both [T, hidden]."""

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention | LatentAttention
    ) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), cos, sin, attention)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token ids in, logits out; where K and V live is the attention's affair."""

    def __init__(self, config: ModelConfig, parts: list[tuple[nn.Module, nn.Module]]) -> None:
        """`parts`: attention and MLP of each layer."""
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rope = RotaryEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, attention, mlp) for attention, mlp in parts)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        attention: Attention | LatentAttention,
    ) -> torch.Tensor:
        """Logits [R, vocab] of the tokens that `logit_rows` names among the T new ones."""
        return self.logits(self.hidden(token_ids, positions, attention)[logit_rows])

    def hidden(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention | LatentAttention,
        num_layers: int | None = None,
    ) -> torch.Tensor:
        """The residual stream [T, hidden] behind the first `num_layers` layers; None: all."""
        x = self.embed(token_ids)
        cos, sin = self.rope.angles(positions, x.dtype)
        for layer in self.layers[:num_layers]:
            x = layer(x, cos, sin, attention)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] from the residual stream [R, hidden]."""
        return self.lm_head(self.norm(hidden))
