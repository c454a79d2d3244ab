"""Public models that questions draw from, and the sentence that describes one."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from minivllm.course.calculators import attention_shape, num_parameters

GROUPED = (
    "llama-3-8b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.3", "mistral-nemo-12b", "qwen2.5-0.5b",
    "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-14b",
    "qwen3-32b", "smollm2-135m", "tinyllama-1.1b", "smollm3-3b",
)  # fmt: skip
LARGE = ("llama-2-70b", "llama-3-70b", "qwen2.5-72b", "llama-3.1-405b", "yi-34b", "mistral-large-2407")
ON_ONE_CARD = (
    "llama-3-8b",
    "mistral-7b-v0.3",
    "mistral-nemo-12b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen3-8b",
    "qwen3-14b",
)
WINDOWED = ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-3-4b-text", "gemma-3-12b-text", "gemma-3-27b-text")
CARDS = ("a100-80gb-sxm", "h100-sxm", "h200-sxm")


def in_words(numbers: Sequence[int]) -> str:
    """in_words([3, 5, 8]) == "3, 5 and 8"."""
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


@dataclass(frozen=True)
class Facts:
    """What a question says of a model."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int

    @property
    def group(self) -> float:
        """Query heads that share a KV head."""
        return self.query_heads / self.kv_heads

    def __str__(self) -> str:
        heads = f"{self.query_heads} query heads, {self.kv_heads} KV head{'s' if self.kv_heads > 1 else ''}"
        return f"{self.name} ({self.layers} layers, {heads}, head size {self.head_size})"


def facts(name: str) -> Facts:
    shape = attention_shape(name)
    layer = shape.first
    return Facts(name, len(shape.layers), layer.num_heads, layer.num_kv_heads, layer.key_size)


def any_of(random: Random, names: tuple[str, ...]) -> Facts:
    return facts(random.choice(names))


def with_parameters(model: Facts) -> str:
    """The sentence about a model with its size, for questions that need the weights."""
    return f"{model}, {int(num_parameters(model.name)):,} parameters in bf16"
