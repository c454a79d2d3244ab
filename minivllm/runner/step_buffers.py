"""A plan as tensors at fixed addresses: integers laid side by side in pinned memory, and one copy to the device a step.

    words of 4 bytes    | seeds | temperatures | num_tokens | top_k | top_p | min_p | logit_rows |     by row, R rows
                        | order | keys | query_starts |                                 chunks first, then single tokens
                        | token_ids | positions | slots |                               by token, in that order
                        | places | block ids |                                          what changed in the table

Graphs are captured over these addresses: where all have a single token, order is that of the rows. Rows behind the
batch are padding then: they have no key, position and slot -1.
"""

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.attention.kernel_batch import KernelBatch, Keys
from minivllm.engine.plan import StepPlan
from minivllm.request import Request
from minivllm.runner.batch_rows import WISHES, BatchRows

ROW_PARTS = 11
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
    starts: list[int]  # where each request's tokens begin; empty where each has one
    num_chunks: int  # requests with more than one token


class StepBuffers:
    """The device's memory of a step, and two of the host's: one may still be read while the other is written.

    `chosen` is where the device keeps the tokens of the last step, by row.
    """

    def __init__(self, limits: StepLimits, device: str, chosen: torch.Tensor) -> None:
        self.chosen = chosen
        self.limits = limits
        self.rows = BatchRows(limits.max_num_seqs, limits.max_blocks)
        self.num_rows = aligned(limits.max_num_seqs)
        self.table = torch.zeros(limits.max_num_seqs, limits.max_blocks, dtype=torch.int32, device=device)
        self._most_changes = min(self.table.numel(), 2**16)
        most_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
        num_words = self._first_change(aligned(most_tokens)) + 3 * self._most_changes
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        is_cuda = device != "cpu"
        self._hosts = [HostWords(num_words, self.num_rows, is_pinned=is_cuda) for _ in range(2)]
        self._row_ids = np.arange(limits.max_num_seqs)
        self._sent = [torch.cuda.Event() for _ in self._hosts] if is_cuda else []
        self._turn = 0
        self.seeds = self._words[: 2 * self.num_rows].view(torch.int64)
        self.temperatures = self._row_part(2).view(torch.float32)
        self.num_tokens, self.top_k = self._row_part(3), self._row_part(4)
        self.top_p, self.min_p = (self._row_part(part).view(torch.float32) for part in (5, 6))

    def load_singles(self, requests: list[Request], padded_rows: int) -> LoadedStep:
        """Bring one token of each request that is seated to the device, and rows of padding behind them."""
        count, host, rows = len(requests), self._next_host(), self.rows
        token_ids, positions, slots = host.singles
        positions[:count] = [request.num_computed for request in requests]
        token_ids[:count] = [-1 if r.num_promised else r.token_ids[r.num_computed] for r in requests]
        np.copyto(token_ids[:count], -1 - rows.came_from[:count], where=token_ids[:count] < 0)
        ends = host.num_tokens[:count]
        np.add(positions[:count], 1, out=ends)
        block, offset = np.divmod(positions[:count], self.limits.block_size)
        slots[:count] = rows.table[self._row_ids[:count], block] * self.limits.block_size + offset
        host.take_wishes(rows, count)
        if count < padded_rows:
            behind = slice(count, padded_rows)
            token_ids[behind], positions[behind], slots[behind], host.num_tokens[behind] = 0, -1, -1, 0
            host.temperatures[behind] = 0
        self._send(host, self.num_rows)
        return LoadedStep(requests, [1] * count, ends.tolist(), [], 0)

    def load(self, plan: StepPlan) -> LoadedStep:
        """Bring any plan whose requests are seated to the device."""
        requests, num_new_of, host = self.rows.requests, dict(plan.scheduled), self._next_host()
        num_new = [num_new_of[request] for request in requests]
        ends = [request.num_computed + new for request, new in zip(requests, num_new, strict=True)]
        order = sorted(range(len(requests)), key=lambda row: num_new[row] == 1)  # chunks first, else by row
        starts = self._write_rows(host, ends, num_new, order)
        self._write_tokens(host.tokens(sum(num_new)), requests, num_new, order)
        self._send(host, aligned(sum(num_new)))
        return LoadedStep(requests, num_new, ends, starts, len(num_new) - num_new.count(1))

    def singles(self, num_rows: int) -> KernelBatch:
        """One query in each of the first rows: the same addresses in every step."""
        token_ids, positions, slots = self._token_parts(num_rows, self.num_rows)
        keys, starts = Keys(self.table[:num_rows], self.num_tokens[:num_rows]), self._row_part(10)[:1]
        return KernelBatch(token_ids, self.chosen, positions, slots, keys, None, starts, max_query_len=1)

    def ragged(self, step: LoadedStep) -> KernelBatch:
        """Any step, as it was loaded without padding."""
        num_tokens, num_requests = sum(step.num_new), len(step.requests)
        token_ids, positions, slots = self._token_parts(num_tokens, aligned(num_tokens))
        order, num_keys = (self._row_part(part)[:num_requests] for part in (8, 9))
        chunks, singles = (
            Keys(self.table.index_select(0, order[rows]), num_keys[rows].clone())
            for rows in (slice(step.num_chunks), slice(step.num_chunks, None))
        )
        first = 10 * self.num_rows
        starts = self._words[first : first + step.num_chunks + 1]
        return KernelBatch(
            token_ids, self.chosen, positions, slots, singles, chunks if len(chunks) else None, starts,
            max(step.num_new),
        )  # fmt: skip

    def last_tokens(self, step: LoadedStep) -> torch.Tensor:
        """Of each row, which token is its last, whose logits give the next one."""
        return self._row_part(7)[: len(step.requests)]

    def _next_host(self) -> "HostWords":
        """The buffer that was written before the last one, once it has been read."""
        self._turn = 1 - self._turn
        if self._sent:
            self._sent[self._turn].synchronize()
        return self._hosts[self._turn]

    def _write_rows(self, host: "HostWords", ends: list[int], num_new: list[int], order: list[int]) -> list[int]:
        """All that is one a row; where each row's tokens begin."""
        count = len(ends)
        host.take_wishes(self.rows, count)
        host.num_tokens[:count], host.order[:count] = ends, order
        host.keys[:count] = host.num_tokens[order]
        stops = host.query_starts[: count + 1]
        stops[0] = 0
        np.cumsum(np.array(num_new)[order], out=stops[1:])
        host.last_tokens[order] = stops[1:] - 1
        starts = np.empty(count, np.int32)
        starts[order] = stops[:-1]
        return starts.tolist()

    def _write_tokens(
        self, parts: tuple[np.ndarray, ...], requests: list[Request], num_new: list[int], order: list[int]
    ) -> None:
        token_ids, positions, slots = parts
        spans = [(self._known(requests[row], row), requests[row].num_computed, num_new[row]) for row in order]
        token_ids[:] = [token for tokens, first, new in spans for token in tokens[first : first + new]]
        lengths = np.array([new for _, _, new in spans])
        before = np.array([first for _, first, _ in spans]) - (lengths.cumsum() - lengths)  # position less place
        positions[:] = np.repeat(before, lengths) + np.arange(len(positions))
        block, offset = np.divmod(positions, self.limits.block_size)
        slots[:] = self.rows.table[np.repeat(order, lengths), block] * self.limits.block_size + offset

    def _known(self, request: Request, row: int) -> list[int]:
        """A request's tokens; the one that it is promised by its place among the chosen."""
        return [*request.token_ids, -1 - int(self.rows.came_from[row])] if request.num_promised else request.token_ids

    def _send(self, host: "HostWords", capacity: int) -> None:
        """One copy; then the table's changes find their places on the device."""
        places, block_ids = self.rows.take_changes()
        start, num_changes = self._first_change(capacity), len(places)
        if num_changes > self._most_changes:
            self.table.copy_(torch.from_numpy(self.rows.table))
            num_changes = 0
        middle, end = start + 2 * num_changes, start + 3 * num_changes
        if num_changes:
            host.words[start:middle].view(np.int64)[:] = places
            host.words[middle:end] = block_ids
        self._words[:end].copy_(host.memory[:end], non_blocking=True)
        if self._sent:
            self._sent[self._turn].record()
        if num_changes:
            self.table.view(-1).scatter_(0, self._words[start:middle].view(torch.int64), self._words[middle:end])

    def _row_part(self, index: int) -> torch.Tensor:
        return self._words[index * self.num_rows : (index + 1) * self.num_rows]

    def _token_parts(self, num_tokens: int, capacity: int) -> tuple[torch.Tensor, ...]:
        """Token ids, positions and slots, of which there is room for `capacity` each."""
        first = self._first_change(0)
        return tuple(self._words[first + part * capacity :][:num_tokens] for part in range(3))

    def _first_change(self, capacity: int) -> int:
        return ROW_PARTS * self.num_rows + ALIGNMENT + 3 * capacity


