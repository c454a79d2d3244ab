"""Generation with and without reuse of K and V: counted by hooks on the model's own modules, and compared.

Without reuse, every token asks the engine anew: a request with all tokens so far, of which nothing is stored. The
engine must not find them in its prefix cache either. A pass is one call of the model; its head ends it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from minivllm.errors import MiniVLLMError
from minivllm.events import StepRan
from minivllm.llm import LLM
from minivllm.models.llama import SelfAttention
from minivllm.request import SamplingParams
from minivllm.trace import Trace
from minivllm.weights import fetch_default_model

Hook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]


@dataclass(frozen=True)
class Pass:
    """One call of the model, as its own modules saw it."""

    num_tokens: int  # rows that the embedding looked up: token-forwards
    num_keys: int  # rows of K that were projected, over all layers
    num_values: int
    logits: np.ndarray  # [rows that were wanted, vocab], fp32


@dataclass(frozen=True)
class Run:
    """A greedy generation: the prompt with all that was chosen, and each pass that it took."""

    token_ids: list[int]
    num_prompt: int
    passes: list[Pass]
    trace: Trace = field(default_factory=Trace)  # empty where another program ran

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def num_token_forwards(self) -> int:
        return sum(each.num_tokens for each in self.passes)

    @property
    def num_kv_projections(self) -> int:
        """Rows projected to K, and as many to V, over all layers and passes."""
        assert all(each.num_keys == each.num_values for each in self.passes)
        return sum(each.num_keys for each in self.passes)

    @property
    def num_keys_read(self) -> list[int]:
        """By step of the engine: the stored tokens that the newest query meets, its own included."""
        return [event.scheduled[0][2] for event in self.trace if isinstance(event, StepRan) and event.scheduled]

    @property
    def logits(self) -> np.ndarray:
        """From which each token was chosen, [tokens, vocab]: the last row of each pass."""
        return np.stack([each.logits[-1] for each in self.passes])


def cached(llm: LLM, token_ids: Sequence[int], num_new: int) -> Run:
    """The engine's own generation: the prompt in one pass, then one token a pass."""
    with _watched_engine(llm) as passes, llm.record() as trace:
        [output] = llm.generate([list(token_ids)], _greedy(num_new), use_tqdm=False)
    return Run([*token_ids, *output.outputs[0].token_ids], len(token_ids), passes, trace)


def uncached(llm: LLM, token_ids: Sequence[int], num_new: int) -> Run:
    """The same tokens without reuse: for each one, all before it go through the model again.

    Raises MiniVLLMError where the engine's prefix cache would reuse them after all.
    """
    if llm.config.enable_prefix_caching:
        raise MiniVLLMError("uncached: the prefix cache reuses blocks; build the LLM with enable_prefix_caching=False")
    known = list(token_ids)
    with _watched_engine(llm) as passes, llm.record() as trace:
        for _ in range(num_new):
            [output] = llm.generate([known], _greedy(1), use_tqdm=False)
            known.extend(output.outputs[0].token_ids)
    return Run(known, len(token_ids), passes, trace)


def at_once(llm: LLM, token_ids: Sequence[int]) -> Run:
    """All tokens are known, as in training: one pass, whose logits have a row for each of them."""
    with _watched_engine(llm) as passes, llm.record() as trace:
        [output] = llm.generate([list(token_ids)], _greedy(1, prompt_logprobs=0), use_tqdm=False)
    return Run([*token_ids, *output.outputs[0].token_ids], len(token_ids), passes, trace)


def load_transformers(folder: Path | None = None) -> PreTrainedModel:
    """transformers' own model in fp32 on the CPU, from the files of the default model or of another folder."""
    source = folder or fetch_default_model(show_progress=False)
    logging.disable_progress_bar()  # its milliseconds would stand in the notebook
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as ignore_eos does
    return model.eval()


def in_transformers(model: PreTrainedModel, token_ids: Sequence[int], num_new: int, *, use_cache: bool) -> Run:
    """The same greedy generation by a program that we did not write."""
    prompt, layers = torch.tensor([list(token_ids)]), model.model.layers
    keys, values = [layer.self_attn.k_proj for layer in layers], [layer.self_attn.v_proj for layer in layers]
    with watched(model.model.embed_tokens, keys, values, model.lm_head) as passes, torch.inference_mode():
        [known] = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_new, do_sample=False,
            use_cache=use_cache, pad_token_id=0,
        )  # fmt: skip
    return Run(known.tolist(), len(token_ids), passes)


