"""The parts of a model's shape that have settings of their own: rotary embedding, latent attention, experts.

Each is read from a Hugging Face config.json and checked when built: an inconsistent one is a ModelError of one line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minivllm.errors import ModelError

Json = Mapping[str, object]

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
ROUTINGS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta`, and the context extension in use (`default`, `linear`, `llama3`, `yarn`)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0  # yarn: pairs that turn more often than this in the original context stay as they are
    beta_slow: float = 1.0  # ... and those that turn less often are slowed by the whole factor
    truncate: bool = True  # ... with both borders moved outward to whole pairs
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # yarn: what cos and sin are multiplied by, where the config says so outright

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ModelError(f"config.json: rope type '{self.kind}' is not supported; use {', '.join(ROPE_KINDS)}")
        for name in ("theta", "factor", "original_max_position", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ModelError(f"config.json: rope {name} must be above 0, not {getattr(self, name)}")
        if self.beta_fast < self.beta_slow:
            raise ModelError(
                f"config.json: rope beta_fast {self.beta_fast} must not be below beta_slow {self.beta_slow}"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ModelError(f"config.json: rope attention_factor must be above 0, not {self.attention_factor}")
        if self.kind == "yarn" and self.theta <= 1:
            raise ModelError(f"config.json: rope theta must be above 1 with yarn, not {self.theta}")

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: YaRN's temperature (Peng et al. 2023, section 3.4), 1 elsewhere."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the softmax scale by: the temperature of dimensions without rotation, squared."""
        if self.kind == "default" or not self.mscale_all_dim:
            return 1.0
        return _mscale(self.factor, self.mscale_all_dim) ** 2

    @staticmethod
    def from_json(config: Json) -> "RopeConfig":
        """Read transformers 5's `rope_parameters`, or the older `rope_theta` + `rope_scaling`."""
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise ModelError(f"config.json: rope_parameters must be an object, not {scaling!r}")
        if any(isinstance(value, Mapping) for value in scaling.values()):
            raise ModelError("config.json: rope_parameters that differ between kinds of layers are not supported")
        merged = {**config, **{name: value for name, value in scaling.items() if value is not None}}
        if number(merged, "partial_rotary_factor", 1.0) != 1.0:
            raise ModelError("config.json: partial_rotary_factor other than 1.0 is not supported")
        longest = number(merged, "max_position_embeddings", 8192)
        original = number(merged, "original_max_position_embeddings", longest)
        return RopeConfig(
            theta=number(merged, "rope_theta", 10000.0),
            kind=str(scaling.get("rope_type") or scaling.get("type") or "default"),
            factor=number(merged, "factor", longest / original if scaling and original > 0 else 1.0),
            low_freq_factor=number(merged, "low_freq_factor", 1.0),
            high_freq_factor=number(merged, "high_freq_factor", 4.0),
            original_max_position=int(original),
            beta_fast=number(merged, "beta_fast", 32.0),
            beta_slow=number(merged, "beta_slow", 1.0),
            truncate=bool(merged.get("truncate", True)),
            mscale=number(merged, "mscale", 0.0),
            mscale_all_dim=number(merged, "mscale_all_dim", 0.0),
            attention_factor=number(merged, "attention_factor") if merged.get("attention_factor") is not None else None,
        )


# Our names and those of config.json, which users know from their files.
KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "nope_head_size": "qk_nope_head_dim",
    "rope_head_size": "qk_rope_head_dim",
    "v_head_size": "v_head_dim",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_dense_layers": "first_k_dense_replace",
    "layer_frequency": "moe_layer_freq",
    "num_groups": "n_group",
}


