"""Who goes first: a policy is a sort key over requests; the smallest key runs first, the largest is preempted first.

Where the cache decides (longest_prefix_first, dfs), requests run in the order of arrival and only the queue at the
door is rearranged, in every step, from what is cached then.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from functools import partial

from minivllm.engine.kv_manager import KVManager
from minivllm.engine.radix_cache import dfs_order
from minivllm.engine_config import EngineConfig
from minivllm.request import Request

Key = Callable[[Request], tuple[int, ...]]
NUM_REORDERED = 128  # of a longer queue only the head is rearranged: each look costs a match (as in SGLang)


def by_arrival(request: Request) -> tuple[int, ...]:
    """First come, first served; a preempted request keeps its arrival and so its place at the front."""
    return (request.arrival,)


def by_priority(request: Request, aging_steps: int | None = None) -> tuple[int, ...]:
    """Lower priority value first, then by arrival.

    With aging one unit is worth `aging_steps` steps of waiting. Everybody ages alike, so the order of two requests
    never changes and the key is constant: priority * aging_steps + the step of arrival. Nobody starves.
    """
    return _aged(request, request.priority, aging_steps)


def by_length(request: Request, aging_steps: int | None = None) -> tuple[int, ...]:
    """The request with the fewest tokens in all first (prompt and max_tokens); it ages per token of length."""
    return _aged(request, request.num_prompt + request.max_tokens, aging_steps)


def _aged(request: Request, value: int, aging_steps: int | None) -> tuple[int, ...]:
    if aging_steps is None:
        return (value, request.arrival)
    return (value * aging_steps + request.arrival_step, request.arrival)


def order_of(config: EngineConfig) -> Key:
    """The sort key of a scheduling policy."""
    if config.scheduling_policy == "priority":
        return partial(by_priority, aging_steps=config.aging_steps)
    if config.scheduling_policy == "shortest_first":
        return partial(by_length, aging_steps=config.aging_steps)
    return by_arrival


def at_the_door(config: EngineConfig, waiting: list[Request], kv: KVManager, step: int) -> list[Request]:
    """Waiting requests in the order in which they are looked at now.

    longest_prefix_first: most cached tokens first. dfs: a depth-first walk of the tree of all prompts, which reaches
    the best hit rate there is (Zheng et al., SGLang 2024, theorem 3.1). With aging, who has waited too long goes first.
    """
    if config.scheduling_policy not in ("longest_prefix_first", "dfs"):
        return waiting
    head, tail = waiting[:NUM_REORDERED], waiting[NUM_REORDERED:]
    patience = config.aging_steps
    aged = [r for r in head if patience is not None and step - r.arrival_step > patience]
    rest = [r for r in head if r not in aged]
    if config.scheduling_policy == "dfs":
        return aged + dfs_order(rest) + tail
    return aged + sorted(rest, key=lambda r: (-kv.match(r).num_tokens, r.arrival)) + tail


class RequestQueue:
    """Requests in the order of a policy."""

    def __init__(self, key: Key) -> None:
        self._key = key
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    @property
    def first(self) -> Request:
        return self._requests[0]

    @property
    def last(self) -> Request:
        return self._requests[-1]

    def add(self, request: Request) -> None:
        insort(self._requests, request, key=self._key)

    def remove(self, request: Request) -> None:
        self._requests.remove(request)
