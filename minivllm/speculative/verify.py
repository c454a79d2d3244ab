"""What stands of a draft, and the token that comes after: the target's distribution, exactly.

    certain draft (q = 1 for it)     draw the target's own token, as without drafts; the draft stands if it is the same
    drawn draft (q known)            the draft d stands with probability min(1, p(d) / q(d)); where it falls, draw from
                                     the residual, max(p - q, 0) over its sum
    after the last one that stands   one more token from p: every step gains at least one

(Leviathan, Kalman, Matias 2023, algorithm 1; Chen et al. 2023.) The first line is the second with a q that is certain:
a draw from p equals d with probability p(d) = min(1, p(d) / 1), and otherwise is a draw from p without d, which is the
residual. It gives more than the distribution: with the same seed, the very tokens that come without speculation.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from minivllm.runner.sampler import noise, pick
from minivllm.speculative.proposer import Draft

ACCEPT, DRAFT = 1, 2  # streams of random numbers beside the target's own


class Target(Protocol):
    """What the target says of one request, drafts before it accepted: index 0 is the first draft's place."""

    @property
    def seed(self) -> int: ...
    @property
    def num_tokens(self) -> int:
        """Known before the drafts."""
        ...

    def choose(self, accepted: Sequence[int]) -> int:
        """The token that comes after the accepted ones, as it is drawn without speculation."""
        ...

    def probs(self, accepted: Sequence[int]) -> torch.Tensor:
        """The distribution [vocab] it is drawn from, float64."""
        ...


def verify(draft: Draft, target: Target) -> list[int]:
    """The accepted head of the draft and one token more."""
    tokens: list[int] = []
    for index, drafted in enumerate(draft.token_ids):
        if draft.probs is None:
            token = target.choose(tokens)
        else:
            position = target.num_tokens + index
            p = target.probs(tokens)
            token = accept_or_resample(p, draft.probs[index].to(p.device), drafted, target.seed, position)
        tokens.append(token)
        if token != drafted:
            return tokens
    return [*tokens, target.choose(tokens)]


def accept_or_resample(p: torch.Tensor, q: torch.Tensor, drafted: int, seed: int, position: int) -> int:
    """The draft, drawn from `q` [vocab], or a token of the residual; either way a draw from `p` [vocab]."""
    if uniform(seed, position) * q[drafted] < p[drafted]:
        return drafted
    residual = (p - q).clamp(min=0)
    return pick(residual / residual.sum(), noise(seed, position, len(p)))


def uniform(seed: int, position: int) -> float:
    """A number from [0, 1) of its own for each seed and position; independent of `noise` there."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed % 2**64, position, ACCEPT]))).random()


def draft_noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """Exponential noise [vocab] for whoever draws a draft; independent of the target's."""
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed % 2**64, position, DRAFT])))
    return torch.from_numpy(np.maximum(generator.standard_exponential(vocab_size), 1e-300))
