"""Block tables of the requests: find cached prefixes, grow, fork and copy on write, publish full blocks, let go.

Entry i of a table holds positions i*block_size .. (i+1)*block_size-1. A table has exactly the blocks that its
computed and scheduled tokens need (invariant I10). Where some layers have a sliding window and others see all, each
group of layers has a table; all are equally long, those with a window begin with null blocks. Blocks may have several
owners; who writes to one that others hold, or that the prefix cache keeps, gets a copy first (I12). Full blocks are
never written again, so they are never copied.
"""

from minivllm.draft_events import BlocksTrimmed
from minivllm.engine.allocators import blocks_needed as blocks_needed
from minivllm.engine.allocators import build_allocator
from minivllm.engine.block_pool import NULL_BLOCK, Block, BlockPool
from minivllm.engine.companions import Companions
from minivllm.engine.eviction import Eviction
from minivllm.engine.plan import Move, Transfer
from minivllm.engine.prefix_cache import HashChainCache, Hit, NoCache, PrefixCache, chain_hash, root_hash
from minivllm.engine.radix_cache import RadixCache
from minivllm.engine.tables import held_ids, num_unseen
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
from minivllm.request import BlockTable, Request


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
        self.companions = Companions(config.group_windows[1:], config.block_size)
        # The free list is in the order of LRU already, and in the hash chain any block may go.
        is_lru_chain = (config.prefix_cache, config.eviction_policy) == ("hash", "lru")
        self.eviction = None if is_lru_chain else Eviction(config.eviction_policy, self.cache)
        self.allocator = build_allocator(config, self.pool, self._make_empty, self._tell_reserved)
        self.num_groups = len(config.group_windows)
        self.frees_windows = any(config.group_windows) and not self.allocator.is_contiguous
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
        hit = self.cache.match(request, request.num_tokens - 1)
        return hit if self.num_groups == 1 else self.companions.shorten(hit)

    def can_admit(self, request: Request, hit: Hit, num_new: int, keep_watermark: bool) -> bool:
        """Whether the pool can serve the request's first `num_new` tokens after its cached ones."""
        num_held = len(hit.blocks) - (hit.num_tokens % self.block_size > 0)  # a block known in part will be copied
        num_fresh = blocks_needed(hit.num_tokens + num_new, self.block_size) - num_held
        spared = self.num_watermark if keep_watermark else 0
        return self.allocator.can_take(request, num_fresh * self.num_groups + hit.num_revived, spared)

    def adopt(self, request: Request, hit: Hit) -> None:
        """Start the request's tables with cached blocks; their tokens count as computed."""
        assert not request.block_ids and request.num_computed == 0
        self._num_uses += 1
        request.tables = []
        for blocks in hit.tables or [[] for _ in self.config.group_windows]:
            for block in blocks:
                block.num_hits += 1
                self.share(block)
                block.priority = min(block.priority, request.priority)
            num_dropped = len(hit.blocks) - len(blocks)
            block_ids = [NULL_BLOCK] * num_dropped + [block.id for block in blocks]
            request.tables.append(BlockTable(block_ids, num_dropped))
        request.num_computed = hit.num_tokens
        request.num_published = hit.num_tokens // self.block_size
        last_entry = hit.blocks[request.num_published - 1].entry if request.num_published else None
        request.cache_parent = last_entry.serial if last_entry else request.salt
        if hit.blocks:
            for group, table in enumerate(request.tables):
                self.events.emit(PrefixHit(self.step, request.id, tuple(table.block_ids), request.num_computed, group))

    def grow(self, request: Request, num_new: int) -> bool:
        """Make room for `num_new` more tokens; False, and nothing changed, when the pool is short."""
        num_blocks = blocks_needed(request.num_computed + num_new, self.block_size)
        num_missing = num_blocks - len(request.tables[0].block_ids)
        if num_missing <= 0 and self.num_groups == 1 and not self._writes_to_shared(request, 0):
            return True  # fifteen of sixteen times, for hundreds of requests a step
        copying = [group for group in range(len(request.tables)) if self._writes_to_shared(request, group)]
        if num_missing <= 0 and not copying:
            return True
        if not self.allocator.can_take(request, num_missing * len(request.tables) + len(copying)):
            return False
        for group in copying:
            self._copy_tail(request, group)
        if num_missing > 0:
            for group in range(len(request.tables)):
                self._extend_table(request, group, num_missing)
        return True

    def trim(self, request: Request) -> None:
        """Give back the blocks behind the computed tokens: a rejected tail leaves them empty."""
        num_kept = blocks_needed(request.num_computed, self.block_size)
        for group, table in enumerate(request.tables):
            if trimmed := table.block_ids[num_kept:]:
                del table.block_ids[num_kept:]
                self.events.emit(BlocksTrimmed(self.step, request.id, tuple(trimmed), group))
            for block_id in reversed(trimmed):
                self.let_go(self.pool.blocks[block_id])

    def fork(self, parent: Request, child: Request) -> bool:
        """Give `child`, whose tokens start as the parent's do, the parent's tables; False when there is no room.

        Every block is shared, the partial tail too: it is copied by the first to write to it, and never if its other
        owners have gone. A contiguous allocator cannot share: it copies all, at once.
        """
        num_blocks = len(parent.block_ids)
        if self.allocator.is_contiguous and not self.allocator.can_take(child, num_blocks):
            return False
        child.num_computed = parent.num_computed
        child.num_published, child.cache_parent = parent.num_published, parent.cache_parent
        child.block_hashes = list(parent.block_hashes)
        if self.allocator.is_contiguous:
            child.tables = [BlockTable(self.allocator.take(child, num_blocks))]
            self.move(Move.COPY, parent.block_ids, child.block_ids)
            return True
        self._num_uses += 1
        child.tables = [BlockTable(list(table.block_ids), table.num_dropped) for table in parent.tables]
        for table in child.tables:
            for block_id in table.live_ids:
                self.share(self.pool.blocks[block_id])
        return True

    def publish(self, request: Request) -> None:
        """Offer blocks that became full of known tokens to the prefix cache."""
        num_full = request.num_booked // self.block_size
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
            if request.cache_parent is not None and self.num_groups > 1:
                self._publish_beside(request, index, request.cache_parent)
            elif request.cache_parent is not None and self.cache.deduplicates:
                self._exchange(request, index, self.cache.holder(request.cache_parent))
        request.num_published = num_full

    def drop_outside_window(self, request: Request) -> None:
        """Free the blocks that the next query, at num_booked, does not see through its group's sliding window."""
        if not self.frees_windows:
            return  # most models; this runs for every request in every step
        for group, (table, window) in enumerate(zip(request.tables, self.config.group_windows, strict=True)):
            num_past = num_unseen(request.num_booked, window, self.block_size)
            dropped = table.block_ids[table.num_dropped : num_past]
            if not dropped:
                continue
            table.block_ids[table.num_dropped : num_past] = [NULL_BLOCK] * len(dropped)
            table.num_dropped = num_past
            self.events.emit(BlocksDropped(self.step, request.id, tuple(dropped), group))
            for block_id in dropped:
                self.let_go(self.pool.blocks[block_id])

    def release(self, request: Request) -> None:
        """Give all tables back, tails first, so that the ends of prefixes are evicted before their starts."""
        held = [*held_ids(request), *request.reserved_ids]
        if held:
            self.events.emit(BlocksReleased(self.step, request.id, tuple(held)))
        self._num_uses += 1
        for block_id in reversed(held):
            self.let_go(self.pool.blocks[block_id])
        self.allocator.forget(request)
        request.tables, request.reserved_ids = [BlockTable() for _ in self.config.group_windows], []
        request.num_computed = request.num_published = 0
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

    def _writes_to_shared(self, request: Request, group: int) -> bool:
        """Whether the next token falls into a block that others read: the cache, a fork, the parent of one."""
        index, table = request.num_computed // self.block_size, request.tables[group].block_ids
        if index >= len(table):
            return False
        block = self.pool.blocks[table[index]]
        return block.ref_count > 1 or block.entry is not None

    def _copy_tail(self, request: Request, group: int) -> None:
        index, table = request.num_computed // self.block_size, request.tables[group].block_ids
        source = self.pool.blocks[table[index]]
        [table[index]] = self.allocator.take(request, 1)
        self.move(Move.COPY, [source.id], [table[index]])
        self.events.emit(BlockCopied(self.step, request.id, source.id, table[index]))
        self.let_go(source)

    def _extend_table(self, request: Request, group: int, num_missing: int) -> None:
        fresh_ids = self.allocator.take(request, num_missing)
        request.tables[group].block_ids.extend(fresh_ids)
        self._taken_ids.extend(fresh_ids)
        if self.events:  # a step may do this for hundreds of requests
            self.events.emit(BlocksTaken(self.step, request.id, tuple(fresh_ids), group))

    def _publish_beside(self, request: Request, index: int, serial: int) -> None:
        """Let the other groups' blocks for the same tokens be found with the first group's."""
        holder = self.cache.holder(serial)
        for group, table in enumerate(request.tables[1:], start=1):
            block = self.pool.blocks[table.block_ids[index]]
            if holder is None or holder.entry is None or block.id == NULL_BLOCK:
                continue  # it fell out of the window before it was published
            if self.companions.add(block, holder.entry, group):
                block.priority = request.priority
                self.events.emit(BlockCached(self.step, request.id, block.id, request.block_hashes[index], group))

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
        (self.companions if block.entry and block.entry.group else self.cache).evict(block)
        self.pool.move_to_front(block)
        self.events.emit(Evicted(self.step, block.id))

    def _extend_hashes(self, request: Request) -> None:
        """Hash the full blocks of the known tokens that are not hashed yet."""
        hashes, size = request.block_hashes, self.block_size
        for start in range(len(hashes) * size, request.num_tokens - size + 1, size):
            parent_hash = hashes[-1] if hashes else root_hash(request.salt)
            hashes.append(chain_hash(parent_hash, request.token_ids[start : start + size]))
