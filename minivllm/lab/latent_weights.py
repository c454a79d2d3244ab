"""A layer's factors as the weights of a DeepseekV2ForCausalLM, which normalises latents and scales scores its own way.

The norm. DeepSeek takes the RMS norm of the latent, which is not linear. So the last of the R numbers is a constant
far above the others: the RMS is that constant / sqrt(R), up to a share of |latent|^2 / (2 CONSTANT^2), and the norm's
weight undoes it. It leaves the norm as 1, so its column of kv_b_proj is the offset of K and V.

The scale. DeepSeek divides scores by sqrt(nope + rope) = sqrt(2 D), Llama by sqrt(D): q_proj takes up sqrt(2).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minivllm.config import ModelConfig, RopeConfig
from minivllm.lab.low_rank import Heads, Moments, SharedKey, as_complex, as_halves, factorise, root, share_key
from minivllm.models.layers import inverse_frequencies

# |latent|^2 is R - 1 on average: at R = 64 the norm's share of error is 3e-8, and 3e-6 for a token 100 times as large.
CONSTANT = 2.0**15  # exact in bf16, and within fp16
REACH = 16  # tokens: distances that a key without RoPE is fitted to; of 1, 16 and 64 the one with the least loss
FROM_LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "max_position_embeddings", "rms_norm_eps", "hidden_act", "initializer_range", "tie_word_embeddings",
              "rope_parameters", "rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id",
              "dtype", "torch_dtype")  # fmt: skip


def most_rank(config: ModelConfig) -> int:
    """The rank at which the factors are exact: K and V of all heads less the shared key, and the constant; even."""
    numbers = (2 * config.num_kv_heads - 1) * config.head_size + 1
    return numbers + numbers % 2


def latent_config(source: Mapping[str, object], config: ModelConfig, rank: int) -> dict[str, object]:
    """The config.json of a converted Llama: no experts, no query compression, biases for the constant."""
    size = config.head_size
    return {name: source[name] for name in FROM_LLAMA if name in source} | {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": True,
        "num_key_value_heads": config.num_heads, "q_lora_rank": None, "kv_lora_rank": rank, "qk_nope_head_dim": size,
        "qk_rope_head_dim": size, "v_head_dim": size, "first_k_dense_replace": config.num_layers,
    }  # fmt: skip


def latent_weights(heads: Heads, moments: Moments, rank: int, rope: RopeConfig, layer: int) -> dict[str, Tensor]:
    """The attention weights of a layer under DeepSeek's names; fp64."""
    num_heads, size, hidden_size = heads.q.shape
    of_head = torch.arange(num_heads) // heads.group  # the KV head that a query head reads
    shared = share_key(heads, moments)
    q = as_complex(heads.q)
    q_nope = as_halves(q * phases(rope, size))
    q_rope = as_pairs(q * shared.coefficients.T[of_head][:, :, None])
    target = torch.cat((as_halves(shared.rest), heads.v)).flatten(0, 1)  # [2 G D, hidden]
    factors = factorise(target, importance(heads, q_nope, shared, moments), moments, rank - 1)
    up = torch.cat((factors.up, factors.offset[:, None]), dim=1).unflatten(0, (-1, size))  # [2 G, D, R]
    k_up, v_up = up.chunk(2)
    down_rows = (factors.down, torch.zeros(1, hidden_size, dtype=torch.float64), as_pairs(shared.key[None])[0])
    down_bias = (-factors.down @ moments.mean, torch.tensor([CONSTANT], dtype=torch.float64), torch.zeros(size))
    norm = torch.full((rank,), CONSTANT / math.sqrt(rank), dtype=torch.float64)
    norm[-1] = 1 / math.sqrt(rank)
    weights = {
        "q_proj.weight": math.sqrt(2) * torch.cat((q_nope, q_rope), dim=1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat(down_rows),
        "kv_a_proj_with_mqa.bias": torch.cat(down_bias),
        "kv_a_layernorm.weight": norm,
        "kv_b_proj.weight": torch.cat((k_up[of_head], v_up[of_head]), dim=1).flatten(0, 1),
        "o_proj.weight": heads.o.flatten(1),
        "o_proj.bias": torch.zeros(hidden_size),
    }
    return {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in weights.items()}


def as_pairs(heads: Tensor) -> Tensor:
    """Complex rows as DeepSeek stores rotary pairs, side by side: [heads, D/2, hidden] -> [heads, D, hidden]."""
    return torch.stack((heads.real, heads.imag), dim=2).flatten(1, 2)


def phases(rope: RopeConfig, head_size: int) -> Tensor:
    """The turn that stands for all distances in a score without RoPE, [D/2, 1] complex: the mean over near tokens.

    Fast pairs average out and hardly count, slow ones keep their sign. Nearer tokens weigh more: a text of REACH tokens
    has REACH - d pairs at distance d.
    """
    distance = torch.arange(REACH, dtype=torch.float64)
    pairs = REACH - distance
    turns = torch.exp(1j * distance * inverse_frequencies(rope, head_size).double()[:, None])  # [D/2, REACH]
    return (turns * pairs).sum(1, keepdim=True) / pairs.sum()


def importance(heads: Heads, q_nope: Tensor, shared: SharedKey, moments: Moments) -> Tensor:
    """The weight of an error in K and V, [2 G D, 2 G D]: in a score as queries ask, in the output as o_proj answers.

    K and V count alike: each side's weighted variance is scaled to 1 (TransMLA balances the two by their norms).
    """
    asked = torch.einsum("hdi,ij,hej->hde", q_nope, moments.second, q_nope)  # [H, D, D]
    answered = torch.einsum("xhd,xhe->hde", heads.o, heads.o)
    blocks = []
    for targets, squares in ((as_halves(shared.rest), asked), (heads.v, answered)):
        weights = [root(block) for block in squares.unflatten(0, (len(heads.k), -1)).sum(1)]  # [D, D] for each KV head
        seen = torch.stack(weights) @ targets
        variance = torch.einsum("gdi,ij,gdj->", seen, moments.covariance, seen)
        blocks += [weight / variance.sqrt() if variance > 1e-12 else weight * 0 for weight in weights]
    return torch.block_diag(*blocks)
