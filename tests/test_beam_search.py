"""Beam search is transformers' beam search, token for token, under every pressure; and what its beams share."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, AsyncEngine, BeamSearchOutput, BeamSearchParams, SamplingParams
from minivllm.beam_search import best_candidates
from minivllm.engine.plan import StepPlan, StepResult, TokenLogprobs
from minivllm.errors import ConfigError, RequestError
from minivllm.events import Added, BlockCopied, BlocksDropped, Event, Forked, Preempted, StepRan
from minivllm.lab.invariants import check_drained, check_invariants, check_plan
from tests.test_outputs import Letters

Build = Callable[[str], tuple[Path, PreTrainedModel]]
Found = list[tuple[list[int], float | None]]  # tokens with the prompt and EOS, score
PROMPTS = [[5, 9, 77, 200, 3, 1], [11, 11, 42], [(7 * i + 3) % 320 for i in range(17)]]
PENALTIES, STOPS = (1.0, 0.0, 2.0, -0.7), (False, True, "never")


def with_eos(folder: Path, eos: Sequence[int]) -> Path:
    """The same model with other EOS tokens, beside the first."""
    if not eos:
        return folder
    twin = folder.with_name(f"{folder.name}-eos-{'-'.join(map(str, eos))}")
    if not twin.exists():
        shutil.copytree(folder, twin)
        for name in ("config.json", "generation_config.json"):
            config = json.loads((twin / name).read_text())
            (twin / name).write_text(json.dumps(config | {"eos_token_id": list(eos)}))
    return twin


def likely_tokens(model: PreTrainedModel, num_tokens: int) -> list[int]:
    """What the beams of PROMPTS choose most often when nothing ends them: as EOS tokens they end many beams."""
    chosen: Counter[int] = Counter()
    for prompt in PROMPTS:
        for tokens, _ in reference(model, prompt, BeamSearchParams(4, 10), ()):
            chosen.update(tokens[len(prompt) + 2 :])
    return [token for token, _ in chosen.most_common(num_tokens)]


KNOWN: dict[tuple[object, ...], Found] = {}


def reference(model: PreTrainedModel, prompt: list[int], params: BeamSearchParams, eos: Sequence[int]) -> Found:
    """What transformers finds for one prompt."""
    key = (id(model), tuple(prompt), params, tuple(eos))
    if key not in KNOWN:
        width = params.beam_width
        beams = {"length_penalty": params.length_penalty, "early_stopping": params.early_stopping} if width > 1 else {}
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            num_beams=width, num_return_sequences=width, max_new_tokens=params.max_tokens, pad_token_id=0,
            eos_token_id=list(eos) or None, return_dict_in_generate=True, output_scores=True, **beams,
        )  # fmt: skip
        if width == 1:
            KNOWN[key] = [(out.sequences[0].tolist(), None)]
        else:
            num_new = (out.beam_indices >= 0).sum(dim=1).tolist()  # what follows is padding
            rows = zip(out.sequences.tolist(), num_new, out.sequences_scores.tolist(), strict=True)
            KNOWN[key] = [(row[: len(prompt) + n], score) for row, n, score in rows]
    return KNOWN[key]


def assert_equal(outputs: list[BeamSearchOutput], expected: list[Found]) -> None:
    found = [[sequence.tokens for sequence in output.sequences] for output in outputs]
    assert found == [[tokens for tokens, _ in sequences] for sequences in expected]
    for output, sequences in zip(outputs, expected, strict=True):
        for sequence, (_, score) in zip(output.sequences, sequences, strict=True):
            assert score is None or sequence.score == pytest.approx(score, rel=1e-4, abs=1e-4)


def engine(folder: Path, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 400, "block_size": 4, "max_model_len": 64}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


def watched(llm: LLM) -> list[Event]:
    """Check the invariants on every plan and after every step; the events, as they come."""
    events: list[Event] = []
    run = llm.runner.run

    def checked_run(plan: StepPlan) -> StepResult:
        check_plan(llm.engine, plan)
        return run(plan)

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepRan):
            check_invariants(llm.engine)

    llm.runner.run = checked_run  # type: ignore[method-assign]
    llm.events.listen(listen)
    return events


FAMILIES = ["llama-gqa", "llama-mqa-bias", "llama-9to3", "qwen2-window", "qwen3", "mistral"]


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(reference_model: Build, family: str, width: int) -> None:
    folder, model = reference_model(family)
    likely = likely_tokens(model, 4)
    num_ended = 0
    for number, num_eos in enumerate((width % 2, 3)):
        eos = likely[:num_eos]
        llm = engine(with_eos(folder, eos), block_size=3 + number)
        params = BeamSearchParams(
            width, 8 + 4 * number, length_penalty=PENALTIES[(number + width) % 4], include_stop_str_in_output=True,
            early_stopping=STOPS[(number + 2 * width) % 3],
        )  # fmt: skip
        prompts = PROMPTS[number : number + 2]
        outputs = llm.beam_search(prompts, params)
        assert_equal(outputs, [reference(model, prompt, params, eos) for prompt in prompts])
        num_ended += sum(s.finish_reason == "stop" for output in outputs for s in output.sequences)
        check_drained(llm.engine)
    assert num_ended > 0 or width == 1  # the EOS tokens did occur


@pytest.mark.parametrize("early_stopping", STOPS)
@pytest.mark.parametrize("length_penalty", [*PENALTIES, 7.0])
def test_every_rule_of_stopping(reference_model: Build, early_stopping: bool | str, length_penalty: float) -> None:
    folder, model = reference_model("qwen3")
    eos = likely_tokens(model, 3)
    llm = engine(with_eos(folder, eos))
    params = BeamSearchParams(
        5, 30, length_penalty=length_penalty, early_stopping=early_stopping, include_stop_str_in_output=True
    )
    assert_equal(llm.beam_search(PROMPTS, params), [reference(model, prompt, params, eos) for prompt in PROMPTS])


def test_rules_of_stopping_differ(reference_model: Build) -> None:
    """Else the tests above would compare one rule with itself."""
    _, model = reference_model("qwen3")
    eos = likely_tokens(model, 3)
    found = [
        str([reference(model, prompt, BeamSearchParams(5, 30, early_stopping=stop), eos) for prompt in PROMPTS])
        for stop in STOPS
    ]
    assert len(set(found)) == 3


SMALL: dict[str, object] = {
    "num_blocks": 1 + 16,
    "max_model_len": 64,
}  # room for one sequence of max_model_len and no more
PRESSURES: dict[str, dict[str, object]] = {
    "block size 1": {"block_size": 1},
    "block size 5": {"block_size": 5},
    "block size 256": {"block_size": 256, "num_blocks": 30},
    "no cache": {"enable_prefix_caching": False},
    "radix": {"prefix_cache": "radix"},
    "tiny pool": SMALL,
    "tiny pool, no cache": SMALL | {"enable_prefix_caching": False},
    "tiny pool, radix": SMALL | {"prefix_cache": "radix", "eviction_policy": "lfu"},
    "tiny pool, swap": SMALL | {"preemption_mode": "swap", "num_host_blocks": 40},
    "tiny pool, swap, radix": SMALL | {"preemption_mode": "swap", "num_host_blocks": 9, "prefix_cache": "radix"},
    "small pool, blocks of 3": {"num_blocks": 23, "block_size": 3},
    "few seats": {"max_num_seqs": 3},
    "one seat": {"max_num_seqs": 1},
    "one seat, swap": {"max_num_seqs": 1, "preemption_mode": "swap", "num_host_blocks": 60},
    "small chunks": {"max_num_batched_tokens": 3},
    "contiguous": {"allocator": "contiguous", "enable_prefix_caching": False, "num_blocks": 40},
    "oracle": {"allocator": "oracle", "enable_prefix_caching": False, "num_blocks": 20},
    "buddy": {"allocator": "buddy", "enable_prefix_caching": False, "num_blocks": 40},
    "power of two": {"allocator": "power_of_two", "enable_prefix_caching": False, "num_blocks": 40},
    "static": {"batching": "static", "max_num_seqs": 5},
    "request level": {"batching": "request_level", "max_num_seqs": 5},
    "prefill first": {"batching": "prefill_first", "num_blocks": 40},
    "decode first": {"batching": "decode_first", "num_blocks": 40},
    "dfs": {"scheduling_policy": "dfs", "prefix_cache": "radix", "num_blocks": 40},
    "shortest first": {"scheduling_policy": "shortest_first", "num_blocks": 40},
}
HOLDS = {"tiny pool, no cache", "one seat", "one seat, swap", "few seats", "contiguous", "oracle", "buddy", "static"}


@pytest.mark.parametrize("pressure", PRESSURES)
def test_equal_under_pressure(reference_model: Build, pressure: str) -> None:
    folder, model = reference_model("llama-gqa")
    eos = likely_tokens(model, 2)
    params = BeamSearchParams(4, 18, include_stop_str_in_output=True)
    llm = engine(with_eos(folder, eos), **PRESSURES[pressure])
    events = watched(llm)
    outputs = llm.beam_search(PROMPTS, params, concurrency_limit=3)
    assert_equal(outputs, [reference(model, prompt, params, eos) for prompt in PROMPTS])
    check_drained(llm.engine)
    reasons = {event.reason for event in events if isinstance(event, Preempted)}
    assert "held" in reasons or pressure not in HOLDS
    assert {event.how for event in events if isinstance(event, Preempted)} >= (
        {"swap"} if "swap" in pressure else set()
    )


@pytest.mark.parametrize("family", ["mistral", "qwen2-window"])
@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_equal_with_sliding_windows(reference_model: Build, family: str, block_size: int) -> None:
    folder, model = reference_model(family)
    params = BeamSearchParams(5, 30, length_penalty=0.5, early_stopping="never")
    num_slots = 80 if family == "mistral" else 200  # three groups of layers, each with a table
    llm = engine(folder, block_size=block_size, num_blocks=1 + num_slots // block_size)
    events = watched(llm)
    assert_equal(llm.beam_search(PROMPTS, params), [reference(model, prompt, params, ()) for prompt in PROMPTS])
    assert any(isinstance(event, BlocksDropped) for event in events)
    check_drained(llm.engine)


def test_beams_share_full_blocks_and_copy_only_tails(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0], block_size=4)
    peak, filled = 0, []

    def listen(event: Event) -> None:
        nonlocal peak
        if isinstance(event, BlockCopied):
            filled.append(llm.engine.requests[event.request_id].num_computed % 4)
        if isinstance(event, StepRan):
            peak = max(peak, llm.engine.kv.pool.num_usable - event.num_free)

    llm.events.listen(listen)
    llm.beam_search([(3 * i) % 320 for i in range(41)], BeamSearchParams(8, 8))
    assert filled and 0 not in filled  # a copied block was always partly filled
    assert peak <= 10 + 8 * 3  # ten full blocks of the prompt once; each beam its tail


def test_every_fork_copies_at_most_one_block(reference_model: Build) -> None:
    llm = engine(reference_model("qwen3")[0])
    events = watched(llm)
    llm.beam_search(PROMPTS, BeamSearchParams(6, 12))
    num_forks = sum(isinstance(event, Forked) for event in events)
    assert 0 < sum(isinstance(event, BlockCopied) for event in events) <= num_forks


def test_prompt_is_computed_once_for_all_beams(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0], enable_prefix_caching=False)
    events = watched(llm)
    llm.beam_search([(3 * i) % 320 for i in range(40)], BeamSearchParams(4, 5, ignore_eos=True))
    computed = sum(num_new for event in events if isinstance(event, StepRan) for _, num_new, _ in event.scheduled)
    assert computed == 40 + 4 * 4


@pytest.mark.parametrize(("limit", "seats", "expected"), [(None, 256, 5), (None, 8, 2), (None, 3, 1), (3, 256, 3)])
def test_as_many_searches_at_a_time_as_have_seats(
    reference_model: Build, limit: int | None, seats: int, expected: int
) -> None:
    llm = engine(reference_model("llama-gqa")[0], max_num_seqs=seats)
    most = 0

    def listen(event: Event) -> None:
        nonlocal most
        if isinstance(event, Added | StepRan):
            most = max(most, len({id_.split(".")[0] for id_ in llm.engine.requests}))

    llm.events.listen(listen)
    outputs = llm.beam_search([[i, 2 * i + 1] for i in range(5)], BeamSearchParams(4, 6), concurrency_limit=limit)
    assert most == expected and [output.sequences[0].tokens[0] for output in outputs] == list(range(5))


def test_best_sequence_is_at_least_as_likely_as_the_greedy_one_and_sums_its_logprobs(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0])
    [greedy] = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8, logprobs=0), use_tqdm=False)
    [found] = llm.beam_search(PROMPTS[0], BeamSearchParams(8, 8))
    best = found.sequences[0]
    assert greedy.outputs[0].cumulative_logprob is not None
    assert best.cum_logprob >= greedy.outputs[0].cumulative_logprob
    new_tokens = best.tokens[len(PROMPTS[0]) :]
    chosen = [judged[token].logprob for judged, token in zip(best.logprobs, new_tokens, strict=True)]
    assert best.cum_logprob == pytest.approx(sum(chosen)) == pytest.approx(best.score * 8)
    assert [sequence.score for sequence in found.sequences] == sorted((s.score for s in found.sequences), reverse=True)


def test_eos_is_told_and_left_out_unless_it_is_wanted(reference_model: Build) -> None:
    folder, model = reference_model("llama-gqa")
    eos = likely_tokens(model, 2)
    llm = engine(with_eos(folder, eos))
    bare, whole = (
        llm.beam_search(PROMPTS, BeamSearchParams(3, 12, include_stop_str_in_output=wanted)) for wanted in (False, True)
    )
    pairs = [(a, b) for x, y in zip(bare, whole, strict=True) for a, b in zip(x.sequences, y.sequences, strict=True)]
    assert {a.finish_reason for a, _ in pairs} == {"stop", "length"}
    for a, b in pairs:
        assert a.stop_reason == (b.tokens[-1] if b.finish_reason == "stop" else None)
        assert b.tokens == a.tokens + ([a.stop_reason] if a.stop_reason is not None else [])
        assert len(a.logprobs) == len(b.logprobs) and next(iter(b.logprobs[-1])) == b.tokens[-1]


def test_ignored_eos_is_a_token_like_any_other(reference_model: Build) -> None:
    folder, model = reference_model("llama-gqa")
    eos = likely_tokens(model, 2)
    params = BeamSearchParams(3, 10, ignore_eos=True)
    outputs = engine(with_eos(folder, eos)).beam_search(PROMPTS, params)
    assert_equal(outputs, [reference(model, prompt, params, ()) for prompt in PROMPTS])


def test_text_is_that_of_prompt_and_tokens(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0])
    llm.text_engine.tokenizer = Numbers()
    [output] = llm.beam_search([[1, 2, 3]], BeamSearchParams(2, 3))
    for sequence in output.sequences:
        assert sequence.text == " ".join(map(str, sequence.tokens))
        assert all(logprob.decoded_token == str(t) for judged in sequence.logprobs for t, logprob in judged.items())


class Numbers(Letters):
    """Every token is written as its number."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, token_ids))


