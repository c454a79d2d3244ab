"""Chains of drafts on the device: the drafts, K, V and features of the eager chain, whatever shares the batch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.draft_events import DraftJudged
from minivllm.runner import fused_steps
from minivllm.runner.draft_chain import DraftChain, can_chain, chain_sizes
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.proposers import random_head
from minivllm.speculative.draft_batch import MOST_CHAINED
from minivllm.speculative.eagle import EagleProposer
from minivllm.speculative.eagle_model import EagleHead, save_draft
from minivllm.speculative.ngram import NgramProposer
from minivllm.trace import Trace
from tests.kernel_cases import HAS_GPU
from tests.test_fused import PROMPTS, engine, folders, fused, interpreted, plain, steps_of, tokens

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
folders, fused, interpreted = folders, fused, interpreted  # the fixtures, by their names
Folders = Callable[[str], Path]
METHODS = ["eagle", "draft_model", "early_exit"]
OPTIONS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "chunks beside drafts": {"max_num_batched_tokens": 24},
    "one at a time": {"max_num_seqs": 1},
    "blocks of 8, radix": {"block_size": 8, "prefix_cache": "radix"},
    "preempted": {"num_blocks": 11, "kv_cache_memory": None, "max_model_len": 80},
    "swapped": {
        "num_blocks": 11, "kv_cache_memory": None, "max_model_len": 80, "preemption_mode": "swap", "num_host_blocks": 20
    },
}  # fmt: skip
UNEVEN = [
    SamplingParams(temperature=0, max_tokens=32, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=33, top_p=0.9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=31, num_speculative_tokens=1, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=30, speculative_method="off", ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=34, num_speculative_tokens=6, repetition_penalty=1.2, ignore_eos=True),
]


@pytest.fixture
def config_of(folders: Folders, tmp_path: Path) -> Callable[[str, list[list[list[int]]]], dict[str, Any]]:
    """A drafter for the llama of `folders` that is right now and then: its words are those that it says most."""

    def make(method: str, said: list[list[list[int]]]) -> dict[str, Any]:
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
        if method == "early_exit":
            return config | {"num_layers": 1}
        if method == "draft_model":
            return config | {"model": str(folders("llama"))}
        counts = Counter(token for samples in said for sample in samples for token in sample)
        words = sorted(token for token, _ in counts.most_common(2))
        shape = random_head(plain(folders("llama")).model_config)
        shape = replace(shape, qkv_bias=False, output_bias=False, mlp_bias=False)  # a file of a head has none
        torch.manual_seed(3)
        head = EagleHead(shape)
        for name, parameter in head.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        save_draft(tmp_path / "head.safetensors", head, shape, torch.tensor(words), "eagle", "llama", {})
        return config | {"model": tmp_path / "head.safetensors"}

    return make


def judged(llm: LLM, params: Any) -> tuple[list[list[list[int]]], list[DraftJudged]]:
    trace = Trace()
    stop_listening = llm.events.listen(trace)
    found = tokens(llm.generate(PROMPTS, params, use_tqdm=False))
    stop_listening()
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable, "a block is still held"
    return found, [event for event in trace if isinstance(event, DraftJudged)]


def pages_of(llm: LLM) -> list[torch.Tensor]:
    """What drafters have stored, but for the null block, where padding goes."""
    assert llm.runner.speculation is not None
    found = []
    for proposer in llm.runner.speculation.proposers.values():
        found.append(proposer.storage.data[:, :, 1:])  # type: ignore[attr-defined]
        found += [proposer.features.data[:, :, 1:]] if isinstance(proposer, EagleProposer) else []
    return found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_chain_on_the_device_drafts_and_stores_what_the_eager_one_does(
    method: str, name: str, folders: Folders, fused: None, config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = OPTIONS[name]
    expected = tokens(plain(folders("llama"), **options).generate(PROMPTS, UNEVEN, use_tqdm=False))
    config = config_of(method, expected)
    fast = engine(folders("llama"), has_graphs=True, speculative_config=config, **options)
    assert list(steps_of(fast).chains) == [method]
    monkeypatch.setattr(fused_steps, "can_chain", lambda *_: False)
    monkeypatch.setattr(KVStorage, "clear", lambda *_: None)  # which only the eager way needs, and tells pages apart
    slow = engine(folders("llama"), has_graphs=True, speculative_config=config, **options)
    assert not steps_of(slow).chains
    for _ in range(2):  # over a warm cache, too
        (found, rounds), (others, other_rounds) = judged(fast, UNEVEN), judged(slow, UNEVEN)
        assert found == others
        assert rounds == other_rounds and len(rounds) > 10
        assert sum(each.num_accepted for each in rounds) > 2
        assert len({len(each.draft_token_ids) for each in rounds}) > 1
    for mine, other in zip(pages_of(fast), pages_of(slow), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    if method != "draft_model":
        assert any(each.num_accepted < len(each.draft_token_ids) for each in rounds)


def test_greedy_tokens_are_those_without_drafts_and_methods_take_turns(
    folders: Folders, fused: None, config_of: Any
) -> None:
    plainly = [SamplingParams(temperature=0, max_tokens=14 + i, ignore_eos=True) for i in range(5)]
    expected = tokens(plain(folders("llama")).generate(PROMPTS, plainly, use_tqdm=False))
    configs = [config_of(method, expected) for method in METHODS] + [{"method": "ngram", "prompt_lookup_min": 1}]
    llm = engine(folders("llama"), has_graphs=True, speculative_config=configs, max_num_batched_tokens=40)
    methods = [*METHODS, "ngram", "off"]
    for turn in range(5):
        params = [
            SamplingParams(
                temperature=0, max_tokens=14 + i, ignore_eos=True, speculative_method=methods[(i + turn) % 5]
            )
            for i in range(5)
        ]
        found, rounds = judged(llm, params)
        assert found == expected
        own = [each for each in rounds if each.method == "draft_model"]
        assert own and all(each.num_accepted == len(each.draft_token_ids) for each in own)
        assert {each.method for each in rounds} >= set(METHODS)


def test_lengths_end_where_a_chain_has_no_more_columns(folders: Folders, fused: None, config_of: Any) -> None:
    llm = engine(folders("llama"), has_graphs=True, speculative_config=config_of("draft_model", []), max_num_seqs=1)
    wish = SamplingParams(temperature=0, max_tokens=MOST_CHAINED + 30, num_speculative_tokens=80, ignore_eos=True)
    _, rounds = judged(llm, wish)
    assert max(len(each.draft_token_ids) for each in rounds[:2]) <= MOST_CHAINED
    assert all(each.num_accepted == len(each.draft_token_ids) for each in rounds)


def test_the_time_of_drafts_is_that_of_the_passes(folders: Folders, fused: None, config_of: Any) -> None:
    llm = engine(folders("llama"), has_graphs=True, speculative_config=config_of("draft_model", []))
    judged(llm, UNEVEN)
    stats = llm.engine.speculation
    assert stats.draft_s > 0 and stats.verify_s > 0


def test_who_waits_for_the_host_has_no_chain(folders: Folders, fused: None, config_of: Any) -> None:
    drawn = config_of("draft_model", []) | {"draft_sample_method": "probabilistic"}
    llm = engine(folders("llama"), speculative_config=drawn)
    assert not steps_of(llm).chains
    assert not can_chain(NgramProposer(3, 1), 16)


def test_sizes_are_powers_of_two_up_to_the_most() -> None:
    assert chain_sizes(1) == [1] and chain_sizes(20) == [1, 2, 4, 8, 16, 20] and chain_sizes(8) == [1, 2, 4, 8]


@pytest.mark.skipif(not HAS_GPU, reason="only a GPU can be waited for")
def test_no_step_with_drafts_waits_before_its_tokens_are_on_their_way(folders: Folders, config_of: Any) -> None:
    """torch raises at whatever waits; reading the tokens waits for an event, which it does not count."""
    llm = engine(folders("llama"), has_graphs=True, speculative_config=config_of("draft_model", []))
    text, params = llm.text_engine, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    groups = [text.add(text.check(prompt), params) for prompt in PROMPTS]
    while not all(group.samples[0].request.num_output for group in groups):
        text.step()
    assert isinstance(steps_of(llm).chains["draft_model"], DraftChain)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            text.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for group in groups:
        text.abort(group)
