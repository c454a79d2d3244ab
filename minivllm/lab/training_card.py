"""The same model trained and served: FLOPs by torch's counter, and the bytes that a pass keeps for later.

    decode            one new token after others: keeps its K and V, and reads those of all
    prefill           all tokens at once: keeps K and V of each, for the steps to come
    training          with a backward pass: keeps what autograd saves of each layer, until the gradients are there
Tensors are torch's fake ones: they have sizes and no numbers, so a model of any size is counted in a second. Attention
is fused in both passes, so it keeps no matrix of scores. Optimiser states are left out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

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

Kind = Literal["decode", "prefill", "training"]
KINDS: tuple[Kind, ...] = ("decode", "prefill", "training")


@dataclass(frozen=True)
class Pass:
    """One pass of a model over one sequence, whose every new token is asked for its successor."""

    model: str
    kind: Kind
    num_tokens: int  # computed
    num_stored: int  # attended to, the computed ones among them
    products: int  # FLOPs of matrix products
    attention: int  # FLOPs of attention, masked pairs among them
    weight_bytes: int  # of all matrices that multiply
    kept_bytes: int  # K and V of the computed tokens, or with a backward pass all that it needs of the forward pass

    @property
    def moved_bytes(self) -> int:
        """Weights once for each direction, gradients once; kept for gradients: written and read; else all K and V once.

        K and V of a prefill are only written, those of a decode's earlier tokens only read.
        """
        if self.kind == "training":
            return 3 * self.weight_bytes + 2 * self.kept_bytes
        return self.weight_bytes + self.kept_bytes * self.num_stored // self.num_tokens


class CausalAttention:
    """Attention of one sequence, or of one token after `num_past` blank ones; notes the bytes of new K and V."""

    def __init__(self, num_past: int) -> None:
        self.num_past = num_past
        self.kv_bytes = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, H, D], k and v [T, Hkv, D] -> [T, H, D]."""
        self.kv_bytes += k.nbytes + v.nbytes
        if self.num_past:
            k, v = (torch.cat([x.new_zeros(self.num_past, *x.shape[1:]), x]) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, T or all, D]
        is_causal = not self.num_past  # a lone token sees all
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)[0].transpose(0, 1)


def count_passes(model: str, nums_tokens: Sequence[int], dtype: str = "bfloat16") -> list[Pass]:
    """A pass of each kind for each length. Raises ConfigError for models with latent attention."""
    config = ModelConfig.from_json({**find_model(model, "dummy").config, "dtype": dtype})
    if config.mla:
        raise ConfigError(f"{model} has latent attention; the training card counts models of the Llama family")
    with FakeTensorMode(), _default_dtype(getattr(torch, dtype)):
        decoder = llama(config)
        if config.tie_word_embeddings:
            decoder.lm_head.weight = decoder.embed.weight
        return [count(decoder, model, num, kind) for num in nums_tokens for kind in KINDS]


def count(decoder: Decoder, model: str, num_stored: int, kind: Kind) -> Pass:
    """One pass over real or fake tensors: a decode computes the last of `num_stored` tokens, the others compute all."""
    num_tokens, has_backward = 1 if kind == "decode" else num_stored, kind == "training"
    attention, keeper = CausalAttention(num_stored - num_tokens), Keeper(decoder)
    device = decoder.embed.weight.device
    token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    rows = torch.arange(num_tokens, device=device)
    positions = rows + num_stored - num_tokens
    with flop_counter() as counter, torch.set_grad_enabled(has_backward), saved_tensors_hooks(keeper.keep, _as_it_is):
        logits = decoder(token_ids, positions, rows, attention)
        if has_backward:
            F.cross_entropy(logits.float(), token_ids).backward()
            decoder.zero_grad()
    flops = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    in_attention = sum(number for name, number in flops.items() if "attention" in name or "bmm" in name)
    weight_bytes = sum(p.nbytes for name, p in decoder.named_parameters() if p.ndim == 2 and name != "embed.weight")
    if decoder.lm_head.weight is decoder.embed.weight:
        weight_bytes += decoder.lm_head.weight.nbytes
    kept = keeper.num_bytes if has_backward else attention.kv_bytes
    products = sum(flops.values()) - in_attention
    return Pass(model, kind, num_tokens, num_stored, products, in_attention, weight_bytes, kept)


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
