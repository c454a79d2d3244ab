"""The two trained draft models of a target: an EAGLE head and a small Llama; their modules and their files.

A file is NAME.safetensors with NAME.json beside it. The JSON is a config.json of the layers the draft brings, with a
part "speculative" (method, target, size of the draft vocabulary) and a part "provenance". The safetensors hold the
layers and `vocabulary`: the target's token ids that the draft may draft, ascending. Embedding and lm_head are the
target's own and are not in the file. Tokens outside the vocabulary are never drafted: that costs acceptance only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minivllm.attention import Attention
from minivllm.config import ModelConfig
from minivllm.errors import ModelError
from minivllm.models.decoder import Decoder, DecoderLayer
from minivllm.models.layers import GatedMLP, RMSNorm, RotaryEmbedding
from minivllm.models.llama import SelfAttention, llama

WEIGHTS = Path(__file__).with_name("weights")
SHARED = ("embed.weight", "lm_head.weight")  # the target's


class EagleHead(nn.Module):
    """Guesses the target's next feature, the output of its last layer before the final norm (EAGLE, Li et al. 2024).

    At position t it sees the embedding of token t and the feature of t - 1 (zeros for t = 0), and gives a feature in
    the place of the target's at t. Final norm and lm_head of the target make logits of token t + 1 of it.
    """

    def __init__(self, config: ModelConfig) -> None:
        """`config` has one layer; its other sizes are the target's or smaller."""
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.rope = RotaryEmbedding(config)
        self.embedding_norm = RMSNorm(size, config.rms_norm_eps)
        self.feature_norm = RMSNorm(size, config.rms_norm_eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        mlp = GatedMLP(size, config.intermediate_size, has_bias=False)
        self.layer = DecoderLayer(config, SelfAttention(config, 0), mlp)

    def forward(
        self, token_embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Features [T, d] of token embeddings [T, d], features of the positions before [T, d] and positions [T]."""
        cos, sin = self.rope.angles(positions, token_embeddings.dtype)
        return self.layer(self._joined(token_embeddings, features), cos, sin, attention)

    def store(
        self, token_embeddings: torch.Tensor, features: torch.Tensor, positions: torch.Tensor, attention: Attention
    ) -> None:
        """The same up to K and V, which `attention` takes."""
        cos, sin = self.rope.angles(positions, token_embeddings.dtype)
        normed = self.layer.input_norm(self._joined(token_embeddings, features))
        self.layer.attention(normed, cos, sin, attention)

    def _joined(self, token_embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat((self.embedding_norm(token_embeddings), self.feature_norm(features)), dim=-1))


@dataclass(frozen=True)
class EagleDraft:
    """A head ready to draft for one target; `norm` and `lm_head` turn its features into logits [T, V']."""

    head: EagleHead
    embed: nn.Module
    norm: nn.Module
    lm_head: nn.Module
    vocabulary: torch.Tensor  # [V'] the target's id of each row of lm_head

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(features))


@dataclass(frozen=True)
class SmallDraft:
    """A small Llama ready to draft for one target: `model` gives logits [R, V'], its embedding is the target's."""

    model: Decoder
    config: ModelConfig
    vocabulary: torch.Tensor  # [V'] the target's id of each row of lm_head


def load_eagle(path: Path, target: Decoder) -> EagleDraft:
    """Read an EAGLE head onto the target's device, in its dtype. Raises ModelError, one line."""
    config, tensors, vocabulary = _read(path, "eagle", target)
    with torch.device("meta"):
        head = EagleHead(config)
    _fill(head, tensors, target, path)
    head.rope = RotaryEmbedding(config)
    return EagleDraft(head, target.embed, target.norm, reduced_lm_head(target, vocabulary), vocabulary)


def load_small(path: Path, target: Decoder) -> SmallDraft:
    """Read a small draft model onto the target's device, in its dtype. Raises ModelError, one line."""
    config, tensors, vocabulary = _read(path, "draft_model", target)
    model = small_model(config, target, vocabulary)
    _fill(model, tensors, target, path)
    return SmallDraft(model, config, vocabulary)


def small_model(config: ModelConfig, target: Decoder, vocabulary: torch.Tensor) -> Decoder:
    """A Llama without weights (on meta) on the target's embedding and the rows `vocabulary` of its lm_head."""
    with torch.device("meta"):
        model = llama(config)
    model.rope = RotaryEmbedding(config)
    model.embed = target.embed
    model.lm_head = reduced_lm_head(target, vocabulary)
    return model


def reduced_lm_head(target: Decoder, vocabulary: torch.Tensor) -> nn.Linear:
    """The rows `vocabulary` of the target's lm_head, a copy; a packed one is asked for them."""
    size = target.embed.weight.shape[1]
    with torch.no_grad():
        if isinstance(target.lm_head, nn.Linear):
            rows = target.lm_head.weight[vocabulary]
        else:
            weight = target.embed.weight
            rows = target.lm_head(torch.eye(size, dtype=weight.dtype, device=weight.device)).T[vocabulary]
    linear = nn.Linear(size, len(vocabulary), bias=False, device="meta")
    linear.weight = nn.Parameter(rows.clone(), requires_grad=False)
    return linear


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a draft brings itself: all but embedding and lm_head."""
    return {name: p.detach() for name, p in module.named_parameters() if name not in SHARED}


def save_draft(
    path: Path, module: nn.Module, config: ModelConfig, vocabulary: torch.Tensor, method: str, target: str,
    provenance: Mapping[str, object],
) -> None:  # fmt: skip
    """Write NAME.safetensors, matrices and norms in bf16, and NAME.json beside it."""
    tensors = {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in own_tensors(module).items()}
    tensors["vocabulary"] = vocabulary.to("cpu", torch.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    document = config_json(config) | {
        "speculative": {"method": method, "target": target, "vocabulary": len(vocabulary),
                        "parameters": sum(t.numel() for t in own_tensors(module).values())},
        "provenance": provenance,
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def config_json(config: ModelConfig) -> dict[str, object]:
    """The config.json of a plain Llama, as ModelConfig.from_json reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": False,
        "eos_token_id": list(config.eos_token_ids),
        "dtype": "bfloat16",
    }


def _read(path: Path, method: str, target: Decoder) -> tuple[ModelConfig, dict[str, torch.Tensor], torch.Tensor]:
    """Config, layers and vocabulary of a file, checked against what is asked for and against the target."""
    try:
        document = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: no draft model can be read there ({error}); give NAME.safetensors") from error
    found = document.get("speculative", {}).get("method")
    if found != method or "vocabulary" not in tensors:
        raise ModelError(f"{path}: its JSON says method {found!r}, not {method!r}; give a file of that kind")
    weight = target.embed.weight
    config = replace(ModelConfig.from_json(document), dtype=str(weight.dtype).removeprefix("torch."))
    if (config.vocab_size, config.hidden_size) != tuple(weight.shape):
        raise ModelError(
            f"{path}: drafts for a model of vocabulary {config.vocab_size} and hidden size {config.hidden_size}, the "
            f"target has {weight.shape[0]} and {weight.shape[1]}; take the draft that was trained for it"
        )
    return config, tensors, tensors.pop("vocabulary").to(weight.device, torch.int64)


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor], target: Decoder, path: Path) -> None:
    weight = target.embed.weight
    moved = {name: tensor.to(weight.device, weight.dtype) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in own_tensors(module).items()}
    if {name: tuple(tensor.shape) for name, tensor in moved.items()} != expected:
        raise ModelError(f"{path}: its tensors are not those that its JSON describes; fetch both files again")
    module.load_state_dict(moved, strict=False, assign=True)
    module.eval().requires_grad_(False)
