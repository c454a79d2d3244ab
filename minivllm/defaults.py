"""What follows from a model and a machine where the user says nothing: dtype, size of the pool, longest request."""

import json
from pathlib import Path

from minivllm.config import DTYPE_BYTES, DTYPES, ModelConfig
from minivllm.errors import ConfigError
from minivllm.outputs import Tokenizer
from minivllm.runner.device import choose_dtype, default_kv_cache_memory
from minivllm.runner.kv_storage import blocks_in
from minivllm.weights import ModelSource


def read_model_config(source: ModelSource, dtype: str, device: str) -> ModelConfig:
    """The model's shape in the dtype it will run in. Raises ModelError and ConfigError."""
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    config = {**source.config, "dtype": choose_dtype(device) if dtype == "auto" else dtype}
    generation = (source.folder or Path()) / "generation_config.json"
    if source.folder and generation.is_file():  # Llama 3 lists its ends of turn only there
        config["eos_token_id"] = json.loads(generation.read_text()).get("eos_token_id", config.get("eos_token_id"))
    return ModelConfig.from_json(config)


def pool_size(
    config: ModelConfig, block_size: int, num_blocks: int | None, kv_cache_memory: int | None, device: str
) -> int:
    """Blocks of the KV pool, the null block included: as asked, or as many as the budget buys."""
    if not 1 <= block_size <= 256:
        raise ConfigError(f"block_size must be from 1 to 256, not {block_size}")
    if num_blocks is not None:
        if num_blocks < 2:
            raise ConfigError(f"num_blocks must be at least 2 (block 0 holds no tokens), not {num_blocks}")
        return num_blocks
    if kv_cache_memory is None:
        weight_bytes = config.num_parameters * DTYPE_BYTES[config.dtype]
        kv_cache_memory = default_kv_cache_memory(device, weight_bytes)
    most = config.max_position * 1024  # a thousand requests of full length: more would never be used
    return min(blocks_in(kv_cache_memory, config, block_size), 1 + most // block_size)


def longest_request(config: ModelConfig, asked: int | None, fits: int) -> int:
    """max_model_len: what was asked for, else what the pool and the model's positions allow."""
    if asked is not None and asked > config.max_position:
        raise ConfigError(f"max_model_len {asked} is beyond the model's {config.max_position} positions; lower it")
    return min(fits, config.max_position) if asked is None else asked


def load_tokenizer(source: ModelSource) -> Tokenizer | None:
    """The model's own tokenizer, where it has one."""
    if source.folder is None or not source.has_tokenizer:
        return None
    from transformers import AutoTokenizer  # seconds to import, and models run without it

    return AutoTokenizer.from_pretrained(source.folder)  # it decodes batches too
