"""Which full blocks are already computed: a map from chained hashes to blocks, every hit verified by its tokens.

A block's hash covers its own tokens and, through the hash of the block before it, the whole prefix and the
namespace salt. A hash may collide, so a hit also needs equal tokens and the very parent entry that was matched
one block earlier; by induction the whole prefix is then equal (no reliance on the hash being strong).
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import xxhash

from minivllm.engine.block_pool import Block, CacheEntry
from minivllm.request import Request

BlockHash = int
Parent = int | str  # serial of the entry one block earlier; for the first block, the salt


def chain_hash(parent_hash: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block, given the hash of the block before it (xxh3, 64 bits)."""
    return xxhash.xxh3_64_intdigest(array("q", token_ids).tobytes(), seed=parent_hash)


def root_hash(salt: str) -> BlockHash:
    """What stands before the first block: requests with different salts never share a block."""
    return xxhash.xxh3_64_intdigest(salt.encode())


@dataclass(frozen=True, slots=True)
class Hit:
    """What a cache knows of a request's beginning."""

    blocks: list[Block]  # in table order; a radix tree may know only the start of what the last one is to hold
    num_tokens: int
    others: list[list[Block]] = field(default_factory=list)  # of the other groups of layers: the ends of their tables

    @property
    def tables(self) -> list[list[Block]]:
        """By group of layers; empty where nothing was found."""
        return [self.blocks, *self.others] if self.blocks else []

    def without_part(self, block_size: int) -> "Hit":
        """Only the blocks that are known whole."""
        num_whole = self.num_tokens // block_size
        return Hit(self.blocks[:num_whole], num_whole * block_size, self.others)

    @property
    def num_revived(self) -> int:
        """Blocks that leave the free list when the hit is adopted."""
        return sum(block.ref_count == 0 for blocks in self.tables for block in blocks)


class PrefixCache(Protocol):
    """Find, remember and forget the contents of full blocks; radix_cache.py has the other one."""

    deduplicates: bool  # True: a request exchanges its duplicate for the cached block; False: it keeps it, as in vLLM

    def match(self, request: Request, most_tokens: int) -> Hit: ...
    def insert(self, block: Block, parent: Parent, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None: ...
    def evict(self, block: Block) -> None: ...
    def holder(self, serial: int) -> Block | None: ...
    def is_leaf(self, block: Block) -> bool: ...
    def parent_of(self, block: Block) -> Block | None: ...


class HashChainCache:
    """Automatic prefix caching as vLLM does it: a flat map from chained hash to block."""

    deduplicates = False

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.block_of: dict[BlockHash, Block] = {}
        self._by_serial: dict[int, Block] = {}
        self._num_children: Counter[int] = Counter()  # cached blocks that continue an entry, by its serial
        self._last_serial = 0

    def match(self, request: Request, most_tokens: int) -> Hit:
        """The longest run of cached blocks that starts the request and holds at most `most_tokens`."""
        matched: list[Block] = []
        parent: Parent = request.salt
        for index, block_hash in enumerate(request.block_hashes[: most_tokens // self.block_size]):
            block = self.block_of.get(block_hash)
            start = index * self.block_size
            if block is None or not _holds(block, parent, request.token_ids[start : start + self.block_size]):
                break
            assert block.entry is not None
            matched.append(block)
            parent = block.entry.serial
        return Hit(matched, len(matched) * self.block_size)

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
        block.num_hits = 0
        self.block_of[block_hash] = self._by_serial[self._last_serial] = block
        if isinstance(parent, int):
            self._num_children[parent] += 1
        return self._last_serial

    def evict(self, block: Block) -> None:
        """Forget what a block holds."""
        entry = block.entry
        assert entry is not None and self.block_of[entry.block_hash] is block
        del self.block_of[entry.block_hash], self._by_serial[entry.serial]
        if isinstance(entry.parent, int):
            self._num_children[entry.parent] -= 1
            if not self._num_children[entry.parent]:
                del self._num_children[entry.parent]
        block.entry = None

    def holder(self, serial: int) -> Block | None:
        """The block that caches an entry; None when it was evicted."""
        return self._by_serial.get(serial)

    def is_leaf(self, block: Block) -> bool:
        """Whether no cached block continues this one."""
        return block.entry is not None and block.entry.serial not in self._num_children

    def parent_of(self, block: Block) -> Block | None:
        """The cached block one block earlier, if there is one."""
        parent = block.entry.parent if block.entry else None
        return self._by_serial.get(parent) if isinstance(parent, int) else None


def _holds(block: Block, parent: Parent, token_ids: Sequence[int]) -> bool:
    entry = block.entry
    return entry is not None and entry.parent == parent and entry.token_ids == tuple(token_ids)


class NoCache:
    """The prefix cache switched off: nothing is found, nothing is kept."""

    deduplicates = False

    def match(self, request: Request, most_tokens: int) -> Hit:
        return Hit([], 0)

    def insert(self, block: Block, parent: Parent, block_hash: BlockHash, token_ids: Sequence[int]) -> int | None:
        return None

    def evict(self, block: Block) -> None:
        raise AssertionError("nothing is cached")

    def holder(self, serial: int) -> Block | None:
        return None

    def is_leaf(self, block: Block) -> bool:
        return False

    def parent_of(self, block: Block) -> Block | None:
        return None
