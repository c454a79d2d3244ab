"""From events to the state of the pool: a pure fold, the same for a live engine and for a recorded trace.

Invariant: every physical block is exactly one of null, empty, cached but free, or live; their counts sum to num_blocks.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from minivllm.errors import MiniVLLMError
from minivllm.events import (
    Added,
    Admitted,
    BlockCached,
    BlocksReleased,
    BlocksTaken,
    Event,
    Evicted,
    Finished,
    Preempted,
    PrefixHit,
    Refused,
    StepRan,
)
from minivllm.views.sentences import published_sentence, sentence

NULL_BLOCK = 0
NUM_DECISIONS = 8  # sentences that are kept
NUM_GONE = 64  # finished requests that are remembered, so that a long run needs bounded memory


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request as the events tell it; `ordinal` counts arrivals from 0 and chooses colour and letter."""

    request_id: str
    ordinal: int
    status: str  # waiting, running, preempted, finished or refused
    num_prompt: int = 0
    num_computed: int = 0
    block_ids: tuple[int, ...] = ()
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class BlockState:
    """One physical block: who holds it, whether it holds published contents, and how many slots hold K and V."""

    block_id: int
    owners: tuple[str, ...]  # request ids in order of arrival
    is_cached: bool
    num_filled: int

    @property
    def ref_count(self) -> int:
        return len(self.owners)

    @property
    def kind(self) -> str:
        """null, empty, cached (free, contents kept) or live."""
        if self.block_id == NULL_BLOCK:
            return "null"
        if self.owners:
            return "live"
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

    def request(self, request_id: str) -> RequestState | None:
        return next((r for r in self.requests if r.request_id == request_id), None)

    @property
    def holders(self) -> tuple[RequestState, ...]:
        """Requests that hold blocks now."""
        return tuple(r for r in self.requests if r.block_ids)

    @property
    def num_live(self) -> int:
        return sum(block.kind == "live" for block in self.blocks)

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


def pool_state(header: Mapping[str, object], events: Iterable[Event]) -> PoolState:
    """The pool after `events`, for the pool that `header` describes."""
    fold = PoolFold(header)
    for event in events:
        fold.apply(event)
    return fold.state()


@dataclass(slots=True)
class _Request:
    """A request while it is folded."""

    request_id: str
    ordinal: int
    status: str = "waiting"
    num_prompt: int = 0
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0

    def frozen(self) -> RequestState:
        return RequestState(
            self.request_id, self.ordinal, self.status, self.num_prompt, self.num_computed,
            tuple(self.block_ids), self.num_preemptions,
        )  # fmt: skip


