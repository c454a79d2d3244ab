"""Where blocks lie before and after they were moved about, and what that did to a step: data of the shuffle view."""

from dataclasses import dataclass
from random import Random

Tables = tuple[tuple[int, ...], ...]  # by request


@dataclass(frozen=True)
class Shuffled:
    """One decode step, computed where the blocks lie and again after moving them."""

    before: Tables
    after: Tables  # as the kernel was handed them
    order: tuple[int, ...]  # the block of the pool that each block moved to; block 0 stays
    is_followed: bool  # whether the tables were changed with the blocks
    num_values: int  # logits compared
    num_different: int  # of which bits differ
    greatest_difference: float
    device: str

    @property
    def num_moved(self) -> int:
        return sum(new != old for old, new in enumerate(self.order))


def shuffled_order(num_blocks: int, num_moved: int, seed: int) -> list[int]:
    """A new place for each block of a pool: `num_moved` of them trade places, none of these stays; block 0 does.

    A single block has nobody to trade with: num_moved == 1 moves none.
    """
    order, random = list(range(num_blocks)), Random(seed)
    chosen = random.sample(range(1, num_blocks), num_moved) if num_moved > 1 else []
    for block, place in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        order[block] = place
    return order
