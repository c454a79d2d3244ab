"""Block tables of the requests: find cached prefixes, grow tables block by block, publish full blocks, let go.

`request.block_ids[i]` holds positions i*block_size .. (i+1)*block_size-1. A table has exactly the blocks that its
computed and scheduled tokens need (invariant I10), and only the owner writes, only to blocks it alone holds (I12):
shared blocks are full ones, and full blocks are never written again.
"""

from minivllm.config import EngineConfig
from minivllm.engine.block_pool import Block, BlockPool
from minivllm.engine.prefix_cache import HashChainCache, NoCache, PrefixCache, chain_hash, root_hash
from minivllm.events import BlockCached, BlocksReleased, BlocksTaken, EventBus, Evicted, PrefixHit
from minivllm.request import Request


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`: blocks_needed(17, 16) == 2."""
    return -(-num_tokens // block_size)


def slot_of(position: int, block_ids: list[int], block_size: int) -> int:
    """Where a position's K and V live: slot_of(37, [7, 1, 3], 16) == 3 * 16 + 5 == 53."""
    return block_ids[position // block_size] * block_size + position % block_size


class KVManager:
    """Hands blocks to requests and takes them back; knows no tensors."""

    def __init__(self, config: EngineConfig, events: EventBus) -> None:
        self.block_size = config.block_size
        self.pool = BlockPool(config.num_blocks)
        self.cache: PrefixCache = HashChainCache(config.block_size) if config.enable_prefix_caching else NoCache()
        self.caches_prefixes = config.enable_prefix_caching
        self.num_watermark = int(config.watermark * self.pool.num_usable)
        self.events = events
        self.step = 0
        self.taken_ids: list[int] = []  # blocks handed out in this step

    def match(self, request: Request) -> list[Block]:
        """Cached blocks that start this request, leaving at least one token to compute (I7).

        Requests that ask for prompt logprobs need the logits of every prompt token, so nothing is skipped.
        """
        if not self.caches_prefixes or request.params.prompt_logprobs is not None:
            return []
        self._extend_hashes(request)
        num_usable = (request.num_tokens - 1) // self.block_size
        return self.cache.match(request.block_hashes[:num_usable], request.token_ids, request.salt)

    def can_admit(self, request: Request, matched: list[Block], num_new: int, keep_watermark: bool) -> bool:
        """Whether the pool can serve the request's first `num_new` tokens after its cached ones."""
        num_tokens = len(matched) * self.block_size + num_new
        num_fresh = blocks_needed(num_tokens, self.block_size) - len(matched)
        num_revived = sum(block.ref_count == 0 for block in matched)  # a hit on a free block uses a free block
        reserve = self.num_watermark if keep_watermark else 0
        return num_fresh + num_revived + reserve <= self.pool.num_free

    def adopt(self, request: Request, matched: list[Block]) -> None:
        """Start the request's table with cached blocks; their tokens count as computed."""
        assert not request.block_ids and request.num_computed == 0
        for block in matched:
            self.pool.share(block)
        request.block_ids = [block.id for block in matched]
        request.num_computed = len(matched) * self.block_size
        request.num_published = len(matched)
        last_entry = matched[-1].entry if matched else None
        request.cache_parent = last_entry.serial if last_entry else request.salt
        if matched:
            self.events.emit(PrefixHit(self.step, request.id, tuple(request.block_ids), request.num_computed))

    def grow(self, request: Request, num_new: int) -> bool:
        """Extend the table for `num_new` more tokens; False, and nothing changed, when the pool is short."""
        num_blocks = blocks_needed(request.num_computed + num_new, self.block_size)
        num_missing = num_blocks - len(request.block_ids)
        if num_missing <= 0:
            return True
        if num_missing > self.pool.num_free:
            return False
        fresh_ids = tuple(self._take() for _ in range(num_missing))
        request.block_ids.extend(fresh_ids)
        self.taken_ids.extend(fresh_ids)
        self.events.emit(BlocksTaken(self.step, request.id, fresh_ids))
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
            block_hash = request.block_hashes[index]
            request.cache_parent = self.cache.insert(block, request.cache_parent, block_hash, token_ids)
            if block.entry is not None:
                self.events.emit(BlockCached(self.step, request.id, block.id, block_hash))
        request.num_published = num_full

    def release(self, request: Request) -> None:
        """Give the whole table back, tail first, so that the ends of prefixes are evicted before their starts."""
        if request.block_ids:
            self.events.emit(BlocksReleased(self.step, request.id, tuple(request.block_ids)))
        for block_id in reversed(request.block_ids):
            self.pool.release(self.pool.blocks[block_id])
        request.block_ids = []
        request.num_computed = request.num_published = 0
        request.cache_parent = None

    def reset_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing changed, while any block is in use."""
        if self.pool.num_free < self.pool.num_usable:
            return False
        for block in self.pool.blocks:
            if block.entry is not None:
                self._evict(block)
        return True

    def _take(self) -> int:
        """The first free block: an empty one if there is any, else the least recently freed is evicted."""
        if self.pool.first_free().entry is not None:
            self._evict(self.pool.first_free())
        return self.pool.take().id

    def _evict(self, block: Block) -> None:
        self.cache.evict(block)
        self.pool.move_to_front(block)
        self.events.emit(Evicted(self.step, block.id))

    def _extend_hashes(self, request: Request) -> None:
        """Hash the full blocks of the known tokens that are not hashed yet."""
        hashes, size = request.block_hashes, self.block_size
        for start in range(len(hashes) * size, request.num_tokens - size + 1, size):
            parent_hash = hashes[-1] if hashes else root_hash(request.salt)
            hashes.append(chain_hash(parent_hash, request.token_ids[start : start + size]))
