"""A draft is one more row: which rows of a step's logits and tokens belong to which request.

    seat         0: A, drafts d e f    1: B, none    2: C, draft g
    rows         A9  d  e  f           B4            C7  g
    owners        0  0  0  0            1             2  2
    offsets       0  1  2  3            0             0  1

Each row is a query of its own, at its own position, with its own noise: what it chooses is the target's token if the
drafts in front of it stand. All rows of a request read the same blocks, and a layer stores the K and V of all rows
before any of them attends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from minivllm.request import Request
from minivllm.speculative.proposer import Draft


@dataclass(frozen=True)
class DraftRows:
    """The drafts of each seated request, and the rows that follow from them."""

    guesses: Sequence[Sequence[int]]  # by seat
    owners: np.ndarray  # [R] whose row it is
    offsets: np.ndarray  # [R] drafts in front of it
    firsts: list[int]  # by seat: the row of its last known token

    @classmethod
    @lru_cache(maxsize=1024)  # what every step without drafts asks for
    def without(cls, num_requests: int) -> "DraftRows":
        """One row each."""
        owners = np.arange(num_requests)
        return cls(((),) * num_requests, owners, np.zeros_like(owners), owners.tolist())

    @classmethod
    def of(cls, requests: Sequence[Request], drafts: Mapping[str, Draft]) -> "DraftRows":
        """Those of requests as they are seated."""
        if not drafts:
            return cls.without(len(requests))
        guesses = [drafts[request.id].token_ids if request.id in drafts else () for request in requests]
        counts = np.array([1 + len(guess) for guess in guesses])
        firsts = counts.cumsum() - counts
        owners = np.repeat(np.arange(len(counts)), counts)
        return cls(guesses, owners, np.arange(len(owners)) - firsts[owners], firsts.tolist())

    @property
    def count(self) -> int:
        return len(self.owners)

    @property
    def has_drafts(self) -> bool:
        return len(self.owners) > len(self.firsts)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """What each request has [seats or more], for each of its rows [R]."""
        return values[self.owners] if self.has_drafts else values[: len(self.owners)]

    def tokens(self, known: np.ndarray) -> np.ndarray:
        """The token of each row [R], of which the requests' own are `known` [seats]."""
        if not self.has_drafts:
            return known
        token_ids = self.spread(known)
        token_ids[self.offsets > 0] = [token for guess in self.guesses for token in guess]
        return token_ids


def shortened(drafts: Mapping[str, Draft], room: int) -> Mapping[str, Draft]:
    """The same drafts, the longest cut until there are no more than `room` in all."""
    lengths = [len(draft.token_ids) for draft in drafts.values()]
    longest = max(lengths, default=0)
    while sum(min(length, longest) for length in lengths) > room:
        longest -= 1
    cut = {id_: draft if len(draft.token_ids) <= longest else head(draft, longest) for id_, draft in drafts.items()}
    return {id_: draft for id_, draft in cut.items() if draft.token_ids}


def head(draft: Draft, length: int) -> Draft:
    """The first tokens of a draft."""
    probs = None if draft.probs is None else draft.probs[:length]
    return replace(draft, token_ids=draft.token_ids[:length], probs=probs)
