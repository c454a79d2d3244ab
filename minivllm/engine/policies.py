"""Who goes first: a policy is a sort key over requests; the smallest key runs first, the largest is preempted first."""

from bisect import insort
from collections.abc import Callable, Iterator

from minivllm.request import Request

Key = Callable[[Request], tuple[int, ...]]


def fcfs(request: Request) -> tuple[int, ...]:
    """First come, first served; a preempted request keeps its arrival and so its place at the front."""
    return (request.arrival,)


def priority(request: Request) -> tuple[int, ...]:
    """Lower priority value first, then by arrival."""
    return (request.priority, request.arrival)


POLICIES: dict[str, Key] = {"fcfs": fcfs, "priority": priority}


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
