"""Where a request's next blocks come from: paged, one by one, or one contiguous reservation for its whole life.

    paged          any free block, when it is needed: less than one block is wasted
    contiguous     max_model_len, whatever comes: most of it is never used
    power_of_two   the prompt, and its true output rounded up to a power of two: 25 -> 32
    oracle         the prompt and its true output: no over-reservation, and holes all the same
    buddy          prompt and output together, rounded up and aligned to a power of two: merges holes, wastes tails

The rivals are those of Kwon et al., "Efficient Memory Management for LLM Serving with PagedAttention" (SOSP 2023,
section 6.1). They know the true output because the request's max_tokens says so and EOS is ignored. A reservation is a
run of consecutive block ids, so the block table, the attention and the runner are the same for all.
"""

from collections.abc import Callable
from typing import Protocol

from minivllm.engine.block_pool import BlockPool
from minivllm.engine_config import EngineConfig
from minivllm.request import Request


def blocks_needed(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens`: blocks_needed(17, 16) == 2."""
    return -(-num_tokens // block_size)


def power_of_two(number: int) -> int:
    """The next power of two: power_of_two(25) == 32, power_of_two(32) == 32."""
    return 1 << (number - 1).bit_length() if number > 0 else 0


class Allocator(Protocol):
    """Hands out block ids; asks `can_take` first."""

    is_contiguous: bool

    def can_take(self, request: Request, num_blocks: int, num_spared: int = 0) -> bool: ...
    def take(self, request: Request, num_blocks: int) -> list[int]: ...
    def forget(self, request: Request) -> None: ...


class PagedAllocator:
    """Block by block from the pool; a cached block is evicted when no empty one is left."""

    is_contiguous = False

    def __init__(self, pool: BlockPool, make_empty: Callable[[], None]) -> None:
        self._pool = pool
        self._make_empty = make_empty  # sees to it that the first free block caches nothing

    def can_take(self, request: Request, num_blocks: int, num_spared: int = 0) -> bool:
        """Whether `num_blocks` can be had while `num_spared` stay free."""
        return num_blocks + num_spared <= self._pool.num_free

    def take(self, request: Request, num_blocks: int) -> list[int]:
        return [self._take_one() for _ in range(num_blocks)]

    def forget(self, request: Request) -> None:
        """Nothing was set aside."""

    def _take_one(self) -> int:
        self._make_empty()
        return self._pool.take().id


SizeRule = Callable[[Request, EngineConfig], int]


def whole_context(request: Request, config: EngineConfig) -> int:
    return config.max_model_len


def rounded_output(request: Request, config: EngineConfig) -> int:
    return min(request.num_prompt + power_of_two(request.max_tokens), config.max_model_len)


def true_length(request: Request, config: EngineConfig) -> int:
    return request.num_prompt + request.max_tokens


SIZE_RULES: dict[str, SizeRule] = {
    "contiguous": whole_context,
    "power_of_two": rounded_output,
    "oracle": true_length,
    "buddy": true_length,
}


class ContiguousAllocator:
    """One run of consecutive blocks per request, reserved when it is admitted, freed when it leaves.

    First fit takes the lowest hole that is long enough. Buddy (Knowlton 1965) rounds the length to a power of two and
    aligns the start to it.
    """

    is_contiguous = True

    def __init__(self, pool: BlockPool, config: EngineConfig, tell_reserved: Callable[[Request], None]) -> None:
        self._pool = pool
        self._config = config
        self._tell_reserved = tell_reserved
        self._size_rule = SIZE_RULES[config.allocator]
        self._is_buddy = config.allocator == "buddy"
        self.regions: dict[str, range] = {}  # block ids by request id

    def can_take(self, request: Request, num_blocks: int, num_spared: int = 0) -> bool:
        """Whether the request's reservation covers more blocks, or can be made."""
        if request.id in self.regions:
            return num_blocks <= len(request.reserved_ids)
        return self._find(self.num_reserved(request)) is not None

    def take(self, request: Request, num_blocks: int) -> list[int]:
        """The next blocks of the reservation, which the first call makes."""
        if request.id not in self.regions:
            self._reserve(request)
        taken, request.reserved_ids = request.reserved_ids[:num_blocks], request.reserved_ids[num_blocks:]
        return taken

    def forget(self, request: Request) -> None:
        """The request lets go of its blocks: the run is a hole again."""
        self.regions.pop(request.id, None)

    def num_reserved(self, request: Request) -> int:
        """Blocks that the request's reservation has."""
        num_blocks = blocks_needed(self._size_rule(request, self._config), self._config.block_size)
        return min(power_of_two(num_blocks), self._pool.num_usable) if self._is_buddy else num_blocks

    def _reserve(self, request: Request) -> None:
        size = self.num_reserved(request)
        start = self._find(size)
        assert start is not None, "can_take found the run"
        region = range(start, start + size)
        for block_id in region:
            self._pool.take(self._pool.blocks[block_id])
        self.regions[request.id] = region
        request.reserved_ids = list(region)
        self._tell_reserved(request)

    def _find(self, size: int) -> int | None:
        """The first id of the lowest hole of `size` blocks; None when there is none."""
        start = 1
        for region in [*sorted(self.regions.values(), key=lambda r: r.start), range(len(self._pool.blocks), 0)]:
            start = self._aligned(start, size)
            if start + size <= region.start:
                return start
            start = max(start, region.stop)
        return None

    def _aligned(self, start: int, size: int) -> int:
        """The next start that a buddy of this size may have: ids count from 1, so 1, 1 + size, 1 + 2 * size ..."""
        return 1 + blocks_needed(start - 1, size) * size if self._is_buddy else start


def build_allocator(
    config: EngineConfig,
    pool: BlockPool,
    make_empty: Callable[[], None],
    tell_reserved: Callable[[Request], None],
) -> Allocator:
    if config.allocator == "paged":
        return PagedAllocator(pool, make_empty)
    return ContiguousAllocator(pool, config, tell_reserved)
