"""Fused steps: the same tokens as the plain way, with graphs or without, whatever requests want and whoever leaves."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from minivllm import LLM, RequestOutput, SamplingParams
from minivllm.engine.plan import StepPlan
from minivllm.request import BlockTable, Request
from minivllm.runner import model_runner
from minivllm.runner.decode_graphs import DecodeSteps, Graph, batch_sizes
from minivllm.runner.fused_steps import FusedSteps
from minivllm.runner.mixed_graphs import MixedSteps, mixed_shapes
from minivllm.runner.model_runner import fused_where_it_fits
from minivllm.runner.step_buffers import StepBuffers, StepLimits, StepShape
from tests.conftest import SHAPE
from tests.fused_twins import use_twins
from tests.kernel_cases import HAS_GPU

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DEVICE = "cuda" if HAS_GPU else "cpu"
PROMPTS = [list(range(3, 40)), [7], list(range(50, 66)), list(range(100, 117)), list(range(3, 30))]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_attention_heads": 6, "num_key_value_heads": 2}),
}


class Uncaptured:
    """A graph that is not captured: replay runs what would have been recorded."""

    def __init__(self, compute: Callable[[], None]) -> None:
        self.replay = compute


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models with heads of 64, which the kernels have; conftest's are smaller."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            config, model, changes = FAMILIES[family]
            torch.manual_seed(3)  # no near-ties among these prompts
            made[family] = tmp_path_factory.mktemp(family)
            built = model(config(**SHAPE | {"head_dim": 64} | changes))
            for name, parameter in built.named_parameters():
                if name.endswith("bias") or "norm" in name:
                    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
            built.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused way where there is no GPU: the kernels under Triton's interpreter."""
    monkeypatch.setattr(model_runner, "make_fused", fused_where_it_fits)
    monkeypatch.setattr("minivllm.runner.loader.can_prepack", lambda _: False)  # a GPU's weights lie as they are


