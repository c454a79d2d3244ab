"""The seam of speculation: who proposes drafts. Verification (verify.py) knows nothing of how they came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.plan import Transfer
from minivllm.request import Request


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, and what each was drawn from."""

    token_ids: list[int]
    probs: torch.Tensor | None = None  # [len, vocab] float64; None: certain, q is 1 for each of them


class Proposer(Protocol):
    """Has no memory of its own from step to step but what lies in blocks: so nothing of it can be stale."""

    needs_hidden: bool  # whether `follow` looks at anything; if not, a GPU is spared the way there

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """At most so many drafts for each request, all of whose tokens but the last are computed.

        K and V of the last token and of the drafts may be stored: the block tables have room for them.
        """
        ...

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        """See what the target computed in this step: its tokens, drafts too, and its last layer's output [T, hidden].

        Told after every step, whoever proposed, before anything is accepted.
        """
        ...

    def move(self, transfers: list[Transfer]) -> None:
        """Move contents of blocks as the target's storage does."""
        ...

    def clear(self, block_ids: list[int]) -> None:
        """Zero fresh blocks."""
        ...
