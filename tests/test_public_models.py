"""The public models kept as data: their counts as published, and ours as transformers and the engine count them."""

import re
from collections.abc import Mapping

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, set_seed

from minivllm.config import ModelConfig
from minivllm.course import calculators as c
from minivllm.course.calculators import kv_bytes_of_sequence, kv_bytes_per_token, num_parameters, public_models
from minivllm.course.calculators.parameters import FAMILIES
from minivllm.errors import ModelError
from minivllm.runner.kv_storage import KVStorage
from minivllm.weights import builtin_configs

MODELS = public_models()
UNCOUNTED = ("llama4_text", "qwen3_next")  # their KV is counted, their parameters are refused
COUNTED = [name for name, model in MODELS.items() if model.config["model_type"] not in UNCOUNTED]

# One of each architecture, small enough to lay out without memory in a moment.
LAID_OUT = [
    "gpt2-xl", "opt-13b", "llama-3-8b", "llama-3.1-405b", "llama-3.2-1b", "mistral-7b-v0.1", "mistral-nemo-12b",
    "mixtral-8x7b", "qwen2.5-7b", "qwen1.5-moe-a2.7b", "qwen3-0.6b", "qwen3-30b-a3b", "gemma-2b", "gemma-2-9b",
    "gemma-3-4b-text", "phi-2", "phi-4", "falcon-7b", "falcon-180b", "mpt-7b", "starcoder", "starcoder2-7b",
    "deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b", "glm-4-9b-0414", "olmo-1b", "olmo-2-13b", "smollm3-3b",
    "granite-3.3-8b", "command-r-35b", "pythia-6.9b", "stablelm-3b-4e1t", "bloom-176b",
]  # fmt: skip
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 96}
TINY: dict[str, Mapping[str, object]] = {
    "llama": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2},
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 96},
    "gpt_bigcode": {"n_layer": 3, "n_head": 4, "n_embd": 64, "vocab_size": 96},
    "falcon": SIZES,
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 16},
    "gpt_oss": {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 4,
                "num_experts_per_tok": 2},
}  # fmt: skip


def layout(config: Mapping[str, object]) -> torch.nn.Module:
    """The model of a config, without memory for its weights."""
    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[str(config["model_type"])](**fields))


def rounds_to(count: int, printed: str) -> bool:
    """Whether a count is the printed one: exact where all digits are there, else to the printed decimals."""
    number, unit = re.fullmatch(r"([\d,.]+)([BM]?)", printed).groups()  # type: ignore[union-attr]
    if not unit:
        return count == int(number.replace(",", ""))
    return f"{count / {'B': 1e9, 'M': 1e6}[unit]:.{len(number.partition('.')[2])}f}" == number


def test_more_than_forty_models_name_where_they_were_read() -> None:
    assert len(MODELS) >= 40
    assert all(len(m.source) > 10 and m.published_parameters and len(m.published_source) > 10 for m in MODELS.values())


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_as_published(name: str) -> None:
    assert rounds_to(int(num_parameters(name)), MODELS[name].published_parameters)


def test_most_counts_are_published_to_the_last_digit() -> None:
    assert sum("," in model.published_parameters for model in MODELS.values()) >= 75


@pytest.mark.parametrize("name", LAID_OUT)
def test_parameters_are_as_many_as_in_transformers(name: str) -> None:
    model = layout(MODELS[name].config)
    routing = sum(b.numel() for key, b in model.named_buffers() if key.endswith("e_score_correction_bias"))
    assert num_parameters(name) == sum(p.numel() for p in model.parameters()) + routing


def test_every_family_of_transformers_is_laid_out_or_has_another_name() -> None:
    seen = {str(MODELS[name].config["model_type"]) for name in LAID_OUT}
    assert set(FAMILIES) - seen == {"palm", "chinchilla", "chatglm", "glm", "cohere2", "ministral", "qwen3_moe"} - seen


@pytest.mark.parametrize("name", UNCOUNTED)
def test_parameters_of_other_families_are_refused_in_one_line(name: str) -> None:
    model = next(m for m in MODELS.values() if m.config["model_type"] == name)
    with pytest.raises(ModelError, match=f"'{name}' cannot be counted here; its KV bytes can") as refusal:
        num_parameters(model.config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", TINY)
def test_bytes_are_those_of_the_cache_of_transformers(family: str) -> None:
    config = CONFIG_MAPPING[family](**TINY[family])
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        cache = model(torch.randint(0, 90, (1, 11)), use_cache=True).past_key_values  # shorter than any window
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_bytes_of_sequence(config.to_dict(), 11, "float32") == held


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2", "gpt_oss", "qwen3_next", "llama4_text"])
def test_kinds_of_layers_are_those_that_transformers_fills_in(family: str) -> None:
    config: PreTrainedConfig = CONFIG_MAPPING[family]()
    kinds = {"full_attention": "full", "sliding_attention": "window", "chunked_attention": "chunk"}
    expected = [kinds.get(kind, "linear") for kind in config.layer_types]
    bare = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "no_rope_layers")}
    if family == "qwen3_next":
        bare["full_attention_interval"] = 4
    assert [layer.kind for layer in c.attention_shape(bare).layers] == expected


def engine_configs() -> dict[str, Mapping[str, object]]:
    """Every config at hand that the engine can build."""
    found = {**{name: model.config for name, model in MODELS.items()}, **builtin_configs()}
    built = {}
    for name, config in found.items():
        try:
            ModelConfig.from_json(config)
        except ModelError:
            continue
        built[name] = config
    return built


@pytest.mark.parametrize("name, config", engine_configs().items(), ids=str)
def test_the_engine_allocates_the_bytes_that_the_calculator_says(name: str, config: Mapping[str, object]) -> None:
    model = ModelConfig.from_json(config)
    storage = KVStorage(model, num_blocks=2, block_size=16, device="cpu")
    assert storage.num_bytes == 2 * 16 * int(kv_bytes_per_token(config, model.dtype))


@pytest.mark.parametrize("name", [name for name in engine_configs() if name in COUNTED])
def test_the_engine_counts_the_same_parameters(name: str) -> None:
    assert ModelConfig.from_json(MODELS[name].config).num_parameters == num_parameters(name)
