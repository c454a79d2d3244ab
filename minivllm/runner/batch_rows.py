"""Which request sits in which row of the device's tables, from step to step: a row is rewritten only where it changed.

    step 1   row 0: A   row 1: B   row 2: C   row 3: D       B has ended, E is new
    step 2   row 0: A   row 1: D   row 2: C   row 3: E       the last takes the place, guests come behind

Rows 0 .. n - 1 are always full, so a batch of n is the first n rows, whatever the order of the plan.
"""

from collections.abc import Sequence

import numpy as np

from minivllm.request import Request


class BatchRows:
    """The requests of the latest step by row, and the host's copy of what the device knows of them."""

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self.requests: list[Request] = []
        self.table = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.temperatures = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self._row_of: dict[Request, int] = {}
        self._known: list[list[int]] = []  # block ids that the table has, by row

    def seat(self, scheduled: Sequence[tuple[Request, int]]) -> tuple[list[int], list[int]]:
        """Give every scheduled request a row; what changed in the table: places in its flat memory, and block ids."""
        guests = [request for request, _ in scheduled if request not in self._row_of]
        if len(self.requests) + len(guests) > len(scheduled):
            staying = {request for request, _ in scheduled}
            gone = [row for row, request in enumerate(self.requests) if request not in staying]
            for row in reversed(gone):
                self._leave(row)
        for guest in guests:
            self._sit(len(self.requests), guest)
        places, block_ids = list[int](), list[int]()
        for row, (known, request) in enumerate(zip(self._known, self.requests, strict=True)):
            if known != request.tables[0].block_ids:
                self._rewrite(row, request.tables[0].block_ids, places, block_ids)
        return places, block_ids

    def forget(self) -> None:
        """Hold no request any more."""
        self.requests, self._row_of, self._known = [], {}, []

    def _leave(self, row: int) -> None:
        """Empty a row and let the last request have it."""
        del self._row_of[self.requests[row]]
        last = self.requests.pop()
        self._known.pop()
        if row < len(self.requests):
            del self._row_of[last]
            self._sit(row, last)

    def _sit(self, row: int, request: Request) -> None:
        self.requests[row : row + 1] = [request]
        self._known[row : row + 1] = [[]]
        self._row_of[request] = row
        self.temperatures[row] = request.params.temperature
        self.seeds[row] = signed(request.seed)

    def _rewrite(self, row: int, held: list[int], places: list[int], block_ids: list[int]) -> None:
        """Bring a row up to date: mostly a block has come at its end."""
        known = self._known[row]
        first = len(known) if held[: len(known)] == known else 0
        self.table[row, first : len(held)] = held[first:]
        start = row * self.table.shape[1]
        places.extend(range(start + first, start + len(held)))
        block_ids.extend(held[first:])
        self._known[row] = held.copy()


def signed(seed: int) -> int:
    """The 64 bits of any seed as int64: signed(2**64 - 1) == -1."""
    return (seed + 2**63) % 2**64 - 2**63
