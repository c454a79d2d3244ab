"""Steps with chunks of prompts beside single tokens, as one CUDA graph for each shape of them.

    tokens     chunk a  chunk b  ... padding | single single single ... padding
    shape      up to 64, 256, 512 ... 2048    | up to 32, 128, max_num_seqs           chunks: up to 64 requests

A layer is some ten launches, and launching them one by one takes the host longer than the GPU takes for a few hundred
tokens: without these graphs whoever decodes waits for the host as soon as anybody's prompt is in the step. Logits and
sampling of the rows follow outside. Steps of more tokens, or more chunks, run kernel after kernel, without padding.
Without graphs the same kernels run on the same padded shapes: the bits are the same.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from minivllm.runner.decode_graphs import Graph, captured
from minivllm.runner.step_buffers import MOST_CHUNKS, LoadedStep, StepBuffers, StepLimits, StepShape

if TYPE_CHECKING:  # imports triton, which a CPU has not; memory.py asks this file for shapes on any machine
    from minivllm.models.fused_llama import FusedLlama

CHUNK_TOKENS = (64, 256, 512, 768, 1024, 1536, 2048)  # 64 rows take no longer than 16
SINGLES = (32, 128)
Hidden = tuple[torch.Tensor, torch.Tensor]  # what the last layer adds, and the residual it is added to: [T, hidden]


def mixed_shapes(limits: StepLimits) -> list[StepShape]:
    """Shapes for which a step with chunks is captured, each of at most max_num_batched_tokens and max_num_seqs."""
    num_chunks = min(MOST_CHUNKS, -(-limits.max_num_seqs // 4) * 4)
    return [
        StepShape(num_chunks, chunk_tokens, singles)
        for chunk_tokens, singles in product(
            _up_to(limits.max_num_batched_tokens, CHUNK_TOKENS), _up_to(limits.max_num_seqs, SINGLES)
        )
    ]


def _up_to(most: int, sizes: tuple[int, ...]) -> Iterator[int]:
    """The sizes below `most`, and `most` itself if it is not far beyond them."""
    yield from (size for size in sizes if size < most)
    if sizes is SINGLES or most <= sizes[-1]:
        yield most


class MixedSteps:
    """Computes the last layer's output for plans of any shape that StepBuffers holds."""

    def __init__(self, model: "FusedLlama", buffers: StepBuffers) -> None:
        self.shapes = mixed_shapes(buffers.limits)
        self.graphs: dict[StepShape, Graph] = {}
        self._model, self._buffers = model, buffers
        self._out = model.embeddings.new_empty(2, self.shapes[-1].num_tokens, model.config.hidden_size)

    def padded(self, own: StepShape) -> StepShape:
        """The least shape that holds the step; its own where it has no chunk, or too much for any graph."""
        if not own.chunks:
            return own
        fitting = (shape for shape in self.shapes if all(size >= need for size, need in zip(shape, own, strict=True)))
        return min(fitting, key=lambda shape: shape.num_tokens, default=own)

    def run(self, step: LoadedStep) -> Hidden:
        """Compute the step that is loaded; by its graph, if there is one."""
        if step.shape not in self.shapes:
            return self._model.body(self._buffers.ragged(step.shape, max(step.num_tokens)))
        if step.shape in self.graphs:
            self.graphs[step.shape].replay()
        else:
            self.compute(step.shape)
        x, residual = self._out[:, : step.shape.num_tokens]
        return x, residual

    def compute(self, shape: StepShape) -> None:
        """One step of this shape; what comes out goes to one place for all shapes, so that graphs keep no tensors."""
        hidden = self._model.body(self._buffers.ragged(shape, shape.chunk_tokens))
        for out, part in zip(self._out, hidden, strict=True):
            out[: shape.num_tokens] = part

    def capture(self, pool: Any, *, show_progress: bool) -> None:
        """Capture a graph for each shape, the largest first; nothing may be loaded but padding."""
        shapes = sorted(self.shapes, key=lambda shape: shape.num_tokens, reverse=True)
        for shape in tqdm(shapes, desc="Capturing CUDA graphs of chunks", disable=not show_progress, leave=False):
            self.graphs[shape] = captured(partial(self.compute, shape), pool)
