"""What a step of a model reads and computes, from the calculators alone: floors and pictures of steps stand on it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from minivllm.course.calculators import (
    AttentionShape,
    Layer,
    attention_shape,
    bits_of,
    decode_attention_intensity,
    expected_experts,
    inference_flops_per_token,
    kv_bytes_of_sequence,
    num_active_parameters,
    num_parameters,
    weight_bytes,
)
from minivllm.course.calculators.model_fields import Config, Fields
from minivllm.errors import ModelError

Whole = np.ndarray  # of whole numbers, one for each request


@dataclass(frozen=True)
class Work:
    """Bytes read, FLOPs done."""

    num_bytes: int
    flops: int

    @property
    def intensity(self) -> float:
        return self.flops / self.num_bytes


@dataclass(frozen=True)
class LayersAlike:
    """Layers whose attention costs the same."""

    layer: Layer
    number: int

    def keys_read(self, new: Whole, stored: Whole) -> int:
        """Tokens whose K and V the queries of a step see, each once for its request."""
        window = self.layer.window
        return int((np.minimum(stored, window - 1 + new) if window else stored).sum())

    def flops(self, new: Whole, stored: Whole) -> int:
        """Of scores and values, one layer; of MLA in the cheaper of its two forms, request by request.

        Expanded, K and V of the tokens stored before are built again; absorbed, every pair costs more.
        """
        layer, past = self.layer, stored - new
        if layer.kind == "linear":
            raise ModelError("linear attention has no query-key pairs; its FLOPs are not of this kind")
        growing = np.clip(layer.window - past, 0, new) if layer.window else new
        pairs = growing * past + growing * (growing + 1) // 2 + (new - growing) * (layer.window or 0)
        flops = 2 * layer.num_heads * (layer.key_size + layer.value_size) * pairs
        if layer.latent_size:
            built = layer.latent_size * (layer.key_size - layer.rope_size + layer.value_size)
            absorbed = 2 * layer.num_heads * (2 * layer.latent_size + layer.rope_size) * pairs
            flops = np.minimum(flops + 2 * layer.num_heads * built * past, absorbed)
        return int(flops.sum())


@dataclass(frozen=True)
class CountedModel:
    """What the calculators read off a config, once: a step asks for it again and again."""

    shape: AttentionShape
    num_parameters: int
    num_active: int  # that one token uses
    num_in_experts: int
    num_experts: int
    num_used_experts: int  # by one token
    alike: tuple[LayersAlike, ...] = field(repr=False)

    def weights_used(self, num_tokens: int) -> int:
        """Parameters that a step with so many tokens reads; of experts, those that it is expected to touch."""
        if not self.num_in_experts:
            return self.num_parameters
        touched = _touched(self.num_experts, self.num_used_experts, num_tokens)
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
        """Attention of a real step: (new tokens, tokens stored after it) for each request; each reads its own K, V."""
        new, stored = zip(*scheduled, strict=True)
        return self.attention(new, stored, kv_dtype)

    def attention(self, num_new: Sequence[int], num_stored: Sequence[int], kv_dtype: str) -> Work:
        """The same, from two lists; no loop over requests, for a ledger counts every step of a running engine."""
        new, stored = np.array(num_new, dtype=np.int64), np.array(num_stored, dtype=np.int64)
        num_elements = sum(
            each.number * each.layer.elements_per_token * each.keys_read(new, stored) for each in self.alike
        )
        return Work(
            _in_bytes(num_elements, kv_dtype), sum(each.number * each.flops(new, stored) for each in self.alike)
        )

    def stored_bytes(self, num_tokens: int, kv_dtype: str) -> int:
        """K and V of so many new tokens, which every layer writes whatever its window."""
        return _in_bytes(num_tokens * self.shape.elements_per_token, kv_dtype)


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
    shape = attention_shape(config)
    alike = tuple(LayersAlike(layer, number) for layer, number in Counter(shape.layers).items())
    return CountedModel(shape, int(total), int(num_active_parameters(config)), in_experts, *experts, alike)


@lru_cache(maxsize=4096)
def _touched(num_experts: int, num_used: int, num_tokens: int) -> float:
    return float(expected_experts(num_experts, num_used, num_tokens))


def _in_bytes(num_elements: int, dtype: str) -> int:
    return -int(-num_elements * bits_of(dtype) // 8)
