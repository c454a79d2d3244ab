"""What a step of a public model reads and computes, from the calculators alone, and the lists that pickers show."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from minivllm.course.calculators import (
    Accelerator,
    AttentionShape,
    Worked,
    accelerator,
    accelerators,
    attention_flops,
    attention_shape,
    decode_attention_intensity,
    expected_experts,
    inference_flops_per_token,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    num_active_parameters,
    num_parameters,
    public_models,
    weight_bytes,
)
from minivllm.course.calculators.model_fields import Config, Fields
from minivllm.errors import ConfigError, ModelError

WEIGHT_DTYPES = ("bf16", "fp8", "int8", "int4", "mxfp4")
KV_DTYPES = ("bf16", "fp8", "int8", "int4")
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
CONTEXTS = tuple(2**k for k in range(7, 18))  # 128 to 131,072 tokens


@dataclass(frozen=True)
class Work:
    """Bytes read, FLOPs done."""

    num_bytes: int
    flops: int

    @property
    def intensity(self) -> float:
        return self.flops / self.num_bytes


@dataclass(frozen=True)
class CountedModel:
    """What the calculators read off a config, once: a step asks for it again and again."""

    shape: AttentionShape
    num_parameters: int
    num_active: int  # that one token uses
    num_in_experts: int
    num_experts: int
    num_used_experts: int  # by one token

    def weights_used(self, num_tokens: int) -> int:
        """Parameters that a step with so many tokens reads; of experts, those that it is expected to touch."""
        if not self.num_in_experts:
            return self.num_parameters
        touched = float(expected_experts(self.num_experts, self.num_used_experts, num_tokens))
        return self.num_parameters - self.num_in_experts + round(self.num_in_experts * touched / self.num_experts)

    def products(self, num_tokens: int, weight_dtype: str) -> Work:
        """All matrix products of a step: each weight is read once, and does 2 FLOPs for each token that uses it.

        Activations are left out: beside the weights they are small.
        """
        num_bytes = int(weight_bytes(self.weights_used(num_tokens), weight_dtype))
        return Work(num_bytes, int(inference_flops_per_token(self.num_active)) * num_tokens)

    def decode_attention(self, batch_size: int, context: int, kv_dtype: str) -> Work:
        """Each sequence reads its own K and V once; MLA with absorbed weights reads its latents."""
        num_bytes = batch_size * int(kv_bytes_of_sequence(self.shape, context, kv_dtype))
        return Work(num_bytes, round(num_bytes * float(decode_attention_intensity(self.shape, kv_dtype))))

    def attention_of(self, scheduled: Sequence[tuple[int, int]], kv_dtype: str) -> Work:
        """Attention of a real step: (new tokens, tokens stored after it) for each request."""
        num_bytes = sum(int(kv_bytes_of_sequence(self.shape, stored, kv_dtype)) for _, stored in scheduled)
        return Work(num_bytes, sum(int(attention_flops(self.shape, new, stored - new)) for new, stored in scheduled))


def counted_model(config: Config) -> CountedModel:
    """Count a config, or a public model by its name."""
    return _counted_by_name(config) if isinstance(config, str) else _counted(config)


@lru_cache
def _counted_by_name(name: str) -> CountedModel:
    return _counted(name)


def _counted(config: Config) -> CountedModel:
    fields, total = Fields(config), num_parameters(config)
    in_experts = int(total.parts["experts"])
    experts = (fields.whole("num_experts"), fields.whole("num_experts_per_tok")) if in_experts else (0, 0)
    return CountedModel(attention_shape(config), int(total), int(num_active_parameters(config)), in_experts, *experts)


@lru_cache
def model_names() -> tuple[str, ...]:
    """Public models whose parameters, K and V the calculators can count."""
    return tuple(name for name, model in public_models().items() if _is_countable(model.config))


def model_options() -> list[tuple[str, str]]:
    return [(name, name) for name in model_names()]


def chip_options() -> list[tuple[str, str]]:
    return [(name, name) for name in accelerators()]


def compute_dtype(chip: str | Accelerator, wanted: str) -> str:
    """The wanted type where the chip has it, else its 16-bit one."""
    rates = accelerator(chip).flops
    return next(name for name in (wanted, "bf16", "fp16", *rates) if name in rates)


def as_words(names: Sequence[str]) -> list[tuple[str, str]]:
    """Options that are their own words."""
    return [(name, name) for name in names]


def ms(time: Worked | float) -> str:
    """A time in milliseconds, to three figures: ms(4.7935) == "4.79 ms"."""
    value = float(time)
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"


def _is_countable(config: Config) -> bool:
    try:
        attention_flops(config, 1)
        return int(kv_bytes_per_token(config)) > 0 and int(num_active_parameters(config)) > 0
    except (ModelError, ConfigError):
        return False
