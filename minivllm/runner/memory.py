"""How much of a GPU is left for the KV pool: measured, not guessed.

| others, CUDA | weights | the largest step | graphs | KV pool ...................... | 1 - gpu_memory_utilization |
0                                                                                                              total
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minivllm.config import ModelConfig
from minivllm.engine.plan import StepPlan
from minivllm.errors import ConfigError
from minivllm.layer_groups import LayerGroups
from minivllm.models.decoder import Decoder
from minivllm.request import BlockTable, Request, SamplingParams
from minivllm.runner.decode_graphs import batch_sizes, shared_sizes
from minivllm.runner.device import GIB
from minivllm.runner.kv_storage import KVStorage, block_bytes
from minivllm.runner.mixed_graphs import mixed_shapes
from minivllm.runner.model_runner import ModelRunner
from minivllm.runner.step_buffers import StepLimits

GRAPH_BYTES = 8 * 2**20  # what the driver keeps for a captured step, beside the tensors, which share one pool


@dataclass(frozen=True)
class GpuUse:
    """Bytes of a GPU: all there are, those in use beside the KV pool, those that steps and graphs will take."""

    total: int
    in_use: int
    by_steps: int
    by_graphs: int

    def left_for_kv(self, utilization: float, least: int) -> int:
        """Bytes for the pool. Raises ConfigError where that is less than `least`, one block and the null block."""
        left = int(self.total * utilization) - self.in_use - self.by_steps - self.by_graphs
        if left < least:
            raise ConfigError(
                f"gpu_memory_utilization={utilization:g} of {self.total / GIB:.1f} GiB leaves no KV pool: weights and "
                f"others take {self.in_use / GIB:.2f} GiB, the largest step {self.by_steps / GIB:.2f}, graphs "
                f"{self.by_graphs / GIB:.2f}; raise it, or lower max_num_batched_tokens or max_num_seqs"
            )
        return left


def measure(
    model: Decoder, config: ModelConfig, groups: LayerGroups, limits: StepLimits, device: str, *, has_graphs: bool
) -> GpuUse:
    """Run one step of the most tokens beside the loaded weights, and see what it takes."""
    free_unused_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with memory_for(f"a step of max_num_batched_tokens={limits.max_num_batched_tokens}: lower it"):
        run_largest_step(model, config, groups, limits, device)
    by_steps = torch.cuda.max_memory_allocated() - before
    free_unused_memory()
    free, total = torch.cuda.mem_get_info()
    return GpuUse(total, total - free, by_steps, graph_bytes(limits, by_steps) if has_graphs else 0)


def graph_bytes(limits: StepLimits, by_largest_step: int) -> int:
    """What graphs will take: for each, and the tensors of the one of most tokens, as its share of the largest step."""
    shapes = mixed_shapes(limits)
    num_graphs = len(batch_sizes(limits.max_rows)) + len(shared_sizes(limits.max_num_seqs)) + len(shapes)
    most_tokens = max(shape.num_tokens for shape in shapes)
    return GRAPH_BYTES * num_graphs + by_largest_step * most_tokens // limits.max_num_batched_tokens


def run_largest_step(model: Decoder, config: ModelConfig, groups: LayerGroups, limits: StepLimits, device: str) -> None:
    """Compute max_num_batched_tokens tokens of as many requests as may be, all of whose blocks are the same one."""
    storage = KVStorage(config, 2, limits.block_size, device, groups=groups)
    runner = ModelRunner(model, config, storage, device, limits)
    num_requests = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    num_new = max(1, min(limits.max_num_batched_tokens // num_requests, limits.max_model_len))
    tables = [BlockTable([1] * -(-num_new // limits.block_size)) for _ in groups.windows]
    params = SamplingParams(temperature=0)
    requests = [Request(str(i), [0] * num_new, num_new, params, 1, tables=tables) for i in range(num_requests)]
    runner.run(StepPlan(0, [(request, num_new) for request in requests], [], []))
    torch.cuda.synchronize()


def free_unused_memory() -> None:
    """Give back what nobody holds any more, so that it can be seen."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn the GPU's out-of-memory error into one line that names the figure to lower."""
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info()
        room = f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free"
        raise ConfigError(f"the GPU has no memory for {what} ({room})") from None  # whose frames would hold tensors


def least_pool(config: ModelConfig, block_size: int, groups: LayerGroups) -> int:
    """Bytes of the smallest pool: the null block and one for each group of layers."""
    return (1 + len(groups.windows)) * block_bytes(config, block_size, groups)
