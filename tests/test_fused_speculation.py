"""Speculation on the fused way: drafts as rows of decode graphs give the tokens that come without them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm import LLM, SamplingParams
from minivllm.attention import ForwardBatch
from minivllm.bench.planted import PlantedProposer, expected_tokens
from minivllm.engine.plan import StepPlan, Transfer
from minivllm.request import BlockTable, Request
from minivllm.runner.batch import build_batches
from minivllm.runner.draft_rows import DraftRows, shortened
from minivllm.runner.speculation import Chosen
from minivllm.runner.step_buffers import StepBuffers, StepLimits
from minivllm.speculative.proposer import Draft, Proposer
from minivllm.speculative.verify import verify
from tests.kernel_cases import HAS_GPU
from tests.test_fused import PROMPTS, engine, folders, fused, interpreted, plain, tokens
from tests.test_step_buffers import assert_same, some_request

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
folders, fused, interpreted = folders, fused, interpreted  # the fixtures, by their names
Folders = Callable[[str], Path]
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
NINE = [[(5 * i + j) % 300 for j in range(3 + 7 * i % 23)] for i in range(9)]


def greedy(max_tokens: int = 14, **wishes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **wishes)


def plant(llm: LLM, proposer: Proposer) -> LLM:
    assert llm.runner.speculation is not None
    llm.runner.speculation.proposers = {"ngram": proposer}
    return llm


def known(prompts: Sequence[list[int]], params: Sequence[SamplingParams], found: list[list[list[int]]]) -> Any:
    pairs = zip(prompts, params, found, strict=True)
    return {(tuple(prompt), each.seed): samples[0] for prompt, each, samples in pairs}


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("count", range(1, 10))
def test_drafts_change_no_greedy_token_in_any_batch_and_are_accepted_as_often_as_they_are_right(
    count: int, alpha: float, folders: Folders, fused: None
) -> None:
    prompts, params = NINE[:count], [greedy(14 + i) for i in range(count)]
    options: dict[str, Any] = {"max_num_seqs": count, "block_size": (8, 16, 1)[count % 3]}
    expected = tokens(plain(folders("qwen3"), **options).generate(prompts, params, use_tqdm=False))
    llm = engine(folders("qwen3"), has_graphs=True, speculative_config=NGRAM, **options)
    plant(llm, PlantedProposer(known(prompts, params, expected), alpha, 320, seed=count))
    assert tokens(llm.generate(prompts, params, use_tqdm=False)) == expected
    stats = llm.engine.speculation
    assert stats.num_rounds > 0 and (alpha > 0 or stats.num_accepted == 0)
    assert alpha < 1 or stats.num_accepted == stats.num_drafted
    assert llm.reset_prefix_cache(), "a block is still held"


@pytest.mark.parametrize("family", ["llama", "window", "qwen3"])
@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunks beside drafts"])
def test_prompt_lookup_gives_the_tokens_of_the_plain_way(
    family: str, budget: int, folders: Folders, fused: None
) -> None:
    prompts, params = [[*prompt, *prompt, *prompt] for prompt in PROMPTS], greedy(20)
    options: dict[str, Any] = {"max_num_batched_tokens": budget}
    off = tokens(plain(folders(family), **options).generate(prompts, params, use_tqdm=False))
    slow = plain(folders(family), speculative_config=NGRAM, **options)
    fast = engine(folders(family), has_graphs=True, speculative_config=NGRAM, **options)
    for llm in (slow, fast):
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == off
    counts = [
        (s.num_rounds, s.num_accepted, s.accepted_by_position)
        for s in (slow.engine.speculation, fast.engine.speculation)
    ]
    assert counts[0] == counts[1] and counts[0][1] > 0


WISHES = [
    SamplingParams(temperature=0.8, seed=3, max_tokens=17, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, max_tokens=18, top_k=20, top_p=0.9, ignore_eos=True),
    SamplingParams(temperature=0.9, min_p=0.01, presence_penalty=0.5, seed=-1, max_tokens=19, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=5, max_tokens=16, min_tokens=9, stop_token_ids=list(range(0, 320, 3))),
    SamplingParams(temperature=0, max_tokens=15, logprobs=3, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.6, seed=6, max_tokens=12, logprobs=2, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(temperature=0.6, seed=7, max_tokens=12, num_speculative_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.6, seed=8, max_tokens=12, speculative_method="off", ignore_eos=True),
]


@pytest.mark.parametrize("budget", [512, 32])
@pytest.mark.parametrize("alpha", [0, 0.6, 1])
def test_seeds_filters_penalties_and_logprobs_are_those_without_drafts(
    alpha: float, budget: int, folders: Folders, fused: None
) -> None:
    prompts = NINE[1:]
    options: dict[str, Any] = {"max_num_batched_tokens": budget, "max_num_seqs": 8}
    off = engine(folders("llama"), has_graphs=True, **options).generate(prompts, WISHES, use_tqdm=False)
    llm = engine(folders("llama"), has_graphs=True, speculative_config=NGRAM, **options)
    plant(llm, PlantedProposer(known(prompts, WISHES, tokens(off)), alpha, 320))
    on = llm.generate(prompts, WISHES, use_tqdm=False)
    assert tokens(on) == tokens(off)
    assert [o.outputs[0].finish_reason for o in on] == [o.outputs[0].finish_reason for o in off]
    for mine, other in zip(on, off, strict=True):
        ours, theirs = mine.outputs[0].logprobs, other.outputs[0].logprobs
        assert (ours is None) == (theirs is None)
        for one, two in zip(ours or (), theirs or (), strict=True):
            assert one.keys() == two.keys()
            assert all(abs(one[token].logprob - two[token].logprob) < 1e-3 for token in one)
    assert [m.prompt_logprobs is None for m in on] == [o.prompt_logprobs is None for o in off]
    stats = llm.engine.speculation
    assert stats.num_rounds > 10
    assert budget == 32 or len(stats.drafted_by_position) > 4  # one of them asked for thirty


def life(llm: LLM) -> list[list[int]]:
    """Prefix hits, preemption, an abort and a fork; each request's tokens at the end."""
    text, first = llm.text_engine, [*range(3, 40)]
    hot = SamplingParams(temperature=0.6, seed=5, max_tokens=24, ignore_eos=True)
    groups = [text.add(text.check([*first, 40 + i]), hot) for i in range(4)]
    groups.append(text.add(text.check(first[:20]), greedy(30)))
    leader, is_split = groups[0].samples[0].request, False
    while not all(group.is_finished for group in groups):
        text.step()
        if leader.num_output >= 7 and not is_split:
            is_split = True
            text.abort(groups.pop(1))
            groups.append(text.fork(groups[0], seed=11))
            groups.append(text.add(text.check(first), greedy(9)))
    assert sum(sample.request.num_preemptions for group in groups for sample in group.samples) > 0
    assert groups[-1].output().num_cached_tokens > 0
    return [list(sample.request.token_ids) for i in (0, 1, 2, 3, 5) for sample in groups[i].samples]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_life_is_the_same_with_graphs_and_without_and_in_fp32_without_drafts(
    mode: str, dtype: str, folders: Folders, fused: None
) -> None:
    options: dict[str, Any] = {"num_blocks": 10, "kv_cache_memory": None, "max_num_batched_tokens": 40, "dtype": dtype}
    options |= {"max_model_len": 80, "preemption_mode": mode} | ({"num_host_blocks": 16} if mode == "swap" else {})
    lookup = NGRAM | {"prompt_lookup_max": 1}
    graphs = engine(folders("llama"), has_graphs=True, speculative_config=lookup, **options)
    found = life(graphs)
    assert graphs.engine.speculation.num_rounds > 5
    assert found == life(engine(folders("llama"), speculative_config=lookup, **options))
    if dtype == "float32":
        assert found == life(engine(folders("llama"), async_scheduling=False, **options))


