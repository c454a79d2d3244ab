"""From events to who holds which block and how far it is filled; the measures on top are in memory_use.py.

Invariant: a block that somebody holds is live from its first holder to its last, and is filled ever further meanwhile.
How far at the end of that life is known only then, so what was reserved comes out after the last event.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

from minivllm.draft_events import BlocksTrimmed
from minivllm.errors import MiniVLLMError
from minivllm.events import (
    Added,
    BlockCached,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksReserved,
    BlocksTaken,
    Event,
    Evicted,
    Finished,
    Forked,
    Pinned,
    Preempted,
    PrefixHit,
    StepRan,
    SwappedIn,
    Unpinned,
    Waited,
)

NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class Booked:
    """One step: slots by what is known of them at once, and those filled when their block's life is over."""

    step: int
    num_requests: int
    live: int
    held: int
    rounded: int
    cached_free: int
    is_short: bool


@dataclass(slots=True)
class Holding:
    """What the events told of a request so far."""

    num_prompt: int
    max_tokens: int
    num_stored: int = 0
    tables: dict[int, list[int]] = field(default_factory=dict)  # by group of layers
    reserved_ids: list[int] = field(default_factory=list)  # the rest of its run
    num_rounded: int = 0  # slots of its run beyond what was asked for: whole blocks, whole buddies


