"""A plan as tensors at fixed addresses: integers laid side by side in pinned memory, and one copy to the device a step.

    words of 4 bytes    | seeds | temperatures | num_tokens | logit_rows | query_starts |      one a row, R rows
                        | token_ids | positions | slots |                                      one a token
                        | places | block ids |                                                 what changed in the table

Graphs are captured over these addresses. Rows behind the batch are padding: they have no key, position and slot -1.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.plan import StepPlan
from minivllm.request import Request
from minivllm.runner.batch_rows import BatchRows

Words = TypeVar("Words", np.ndarray, torch.Tensor)
ALIGNMENT = 64  # words: pointers to every part are multiples of 16 bytes, which kernels are compiled for


@dataclass(frozen=True)
class StepLimits:
    """The most that a step can hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int

    @property
    def max_blocks(self) -> int:
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True)
class LoadedStep:
    """A plan on the device: its requests by row, each with `num_new` tokens, `ends` keys after this step."""

    requests: list[Request]
    num_new: list[int]
    ends: list[int]
    max_query_len: int


class StepBuffers:
    """The device's memory of a step, and two of the host's: one may still be read while the other is written."""

    def __init__(self, limits: StepLimits, device: str) -> None:
        self.limits = limits
        self.rows = BatchRows(limits.max_num_seqs, limits.max_blocks)
        self.num_rows = aligned(limits.max_num_seqs)
        self.table = torch.zeros(limits.max_num_seqs, limits.max_blocks, dtype=torch.int32, device=device)
        self._most_changes = min(self.table.numel(), 2**16)
        most_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
        num_words = self._first_change(aligned(most_tokens)) + 3 * self._most_changes
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        is_cuda = device != "cpu"
        self._hosts = [torch.zeros(num_words, dtype=torch.int32, pin_memory=is_cuda) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in self._hosts] if is_cuda else []
        self._turn = 0
        self.seeds = self._words[: 2 * self.num_rows].view(torch.int64)
        self.temperatures = self._row_part(self._words, 2).view(torch.float32)
        self.num_tokens = self._row_part(self._words, 3)

    def load(self, plan: StepPlan, padded_rows: int | None = None) -> LoadedStep:
        """Bring a plan to the device; a step of single tokens has its rows padded to `padded_rows`."""
        places, block_ids = self.rows.seat(plan.scheduled)
        requests, num_new_of = self.rows.requests, dict(plan.scheduled)
        num_new = [num_new_of[request] for request in requests]
        first = [request.num_computed for request in requests]
        ends = [start + new for start, new in zip(first, num_new, strict=True)]
        if max(num_new) == 1:
            token_ids = [request.token_ids[start] for request, start in zip(requests, first, strict=True)]
        else:
            chunks = zip(requests, first, ends, strict=True)
            token_ids = [token for request, start, end in chunks for token in request.token_ids[start:end]]
        self._turn = 1 - self._turn
        if self._sent:
            self._sent[self._turn].synchronize()  # the copy before last has been read
        words = self._hosts[self._turn].numpy()
        capacity = self.num_rows if padded_rows else aligned(len(token_ids))
        self._write_rows(words, ends, num_new)
        self._write_tokens(words, token_ids, first, num_new, capacity, padded_rows or 0)
        self._send(words, capacity, places, block_ids)
        return LoadedStep(requests, num_new, ends, max(num_new))

    def singles(self, num_rows: int) -> ForwardBatch:
        """One query in each of the first rows: the same addresses in every step."""
        tokens = (part[:num_rows] for part in self._token_parts(self._words, self.num_rows))
        return self._batch(*tokens, num_rows=num_rows, num_requests=num_rows)

    def ragged(self, step: LoadedStep) -> ForwardBatch:
        """Several queries for some requests; rows without any stand behind them."""
        num_tokens = sum(step.num_new)
        tokens = (part[:num_tokens] for part in self._token_parts(self._words, aligned(num_tokens)))
        return self._batch(*tokens, num_rows=self.limits.max_num_seqs, num_requests=len(step.requests))

    def _batch(
        self, token_ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, *, num_rows: int,
        num_requests: int,
    ) -> ForwardBatch:  # fmt: skip
        return ForwardBatch(
            token_ids, positions, slots, self.table[:num_rows],
            query_starts=self._starts(self._words)[: num_rows + 1],
            num_tokens=self.num_tokens[:num_rows],
            logit_rows=self._row_part(self._words, 4)[:num_requests],
        )  # fmt: skip

    def _write_rows(self, words: np.ndarray, ends: list[int], num_new: list[int]) -> None:
        num_requests, limit = len(ends), self.num_rows
        words[: 2 * limit].view(np.int64)[:num_requests] = self.rows.seeds[:num_requests]
        temperatures = self._row_part(words, 2).view(np.float32)
        temperatures[:num_requests] = self.rows.temperatures[:num_requests]
        temperatures[num_requests:] = 0
        num_tokens, logit_rows, starts = self._row_part(words, 3), self._row_part(words, 4), self._starts(words)
        num_tokens[:num_requests], num_tokens[num_requests:] = ends, 0
        starts[0] = 0
        np.cumsum(num_new, out=starts[1 : num_requests + 1])
        starts[num_requests + 1 :] = starts[num_requests]
        logit_rows[:num_requests], logit_rows[num_requests:] = starts[1 : num_requests + 1] - 1, 0

    def _write_tokens(
        self, words: np.ndarray, token_ids: list[int], first: list[int], num_new: list[int], capacity: int, padded: int
    ) -> None:
        size, num_tokens = self.limits.block_size, len(token_ids)
        ids, positions, slots = self._token_parts(words, capacity)
        ids[:num_tokens] = token_ids
        rows = np.arange(len(first))
        if num_tokens == len(first):
            positions[:num_tokens] = first
        else:
            before = np.array(first) - self._starts(words)[: len(first)]  # a token's position less its place
            positions[:num_tokens] = np.repeat(before, num_new) + np.arange(num_tokens)
            rows = np.repeat(rows, num_new)
        block, offset = np.divmod(positions[:num_tokens], size)
        slots[:num_tokens] = self.rows.table[rows, block] * size + offset
        ids[num_tokens:padded], positions[num_tokens:padded], slots[num_tokens:padded] = 0, -1, -1

    def _send(self, words: np.ndarray, capacity: int, places: list[int], block_ids: list[int]) -> None:
        """One copy; then the table's changes find their places on the device."""
        start, num_changes = self._first_change(capacity), len(places)
        if num_changes > self._most_changes:
            self.table.copy_(torch.from_numpy(self.rows.table))
            num_changes = 0
        middle, end = start + 2 * num_changes, start + 3 * num_changes
        if num_changes:
            words[start:middle].view(np.int64)[:] = places
            words[middle:end] = block_ids
        self._words[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        if self._sent:
            self._sent[self._turn].record()
        if num_changes:
            self.table.view(-1).scatter_(0, self._words[start:middle].view(torch.int64), self._words[middle:end])

    def _row_part(self, words: Words, index: int) -> Words:
        return words[index * self.num_rows : (index + 1) * self.num_rows]

    def _starts(self, words: Words) -> Words:
        return words[5 * self.num_rows : 6 * self.num_rows + 1]

    def _token_parts(self, words: Words, capacity: int) -> tuple[Words, Words, Words]:
        """Token ids, positions and slots, `capacity` of each."""
        first = 6 * self.num_rows + ALIGNMENT
        parts = (words[first + part * capacity : first + (part + 1) * capacity] for part in range(3))
        return tuple(parts)  # type: ignore[return-value]

    def _first_change(self, capacity: int) -> int:
        return 6 * self.num_rows + ALIGNMENT + 3 * capacity


def aligned(count: int) -> int:
    """The next multiple of 64: aligned(65) == 128."""
    return -(-count // ALIGNMENT) * ALIGNMENT
