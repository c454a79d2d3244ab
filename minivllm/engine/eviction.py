"""Which cached block is forgotten first: policies as sort keys, and a heap of the blocks that nobody owns.

Only leaves go: a block behind which others are cached would make those unreachable. Its turn comes when they are gone.
"""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from minivllm.engine.block_pool import Block, CacheEntry
from minivllm.engine.prefix_cache import PrefixCache

Key = Callable[[Block], tuple[int, ...]]  # the smallest goes first
Item = tuple[int, ...]  # a key, and the negative serial of the entry it was made for


def lru(block: Block) -> tuple[int, ...]:
    """Least recently used first. Keeps what is in fashion; one scan of prompts that never return empties the cache."""
    return (block.last_used,)


def lfu(block: Block) -> tuple[int, ...]:
    """Least frequently used first, then LRU. Survives scans; what was popular long ago never leaves (no ageing)."""
    return (block.num_hits, block.last_used)


def fifo(block: Block) -> tuple[int, ...]:
    """First cached, first out. Nothing to update at a hit; a prefix that all requests share leaves like any other."""
    return (_entry(block).serial,)


def slru(block: Block) -> tuple[int, ...]:
    """Segmented LRU: what was never hit goes before what was, each by LRU. Survives scans and forgets with time.

    Karedla, Love and Wherry (IEEE Computer 27(3), 1994) also bound the protected segment; this one, like SGLang's, may
    fill the cache, and then new prompts are evicted before they can be hit.
    """
    return (int(block.num_hits > 0), block.last_used)


def priority(block: Block) -> tuple[int, ...]:
    """Least urgent first (the highest number, as for requests), then LRU. Keeps what its users declare important."""
    return (-block.priority, block.last_used)


POLICIES: dict[str, Key] = {"lru": lru, "lfu": lfu, "fifo": fifo, "slru": slru, "priority": priority}


class Eviction:
    """The cached blocks that nobody owns, and which of them goes next.

    Equal keys: the youngest entry goes first, which in one chain is the deepest. The heap is lazy and holds numbers
    only: an item whose entry is gone, owned, no leaf, or has another key by now is dropped when it comes to the top.
    """

    def __init__(self, policy: str, cache: PrefixCache) -> None:
        self.cache = cache
        self._key = POLICIES[policy]
        self._idle: set[int] = set()  # serials of the entries that may go
        self._heap: list[Item] = []

    def add(self, block: Block) -> None:
        """A cached block lost its last owner. What its key is made of must stay as it is until the block is removed."""
        assert block.ref_count == 0, f"block {block.id} is in use"
        self._idle.add(_entry(block).serial)
        if self.cache.is_leaf(block):
            self._push(block)

    def remove(self, block: Block) -> None:
        """A cached block has an owner again, or is about to lose its contents: call it before `cache.evict`."""
        self._idle.discard(_entry(block).serial)
        parent = self.cache.parent_of(block)
        if parent is not None and _entry(parent).serial in self._idle:
            self._push(parent)  # it may be a leaf as soon as this block's contents are gone

    def victim(self) -> Block:
        """The idle leaf with the smallest key; it stays idle until `remove`. O(log n) amortised.

        There may be none though blocks are idle: in a hash chain a request may continue a cached block and own but a
        duplicate of it. Then the youngest goes (O(n)): what is behind it is in use, and can no longer be found.
        """
        while self._heap:
            block = self.cache.holder(-self._heap[0][-1])
            if block is not None and self._is_current(block, self._heap[0]):
                return block
            heappop(self._heap)
        assert self._idle, "no cached block is idle"
        return max(self._idle_blocks(), key=lambda block: _entry(block).serial)

    def _is_current(self, block: Block, item: Item) -> bool:
        return _entry(block).serial in self._idle and self._item(block) == item and self.cache.is_leaf(block)

    def _push(self, block: Block) -> None:
        if len(self._heap) > 2 * len(self._idle) + 64:  # while nothing is evicted, nothing else removes old items
            self._heap = [self._item(idle) for idle in self._idle_blocks() if self.cache.is_leaf(idle)]
            heapify(self._heap)
        heappush(self._heap, self._item(block))

    def _idle_blocks(self) -> Iterator[Block]:
        return (block for block in map(self.cache.holder, self._idle) if block is not None)

    def _item(self, block: Block) -> Item:
        return (*self._key(block), -_entry(block).serial)


def _entry(block: Block) -> CacheEntry:
    assert block.entry is not None, f"block {block.id} caches nothing"
    return block.entry
