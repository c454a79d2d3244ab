"""Prompt lookup: what followed the last few tokens when they stood there before (Saxena 2023).

    ... the quick brown fox jumps ... the quick     ->     brown fox jumps

No weights and nearly no time; good where the answer copies: edits, summaries, code. The longest n-gram counts first, of
equal ones the latest.
"""

from collections.abc import Sequence

import numpy as np
import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.plan import Transfer
from minivllm.request import Request
from minivllm.speculative.proposer import Draft


class NgramProposer:
    needs_hidden = False

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        return [
            Draft(lookup(request.token_ids, self.longest, self.shortest, length))
            for request, length in zip(requests, lengths, strict=True)
        ]

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """Only tokens count here."""

    def move(self, transfers: list[Transfer]) -> None:
        """Nothing is stored."""

    def clear(self, block_ids: list[int]) -> None:
        """Nothing is stored."""


def lookup(token_ids: Sequence[int], longest: int, shortest: int, length: int) -> list[int]:
    """Up to `length` tokens that followed the latest earlier place of the last n tokens, n from longest to shortest.

    lookup([1, 2, 3, 1, 2], 3, 1, 4) == [3, 1, 2].
    """
    tokens = np.asarray(token_ids)
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])  # earlier places of the last token; fewer with each one before it
    start = len(tokens)
    for size in range(1, min(longest, len(tokens) - 1) + 1):
        if size > 1:
            ends = ends[ends >= size - 1]
            ends = ends[tokens[ends - (size - 1)] == tokens[-size]]
        if not len(ends):
            break
        if size >= shortest:
            start = int(ends[-1]) + 1
    return tokens[start : start + length].tolist()