def require_at_least(config: object, least: int, *names: str) -> None:
    """Refuse fields of a config that are smaller. Raises ModelError, which names them as config.json does."""
    for name in names:
        if getattr(config, name) < least:
            raise ModelError(
                f"config.json: {KEYS.get(name, name)} must be at least {least}, not {getattr(config, name)}"
            )


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): the cache holds one latent and one rope key per token."""

    kv_lora_rank: int  # size of the latent, from which every head's key and value are made
    nope_head_size: int  # of a query or key, the part made from the latent
    rope_head_size: int  # of a query or key, the part that carries the position; all heads share the key's
    v_head_size: int
    q_lora_rank: int | None = None  # size of the query's own latent; None: queries come straight from the hidden state
    interleaved_rope: bool = True  # pairs are (0, 1), (2, 3) ... in the checkpoint; else (i, i + size / 2)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "kv_lora_rank", "nope_head_size", "rope_head_size", "v_head_size")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ModelError(f"config.json: q_lora_rank must be at least 1, or null for none, not {self.q_lora_rank}")
        if self.rope_head_size % 2:
            raise ModelError(
                f"config.json: qk_rope_head_dim must be even (pairs are turned), not {self.rope_head_size}"
            )

    @property
    def row_size(self) -> int:
        """Numbers the cache holds per token and layer: 576 for DeepSeek-V2 and V3."""
        return self.kv_lora_rank + self.rope_head_size

    @property
    def qk_head_size(self) -> int:
        return self.nope_head_size + self.rope_head_size

    @staticmethod
    def from_json(config: Json) -> "MlaConfig":
        return MlaConfig(
            kv_lora_rank=integer(config, "kv_lora_rank"),
            nope_head_size=integer(config, "qk_nope_head_dim"),
            rope_head_size=integer(config, "qk_rope_head_dim"),
            v_head_size=integer(config, "v_head_dim"),
            q_lora_rank=None if config.get("q_lora_rank") is None else integer(config, "q_lora_rank"),
            interleaved_rope=bool(config.get("rope_interleave", True)),
        )


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts (DeepSeekMoE): which layers have one, its sizes, and how a token finds its experts."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    num_shared_experts: int = 0  # experts that every token visits, computed as one wide MLP
    num_dense_layers: int = 0  # the first layers keep a plain MLP
    layer_frequency: int = 1  # of the layers after those, every how many have experts
    routing: str = "greedy"  # greedy and group_limited_greedy: softmax (V2); noaux_tc: sigmoid and a bias (V3)
    num_groups: int = 1
    groups_per_token: int = 1  # experts are looked for in that many of the groups only
    normalize_weights: bool = False  # a token's weights are made to sum to 1 before they are scaled
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS:
            raise ModelError(f"config.json: topk_method '{self.routing}' is unknown; there are {', '.join(ROUTINGS)}")
        if self.intermediate_size < 1:
            raise ModelError(f"config.json: moe_intermediate_size must be at least 1, not {self.intermediate_size}")
        require_at_least(self, 1, "num_experts", "experts_per_token", "num_groups", "layer_frequency")
        require_at_least(self, 0, "num_shared_experts", "num_dense_layers")
        if self.num_experts % self.num_groups:
            raise ModelError(f"config.json: {self.num_experts} experts do not divide into n_group={self.num_groups}")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ModelError(
                f"config.json: topk_group must be from 1 to {self.num_groups}, not {self.groups_per_token}"
            )
        reachable = self.groups_per_token * self.group_size if self.has_groups else self.num_experts
        if self.experts_per_token > reachable:
            raise ModelError(
                f"config.json: num_experts_per_tok is {self.experts_per_token}, a token can reach {reachable} experts"
            )
        if self.routing == "noaux_tc" and self.group_size < 2:
            raise ModelError("config.json: noaux_tc scores a group by its best two experts; lower n_group")
        if self.normalize_weights and self.routing != "noaux_tc":  # DeepSeek's own code and transformers' differ there
            raise ModelError("config.json: norm_topk_prob is for topk_method noaux_tc; set it to false")

    @property
    def has_groups(self) -> bool:
        return self.routing != "greedy"

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    def has_experts(self, layer: int) -> bool:
        return layer >= self.num_dense_layers and layer % self.layer_frequency == 0

    @staticmethod
    def from_json(config: Json, *, is_v3: bool) -> "MoeConfig | None":
        """The experts of a DeepSeek config.json, or None where it names none."""
        if config.get("n_routed_experts") is None:
            return None
        routing = str(config.get("topk_method") or ("noaux_tc" if is_v3 else "greedy"))
        scoring = str(config.get("scoring_func") or ("sigmoid" if is_v3 else "softmax"))
        fits = routing not in ROUTINGS or is_v3 == (routing == "noaux_tc")
        if not fits or scoring != ("sigmoid" if is_v3 else "softmax"):
            wanted = "noaux_tc and sigmoid" if is_v3 else "greedy or group_limited_greedy, and softmax"
            raise ModelError(
                f"config.json: topk_method '{routing}' with scoring_func '{scoring}' is not what "
                f"{'DeepseekV3' if is_v3 else 'DeepseekV2'}ForCausalLM computes; it takes {wanted}"
            )
        has_groups = routing != "greedy"
        return MoeConfig(
            num_experts=integer(config, "n_routed_experts"),
            experts_per_token=integer(config, "num_experts_per_tok"),
            intermediate_size=integer(config, "moe_intermediate_size"),
            num_shared_experts=integer(config, "n_shared_experts", 0),
            num_dense_layers=integer(config, "first_k_dense_replace"),
            layer_frequency=integer(config, "moe_layer_freq", 1),
            routing=routing,
            num_groups=integer(config, "n_group") if has_groups else 1,
            groups_per_token=integer(config, "topk_group") if has_groups else 1,
            normalize_weights=bool(config.get("norm_topk_prob", is_v3)),
            scaling_factor=number(config, "routed_scaling_factor"),
        )


def integer(config: Json, name: str, default: int | None = None) -> int:
    """An integer of a config.json. Raises ModelError where it is something else, or missing without a default."""
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelError(f"config.json: {name} must be an integer, not {value!r}")
    return value


def number(config: Json, name: str, default: float | None = None) -> float:
    """A finite number of a config.json; null is as good as missing. Raises ModelError as `integer` does."""
    value = config.get(name)
    if value is None:
        value = default
    try:
        found = float(str(value))
    except ValueError as error:
        raise ModelError(f"config.json: {name} must be a number, not {value!r}") from error
    if not math.isfinite(found):
        raise ModelError(f"config.json: {name} must be a finite number, not {value!r}")
    return found


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature: 0.1 * weight * ln(factor) + 1, so 1.26 for a factor of 40 and DeepSeek-V2's 0.707."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
