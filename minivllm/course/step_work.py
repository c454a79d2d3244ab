"""What a step of a model reads and computes, from the calculators alone: floors and pictures of steps stand on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from minivllm.course.calculators import (
    AttentionShape,
    attention_flops,
    attention_shape,
    decode_attention_intensity,
    expected_experts,
    inference_flops_per_token,
    kv_bytes_of_sequence,
    num_active_parameters,
    num_parameters,
    weight_bytes,
)
from minivllm.course.calculators.model_fields import Config, Fields


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
