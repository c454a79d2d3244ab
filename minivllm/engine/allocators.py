"""Where a request's next blocks come from: paged, one by one, or one contiguous run reserved for its whole life.

    allocator      length of the run                                 placed by   the name in Kwon et al., figure 2
    contiguous     max_model_len, whatever comes                     first fit   Orca (Max)
    power_of_two   prompt, and output rounded up: 25 -> 32           buddies     Orca (Pow2)
    buddy          every slot it will use, known beforehand          buddies     Orca (Oracle)
    oracle         the same                                          first fit   not there: tighter than all of Orca's
    paged          none: any free block, when it is needed                       vLLM

Each differs from the next in one thing: length (equal runs are placed alike by both), length, placement, paging. Kwon
et al., "Efficient Memory Management for LLM Serving with PagedAttention" (SOSP 2023, section 6.1), assume that Orca
places by buddies, and only so do their figures come out: the rounding of runs to powers of two is most of the external
fragmentation (`minivllm study allocators`). The output is known beforehand where max_tokens tells it and EOS
is ignored. A run is consecutive block ids, so block table, attention and runner are the same for all.
"""

from bisect import insort
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


def build_allocator(
    config: EngineConfig,
    pool: BlockPool,
    make_empty: Callable[[], None],
    tell_reserved: Callable[[Request], None],
) -> Allocator:
    if config.allocator == "paged":
        return PagedAllocator(pool, make_empty)
    return ContiguousAllocator(pool, config, tell_reserved)


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


class ContiguousAllocator:
    """One run of consecutive blocks per request, reserved when it is admitted, freed when it leaves."""

    is_contiguous = True

    def __init__(self, pool: BlockPool, config: EngineConfig, tell_reserved: Callable[[Request], None]) -> None:
        self._pool = pool
        self._config = config
        self._tell_reserved = tell_reserved
        self._num_slots, build_heap = RULES[config.allocator]
        self._heap = build_heap(pool.num_usable)
        self.runs: dict[str, range] = {}  # block ids by request id

    def can_take(self, request: Request, num_blocks: int, num_spared: int = 0) -> bool:
        """Whether the request's run has blocks left, or can be made. Nobody grows beyond a run: nothing is spared."""
        if request.id in self.runs:
            return num_blocks <= len(request.reserved_ids)
        return self._heap.fits(self.num_wanted(request))

    def take(self, request: Request, num_blocks: int) -> list[int]:
        """The next blocks of the run, which the first call reserves."""
        if request.id not in self.runs:
            self._reserve(request)
        taken, request.reserved_ids = request.reserved_ids[:num_blocks], request.reserved_ids[num_blocks:]
        return taken

    def forget(self, request: Request) -> None:
        """The request let go of its blocks: the run is a hole again."""
        run = self.runs.pop(request.id, None)
        if run is not None:
            self._heap.free(range(run.start - 1, run.stop - 1))

    def num_wanted(self, request: Request) -> int:
        """Blocks that the request asks for; buddies may give more."""
        return blocks_needed(self._num_slots(request, self._config), self._config.block_size)

    def _reserve(self, request: Request) -> None:
        run = self._heap.take(self.num_wanted(request))
        self.runs[request.id] = range(run.start + 1, run.stop + 1)  # the heap counts from 0, and block 0 is no block
        request.reserved_ids = list(self.runs[request.id])
        for block_id in request.reserved_ids:
            self._pool.take(self._pool.blocks[block_id])
        self._tell_reserved(request)


def whole_context(request: Request, config: EngineConfig) -> int:
    return config.max_model_len


def rounded_output(request: Request, config: EngineConfig) -> int:
    return min(request.num_prompt + power_of_two(request.max_tokens), config.max_model_len)


def true_length(request: Request, config: EngineConfig) -> int:
    """The K and V of the last token are never stored: nothing comes after it."""
    return request.num_prompt + request.max_tokens - 1


class Heap(Protocol):
    """A row of places, of which runs are taken and given back; `take` asserts that `fits`."""

    def fits(self, size: int) -> bool: ...
    def take(self, size: int) -> range: ...
    def free(self, run: range) -> None: ...


class FirstFit:
    """The lowest hole that is long enough; what a run leaves over stays a hole."""

    def __init__(self, num_places: int) -> None:
        self._end = range(num_places, num_places)
        self._runs: list[range] = []  # taken, in order

    def fits(self, size: int) -> bool:
        return self._find(size) is not None

    def take(self, size: int) -> range:
        start = self._find(size)
        assert start is not None, f"no hole of {size}: ask fits first"
        run = range(start, start + size)
        insort(self._runs, run, key=lambda taken: taken.start)
        return run

    def free(self, run: range) -> None:
        self._runs.remove(run)

    def _find(self, size: int) -> int | None:
        start = 0
        for taken in (*self._runs, self._end):
            if start + size <= taken.start:
                return start
            start = taken.stop
        return None


class Buddies:
    """Runs of 2**k places at multiples of 2**k (Knowlton 1965): split in halves to fit, merged when both are free.

    A row whose length is no power of two begins as several: 11 is 8 + 2 + 1. Who wants more than the longest of them,
    but no more than all, gets all: a pool of 11 can hold one request of 9.
    """

    def __init__(self, num_places: int) -> None:
        self._whole = range(num_places)
        self._starts: dict[int, list[int]] = {}  # of the free runs, by length
        self._free_whole()

    def fits(self, size: int) -> bool:
        return self._smallest(size) is not None or (size <= len(self._whole) and self._is_unused())

    def take(self, size: int) -> range:
        """The smallest free run that is long enough, and of those the lowest, cut down to the next power of two."""
        length, wanted = self._smallest(size), power_of_two(size)
        if length is None:
            assert size <= len(self._whole) and self._is_unused(), f"no run of {size}: ask fits first"
            self._starts = {}
            return self._whole
        start = min(self._starts[length])
        self._starts[length].remove(start)
        while length > wanted:
            length //= 2
            self._starts.setdefault(length, []).append(start + length)
        return range(start, start + length)

    def free(self, run: range) -> None:
        """Give a run back; its buddy differs from it in one bit of the start."""
        if run == self._whole:
            self._free_whole()
            return
        start, length = run.start, len(run)
        while start ^ length in self._starts.get(length, ()):
            self._starts[length].remove(start ^ length)
            start, length = start & ~length, length * 2
        self._starts.setdefault(length, []).append(start)

    def _free_whole(self) -> None:
        num_places, start = len(self._whole), 0
        self._starts = {}
        while start < num_places:
            length = 1 << (num_places - start).bit_length() - 1  # the highest bit of what is left
            self._starts[length] = [start]
            start += length

    def _smallest(self, size: int) -> int | None:
        return min((length for length, starts in self._starts.items() if starts and length >= size), default=None)

    def _is_unused(self) -> bool:
        return sum(length * len(starts) for length, starts in self._starts.items()) == len(self._whole)


SizeRule = Callable[[Request, EngineConfig], int]  # slots that a request asks for

RULES: dict[str, tuple[SizeRule, Callable[[int], Heap]]] = {
    "contiguous": (whole_context, FirstFit),
    "power_of_two": (rounded_output, Buddies),
    "buddy": (true_length, Buddies),
    "oracle": (true_length, FirstFit),
}