class Watching:
    """Planted drafts, and a record of what `follow` was shown."""

    needs_hidden = True

    def __init__(self, planted: PlantedProposer) -> None:
        self.planted, self.seen = planted, list[tuple[ForwardBatch, torch.Tensor]]()

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        return self.planted.propose(requests, lengths)

    def follow(self, batch: ForwardBatch, hidden: torch.Tensor) -> None:
        self.seen.append((batch, hidden.clone()))

    def move(self, transfers: list[Transfer]) -> None: ...

    def clear(self, block_ids: list[int]) -> None: ...


def test_proposers_are_shown_what_the_plain_way_shows_them(folders: Folders, fused: None) -> None:
    params, options = [greedy() for _ in PROMPTS], dict[str, Any](max_num_batched_tokens=40)
    expected = tokens(plain(folders("llama"), **options).generate(PROMPTS, params, use_tqdm=False))
    shown = []
    for build in (plain, engine):
        llm = build(folders("llama"), speculative_config=NGRAM, **options)
        watching = Watching(PlantedProposer(known(PROMPTS, params, expected), 0.7, 320))
        assert tokens(plant(llm, watching).generate(PROMPTS, params, use_tqdm=False)) == expected
        shown.append(watching.seen)
    assert any(len(batch.num_tokens) < len(batch.token_ids) for batch, _ in shown[0])
    for (batch, hidden), (other, other_hidden) in zip(*shown, strict=True):
        for name in ("token_ids", "positions", "slots", "query_starts", "num_tokens"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        torch.testing.assert_close(other_hidden, hidden, rtol=2e-4, atol=2e-4)


class Certain(Watching):
    """Says that it drew its drafts, from a distribution that had nothing else."""

    needs_hidden = False

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        drafts = super().propose(requests, lengths)
        return [replace(d, probs=torch.eye(320, dtype=torch.float64)[d.token_ids]) for d in drafts]


def test_drawn_drafts_are_judged_by_the_logits_that_are_kept(folders: Folders, fused: None) -> None:
    """With top_k=1 the rule leaves one token: right drafts stand, wrong ones fall."""
    params = [SamplingParams(temperature=0.9, top_k=1, seed=i, max_tokens=15, ignore_eos=True) for i in range(5)]
    expected = tokens(plain(folders("qwen3")).generate(PROMPTS, params, use_tqdm=False))
    llm = engine(folders("qwen3"), has_graphs=True, speculative_config=NGRAM)
    plant(llm, Certain(PlantedProposer(known(PROMPTS, params, expected), 0.5, 320)))
    assert tokens(llm.generate(PROMPTS, params, use_tqdm=False)) == expected
    assert 0 < llm.engine.speculation.num_accepted < llm.engine.speculation.num_drafted


@pytest.mark.parametrize("family", ["llama", "window"])
def test_logits_of_drafts_are_those_of_the_plain_way(family: str, folders: Folders, interpreted: None) -> None:
    drafts = {"b": Draft([11, 12, 13]), "c": Draft([7])}

    def plan() -> StepPlan:
        a = Request("a", list(range(5, 40)), 35, SamplingParams(), 1, tables=[BlockTable([3, 1, 2])])
        b = Request("b", [9, 8, 4], 2, SamplingParams(), 9, tables=[BlockTable([5])], num_computed=2)
        c = Request("c", list(range(60, 76)), 9, SamplingParams(), 9, tables=[BlockTable([6, 4])], num_computed=15)
        return StepPlan(1, [(b, 1), (a, 20), (c, 1)], [], [], num_drafts={"b": 3, "c": 1})

    found, expected = (
        llm(folders(family), speculative_config=NGRAM).runner.logits(plan(), drafts) for llm in (engine, plain)
    )
    assert found.shape == expected.shape == (6, 320)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32).map(Random))
