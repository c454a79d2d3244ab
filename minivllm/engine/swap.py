"""Preemption by swap: a request's blocks wait in host memory, a second pool, instead of being computed again.

    device   [3][8][5]   --swap out-->   released at once, others may take them in the same step
    host     (1)(2)(3)   --swap in-->    any free blocks [6][1][9], the same contents

The runner moves the bytes before it computes, in the order in which the moves were decided.
"""

from minivllm.engine.allocators import blocks_needed
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import Move
from minivllm.engine.tables import deal, held_ids
from minivllm.events import SwappedIn, SwappedOut
from minivllm.request import Request


class SwapSpace:
    """Host blocks 1 .. num_blocks, without sharing and without a cache."""

    def __init__(self, num_blocks: int, kv: KVManager) -> None:
        self.num_blocks = num_blocks
        self._kv = kv
        self._free = list(range(num_blocks, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_ids(self) -> list[int]:
        """In the order in which they will be taken."""
        return self._free[::-1]

    def swap_out(self, request: Request) -> bool:
        """Send the tables' contents to the host and release their blocks; False when the host is short of room."""
        held = held_ids(request)
        if not held or len(held) > len(self._free):
            return False
        host_ids = [self._free.pop() for _ in held]
        self._kv.move(Move.SWAP_OUT, held, host_ids)
        self._kv.events.emit(SwappedOut(self._kv.step, request.id, tuple(held), tuple(host_ids)))
        num_computed, dropped = request.num_computed, [table.num_dropped for table in request.tables]
        self._kv.release(request)
        request.num_computed, request.host_ids = num_computed, host_ids
        for table, num_dropped in zip(request.tables, dropped, strict=True):
            table.num_dropped = num_dropped
        return True

    def can_swap_in(self, request: Request, num_new: int, keep_watermark: bool) -> bool:
        """Whether the pool can hold what waits here and `num_new` more tokens."""
        whole = blocks_needed(request.num_computed + num_new, self._kv.block_size)
        num_blocks = sum(whole - table.num_dropped for table in request.tables)
        spared = self._kv.num_watermark if keep_watermark else 0
        return self._kv.allocator.can_take(request, num_blocks, spared)

    def swap_in(self, request: Request) -> None:
        """Bring the tables' contents back into fresh blocks; they are offered to the prefix cache anew."""
        held = self._kv.allocator.take(request, len(request.host_ids))
        self._kv.move(Move.SWAP_IN, request.host_ids, held)
        dropped = tuple(table.num_dropped for table in request.tables)
        self._kv.events.emit(SwappedIn(self._kv.step, request.id, tuple(held), tuple(request.host_ids), dropped))
        self.forget(request)
        request.tables = deal(request, held, self._kv.block_size)
        request.num_published, request.cache_parent = 0, None if request.tables[0].num_dropped else request.salt

    def forget(self, request: Request) -> None:
        """Free the host blocks of a request that came back or left."""
        for host_id in reversed(request.host_ids):
            assert host_id not in self._free, f"host block {host_id} is freed twice"
            self._free.append(host_id)
        request.host_ids = []
