"""A mixture of experts, plainly: choose a few experts for each token, run each chosen expert once on its tokens.

    scores   = softmax(x W)  (V2)  or  sigmoid(x W)  (V3)          [T, experts], fp32
    output_t = sum over t's experts e of  weight[t, e] * expert_e(x_t)  +  shared(x_t)

Experts that no token chose cost nothing; a token's experts are summed in the order of their ids, whatever the batch.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.config import MoeConfig
from minivllm.models.layers import GatedMLP


class Router(nn.Module):
    """Which experts a token visits, and how much each counts."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        if config.routing == "noaux_tc":  # balances the load without a loss term (DeepSeek-V3, section 2.1.2)
            self.e_score_correction_bias = nn.Parameter(torch.empty(config.num_experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and ids of each token's experts, [T, experts_per_token] both."""
        config = self.config
        logits = F.linear(x.float(), self.weight.float())  # [T, experts]; near ties must not hang on bf16
        if config.routing == "noaux_tc":
            scores = logits.sigmoid()
            merits = scores + self.e_score_correction_bias  # decide who is chosen; the weights come from scores alone
            merits = self._in_best_groups(merits, num_best=2, elsewhere=float("-inf"))
        else:
            scores = merits = logits.softmax(dim=-1)
            if config.has_groups:
                merits = self._in_best_groups(merits, num_best=1, elsewhere=0.0)
        expert_ids = merits.topk(config.experts_per_token, dim=-1).indices
        weights = scores.gather(1, expert_ids)
        if config.normalize_weights:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * config.scaling_factor, expert_ids

    def _in_best_groups(self, merits: torch.Tensor, *, num_best: int, elsewhere: float) -> torch.Tensor:
        """Merits of the groups whose `num_best` experts sum highest, `elsewhere` in the other groups."""
        grouped = merits.unflatten(1, (self.config.num_groups, -1))  # [T, groups, experts of a group]
        standing = grouped.topk(num_best, dim=-1).values.sum(dim=-1)
        chosen = standing.topk(self.config.groups_per_token, dim=-1).indices
        is_chosen = torch.zeros_like(standing, dtype=torch.bool).scatter_(1, chosen, True)
        return grouped.masked_fill(~is_chosen[:, :, None], elsewhere).flatten(1)


class MixtureOfExperts(nn.Module):
    """The chosen experts of each token, weighted, and the shared ones that every token visits."""

    def __init__(self, config: MoeConfig, hidden_size: int, *, shared_bias: bool) -> None:
        super().__init__()
        self.gate = Router(config, hidden_size)
        self.experts = nn.ModuleList(
            GatedMLP(hidden_size, config.intermediate_size, has_bias=False) for _ in range(config.num_experts)
        )
        self.has_shared = config.num_shared_experts > 0
        if self.has_shared:
            size = config.num_shared_experts * config.intermediate_size
            self.shared_experts = GatedMLP(hidden_size, size, has_bias=shared_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, expert_ids = self.gate(x)
        out = torch.zeros_like(x)  # [T, hidden]
        for expert_id in expert_ids.unique().tolist():  # in order
            tokens, places = (expert_ids == expert_id).nonzero(as_tuple=True)
            part = self.experts[expert_id](x[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, part.to(x.dtype))
        return out + self.shared_experts(x) if self.has_shared else out
