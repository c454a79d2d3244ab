"""With and without reuse: counted on the engine and on transformers alike, and the same tokens from the same logits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from minivllm import LLM
from minivllm.course.calculators import token_forwards
from minivllm.errors import MiniVLLMError
from minivllm.lab.uncached import (
    Run,
    at_once,
    cached,
    in_transformers,
    load_transformers,
    logits_given,
    record_past,
    uncached,
    wrong_positions,
)
from minivllm.models.llama import SelfAttention

Build = Callable[[str], tuple[Path, PreTrainedModel]]
FAMILIES = ("llama-gqa", "llama-mqa-bias", "qwen3", "mistral")
PROMPT = [5, 17, 3, 250, 99]


def engine(folder: Path, **options: bool) -> LLM:
    """An engine that keeps no prefix."""
    return LLM(folder, dtype="float32", num_blocks=20, enable_prefix_caching=False, **options)  # type: ignore[arg-type]


def greatest(one: np.ndarray, other: np.ndarray) -> float:
    return np.abs(one - other).max().item()


@pytest.mark.parametrize(("num_prompt", "num_new"), [(1, 19), (1, 1), (5, 1), (3, 16), (17, 4)])
def test_counted_token_forwards_are_the_sum_without_and_the_length_with(
    num_prompt: int, num_new: int, reference_model: Build
) -> None:
    folder, model = reference_model("llama-gqa")
    llm, prompt = engine(folder), list(range(2, 2 + num_prompt))
    lengths = range(num_prompt, num_prompt + num_new)
    without, reused = uncached(llm, prompt, num_new), cached(llm, prompt, num_new)
    assert [each.num_tokens for each in without.passes] == [*lengths]
    assert [each.num_tokens for each in reused.passes] == [num_prompt, *[1] * (num_new - 1)]
    assert (without.num_token_forwards, reused.num_token_forwards) == (sum(lengths), lengths[-1])
    num_layers = model.config.num_hidden_layers
    assert without.num_kv_projections == num_layers * sum(lengths)
    assert reused.num_kv_projections == num_layers * lengths[-1]


def test_19_steps_from_one_token_take_190_and_19(reference_model: Build) -> None:
    llm, worked = engine(reference_model("llama-gqa")[0]), token_forwards(19)
    assert uncached(llm, [7], 19).num_token_forwards == int(worked) == 190
    assert cached(llm, [7], 19).num_token_forwards == int(worked.parts["cached"]) == 19


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_counts_the_same_and_chooses_the_same(family: str, reference_model: Build) -> None:
    folder, _ = reference_model(family)
    llm, witness = engine(folder), load_transformers(folder)
    for ours, use_cache in ((uncached(llm, PROMPT, 12), False), (cached(llm, PROMPT, 12), True)):
        theirs = in_transformers(witness, PROMPT, 12, use_cache=use_cache)
        assert [each.num_tokens for each in ours.passes] == [each.num_tokens for each in theirs.passes]
        assert ours.num_kv_projections == theirs.num_kv_projections
        assert ours.token_ids == theirs.token_ids
        assert greatest(ours.logits, theirs.logits) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_changes_no_token_and_no_logit_beyond_rounding(family: str, reference_model: Build) -> None:
    llm = engine(reference_model(family)[0])
    reused, without = cached(llm, PROMPT, 24), uncached(llm, PROMPT, 24)
    assert reused.output_ids == without.output_ids and len(reused.output_ids) == 24
    assert greatest(reused.logits, without.logits) < 1e-4
    assert np.abs(reused.logits).max() > 1  # the tolerance is small beside them


@pytest.mark.weights
def test_real_model_rounds_differently_until_the_order_of_sums_is_fixed() -> None:
    prompt = [26741]  # "Memory"
    found: dict[bool, tuple[Run, Run]] = {}
    for is_invariant in (False, True):
        llm = LLM(
            "smollm2-135m", dtype="float32", num_blocks=8, enable_prefix_caching=False, batch_invariant=is_invariant
        )
        found[is_invariant] = cached(llm, prompt, 19), uncached(llm, prompt, 19)
        del llm
    assert len({tuple(run.token_ids) for pair in found.values() for run in pair}) == 1
    assert greatest(*(run.logits for run in found[True])) == 0
    assert 0 < greatest(*(run.logits for run in found[False])) < 1e-3


def test_one_pass_over_known_tokens_has_the_logits_of_all_steps(reference_model: Build) -> None:
    folder, model = reference_model("llama-gqa")
    llm = engine(folder)
    steps = cached(llm, [7], 19)
    known = steps.token_ids[:-1]
    [only] = at_once(llm, known).passes
    assert (only.num_tokens, only.num_keys) == (19, 19 * model.config.num_hidden_layers)
    assert only.logits.shape == steps.logits.shape
    assert greatest(only.logits, steps.logits) < 1e-4
    with torch.inference_mode():
        assert greatest(only.logits, model(torch.tensor([known])).logits[0].numpy()) < 1e-4


def test_keys_read_are_the_slots_that_attention_gathers(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = LLM(folder, dtype="float32", num_blocks=40, block_size=1, enable_prefix_caching=False)
    gathered: list[int] = []
    last = llm.runner.model.layers[-1].attention
    assert isinstance(last, SelfAttention)
    handle = last.register_forward_pre_hook(lambda module, given: gathered.append(given[3].groups[0].block_ids.numel()))
    run = cached(llm, [3, 4], 9)
    handle.remove()
    assert run.num_keys_read == gathered == [*range(2, 11)]


def test_old_queries_are_read_by_nobody_and_every_old_key_and_value_is(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0])
    past = record_past(llm, PROMPT)
    plain = logits_given(llm, PROMPT, past)
    assert [tuple(q.shape) for q in past.q] == [(4, 4, 16)] * 2 and past.k[0].shape == past.v[0].shape == (4, 2, 16)
    assert greatest(plain, uncached(llm, PROMPT, 1).logits[0]) == 0
    noise = [10 * torch.randn(q.shape, generator=torch.Generator().manual_seed(1)) for q in past.q]
    assert greatest(logits_given(llm, PROMPT, replace(past, q=noise)), plain) == 0
    for token in range(len(PROMPT) - 1):
        for name, rows in (("k", past.k), ("v", past.v)):
            emptied = [layer.index_fill(0, torch.tensor([token]), 0) for layer in rows]
            assert greatest(logits_given(llm, PROMPT, replace(past, **{name: emptied})), plain) > 1e-3


@pytest.mark.parametrize("offset", [1, -3])
def test_wrong_position_gives_what_transformers_gives_for_it(offset: int, reference_model: Build) -> None:
    folder, model = reference_model("llama-gqa")
    llm = engine(folder)
    right = cached(llm, PROMPT, 2)
    with wrong_positions(llm, lambda positions: positions + offset):
        wrong = cached(llm, PROMPT, 2)
    kept = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([PROMPT]), past_key_values=kept)
        given = {"input_ids": torch.tensor([right.output_ids[:1]]), "past_key_values": kept}
        expected = model(**given, position_ids=torch.tensor([[len(PROMPT) + offset]])).logits[0, -1]
    assert greatest(wrong.logits[0], right.logits[0]) == 0  # the prompt is where it belongs
    assert greatest(wrong.logits[1], expected.numpy()) < 1e-4 < greatest(wrong.logits[1], right.logits[1])


def test_hooks_are_gone_afterwards_even_after_an_error(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0])
    cached(llm, PROMPT, 2)
    logits_given(llm, PROMPT, record_past(llm, PROMPT))
    with pytest.raises(MiniVLLMError), wrong_positions(llm, lambda positions: positions):
        cached(llm, [], 2)
    modules = [*llm.runner.model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_prefix_cache_and_latents_are_refused_in_one_line(reference_model: Build) -> None:
    keeps = LLM(reference_model("llama-gqa")[0], dtype="float32", num_blocks=20)
    latent = engine(reference_model("v2-dense")[0])
    with pytest.raises(MiniVLLMError, match="enable_prefix_caching=False"):
        uncached(keeps, PROMPT, 2)
    with pytest.raises(MiniVLLMError, match="latents"):
        cached(latent, PROMPT, 2)
