"""How many blocks are live, cached or free, followed from the events alone at little cost for each."""

from collections.abc import Iterable

from minivllm.draft_events import BlocksTrimmed
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

NULL_BLOCK = 0


class BlockCounts:
    """Counts owners of each block. Follow a pool from when nobody held a block and nothing was cached."""

    def __init__(self) -> None:
        self.num_live = 0
        self.num_cached = 0  # free blocks whose contents can be found
        self._owners: dict[int, int] = {}
        self._cached: set[int] = set()
        self._reserved: set[int] = set()

    def apply(self, event: Event) -> None:
        """Follow one event; most kinds touch no block."""
        match event:
            case BlocksTaken() | PrefixHit() | Pinned():
                self._hold(event.block_ids)
            case BlocksReleased() | BlocksDropped() | BlocksTrimmed() | Unpinned():
                self._let_go(event.block_ids)
            case BlockCached(block_id=block_id):
                self._cache(block_id)
            case Evicted(block_id=block_id):
                self._forget(block_id)
            case BlocksReserved(block_ids=block_ids):
                self._hold(block_ids)
                self._reserved.update(block_ids)
            case BlockCopied(source_id=old, block_id=new) | BlockExchanged(block_id=old, cached_id=new):
                self._hold((new,))
                self._let_go((old,))
            case Forked(block_ids=block_ids, other_tables=others):
                for table in (block_ids, *others):
                    self._hold(table)
            case SwappedIn():
                self._hold(event.block_ids)

    def _hold(self, block_ids: Iterable[int]) -> None:
        owners = self._owners
        for block_id in block_ids:
            if block_id in self._reserved:
                self._reserved.discard(block_id)  # held since it was reserved
            elif block_id != NULL_BLOCK:
                count = owners.get(block_id, 0)
                owners[block_id] = count + 1
                if count == 0:
                    self.num_live += 1
                    self.num_cached -= block_id in self._cached

    def _let_go(self, block_ids: Iterable[int]) -> None:
        owners = self._owners
        for block_id in block_ids:
            self._reserved.discard(block_id)
            count = owners.get(block_id, 0)
            if count > 1:
                owners[block_id] = count - 1
            elif count:
                del owners[block_id]
                self.num_live -= 1
                self.num_cached += block_id in self._cached

    def _cache(self, block_id: int) -> None:
        if block_id not in self._cached:
            self._cached.add(block_id)
            self.num_cached += block_id not in self._owners

    def _forget(self, block_id: int) -> None:
        if block_id in self._cached:
            self._cached.discard(block_id)
            self.num_cached -= block_id not in self._owners
