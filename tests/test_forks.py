"""Forks share every block, copy a partial tail once at the first divergent write, and change nobody's tokens."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm import LLM, AsyncEngine, RequestOutput, SamplingParams
from minivllm.engine.engine import Engine
from minivllm.engine.plan import Move, StepPlan
from minivllm.errors import RequestError
from minivllm.events import BlockCopied, Forked, Preempted, StepRan
from minivllm.lab.fake_runner import FakeRunner, fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants, check_plan
from minivllm.request import Request
from minivllm.text_engine import Generation
from minivllm.trace import Trace
from tests.test_outputs import Letters

Build = Callable[[str], tuple[Path, PreTrainedModel]]


def watched_engine(**options: object) -> tuple[Engine, Trace]:
    """A fake engine that checks each plan, and its events."""
    engine, runner = fake_engine(**({"num_blocks": 41} | options))
    trace = Trace()
    runner.before = lambda plan: check_plan(engine, plan)
    engine.events.listen(trace)
    return engine, trace


def samples(num_samples: int, num_prompt: int, max_tokens: int = 4) -> list[Request]:
    """A leader and the samples that fork off it, as TextEngine.add makes them."""
    made = [fake_request(f"s{i}", range(1, num_prompt + 1), max_tokens) for i in range(num_samples)]
    for seed, request in enumerate(made):
        request.seed = seed
    made[0].pending_forks = made[1:]
    return made


def step(engine: Engine) -> None:
    engine.step()
    assert isinstance(engine.runner, FakeRunner)
    check_invariants(engine, engine.runner)


def drain(engine: Engine) -> None:
    while engine.has_work:
        step(engine)
    check_drained(engine)


def alone(token_ids: list[int], seed: int, max_tokens: int) -> list[int]:
    """All tokens of a request that runs by itself in an engine with room to spare."""
    engine, _ = fake_engine(num_blocks=41, block_size=4, enable_prefix_caching=False)
    request = fake_request("alone", token_ids, max_tokens)
    request.seed = seed
    engine.add(request)
    drain(engine)
    return request.token_ids


# --- what is shared and what is copied

CACHES = [{"prefix_cache": "hash"}, {"prefix_cache": "radix"}, {"enable_prefix_caching": False}]


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("num_samples", [2, 3, 6])
@pytest.mark.parametrize("num_prompt", [3, 4, 5, 8, 10, 12])
def test_samples_copy_the_partial_tail_one_time_less_than_there_are_samples(
    num_prompt: int, num_samples: int, block_size: int, cache: dict[str, object]
) -> None:
    engine, trace = watched_engine(block_size=block_size, **cache)
    together = samples(num_samples, num_prompt)
    engine.add(together[0])
    step(engine)  # the prompt is computed, all samples have begun
    assert all(request.block_ids == together[0].block_ids for request in together) and not trace.of(BlockCopied)
    step(engine)  # the first divergent write
    num_copies = num_samples - 1 if num_prompt % block_size else 0
    assert len(trace.of(BlockCopied)) == num_copies
    num_full = num_prompt // block_size
    assert len({tuple(request.block_ids[:num_full]) for request in together}) == 1
    num_held = len({block_id for request in together for block_id in request.block_ids})
    # A radix tree also shares blocks that came out equal.
    assert num_held == num_full + num_samples or (num_held < num_full + num_samples and "radix" in cache.values())
    drain(engine)
    assert len(trace.of(BlockCopied)) == num_copies  # and never again


def test_last_holder_writes_in_place() -> None:
    engine, trace = watched_engine()
    together = samples(3, num_prompt=6)
    engine.add(together[0])
    step(engine)
    tail = together[0].block_ids[-1]
    step(engine)
    copies = [event for event in trace if isinstance(event, BlockCopied)]
    assert [(event.request_id, event.source_id) for event in copies] == [("s0", tail), ("s1", tail)]
    assert together[2].block_ids[-1] == tail


def test_sole_survivor_copies_nothing() -> None:
    engine, trace = watched_engine()
    together = samples(3, num_prompt=6)
    engine.add(together[0])
    step(engine)
    engine.abort("s0")
    engine.abort("s2")
    drain(engine)
    assert not trace.of(BlockCopied) and together[1].token_ids == alone(list(range(1, 7)), seed=1, max_tokens=4)


@pytest.mark.parametrize("num_before", range(1, 9))
def test_fork_copies_a_tail_once_and_full_blocks_never(num_before: int) -> None:
    engine, trace = watched_engine(block_size=4)
    parent = fake_request("parent", [7, 8, 9], max_tokens=14)
    engine.add(parent)
    for _ in range(num_before):
        step(engine)
    filled = parent.num_computed % 4  # the last token is known and not computed yet: both write it
    engine.fork("parent", "child", seed=5)
    drain(engine)
    assert len(trace.of(BlockCopied)) == (filled > 0)


def test_copies_in_the_plan_are_the_copies_in_the_events() -> None:
    engine, trace = watched_engine(num_blocks=24, block_size=3)
    assert isinstance(engine.runner, FakeRunner)
    moved: list[tuple[int, int]] = []

    def look(plan: StepPlan) -> None:
        moved.extend((t.source_id, t.target_id) for t in plan.transfers if t.move is Move.COPY)

    engine.runner.before = look
    for number in range(3):
        leader = samples(4, num_prompt=7 + number, max_tokens=6)
        for request in leader:
            request.id = f"{number}{request.id}"
        engine.add(leader[0])
    drain(engine)
    assert moved == [(e.source_id, e.block_id) for e in trace if isinstance(e, BlockCopied)] and len(moved) >= 6


def test_contiguous_forks_copy_all_at_once() -> None:
    engine, trace = watched_engine(allocator="oracle", enable_prefix_caching=False)
    together = samples(3, num_prompt=10)
    engine.add(together[0])
    step(engine)
    held = [block_id for request in together for block_id in request.block_ids]
    assert len(set(held)) == len(held) == 9
    drain(engine)
    assert not trace.of(BlockCopied) and [r.token_ids for r in together] == [
        alone(list(range(1, 11)), seed, max_tokens=4) for seed in range(3)
    ]


def test_events_tell_the_family_tree() -> None:
    engine, trace = watched_engine()
    engine.add(fake_request("a", [1, 2, 3], max_tokens=9))
    for parent, child in (("a", "b"), ("b", "c"), ("a", "d")):
        step(engine)
        engine.fork(parent, child, seed=ord(child))
    drain(engine)
    forks = [event for event in trace if isinstance(event, Forked)]
    assert [(event.parent_id, event.request_id, event.num_computed) for event in forks] == [
        ("a", "b", 3), ("b", "c", 4), ("a", "d", 5),
    ]  # fmt: skip


# --- tokens do not change, whenever the fork comes

MOMENTS: dict[str, dict[str, object]] = {
    "one piece": {},
    "prompt in chunks of 2": {"max_num_batched_tokens": 2},
    "radix": {"prefix_cache": "radix", "max_num_batched_tokens": 5},
    "recomputed": {"num_blocks": 11},
    "swapped": {"num_blocks": 11, "preemption_mode": "swap", "num_host_blocks": 30, "enable_prefix_caching": False},
    "one seat": {"max_num_seqs": 1},
    "contiguous": {"allocator": "buddy", "enable_prefix_caching": False},
    "static": {"batching": "static", "max_num_seqs": 3},
}


@pytest.mark.parametrize("num_steps", range(18))
@pytest.mark.parametrize("moment", MOMENTS)
def test_fork_at_every_moment_goes_on_as_a_request_of_its_own_would(moment: str, num_steps: int) -> None:
    engine, _ = watched_engine(**({"block_size": 4, "max_model_len": 40} | MOMENTS[moment]))
    parents = [fake_request(f"p{i}", [i, *range(1, 10)], max_tokens=18) for i in range(3)]
    parents[0].pending_forks = [fake_request("p0.1", [0, *range(1, 10)], max_tokens=18)]
    for parent in parents:
        engine.add(parent)
    for _ in range(num_steps):
        step(engine)
    expected = {}
    for parent_id, parent in list(engine.requests.items()):
        for seed in (0, 77):
            child = engine.fork(parent_id, f"{parent_id}/{seed}", seed)
            expected[child] = alone(list(parent.token_ids), seed, 18 - parent.num_output)
    drain(engine)
    assert expected and [child.token_ids for child in expected] == list(expected.values())


def test_moments_are_what_they_say() -> None:
    """The parents above are in the middle of their prompts, preempted, swapped out and without a seat."""
    seen: set[str] = set()
    for moment, options in MOMENTS.items():
        engine, trace = watched_engine(**({"block_size": 4, "max_model_len": 40} | options))
        for number in range(3):
            engine.add(fake_request(f"p{number}", [number, *range(1, 10)], max_tokens=18))
        for _ in range(21):
            step(engine)
            for request in engine.requests.values():
                if 0 < request.num_computed < request.num_prompt:
                    seen.add(f"{moment}: mid-prefill")
                if request.host_ids:
                    seen.add(f"{moment}: on the host")
                if not request.block_ids:
                    seen.add(f"{moment}: waits")
        if trace.of(Preempted):
            seen.add(f"{moment}: preempted")
    assert seen >= {
        "prompt in chunks of 2: mid-prefill", "recomputed: preempted", "swapped: on the host", "one seat: waits",
    }  # fmt: skip


@pytest.mark.parametrize("num_steps", range(6))
def test_samples_outlive_a_leader_that_leaves_before_they_begin(num_steps: int) -> None:
    engine, _ = watched_engine(max_num_batched_tokens=3)
    together = samples(3, num_prompt=10)
    engine.add(together[0])
    for _ in range(num_steps):
        step(engine)
    engine.abort("s0")
    drain(engine)
    assert [r.token_ids for r in together[1:]] == [alone(list(range(1, 11)), seed, 4) for seed in (1, 2)]


def test_pending_sample_may_leave_or_be_forked_before_it_begins() -> None:
    engine, _ = watched_engine(max_num_batched_tokens=3)
    together = samples(4, num_prompt=10)
    engine.add(together[0])
    step(engine)
    child = engine.fork("s2", "child", seed=9)
    engine.abort("s1")
    drain(engine)
    found = [together[0], together[2], together[3], child]
    assert [r.token_ids for r in found] == [alone(list(range(1, 11)), seed, 4) for seed in (0, 2, 3, 9)]
    assert together[1].finish_reason == "abort" and together[1].num_output == 0


def test_full_house_makes_forks_wait_for_a_seat() -> None:
    engine, trace = watched_engine(max_num_seqs=2)
    together = samples(5, num_prompt=6)
    engine.add(together[0])
    step(engine)
    assert len(engine.scheduler.running) == 2 and len(engine.scheduler.waiting) == 3
    drain(engine)
    assert [r.token_ids for r in together] == [alone(list(range(1, 7)), seed, 4) for seed in range(5)]
    assert [event.num_computed for event in trace if isinstance(event, Forked)] == [6, 0, 0, 0]


@pytest.mark.parametrize(("parent", "child"), [("nobody", "b"), ("a", "a")])
def test_impossible_forks_get_one_line_and_change_nothing(parent: str, child: str) -> None:
    engine, _ = watched_engine()
    engine.add(fake_request("a", [1, 2, 3]))
    step(engine)
    before = engine.state_hash()
    with pytest.raises(RequestError, match=r"^fork: [^\n]+$"):
        engine.fork(parent, child)
    assert engine.state_hash() == before and list(engine.requests) == ["a"]


# --- a real model

HOT = SamplingParams(temperature=1.2, seed=40, max_tokens=14, logprobs=2)
PROMPT = [(7 * i + 3) % 320 for i in range(10)]


def model_engine(folder: Path, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 200, "block_size": 4, "max_model_len": 64}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


@pytest.fixture
def llm(reference_model: Build) -> Iterator[LLM]:
    """A small engine, with a tokenizer that gives each token some letters; every test must leave it clean."""
    llm = model_engine(reference_model("llama-gqa")[0])
    llm.tokenizer = llm.text_engine.tokenizer = Syllables()
    yield llm
    check_drained(llm.engine)
    assert not llm.text_engine._generations


class Syllables(Letters):
    """Token i is the letter i mod 26 after a space, in a text of its own."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(f" {chr(97 + token_id % 26)}{token_id}" for token_id in token_ids)


