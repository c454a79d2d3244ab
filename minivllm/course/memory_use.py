"""Where the KV memory of a recorded run went, step by step, in the words of Kwon et al. (SOSP 2023, section 3.1).

    one run of a contiguous allocator: 5 tokens stored, 8 when it ends; 12 slots were asked for, buddies gave 16
    [ # # # # # ][ - - - ][ . . . . ][ x x x x ]
      live        reserved  internal   external

    live      slots with K and V of a token, in blocks that a running request (or a pinned prefix) holds
    reserved  slots that will be filled before their block is let go; known from the rest of the trace, and where that
              ends first, from max_tokens
    internal  slots set aside and never filled, "only realized after a request has finished sampling": what was asked
              for in vain, tails of pages; also what an ended request still holds in a static batch
    external  "never used for generated tokens, which is known before serving a request": what a run has beyond what
              was asked for, rounded to blocks or buddies; and every free slot while the next request waits for blocks
    cached, empty    free slots that the next request may use, with and without contents of the prefix cache

Invariant: the six sum to the pool. A shared block counts once. The moment is when a step has run: its K and V are
stored, and who ends with it has not left. Contents that were swapped to the host are no part of the pool.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minivllm.course.memory_fold import Booked, MemoryFold, power_of_two, read_count
from minivllm.draft_events import BlocksTrimmed
from minivllm.errors import MiniVLLMError
from minivllm.events import (
    BlockCached,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksReserved,
    Event,
    Finished,
    Forked,
    StepRan,
    Waited,
)
from minivllm.trace import Trace

BY_BUDDIES = ("power_of_two", "buddy")  # allocators whose runs have a power of two of blocks
PARTS = ("live", "reserved", "internal", "external", "cached", "empty")
OF_UPDATE = (  # what a step emits after computing
    BlockCached, BlockExchanged, BlocksDropped, BlocksTrimmed, Finished, Forked, StepRan,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Slots of the pool by use while one step ran."""

    step: int
    num_requests: int  # that computed in this step
    live: int
    reserved: int
    internal: int
    external: int
    cached: int
    empty: int
    bytes_per_slot: int  # K and V of one token, in all layers that a block serves
    is_short: bool  # the next request waited for blocks

    @property
    def num_slots(self) -> int:
        """The pool."""
        return sum(getattr(self, part) for part in PARTS)

    def in_bytes(self) -> dict[str, int]:
        return {part: getattr(self, part) * self.bytes_per_slot for part in PARTS}


@dataclass(frozen=True, slots=True)
class Shares:
    """Averages over steps. A bar of figure 2: percent of the pool, where `external` is all that is not set aside."""

    live: float
    reserved: float
    internal: float
    external: float
    num_requests: float
    live_slots_per_request: float


def memory_over_time(trace: Trace) -> list[MemoryUse]:
    """One MemoryUse for each step that ran; the trace must begin before the first request.

    Raises MiniVLLMError for a trace that does not, and for a header without the sizes.
    """
    fold = MemoryFold(trace.header)
    for _ in follow(fold, trace):
        pass
    num_slots = (fold.num_blocks - 1) * fold.block_size  # the null block holds nothing
    bytes_per_slot = read_count(trace.header, "kv_bytes_per_token")
    return [_split(booked, num_filled, num_slots, bytes_per_slot) for booked, num_filled in fold.booked()]


def follow(fold: MemoryFold, trace: Trace) -> Iterator[StepRan]:
    """Fold a whole trace, stopping at each step in the moment that counts: it has run, and nobody has left yet."""
    ran = {event.step: event for event in trace if isinstance(event, StepRan)}
    for event in trace:
        step = ran.get(event.step)
        if step is not None and step.step != fold.last_step and _is_of_update(event, step):
            fold.book(step)
            yield step
        fold.apply(event)


