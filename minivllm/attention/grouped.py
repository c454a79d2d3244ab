"""Attention of layers in groups: each group's layers store and read through a block table of their own."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from minivllm.attention import Attention, LatentAttention
from minivllm.config import ModelConfig
from minivllm.layer_groups import LayerGroups


class GroupedAttention:
    """One step's attention, for each layer that of its group."""

    def __init__(self, attentions: Sequence[Attention | LatentAttention], groups: LayerGroups) -> None:
        self.attentions = [attentions[group] for group, _ in groups.places]  # by layer

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attentions[layer].attend(layer, q, k, v)  # type: ignore[union-attr]  # latents have no windows


def group_configs(config: ModelConfig, groups: LayerGroups) -> list[ModelConfig]:
    """The model as each group's attention sees it: the windows of its own layers, and no others to prepare for."""
    if len(groups.windows) == 1:
        return [config]
    windows = [
        tuple(config.windows[layer] if place[0] == group else window for layer, place in enumerate(groups.places))
        for group, window in enumerate(groups.windows)
    ]
    return [replace(config, windows=each) for each in windows]
