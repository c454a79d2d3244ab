"""One set of trained weights, four attentions: a Llama checkpoint becomes MHA, GQA, MQA or MLA, in a folder of its own.

mha, gqa-G, mqa   every query head gets its own K and V head (nothing changes), then neighbours are averaged into G
                  groups (Ainslie et al. 2023, arXiv 2305.13245, section 2.1); mqa is gqa-1
mla-R             a DeepseekV2ForCausalLM without experts: per token and layer one latent of R numbers and one RoPE key
                  (lab/low_rank.py has the algebra, lab/latent_weights.py the layout); needs a calibration text

What comes out is a Hugging Face folder that the engine and transformers load.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from minivllm.config import ModelConfig
from minivllm.defaults import load_tokenizer
from minivllm.errors import ConfigError, ModelError, short
from minivllm.lab.calibration import calibrate
from minivllm.lab.corpus import calibration_rows
from minivllm.lab.latent_weights import latent_config, latent_weights, most_rank
from minivllm.lab.low_rank import Heads
from minivllm.weights import ModelSource, find_model

Weights = dict[str, Tensor]

TARGET = re.compile(r"(mha|mqa)|(gqa|mla)-([1-9]\d{0,4})")
COPIED = ("tokenizer*", "special_tokens_map.json", "merges.txt", "vocab.*", "added_tokens.json", "chat_template*",
          "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What to convert to: `size` is the number of KV heads, or for mla the rank of the latent."""

    kind: str  # heads or mla
    size: int

    @staticmethod
    def parse(name: str, config: ModelConfig) -> "Target":
        """Read mha, mqa, gqa-3, mla-64. Raises ConfigError when the model cannot become that."""
        found = TARGET.fullmatch(name)
        if found is None:
            raise ConfigError(f"unknown target {short(name)}: use mha, mqa, gqa-G (G KV heads) or mla-R (latent of R)")
        if found[2] == "mla":
            return Target("mla", _rank(int(found[3]), config))
        groups = {"mha": config.num_heads, "mqa": 1}.get(found[1] or "", int(found[3] or 0))
        if config.num_heads % groups:
            raise ConfigError(
                f"{name}: {config.num_heads} query heads do not divide into {groups} groups; give another"
            )
        return Target("heads", groups)


def convert(
    model: str | Path, to: str, out: str | Path, calibration: Tensor | None = None, show_progress: bool = True
) -> Path:
    """Write `model` with attention `to` into the new folder `out` and return it.

    `calibration` [rows, tokens] is what mla targets are fitted to; by default Python's help topics. Raises ConfigError
    and ModelError, one line each.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"'{out}' exists already; give a new folder")
    source = find_model(model, show_progress=show_progress)
    config = ModelConfig.from_json(source.config)
    if config.family != "llama":
        raise ModelError(f"{source.name}: only Llama models are converted, this is {config.family}; choose another")
    target = Target.parse(to, config)
    weights = {name: tensor for path in source.weight_files for name, tensor in load_file(path).items()}
    if target.kind == "heads":
        changed: Mapping[str, object] = {"num_key_value_heads": target.size, "head_dim": config.head_size}
        converted, json_config = _pooled(weights, config, target.size, show_progress), {**source.config, **changed}
    else:
        tokens = _calibration_text(source) if calibration is None else calibration
        moments = calibrate(source, weights, tokens, show_progress)
        layers = (latent_weights(heads_of(weights, config, i), moments[i], target.size, config.rope, i)
                  for i in range(config.num_layers))  # fmt: skip
        converted = _replaced(weights, layers, config.num_layers, show_progress)
        json_config = latent_config(source.config, config, target.size)
    _write(source, out, json_config, converted)
    return out


def heads_of(weights: Weights, config: ModelConfig, layer: int) -> Heads:
    """A layer's projections, cut into heads; fp64."""
    prefix = f"model.layers.{layer}.self_attn."
    q, k, v = (weights[f"{prefix}{part}_proj.weight"].double().unflatten(0, (-1, config.head_size)) for part in "qkv")
    return Heads(q, k, v, weights[f"{prefix}o_proj.weight"].double().unflatten(1, (-1, config.head_size)))


def pool_heads(rows: Tensor, num_kv_heads: int, num_heads: int, num_groups: int) -> Tensor:
    """Rows of K or V: each KV head repeated for its query heads, then the mean of each group of neighbours.

    [num_kv_heads * D, ...] -> [num_groups * D, ...]
    """
    heads = rows.double().unflatten(0, (num_kv_heads, -1)).repeat_interleave(num_heads // num_kv_heads, dim=0)
    return heads.unflatten(0, (num_groups, -1)).mean(dim=1).flatten(0, 1).to(rows.dtype)


def _rank(rank: int, config: ModelConfig) -> int:
    """Refuse a rank that no latent of this model has, and models whose parts DeepseekV2 has no place for."""
    most = most_rank(config)
    if rank % 2 or not 2 <= rank <= most:
        raise ConfigError(f"mla-{rank}: the rank must be even and from 2 to {most}, which holds all of K and V")
    if config.qkv_bias or config.mlp_bias:
        raise ModelError("mla: this model has biases that DeepseekV2 has no place for; choose one without")
    if config.rope.kind == "yarn":
        raise ModelError("mla: yarn scales keys that are turned, and not the others; choose a model without")
    if config.hidden_size % config.num_heads:
        raise ModelError(
            f"mla: transformers' DeepseekV2 wants hidden_size {config.hidden_size} to be a multiple of "
            f"{config.num_heads} heads; choose another model"
        )
    return rank


def _calibration_text(source: ModelSource) -> Tensor:
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ModelError(f"{source.name} has no tokenizer: give `calibration`, token ids [rows, tokens]")
    return calibration_rows(tokenizer)


def _pooled(weights: Weights, config: ModelConfig, num_groups: int, show_progress: bool) -> Weights:
    pool = partial(pool_heads, num_kv_heads=config.num_kv_heads, num_heads=config.num_heads, num_groups=num_groups)
    parts = ("self_attn.k_proj.", "self_attn.v_proj.")
    bar = tqdm(weights.items(), desc="convert", unit=" tensors", disable=not show_progress)
    return {name: pool(tensor) if any(part in name for part in parts) else tensor for name, tensor in bar}


def _replaced(weights: Weights, layers: Iterator[Weights], num_layers: int, show_progress: bool) -> Weights:
    """The checkpoint with other attention weights, in the dtype it had."""
    dtype = weights["model.embed_tokens.weight"].dtype
    kept = {name: tensor for name, tensor in weights.items() if "self_attn" not in name}
    for layer in tqdm(layers, total=num_layers, desc="convert", unit=" layers", disable=not show_progress):
        kept |= {name: tensor.to(dtype).contiguous() for name, tensor in layer.items()}
    return kept


def _write(source: ModelSource, out: Path, config: Mapping[str, object], weights: Weights) -> None:
    """Write the folder; a failure leaves none behind."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        for pattern in COPIED:
            for path in (source.folder or out).glob(pattern):
                shutil.copy(path, out)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    except OSError as error:
        shutil.rmtree(out)
        raise ModelError(f"cannot write '{out}' ({error}): choose another folder") from error