def test_prompts_may_be_salted_and_room_ends_the_search(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0])
    [output] = llm.beam_search([{"prompt_token_ids": [7] * 60, "cache_salt": "a"}], BeamSearchParams(3, 100))
    assert [len(sequence.tokens) for sequence in output.sequences] == [64] * 3


BAD_PARAMS: dict[str, dict[str, object]] = {
    "beam_width must be at least 1": {"beam_width": 0},
    "beam_width must be an integer": {"beam_width": 2.0},
    "max_tokens must be at least 1": {"max_tokens": None},
    "max_tokens must be an integer": {"max_tokens": True},
    "ignore_eos must be True or False": {"ignore_eos": 1},
    "early_stopping must be False, True or 'never'": {"early_stopping": "always"},
    "early_stopping must be": {"early_stopping": 1},
    "beam search does not sample: temperature must be 0": {"temperature": 0.5},
    "length_penalty must be a number": {"length_penalty": "long"},
    "length_penalty must be a number from": {"length_penalty": float("nan")},
}


@pytest.mark.parametrize("message", BAD_PARAMS)
def test_bad_params_get_one_line(message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{message}[^\n]+$"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **BAD_PARAMS[message]})  # type: ignore[arg-type]


def test_what_cannot_be_searched_gets_one_line_before_anything_runs(reference_model: Build) -> None:
    llm = engine(reference_model("llama-gqa")[0])
    params, events = BeamSearchParams(2, 4), watched(llm)
    with pytest.raises(RequestError, match=r"^prompts\[1\]: the prompt has 64 tokens[^\n]+$"):
        llm.beam_search([[1], [2] * 64], params)
    with pytest.raises(RequestError, match=r"^prompts\[1\]: the prompt is empty[^\n]+$"):
        llm.beam_search([[1], []], params)
    with pytest.raises(RequestError, match=r"^params must be BeamSearchParams, not SamplingParams$"):
        llm.beam_search([1], SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^beam_width 161 looks at 322 tokens in each step[^\n]+$"):
        llm.beam_search([1], replace(params, beam_width=161))
    with pytest.raises(ConfigError, match=r"^concurrency_limit must be at least 1, not 0$"):
        llm.beam_search([1], params, concurrency_limit=0)
    assert events == [] and llm.beam_search([], params) == []


# --- Ctrl-C, failing devices, others at work


@pytest.fixture
def llm(reference_model: Build) -> Iterator[LLM]:
    """A small engine that every test must leave without a beam."""
    llm = engine(reference_model("llama-gqa")[0])
    yield llm
    check_drained(llm.engine)
    assert not llm.text_engine.steerers


def on_step(llm: LLM, step: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    run, num_runs = llm.runner.run, 0

    def acting_run(plan: StepPlan) -> StepResult:
        nonlocal num_runs
        num_runs += 1
        if num_runs == step:
            act()
        return run(plan)

    monkeypatch.setattr(llm.runner, "run", acting_run)


@pytest.mark.parametrize("num_times", [1, 2])  # the second one does not wait for the end of the step
@pytest.mark.parametrize("step", [1, 2, 7])
def test_ctrl_c_leaves_no_beam(llm: LLM, step: int, num_times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def press() -> None:
        for _ in range(num_times):
            signal.raise_signal(signal.SIGINT)

    on_step(llm, step, press, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search(PROMPTS, BeamSearchParams(4, 20))


@pytest.mark.parametrize("step", [1, 5])
def test_failing_runner_ends_the_search_with_its_error(llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("out of device memory")

    on_step(llm, step, fail, monkeypatch)
    with pytest.raises(RuntimeError, match="out of device memory"):
        llm.beam_search(PROMPTS, BeamSearchParams(4, 20))


def test_search_and_streams_share_the_steps(llm: LLM) -> None:
    params = BeamSearchParams(4, 12)
    expected = llm.beam_search(PROMPTS, params)
    alone = llm.generate([9, 9, 2], SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    with AsyncEngine(llm) as background:
        stream = background.add([9, 9, 2], SamplingParams(temperature=0, max_tokens=40))
        found = llm.beam_search(PROMPTS, params)
        assert stream.result(timeout_s=30).outputs[0].token_ids == alone[0].outputs[0].token_ids
    assert [[s.tokens for s in o.sequences] for o in found] == [[s.tokens for s in o.sequences] for o in expected]


def test_ids_that_users_took_are_left_to_them(llm: LLM) -> None:
    prompt, params = llm.text_engine.check([1]), SamplingParams(max_tokens=60)
    taken = ("4.0", "5.0", "6.0", "6.1")  # what the next searches would call their first beams
    mine = [llm.text_engine.add(prompt, params, request_id=id_) for id_ in taken]
    found = llm.beam_search(PROMPTS, BeamSearchParams(4, 5))
    assert [generation.is_finished for generation in mine] == [False] * 4 and len(found) == 3
    for generation in mine:
        llm.text_engine.abort(generation)


def test_progress_bar_counts_prompts(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.beam_search(PROMPTS, BeamSearchParams(2, 3), use_tqdm=True)
    assert "Beam search: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown


def test_candidates_come_best_first_from_all_beams() -> None:
    cat = (-0.9, TokenLogprobs(0, 0.0, 1, ((10, -0.3), (11, -0.6), (12, -2.1))))
    dog = (-1.1, TokenLogprobs(0, 0.0, 1, ((20, -0.5), (21, -1.8))))
    found = best_candidates([cat, dog], num_kept=3)
    assert [(c.beam, c.token.token_id, c.token.rank) for c in found] == [(0, 10, 1), (0, 11, 2), (1, 20, 1)]
    assert [c.cum_logprob for c in found] == pytest.approx([-1.2, -1.5, -1.6])
