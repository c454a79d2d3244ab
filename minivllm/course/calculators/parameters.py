"""How many parameters a config describes, matrix by matrix, and how many bytes they take.

A family is a set of habits (norms, biases, gates, ties); the sums are the same for all. Counts are those of the
checkpoint: tied embeddings once, DeepSeek-V3's routing bias included, its extra prediction layer not.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from minivllm.course.calculators.attention_shape import Layer, attention_shape
from minivllm.course.calculators.checks import at_least, whole
from minivllm.course.calculators.kv_bytes import Dtype, bits_of, size_of
from minivllm.course.calculators.model_fields import Config, Fields
from minivllm.course.calculators.units import plain
from minivllm.course.calculators.worked import Amount, Worked, as_worked, work
from minivllm.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Habits of an architecture. A bias is always there, never, or wherever the flag of that name is set."""

    norms: int = 2  # per layer
    norm_vectors: int = 1  # weights of one norm, in hidden sizes: 2 with a bias, 0 where there is nothing to learn
    is_gated: bool = True  # gate, up and down; else up and down
    qkv_bias: str | bool = "attention_bias"
    output_bias: str | bool = "attention_bias"
    mlp_bias: str | bool = False
    qk_norm: str = ""  # "head": one weight for each place in a head; "full": one for each place in q and in k
    num_extra_positions: int | None = None  # learned positions beyond the context; None: positions are computed
    is_tied: bool = False  # where the config does not say
    has_head_bias: bool = False
    has_embedding_norm: bool = False
    has_sinks: bool = False  # one learned logit per head
    has_relative_positions: bool = False  # Transformer-XL: one more hidden x hidden matrix per layer
    flags: dict[str, bool] = field(default_factory=dict)  # what the flags are where the config leaves them out


GPT2 = Family(norm_vectors=2, is_gated=False, qkv_bias=True, output_bias=True, mlp_bias=True, num_extra_positions=0,
              is_tied=True)  # fmt: skip
FAMILIES = {
    "llama": Family(mlp_bias="mlp_bias"),
    "mistral": Family(qkv_bias=False, output_bias=False),
    "ministral": Family(qkv_bias=False, output_bias=False),
    "mixtral": Family(qkv_bias=False, output_bias=False),
    "qwen2": Family(qkv_bias=True, output_bias=False),
    "qwen2_moe": Family(qkv_bias="qkv_bias", output_bias=False, flags={"qkv_bias": True}),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "gemma": Family(is_tied=True),
    "gemma2": Family(norms=4, is_tied=True),
    "gemma3_text": Family(norms=4, qk_norm="head", is_tied=True),
    "phi": Family(norms=1, norm_vectors=2, is_gated=False, qkv_bias=True, output_bias=True, mlp_bias=True,
                  has_head_bias=True),
    "phi3": Family(qkv_bias=False, output_bias=False),
    "falcon": Family(norm_vectors=2, is_gated=False, qkv_bias="bias", output_bias="bias", mlp_bias="bias",
                     is_tied=True),
    "mpt": Family(is_gated=False, qkv_bias=False, output_bias=False, is_tied=True),
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "opt": Family(norm_vectors=2, is_gated=False, qkv_bias=True, output_bias=True, mlp_bias=True,
                  num_extra_positions=2, is_tied=True),
    "bloom": Family(norm_vectors=2, is_gated=False, qkv_bias=True, output_bias=True, mlp_bias=True, is_tied=True,
                    has_embedding_norm=True),
    "gpt_neox": Family(norm_vectors=2, is_gated=False, mlp_bias=True, flags={"attention_bias": True}),
    "starcoder2": Family(norm_vectors=2, is_gated=False, qkv_bias="use_bias", output_bias="use_bias",
                         mlp_bias="use_bias", is_tied=True, flags={"use_bias": True}),
    "stablelm": Family(norm_vectors=2, qkv_bias="use_qkv_bias", output_bias=False),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "gpt_oss": Family(has_sinks=True, flags={"attention_bias": True}),
    "glm": Family(output_bias=False, flags={"attention_bias": True}),
    "glm4": Family(norms=4, output_bias=False, flags={"attention_bias": True}),
    "chatglm": Family(qkv_bias="add_qkv_bias", output_bias="add_bias_linear", mlp_bias="add_bias_linear"),
    "olmo": Family(norm_vectors=0),
    "olmo2": Family(qk_norm="full"),
    "smollm3": Family(mlp_bias="mlp_bias", is_tied=True),
    "granite": Family(mlp_bias="mlp_bias"),
    "cohere": Family(norms=1, is_tied=True),
    "cohere2": Family(norms=1, is_tied=True),
    "palm": Family(norms=1, qkv_bias=False, output_bias=False, is_tied=True),
    "chinchilla": Family(is_gated=False, is_tied=True, has_relative_positions=True),
}  # fmt: skip