def test_rows_hold_each_draft_at_its_own_place_of_its_own_request(random: Random) -> None:
    block_size, count = random.choice((1, 3, 16)), random.randint(1, 6)
    limits = StepLimits(count, 64, 60, block_size, max_drafts=5)
    buffers = StepBuffers(limits, "cpu", torch.zeros(limits.max_rows, dtype=torch.int32))
    requests = [some_request(random, i, replace(limits, max_model_len=50)) for i in range(count)]
    is_single = random.random() < 0.5
    drafts = {}
    for request in requests:
        request.num_computed = request.num_tokens - (1 if is_single else random.randint(1, min(9, request.num_tokens)))
        if request.num_missing == 1 and random.random() < 0.7:
            drafts[request.id] = Draft([random.randrange(1000) for _ in range(random.randint(1, 5))])
        request.tables[0].block_ids.extend(random.sample(range(1, 5000), -(-60 // block_size)))
    plan = StepPlan(1, [(request, request.num_missing) for request in requests], [], [])
    guesses = {id_: draft.token_ids for id_, draft in drafts.items()}
    [expected] = build_batches(plan, block_size, "cpu", guesses)
    rows = DraftRows.of(buffers.rows.seat(plan.scheduled), drafts)
    if is_single:
        step = buffers.load_singles(requests, rows.count, rows)
        found = buffers.singles(rows.count)
        for name in ("token_ids", "positions", "slots"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
        assert found.singles.num_tokens.tolist() == [position + 1 for position in expected.positions.tolist()]
        tables = found.singles.block_table[:, : expected.block_table.shape[1]]
        assert torch.equal(tables.long(), expected.block_table[rows.owners])
    else:
        step = buffers.load(plan, rows)
        order = sorted(range(count), key=lambda seat: step.num_tokens[seat] == 1)
        in_order = StepPlan(1, [plan.scheduled[seat] for seat in order], [], [])
        assert_same(
            buffers.ragged(step.shape, max(step.num_tokens)), build_batches(in_order, block_size, "cpu", guesses)[0]
        )
        own = [request for request, guess in zip(requests, rows.guesses, strict=True) for _ in range(1 + len(guess))]
        last = buffers.last_tokens(step).tolist()
        for row, (request, offset) in enumerate(zip(own, rows.offsets.tolist(), strict=True)):
            start = step.starts[requests.index(request)]
            assert last[row] == start + step.num_new[requests.index(request)] - 1 + offset
    assert buffers.num_tokens[: rows.count].tolist() == [
        request.num_tokens + i
        for request, guess in zip(requests, rows.guesses, strict=True)
        for i in range(1 + len(guess))
    ]


def test_drafts_that_do_not_fit_are_cut_the_longest_first() -> None:
    drafts = {name: Draft(list(range(length))) for name, length in (("a", 7), ("b", 2), ("c", 5))}
    assert {name: len(draft.token_ids) for name, draft in shortened(drafts, 10).items()} == {"a": 4, "b": 2, "c": 4}
    assert shortened(drafts, 14) == drafts and shortened(drafts, 2) == {} and shortened({}, 0) == {}
    drawn = Draft([1, 2, 3], torch.rand(3, 8))
    assert drawn.probs is not None
    [cut] = shortened({"a": drawn}, 2).values()
    assert cut.token_ids == [1, 2] and cut.probs is not None and torch.equal(cut.probs, drawn.probs[:2])


@pytest.mark.parametrize("budget", [512, 40])
@pytest.mark.parametrize("method", ["early_exit", "draft_model"])
def test_drafters_with_k_and_v_change_no_token_and_the_target_itself_is_always_right(
    method: str, budget: int, folders: Folders, fused: None
) -> None:
    folder, options = folders("llama"), dict[str, Any](max_num_batched_tokens=budget)
    expected = tokens(plain(folder, **options).generate(PROMPTS, greedy(), use_tqdm=False))
    how: dict[str, Any] = {"num_layers": 1} if method == "early_exit" else {"model": str(folder)}
    config = {"method": method, "num_speculative_tokens": 3, **how}
    llm = engine(folder, has_graphs=True, speculative_config=config, **options)
    assert tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == expected
    stats = llm.engine.speculation
    assert stats.num_drafted > 0 and (method == "early_exit" or stats.num_accepted == stats.num_drafted)


def test_a_batch_with_more_drafts_than_rows_keeps_what_fits(
    folders: Folders, fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minivllm.runner.step_buffers.MOST_ROWS", 7)
    expected = tokens(plain(folders("qwen3")).generate(PROMPTS, greedy(), use_tqdm=False))
    llm = engine(folders("qwen3"), has_graphs=True, speculative_config=NGRAM)
    plant(llm, PlantedProposer(known(PROMPTS, [greedy()] * 5, expected), 1, 320))
    assert tokens(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == expected
    assert llm.runner.fused is not None and llm.runner.fused.decode.sizes[-1] == len(llm.runner.fused.logits) == 7
    assert llm.engine.speculation.num_accepted == llm.engine.speculation.num_drafted > 0


def test_planted_drafts_are_accepted_as_the_closed_form_says() -> None:
    assert expected_tokens(1, 4) == 5 and expected_tokens(0, 4) == 1
    assert expected_tokens(0.8, 4) == pytest.approx(3.3616)  # 1 + .8 + .64 + .512 + .4096
    for alpha in (0.3, 0.8):
        continuation, num_rounds = [7] * 6000, 0
        planted = PlantedProposer({((1, 2), None): continuation}, alpha, 320, seed=1)
        request = Request("x", [1, 2], 2, greedy(), 6000)
        while request.num_output < 5990:
            [draft] = planted.propose([request], [4])
            request.token_ids += verify(draft, Chosen(0, request.num_tokens, continuation[:5]))
            num_rounds += 1
        assert set(request.output_token_ids) == {7}
        assert request.num_output / num_rounds == pytest.approx(expected_tokens(alpha, 4), rel=0.04)
