"""From a model and options to an engine that runs, in the order in which a device's memory wants it.

On a GPU: weights, the largest step, then as many KV blocks as there is room for, then the graphs over them.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from minivllm.config import ModelConfig
from minivllm.defaults import choose_groups, engine_config, longest_request, pool_size
from minivllm.engine_config import EngineConfig, Policies
from minivllm.errors import ConfigError
from minivllm.layer_groups import LayerGroups
from minivllm.models.decoder import Decoder
from minivllm.runner.device import GIB
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.loader import build_model
from minivllm.runner.memory import least_pool, measure, memory_for
from minivllm.runner.model_runner import ModelRunner
from minivllm.runner.proposers import Drafters
from minivllm.runner.speculation import Speculation
from minivllm.runner.step_buffers import StepLimits
from minivllm.speculative_config import for_device
from minivllm.weights import ModelSource

UNLIMITED_BLOCKS = 2**40


@dataclass(frozen=True)
class Sizes:
    """What the user says of the pool; None: as follows from the machine."""

    block_size: int
    max_model_len: int | None
    num_blocks: int | None
    kv_cache_memory: int | None
    swap_space: float
    drafter_bytes: int = 0  # of a token, kept by drafters beside the target's K and V


@dataclass(frozen=True)
class GpuOptions:
    """What matters on a GPU alone."""

    enforce_eager: bool
    gpu_memory_utilization: float
    async_scheduling: bool | None  # None: unless enforce_eager

    def __post_init__(self) -> None:
        if not isinstance(self.enforce_eager, bool):
            raise ConfigError(f"enforce_eager must be True or False, not {self.enforce_eager!r}")
        if not isinstance(self.async_scheduling, bool | None):
            raise ConfigError(f"async_scheduling must be True, False or None, not {self.async_scheduling!r}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must be above 0 and at most 1, not {share!r}")


class Phases:
    """Tells what each phase of a start brought and how long it took."""

    def __init__(self, *, is_told: bool) -> None:
        self.is_told = is_told

    @contextmanager
    def of(self, words: Callable[[], str]) -> Iterator[None]:
        """Time the block under `with`; `words` are asked for when it has ended well."""
        started_s = time.perf_counter()
        yield
        if self.is_told:
            tqdm.write(f"{words()}: {time.perf_counter() - started_s:.1f} s", file=sys.stderr)


@dataclass(frozen=True)
class Started:
    config: EngineConfig
    storage: KVStorage
    runner: ModelRunner


def start(
    source: ModelSource, model: ModelConfig, policies: Policies, sizes: Sizes, gpu: GpuOptions, *, device: str,
    has_weights: bool, seed: int, show_progress: bool,
) -> Started:  # fmt: skip
    """Load the model and make its runner. Raises ModelError and ConfigError, one line each."""
    speculative = for_device(policies.get("speculative_config"), device)
    policies["speculative_config"] = speculative
    drafters = Drafters(speculative, model, source.folder, has_weights=has_weights, show_progress=show_progress)
    sizes = replace(sizes, drafter_bytes=drafters.bytes_per_token)
    groups, files = choose_groups(model, policies), source.weight_files if has_weights else []
    phases = Phases(is_told=show_progress and device == "cuda")
    built = None
    if device == "cuda":
        limits = limits_of(_check_early(model, policies, groups, sizes))
        with phases.of(lambda: f"weights, {torch.cuda.memory_allocated() / GIB:.2f} GiB"):
            built = _load(model, files, seed, device)
            drafters.load(built, seed, device)
        with phases.of(lambda: f"a step of {limits.max_num_batched_tokens:,} tokens, {use.by_steps / GIB:.2f} GiB"):
            use = measure(built, model, groups, limits, "cuda", has_graphs=not gpu.enforce_eager)
        if sizes.num_blocks is None and sizes.kv_cache_memory is None:
            least = least_pool(model, sizes.block_size, groups)
            sizes = replace(sizes, kv_cache_memory=use.left_for_kv(gpu.gpu_memory_utilization, least))
    config = _config(model, policies, groups, sizes, device)
    if built is None:
        built = _load(model, files, seed, device)
        drafters.load(built, seed, device)
    limits = limits_of(config)
    what = f"a KV pool of {config.num_blocks} blocks: lower kv_cache_memory or num_blocks"
    tokens = f"{config.num_blocks:,} blocks of {config.block_size} tokens"
    with phases.of(lambda: f"KV pool, {tokens}, {storage.num_bytes / GIB:.2f} GiB"), memory_for(what):
        storage = KVStorage(model, config.num_blocks, config.block_size, device, config.num_host_blocks, groups)
        runner = ModelRunner(built, model, storage, device, limits)
        if config.speculative:
            runner.speculate_with(Speculation(drafters.proposers(built, storage), model.eos_token_ids))
    runner.schedules_ahead = not gpu.enforce_eager and gpu.async_scheduling is not False
    if device == "cuda" and not gpu.enforce_eager:
        figure = f"lower gpu_memory_utilization ({gpu.gpu_memory_utilization:g}) or max_num_seqs"
        what = f"the graphs of steps: {figure}, or set enforce_eager=True"
        with phases.of(lambda: f"{runner.num_graphs} CUDA graphs of steps"), memory_for(what):
            runner.capture_graphs(show_progress=show_progress)
    return Started(config, storage, runner)


def limits_of(config: EngineConfig) -> StepLimits:
    """What the memory of a step is made for."""
    max_drafts = max((each.num_speculative_tokens for each in config.speculative), default=0)
    return StepLimits(
        config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len, config.block_size, max_drafts
    )


def _load(model: ModelConfig, files: list, seed: int, device: str) -> Decoder:
    with memory_for(f"the weights of {model.num_parameters:,} parameters in {model.dtype}: take a smaller model"):
        return build_model(model, files, seed, device)


def _config(model: ModelConfig, policies: Policies, groups: LayerGroups, sizes: Sizes, device: str) -> EngineConfig:
    size = sizes.num_blocks, sizes.kv_cache_memory
    num_blocks = pool_size(model, groups, sizes.block_size, *size, device, sizes.drafter_bytes)
    asked = sizes.max_model_len
    max_model_len = longest_request(model, policies, groups, asked, num_blocks, sizes.block_size)
    return engine_config(
        model, policies, groups, num_blocks=num_blocks, block_size=sizes.block_size, max_model_len=max_model_len,
        swap_space=sizes.swap_space,
    )  # fmt: skip


def _check_early(model: ModelConfig, policies: Policies, groups: LayerGroups, sizes: Sizes) -> EngineConfig:
    """What can be refused before the weights are loaded: all but the size of the pool."""
    num_blocks = UNLIMITED_BLOCKS if sizes.num_blocks is None else sizes.num_blocks
    return _config(model, policies, groups, replace(sizes, num_blocks=num_blocks, kv_cache_memory=None), "cuda")
