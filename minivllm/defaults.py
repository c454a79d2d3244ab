"""What follows from a model and a machine where the user says nothing: dtype, size of the pool, longest request."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from minivllm.config import DTYPE_BYTES, DTYPES, ModelConfig
from minivllm.engine_config import WHOLE_PROMPTS, EngineConfig, Policies, capacity_tokens
from minivllm.errors import ConfigError, ModelError
from minivllm.layer_groups import LayerGroups, group_layers, one_group
from minivllm.outputs import Tokenizer
from minivllm.runner.device import GIB, available_memory, choose_dtype, default_kv_cache_memory
from minivllm.runner.kv_storage import block_bytes, blocks_in
from minivllm.speculative_config import read_speculative
from minivllm.weights import ModelSource

DEFAULT_BUDGET = 2048  # tokens a step may compute
GROUPED_BUDGET = 512  # the same, where groups of layers with a window hold a whole chunk beside the window


def refuse_unknown(options: Mapping[str, object], function: Callable[..., None]) -> None:
    """Turn an option that vLLM has and we do not into one line that says which there are."""
    unknown = [name for name in options if name not in Policies.__annotations__]
    if unknown:
        known = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
        known += Policies.__annotations__
        raise ConfigError(f"LLM has no option {unknown[0]!r}: leave it out; there are {', '.join(known)}")


def caches_prefixes(policies: Policies) -> bool:
    """Whether prefixes are cached, where the user does not say: an allocator that cannot share has nothing to find."""
    asks_for_cache = "prefix_cache" in policies or "eviction_policy" in policies
    return policies.get("enable_prefix_caching", asks_for_cache or policies.get("allocator", "paged") == "paged")


def choose_groups(model: ModelConfig, policies: Policies) -> LayerGroups:
    """A table for each group of layers, where what a window has passed can be freed; else one table that keeps all."""
    is_chain = (policies.get("prefix_cache", "hash"), policies.get("eviction_policy", "lru")) == ("hash", "lru")
    is_apart = policies.get("allocator", "paged") == "paged" and (is_chain or not caches_prefixes(policies))
    return (group_layers if is_apart else one_group)(model.num_layers, model.windows)


def engine_config(
    model: ModelConfig,
    policies: Policies,
    groups: LayerGroups,
    *,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    swap_space: float,
) -> EngineConfig:
    """All decisions in one place: the policies as asked for, and what follows from the model and the pool."""
    chosen: dict[str, object] = {**policies, "enable_prefix_caching": caches_prefixes(policies)}
    chosen["speculative"] = read_speculative(chosen.pop("speculative_config", None))
    if swap_space and "num_host_blocks" in policies:
        raise ConfigError("swap_space and num_host_blocks say the same in other units: give one of them")
    if swap_space:
        chosen["num_host_blocks"] = host_blocks(swap_space, model, block_size, groups)
    num_host_blocks = policies.get("num_host_blocks")
    num_bytes = num_host_blocks * block_bytes(model, block_size, groups) if isinstance(num_host_blocks, int) else 0
    if num_bytes > available_memory():
        gib = f"{num_bytes / GIB:.1f} GiB, and {available_memory() / GIB:.1f} GiB are free"
        raise ConfigError(f"num_host_blocks={num_host_blocks} would take {gib}: give fewer")
    chosen["max_num_batched_tokens"] = step_budget(policies, groups, max_model_len)
    chosen["group_windows"] = groups.windows
    chosen |= {"num_blocks": num_blocks, "block_size": block_size, "max_model_len": max_model_len}
    return EngineConfig(**chosen, eos_token_ids=model.eos_token_ids)  # type: ignore[arg-type]


def host_blocks(swap_space: object, model: ModelConfig, block_size: int, groups: LayerGroups) -> int:
    """Host blocks that `swap_space` GiB hold."""
    if isinstance(swap_space, bool) or not isinstance(swap_space, int | float) or not 0 <= swap_space < 2**20:
        raise ConfigError(f"swap_space must be a number of GiB of at least 0, not {swap_space!r}")
    num_bytes = int(swap_space * GIB)
    if num_bytes > available_memory():
        raise ConfigError(f"swap_space of {swap_space} GiB is more than the {available_memory() / GIB:.1f} GiB free")
    return num_bytes // block_bytes(model, block_size, groups)


def read_model_config(source: ModelSource, dtype: str, device: str, batch_invariant: object) -> ModelConfig:
    """The model's shape in the arithmetic it will run in. Raises ModelError and ConfigError."""
    if not isinstance(batch_invariant, bool):
        raise ConfigError(f"batch_invariant must be True or False, not {batch_invariant!r}")
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    config = {**source.config, "dtype": choose_dtype(device) if dtype == "auto" else dtype}
    generation = (source.folder or Path()) / "generation_config.json"
    if source.folder and generation.is_file():  # Llama 3 lists its ends of turn only there
        config["eos_token_id"] = _read_generation(generation).get("eos_token_id", config.get("eos_token_id"))
    return replace(ModelConfig.from_json(config), batch_invariant=batch_invariant)


