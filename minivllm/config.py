"""What a model is: everything its model file, its cache and its calculators need, under one set of names."""

import math
from dataclasses import dataclass, field

from minivllm.config_parts import Json, MlaConfig, MoeConfig, RopeConfig, integer, number, require_at_least
from minivllm.errors import ConfigError, ModelError

__all__ = ["DTYPES", "DTYPE_BYTES", "MlaConfig", "ModelConfig", "MoeConfig", "RopeConfig", "require_integers"]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MinistralForCausalLM": "mistral",  # the same, with windows in some layers only
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder: everything the model file needs, under one set of names."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int  # of queries and keys
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # per layer: how many tokens a query sees, itself included; None: all
    mla: MlaConfig | None = None  # latent attention instead of keys and values per head
    moe: MoeConfig | None = None  # experts instead of one MLP, in some layers or in all
    num_mtp_layers: int = 0  # layers a checkpoint has at its end, to draft several tokens at once: not loaded
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    batch_invariant: bool = False  # a token's bits depend on no other token of the batch; half as fast on a CPU

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        require_at_least(self, 1, *sizes)
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config.json: {self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.mla is None and (self.head_size % 8 or not 8 <= self.head_size <= 256):
            raise ModelError(f"config.json: head size {self.head_size} must be a multiple of 8, from 8 to 256")
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(
                f"config.json: layer_types names {len(self.windows)} layers, the model has {self.num_layers}"
            )
        if self.mla and self.num_kv_heads != self.num_heads:
            raise ModelError(
                f"config.json: latent attention makes a key for each of the {self.num_heads} query heads; "
                f"num_key_value_heads must say so too, not {self.num_kv_heads}"
            )
        if self.mla and self.windows:
            raise ModelError("config.json: latent attention has no sliding window; set use_sliding_window to false")
        if self.mla and self.batch_invariant:
            raise ConfigError("batch_invariant is not written for latent attention (DeepSeek): leave it out")

    @property
    def cache_entry(self) -> tuple[int, int, int]:
        """What one token takes in the cache of one layer, as (planes, heads, size).

        K and V of every KV head are (2, Hkv, D); a latent row, key and value in one, is (1, 1, kv_lora_rank + rope).
        """
        return (1, 1, self.mla.row_size) if self.mla else (2, self.num_kv_heads, self.head_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """What the cache holds of one token over all layers, in the model's dtype."""
        return self.num_layers * math.prod(self.cache_entry) * DTYPE_BYTES[self.dtype]

    @property
    def rotary_size(self) -> int:
        """Dimensions of a head that are turned by its position."""
        return self.mla.rope_head_size if self.mla else self.head_size

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by; DeepSeek alone adds YaRN's temperature here."""
        return self.head_size**-0.5 * (self.rope.softmax_factor if self.mla else 1.0)

    @property
    def num_parameters(self) -> int:
        """Weights of the model, biases and norms included: 134,515,008 for SmolLM2-135M."""
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        attention = self._latent_parameters(self.mla) if self.mla else self._attention_parameters()
        mlps = sum(self._mlp_parameters(layer) for layer in range(self.num_layers))
        return embeddings + self.num_layers * (attention + 2 * self.hidden_size) + mlps + self.hidden_size

    def _attention_parameters(self) -> int:
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        matrices = self.hidden_size * (q + 2 * kv) + q * self.hidden_size
        biases = self.qkv_bias * (q + 2 * kv) + self.output_bias * self.hidden_size
        return matrices + biases + self.qk_norm * 2 * self.head_size

    def _latent_parameters(self, mla: MlaConfig) -> int:
        rank, q = mla.q_lora_rank, self.num_heads * self.head_size
        query = self.hidden_size * q if rank is None else self.hidden_size * rank + rank + rank * q
        latent = self.hidden_size * mla.row_size + mla.kv_lora_rank  # with its norm
        expansion = mla.kv_lora_rank * self.num_heads * (mla.nope_head_size + mla.v_head_size)
        output = self.num_heads * mla.v_head_size * self.hidden_size
        biases = self.qkv_bias * ((rank or 0) + mla.row_size) + self.output_bias * self.hidden_size
        return query + latent + expansion + output + biases

    def _mlp_parameters(self, layer: int) -> int:
        if self.moe is None or not self.moe.has_experts(layer):
            return self._gated_mlp(self.intermediate_size, self.mlp_bias)
        moe = self.moe
        router = moe.num_experts * (self.hidden_size + (moe.routing == "noaux_tc"))
        experts = moe.num_experts * self._gated_mlp(moe.intermediate_size, has_bias=False)
        shared = moe.num_shared_experts * moe.intermediate_size
        return router + experts + (self._gated_mlp(shared, self.mlp_bias) if shared else 0)

    def _gated_mlp(self, size: int, has_bias: bool) -> int:
        return 3 * self.hidden_size * size + has_bias * (2 * size + self.hidden_size)

    def window_of(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @staticmethod
    def from_json(config: Json) -> "ModelConfig":
        """Normalise a Hugging Face config.json; names that differ between families meet here and nowhere else."""
        architectures = config.get("architectures") or []
        name = architectures[0] if isinstance(architectures, list | tuple) and architectures else "none"
        if not isinstance(name, str) or name not in ARCHITECTURES:
            raise ModelError(f"architecture '{name}' is not supported; supported: {', '.join(ARCHITECTURES)}")
        family = ARCHITECTURES[name]
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"config.json: hidden_act '{config['hidden_act']}' is not supported; only silu is")
        if config.get("quantization_config"):
            raise ModelError("config.json: quantized checkpoints are not supported; use the unquantized weights")
        is_deepseek = family.startswith("deepseek")
        mla = MlaConfig.from_json(config) if is_deepseek else None
        num_layers, num_heads = integer(config, "num_hidden_layers"), integer(config, "num_attention_heads")
        hidden_size = integer(config, "hidden_size")
        has_bias = bool(config.get("attention_bias", False))
        return ModelConfig(
            family=family,
            vocab_size=integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=integer(config, "num_key_value_heads", num_heads),
            head_size=mla.qk_head_size if mla else integer(config, "head_dim", hidden_size // max(num_heads, 1)),
            max_position=integer(config, "max_position_embeddings", 2048),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=RopeConfig.from_json(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or has_bias,
            output_bias=has_bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)) and family != "deepseek_v3",
            qk_norm=family == "qwen3",
            windows=_windows(config, family, num_layers),
            mla=mla,
            moe=MoeConfig.from_json(config, is_v3=family == "deepseek_v3") if is_deepseek else None,
            num_mtp_layers=integer(config, "num_nextn_predict_layers", 0),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            dtype=_dtype_name(config),
        )


def _windows(config: Json, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows by layer, as `layer_types` names them; else every layer of Mistral, the last ones of Qwen."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if kinds is not None and (not isinstance(kinds, list | tuple) or not kinds):
        raise ModelError(f"config.json: layer_types must be a list with the kind of each layer, not {kinds!r}")
    for layer, kind in enumerate(kinds or ()):
        if kind not in known:
            raise ModelError(f"config.json: layer {layer} has attention of the kind {kind!r}; use {' or '.join(known)}")
    if family != "mistral" and not config.get("use_sliding_window"):
        return ()
    if window is None and "sliding_attention" in (kinds or ()):
        raise ModelError("config.json: layer_types has sliding_attention, but sliding_window does not say how wide")
    if window is None:
        return ()
    window = integer(config, "sliding_window")
    if window < 1:
        raise ModelError(f"config.json: sliding_window must be at least 1 token or null, not {window}")
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = 0 if family == "mistral" else integer(config, "max_window_layers", 0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(integer({"eos_token_id": each}, "eos_token_id") for each in values)


def _dtype_name(config: Json) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return name if name in DTYPES else "bfloat16"


def require_integers(**options: object) -> None:
    """Refuse options that are neither integers nor None."""
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{name} must be an integer, not {value!r}")
