"""What each layer of a model keeps for each token: KV heads, an MLA latent, a window, a fixed state, or nothing.

    kind     keeps per token                 of a sequence of S tokens
    full     KV heads x (key + value size)   S
    window   the same                        min(S, W)
    chunk    the same                        min(S, W): at its peak, just before the next chunk begins
    shared   nothing: reads another's        0
    linear   nothing; a state of fixed size  0
An MLA layer is full, with the latent and one rotary key in place of K and V: DeepSeek-V2 (arXiv 2405.04434), table 1.
"""

from dataclasses import dataclass

from minivllm.course.calculators.model_fields import Config, Fields
from minivllm.errors import ModelError, short

KINDS = {
    "full_attention": "full", "attention": "full", "global": "full", "full": "full",
    "sliding_attention": "window", "local": "window", "window": "window",
    "chunked_attention": "chunk", "linear_attention": "linear",
}  # fmt: skip
# Windowed wherever sliding_window is a number.
ALWAYS_WINDOWED = ("mistral", "mixtral", "ministral", "phi3", "phimoe", "starcoder2")
PATTERNS = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "cohere2": 4}  # every n-th layer is global
MAX_LAYERS = 10_000
UNREADABLE = {
    "index_head_dim": "an indexer's keys", "global_head_dim": "global layers of another shape",
    "cross_attention_layers": "cross-attention", "attn_layer_period": "Mamba layers", "ssm_cfg": "Mamba layers",
    "mamba_d_state": "Mamba layers", "state_size": "Mamba layers", "conv_L_cache": "convolution layers",
    "block_types": "recurrent layers", "hybrid_override_pattern": "Mamba layers", "linear_attn_config": "linear layers",
    "swa_num_key_value_heads": "windowed layers of another shape", "block_configs": "layers of different shapes",
    "num_key_value_heads_per_layer": "layers of different shapes", "num_query_heads": "layers of different shapes",
    "use_cla": "layers that share K and V in pairs", "zero_expert_num": "two attentions in each layer",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's attention."""

    kind: str
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None
    latent_size: int = 0  # MLA: kv_lora_rank
    rope_size: int = 0  # MLA: the one rotary key of all heads
    state_elements: int = 0  # linear attention: independent of length

    @property
    def elements_per_token(self) -> int:
        """Numbers kept for one token: K and V, or latent and rotary key."""
        if self.kind in ("shared", "linear"):
            return 0
        return self.latent_size + self.rope_size or self.num_kv_heads * (self.key_size + self.value_size)

    def tokens_kept(self, num_tokens: int) -> int:
        """Tokens of a sequence that the layer holds."""
        return min(num_tokens, self.window) if self.window else num_tokens


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The layers of one decoder, first to last."""

    layers: tuple[Layer, ...]

    @property
    def is_mla(self) -> bool:
        return any(layer.latent_size for layer in self.layers)

    @property
    def first(self) -> Layer:
        """A layer that keeps tokens, to quote sizes from."""
        return next((layer for layer in self.layers if layer.elements_per_token), self.layers[0])

    @property
    def num_keeping(self) -> int:
        """Layers with K and V of their own."""
        return sum(layer.elements_per_token > 0 for layer in self.layers)

    @property
    def elements_per_token(self) -> int:
        return sum(layer.elements_per_token for layer in self.layers)

    @property
    def kind(self) -> str:
        """MLA, MHA, GQA or MQA."""
        layer = self.first
        if self.is_mla:
            return "MLA"
        if layer.num_kv_heads == layer.num_heads:
            return "MHA"
        return "MQA" if layer.num_kv_heads == 1 else "GQA"


def attention_shape(config: Config | AttentionShape) -> AttentionShape:
    """Read a config.json, or take the name of a public model. Raises ModelError where it does not add up."""
    if isinstance(config, AttentionShape):
        return config
    fields = Fields(config)
    for name, what in UNREADABLE.items():
        if fields.get(name) not in (None, False):
            raise ModelError(f"config.json: {name} means {what}, which this calculator cannot count; it would be wrong")
    if any(kind != 1 for kind in fields.words("attn_type_list") or ()):  # MiniMax: 1 is softmax, 0 lightning
        raise ModelError("config.json: attn_type_list names linear layers, which this calculator cannot count")
    if fields.flag("is_encoder_decoder"):
        raise ModelError("config.json: is_encoder_decoder is true; only decoders keep a KV cache this calculator knows")
    num_layers = fields.whole("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise ModelError(
            f"config.json: num_hidden_layers {num_layers} is more than {MAX_LAYERS}; is it another number?"
        )
    kinds = _kinds(fields, num_layers)
    plain = _mla_layer(fields) if fields.get("kv_lora_rank") is not None else _plain_layer(fields)
    num_shared = fields.whole("num_kv_shared_layers", 0, least=0)
    if num_shared >= num_layers:
        raise ModelError(f"config.json: num_kv_shared_layers {num_shared} must be below the {num_layers} layers")
    layers = tuple(_of_kind(fields, plain, kind) for kind in kinds[: num_layers - num_shared])
    return AttentionShape(layers + (_shared(plain),) * num_shared)


def _plain_layer(fields: Fields) -> Layer:
    num_heads = fields.whole("num_attention_heads")
    num_kv_heads = _num_kv_heads(fields, num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: {num_heads} query heads do not divide over {num_kv_heads} KV heads; "
            "num_attention_heads must be a multiple of num_key_value_heads"
        )
    head_size = _head_size(fields, num_heads)
    value_size = fields.whole("v_head_dim", head_size, least=0) or head_size  # 0 in DeepSeek models without MLA
    return Layer("full", num_heads, num_kv_heads, head_size, value_size)


def _head_size(fields: Fields, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        return fields.whole("head_dim")
    hidden_size = fields.whole("hidden_size")
    if hidden_size % num_heads:
        raise ModelError(
            f"config.json: hidden_size {hidden_size} does not divide over {num_heads} heads; add head_dim if it differs"
        )
    return hidden_size // num_heads


def _num_kv_heads(fields: Fields, num_heads: int) -> int:
    if fields.get("attn_type") not in (None, "multihead_attention", "multiquery_attention", "grouped_query_attention"):
        raise ModelError(f"config.json: attn_type {short(fields.get('attn_type'))} is unknown; use multihead_attention")
    is_old_falcon = fields.family == "falcon" and not fields.flag("new_decoder_architecture")
    if is_old_falcon or fields.family == "gpt_bigcode":
        return 1 if fields.flag("multi_query") else num_heads
    if fields.get("attn_type") == "multiquery_attention":
        return 1
    if fields.get("multi_query_attention") is False:  # ChatGLM: the group number stands there all the same
        return num_heads
    return fields.whole("num_key_value_heads", num_heads)


def _mla_layer(fields: Fields) -> Layer:
    num_heads = fields.whole("num_attention_heads")
    rope_size = fields.whole("qk_rope_head_dim")
    key_size = fields.whole("qk_nope_head_dim") + rope_size
    latent_size, value_size = fields.whole("kv_lora_rank"), fields.whole("v_head_dim")
    return Layer("full", num_heads, num_heads, key_size, value_size, latent_size=latent_size, rope_size=rope_size)


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    named = fields.words("layer_types") or _repeated(fields.words("attention_types") or ())
    if not named:
        return _kinds_by_rule(fields, num_layers)
    if len(named) != num_layers:
        raise ModelError(f"config.json: layer_types names {len(named)} layers, num_hidden_layers {num_layers}")
    for name in named:
        if not isinstance(name, str) or name not in KINDS:
            raise ModelError(f"config.json: layer_types holds {short(name)}; this calculator knows {', '.join(KINDS)}")
    return [KINDS[str(name)] for name in named]


def _repeated(groups: tuple[object, ...]) -> tuple[object, ...]:
    """GPT-Neo's [[["global", "local"], 6]] as twelve names; anything else names no layer."""
    pairs = [group for group in groups if isinstance(group, list | tuple) and len(group) == 2]
    if any(not isinstance(names, list | tuple) or type(count) is not int for names, count in pairs):
        raise ModelError(f"config.json: attention_types must be like [[['global', 'local'], 6]], not {short(groups)}")
    if any(len(names) * count > MAX_LAYERS for names, count in pairs):
        raise ModelError(f"config.json: attention_types names more than {MAX_LAYERS} layers; are the counts right?")
    return tuple(name for names, count in pairs for name in [*names] * count)


def _kinds_by_rule(fields: Fields, num_layers: int) -> list[str]:
    """Older configs give a rule instead of a list: every n-th layer global, all windowed, or none."""
    if fields.get("full_attention_interval") is not None:  # Qwen3-Next
        every = fields.whole("full_attention_interval")
        return ["linear" if (i + 1) % every else "full" for i in range(num_layers)]
    if fields.get("attention_chunk_size") is not None:  # Llama 4: layers without rotary positions see everything
        rotary = fields.words("no_rope_layers")  # 1 where positions are rotary, whatever the name says
        if rotary and len(rotary) == num_layers:
            return ["chunk" if is_rotary else "full" for is_rotary in rotary]
        every = fields.whole("no_rope_layer_interval", 4)
        return ["chunk" if (i + 1) % every else "full" for i in range(num_layers)]
    is_windowed = fields.get("sliding_window") is not None and fields.flag("use_sliding_window", True)
    if not is_windowed or (fields.family.startswith("qwen") and not fields.flag("use_sliding_window")):
        return ["full"] * num_layers
    pattern = fields.get("sliding_window_pattern") or PATTERNS.get(fields.family)
    if isinstance(pattern, str) and set(pattern) <= {"L", "G"}:  # "LLLG"
        return ["window" if pattern[i % len(pattern)] == "L" else "full" for i in range(num_layers)]
    if pattern is not None:
        every = fields.whole("sliding_window_pattern", PATTERNS.get(fields.family))
        return ["window" if (i + 1) % every else "full" for i in range(num_layers)]
    num_full = fields.whole("max_window_layers", 0, least=0) if fields.family.startswith("qwen") else 0
    if fields.family in ALWAYS_WINDOWED or fields.family.startswith("qwen"):
        return ["full" if i < num_full else "window" for i in range(num_layers)]
    raise ModelError(
        f"config.json: sliding_window is given but not which layers of a '{fields.family}' use it; add layer_types"
    )


def _of_kind(fields: Fields, plain: Layer, kind: str) -> Layer:
    sizes = plain.num_heads, plain.num_kv_heads, plain.key_size, plain.value_size
    if kind == "linear":
        return Layer(kind, *sizes, state_elements=_state_elements(fields))
    name = {"window": "sliding_window", "chunk": "attention_chunk_size"}.get(kind)
    window = fields.whole(name) if name else None
    return Layer(kind, *sizes, window, plain.latent_size, plain.rope_size)


def _shared(plain: Layer) -> Layer:
    return Layer("shared", plain.num_heads, plain.num_kv_heads, plain.key_size, plain.value_size)


def _state_elements(fields: Fields) -> int:
    """Gated DeltaNet (Qwen3-Next): a key x value matrix for each value head, and the last inputs of its convolution."""
    num_keys, num_values = fields.whole("linear_num_key_heads"), fields.whole("linear_num_value_heads")
    key_size, value_size = fields.whole("linear_key_head_dim"), fields.whole("linear_value_head_dim")
    width = 2 * num_keys * key_size + num_values * value_size
    return num_values * key_size * value_size + width * (fields.whole("linear_conv_kernel_dim") - 1)
