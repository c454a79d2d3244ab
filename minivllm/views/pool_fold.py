"""From events to the state of the pool: a pure fold, the same for a live engine and for a recorded trace."""

from collections import deque
from collections.abc import Iterable, Mapping

from minivllm.draft_events import BlocksTrimmed
from minivllm.errors import MiniVLLMError
from minivllm.events import (
    Added,
    Admitted,
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
    Refused,
    StepRan,
    SwappedIn,
    SwappedOut,
    Unpinned,
)
from minivllm.views.pool_request import RequestFold
from minivllm.views.pool_state import NULL_BLOCK, BlockState, PoolState
from minivllm.views.sentences import published_sentence, sentence

NUM_DECISIONS = 8  # sentences that are kept
NUM_GONE = 64  # finished requests that are remembered, so that a long run needs bounded memory


def pool_state(header: Mapping[str, object], events: Iterable[Event]) -> PoolState:
    """The pool after `events`, for the pool that `header` describes."""
    fold = PoolFold(header)
    for event in events:
        fold.apply(event)
    return fold.state()


class PoolFold:
    """Applies events one by one; `state()` freezes what it knows. Raises MiniVLLMError on what no pool can do."""

    def __init__(self, header: Mapping[str, object]) -> None:
        self.num_blocks = header_count(header, "num_blocks")
        self.block_size = header_count(header, "block_size")
        self.step = 0
        self._num_arrived = 0
        self._requests: dict[str, RequestFold] = {}
        self._gone: deque[str] = deque()
        self._cached: set[int] = set()
        self._owners: dict[int, dict[str, int]] = {}  # block id -> request id -> its arrival number
        num_host_blocks = header.get("num_host_blocks")  # older traces lack it: then as many as were ever taken
        self._num_host_blocks = num_host_blocks if isinstance(num_host_blocks, int) else 0
        self._host: dict[int, str] = {}  # host block -> request id
        self._decisions: deque[str] = deque(maxlen=NUM_DECISIONS)
        self._run: tuple[BlockCached, ...] = ()  # published one after the other, told in one sentence

    def apply(self, event: Event) -> None:
        """Take in one event. Events of kinds that do not touch blocks only move the step and the sentences."""
        self._apply_to_blocks(event)
        self._apply_to_requests(event)
        self.step = max(self.step, event.step)
        if not isinstance(event, BlockCached):
            self._run = ()
        if words := sentence(event):
            self._decisions.append(words)

    def _apply_to_blocks(self, event: Event) -> None:
        match event:
            case PrefixHit(request_id=request_id, block_ids=block_ids, group=group):
                self._join(event, request_id, block_ids, group)
            case BlocksTaken(request_id=request_id, block_ids=block_ids, group=group):
                self._take(event, request_id, tuple(self._known(event, block_id) for block_id in block_ids), group)
            case SwappedOut(request_id=request_id, host_ids=host_ids):
                self._fill_host(event, request_id, host_ids)
            case SwappedIn(request_id=request_id):
                self._empty_host(self._request(request_id))
                for group, table in enumerate(event.tables):
                    self._take(event, request_id, tuple(table), group)
            case BlocksReserved(request_id=request_id, block_ids=block_ids):
                self._reserve(event, request_id, block_ids)
            case BlocksDropped(request_id=request_id, block_ids=block_ids):
                self._drop(event, request_id, block_ids)
            case BlocksTrimmed(request_id=request_id, block_ids=block_ids, group=group):
                self._trim(event, request_id, block_ids, group)
            case BlockCopied(request_id=request_id, source_id=old, block_id=new):
                self._exchange(event, request_id, old, new)
                self._cached.discard(new)
            case BlockExchanged(request_id=request_id, block_id=old, cached_id=new):
                self._exchange(event, request_id, old, new)
            case BlockCached():
                self._publish(event)
            case Evicted(block_id=block_id):
                self._cached.discard(self._known(event, block_id))
            case BlocksReleased(request_id=request_id, block_ids=block_ids):
                self._release(event, request_id, block_ids)
            case Pinned(name=name, block_ids=block_ids):
                self._join(event, f"pinned {name}", block_ids)
                self._request(f"pinned {name}").status = "pinned"
            case Unpinned(name=name, block_ids=block_ids):
                self._release(event, f"pinned {name}", block_ids)
                self._leave(f"pinned {name}", "finished")

    def _apply_to_requests(self, event: Event) -> None:
        match event:
            case Added(request_id=request_id, num_prompt=num_prompt):
                self._request(request_id).num_prompt = num_prompt
            case Admitted(request_id=request_id, num_computed=num_computed, num_preemptions=num_preemptions):
                request = self._request(request_id)
                request.status, request.num_computed = "running", num_computed
                request.num_preemptions = num_preemptions
            case Preempted(request_id=request_id, num_computed=num_computed, how=how):
                request = self._request(request_id)
                request.status = "swapped" if how == "swap" else "preempted"
                request.num_computed = num_computed if how == "swap" else 0  # they wait on the host
            case Forked():
                self._fork(event)
            case Finished(request_id=request_id):
                self._leave(request_id, "finished")
            case Refused(request_id=request_id):
                self._leave(request_id, "refused")
            case StepRan(scheduled=scheduled):
                self._store(scheduled)

    def state(self) -> PoolState:
        filled = self._filled()
        reserved = {block_id for request in self._requests.values() for block_id in request.reserved_ids}
        blocks = tuple(
            BlockState(
                block_id,
                tuple(sorted(owners, key=owners.__getitem__)) if (owners := self._owners.get(block_id)) else (),
                block_id in self._cached,
                filled.get(block_id, self.block_size if block_id in self._cached else 0),
                block_id in reserved,
            )
            for block_id in range(self.num_blocks)
        )
        requests = tuple(request.frozen() for request in self._requests.values())
        host = tuple(self._host.get(host_id) for host_id in range(1, self._num_host_blocks + 1))
        return PoolState(self.step, self.block_size, self.num_blocks, requests, blocks, tuple(self._decisions), host)

    def table(self, request_id: str) -> list[int]:
        """The first group's block table as it stands."""
        request = self._requests.get(request_id)
        return request.tables[0] if request else []

    def num_prompt(self, request_id: str) -> int:
        return self._request(request_id).num_prompt

    def num_owners(self, block_id: int) -> int:
        return len(self._owners.get(block_id, ()))

    def _request(self, request_id: str) -> RequestFold:
        if request_id not in self._requests:  # made known on its first event
            self._requests[request_id] = RequestFold(request_id, self._num_arrived)
            self._num_arrived += 1
        return self._requests[request_id]

    def _known(self, event: Event, block_id: int) -> int:
        if not NULL_BLOCK < block_id < self.num_blocks:
            raise _impossible(event, f"block {block_id} is not one of 1 .. {self.num_blocks - 1}")
        return block_id

    def _own(self, event: Event, request_id: str, block_ids: Iterable[int]) -> None:
        request = self._request(request_id)
        for block_id in block_ids:
            owners = self._owners.setdefault(self._known(event, block_id), {})
            if request_id in owners:
                raise _impossible(event, f"block {block_id} is already held by request {request_id}")
            owners[request_id] = request.ordinal

    def _disown(self, event: Event, request_id: str, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            owners = self._owners.get(block_id, {})
            if request_id not in owners:
                raise _impossible(event, f"block {block_id} is not held by request {request_id}")
            del owners[request_id]
            if not owners:
                del self._owners[block_id]

    def _join(self, event: Event, request_id: str, block_ids: tuple[int, ...], group: int = 0) -> None:
        self._own(event, request_id, (block_id for block_id in block_ids if block_id != NULL_BLOCK))
        self._request(request_id).table(group).extend(block_ids)

    def _take(self, event: Event, request_id: str, block_ids: tuple[int, ...], group: int = 0) -> None:
        request = self._request(request_id)
        if request.reserved_ids:
            if tuple(request.reserved_ids[: len(block_ids)]) != block_ids:
                raise _impossible(event, f"request {request_id} reserved {request.reserved_ids}, not {list(block_ids)}")
            del request.reserved_ids[: len(block_ids)]
            request.tables[0].extend(block_ids)
            return
        self._require_free(event, block_ids)
        self._join(event, request_id, block_ids, group)
        self._cached.difference_update(block_ids)  # what they held will be written over

    def _reserve(self, event: Event, request_id: str, block_ids: tuple[int, ...]) -> None:
        self._require_free(event, block_ids)
        self._own(event, request_id, block_ids)
        self._request(request_id).reserved_ids.extend(block_ids)

    def _require_free(self, event: Event, block_ids: tuple[int, ...]) -> None:
        for block_id in block_ids:
            if self._owners.get(block_id):
                raise _impossible(event, f"block {block_id} has an owner and was handed out again")

    def _drop(self, event: Event, request_id: str, block_ids: tuple[int, ...]) -> None:
        self._disown(event, request_id, block_ids)
        for table in self._request(request_id).tables:
            table[:] = [NULL_BLOCK if block_id in block_ids else block_id for block_id in table]

    def _trim(self, event: Event, request_id: str, block_ids: tuple[int, ...], group: int) -> None:
        self._disown(event, request_id, block_ids)
        if self._request(request_id).cut_off(len(block_ids), group) != block_ids:
            raise _impossible(event, f"the table of request {request_id} does not end in {list(block_ids)}")

    def _exchange(self, event: Event, request_id: str, old: int, new: int) -> None:
        self._own(event, request_id, [new])
        self._disown(event, request_id, [old])
        [table] = [table for table in self._request(request_id).tables if old in table]
        table[table.index(old)] = new

    def _fork(self, event: Forked) -> None:
        child, parent = self._request(event.request_id), self._request(event.parent_id)
        child.status = "running" if event.block_ids else "waiting"
        child.num_prompt, child.num_computed = parent.num_prompt, event.num_computed
        if child.reserved_ids:
            self._take(event, event.request_id, event.block_ids)
            return
        for group, table in enumerate((event.block_ids, *event.other_tables)):
            self._join(event, event.request_id, table, group)

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
        if list(block_ids) != request.held_ids:
            raise _impossible(event, f"request {request_id} holds {request.held_ids}, not {list(block_ids)}")
        self._disown(event, request_id, block_ids)
        request.tables, request.reserved_ids, request.num_computed = [[]], [], 0

    def _fill_host(self, event: Event, request_id: str, host_ids: tuple[int, ...]) -> None:
        if taken := [host_id for host_id in host_ids if host_id in self._host]:
            raise _impossible(event, f"host block {taken[0]} is held by request {self._host[taken[0]]}")
        self._host.update(dict.fromkeys(host_ids, request_id))
        self._request(request_id).host_ids = host_ids
        self._num_host_blocks = max(self._num_host_blocks, *host_ids)

    def _empty_host(self, request: RequestFold) -> None:
        for host_id in request.host_ids:
            del self._host[host_id]
        request.host_ids = ()

    def _leave(self, request_id: str, status: str) -> None:
        self._empty_host(self._request(request_id))
        self._request(request_id).status = status
        self._gone.append(request_id)
        if len(self._gone) > NUM_GONE and not self._requests[self._gone[0]].held_ids:
            self._requests.pop(self._gone.popleft(), None)

    def _store(self, scheduled: tuple[tuple[str, int, int], ...]) -> None:
        for request_id, _, num_stored in scheduled:
            request = self._requests.get(request_id)
            if request is not None and request.tables[0]:  # else it finished in this step and let go
                request.num_computed = num_stored

    def _filled(self) -> dict[int, int]:
        """Slots that hold K and V, for each live block; owners of a shared block agree or the furthest counts."""
        filled: dict[int, int] = {}
        for request in self._requests.values():
            for block_id, num_here in request.filled(self.block_size):
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
