"""Weights into a built model: which checkpoint tensor fills which slice of which parameter, or seeded noise."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minivllm.config import ModelConfig
from minivllm.errors import ModelError
from minivllm.models.decoder import Decoder
from minivllm.models.deepseek import deepseek
from minivllm.models.llama import llama
from minivllm.transforms.batch_invariant import make_batch_invariant
from minivllm.transforms.prepack import can_prepack, prepack_linears

# Our name for each Hugging Face name; the parts of a fused matrix come with their place in it.
RENAMED = {
    "embed_tokens": "embed",
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn": "attention",
    "q_a_layernorm": "q_a_norm",
    "kv_a_layernorm": "kv_a_norm",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
RENAMED_QKV = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}  # not where K and V are latent
KEPT_IN_FP32 = "e_score_correction_bias"  # a router's, where steps of bf16 would be as large as gaps between experts


def build_model(config: ModelConfig, weight_files: list[Path], seed: int, device: str) -> Decoder:
    """A model on a device with weights from files, or with seeded random ones when there are none."""
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        model = (deepseek if config.mla else llama)(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(KEPT_IN_FP32):
            parameter.data = parameter.data.float()
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed.weight  # to_empty gives each its own
    with torch.inference_mode():
        if weight_files:
            _load_files(model, config, weight_files)
        else:
            fill_with_noise(model.named_parameters(), seed)
    if device == "cpu" and can_prepack(dtype):
        prepack_linears(model)
    if config.batch_invariant:
        make_batch_invariant(model)  # after packing: it wraps packed and plain linears alike
    return model


def _load_files(model: nn.Module, config: ModelConfig, weight_files: list[Path]) -> None:
    parameters = dict(model.named_parameters())
    missing = {name: parameter.shape[0] for name, parameter in parameters.items()}  # rows not filled yet
    seen: set[str] = set()
    for name, tensor in _tensors(weight_files):
        if name in seen:
            raise ModelError(f"the checkpoint has '{name}' in two files; remove the one that does not belong")
        seen.add(name)
        target = _our_name(name, config)
        if target not in parameters:
            if _is_of_mtp_layer(name, config) or tensor.numel() == 0:
                continue  # layers that draft tokens, and what transformers writes for no shared experts
            if target == "lm_head.weight" and config.tie_word_embeddings:
                continue  # some tied checkpoints store the matrix twice
            if target.endswith("rotary_emb.inv_freq"):
                continue  # old checkpoints carry what follows from the config
            raise ModelError(f"the checkpoint has a tensor '{name}' that {config.family} has no place for")
        rows = _rows(name, len(parameters[target]), config)
        part = parameters[target][rows]
        if part.shape != tensor.shape:
            raise ModelError(
                f"the checkpoint's '{name}' has shape {list(tensor.shape)}, config.json asks for {list(part.shape)}"
            )
        part.copy_(tensor)
        missing[target] -= part.shape[0]
    unfilled = [name for name, rows_left in missing.items() if rows_left > 0]
    if unfilled:
        raise ModelError(f"the checkpoint lacks weights for {len(unfilled)} parameters, '{unfilled[0]}' among them")


def _tensors(weight_files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for path in weight_files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read as safetensors ({error}); fetch the file again") from error


def _our_name(name: str, config: ModelConfig) -> str:
    renamed = RENAMED if config.mla else RENAMED | RENAMED_QKV
    return ".".join(renamed.get(part, part) for part in name.removeprefix("model.").split("."))


def _is_of_mtp_layer(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is of a layer after the last: DeepSeek-V3's have the numbers 0 to 60, and 61 drafts."""
    first = config.num_layers
    return any(name.startswith(f"model.layers.{layer}.") for layer in range(first, first + config.num_mtp_layers))


def _rows(name: str, num_rows: int, config: ModelConfig) -> slice:
    """Rows of our matrix of `num_rows` that a checkpoint tensor fills; all rows where nothing is fused."""
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    places = {"gate_proj": (0, num_rows // 2), "up_proj": (num_rows // 2, num_rows)}
    if not config.mla:
        places |= {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
    part = name.rsplit(".", 2)[-2]
    return slice(*places[part]) if part in places else slice(None)


def fill_with_noise(parameters: Iterable[tuple[str, torch.Tensor]], seed: int) -> None:
    """Norms at 1, biases at 0, matrices normal with deviation 0.02: the same on every run with the same seed."""
    for index, (name, parameter) in enumerate(parameters):
        if "norm" in name:
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            generator = torch.Generator(parameter.device).manual_seed(seed * 100_003 + index)
            parameter.normal_(0, 0.02, generator=generator)
