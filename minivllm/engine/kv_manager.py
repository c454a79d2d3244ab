"""Block tables of the requests: find cached prefixes, grow, fork and copy on write, publish full blocks, let go.

`request.block_ids[i]` holds positions i*block_size .. (i+1)*block_size-1. A table has exactly the blocks that its
computed and scheduled tokens need (invariant I10). Blocks may have several owners; who writes to one that others hold,
or that the prefix cache keeps, gets a copy first (I12). Full blocks are never written again, so they are never copied.
"""

from minivllm.engine.allocators import blocks_needed as blocks_needed
from minivllm.engine.allocators import build_allocator
from minivllm.engine.block_pool import NULL_BLOCK, Block, BlockPool
from minivllm.engine.eviction import Eviction
from minivllm.engine.plan import Move, Transfer
from minivllm.engine.prefix_cache import HashChainCache, Hit, NoCache, PrefixCache, chain_hash, root_hash
from minivllm.engine.radix_cache import RadixCache
from minivllm.engine_config import EngineConfig
from minivllm.events import (
    BlockCached,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksReserved,
    BlocksTaken,
    EventBus,
    Evicted,
    PrefixHit,
)
from minivllm.request import Request


def slot_of(position: int, block_ids: list[int], block_size: int) -> int:
    """Where a position's K and V live: slot_of(37, [7, 1, 3], 16) == 3 * 16 + 5 == 53."""
    return block_ids[position // block_size] * block_size + position % block_size


class KVManager:
    """Hands blocks to requests and takes them back; knows no tensors."""

    def __init__(self, config: EngineConfig, events: EventBus) -> None:
        self.config = config
        self.block_size = config.block_size
        self.pool = BlockPool(config.num_blocks)
        self.caches_prefixes = config.enable_prefix_caching
        self.cache: PrefixCache = NoCache()
        if self.caches_prefixes:
            self.cache = (RadixCache if config.prefix_cache == "radix" else HashChainCache)(config.block_size)
        # The free list is in the order of LRU already, and in the hash chain any block may go.
        is_lru_chain = (config.prefix_cache, config.eviction_policy) == ("hash", "lru")
        self.eviction = None if is_lru_chain else Eviction(config.eviction_policy, self.cache)
        self.allocator = build_allocator(config, self.pool, self._make_empty, self._tell_reserved)
        self.num_watermark = int(config.watermark * self.pool.num_usable)
        self.events = events
        self.step = 0
        self._num_uses = 0
        self._taken_ids: list[int] = []
        self._transfers: list[Transfer] = []

    def drain_work(self) -> tuple[list[int], list[Transfer]]:
        """What the runner has to do for the tables since the last call: blocks to clear, contents to move."""
        work = self._taken_ids, self._transfers
        self._taken_ids, self._transfers = [], []
        return work

    def match(self, request: Request) -> Hit:
        """Cached blocks that start this request, leaving at least one token to compute (I7).

        Requests that ask for prompt logprobs need the logits of every prompt token, so nothing is skipped.
        """
        if not self.caches_prefixes or request.params.prompt_logprobs is not None:
            return Hit([], 0)
        self._extend_hashes(request)
        return self.cache.match(request, request.num_tokens - 1)

    def can_admit(self, request: Request, hit: Hit, num_new: int, keep_watermark: bool) -> bool:
        """Whether the pool can serve the request's first `num_new` tokens after its cached ones."""
        num_held = len(hit.blocks) - (hit.num_tokens % self.block_size > 0)  # a block known in part will be copied
        num_fresh = blocks_needed(hit.num_tokens + num_new, self.block_size) - num_held
        spared = self.num_watermark if keep_watermark else 0
        return self.allocator.can_take(request, num_fresh + hit.num_revived, spared)

    def adopt(self, request: Request, hit: Hit) -> None:
        """Start the request's table with cached blocks; their tokens count as computed."""
        assert not request.block_ids and request.num_computed == 0
        self._num_uses += 1
        for block in hit.blocks:
            block.num_hits += 1
            self.share(block)
            block.priority = min(block.priority, request.priority)
        request.block_ids = [block.id for block in hit.blocks]
        request.num_computed = hit.num_tokens
        request.num_published = hit.num_tokens // self.block_size
        last_entry = hit.blocks[request.num_published - 1].entry if request.num_published else None
        request.cache_parent = last_entry.serial if last_entry else request.salt
        if hit.blocks:
            self.events.emit(PrefixHit(self.step, request.id, tuple(request.block_ids), request.num_computed))

    def grow(self, request: Request, num_new: int) -> bool:
        """Make room for `num_new` more tokens; False, and nothing changed, when the pool is short."""
        num_blocks = blocks_needed(request.num_computed + num_new, self.block_size)
        num_missing = num_blocks - len(request.block_ids)
        is_copying = self._writes_to_shared(request)
        if num_missing <= 0 and not is_copying:
            return True
        if not self.allocator.can_take(request, num_missing + is_copying):
            return False
        if is_copying:
            self._copy_tail(request)
        if num_missing > 0:
            self._extend_table(request, num_missing)
        return True

    def fork(self, parent: Request, child: Request) -> bool:
        """Give `child`, whose tokens start as the parent's do, the parent's table; False when there is no room.

        Every block is shared, the partial tail too: it is copied by the first to write to it, and never if its other
        owners have gone. A contiguous allocator cannot share: it copies all, at once.
        """
        num_blocks = len(parent.block_ids)
        if self.allocator.is_contiguous and not self.allocator.can_take(child, num_blocks):
            return False
        child.num_computed, child.num_dropped = parent.num_computed, parent.num_dropped
        child.num_published, child.cache_parent = parent.num_published, parent.cache_parent
        child.block_hashes = list(parent.block_hashes)
        if self.allocator.is_contiguous:
            child.block_ids = self.allocator.take(child, num_blocks)
            self.move(Move.COPY, parent.block_ids, child.block_ids)
            return True
        self._num_uses += 1
        child.block_ids = list(parent.block_ids)
        for block_id in child.block_ids[child.num_dropped :]:
            self.share(self.pool.blocks[block_id])
        return True

    def publish(self, request: Request) -> None:
        """Offer blocks that became full to the prefix cache."""
        num_full = request.num_computed // self.block_size
        if not self.caches_prefixes or num_full <= request.num_published:
            return
        self._extend_hashes(request)
        for index in range(request.num_published, num_full):
            if request.cache_parent is None:
                break
            block = self.pool.blocks[request.block_ids[index]]
            token_ids = request.token_ids[index * self.block_size : (index + 1) * self.block_size]
            block_hash, had_entry = request.block_hashes[index], block.entry is not None
            request.cache_parent = self.cache.insert(block, request.cache_parent, block_hash, token_ids)
            if block.entry is not None and not had_entry:
                block.priority = request.priority
                self.events.emit(BlockCached(self.step, request.id, block.id, block_hash))
            elif request.cache_parent is not None and self.cache.deduplicates:
                self._exchange(request, index, self.cache.holder(request.cache_parent))
        request.num_published = num_full

    def drop_outside_window(self, request: Request) -> None:
        """Free the blocks that no layer's sliding window reaches any more: the next query is at num_computed."""
        if self.config.window is None or self.allocator.is_contiguous:
            return
        num_unseen = max(0, request.num_computed - self.config.window + 1) // self.block_size
        dropped = request.block_ids[request.num_dropped : num_unseen]
        if not dropped:
            return
        request.block_ids[request.num_dropped : num_unseen] = [NULL_BLOCK] * len(dropped)
        request.num_dropped = num_unseen
        self.events.emit(BlocksDropped(self.step, request.id, tuple(dropped)))
        for block_id in dropped:
            self.let_go(self.pool.blocks[block_id])

    def release(self, request: Request) -> None:
        """Give the whole table back, tail first, so that the ends of prefixes are evicted before their starts."""
        held = [*request.block_ids[request.num_dropped :], *request.reserved_ids]
        if held:
            self.events.emit(BlocksReleased(self.step, request.id, tuple(held)))
        self._num_uses += 1
        for block_id in reversed(held):
            self.let_go(self.pool.blocks[block_id])
        self.allocator.forget(request)
        request.block_ids, request.reserved_ids = [], []
        request.num_computed = request.num_published = request.num_dropped = 0
        request.cache_parent = None

    def share(self, block: Block) -> None:
        """One more owner; the block cannot be evicted now."""
        if block.ref_count == 0 and self.eviction is not None:
            self.eviction.remove(block)
        self.pool.share(block)
        block.last_used = self._num_uses

    def let_go(self, block: Block) -> None:
        """One owner less; a cached block that nobody owns may be evicted."""
        self.pool.release(block)
        block.last_used = self._num_uses
        if block.ref_count == 0 and block.entry is not None and self.eviction is not None:
            self.eviction.add(block)

    def move(self, move: Move, source_ids: list[int], target_ids: list[int]) -> None:
        """Have the runner move the contents of blocks before it computes anything."""
        pairs = zip(source_ids, target_ids, strict=True)
        self._transfers.extend(Transfer(move, source, target) for source, target in pairs if source != NULL_BLOCK)

    def reset_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing changed, while any block is in use."""
        if self.pool.num_free < self.pool.num_usable:
            return False
        for block in [block for block in self.pool.blocks if block.entry is not None]:
            self._evict(block if self.eviction is None else self.eviction.victim())
        return True

    def _writes_to_shared(self, request: Request) -> bool:
        """Whether the next token falls into a block that others read: the cache, a fork, the parent of one."""
        index = request.num_computed // self.block_size
        if index >= len(request.block_ids):
            return False
        block = self.pool.blocks[request.block_ids[index]]
        return block.ref_count > 1 or block.entry is not None

    def _copy_tail(self, request: Request) -> None:
        index = request.num_computed // self.block_size
        source = self.pool.blocks[request.block_ids[index]]
        [request.block_ids[index]] = self.allocator.take(request, 1)
        self.move(Move.COPY, [source.id], [request.block_ids[index]])
        self.events.emit(BlockCopied(self.step, request.id, source.id, request.block_ids[index]))
        self.let_go(source)

    def _extend_table(self, request: Request, num_missing: int) -> None:
        fresh_ids = self.allocator.take(request, num_missing)
        request.block_ids.extend(fresh_ids)
        self._taken_ids.extend(fresh_ids)
        if self.events:  # a step may do this for hundreds of requests
            self.events.emit(BlocksTaken(self.step, request.id, tuple(fresh_ids)))

    def _exchange(self, request: Request, index: int, holder: Block | None) -> None:
        """Let the table name the cached block instead of a duplicate of it."""
        duplicate = self.pool.blocks[request.block_ids[index]]
        if holder is None or holder is duplicate:
            return
        self.share(holder)
        holder.priority = min(holder.priority, request.priority)
        request.block_ids[index] = holder.id
        self.events.emit(BlockExchanged(self.step, request.id, duplicate.id, holder.id))
        self.let_go(duplicate)

    def _tell_reserved(self, request: Request) -> None:
        self.events.emit(BlocksReserved(self.step, request.id, tuple(request.reserved_ids)))

    def _make_empty(self) -> None:
        """See to it that the first free block caches nothing: evict what the policy wants to lose first."""
        first = self.pool.first_free()
        if first.entry is not None:
            self._evict(first if self.eviction is None else self.eviction.victim())

    def _evict(self, block: Block) -> None:
        if self.eviction is not None:
            self.eviction.remove(block)
        self.cache.evict(block)
        self.pool.move_to_front(block)
        self.events.emit(Evicted(self.step, block.id))

    def _extend_hashes(self, request: Request) -> None:
        """Hash the full blocks of the known tokens that are not hashed yet."""
        hashes, size = request.block_hashes, self.block_size
        for start in range(len(hashes) * size, request.num_tokens - size + 1, size):
            parent_hash = hashes[-1] if hashes else root_hash(request.salt)
            hashes.append(chain_hash(parent_hash, request.token_ids[start : start + size]))