def tokens(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


OPTIONS: dict[str, dict[str, object]] = {
    "calm": {},
    "chunks of 3": {"max_num_batched_tokens": 3},
    "tiny pool": {"num_blocks": 17},
    "tiny pool, swap": {"num_blocks": 17, "preemption_mode": "swap", "num_host_blocks": 60},
    "two seats": {"max_num_seqs": 2},
    "radix, blocks of 3": {"prefix_cache": "radix", "block_size": 3},
    "contiguous": {"allocator": "contiguous", "enable_prefix_caching": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_n_samples_are_n_requests_with_the_seeds_that_follow(reference_model: Build, name: str) -> None:
    folder, _ = reference_model("llama-gqa")
    params = SamplingParams(n=5, temperature=1.2, seed=40, max_tokens=20)
    prompts = [PROMPT, PROMPT[:8], PROMPT[:3]]
    calm = model_engine(folder, enable_prefix_caching=False, max_num_seqs=1)
    expected = [
        [calm.generate(p, replace(params, n=1, seed=40 + i), use_tqdm=False)[0].outputs[0].token_ids for i in range(5)]
        for p in prompts
    ]
    llm = model_engine(folder, **OPTIONS[name])
    with llm.record() as trace:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [tokens(output) for output in outputs] == expected
    assert len(trace.of(Forked)) == 12 and bool(trace.of(Preempted)) == ("tiny" in name)
    assert bool(trace.of(BlockCopied)) == (name not in ("contiguous", "two seats"))  # no seat is left for a sample
    check_drained(llm.engine)


def test_prompt_of_n_samples_is_computed_once(llm: LLM) -> None:
    with llm.record() as trace:
        llm.generate(PROMPT, replace(HOT, n=8, max_tokens=1), use_tqdm=False)
    assert [[num_new for _, num_new, _ in event.scheduled] for event in trace if isinstance(event, StepRan)] == [[10]]


def begun(llm: LLM, params: SamplingParams, num_tokens: int) -> Generation:
    """A request that has so many tokens."""
    generation = llm.text_engine.add(llm.text_engine.check(PROMPT), params)
    while generation.samples[0].request.num_output < num_tokens:
        llm.text_engine.step()
    return generation


def finished(llm: LLM, generation: Generation) -> RequestOutput:
    while not generation.is_finished:
        llm.text_engine.step()
    return llm.text_engine.result(generation)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 6, 13])
def test_fork_with_another_seed_goes_its_own_way_from_there(llm: LLM, num_tokens: int) -> None:
    [whole] = llm.generate(PROMPT, HOT, use_tqdm=False)
    common = whole.outputs[0].token_ids[:num_tokens]
    own = replace(HOT, seed=99, max_tokens=14 - num_tokens)
    [rest] = llm.generate([*PROMPT, *common], own, use_tqdm=False)
    parent = begun(llm, HOT, num_tokens)
    llm.text_engine.result(parent)  # a reader may have asked for the text so far, or not
    child = finished(llm, llm.text_engine.fork(parent, seed=99)).outputs[0]
    assert child.token_ids == common + rest.outputs[0].token_ids
    assert child.text == Syllables().decode(child.token_ids)
    assert child.logprobs is not None and whole.outputs[0].logprobs is not None and rest.outputs[0].logprobs is not None
    joined = whole.outputs[0].logprobs[:num_tokens] + rest.outputs[0].logprobs
    assert [list(judged) for judged in child.logprobs] == [list(judged) for judged in joined]
    assert child.cumulative_logprob == pytest.approx(sum(next(iter(j.values())).logprob for j in joined), abs=1e-4)
    assert finished(llm, parent).outputs[0] == whole.outputs[0]  # the parent did not notice


def test_fork_with_the_same_seed_and_greedy_forks_never_part(llm: LLM) -> None:
    for params in (HOT, replace(HOT, temperature=0)):
        parent = begun(llm, params, 5)
        child = llm.text_engine.fork(parent, seed=HOT.seed)
        assert finished(llm, child).outputs == finished(llm, parent).outputs


def test_forks_without_a_seed_get_one_each(llm: LLM) -> None:
    parent = begun(llm, replace(HOT, temperature=3.0), 4)
    children = [llm.text_engine.fork(parent) for _ in range(4)]
    found = [tuple(finished(llm, child).outputs[0].token_ids) for child in [parent, *children]]
    assert len({row[:4] for row in found}) == 1 and len(set(found)) == 5


def test_fork_of_a_fork_of_one_of_n_samples(llm: LLM) -> None:
    params = replace(HOT, n=3, prompt_logprobs=1)
    [whole] = llm.generate(PROMPT, params, use_tqdm=False)
    parent = begun(llm, params, 4)
    child = llm.text_engine.fork(parent, index=2, seed=42)  # the seed of sample 2
    llm.text_engine.step()
    grandchild = llm.text_engine.fork(child, seed=42, request_id="mine")
    output = finished(llm, grandchild)
    assert output.request_id == "mine" and output.outputs[0] == replace(whole.outputs[2], index=0)
    assert output.prompt_logprobs is not None and whole.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(whole.prompt_logprobs) == 10
    assert finished(llm, child).outputs == output.outputs and finished(llm, parent).outputs == whole.outputs


@pytest.mark.parametrize("min_tokens", [0, 5])
def test_stop_string_may_begin_before_the_fork(llm: LLM, min_tokens: int) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=14)
    text = llm.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].text
    pieces = text.split()
    stops = [f"{pieces[0][1:]} ", f"{pieces[6][1:]} {pieces[7][:2]}"]  # the first is in what min_tokens spares
    params = replace(greedy, stop=stops[1:] if min_tokens == 0 else stops, min_tokens=min_tokens)
    [whole] = llm.generate(PROMPT, params, use_tqdm=False)
    assert whole.outputs[0].finish_reason == "stop" and len(whole.outputs[0].token_ids) == 8
    parent = begun(llm, params, 7)
    child = llm.text_engine.fork(parent)
    assert finished(llm, child).outputs == whole.outputs == finished(llm, parent).outputs