@pytest.fixture
def fused(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same over the kernels' twins in torch; on a GPU, over the kernels."""
    if not HAS_GPU:
        use_twins(monkeypatch)


def engine(folder: Path, *, has_graphs: bool = False, **options: Any) -> LLM:
    chosen: dict[str, Any] = {"dtype": "float32", "kv_cache_memory": 2**22, "max_num_seqs": 5}
    llm = LLM(str(folder), device=DEVICE, show_progress=False, enforce_eager=not has_graphs, **chosen | options)
    if has_graphs and llm.runner.fused and not HAS_GPU:
        for steps in llm.runner.fused.captured:
            shapes = steps.sizes if isinstance(steps, DecodeSteps) else steps.shapes
            steps.graphs = {shape: Uncaptured(partial(steps.compute, shape)) for shape in shapes}  # type: ignore
    return llm


def steps_of(llm: LLM) -> FusedSteps:
    assert llm.runner.fused is not None
    return llm.runner.fused


def plain(folder: Path, **options: Any) -> LLM:
    """The slow twin: the same weights through Decoder.forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "make_fused", lambda *_: None)
        return engine(folder, **options)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def test_sizes_of_graphs_hold_every_batch_with_little_padding() -> None:
    assert batch_sizes(1) == [1] and batch_sizes(3) == [1, 3] and batch_sizes(8) == [1, 8]
    assert batch_sizes(20) == [1, 8, 16, 20] and batch_sizes(33) == [1, 8, 16, 24, 32, 33]
    sizes = batch_sizes(512)
    assert len(sizes) == 65 and all(next(s for s in sizes if s >= n) <= n + 7 for n in range(1, 513))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_decoder(family: str, folders: Callable[[str], Path], interpreted: None) -> None:
    def requests() -> list[tuple[Request, int]]:
        first = Request(
            "a", list(range(5, 40)), 35, SamplingParams(prompt_logprobs=0), 1, tables=[BlockTable([3, 1, 2])]
        )
        second = Request("b", [9, 8], 2, SamplingParams(), 1, tables=[BlockTable([5])])
        third = Request("c", list(range(60, 90)), 30, SamplingParams(), 1, tables=[BlockTable([6, 4])])
        return [(first, 35), (second, 2), (third, 20)]  # the last is a chunk: it wants no logits

    found, expected = (llm(folders(family)).runner.logits(StepPlan(1, requests(), [], [])) for llm in (engine, plain))
    assert found.shape == expected.shape == (36, 320)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunks beside decodes"])
def test_greedy_tokens_are_those_of_the_plain_way(
    family: str, budget: int, folders: Callable[[str], Path], fused: None
) -> None:
    def answer(llm: LLM) -> list[list[list[int]]]:
        return tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))

    expected = answer(plain(folders(family), max_num_batched_tokens=budget))
    assert answer(engine(folders(family), max_num_batched_tokens=budget, has_graphs=True)) == expected


def test_shapes_of_steps_with_chunks_hold_them_with_little_padding() -> None:
    limits = StepLimits(256, 8192, 4096, 16)
    shapes = mixed_shapes(limits)
    assert len(shapes) == 21 and {shape.chunks for shape in shapes} == {64}
    assert {shape.singles for shape in shapes} == {32, 128, 256} and shapes[-1] == StepShape(64, 2048, 256)
    assert mixed_shapes(StepLimits(3, 65, 50, 16)) == [StepShape(4, 64, 3), StepShape(4, 65, 3)]


def test_a_step_gets_the_least_shape_that_holds_it_and_its_own_where_none_does(
    folders: Callable[[str], Path], fused: None
) -> None:
    model = steps_of(engine(folders("llama"))).model
    buffers = StepBuffers(StepLimits(100, 9000, 64, 16), DEVICE, torch.zeros(100, dtype=torch.int32))
    mixed = MixedSteps(model, buffers)
    for own, padded in (
        ((3, 65, 5), (64, 256, 32)), ((1, 16, 0), (64, 64, 32)), ((64, 2048, 33), (64, 2048, 100)),
        ((65, 130, 0), (65, 130, 0)), ((1, 2049, 3), (1, 2049, 3)), ((0, 0, 9), (0, 0, 9)),
    ):  # fmt: skip
        assert mixed.padded(StepShape(*own)) == padded


def test_kernels_see_no_padding_of_a_step_with_chunks(folders: Callable[[str], Path], interpreted: None) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": 24, "enable_prefix_caching": False}
    llm, twin = engine(folders("llama"), has_graphs=True, **options), plain(folders("llama"), **options)
    mixed, replayed = steps_of(llm).mixed, list[StepShape]()

    def replay(shape: StepShape, graph: Graph) -> None:
        replayed.append(shape)
        graph.replay()

    mixed.graphs = {shape: Uncaptured(partial(replay, shape, graph)) for shape, graph in mixed.graphs.items()}
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    found, wanted = (tokens(each.generate(PROMPTS[:3], params, use_tqdm=False)) for each in (llm, twin))
    assert found == wanted and set(replayed) <= set(mixed.shapes) and len(replayed) > 2


WISHES = [
    SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=7, repetition_penalty=1.4, frequency_penalty=0.3, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=9, min_tokens=4, stop_token_ids=list(range(0, 320, 2))),
    SamplingParams(temperature=0, max_tokens=5, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
]


def test_what_greedy_requests_wish_is_the_same_in_both_ways(folders: Callable[[str], Path], fused: None) -> None:
    found, expected = (
        llm(folders("llama"), max_num_batched_tokens=48).generate(PROMPTS, WISHES, use_tqdm=False)
        for llm in (engine, plain)
    )
    assert tokens(found) == tokens(expected)
    assert [o.outputs[0].finish_reason for o in found] == [o.outputs[0].finish_reason for o in expected]
    ours, theirs = found[0].outputs[0].logprobs, expected[0].outputs[0].logprobs
    assert ours is not None and theirs is not None
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert all(abs(mine[token].logprob - other[token].logprob) < 1e-3 for token in mine)
    mine_judged, other_judged = found[3].prompt_logprobs, expected[3].prompt_logprobs
    assert mine_judged is not None and other_judged is not None and len(mine_judged) == len(other_judged) == 17
    assert all(m is None or o is None or m.keys() == o.keys() for m, o in zip(mine_judged, other_judged, strict=True))


HOT = [
    SamplingParams(temperature=0.8, seed=3, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, max_tokens=8, n=3, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, seed=2**63 - 1, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0.9, min_p=0.01, presence_penalty=0.5, seed=-1, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
]


def test_samples_are_the_same_alone_and_in_any_batch_with_graphs_and_without(
    folders: Callable[[str], Path], fused: None
) -> None:
    folder = folders("qwen3")
    together = tokens(engine(folder, has_graphs=True).generate(PROMPTS, HOT, use_tqdm=False))
    assert tokens(engine(folder, max_num_batched_tokens=24).generate(PROMPTS, HOT, use_tqdm=False)) == together
    alone = engine(folder, has_graphs=True, max_num_seqs=3)
    assert [tokens(alone.generate([p], h, use_tqdm=False))[0] for p, h in zip(PROMPTS, HOT, strict=True)] == together
    assert len({tuple(sample) for sample in together[1]}) > 1


def drive(llm: LLM) -> list[object]:
    """A life with prefix hits, preemption, forks and aborts; everything that came out."""
    engine = llm.text_engine
    first = [*range(3, 40)]
    params = SamplingParams(temperature=0.6, seed=5, max_tokens=24, ignore_eos=True)
    hot = [engine.add(engine.check([*first, 40 + i]), params) for i in range(4)]
    cold = engine.add(engine.check(first[:20]), SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    leader = hot[0].samples[0].request
    while not all(g.is_finished for g in (*hot, cold)):
        engine.step()
        if leader.num_output + leader.num_promised >= 7 and len(hot) == 4:
            engine.abort(hot[1])
            hot.append(engine.fork(hot[0], seed=11))  # waits for the token that is promised
            assert leader.num_output == 7
            hot.append(engine.add(engine.check(first), SamplingParams(temperature=0, n=1, max_tokens=9)))
    preempted = sum(sample.request.num_preemptions for g in (*hot, cold) for sample in g.samples)
    assert preempted > 0 and hot[-1].output().num_cached_tokens > 0
    return [[list(s.request.token_ids) for s in g.samples] for g in (hot[0], *hot[2:], cold)]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_graphs_eager_and_steps_launched_ahead_agree_over_a_whole_life(
    mode: str, folders: Callable[[str], Path], fused: None
) -> None:
    options: dict[str, Any] = {
        "num_blocks": 10,
        "kv_cache_memory": None,
        "max_num_batched_tokens": 40,
        "max_model_len": 80,
    }
    options |= {"preemption_mode": mode} | ({"num_host_blocks": 16} if mode == "swap" else {})
    ways: tuple[dict[str, Any], ...] = ({"has_graphs": True}, {"async_scheduling": False, "has_graphs": True}, {})
    ahead, graphs, eager = (drive(engine(folders("llama"), **way, **options)) for way in ways)
    assert ahead == graphs == eager


def test_a_step_that_fails_leaves_the_next_one_as_it_would_have_been(
    folders: Callable[[str], Path], fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(folders("llama"))
    expected = tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    llm.reset_prefix_cache()
    assert llm.runner.fused is not None
    with monkeypatch.context() as patch:
        patch.setattr(llm.runner.fused.decode, "run", lambda _: 1 / 0)
        with suppress(ZeroDivisionError):
            llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    llm.reset_prefix_cache()
    assert tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == expected


def test_filters_are_applied_while_steps_are_launched_ahead(folders: Callable[[str], Path], fused: None) -> None:
    def hot(**filters: Any) -> SamplingParams:
        return SamplingParams(temperature=5, max_tokens=9, ignore_eos=True, seed=3, **filters)

    llm = engine(folders("qwen3"), has_graphs=True)
    assert llm.runner.fused is not None
    greedy = tokens(llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)))[0]
    free, few = tokens(llm.generate([PROMPTS[0]] * 2, [hot(), hot(top_k=5)], use_tqdm=False))
    assert len({tuple(ids[0]) for ids in (greedy, free, few)}) == 3
    ahead = []
    llm.events.listen(lambda _: ahead.append(llm.engine.plan_in_flight is not None))
    wishes = [hot(top_k=1), hot(top_p=1e-6), hot(min_p=1.0), hot(), hot(top_k=5)]
    found = tokens(llm.generate([PROMPTS[0]] * 5, wishes, use_tqdm=False))
    assert found == [greedy] * 3 + [free, few] and any(ahead)


class Letters:
    """A tokenizer of one letter a token."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 64 for letter in text]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(64 + token) for token in token_ids)


def test_an_end_that_is_seen_one_step_late_leaks_no_token(folders: Callable[[str], Path], fused: None) -> None:
    def answer(is_ahead: bool, **end: Any) -> list[tuple[str, list[int], str | None, int | str | None]]:
        llm = engine(folders("qwen3"), has_graphs=True, max_num_seqs=4, async_scheduling=is_ahead)
        llm.text_engine.tokenizer = llm.tokenizer = Letters()  # type: ignore[assignment]
        params = [SamplingParams(temperature=1.5, seed=3 + i, max_tokens=17, **end) for i in range(len(PROMPTS))]
        samples = [output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        assert llm.reset_prefix_cache(), "a block is still held"
        return [(s.text, list(s.token_ids), s.finish_reason, s.stop_reason) for s in samples]

    answers = []
    for is_ahead in (False, True):
        [(free, ids, *_), *_] = plain_ends = answer(is_ahead, ignore_eos=True)
        by_string = answer(is_ahead, stop=[free[6:8]], ignore_eos=True)
        by_token = answer(is_ahead, stop_token_ids=[ids[5]])
        assert by_string[0][0] == free[: free.index(free[6:8])] and by_string[0][2] == "stop"
        assert by_token[0][1] == ids[: ids.index(ids[5]) + 1] and by_token[0][2:] == ("stop", ids[5])
        answers.append((plain_ends, by_string, by_token))
    assert answers[0] == answers[1]


def test_models_that_do_not_fit_keep_the_plain_way(tmp_path: Path, fused: None) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)  # heads of 16
    assert engine(tmp_path).runner.fused is None