def _read_generation(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read '{path}' as JSON: download it again, or remove it") from error
    if not isinstance(content, dict):
        raise ModelError(f"'{path}' is not a JSON object: download it again, or remove it")
    return content


def pool_size(
    config: ModelConfig,
    groups: LayerGroups,
    block_size: int,
    num_blocks: int | None,
    kv_cache_memory: int | None,
    device: str,
    drafter_bytes: int = 0,
) -> int:
    """Blocks of the KV pool, the null block included: as asked, or as many as the budget buys.

    `drafter_bytes` is what drafters keep of a token beside it.
    """
    if not 1 <= block_size <= 256:
        raise ConfigError(f"block_size must be from 1 to 256, not {block_size}")
    if num_blocks is None:
        if kv_cache_memory is None:
            weight_bytes = config.num_parameters * DTYPE_BYTES[config.dtype]
            kv_cache_memory = default_kv_cache_memory(device, weight_bytes)
        most = config.max_position * 1024  # a thousand requests of full length: more would never be used
        most_blocks = 1 + len(groups.windows) * most // block_size
        num_blocks = min(blocks_in(kv_cache_memory, config, block_size, groups, drafter_bytes), most_blocks)
    if num_blocks < 2:
        raise ConfigError(f"num_blocks must be at least 2 (block 0 holds no tokens), not {num_blocks}")
    own_bytes = block_bytes(config, block_size, groups) + drafter_bytes * block_size
    num_bytes, free_bytes = num_blocks * own_bytes, available_memory()
    if device == "cpu" and num_bytes > free_bytes:
        gib = f"{num_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB are free"
        raise ConfigError(f"the KV pool would take {gib}: lower kv_cache_memory or num_blocks")
    return num_blocks


def longest_request(
    config: ModelConfig, policies: Policies, groups: LayerGroups, asked: int | None, num_blocks: int, block_size: int
) -> int:
    """max_model_len: what was asked for, else what the pool and the model's positions allow."""
    budget = step_budget(policies, groups, config.max_position)
    fits = capacity_tokens(num_blocks - 1, block_size, groups.windows, budget if isinstance(budget, int) else 1)
    if asked is not None and asked > config.max_position:
        raise ConfigError(f"max_model_len {asked} is beyond the model's {config.max_position} positions; lower it")
    if asked is None and fits < 2:
        raise ConfigError(
            f"a KV pool of {num_blocks - 1} blocks of {block_size} tokens holds no request, which has 2 tokens at "
            f"least in each group of layers ({len(groups.windows)}): raise num_blocks or kv_cache_memory"
        )
    return min(fits, config.max_position) if asked is None else asked


def step_budget(policies: Policies, groups: LayerGroups, max_model_len: int) -> int:
    """max_num_batched_tokens: as asked; without chunks, by default, the longest prompt fits in one step."""
    asked = policies.get("max_num_batched_tokens")
    if asked is not None:
        return asked
    is_chunked = policies.get("enable_chunked_prefill", True) and policies.get("batching") not in WHOLE_PROMPTS
    default = DEFAULT_BUDGET if len(groups.windows) == 1 else GROUPED_BUDGET
    return default if is_chunked else max(default, max_model_len)


def load_tokenizer(source: ModelSource) -> Tokenizer | None:
    """The model's own tokenizer, where it has one."""
    if source.folder is None or not source.has_tokenizer:
        return None
    from transformers import AutoTokenizer  # seconds to import, and models run without it

    return AutoTokenizer.from_pretrained(source.folder, model_max_length=10**9)  # it decodes batches too