@contextmanager
def watched(
    embedding: nn.Module, keys: Sequence[nn.Module], values: Sequence[nn.Module], head: nn.Module
) -> Iterator[list[Pass]]:
    """Count the rows that these modules compute while the block under `with` runs; one Pass for each call of `head`."""
    passes: list[Pass] = []
    counts = dict.fromkeys(("tokens", "keys", "values"), 0)

    def count(name: str) -> Hook:
        def add(module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            counts[name] += given[0].numel() if name == "tokens" else made.shape[:-1].numel()

        return add

    def end(module: nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        logits = made.detach().flatten(0, -2).float().cpu().numpy().copy()
        passes.append(Pass(counts["tokens"], counts["keys"], counts["values"], logits))
        counts.update(dict.fromkeys(counts, 0))

    hooks = [embedding.register_forward_hook(count("tokens")), head.register_forward_hook(end)]
    hooks += [module.register_forward_hook(count("keys")) for module in keys]
    hooks += [module.register_forward_hook(count("values")) for module in values]
    with _removed(hooks):
        yield passes


@dataclass(frozen=True)
class Past:
    """Q, K and V of all tokens but the newest, by layer [n - 1, heads, D], as projected: not turned by RoPE yet."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]


def record_past(llm: LLM, token_ids: Sequence[int]) -> Past:
    """Compute all tokens in one pass, and note the rows of all but the last."""
    rows: list[tuple[torch.Tensor, ...]] = []

    def note(attention: SelfAttention, made: torch.Tensor) -> None:
        q, k, v = _heads(attention, made[:-1].clone())
        rows.append((q, k, v))

    with llm.runner.by_modules(), _removed(_on_projections(llm, lambda layer, attention, made: note(attention, made))):
        llm.generate([list(token_ids)], _greedy(1), use_tqdm=False)
    q, k, v = (list(each) for each in zip(*rows, strict=True))
    return Past(q, k, v)


def logits_given(llm: LLM, token_ids: Sequence[int], past: Past) -> np.ndarray:
    """Logits [vocab] after the last token when, in every layer, the rows of all others are those of `past`."""

    def replace(layer: int, attention: SelfAttention, made: torch.Tensor) -> torch.Tensor:
        old = torch.cat((past.q[layer], past.k[layer], past.v[layer]), dim=1)  # [n - 1, H + 2 Hkv, D]
        return torch.cat((old.flatten(1), made[-1:]))

    with _watched_engine(llm) as passes, _removed(_on_projections(llm, replace)):
        llm.generate([list(token_ids)], _greedy(1), use_tqdm=False)
    [only] = passes
    return only.logits[-1]


@contextmanager
def wrong_positions(llm: LLM, wrong: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """A bug for as long as the block under `with` runs: RoPE turns a decoded token by wrong(positions).

    Slots and block tables stay right, so nothing fails.
    """

    model = llm.runner.model
    hidden = model.hidden

    def misplaced(token_ids: torch.Tensor, positions: torch.Tensor, *others: Any) -> torch.Tensor:
        is_decode = len(token_ids) == 1 and int(positions[0]) > 0
        return hidden(token_ids, wrong(positions) if is_decode else positions, *others)

    with llm.runner.by_modules():
        model.hidden = misplaced  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del model.hidden


@contextmanager
def _watched_engine(llm: LLM) -> Iterator[list[Pass]]:
    model = llm.runner.model
    projections = [attention.qkv_proj for attention in _attentions(llm)]  # one matrix for Q, K and V
    with llm.runner.by_modules(), watched(model.embed, projections, projections, model.lm_head) as passes:
        yield passes


def _on_projections(
    llm: LLM, act: Callable[[int, SelfAttention, torch.Tensor], torch.Tensor | None]
) -> list[RemovableHandle]:
    """Call act(layer, attention, rows) after each projection; what it returns takes the rows' place."""

    def hook(layer: int, attention: SelfAttention) -> Hook:
        return lambda module, given, made: act(layer, attention, made)

    attentions = _attentions(llm)
    return [a.qkv_proj.register_forward_hook(hook(layer, a)) for layer, a in enumerate(attentions)]


def _attentions(llm: LLM) -> list[SelfAttention]:
    """By layer. Raises MiniVLLMError for a model whose attention projects something else."""
    found = [layer.attention for layer in llm.runner.model.layers]
    attentions = [attention for attention in found if isinstance(attention, SelfAttention)]
    if len(attentions) < len(found):
        raise MiniVLLMError(f"{llm.model} keeps latents, not K and V; count a Llama or Qwen model")
    return attentions


def _heads(attention: SelfAttention, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Q [T, H, D], K and V [T, Hkv, D] of the fused rows."""
    sizes = (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)
    return rows.view(len(rows), -1, attention.head_size).split(sizes, dim=1)


def _greedy(num_new: int, prompt_logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, prompt_logprobs=prompt_logprobs)


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Take the hooks off again at the end of the block under `with`."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