class HostWords:
    """A buffer in the host's memory, and its parts by name."""

    def __init__(self, num_words: int, num_rows: int, *, is_pinned: bool) -> None:
        self.memory = torch.zeros(num_words, dtype=torch.int32, pin_memory=is_pinned)
        self.words = self.memory.numpy()
        parts = [self.words[part * num_rows : (part + 1) * num_rows] for part in range(ROW_PARTS)]
        self.seeds = self.words[: 2 * num_rows].view(np.int64)
        self.temperatures = parts[2].view(np.float32)
        self.num_tokens, self.top_k = parts[3:5]
        self.top_p, self.min_p = (part.view(np.float32) for part in parts[5:7])
        self.last_tokens, self.order, self.keys = parts[7:10]
        self.query_starts = self.words[10 * num_rows : ROW_PARTS * num_rows + 1]
        self._first_token = ROW_PARTS * num_rows + ALIGNMENT
        self.singles = self._token_parts(num_rows, num_rows)

    def take_wishes(self, rows: BatchRows, count: int) -> None:
        """How the tokens of the first rows are to be chosen."""
        for name in WISHES:
            getattr(self, name)[:count] = getattr(rows, name)[:count]

    def tokens(self, num_tokens: int) -> tuple[np.ndarray, ...]:
        """Token ids, positions and slots of a step of any kind."""
        return self._token_parts(num_tokens, aligned(num_tokens))

    def _token_parts(self, num_tokens: int, capacity: int) -> tuple[np.ndarray, ...]:
        return tuple(self.words[self._first_token + part * capacity :][:num_tokens] for part in range(3))


def aligned(count: int) -> int:
    """The next multiple of 64: aligned(65) == 128."""
    return -(-count // ALIGNMENT) * ALIGNMENT