def saturated(uses: Sequence[MemoryUse], warm_up: float = 0.25) -> Sequence[MemoryUse]:
    """From the first to the last step in which a request waited for blocks, less a share `warm_up` at the start."""
    short = [index for index, use in enumerate(uses) if use.is_short]
    if not short:
        raise MiniVLLMError("no request ever waited for blocks: the pool was never full; play more requests at once")
    first, end = short[0], short[-1] + 1
    return uses[first + int(warm_up * (end - first)) : end]


def average(uses: Sequence[MemoryUse]) -> Shares:
    """Mean over steps, as in figures 2 and 13."""
    if not uses:
        raise MiniVLLMError("no steps to average over; play a longer run")
    slots = {part: sum(getattr(use, part) for use in uses) for part in PARTS}
    percent = 100 / sum(slots.values())
    num_requests = sum(use.num_requests for use in uses)
    return Shares(
        live=slots["live"] * percent,
        reserved=slots["reserved"] * percent,
        internal=slots["internal"] * percent,
        external=(slots["external"] + slots["cached"] + slots["empty"]) * percent,
        num_requests=num_requests / len(uses),
        live_slots_per_request=slots["live"] / num_requests if num_requests else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that waited although as many slots as it needed were free, in pieces."""

    step: int
    request_id: str
    need: int  # slots in a row that the allocator looked for
    free: int
    largest_hole: int  # slots in a row; for buddies, of which they could make one run


def refusals(trace: Trace) -> list[Refusal]:
    """External fragmentation caught in the act: every wait for blocks with free >= need; none in a paged run."""
    fold, found = MemoryFold(trace.header), list[Refusal]()
    for event in trace:
        if isinstance(event, Waited) and event.reason == "no_blocks" and fold.allocator != "paged":
            refusal = _refusal(fold, event)
            if refusal.free >= refusal.need:
                found.append(refusal)
        fold.apply(event)
    return found


def _split(booked: Booked, num_filled: int, num_slots: int, bytes_per_slot: int) -> MemoryUse:
    free = num_slots - booked.held
    usable = 0 if booked.is_short else free
    cached = min(booked.cached_free, usable)
    return MemoryUse(
        step=booked.step,
        num_requests=booked.num_requests,
        live=booked.live,
        reserved=num_filled - booked.live,
        internal=booked.held - booked.rounded - num_filled,
        external=booked.rounded + free - usable,
        cached=cached,
        empty=usable - cached,
        bytes_per_slot=bytes_per_slot,
        is_short=booked.is_short,
    )


def _is_of_update(event: Event, step: StepRan) -> bool:
    """Whether the step had computed by then: before that only the scheduled reserve, and only others let go."""
    if isinstance(event, BlocksReleased | BlocksReserved):
        is_scheduled = any(event.request_id == id_ for id_, _, _ in step.scheduled)
        return is_scheduled == isinstance(event, BlocksReleased)
    return isinstance(event, OF_UPDATE)


def _refusal(fold: MemoryFold, event: Waited) -> Refusal:
    size = fold.block_size
    num_wanted = -(-fold.num_asked(event.request_id) // size)
    free = [not holders for holders in fold.holders[1:]]  # without the null block
    if fold.allocator in BY_BUDDIES:
        num_wanted, hole = power_of_two(num_wanted), _longest_buddy(free)
    else:
        hole = _longest_run(free)
    return Refusal(event.step, event.request_id, num_wanted * size, sum(free) * size, hole * size)


def _longest_run(free: Sequence[bool]) -> int:
    longest = length = 0
    for is_free in free:
        length = length + 1 if is_free else 0
        longest = max(longest, length)
    return longest


def _longest_buddy(free: Sequence[bool]) -> int:
    """The longest 2**k places that are free and begin at a multiple of 2**k."""
    length = 1 << len(free).bit_length() - 1
    while length and not any(all(free[start : start + length]) for start in range(0, len(free) - length + 1, length)):
        length //= 2
    return length
