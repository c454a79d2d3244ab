"""What a model is (ModelConfig) and how an engine is run (EngineConfig); both frozen, both checked when built."""

from collections.abc import Mapping
from dataclasses import dataclass

from minivllm.errors import ConfigError, ModelError

Json = Mapping[str, object]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta`, and the context extension in use (`default`, `linear`, `llama3`)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    @staticmethod
    def from_json(config: Json) -> "RopeConfig":
        """Read transformers 5's `rope_parameters`, or the older `rope_theta` + `rope_scaling`."""
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise ModelError(f"config.json: rope_parameters must be an object, not {scaling!r}")
        kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
        if kind not in ("default", "linear", "llama3"):
            raise ModelError(f"config.json: rope type '{kind}' is not supported; use default, linear or llama3")
        if float(str(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)) != 1.0:
            raise ModelError("config.json: partial_rotary_factor other than 1.0 is not supported")

        def number(name: str, default: float) -> float:
            return float(str(scaling.get(name) or config.get(name) or default))

        return RopeConfig(
            theta=number("rope_theta", 10000.0),
            kind=kind,
            factor=number("factor", 1.0),
            low_freq_factor=number("low_freq_factor", 1.0),
            high_freq_factor=number("high_freq_factor", 4.0),
            original_max_position=int(number("original_max_position_embeddings", 8192)),
        )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense decoder: everything the model file needs, under one set of names."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # per layer: how many tokens a query sees, itself included; None: all
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    batch_invariant: bool = False  # a token's bits depend on no other token of the batch; CPU only, about 2x slower

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ModelError(f"config.json: {name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"config.json: {self.num_heads} query heads do not divide over {self.num_kv_heads} KV heads; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_size % 8 or not 8 <= self.head_size <= 256:
            raise ModelError(f"config.json: head size {self.head_size} must be a multiple of 8, from 8 to 256")
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(
                f"config.json: layer_types names {len(self.windows)} layers, the model has {self.num_layers}"
            )

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers, in the model's dtype."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def num_parameters(self) -> int:
        """Weights of the model, biases and norms included: 134,515,008 for SmolLM2-135M."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        attention = self.hidden_size * (q + 2 * kv) + q * self.hidden_size
        attention += self.qkv_bias * (q + 2 * kv) + self.output_bias * self.hidden_size
        attention += self.qk_norm * 2 * self.head_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + self.num_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size

    def window_of(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    @staticmethod
    def from_json(config: Json) -> "ModelConfig":
        """Normalise a Hugging Face config.json; names that differ between families meet here and nowhere else."""
        architectures = config.get("architectures") or []
        name = architectures[0] if isinstance(architectures, list | tuple) and architectures else "none"
        if name not in ARCHITECTURES:
            raise ModelError(f"architecture '{name}' is not supported; supported: {', '.join(ARCHITECTURES)}")
        family = ARCHITECTURES[name]
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"config.json: hidden_act '{config['hidden_act']}' is not supported; only silu is")
        if config.get("quantization_config"):
            raise ModelError("config.json: quantized checkpoints are not supported; use the unquantized weights")
        num_layers, num_heads = _integer(config, "num_hidden_layers"), _integer(config, "num_attention_heads")
        hidden_size = _integer(config, "hidden_size")
        has_bias = bool(config.get("attention_bias", False))
        return ModelConfig(
            family=family,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_integer(config, "num_key_value_heads", num_heads),
            head_size=_integer(config, "head_dim", hidden_size // max(num_heads, 1)),
            max_position=_integer(config, "max_position_embeddings", 2048),
            rms_norm_eps=float(str(config.get("rms_norm_eps", 1e-6))),
            rope=RopeConfig.from_json(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or has_bias,
            output_bias=has_bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(config, family, num_layers),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
            dtype=_dtype_name(config),
        )


def _integer(config: Json, name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"config.json: {name} must be an integer, not {value!r}")
    return value


def _windows(config: Json, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows by layer: Mistral windows every layer, Qwen only those that `layer_types` names."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or (family != "mistral" and not config.get("use_sliding_window")):
        return ()
    kinds = config.get("layer_types")
    if isinstance(kinds, list | tuple):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = 0 if family == "mistral" else _integer(config, "max_window_layers", 0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(str(v)) for v in value) if isinstance(value, list | tuple) else (int(str(value)),)


def _dtype_name(config: Json) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return name if name in DTYPES else "bfloat16"


def require_integers(**options: object) -> None:
    """Refuse options that are neither integers nor None."""
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{name} must be an integer, not {value!r}")
