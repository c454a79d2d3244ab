"""The same model trained and served: FLOPs by torch's counter, and the bytes that a pass keeps for later.

    forward alone     keeps K and V of each token, for the steps to come
    with backward     keeps what autograd saves of each layer, for the gradients; nothing once they are computed
Tensors are torch's fake ones: they have sizes and no numbers, so a model of any size is counted in a second. Attention
is fused in both passes, so it keeps no matrix of scores. Optimiser states are left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from minivllm.config import ModelConfig
from minivllm.errors import ConfigError
from minivllm.lab.counted_steps import flop_counter
from minivllm.models.decoder import Decoder
from minivllm.models.llama import llama
from minivllm.weights import find_model


@dataclass(frozen=True)
class Pass:
    """One pass of a model over one sequence, whose every token is asked for its successor."""

    model: str
    num_tokens: int
    has_backward: bool
    products: int  # FLOPs of matrix products
    attention: int  # FLOPs of attention, masked pairs among them
    weight_bytes: int  # of all matrices that multiply
    kept_bytes: int  # K and V, or with a backward pass all that it needs of the forward pass

    @property
    def moved_bytes(self) -> int:
        """Weights once for each direction, gradients once; what is kept written once, and read once if there is why."""
        times_weights, times_kept = (3, 2) if self.has_backward else (1, 1)
        return times_weights * self.weight_bytes + times_kept * self.kept_bytes


class CausalAttention:
    """Attention of one sequence without a cache; notes the bytes of the K and V that pass."""

    def __init__(self) -> None:
        self.kv_bytes = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]."""
        self.kv_bytes += k.nbytes + v.nbytes
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T, D]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def count_passes(model: str, nums_tokens: Sequence[int], dtype: str = "bfloat16") -> list[Pass]:
    """A pass without and one with backward for each length. Raises ConfigError for models with latent attention."""
    config = ModelConfig.from_json({**find_model(model, "dummy").config, "dtype": dtype})
    if config.mla:
        raise ConfigError(f"{model} has latent attention; the training card counts models of the Llama family")
    with FakeTensorMode(), _default_dtype(getattr(torch, dtype)):
        decoder = llama(config)
        if config.tie_word_embeddings:
            decoder.lm_head.weight = decoder.embed.weight
        return [count(decoder, model, num, has_backward) for num in nums_tokens for has_backward in (False, True)]


def count(decoder: Decoder, model: str, num_tokens: int, has_backward: bool) -> Pass:
    """One pass over real or fake tensors."""
    attention, keeper = CausalAttention(), Keeper(decoder)
    device = decoder.embed.weight.device
    token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    positions = torch.arange(num_tokens, device=device)
    with flop_counter() as counter, torch.set_grad_enabled(has_backward), saved_tensors_hooks(keeper.keep, _as_it_is):
        logits = decoder(token_ids, positions, positions, attention)
        if has_backward:
            F.cross_entropy(logits.float(), token_ids).backward()
            decoder.zero_grad()
    flops = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    in_attention = sum(number for name, number in flops.items() if "attention" in name or "bmm" in name)
    weight_bytes = sum(p.nbytes for name, p in decoder.named_parameters() if p.ndim == 2 and name != "embed.weight")
    if decoder.lm_head.weight is decoder.embed.weight:
        weight_bytes += decoder.lm_head.weight.nbytes
    kept = keeper.num_bytes if has_backward else attention.kv_bytes
    return Pass(
        model, num_tokens, has_backward, sum(flops.values()) - in_attention, in_attention, weight_bytes, kept
    )  # fmt: skip


class Keeper:
    """Adds up the storages that autograd keeps, each once, the model's own parameters aside."""

    def __init__(self, decoder: Decoder) -> None:
        self._parameters = {id(p.untyped_storage()) for p in decoder.parameters()}
        self._kept: dict[int, torch.UntypedStorage] = {}  # held, so that no id is used twice

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._parameters:
            self._kept[id(storage)] = storage
        return tensor


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