def num_parameters(config: Config) -> Worked:
    """All parameters, with `.parts`: num_parameters("llama-3-8b") == 8_030_261_248."""
    parts = _count(config)
    formula = " + ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in parts.items() if count)
    named = {name: as_worked(count, "parameters") for name, count in parts.items()}
    return work("parameters", formula, sum(parts.values()), "parameters", **named)


def num_active_parameters(config: Config) -> Worked:
    """Parameters that one token passes through: all but the experts it is not sent to."""
    fields, total = Fields(config), num_parameters(config)
    if not fields.whole("num_experts", 0, least=0):
        return work("active parameters", "dense: all of them", int(total), "parameters", total)
    num_experts, num_used = fields.whole("num_experts"), fields.whole("num_experts_per_tok")
    if num_used > num_experts:
        raise ModelError(
            f"config.json: num_experts_per_tok {num_used} is more than the {num_experts} experts there are"
        )
    experts = int(total.parts["experts"])
    active = int(total) - experts + experts * num_used // num_experts
    formula = f"{int(total):,} − {experts:,} in experts × (1 − {num_used}/{num_experts})"
    return work("active parameters", formula, active, "parameters", total)


def num_matrix_parameters(config: Config) -> Worked:
    """Parameters without norms and biases, as back-of-envelope formulas count: 13,015,449,600 for Llama-2-13B."""
    total = num_parameters(config)
    small = int(total.parts["norms"]) + int(total.parts["biases"])
    return work("parameters in matrices", f"{int(total):,} − {small:,} in norms and biases", int(total) - small,
                "parameters", total)  # fmt: skip


