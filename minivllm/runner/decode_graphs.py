"""Steps of single queries, as one CUDA graph for each size of batch: body, logits and sampling in one launch.

    rows       1  2 ... 8  9 ... 16  17 ... 24  ...      one for each request, and one for each draft
    size       1  8 ... 8  16 ... 16  24 ... 24  ...     rows behind the batch are padding

A product of 8 rows takes no longer than one of 2 (kernels/NOTES.md), so there is nothing between 1 and 8.
Graphs share one pool of memory, so the largest is captured first and the others fit into it. Without graphs the same
kernels run on the same padded rows: the bits are the same.

Steps that read prefixes once for many rows (shared_prefix.py) have graphs of their own, for fewer sizes: they gain more
than the padding costs. Which rows share, and how much, lies in the device's memory, so it may change from step to step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from tqdm.auto import tqdm

from minivllm.attention.kernel_batch import KernelBatch
from minivllm.runner.shared_prefix import SharedPrefixes
from minivllm.runner.step_buffers import StepBuffers

if TYPE_CHECKING:  # both import triton, which a CPU has not; memory.py asks this file for sizes on any machine
    from minivllm.models.fused_llama import FusedLlama
    from minivllm.runner.kernel_sampler import KernelSampler


class Graph(Protocol):
    """What a captured step can do."""

    def replay(self) -> None: ...


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes for which a step is captured: batch_sizes(20) == [1, 8, 16, 20]."""
    sizes = [1, *range(8, max_num_seqs, 8), max_num_seqs]
    return sorted({size for size in sizes if size <= max_num_seqs})


def shared_sizes(max_num_seqs: int) -> list[int]:
    """Sizes for which a step with shared prefixes is captured: shared_sizes(200) == [8, 16, 32, 64, 128, 192, 200]."""
    sizes = {8, 16, 32, *range(64, max_num_seqs, 64), max_num_seqs}
    return sorted(size for size in sizes if 1 < size <= max_num_seqs)


class DecodeSteps:
    """Computes the logits and tokens of single queries that StepBuffers holds, with `prefixes` by groups of rows."""

    def __init__(
        self, model: "FusedLlama", buffers: StepBuffers, sampler: "KernelSampler", logits: torch.Tensor,
        prefixes: SharedPrefixes | None = None,
    ) -> None:  # fmt: skip
        limits = buffers.limits
        self.sizes = shared_sizes(limits.max_num_seqs) if prefixes else batch_sizes(limits.max_rows)
        self.prefixes = prefixes
        self.hidden: torch.Tensor | None = None  # [rows, hidden] for who wants the last layer's output
        self.follow: Callable[[KernelBatch, torch.Tensor], None] | None = None  # shows it to them within the step
        self.graphs: dict[int, Graph] = {}
        self._model, self._buffers, self._sampler, self._logits = model, buffers, sampler, logits

    def padded(self, num_rows: int) -> int:
        """The least size that holds the batch."""
        return next(size for size in self.sizes if size >= num_rows)

    def run(self, num_rows: int) -> None:
        """Compute the step that is loaded; by its graph, if there is one."""
        size = self.padded(num_rows)
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self.compute(size)

    def compute(self, size: int) -> None:
        """One step of `size` rows: logits to their place, tokens to the sampler's."""
        buffers, batch = self._buffers, self._buffers.singles(size)
        if self.prefixes is not None:
            batch = replace(batch, prefixes=self.prefixes.of_rows(size))
        x, residual = self._model.body(batch)
        if self.hidden is not None:
            torch.add(x, residual, out=self.hidden[:size])
            if self.follow is not None:
                self.follow(batch, self.hidden[:size])
        logits = self._model.head(x, residual, out=self._logits[:size])
        self._sampler(logits, buffers.temperatures, buffers.seeds, buffers.num_tokens)

    def capture(self, pool: Any, *, show_progress: bool) -> None:
        """Capture a graph for each size; the rows loaded now must be padding, for each is computed once before."""
        for size in tqdm(self.sizes[::-1], desc="Capturing CUDA graphs", disable=not show_progress, leave=False):
            self.graphs[size] = captured(partial(self.compute, size), pool)


def captured(compute: Callable[[], None], pool: Any) -> Graph:
    """A graph of what `compute` launches, after one run that compiles what is new: a capture may load nothing."""
    compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    recording: AbstractContextManager[None] = torch.cuda.graph(graph, pool=pool)
    with recording:
        compute()
    return graph
