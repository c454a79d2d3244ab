"""How requests are given drafts: vLLM's `speculative_config`, checked when built."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from minivllm.config import require_integers
from minivllm.errors import ConfigError, short

METHODS = ("ngram", "draft_model", "eagle", "early_exit")
CPU_STEP_TOKENS, GPU_STEP_TOKENS = 16, 160  # where verification begins to cost: FLOPs a byte, about
OPTIONS = {  # that only some methods have
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "draft_model": ("model", "draft_sample_method"),
    "eagle": ("model", "draft_sample_method"),
    "early_exit": ("num_layers", "draft_sample_method"),
}
OFF = "off"  # a request's word for no drafts at all


@dataclass(frozen=True)
class SpeculativeConfig:
    """One way of drafting.

    ngram copies what followed the last `prompt_lookup_max` to `prompt_lookup_min` tokens when they stood there before;
    draft_model runs a smaller `model` of the same tokenizer; eagle a head on the target's hidden states (`model`: its
    weights; None: the one that comes with SmolLM2); early_exit the target's own first `num_layers` layers. A drafter
    chooses its likeliest token ("greedy") or draws as the request does ("probabilistic"). `adaptive` lets the length
    follow acceptance, up to `num_speculative_tokens`, and keeps a step below `max_step_tokens`, beyond which
    verification is no longer free (None: 16 on a CPU, 160 on a GPU). From `disable_by_batch_size` running requests
    on nobody drafts.
    """

    method: str
    num_speculative_tokens: int = 4
    model: str | Path | None = None
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    num_layers: int | None = None
    draft_sample_method: str = "greedy"
    adaptive: bool = False
    max_step_tokens: int | None = None
    disable_by_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"speculative_config: method must be one of {', '.join(METHODS)}, not {short(self.method)}"
            )
        optional = ("num_layers", "max_step_tokens", "disable_by_batch_size")
        counts = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min", *optional)
        require_integers(**{name: getattr(self, name) for name in counts})
        for name in counts:
            value = getattr(self, name)
            if (value is None and name not in optional) or (value is not None and value < 1):
                raise ConfigError(f"speculative_config: {name} must be at least 1, not {value}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"speculative_config: prompt_lookup_min ({self.prompt_lookup_min}) must not exceed prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )
        if self.draft_sample_method not in ("greedy", "probabilistic"):
            raise ConfigError(
                f"speculative_config: draft_sample_method must be greedy or probabilistic, "
                f"not {short(self.draft_sample_method)}"
            )
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"speculative_config: adaptive must be True or False, not {short(self.adaptive)}")
        if not isinstance(self.model, str | Path | None) or self.model == "":
            raise ConfigError(f"speculative_config: model must be a name or a folder, not {short(self.model)}")
        if self.method == "draft_model" and self.model is None:
            raise ConfigError(
                "speculative_config: draft_model needs model, a smaller one of the same tokenizer, or 'smollm2-draft', "
                "which comes with minivllm for smollm2-135m"
            )


def read_speculative(given: object) -> tuple[SpeculativeConfig, ...]:
    """What LLM was given as `speculative_config`: None, a dict or a list of dicts, one for each method.

    Raises ConfigError for anything else, an unknown key, and a method named twice.
    """
    if given is None:
        return ()
    many = [given] if isinstance(given, Mapping | SpeculativeConfig) else given
    if not isinstance(many, Sequence) or isinstance(many, str):
        raise ConfigError(f"speculative_config must be a dict, a list of dicts or None, not {short(given)}")
    configs = tuple(each if isinstance(each, SpeculativeConfig) else _read(each) for each in many)
    names = [config.method for config in configs]
    if len(set(names)) < len(names):
        raise ConfigError(f"speculative_config: each method at most once, not {', '.join(names)}")
    return configs


def parse_speculative(text: str | None) -> tuple[SpeculativeConfig, ...]:
    """What a command line gives: JSON, as for vLLM's --speculative-config. Raises ConfigError."""
    try:
        return read_speculative(None if text is None else json.loads(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f'speculative_config is not JSON ({error}); write {{"method": "ngram"}}') from error


def for_device(given: object, device: str) -> tuple[SpeculativeConfig, ...]:
    """What was given, read, with the tokens of a step that a device of this kind verifies for nothing."""
    most = GPU_STEP_TOKENS if device == "cuda" else CPU_STEP_TOKENS
    return tuple(replace(each, max_step_tokens=each.max_step_tokens or most) for each in read_speculative(given))


def _read(given: object) -> SpeculativeConfig:
    if not isinstance(given, Mapping):
        raise ConfigError(f"speculative_config: must be a dict, not {short(given)}")
    known = [field.name for field in fields(SpeculativeConfig)]
    for key in given:
        if key not in known:
            raise ConfigError(f"speculative_config: unknown key {short(key)}; there are {', '.join(known)}")
    if "method" not in given:
        raise ConfigError(f"speculative_config: method is missing; one of {', '.join(METHODS)}")
    _refuse_options_of_others(given)
    bounds = {name: given.get(name) for name in ("prompt_lookup_max", "prompt_lookup_min")}
    match bounds:  # the bound that is not given follows the one that is
        case {"prompt_lookup_max": int(most), "prompt_lookup_min": None}:
            given = {**given, "prompt_lookup_min": min(most, SpeculativeConfig.prompt_lookup_min)}
        case {"prompt_lookup_max": None, "prompt_lookup_min": int(least)}:
            given = {**given, "prompt_lookup_max": max(least, SpeculativeConfig.prompt_lookup_max)}
    return SpeculativeConfig(**given)


def _refuse_options_of_others(given: Mapping[str, object]) -> None:
    method = str(given["method"])
    own = OPTIONS.get(method, ())
    others = {option: name for name, options in OPTIONS.items() for option in options if option not in own}
    for key in given:
        if method in OPTIONS and key in others and given[key] is not None:
            raise ConfigError(
                f"speculative_config: {key} is an option of {others[key]}; of its own {method} has {', '.join(own)}"
            )