def weight_bytes(parameters: Amount | Config, dtype: Dtype = "bfloat16", tensor_parallel: Amount = 1) -> Worked:
    """Bytes of the weights on one GPU: parameters x bits / 8, an equal share for each GPU.

    Takes a number of parameters or a config. For quantized weights give the bits with their scales: 4 + 32 / 128.
    """
    count: Amount = num_parameters(parameters) if isinstance(parameters, str | Mapping) else parameters
    number, num_gpus, bits = at_least("parameters", count), whole("tensor_parallel", tensor_parallel), bits_of(dtype)
    value = int(-(-number * bits // (8 * num_gpus)))
    formula = f"{plain(number)} × {size_of(bits)}" + (f" / {num_gpus} GPUs" if num_gpus > 1 else "")
    return work("weight bytes" if num_gpus == 1 else "weight bytes per GPU", formula, value, "bytes", count, dtype)


def expected_experts(num_experts: Amount, num_used: Amount, batch_size: Amount) -> Worked:
    """Experts that a batch touches when each token picks its own at random: E (1 - (1 - k/E)^B)."""
    experts, used = whole("num_experts", num_experts), whole("num_used", num_used)
    batch = whole("batch_size", batch_size)
    if used > experts:
        raise ModelError(f"a token cannot use {used} of {experts} experts; num_used must not exceed num_experts")
    value = experts * (1 - (1 - used / experts) ** batch)
    return work("experts read", f"{experts} × (1 − (1 − {used}/{experts})^{batch})", value, "experts")


def _count(config: Config) -> Counter[str]:
    fields, shape = Fields(config), attention_shape(config)
    family = FAMILIES.get(fields.family)
    if family is None:
        raise ModelError(
            f"config.json: parameters of model_type '{fields.family}' cannot be counted here; its KV bytes can; "
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    parts = Counter(dict.fromkeys(("embeddings", "head", "attention", "mlp", "experts", "norms", "biases"), 0))
    parts.update(_outside_layers(fields, family))
    for index, layer in enumerate(shape.layers):
        parts.update(_attention(fields, family, layer))
        parts.update(_mlp(fields, family, index))
    norm = family.norm_vectors * fields.whole("hidden_size")
    parts["norms"] += norm * _norms_per_layer(fields, family) * len(shape.layers)
    return parts


def _norms_per_layer(fields: Fields, family: Family) -> int:
    """Falcon's first design norms once where attention and MLP run side by side, its second twice."""
    is_parallel = fields.family == "falcon" and fields.flag("parallel_attn", True)
    return 1 if is_parallel and not fields.flag("new_decoder_architecture") else family.norms


def _outside_layers(fields: Fields, family: Family) -> Counter[str]:
    hidden, vocab = fields.whole("hidden_size"), fields.whole("vocab_size")
    width = fields.whole("word_embed_proj_dim", hidden)  # OPT-350m embeds narrower than it thinks
    parts = Counter(embeddings=vocab * width, norms=family.norm_vectors * hidden)
    if width != hidden:
        parts["embeddings"] += 2 * width * hidden
    if not fields.flag("do_layer_norm_before", True):
        parts["norms"] = 0  # OPT-350m again: normed after each part, so not once more at the end
    if family.has_embedding_norm:
        parts["norms"] += family.norm_vectors * hidden
    if family.num_extra_positions is not None:
        parts["embeddings"] += (fields.whole("max_position_embeddings") + family.num_extra_positions) * hidden
    if not fields.flag("tie_word_embeddings", family.is_tied):
        parts["head"] = vocab * hidden
    parts["biases"] += vocab * family.has_head_bias
    return parts


def _attention(fields: Fields, family: Family, layer: Layer) -> Counter[str]:
    hidden = fields.whole("hidden_size")
    if layer.latent_size:
        return _mla(fields, layer, hidden)
    queries, keys = layer.num_heads * layer.key_size, layer.num_kv_heads * layer.key_size
    parts = Counter(attention=hidden * (queries + 2 * keys) + queries * hidden)
    parts["attention"] += hidden * hidden * family.has_relative_positions
    parts["biases"] = _has(fields, family, family.qkv_bias) * (queries + 2 * keys)
    parts["biases"] += _has(fields, family, family.output_bias) * hidden + layer.num_heads * family.has_sinks
    is_full_norm = family.qk_norm == "full" or fields.flag("use_qk_norm")  # Command R+
    parts["norms"] = queries + keys if is_full_norm else 2 * layer.key_size * (family.qk_norm == "head")
    return parts


def _mla(fields: Fields, layer: Layer, hidden: int) -> Counter[str]:
    """Down- and up-projections of DeepSeek-V2 (arXiv 2405.04434, section 2.1); both latents are normed."""
    queries, latent = layer.num_heads * layer.key_size, layer.latent_size
    values = layer.num_heads * layer.value_size
    up = layer.num_heads * (layer.key_size - layer.rope_size) + values
    query_rank = fields.whole("q_lora_rank", 0, least=0)
    parts = Counter(attention=hidden * (latent + layer.rope_size) + latent * up + values * hidden, norms=latent)
    parts["attention"] += (hidden + queries) * query_rank if query_rank else hidden * queries
    parts["norms"] += query_rank
    if fields.flag("attention_bias"):
        parts["biases"] = query_rank + latent + layer.rope_size + hidden
    return parts


def _mlp(fields: Fields, family: Family, index: int) -> Counter[str]:
    hidden = fields.whole("hidden_size")
    num_experts = fields.whole("num_experts", 0, least=0)
    if not num_experts or not _is_sparse(fields, index):
        width = _mlp_width(fields, hidden)
        bias = _has(fields, family, family.mlp_bias) * ((1 + family.is_gated) * width + hidden)
        return Counter(mlp=(2 + family.is_gated) * hidden * width, biases=bias)
    width = fields.whole("moe_intermediate_size", fields.whole("intermediate_size"))
    shared = fields.whole("n_shared_experts", 0, least=0) * width
    gated_shared = fields.whole("shared_expert_intermediate_size", 0, least=0)  # Qwen: with a gate of its own
    parts = Counter(experts=3 * hidden * width * num_experts, mlp=3 * hidden * (shared + gated_shared))
    parts["mlp"] += hidden * num_experts + hidden * bool(gated_shared)  # the router
    if fields.family == "deepseek_v3":
        parts["biases"] = num_experts  # balances load without a loss: arXiv 2412.19437, section 2.1.2
    if fields.family == "gpt_oss":
        parts["biases"] = num_experts
        parts["experts"] += num_experts * (2 * width + hidden)
    return parts


def _is_sparse(fields: Fields, index: int) -> bool:
    if index < fields.whole("first_k_dense_replace", 0, least=0) or index in (fields.words("mlp_only_layers") or ()):
        return False
    is_its_turn = index % fields.whole("moe_layer_freq", 1) == 0  # DeepSeek counts layers from 0, Qwen from 1
    return is_its_turn and (index + 1) % fields.whole("decoder_sparse_step", 1) == 0


def _mlp_width(fields: Fields, hidden: int) -> int:
    if fields.get("intermediate_size") is None:
        return fields.whole("expansion_ratio", 4) * hidden  # GPT-2, Falcon, MPT
    return fields.whole("intermediate_size")


def _has(fields: Fields, family: Family, bias: str | bool) -> bool:
    return bias if isinstance(bias, bool) else fields.flag(bias, family.flags.get(bias, False))