def test_what_cannot_be_forked_gets_one_line(llm: LLM) -> None:
    generation = begun(llm, HOT, 3)
    with pytest.raises(RequestError, match=r"^fork: sample 1 is not one of the 1 there are$"):
        llm.text_engine.fork(generation, index=1)
    with pytest.raises(RequestError, match=r"^request 0: its id is in use[^\n]+$"):
        llm.text_engine.fork(generation, request_id="0")
    finished(llm, generation)
    with pytest.raises(RequestError, match=r"^fork: no request '0' is here \(any more\)[^\n]+$"):
        llm.text_engine.fork(generation)
    with pytest.raises(RequestError, match=r"^fork: no request '0' runs here[^\n]+$"):
        llm.fork("0")


def test_stream_is_forked_where_it_stands(llm: LLM) -> None:
    [whole] = llm.generate(PROMPT, HOT, use_tqdm=False)
    branch: Iterator[RequestOutput] | None = None
    for output in llm.stream(PROMPT, HOT):
        if len(output.outputs[0].token_ids) == 6:
            branch = llm.fork(output.request_id, seed=HOT.seed)
        last = output
    assert last.outputs == whole.outputs and branch is not None
    grown = [len(output.outputs[0].token_ids) for output in branch]
    assert grown[0] == 6 and grown[-1] == 14
    assert [event for event in (llm.engine.requests, llm.text_engine._generations) if event] == []


