"""From `speculative_config` to proposers, in the order of a start: find and check, load weights, give out storage."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from minivllm.config import DTYPE_BYTES, ModelConfig
from minivllm.errors import ConfigError, short
from minivllm.layer_groups import one_group
from minivllm.models.decoder import Decoder
from minivllm.models.layers import RotaryEmbedding
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.loader import build_model, fill_with_noise
from minivllm.speculative.draft_batch import Choice
from minivllm.speculative.draft_model import DraftModelProposer
from minivllm.speculative.eagle import EagleProposer
from minivllm.speculative.eagle_model import (
    WEIGHTS,
    EagleDraft,
    EagleHead,
    load_eagle,
    load_small,
    own_tensors,
    reduced_lm_head,
    small_model,
)
from minivllm.speculative.early_exit import EarlyExitProposer
from minivllm.speculative.ngram import NgramProposer
from minivllm.speculative.proposer import Proposer
from minivllm.speculative_config import SpeculativeConfig
from minivllm.transforms.prepack import PackedLinear, can_prepack, prepack_linears
from minivllm.weights import builtin_configs, find_model

SHIPPED_TARGET, SHIPPED_EAGLE, SHIPPED_DRAFT = "smollm2-135m", "eagle_smollm2", "draft_smollm2"
DRAFT_NAME = "smollm2-draft"  # what a speculative_config calls the draft model that comes with us
RANDOM_VOCABULARY = 8192  # of a random head: as many columns as the trained one has


@dataclass(frozen=True)
class Found:
    """A drafter with K and V of its own: its shape, in the target's dtype, and where its weights are."""

    config: ModelConfig
    trained: Path | None  # NAME.safetensors with NAME.json, made for this target
    weight_files: Sequence[Path]  # of a model that stands alone
    has_weights: bool  # else they are random, as the target's
    bytes_per_token: int  # of K, V and what goes with them


@dataclass(frozen=True)
class Loaded:
    """A drafter's weights on the device; `vocabulary` as in Choice."""

    weights: Decoder | EagleDraft
    config: ModelConfig
    vocabulary: torch.Tensor | None


def first_other_token(draft: Path | None, target: Path | None) -> str | None:
    """A token that two folders' tokenizers do not have at the same place; None if there is none, or nothing to read."""
    files = [folder / "tokenizer.json" for folder in (draft, target) if folder]
    if len(files) < 2 or not all(file.is_file() for file in files):
        return None
    one, other = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    return min((token for token in {**one, **other} if one.get(token) != other.get(token)), default=None)


