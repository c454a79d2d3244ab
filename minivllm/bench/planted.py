"""A proposer that knows what comes, and is wrong as often as one likes: acceptance without a drafter's cost.

    continuation     a  b  c  d  e  f  ...       known from a run without speculation
    coins            1  1  0  1  1  1  ...       right with probability alpha, one coin for each place
    drafts           a  b  X  d                  X: another token; d is not looked at, for X fell

A place's coin is looked at once: where a draft falls, the target says the token, and the next drafts begin behind it.
So drafts are accepted independently with probability alpha, as the closed forms suppose.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.plan import Transfer
from minivllm.request import Request
from minivllm.speculative.proposer import Draft

Key = tuple[tuple[int, ...], int | None]  # a prompt, and the seed that was asked for


class PlantedProposer:
    """Drafts from `continuations`: the output of each prompt and seed; silent for others."""

    needs_hidden = False

    def __init__(
        self, continuations: Mapping[Key, Sequence[int]], alpha: float, vocab_size: int, seed: int = 0
    ) -> None:
        generator = np.random.default_rng(seed)
        self._drafts: dict[Key, list[int]] = {}
        for key, tokens in continuations.items():
            others = (np.array(tokens) + generator.integers(1, vocab_size, len(tokens))) % vocab_size
            is_right = generator.random(len(tokens)) < alpha
            self._drafts[key] = np.where(is_right, tokens, others).tolist()
        self._keys: dict[str, Key] = {}

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        drafts = []
        for request, length in zip(requests, lengths, strict=True):
            if request.id not in self._keys:
                self._keys[request.id] = (tuple(request.token_ids[: request.num_prompt]), request.params.seed)
            planted = self._drafts.get(self._keys[request.id], [])
            drafts.append(Draft(planted[request.num_output : request.num_output + length]))
        return drafts

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """It knows already."""

    def move(self, transfers: list[Transfer]) -> None:
        """Nothing is stored."""

    def clear(self, block_ids: list[int]) -> None:
        """Nothing is stored."""


def expected_tokens(alpha: float, length: int) -> float:
    """Of a step with `length` drafts, the one that is always gained included (Leviathan et al. 2023, equation 1)."""
    return length + 1.0 if alpha == 1 else (1 - alpha ** (length + 1)) / (1 - alpha)
