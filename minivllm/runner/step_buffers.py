"""A plan as tensors at fixed addresses: integers laid side by side in pinned memory, and one copy to the device a step.

    words of 4 bytes    | seeds | temperatures | num_tokens | top_k | top_p | min_p | logit_rows |     by row, R rows
                        | order | keys | query_starts |                      requests: chunks first, then single tokens
                        | token_ids | positions | slots |                               by token, in that order
                        | places | block ids |                                          what changed in the table

Graphs are captured over these addresses: where all have a single token, the order is that of the rows. Padding behind
the rows, behind the chunks' tokens and behind the single ones has no key, position and slot -1.

A row is what gets a token: each request has one, and behind it one more for each of its drafts (draft_rows.py). Graphs
see no difference: `order` says whose block table a row reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from minivllm.attention.kernel_batch import KernelBatch, Keys
from minivllm.engine.plan import StepPlan
from minivllm.request import Request
from minivllm.runner.batch_rows import BatchRows
from minivllm.runner.draft_rows import DraftRows
from minivllm.runner.host_words import ALIGNMENT, ROW_PARTS, HostWords, aligned, fill

MOST_CHUNKS = 64  # of a padded step; a multiple of 4, so that what lies behind them is aligned
MOST_ROWS = 512  # of requests and drafts: a step without a graph would cost ten times what more drafts bring


@dataclass(frozen=True)
class StepLimits:
    """The most that a step can hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    max_drafts: int = 0  # of a request

    @property
    def max_rows(self) -> int:
        """Requests, and drafts as far as a step's tokens and the largest graph go."""
        most = min(self.max_num_seqs * (1 + self.max_drafts), self.max_num_batched_tokens, MOST_ROWS)
        return max(self.max_num_seqs, most)

    @property
    def max_blocks(self) -> int:
        return -(-self.max_model_len // self.block_size)


class StepShape(NamedTuple):
    """How much lies on the device: requests with more than one token, drafts included, and behind them the others."""

    chunks: int
    chunk_tokens: int
    singles: int

    @property
    def num_requests(self) -> int:
        return self.chunks + self.singles

    @property
    def num_tokens(self) -> int:
        return self.chunk_tokens + self.singles


@dataclass(frozen=True)
class LoadedStep:
    """A plan on the device: its requests as they are seated, each with `num_new` known tokens, `ends` after them."""

    requests: list[Request]
    num_new: list[int]
    ends: list[int]
    starts: list[int]  # where each request's tokens begin; empty where rows are single tokens
    shape: StepShape  # padding included
    rows: DraftRows

    @property
    def num_tokens(self) -> list[int]:
        """Of each request, drafts included."""
        return [new + len(guess) for new, guess in zip(self.num_new, self.rows.guesses, strict=True)]

    def last_known(self, seat: int) -> int:
        """The place of a request's last known token among the step's."""
        return self.starts[seat] + self.num_new[seat] - 1 if self.starts else self.rows.firsts[seat]


Shapes = tuple[StepShape, StepShape]  # of a step itself, and with its padding


class StepBuffers:
    """The device's memory of a step, and two of the host's: one may still be read while the other is written.

    `chosen` is where the device keeps the tokens of the last step, by row.
    """

    def __init__(self, limits: StepLimits, device: str, chosen: torch.Tensor) -> None:
        self.chosen = chosen
        self.limits = limits
        self.rows = BatchRows(limits.max_num_seqs, limits.max_blocks)
        self.num_rows = aligned(limits.max_rows + MOST_CHUNKS)
        self.table = torch.zeros(limits.max_num_seqs, limits.max_blocks, dtype=torch.int32, device=device)
        has_drafts = limits.max_rows > limits.max_num_seqs
        self.row_table = self.table.new_zeros(limits.max_rows, limits.max_blocks) if has_drafts else self.table
        self._most_changes = min(self.table.numel(), 2**16)
        most_tokens = aligned(max(limits.max_num_batched_tokens + limits.max_num_seqs, self.num_rows))
        num_words = self._first_change(most_tokens) + 3 * self._most_changes
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        is_cuda = device != "cpu"
        self._hosts = [HostWords(num_words, self.num_rows, is_pinned=is_cuda) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in self._hosts] if is_cuda else []
        self._turn = 0
        self.seeds = self._words[: 2 * self.num_rows].view(torch.int64)
        self.temperatures = self._row_part(2).view(torch.float32)
        self.num_tokens, self.top_k = self._row_part(3), self._row_part(4)
        self.top_p, self.min_p = (self._row_part(part).view(torch.float32) for part in (5, 6))
        self.token_ids = self._words[self._first_change(0) :][:most_tokens]  # of any step, by place

    def load_singles(self, requests: list[Request], padded_rows: int, rows: DraftRows | None = None) -> LoadedStep:
        """Bring one known token of each seated request, and its drafts, to the device, and padding behind them."""
        rows = rows or DraftRows.without(len(requests))
        count, host, held = rows.count, self._next_host(), self.rows
        token_ids, positions, slots = host.singles
        known = np.array([-1 if r.num_promised else r.token_ids[r.num_computed] for r in requests], np.int32)
        np.copyto(known, -1 - held.came_from[: len(known)], where=known < 0)
        num_computed = [request.num_computed for request in requests]
        token_ids[:count] = rows.tokens(known)
        positions[:count] = (
            num_computed if count == len(requests) else rows.spread(np.array(num_computed)) + rows.offsets
        )
        np.add(positions[:count], 1, out=host.num_tokens[:count])
        block, offset = np.divmod(positions[:count], self.limits.block_size)
        slots[:count] = held.table[rows.owners, block] * self.limits.block_size + offset
        host.take_wishes(held, rows)
        host.order[:count] = rows.owners
        if count < padded_rows:
            behind = slice(count, padded_rows)
            token_ids[behind], positions[behind], slots[behind], host.num_tokens[behind] = 0, -1, -1, 0
            host.temperatures[behind] = 0
        self._send(host, self.num_rows)
        if self.row_table is not self.table:
            torch.index_select(self.table, 0, self._row_part(8)[:count], out=self.row_table[:count])
        ends, shape = [computed + 1 for computed in num_computed], StepShape(0, 0, padded_rows)
        return LoadedStep(requests, [1] * len(requests), ends, [], shape, rows)

    def load(
        self, plan: StepPlan, rows: DraftRows | None = None, padded: Callable[[StepShape], StepShape] | None = None
    ) -> LoadedStep:
        """Bring any plan whose requests are seated to the device, and drafts behind the known tokens.

        `padded` says how much room there is to be for a step of a shape: none more without it.
        """
        requests, num_new_of, host = self.rows.requests, dict(plan.scheduled), self._next_host()
        rows = rows or DraftRows.without(len(requests))
        num_new = [num_new_of[request] for request in requests]
        ends = [request.num_computed + new for request, new in zip(requests, num_new, strict=True)]
        lengths = [new + len(guess) for new, guess in zip(num_new, rows.guesses, strict=True)]
        order = sorted(range(len(requests)), key=lambda row: lengths[row] == 1)  # chunks first, else as they sit
        num_singles = lengths.count(1)
        own = StepShape(len(lengths) - num_singles, sum(lengths) - num_singles, num_singles)
        shape = padded(own) if padded else own
        starts = self._write_rows(host, ends, lengths, order, rows, (own, shape))
        self._write_tokens(host.tokens(shape.num_tokens), lengths, order, rows, (own, shape))
        self._send(host, aligned(shape.num_tokens))
        return LoadedStep(requests, num_new, ends, starts, shape, rows)

    def singles(self, num_rows: int) -> KernelBatch:
        """One query in each of the first rows: the same addresses in every step."""
        token_ids, positions, slots = self._token_parts(num_rows, self.num_rows)
        keys, starts = Keys(self.row_table[:num_rows], self.num_tokens[:num_rows]), self._row_part(10)[:1]
        return KernelBatch(token_ids, self.chosen, positions, slots, keys, None, starts, max_query_len=1)

    def ragged(self, shape: StepShape, max_query_len: int) -> KernelBatch:
        """Any step of this shape, of chunks that are no longer: the same addresses in every step."""
        token_ids, positions, slots = self._token_parts(shape.num_tokens, aligned(shape.num_tokens))
        order, num_keys = (self._row_part(part)[: shape.num_requests] for part in (8, 9))
        chunks, singles = (
            Keys(self.table.index_select(0, order[rows]), num_keys[rows].clone())
            for rows in (slice(shape.chunks), slice(shape.chunks, None))
        )
        first = 10 * self.num_rows
        starts = self._words[first : first + shape.chunks + 1]
        return KernelBatch(
            token_ids, self.chosen, positions, slots, singles, chunks if len(chunks) else None, starts, max_query_len
        )

    def last_tokens(self, step: LoadedStep) -> torch.Tensor:
        """Of each row, which token its logits come from: a request's last known one, or a draft."""
        return self._row_part(7)[: step.rows.count]

    def _next_host(self) -> HostWords:
        """The buffer that was written before the last one, once it has been read."""
        self._turn = 1 - self._turn
        if self._sent:
            self._sent[self._turn].synchronize()
        return self._hosts[self._turn]

    def _write_rows(
        self, host: HostWords, ends: list[int], lengths: list[int], order: list[int], rows: DraftRows, shapes: Shapes
    ) -> list[int]:
        """All that is one a row or a request; where each request's tokens begin."""
        own, shape = shapes
        known_ends = np.array(ends)
        num_drafts = np.array([len(guess) for guess in rows.guesses])
        host.take_wishes(self.rows, rows)
        host.num_tokens[: rows.count] = rows.spread(known_ends) + rows.offsets
        fill(host.order, np.array(order), own.chunks, shape.chunks, shape.num_requests)
        fill(host.keys, (known_ends + num_drafts)[order], own.chunks, shape.chunks, shape.num_requests)
        counts = np.array(lengths)[order]
        stops = counts.cumsum()
        host.query_starts[0] = 0
        fill(host.query_starts[1:], stops[: own.chunks], own.chunks, shape.chunks, shape.chunks, own.chunk_tokens)
        begins = stops - counts
        begins[own.chunks :] += shape.chunk_tokens - own.chunk_tokens
        starts, last_known = np.empty_like(begins), np.empty_like(begins)
        starts[order] = begins
        last_known[order] = begins + counts - 1 - num_drafts[order]
        host.last_tokens[: rows.count] = rows.spread(last_known) + rows.offsets
        return starts.tolist()

    def _write_tokens(
        self, parts: tuple[np.ndarray, ...], lengths: list[int], order: list[int], rows: DraftRows, shapes: Shapes
    ) -> None:
        """All that is one a token, for requests in their order."""
        own, shape = shapes
        requests, counts = [self.rows.requests[seat] for seat in order], np.array(lengths)[order]
        firsts = np.array([request.num_computed for request in requests])
        spans = zip(requests, order, counts.tolist(), strict=True)
        token_ids = [t for request, seat, length in spans for t in self._tokens(request, seat, length, rows)]
        before = firsts - (counts.cumsum() - counts)  # position less place
        positions = np.repeat(before, counts) + np.arange(own.num_tokens)
        block, offset = np.divmod(positions, self.limits.block_size)
        slots = self.rows.table[np.repeat(order, counts), block] * self.limits.block_size + offset
        for part, values, nothing in zip(parts, (np.array(token_ids), positions, slots), (0, -1, -1), strict=True):
            fill(part, values, own.chunk_tokens, shape.chunk_tokens, shape.num_tokens, nothing)

    def _tokens(self, request: Request, seat: int, length: int, rows: DraftRows) -> Sequence[int]:
        """The tokens that a request computes; the one that it is promised by its place among the chosen."""
        guess, first = rows.guesses[seat], request.num_computed
        known = request.token_ids[first : first + length - len(guess)]
        promised = [-1 - int(self.rows.came_from[seat])] if len(known) + len(guess) < length else []
        return [*known, *promised, *guess]

    def _send(self, host: HostWords, capacity: int) -> None:
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
