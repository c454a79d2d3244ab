"""What happened, as frozen facts in the past tense; trace.py records, saves and loads them.

Events hold ids and counts, never live objects: whoever draws them cannot disturb what runs.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in step `step`; steps count from 1, and 0 is before the first."""

    step: int


@dataclass(frozen=True, slots=True)
class Added(Event):
    """A request arrived and waits."""

    request_id: str
    num_prompt: int
    max_tokens: int
    priority: int


@dataclass(frozen=True, slots=True)
class Waited(Event):
    """The head of the queue was not admitted: reason is no_seat, no_budget, no_blocks, just_preempted or batch_runs.

    Or one in the queue was passed over, as what it begins with is computed by another in this step: prefix_under_way.
    """

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PrefixHit(Event):
    """The first tokens of an admitted request were found in the prefix cache; the last block may be used in part.

    Told for each group of layers; tables of groups with a sliding window begin with null blocks.
    """

    request_id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class Admitted(Event):
    """A waiting request began (or, after a preemption, began again) with `num_computed` tokens already stored.

    Reason: fits (seat, budget and blocks above the watermark), alone (nobody else runs: the watermark is waived),
    new_batch (static batching: the last batch is over), swapped_in (its blocks came back from the host).
    """

    request_id: str
    num_computed: int
    num_preemptions: int
    reason: str = "fits"


@dataclass(frozen=True, slots=True)
class Evicted(Event):
    """A free block lost its cached contents because the pool needed it."""

    block_id: int


@dataclass(frozen=True, slots=True)
class BlocksTaken(Event):
    """Blocks left the free list and were appended to a request's block table, that of a group of layers."""

    request_id: str
    block_ids: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlockCached(Event):
    """A full block entered the prefix cache under its chained hash."""

    request_id: str
    block_id: int
    block_hash: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class BlocksReleased(Event):
    """A request let go of all it held, by position in its tables; a block nobody else holds becomes free."""

    request_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preempted(Event):
    """A running request lost its blocks to make room.

    Reason: no_blocks (one before it in the order had to grow), itself (it had to grow and is the last in the order),
    held (it waits for its owner's choice while others cannot run). How: recompute (`num_computed` tokens must be
    computed again) or swap (they wait in host memory).
    """

    request_id: str
    num_computed: int
    reason: str = "no_blocks"
    how: str = "recompute"


@dataclass(frozen=True, slots=True)
class Forked(Event):
    """A request was split off another: it began with the same tokens and, where it got a seat, the same blocks.

    `other_tables` are those of the groups of layers beyond the first.
    """

    request_id: str
    parent_id: str
    block_ids: tuple[int, ...]
    num_computed: int
    other_tables: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class BlockCopied(Event):
    """Copy-on-write: a request was about to write to a shared or cached block and got a copy in its place."""

    request_id: str
    source_id: int
    block_id: int


@dataclass(frozen=True, slots=True)
class BlockExchanged(Event):
    """A request's block turned out to be a duplicate; its table now names the cached one."""

    request_id: str
    block_id: int
    cached_id: int


@dataclass(frozen=True, slots=True)
class BlocksReserved(Event):
    """A contiguous allocator set blocks aside for a request; its table takes them one by one."""

    request_id: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksDropped(Event):
    """Blocks fell out of the sliding window of a group's layers; its table keeps the null block in their places."""

    request_id: str
    block_ids: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class SwappedOut(Event):
    """The contents of a request's blocks went to host blocks; the blocks themselves are released after."""

    request_id: str
    block_ids: tuple[int, ...]
    host_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SwappedIn(Event):
    """A request's contents came back from the host into fresh blocks, which became its tables.

    They are listed by position, for each position the first group's before the others'.
    """

    request_id: str
    block_ids: tuple[int, ...]
    host_ids: tuple[int, ...]
    num_dropped: tuple[int, ...] = (0,)  # by group: null blocks with which its table begins

    @property
    def tables(self) -> list[list[int]]:
        """By group of layers, null blocks included."""
        remaining = iter(self.block_ids)
        tables: list[list[int]] = [[] for _ in self.num_dropped]
        for index in range((len(self.block_ids) + sum(self.num_dropped)) // len(tables)):
            for table, num_dropped in zip(tables, self.num_dropped, strict=True):
                table.append(0 if index < num_dropped else next(remaining))
        return tables


@dataclass(frozen=True, slots=True)
class Pinned(Event):
    """A cached prefix was pinned under a name: its blocks cannot be evicted."""

    name: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unpinned(Event):
    """A pinned prefix was let go."""

    name: str
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """A request left: reason is stop, length or abort."""

    request_id: str
    reason: str
    num_output: int


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A request was turned away at the door."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StepRan(Event):
    """One step ended. `scheduled` holds (request id, new tokens, tokens stored after it); times in milliseconds."""

    scheduled: tuple[tuple[str, int, int], ...]
    new_tokens: tuple[tuple[str, tuple[int, ...]], ...]
    num_running: int
    num_waiting: int
    num_free: int
    schedule_ms: float
    run_ms: float
    update_ms: float
    state_hash: str


@dataclass(frozen=True, slots=True)
class StepCosted(Event):
    """What a step had to move and to do, told after its StepRan where somebody keeps a ledger (lab/ledger.py).

    Bytes of weights, of K and V, of logits; the least time that they and the FLOPs take at the machine's rates, as if
    the shorter of the two were hidden behind the longer.
    """

    weight_bytes: int
    kv_bytes: int
    logit_bytes: int
    flops: int
    floor_ms: float
    run_ms: float  # measured: from the step's launch, or the end of the one before, until its tokens were there
    unhidden_ms: float = 0.0  # of the floor: arithmetic beyond the moving; above 0, the step is bound by compute

    @property
    def remainder_ms(self) -> float:
        """What the floor does not explain."""
        return self.run_ms - self.floor_ms


Listener = Callable[[Event], None]


class EventBus:
    """Hands each event to whoever listens; with nobody there `emit` is one test of an empty list."""

    def __init__(self) -> None:
        self._listeners, self._last = list[Listener](), list[Listener]()
        self.hash_readers: list[Listener] = []  # of StepRan.state_hash, a look at the whole pool; none: it is ""

    def __bool__(self) -> bool:
        return bool(self._listeners or self._last)

    def listen(self, listener: Listener, *, is_last: bool = False, wants_hash: bool = True) -> Callable[[], None]:
        """Call `listener` with every event from now on; the returned function ends that.

        `is_last` puts it behind all others, also those to come: what it emits itself, they hear after what it heard.
        """
        on_stop = ExitStack()
        for listeners in (self._last if is_last else self._listeners, *([self.hash_readers] if wants_hash else [])):
            listeners.append(listener)
            on_stop.callback(listeners.remove, listener)
        return on_stop.close

    def emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)
        for listener in self._last:
            listener(event)