class MemoryFold:
    """Apply events in order; `book` a step between what it planned and what it let go."""

    def __init__(self, header: Mapping[str, object]) -> None:
        self.num_blocks, self.block_size = read_count(header, "num_blocks"), read_count(header, "block_size")
        self.allocator = str(header.get("allocator", "paged"))
        self.max_model_len = read_count(header, "max_model_len") if self.allocator != "paged" else 0
        self.requests: dict[str, Holding] = {}
        self.holders: list[set[str]] = [set() for _ in range(self.num_blocks)]
        self._users: list[set[str]] = [set() for _ in range(self.num_blocks)]  # holders that have not ended
        self._fill = [0] * self.num_blocks
        self._since = [0] * self.num_blocks  # how many steps were booked when the block's users came
        self._cached: set[int] = set()
        self._num_live = self._num_held = self._num_rounded = self._num_cached_free = 0
        self._is_short = False
        self._booked: list[Booked] = []
        self._filled_change: Counter[int] = Counter()  # of filled_at_last, by index of the step

    @property
    def last_step(self) -> int | None:
        return self._booked[-1].step if self._booked else None

    def book(self, step: StepRan) -> None:
        """The step has computed: its K and V are stored."""
        size = self.block_size
        for id_, num_new, _ in step.scheduled:
            request = self._request(id_)
            first, request.num_stored = request.num_stored // size, request.num_stored + num_new
            self._fill_table(request, first)
        held, cached_free = self._num_held * size, self._num_cached_free * size
        counts = self._num_live, held, self._num_rounded, cached_free
        self._booked.append(Booked(step.step, len(step.scheduled), *counts, self._is_short))
        self._is_short = False

    def booked(self) -> list[tuple[Booked, int]]:
        """Each step, and the slots of its blocks that are filled when their lives are over; ask once, at the end."""
        for block_id, users in enumerate(self._users):
            if users:
                self._end_life(block_id, max(self._fill[block_id], self._promised(block_id)))
        changes = (self._filled_change[index] for index in range(len(self._booked)))
        return list(zip(self._booked, accumulate(changes), strict=True))

    def apply(self, event: Event) -> None:
        """Follow one event."""
        match event:
            case Added(request_id=id_):
                self.requests[id_] = Holding(event.num_prompt, event.max_tokens)
            case Waited(reason="no_blocks"):
                self._is_short = True
            case PrefixHit(request_id=id_):
                self._cache(block_id for block_id in event.block_ids if block_id != NULL_BLOCK)
                self._extend(id_, event.block_ids, event.num_tokens, event.group)
            case BlocksReserved(request_id=id_):
                self._reserve(id_, event.block_ids)
            case BlocksTaken(request_id=id_):
                self._extend(id_, event.block_ids, group=event.group)
            case Forked(request_id=id_):
                for group, table in enumerate((event.block_ids, *event.other_tables)):
                    self._extend(id_, table, event.num_computed, group)
            case SwappedIn(request_id=id_):
                for group, block_ids in enumerate(event.tables):
                    self._extend(id_, block_ids, group=group)
            case BlockCopied(request_id=id_):
                self._replace(id_, event.source_id, event.block_id)
            case BlockExchanged(request_id=id_):
                self._replace(id_, event.block_id, event.cached_id)
            case BlocksDropped(request_id=id_):
                for block_id in event.block_ids:
                    self._replace(id_, block_id, NULL_BLOCK)
            case BlocksTrimmed(request_id=id_):
                self._trim(id_, event.block_ids, event.group)
            case Preempted(request_id=id_, how="swap"):
                self._request(id_).num_stored = event.num_computed  # they wait in host memory
            case BlocksReleased(request_id=id_):
                self._release(id_, event.block_ids)
            case Finished(request_id=id_):
                self._end_use(id_)
            case BlockCached(block_id=block_id):
                self._cache((block_id,))
            case Evicted(block_id=block_id):
                self._evict(block_id)
            case Pinned(name=name):
                self._cache(event.block_ids)
                for block_id in event.block_ids:
                    self._hold(f"pin {name}", block_id)
            case Unpinned(name=name):
                for block_id in event.block_ids:
                    self._let_go(f"pin {name}", block_id)

    def num_asked(self, request_id: str) -> int:
        """Slots in a row that a contiguous allocator is asked for."""
        request = self._request(request_id)
        return slots_asked(self.allocator, request.num_prompt, request.max_tokens, self.max_model_len)

    def _extend(self, id_: str, block_ids: Sequence[int], num_stored: int | None = None, group: int = 0) -> None:
        """Blocks were appended to a group's table; some may hold K and V already."""
        request = self._request(id_)
        request.num_stored = request.num_stored if num_stored is None else num_stored
        del request.reserved_ids[: len(block_ids)]
        table = request.tables.setdefault(group, [])
        first = len(table)
        table.extend(block_ids)
        for block_id in block_ids:
            self._hold(id_, block_id)
        self._fill_table(request, first)

    def _reserve(self, id_: str, block_ids: tuple[int, ...]) -> None:
        request = self._request(id_)
        request.reserved_ids = list(block_ids)
        request.num_rounded = len(block_ids) * self.block_size - self.num_asked(id_)
        self._num_rounded += request.num_rounded
        for block_id in block_ids:
            self._hold(id_, block_id)

    def _replace(self, id_: str, old_id: int, new_id: int) -> None:
        request = self._request(id_)
        [table] = [table for table in request.tables.values() if old_id in table]
        index = table.index(old_id)
        table[index] = new_id
        self._hold(id_, new_id)
        self._fill_table(request, index)
        self._let_go(id_, old_id)

    def _trim(self, id_: str, block_ids: Sequence[int], group: int) -> None:
        del self._request(id_).tables[group][-len(block_ids) :]
        for block_id in block_ids:
            self._let_go(id_, block_id)

    def _release(self, id_: str, block_ids: Iterable[int]) -> None:
        request = self._request(id_)
        for block_id in block_ids:
            self._let_go(id_, block_id)
        self._num_rounded -= request.num_rounded
        request.num_stored = request.num_rounded = 0
        request.tables, request.reserved_ids = {}, []

    def _hold(self, name: str, block_id: int) -> None:
        if block_id == NULL_BLOCK or name in self.holders[block_id]:
            return
        if not self.holders[block_id]:
            self._num_held += 1
            self._num_cached_free -= block_id in self._cached
            self._fill[block_id] = self.block_size if block_id in self._cached else 0
        if not self._users[block_id]:
            self._since[block_id] = len(self._booked)
            self._num_live += self._fill[block_id]
        self.holders[block_id].add(name)
        self._users[block_id].add(name)

    def _let_go(self, name: str, block_id: int) -> None:
        self._leave(name, block_id)
        self.holders[block_id].discard(name)
        if not self.holders[block_id]:
            self._num_held -= 1
            self._num_cached_free += block_id in self._cached

    def _end_use(self, id_: str) -> None:
        """An ended request still has blocks in a static batch: nobody reads them any more."""
        request = self._request(id_)
        for block_id in {*chain(*request.tables.values()), *request.reserved_ids} - {NULL_BLOCK}:
            self._leave(id_, block_id)

    def _leave(self, name: str, block_id: int) -> None:
        if name not in self._users[block_id]:
            return
        self._users[block_id].remove(name)
        if not self._users[block_id]:
            self._num_live -= self._fill[block_id]
            self._end_life(block_id, self._fill[block_id])

    def _end_life(self, block_id: int, num_filled: int) -> None:
        self._filled_change[self._since[block_id]] += num_filled
        self._filled_change[len(self._booked)] -= num_filled

    def _fill_table(self, request: Holding, first: int) -> None:
        for table in request.tables.values():
            for index in range(first, len(table)):
                block_id = table[index]
                more = min(self.block_size, request.num_stored - index * self.block_size) - self._fill[block_id]
                if more > 0 and block_id != NULL_BLOCK:
                    self._fill[block_id] += more
                    self._num_live += more

    def _promised(self, block_id: int) -> int:
        """How far a block of somebody who still runs will be filled, should nothing end that before max_tokens."""
        fills = [0]
        for id_ in self._users[block_id] & self.requests.keys():
            request = self.requests[id_]
            tables = request.tables.values() if block_id not in request.reserved_ids else ()
            [index] = [t.index(block_id) for t in tables if block_id in t] or [
                len(request.tables.get(0, [])) + request.reserved_ids.index(block_id)
            ]
            start = index * self.block_size
            fills.append(min(self.block_size, request.num_prompt + request.max_tokens - 1 - start))
        return max(fills)

    def _cache(self, block_ids: Iterable[int]) -> None:
        """Blocks hold cached contents; where the trace begins later than the cache, that is news."""
        for block_id in set(block_ids) - self._cached:
            self._cached.add(block_id)
            self._num_cached_free += not self.holders[block_id]

    def _evict(self, block_id: int) -> None:
        if block_id in self._cached:
            self._cached.remove(block_id)
            self._num_cached_free -= 1

    def _request(self, id_: str) -> Holding:
        if id_ not in self.requests:
            raise MiniVLLMError(f"{id_}: the trace begins after this request came; record from before the first one")
        return self.requests[id_]


def slots_asked(allocator: str, num_prompt: int, max_tokens: int, max_model_len: int) -> int:
    """Slots that a contiguous allocator asks for: slots_asked("power_of_two", 10, 25, 2048) == 10 + 32."""
    if allocator == "contiguous":
        return max_model_len
    if allocator == "power_of_two":
        return min(num_prompt + power_of_two(max_tokens), max_model_len)
    return num_prompt + max_tokens - 1  # the K and V of the last token are never stored


def power_of_two(number: int) -> int:
    """The next power of two: power_of_two(25) == 32."""
    return 1 << (number - 1).bit_length()


def read_count(header: Mapping[str, object], name: str) -> int:
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MiniVLLMError(f"the header of the trace has no {name}; record with LLM.record, which writes it")
    return value