class PoolFold:
    """Applies events one by one; `state()` freezes what it knows. Raises MiniVLLMError on what no pool can do."""

    def __init__(self, header: Mapping[str, object]) -> None:
        self.num_blocks = header_count(header, "num_blocks")
        self.block_size = header_count(header, "block_size")
        self.step = 0
        self._num_arrived = 0
        self._requests: dict[str, _Request] = {}
        self._gone: deque[str] = deque()
        self._cached: set[int] = set()
        self._owners: dict[int, dict[str, int]] = {}  # block id -> request id -> its arrival number
        self._decisions: deque[str] = deque(maxlen=NUM_DECISIONS)
        self._run: tuple[BlockCached, ...] = ()  # published one after the other, told in one sentence

    def apply(self, event: Event) -> None:
        """Take in one event. Events of kinds that do not touch blocks only move the step and the sentences."""
        match event:
            case Added(request_id=request_id, num_prompt=num_prompt):
                self._request(request_id).num_prompt = num_prompt
            case PrefixHit(request_id=request_id, block_ids=block_ids):
                self._join(event, request_id, block_ids)
            case BlocksTaken(request_id=request_id, block_ids=block_ids):
                self._take(event, request_id, block_ids)
            case BlockCached():
                self._publish(event)
            case Evicted(block_id=block_id):
                self._cached.discard(self._known(event, block_id))
            case BlocksReleased(request_id=request_id, block_ids=block_ids):
                self._release(event, request_id, block_ids)
            case Admitted(request_id=request_id, num_computed=num_computed, num_preemptions=num_preemptions):
                request = self._request(request_id)
                request.status, request.num_computed = "running", num_computed
                request.num_preemptions = num_preemptions
            case Preempted(request_id=request_id):
                self._request(request_id).status = "preempted"
            case Finished(request_id=request_id):
                self._leave(request_id, "finished")
            case Refused(request_id=request_id):
                self._leave(request_id, "refused")
            case StepRan(scheduled=scheduled):
                self._store(scheduled)
        self.step = max(self.step, event.step)
        if not isinstance(event, BlockCached):
            self._run = ()
        if words := sentence(event):
            self._decisions.append(words)

    def state(self) -> PoolState:
        filled = self._filled()
        blocks = tuple(
            BlockState(
                block_id,
                tuple(sorted(owners, key=owners.__getitem__)) if (owners := self._owners.get(block_id)) else (),
                block_id in self._cached,
                filled.get(block_id, self.block_size if block_id in self._cached else 0),
            )
            for block_id in range(self.num_blocks)
        )
        requests = tuple(request.frozen() for request in self._requests.values())
        return PoolState(self.step, self.block_size, self.num_blocks, requests, blocks, tuple(self._decisions))

    def _request(self, request_id: str) -> _Request:
        """The request, made known on its first event."""
        if request_id not in self._requests:
            self._requests[request_id] = _Request(request_id, self._num_arrived)
            self._num_arrived += 1
        return self._requests[request_id]

    def _known(self, event: Event, block_id: int) -> int:
        if not NULL_BLOCK < block_id < self.num_blocks:
            raise _impossible(event, f"block {block_id} is not one of 1 .. {self.num_blocks - 1}")
        return block_id

    def _join(self, event: Event, request_id: str, block_ids: tuple[int, ...]) -> None:
        request = self._request(request_id)
        for block_id in block_ids:
            owners = self._owners.setdefault(self._known(event, block_id), {})
            if request_id in owners:
                raise _impossible(event, f"block {block_id} is already in the table of request {request_id}")
            owners[request_id] = request.ordinal
        request.block_ids.extend(block_ids)

    def _take(self, event: Event, request_id: str, block_ids: tuple[int, ...]) -> None:
        for block_id in block_ids:
            if self._owners.get(block_id):
                raise _impossible(event, f"block {block_id} has an owner and was handed out again")
        self._join(event, request_id, block_ids)
        self._cached.difference_update(block_ids)  # what they held will be written over

    def _publish(self, event: BlockCached) -> None:
        self._cached.add(self._known(event, event.block_id))
        if self._run and (self._run[0].step, self._run[0].request_id) == (event.step, event.request_id):
            self._decisions.pop()
        else:
            self._run = ()
        self._run += (event,)
        block_ids = tuple(published.block_id for published in self._run)
        self._decisions.append(published_sentence(event.step, event.request_id, block_ids))

    def _release(self, event: Event, request_id: str, block_ids: tuple[int, ...]) -> None:
        request = self._request(request_id)
        if list(block_ids) != request.block_ids:
            raise _impossible(event, f"request {request_id} holds {request.block_ids}, not {list(block_ids)}")
        for block_id in block_ids:
            owners = self._owners[block_id]
            del owners[request_id]
            if not owners:
                del self._owners[block_id]
        request.block_ids.clear()
        request.num_computed = 0

    def _leave(self, request_id: str, status: str) -> None:
        self._request(request_id).status = status
        self._gone.append(request_id)
        if len(self._gone) > NUM_GONE:
            self._requests.pop(self._gone.popleft(), None)

    def _store(self, scheduled: tuple[tuple[str, int, int], ...]) -> None:
        for request_id, _, num_stored in scheduled:
            request = self._requests.get(request_id)
            if request is not None and request.block_ids:  # else it finished in this step and let go
                request.num_computed = num_stored

    def _filled(self) -> dict[int, int]:
        """Slots that hold K and V, for each live block; owners of a shared block agree or the furthest counts."""
        filled: dict[int, int] = {}
        for request in self._requests.values():
            for index, block_id in enumerate(request.block_ids):
                num_here = min(max(request.num_computed - index * self.block_size, 0), self.block_size)
                filled[block_id] = max(filled.get(block_id, 0), num_here)
        return filled


def header_count(header: Mapping[str, object], key: str) -> int:
    """A whole number of a trace's header, at least 1."""
    value = header.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MiniVLLMError(f"the trace's header needs a whole number {key!r} of at least 1, it has {value!r}")
    return value


def _impossible(event: Event, why: str) -> MiniVLLMError:
    return MiniVLLMError(f"step {event.step}, {type(event).__name__}: {why}; was the trace recorded from the start?")
