"""Which request sits in which row of the device's tables, from step to step: a row is rewritten only where it changed.

    step 1   row 0: A   row 1: B   row 2: C   row 3: D       B has ended, E is new
    step 2   row 0: A   row 1: D   row 2: C   row 3: E       the last takes the place, guests come behind

Rows 0 .. n - 1 are always full, so a batch of n is the first n rows, whatever the order of the plan.
"""

from collections.abc import Sequence

import numpy as np

from minivllm.request import Request, SamplingParams

WISHES = ("seeds", "temperatures", "top_k", "top_p", "min_p")  # how a row's token is to be chosen
NO_FILTERS = (0, 1.0, 0.0)


class BatchRows:
    """The requests of the latest step by row, and the host's copy of what the device knows of them."""

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self.requests: list[Request] = []
        self.special: set[int] = set()  # rows whose tokens the host must look at: logprobs, penalties, forks
        self.filtered: set[int] = set()  # rows that draw from the likeliest tokens only
        self.table = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.temperatures = np.zeros(max_num_seqs, np.float32)
        self.seeds = np.zeros(max_num_seqs, np.int64)
        self.top_k = np.zeros(max_num_seqs, np.int32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.came_from = np.arange(max_num_seqs, dtype=np.int32)  # each row's request, in the step before
        self._row_ids = self.came_from.copy()
        self.num_blocks = np.zeros(max_num_seqs, np.int64)  # of each row in the table
        self.arrangement = 0  # another number whenever the table changed elsewhere than at the end of a row
        self._row_of: dict[Request, int] = {}
        self._known: list[list[int]] = []  # block ids that the table has, by row
        self._places: list[int] = []  # of the table's flat memory, where the device is behind
        self._block_ids: list[int] = []  # what is to come there

    def seat(self, scheduled: Sequence[tuple[Request, int]]) -> list[Request]:
        """Give every scheduled request a row and bring the table up to date; the requests by row."""
        self.came_from[:] = self._row_ids
        guests = [request for request, _ in scheduled if request not in self._row_of]
        if len(self.requests) + len(guests) > len(scheduled):
            staying = {request for request, _ in scheduled}
            gone = [row for row, request in enumerate(self.requests) if request not in staying]
            for row in reversed(gone):
                self._leave(row)
        for guest in guests:
            self._sit(len(self.requests), guest)
        for row, (known, request) in enumerate(zip(self._known, self.requests, strict=True)):
            if known != request.tables[0].block_ids:
                self._rewrite(row, request.tables[0].block_ids)
        return self.requests

    def take_changes(self) -> tuple[list[int], list[int]]:
        """What has changed in the table since the last call: places in its flat memory, and block ids."""
        changes = self._places, self._block_ids
        self._places, self._block_ids = [], []
        return changes

    def _leave(self, row: int) -> None:
        """Empty a row and let the last request have it."""
        self.arrangement += 1
        del self._row_of[self.requests[row]]
        last = self.requests.pop()
        self._known.pop()
        self.special -= {row, len(self.requests)}
        self.filtered -= {row, len(self.requests)}
        if row < len(self.requests):
            del self._row_of[last]
            self._sit(row, last)
            self.came_from[row] = self.came_from[len(self.requests)]

    def _sit(self, row: int, request: Request) -> None:
        self.requests[row : row + 1] = [request]
        self._known[row : row + 1] = [[]]
        self._row_of[request] = row
        params = request.params
        self.temperatures[row], self.seeds[row] = params.temperature, signed(request.seed)
        self.top_k[row], self.top_p[row], self.min_p[row] = filters_of(params)
        if filters_of(params) != NO_FILTERS:
            self.filtered.add(row)
        if needs_host(request):
            self.special.add(row)

    def _rewrite(self, row: int, held: list[int]) -> None:
        """Bring a row up to date: mostly a block has come at its end."""
        known = self._known[row]
        first = len(known) if held[: len(known)] == known else 0
        if first == 0:
            self.arrangement += 1
        self.num_blocks[row] = len(held)
        self.table[row, first : len(held)] = held[first:]
        start = row * self.table.shape[1]
        self._places.extend(range(start + first, start + len(held)))
        self._block_ids.extend(held[first:])
        self._known[row] = held.copy()


def signed(seed: int) -> int:
    """The 64 bits of any seed as int64: signed(2**64 - 1) == -1."""
    return (seed + 2**63) % 2**64 - 2**63


def filters_of(params: SamplingParams) -> tuple[int, float, float]:
    """top_k, top_p and min_p as the sampler's kernel takes them; a greedy row has none."""
    return NO_FILTERS if params.is_greedy else (max(params.top_k, 0), params.top_p, params.min_p)


def needs_host(request: Request) -> bool:
    """Whether a token drawn on the device is not all that a request wants."""
    params = request.params
    wants_logprobs = params.logprobs is not None or params.prompt_logprobs is not None
    return wants_logprobs or bool(request.pending_forks) or changes_logits(params)


def changes_logits(params: SamplingParams) -> bool:
    """Whether the logits depend on what was said before: penalties, tokens that may not come yet."""
    return params.has_penalties or params.min_tokens > 0
