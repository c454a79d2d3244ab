"""Reading a Hugging Face config.json under any of the names its fields have had, and the public models kept as data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from minivllm.config import Json
from minivllm.errors import ModelError, short

Config = Json | str  # a parsed config.json, or the name of a public model: "llama-3-8b"

NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        "num_key_value_heads",
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
        "kv_n_heads",
        "num_attention_groups",
    ),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "sliding_window": ("sliding_window", "window_size"),
}
RENAMED = {
    "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "RefinedWebModel": "falcon", "RefinedWeb": "falcon",
}  # fmt: skip
NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
MOST = 10**12  # no field that counts something is larger

# What transformers fills in where a published config.json leaves a field out.
LEFT_OUT: dict[str, Json] = {
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "vocab_size": 262208, "tie_word_embeddings": True, "sliding_window_pattern": 6,
    },
    "gemma3n_text": {"sliding_window": 512, "sliding_window_pattern": 5, "num_kv_shared_layers": 15},
    "qwen2": {"max_window_layers": 28},
    "qwen3": {"head_dim": 128, "max_window_layers": 28},
    "gpt_bigcode": {"multi_query": True},
    "falcon": {"multi_query": True},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "sliding_window_pattern": 4},
    "smollm3": {"tie_word_embeddings": True},
}  # fmt: skip


@dataclass(frozen=True)
class PublicModel:
    """A model as published: its config.json, where that was read, and how many parameters its makers state."""

    name: str
    config: Json
    source: str
    published_parameters: str  # as printed: "8,030,261,248", or rounded: "70.6B"
    published_source: str


@lru_cache
def public_models() -> Mapping[str, PublicModel]:
    """Every model of public_models.json by its short name."""
    raw = json.loads((Path(__file__).parent / "public_models.json").read_text())
    return {name: PublicModel(name, **entry) for name, entry in raw.items()}


def public_config(name: str) -> Json:
    """The config of a public model: public_config("llama-3-8b"). Raises ModelError, with the nearest names."""
    models = public_models()
    wanted = name.lower() if isinstance(name, str) else ""
    if wanted not in models:
        near = get_close_matches(wanted, models, n=3, cutoff=0.4) or sorted(models)[:3]
        raise ModelError(
            f"no public model is called {short(name)}; close: {', '.join(near)}; or pass its config.json as a dict"
        )
    return models[wanted].config


class Fields:
    """One decoder's fields; every question names its field, and a wrong answer is a ModelError that names it too."""

    def __init__(self, config: Config) -> None:
        if isinstance(config, str):
            config = public_config(config)
        if not isinstance(config, Mapping):
            raise ModelError(f"a config must be a dict read from config.json or a model's name, not {short(config)}")
        fields = _decoder(config)
        self.family = _family(fields, config)
        attention = fields.get("attn_config")  # MPT keeps its attention apart
        flat = {**attention, **fields} if isinstance(attention, Mapping) else fields
        filled = {**LEFT_OUT.get(self.family, {}), **flat}  # an explicit null stays one
        self._fields: dict[str, object] = {key: value for key, value in filled.items() if value is not None}

    def get(self, name: str) -> object:
        """The field under any of its names; None where it is absent or null."""
        return next((self._fields[n] for n in NAMES.get(name, (name,)) if self._fields.get(n) is not None), None)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer field. Raises ModelError where it is missing without a default, or is no count."""
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"config.json: {name} is missing; add it: the answer depends on it")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ModelError(f"config.json: {name} must be an integer of at least {least}, not {short(value)}")
        if value > MOST:
            raise ModelError(f"config.json: {name} must be an integer of at most 10^12; is it another number?")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A true-or-false field. Raises ModelError for anything else."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelError(f"config.json: {name} must be true or false, not {short(value)}")
        return value

    def words(self, name: str) -> tuple[object, ...] | None:
        """A list field. Raises ModelError for anything else."""
        value = self.get(name)
        if value is not None and not isinstance(value, list | tuple):
            raise ModelError(f"config.json: {name} must be a list with one entry for each layer, not {short(value)}")
        return None if value is None else tuple(value)


def _decoder(config: Json) -> Json:
    """The part of a multimodal config that describes the language model; a plain config is all of that."""
    nested = next((config[name] for name in NESTED if isinstance(config.get(name), Mapping)), None)
    outer_tie = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return _decoder({**outer_tie, **nested}) if isinstance(nested, Mapping) else dict(config)


def _family(fields: Json, outer: Json) -> str:
    family = fields.get("model_type") or outer.get("model_type") or "llama"
    if not isinstance(family, str):
        raise ModelError(f"config.json: model_type must be a word such as 'llama', not {short(family)}")
    return RENAMED.get(family, family)