class Drafters:
    """What an engine's `speculative_config` names."""

    def __init__(
        self, configs: Sequence[SpeculativeConfig], model: ModelConfig, folder: Path | None, *, has_weights: bool,
        show_progress: bool,
    ) -> None:  # fmt: skip
        """Find and check them; `model` is the target, its tokenizer in `folder`. Raises ConfigError and ModelError."""
        self.configs, self.model, self._folder = configs, model, folder
        self._has_weights, self._show_progress = has_weights, show_progress
        found = {config.method: self._find(config) for config in configs}
        self._found = {method: each for method, each in found.items() if each}
        self._loaded: dict[str, Loaded] = {}

    @property
    def bytes_per_token(self) -> int:
        """What they keep beside the target's K and V."""
        return sum(found.bytes_per_token for found in self._found.values())

    def load(self, target: Decoder, seed: int, device: str) -> None:
        """Load all weights. Raises ModelError."""
        for method, found in self._found.items():
            if method == "eagle":
                self._loaded[method] = _load_head(found, target, seed)
            elif found.trained:
                self._loaded[method] = _load_small(found, target, seed)
            else:
                model = build_model(found.config, list(found.weight_files), seed + 1, device)
                self._loaded[method] = Loaded(model, found.config, None)

    def proposers(self, target: Decoder, storage: KVStorage) -> dict[str, Proposer]:
        """The proposers by method, once weights are loaded; `storage` is the target's."""
        return {config.method: self._build(config, target, storage) for config in self.configs}

    def _find(self, config: SpeculativeConfig) -> Found | None:
        if config.method == "draft_model":
            return self._find_draft_model(config)
        if config.method == "eagle":
            return self._find_head(config)
        if config.method == "early_exit" and self._exit_layer(config) >= self.model.num_layers:
            raise ConfigError(
                f"speculative_config: num_layers ({self._exit_layer(config)}) must be below the model's "
                f"{self.model.num_layers} layers: all of them draft no faster than the model"
            )
        return None

    def _find_draft_model(self, config: SpeculativeConfig) -> Found:
        assert config.model is not None, "SpeculativeConfig sees to it"
        if str(config.model) == DRAFT_NAME or str(config.model).endswith(".safetensors"):
            is_ours = str(config.model) == DRAFT_NAME
            return self._find_trained(WEIGHTS / f"{SHIPPED_DRAFT}.safetensors" if is_ours else Path(config.model))
        load_format = "auto" if self._has_weights else "dummy"
        source = find_model(config.model, load_format, self._show_progress)
        model = ModelConfig.from_json({**source.config, "dtype": self.model.dtype})
        if model.vocab_size != self.model.vocab_size:
            raise ConfigError(
                f"speculative_config: {source.name} has a vocabulary of {model.vocab_size} tokens, the model one of "
                f"{self.model.vocab_size}: a draft model needs the same tokenizer"
            )
        if token := first_other_token(source.folder, self._folder):
            raise ConfigError(
                f"speculative_config: {source.name} has another tokenizer: {short(token)} is not the same token in "
                "both; a draft model needs the same one"
            )
        return self._found_of(model, None, source.weight_files if self._has_weights else [])

    def _find_head(self, config: SpeculativeConfig) -> Found:
        if config.model is None and not self._has_weights:
            return self._found_of(random_head(self.model), None, [], self._feature_bytes)
        if config.model is None and not _is_smollm2(self.model):
            raise ConfigError(
                f"speculative_config: the EAGLE head that comes with us was trained for {SHIPPED_TARGET} alone: give "
                "model, the file of one for this model, or use ngram"
            )
        path = WEIGHTS / f"{SHIPPED_EAGLE}.safetensors" if config.model is None else Path(config.model)
        found = self._find_trained(_only_file(path))
        return replace(found, bytes_per_token=found.config.kv_bytes_per_token + self._feature_bytes)

    def _find_trained(self, path: Path) -> Found:
        """A drafter of ours, NAME.safetensors with NAME.json."""
        try:
            document = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"speculative_config: no drafter at '{path.name}' ({type(error).__name__} of its JSON): give "
                "NAME.safetensors with NAME.json beside it"
            ) from error
        config = ModelConfig.from_json({**document, "dtype": self.model.dtype})
        if (config.vocab_size, config.hidden_size) != (self.model.vocab_size, self.model.hidden_size):
            raise ConfigError(
                f"speculative_config: '{path.name}' drafts for a model of {config.vocab_size} tokens and hidden size "
                f"{config.hidden_size}, not {self.model.vocab_size} and {self.model.hidden_size}: give this model's own"
            )
        return self._found_of(config, path, [])

    def _found_of(self, config: ModelConfig, trained: Path | None, files: Sequence[Path], beside: int = 0) -> Found:
        """With windows that lie in the target's: what those have passed is freed.

        Narrower by one, for a drafter may begin one token before the target does.
        """
        [widest, *_] = one_group(self.model.num_layers, self.model.windows).windows
        if widest is not None:
            most = max(widest - 1, 1)
            windows = config.windows or (None,) * config.num_layers
            config = replace(config, windows=tuple(min(window or most, most) for window in windows))
        return Found(config, trained, files, self._has_weights, config.kv_bytes_per_token + beside)

    def _exit_layer(self, config: SpeculativeConfig) -> int:
        return config.num_layers or max(1, self.model.num_layers // 3)

    @property
    def _feature_bytes(self) -> int:
        return self.model.hidden_size * DTYPE_BYTES[self.model.dtype]

    def _build(self, config: SpeculativeConfig, target: Decoder, storage: KVStorage) -> Proposer:
        if config.method == "ngram":
            return NgramProposer(config.prompt_lookup_max, config.prompt_lookup_min)
        is_drawn = config.draft_sample_method == "probabilistic"
        if config.method == "early_exit":
            choice = Choice(self.model.vocab_size, None, is_drawn)
            return EarlyExitProposer(target, self.model, storage, self._exit_layer(config), choice)
        loaded = self._loaded[config.method]
        choice = Choice(self.model.vocab_size, loaded.vocabulary, is_drawn)
        own = storage_beside(storage, loaded.config)
        if isinstance(loaded.weights, EagleDraft):
            return EagleProposer(loaded.weights, loaded.config, own, choice)
        return DraftModelProposer(loaded.weights, loaded.config, own, choice)


def storage_beside(storage: KVStorage, config: ModelConfig) -> KVStorage:
    """K and V of a drafter in blocks of the same ids as the target's."""
    num_blocks, num_host_blocks = storage.data.shape[2], max(0, storage.host.shape[2] - 1)
    return KVStorage(config, num_blocks, storage.block_size, storage.data.device.type, num_host_blocks)


def random_head(model: ModelConfig) -> ModelConfig:
    """The shape of a head for any target: one dense layer of its sizes."""
    latent_size = max(8, model.hidden_size // model.num_heads // 8 * 8)  # of a head, where the target's has two parts
    size = latent_size if model.mla else model.head_size
    return replace(model, num_layers=1, windows=(), moe=None, mla=None, num_mtp_layers=0, head_size=size)


def _load_head(found: Found, target: Decoder, seed: int) -> Loaded:
    if found.trained and found.has_weights:
        draft = load_eagle(found.trained, target)
    else:
        vocabulary = _random_vocabulary(target)
        with torch.device("meta"):
            head = EagleHead(found.config)
        head.rope = RotaryEmbedding(found.config)
        _fill(head, target, seed)
        draft = EagleDraft(head, target.embed, target.norm, reduced_lm_head(target, vocabulary), vocabulary)
    weight = target.embed.weight
    if weight.device.type == "cpu" and can_prepack(weight.dtype):
        prepack_linears(draft.head)
        assert isinstance(draft.lm_head, nn.Linear)
        draft = replace(draft, lm_head=PackedLinear(draft.lm_head))
    return Loaded(draft, found.config, draft.vocabulary)


def _load_small(found: Found, target: Decoder, seed: int) -> Loaded:
    assert found.trained is not None
    if found.has_weights:
        draft = load_small(found.trained, target)
        model, vocabulary = draft.model, draft.vocabulary
    else:
        vocabulary = _random_vocabulary(target)
        model = small_model(found.config, target, vocabulary)
        _fill(model, target, seed)
    weight = target.embed.weight
    if weight.device.type == "cpu" and can_prepack(weight.dtype):
        prepack_linears(model)
    return Loaded(model, found.config, vocabulary)


def _fill(module: nn.Module, target: Decoder, seed: int) -> None:
    """Random weights for all that is not the target's."""
    tensors = {
        name: torch.empty_like(p, device=target.embed.weight.device, dtype=target.embed.weight.dtype)
        for name, p in own_tensors(module).items()
    }
    with torch.inference_mode():
        fill_with_noise(tensors.items(), seed + 1)
    module.load_state_dict(tensors, strict=False, assign=True)
    module.eval().requires_grad_(False)


def _random_vocabulary(target: Decoder) -> torch.Tensor:
    weight = target.embed.weight
    return torch.arange(min(RANDOM_VOCABULARY, len(weight)), device=weight.device)


def _only_file(path: Path) -> Path:
    """The drafter's file, where its folder was given."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        raise ConfigError(f"speculative_config: {len(files)} drafters in '{path.name}': give one NAME.safetensors")
    return files[0]


def _is_smollm2(model: ModelConfig) -> bool:
    expected = ModelConfig.from_json(builtin_configs()[SHIPPED_TARGET])
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads")
    return all(getattr(model, name) == getattr(expected, name) for name in sizes)
