"""The tree of cached blocks at one moment, as pictures need it; prefix_tree_fold.py makes it from events."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NodeState:
    """One cached block of the first group of layers."""

    id: int  # counts cached blocks from 1
    block_id: int
    index: int  # how many blocks stand before it
    writer: str  # the request that computed it
    parent: int | None
    is_cut: bool  # its parent was evicted: nothing finds it any more
    is_parent_known: bool
    num_owners: int
    num_hits: int
    last_use: int  # tick of the LRU clock
    is_new: bool  # cached in this step
    is_hit: bool  # found in this step
    is_evicted: bool  # forgotten in this step

    @property
    def kind(self) -> str:
        """What happened to it in this step, or else whether anybody uses it."""
        if self.is_evicted:
            return "evicted"
        if self.is_hit:
            return "hit"
        if self.is_new:
            return "new"
        return "used" if self.num_owners else "idle"


@dataclass(frozen=True, slots=True)
class TreeState:
    """All cached blocks, and those that this step evicted."""

    step: int
    block_size: int
    clock: int
    nodes: tuple[NodeState, ...]
    ghosts: tuple[NodeState, ...]
    num_beside: int  # cached blocks of other groups of layers, found through these
    next_victim: int | None  # a node, where the policy is LRU
    num_hit_tokens: int
    num_prompt_tokens: int
    tables: Mapping[str, tuple[int, ...]]  # of requests that are here
    decisions: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that were found, of all prompt tokens so far."""
        return self.num_hit_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0
