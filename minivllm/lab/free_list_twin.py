"""I14: the free list told again from the events alone, as a plain list; a block goes out in its turn or not at all."""

from collections import Counter

from minivllm.draft_events import BlocksTrimmed
from minivllm.engine.block_pool import NULL_BLOCK, BlockPool
from minivllm.events import (
    BlockCached,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksReserved,
    BlocksTaken,
    Event,
    Evicted,
    Forked,
    Pinned,
    PrefixHit,
    SwappedIn,
    Unpinned,
)


class FreeListTwin:
    """Listens to an engine from its first step on; `check` compares."""

    def __init__(self, num_blocks: int, is_lru: bool = True) -> None:
        self.free = list(range(1, num_blocks))
        self.is_lru = is_lru  # the free list itself is the order of eviction
        self.owners: Counter[int] = Counter()
        self.cached: set[int] = set()
        self.is_resetting = False
        self._evicted: set[int] = set()  # they are taken in the same stroke,
        self._empty: set[int] = set()  # and with them whatever was empty then
        self._reserved: set[int] = set()

    def __call__(self, event: Event) -> None:
        """Be a listener: `engine.events.listen(twin)`."""
        match event:
            case PrefixHit(block_ids=block_ids) | Pinned(block_ids=block_ids):
                self._share_all(block_ids)
            case Forked(block_ids=block_ids, other_tables=other_tables):
                for table in (block_ids, *other_tables):
                    self._share_all(table)
            case Evicted(block_id=block_id):
                self._evict(block_id)
            case BlocksTaken(block_ids=block_ids) | SwappedIn(block_ids=block_ids):
                self._take(*block_ids)
            case BlocksReserved(block_ids=block_ids):
                for block_id in block_ids:
                    self._share(block_id)
                self._reserved.update(block_ids)
            case BlockCopied(source_id=source_id, block_id=block_id):
                assert self.owners[source_id] > 1 or source_id in self.cached, (
                    f"I12: {source_id} was copied for nothing"
                )
                self._take(block_id)
                self._release(source_id)
            case BlockExchanged(block_id=block_id, cached_id=cached_id):
                self._share(cached_id)
                self._release(block_id)
            case (
                BlocksReleased(block_ids=block_ids) | Unpinned(block_ids=block_ids) | BlocksTrimmed(block_ids=block_ids)
            ):
                for block_id in reversed(block_ids):
                    self._release(block_id)
            case BlocksDropped(block_ids=block_ids):
                for block_id in block_ids:
                    self._release(block_id)
            case BlockCached(block_id=block_id):
                self.cached.add(block_id)

    def check(self, pool: BlockPool) -> None:
        """Assert that the pool's free list is the one that the events tell."""
        assert list(pool.free_ids()) == self.free, f"I14: free list {list(pool.free_ids())}, events say {self.free}"

    def _share_all(self, block_ids: tuple[int, ...]) -> None:
        for block_id in block_ids:
            if block_id != NULL_BLOCK:  # where a window has passed
                self._share(block_id)

    def _share(self, block_id: int) -> None:
        if block_id in self._reserved:
            return  # a contiguous fork: reserved for the child just before
        if not self.owners[block_id]:
            assert block_id in self.free, f"I14: block {block_id} is shared, neither free nor owned"
            self.free.remove(block_id)
        self.owners[block_id] += 1

    def _take(self, *block_ids: int) -> None:
        assert self._empty <= set(block_ids), f"I14: {self._empty} were empty when a cached block was evicted"
        self._empty = set()
        for block_id in block_ids:
            if block_id in self._reserved:
                continue
            if block_id in self._evicted:
                self._evicted.remove(block_id)
            else:
                assert self.free and self.free.pop(0) == block_id, f"I14: block {block_id} was taken out of turn"
            self.owners[block_id] += 1

    def _evict(self, block_id: int) -> None:
        assert block_id in self.free, f"I14: block {block_id} was evicted while in use"
        self.cached.discard(block_id)
        place = self.free.index(block_id)
        self.free.pop(place)
        if self.is_resetting:
            self.free.insert(0, block_id)
            return
        is_next = not self.is_lru or self.cached.isdisjoint(self.free[:place])
        assert is_next, f"I14: {block_id} was evicted out of turn"
        self._evicted.add(block_id)
        self._empty = set(self.free) - self.cached

    def _release(self, block_id: int) -> None:
        self.owners[block_id] -= 1
        if self.owners[block_id] == 0:
            self._reserved.discard(block_id)
            self.free.insert(len(self.free) if block_id in self.cached else 0, block_id)