def test_dropped_branch_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream(PROMPT, HOT)
    branch = llm.fork(next(stream).request_id)
    next(stream)
    del branch
    assert len(llm.engine.requests) == 1
    del stream
    assert not llm.engine.has_work


def test_background_stream_is_forked(llm: LLM) -> None:
    params = replace(HOT, max_tokens=50, temperature=2.0)
    with AsyncEngine(llm) as background:
        stream = background.add(PROMPT, params)
        next(outputs := iter(stream))
        children = [stream.fork(seed=seed) for seed in (40, 41)] + [stream.fork(request_id="third")]
        same, other, third = (child.result(timeout_s=30).outputs[0] for child in children)
        *_, last = outputs
    assert (
        children[2].request_id == "third" and len({*map(str, (same.token_ids, other.token_ids, third.token_ids))}) == 3
    )
    assert same == last.outputs[0] and same.text == Syllables().decode(same.token_ids)
    with pytest.raises(RequestError, match="this AsyncEngine is closed"):
        stream.fork()


def test_finished_background_stream_cannot_be_forked(llm: LLM) -> None:
    with AsyncEngine(llm) as background:
        stream = background.add(PROMPT, HOT)
        stream.result(timeout_s=30)
        with pytest.raises(RequestError, match=r"^fork: no request '0' is here \(any more\)"):
            stream.fork()
