"""The state of the pool at one moment, as pictures need it; pool_fold.py makes it from events.

Invariant: every physical block is exactly one of null, empty, cached but free, reserved, or live; their counts sum to
num_blocks.
"""

from dataclasses import dataclass

NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request as the events tell it; `ordinal` counts arrivals from 0 and chooses colour and letter."""

    request_id: str
    ordinal: int
    status: str  # waiting, running, preempted, swapped, finished, refused; pinned stands for a pinned prefix
    num_prompt: int = 0
    num_computed: int = 0
    block_ids: tuple[int, ...] = ()
    num_preemptions: int = 0
    other_tables: tuple[tuple[int, ...], ...] = ()  # of the groups of layers beyond the first
    reserved_ids: tuple[int, ...] = ()  # set aside by a contiguous allocator, and not in the table yet
    host_ids: tuple[int, ...] = ()  # what was swapped out waits there

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """By group of layers; a null block stands where a window has passed."""
        return self.block_ids, *self.other_tables


@dataclass(frozen=True, slots=True)
class BlockState:
    """One physical block: who holds it, whether it holds published contents, and how many slots hold K and V."""

    block_id: int
    owners: tuple[str, ...]  # request ids in order of arrival
    is_cached: bool
    num_filled: int
    is_reserved: bool = False  # held, and not in a table yet

    @property
    def ref_count(self) -> int:
        return len(self.owners)

    @property
    def kind(self) -> str:
        """null, empty, cached (free, contents kept), reserved or live."""
        if self.block_id == NULL_BLOCK:
            return "null"
        if self.owners:
            return "reserved" if self.is_reserved else "live"
        return "cached" if self.is_cached else "empty"


@dataclass(frozen=True, slots=True)
class PoolState:
    """The whole pool at one moment."""

    step: int
    block_size: int
    num_blocks: int
    requests: tuple[RequestState, ...]
    blocks: tuple[BlockState, ...]
    decisions: tuple[str, ...]
    host: tuple[str | None, ...] = ()  # who holds host blocks 1, 2 ...

    def request(self, request_id: str) -> RequestState | None:
        return next((r for r in self.requests if r.request_id == request_id), None)

    @property
    def holders(self) -> tuple[RequestState, ...]:
        """Requests that hold blocks of the pool now."""
        return tuple(r for r in self.requests if r.block_ids or r.reserved_ids)

    @property
    def owners(self) -> tuple[RequestState, ...]:
        """Requests that hold blocks now, here or on the host."""
        return tuple(r for r in self.requests if r.block_ids or r.reserved_ids or r.host_ids)

    @property
    def num_live(self) -> int:
        return sum(block.kind == "live" for block in self.blocks)

    @property
    def num_reserved(self) -> int:
        return sum(block.kind == "reserved" for block in self.blocks)

    @property
    def num_on_host(self) -> int:
        return sum(owner is not None for owner in self.host)

    @property
    def num_shared(self) -> int:
        return sum(block.ref_count > 1 for block in self.blocks)

    @property
    def num_cached_free(self) -> int:
        return sum(block.kind == "cached" for block in self.blocks)

    @property
    def num_empty(self) -> int:
        return sum(block.kind == "empty" for block in self.blocks)

    @property
    def num_free(self) -> int:
        """Blocks the pool can still hand out: empty ones first, then cached ones."""
        return self.num_empty + self.num_cached_free

    @property
    def num_wasted_slots(self) -> int:
        """Slots of live blocks that hold nothing: each request's tail, always less than one block."""
        return sum(self.block_size - block.num_filled for block in self.blocks if block.kind == "live")

    @property
    def num_live_slots(self) -> int:
        return self.num_live * self.block_size
