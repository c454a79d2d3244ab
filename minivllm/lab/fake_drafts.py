"""Drafts without a drafter: each is what comes next with a planted probability, and else another token.

A function of the prefix and the place, as all that the fake runner does: a run that is repeated has the same drafts.
"""

from collections.abc import Callable
from dataclasses import dataclass

RANGE = 1 << 20


@dataclass(frozen=True)
class FakeDrafts:
    """Who drafts in a FakeRunner; `methods` as in the engine's config, the first for who wishes for none."""

    methods: tuple[str, ...]
    alpha: float = 0.7  # how often a draft is what comes next, if the one before it was
    zeal: float = 0.8  # how often as many are proposed as were planned; else fewer, or none

    def method_of(self, wished: str | None) -> str:
        return wished if wished is not None and wished in self.methods else self.methods[0]

    def propose(self, digest: int, planned: int, truth: Callable[[int], int], vocab_size: int) -> list[int]:
        """At most `planned` drafts after a prefix of this digest; `truth(digest)` is what comes after one."""
        length, drafts = planned, list[int]()
        if _share(digest, planned, 1) >= self.zeal:
            length = hash((digest, planned, 2)) % planned
        for _ in range(length):
            token_id, is_right = truth(digest), _share(digest, planned, 3) < self.alpha
            if not is_right:
                token_id = (token_id + 1 + hash((digest, 4)) % (vocab_size - 1)) % vocab_size
            drafts.append(token_id)
            digest = hash((digest, token_id))
        return drafts


def _share(*key: int) -> float:
    """A number from [0, 1) for each key of integers, the same in every process."""
    return hash(key) % RANGE / RANGE
