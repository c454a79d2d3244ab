"""Drafts in a chain on the device: a pass is a CUDA graph, a chain the same graph again, and the host never waits.

    the step's token ids, loaded    | A9  .  .  .  | B4  .  | C7 |        places for drafts that nobody knows
    pass 1 (done = 0)               | A9  d1 .  .  | B4  e1 | C7 |        each written behind what it was drafted from
    pass 2 (done = 1)               | A9  d1 d2 .  |         ...
    target                          | A9  d1 d2 d3 | B4  e1 | C7 |        in the same stream, so behind the passes

The target's step is launched right behind the last pass; drafts come to the host with the tokens that judge them. A
request with fewer drafts than others takes part in the later passes and leaves nothing but in the null block.
`speculative/draft_batch.py` drafts the same eagerly: the slow twin, and the way of drafts that are drawn.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from tqdm.auto import tqdm

from minivllm.attention import ForwardBatch
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.models.fused_llama import kernel_obstacle
from minivllm.runner.decode_graphs import Graph, captured
from minivllm.runner.step_buffers import LoadedStep, StepBuffers
from minivllm.speculative.draft_batch import MOST_CHAINED, ChainDrafter
from minivllm.speculative.draft_model import DraftModelProposer
from minivllm.speculative.eagle import EagleProposer
from minivllm.speculative.early_exit import EarlyExitProposer
from minivllm.speculative.proposer import Draft, Proposer

NO_REQUEST = -1  # the number of drafts of a row that is padding: it takes part in no pass


class PassShape(NamedTuple):
    """What a graph is captured for."""

    num_rows: int
    is_first: bool


@dataclass(frozen=True)
class Wanted:
    """Drafts on their way: which requests of a step get them, and how many each."""

    ids: list[str]
    lengths: list[int]


class DraftChain:
    """The passes of one drafter over the requests, tokens and block tables that StepBuffers holds."""

    def __init__(self, drafter: ChainDrafter, buffers: StepBuffers) -> None:
        self.drafter, self._buffers = drafter, buffers
        most, device = buffers.limits.max_num_seqs, buffers.table.device
        self.sizes = chain_sizes(most)
        self.shapes = [PassShape(size, is_first) for size in self.sizes for is_first in (True, False)]
        self.graphs: dict[PassShape, Graph] = {}
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(4, most, dtype=torch.int64, pin_memory=is_cuda)
        self._words = torch.zeros_like(self._host, device=device)  # seats, places, positions, lengths by row
        self._done = torch.zeros(1, dtype=torch.int64, device=device)  # passes
        weight_dtype = drafter.storage.data.dtype
        self._carried = torch.zeros(most, drafter.config.hidden_size, dtype=weight_dtype, device=device)
        self._drafts = torch.zeros(most, MOST_CHAINED + 1, dtype=torch.int32, device=device)
        self._read = torch.zeros(self._drafts.shape, dtype=torch.int32, pin_memory=is_cuda)
        self._clock = Clock(is_cuda=is_cuda)
        self._wanted = Wanted([], [])

    def start(self, step: LoadedStep, seats: Sequence[int]) -> None:
        """Launch the drafts of the requests on these seats into their places among the step's tokens."""
        size = next(size for size in self.sizes if size >= len(seats))
        places = [step.last_known(seat) for seat in seats]
        positions = [step.ends[seat] - 1 for seat in seats]
        lengths = [len(step.rows.guesses[seat]) for seat in seats]
        self._wanted = Wanted([step.requests[seat].id for seat in seats], lengths)
        self._host[:3, len(seats) :], self._host[3, len(seats) :] = 0, NO_REQUEST
        self._host[:, : len(seats)] = torch.tensor([list(seats), places, positions, lengths])
        self._words.copy_(self._host, non_blocking=True)  # nobody writes there before this step was read
        table, block_size = self._buffers.rows.table, self._buffers.limits.block_size
        self.drafter.begin([
            int(table[seat, position // block_size]) * block_size + position % block_size
            for seat, position in zip(seats, positions, strict=True)
        ])  # fmt: skip
        self._clock.start()
        for number in range(max(lengths) + self.drafter.num_more):
            shape = PassShape(size, number == 0)
            if shape in self.graphs:
                self.graphs[shape].replay()
            else:
                self.compute(shape)
        self._clock.stop()
        self._read[:size].copy_(self._drafts[:size], non_blocking=True)

    def finish(self) -> tuple[dict[str, Draft], float]:
        """The drafts by request and the seconds they took, once the step behind them has been waited for."""
        wanted, self._wanted = self._wanted, Wanted([], [])
        if not wanted.ids:
            return {}, 0.0
        rows = self._read[: len(wanted.ids)].tolist()
        pairs = zip(wanted.ids, rows, wanted.lengths, strict=True)
        return {id_: Draft(row[:length]) for id_, row, length in pairs}, self._clock.seconds

    def compute(self, shape: PassShape) -> None:
        """One pass: each row's token, its K and V, and the draft behind it."""
        if shape.is_first:
            self._done.zero_()
        done, tokens, block_size = self._done, self._buffers.token_ids, self._buffers.limits.block_size
        seats, places, starts, lengths = self._words[:, : shape.num_rows]
        is_on = done < lengths + self.drafter.num_more
        positions = torch.where(is_on, starts + done, 0)
        table = self._buffers.table.index_select(0, seats)
        blocks = table.gather(1, (positions // block_size)[:, None])[:, 0]
        slots = torch.where(is_on, blocks * block_size + positions % block_size, NULL_BLOCK)
        own = torch.arange(shape.num_rows + 1, device=table.device)
        batch = ForwardBatch(
            token_ids=tokens[torch.where(is_on, places + done, places)],
            positions=positions,
            slots=slots,
            block_table=table,
            query_starts=own,
            num_tokens=positions + 1,
            logit_rows=own[:-1],
        )
        logits = self.drafter.draft_pass(batch, self._carried[: shape.num_rows], is_first=shape.is_first)
        drafts = self.drafter.choice.likeliest(logits).int()
        is_draft = done < lengths
        targets = torch.where(is_draft, places + done + 1, places)
        # who has no draft writes what is there already, at the place of a known token: nobody else's draft
        tokens.index_copy_(0, targets, torch.where(is_draft, drafts, tokens[places]))
        self._drafts[: shape.num_rows].index_copy_(1, done, drafts[:, None])
        done += 1

    def capture(self, pool: Any, *, show_progress: bool) -> None:
        """Capture both passes for each size, the largest first; nothing may be loaded."""
        self._words[3].fill_(NO_REQUEST)
        for shape in tqdm(
            self.shapes[::-1], desc="Capturing CUDA graphs of drafts", disable=not show_progress, leave=False
        ):
            self._done.zero_()  # so that each has a column to write to
            self.graphs[shape] = captured(partial(self.compute, shape), pool)


class Clock:
    """Seconds between two places in a stream, known once the device is past both."""

    def __init__(self, *, is_cuda: bool) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if is_cuda else []
        self._times = [0.0, 0.0]

    def start(self) -> None:
        self._mark(0)

    def stop(self) -> None:
        self._mark(1)

    @property
    def seconds(self) -> float:
        if self._events:
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._times[1] - self._times[0]

    def _mark(self, which: int) -> None:
        if self._events:
            self._events[which].record()
        self._times[which] = time.perf_counter()


def chain_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of requests for which a pass is captured: chain_sizes(20) == [1, 2, 4, 8, 16, 20]."""
    sizes = {1 << power for power in range(max_num_seqs.bit_length())}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def can_chain(proposer: Proposer, block_size: int) -> TypeGuard[ChainDrafter]:
    """Whether its passes never wait for the device: certain drafts, by our kernels, of a dense model."""
    if not isinstance(proposer, DraftModelProposer | EagleProposer | EarlyExitProposer):
        return False
    config = proposer.config
    is_dense = config.mla is None and config.moe is None and not config.batch_invariant
    return is_dense and not proposer.choice.is_drawn and kernel_obstacle(config, block_size) is None
