"""The prefix cache of models whose layers form several groups: blocks found beside those of the first group.

The first group sees all tokens; its blocks are in the prefix cache, which knows their contents. A block that holds the
same tokens for another group is the companion of that entry, and is found, and so verified, through it alone. When the
entry is evicted its companions can no longer be found; they wait in the free list for their turn.
A hit ends where every group can go on from: what a window reaches back to must be cached, what lies before need not be.
"""

from minivllm.engine.block_pool import Block, CacheEntry
from minivllm.engine.prefix_cache import Hit
from minivllm.engine.tables import num_unseen


class Companions:
    """Blocks of the groups 1, 2 .. by the serial of the first group's entry."""

    def __init__(self, windows: tuple[int | None, ...], block_size: int) -> None:
        self.windows = windows  # of the groups 1, 2 ..
        self.block_size = block_size
        self.block_of: dict[tuple[int, int], Block] = {}  # by serial and group

    def add(self, block: Block, entry: CacheEntry, group: int) -> bool:
        """Remember a group's block beside an entry; False where another block stands there already."""
        if (entry.serial, group) in self.block_of:
            return False
        assert block.entry is None, f"block {block.id} caches something already"
        block.entry = CacheEntry(entry.serial, entry.block_hash, entry.token_ids, entry.parent, group)
        block.num_hits = 0
        self.block_of[entry.serial, group] = block
        return True

    def evict(self, block: Block) -> None:
        """Forget what a block holds."""
        assert block.entry is not None and self.block_of.pop((block.entry.serial, block.entry.group)) is block
        block.entry = None

    def shorten(self, hit: Hit) -> Hit:
        """The longest part of a hit that every group can go on from, with the groups' blocks."""
        found = [[self._beside(block, group) for block in hit.blocks] for group in range(1, len(self.windows) + 1)]
        runs = [0] * len(found)  # how many blocks in a row, up to here, each group has
        longest = Hit([], 0)
        for num_blocks in range(1, len(hit.blocks) + 1):
            runs = [run + 1 if blocks[num_blocks - 1] else 0 for run, blocks in zip(runs, found, strict=True)]
            num_tokens = num_blocks * self.block_size
            firsts = [num_unseen(num_tokens, window, self.block_size) for window in self.windows]
            if all(run >= num_blocks - first for run, first in zip(runs, firsts, strict=True)):
                reached = [blocks[first:num_blocks] for first, blocks in zip(firsts, found, strict=True)]
                others = [[block for block in blocks if block is not None] for blocks in reached]
                longest = Hit(hit.blocks[:num_blocks], num_tokens, others)
        return longest

    def _beside(self, block: Block, group: int) -> Block | None:
        return self.block_of.get((block.entry.serial, group)) if block.entry else None
