"""Which full blocks are already computed: a map from chained hashes to blocks, every hit verified by its tokens.

A block's hash covers its own tokens and, through the hash of the block before it, the whole prefix and the
namespace salt. A hash may collide, so a hit also needs equal tokens and the very parent entry that was matched
one block earlier; by induction the whole prefix is then equal (no reliance on the hash being strong).
"""

from array import array
from collections.abc import Sequence
from typing import Protocol

import xxhash

from minivllm.engine.block_pool import Block, CacheEntry

BlockHash = int
Parent = int | str  # serial of the entry one block earlier; for the first block, the salt


def chain_hash(parent_hash: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block, given the hash of the block before it (xxh3, 64 bits)."""
    return xxhash.xxh3_64_intdigest(array("q", token_ids).tobytes(), seed=parent_hash)


def root_hash(salt: str) -> BlockHash:
    """What stands before the first block: requests with different salts never share a block."""
    return xxhash.xxh3_64_intdigest(salt.encode())


class PrefixCache(Protocol):
    """Find, remember and forget the contents of full blocks."""

    def match(self, hashes: Sequence[BlockHash], token_ids: Sequence[int], salt: str) -> list[Block]: ...
    def insert(self, block: Block, parent: Parent, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None: ...
    def evict(self, block: Block) -> None: ...


class HashChainCache:
    """Automatic prefix caching as vLLM does it: a flat map from chained hash to block."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_of: dict[BlockHash, Block] = {}
        self._last_serial = 0

    def match(self, hashes: Sequence[BlockHash], token_ids: Sequence[int], salt: str) -> list[Block]:
        """The longest run of cached blocks that starts the prompt."""
        matched: list[Block] = []
        parent: Parent = salt
        for index, block_hash in enumerate(hashes):
            block = self.block_of.get(block_hash)
            start = index * self.block_size
            if block is None or not _holds(block, parent, token_ids[start : start + self.block_size]):
                break
            assert block.entry is not None
            matched.append(block)
            parent = block.entry.serial
        return matched

    def insert(self, block: Block, parent: Parent, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        """Remember a full block; return the serial that stands for its contents, None when they cannot be cached.

        Equal contents that another block caches already keep their place: `block` then stays a plain duplicate.
        """
        holder = self.block_of.get(block_hash)
        if holder is not None:
            # Other contents under this hash: a collision, or a chain whose start was evicted. Eviction clears it.
            return holder.entry.serial if holder.entry and _holds(holder, parent, token_ids) else None
        self._last_serial += 1
        block.entry = CacheEntry(self._last_serial, block_hash, tuple(token_ids), parent)
        self.block_of[block_hash] = block
        return self._last_serial

    def evict(self, block: Block) -> None:
        """Forget what a block holds."""
        assert block.entry is not None and self.block_of[block.entry.block_hash] is block
        del self.block_of[block.entry.block_hash]
        block.entry = None


def _holds(block: Block, parent: Parent, token_ids: Sequence[int]) -> bool:
    entry = block.entry
    return entry is not None and entry.parent == parent and entry.token_ids == tuple(token_ids)


class NoCache:
    """The prefix cache switched off: nothing is found, nothing is kept."""

    def match(self, hashes: Sequence[BlockHash], token_ids: Sequence[int], salt: str) -> list[Block]:
        return []

    def insert(self, block: Block, parent: Parent, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        return None

    def evict(self, block: Block) -> None:
        raise AssertionError("nothing is cached")
