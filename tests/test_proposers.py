"""Drafters with caches of their own: exact under every pressure, and never a change of the tokens."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.draft_events import DraftJudged
from minivllm.errors import MiniVLLMError, RequestError
from minivllm.events import Preempted, PrefixHit, SwappedIn
from minivllm.request import Request
from minivllm.runner.proposers import first_other_token, random_head
from minivllm.speculative.eagle import EagleProposer
from minivllm.speculative.eagle_model import EagleHead, save_draft, small_model
from minivllm.speculative.early_exit import EarlyExitProposer
from minivllm.speculative.ngram import lookup
from minivllm.speculative.proposer import Draft
from minivllm.trace import Trace

Build = Callable[[str], tuple[Path, PreTrainedModel]]
SHARED = [(11 * i + 5) % 320 for i in range(21)]
PROMPTS = [[(7 * i + 13 * j + 3) % 320 for j in range(3 + 5 * i % 23)] for i in range(6)]
PROMPTS += [[*SHARED, i, 2 * i, 77] for i in range(4)] + [[5], [9, 9]]
GREEDY = [SamplingParams(temperature=0, max_tokens=9 + i % 14) for i in range(len(PROMPTS))]
DRAWN = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=9 + i % 14) for i in range(len(PROMPTS))]


def engine(folder: Path, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 400, "block_size": 4, "max_model_len": 64}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


@cache
def calm(folder: Path, name: str) -> list[list[int]]:
    params = {"greedy": GREEDY, "drawn": DRAWN}[name]
    return tokens(engine(folder), params)


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    outputs = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable
    return outputs


def traced(llm: LLM, params: list[SamplingParams]) -> tuple[list[list[int]], Trace]:
    trace = Trace()
    stop_listening = llm.events.listen(trace)
    outputs = tokens(llm, params)
    stop_listening()
    return outputs, trace


def own_draft(folder: Path, **options: object) -> dict[str, object]:
    return {"method": "draft_model", "model": folder} | options


def rounds_of(trace: Trace, method: str) -> list[DraftJudged]:
    return [event for event in trace if isinstance(event, DraftJudged) and event.method == method]


def is_all_accepted(trace: Trace) -> bool:
    rounds = rounds_of(trace, "draft_model")
    assert len(rounds) > 20
    return all(judged.num_accepted == len(judged.draft_token_ids) for judged in rounds)


PRESSURES: dict[str, tuple[dict[str, object], type | None]] = {
    "calm": ({}, PrefixHit),
    "one at a time": ({"max_num_seqs": 1}, PrefixHit),
    "preempted": ({"num_blocks": 19}, Preempted),
    "swapped": ({"num_blocks": 19, "preemption_mode": "swap", "num_host_blocks": 60}, SwappedIn),
    "chunks of 5": ({"max_num_batched_tokens": 5, "max_num_seqs": 2}, None),
    "blocks of 1": ({"block_size": 1}, PrefixHit),
    "blocks of 16, radix": ({"block_size": 16, "prefix_cache": "radix"}, PrefixHit),
    "no cache": ({"enable_prefix_caching": False}, None),
}


@pytest.mark.parametrize("name", PRESSURES)
def test_a_model_that_drafts_for_itself_is_always_right(reference_model: Build, name: str) -> None:
    folder, _ = reference_model("llama-gqa")
    options, proof = PRESSURES[name]
    llm = engine(folder, speculative_config=own_draft(folder), **options)
    for _ in range(2):  # the second time over a warm cache
        outputs, trace = traced(llm, GREEDY)
        assert outputs == calm(folder, "greedy")
        assert is_all_accepted(trace)
    assert proof is None or trace.of(proof)


@pytest.mark.parametrize("family", ["v2-moe", "qwen3"])
def test_other_families(reference_model: Build, family: str) -> None:
    folder, _ = reference_model(family)
    outputs, trace = traced(engine(folder, speculative_config=own_draft(folder)), GREEDY)
    assert outputs == calm(folder, "greedy")
    assert is_all_accepted(trace)


def test_rounds_without_drafts_are_followed(reference_model: Build) -> None:
    """Drafts go on and off from request to request and step to step; n-gram takes turns with the model."""
    folder, _ = reference_model("llama-gqa")
    config = [own_draft(folder), {"method": "ngram", "prompt_lookup_min": 1}]
    llm = engine(folder, speculative_config=config, max_num_batched_tokens=33)
    methods = itertools.cycle(["draft_model", "ngram", "off"])
    mixed = [SamplingParams(temperature=0, max_tokens=p.max_tokens, speculative_method=next(methods)) for p in GREEDY]
    num_rounds = 0
    for params in (mixed, GREEDY, mixed[1:] + mixed[:1]):
        _, trace = traced(llm, params)
        rounds = rounds_of(trace, "draft_model")
        assert all(judged.num_accepted == len(judged.draft_token_ids) for judged in rounds)
        num_rounds += len(rounds)
    assert num_rounds > 30


@pytest.mark.parametrize("num_before", range(3, 9))
def test_forks_begin_with_what_their_parent_drafted(reference_model: Build, num_before: int) -> None:
    """Two streams from one place in a block; the fork copies it, drafts and all."""
    folder, _ = reference_model("llama-gqa")
    llm = engine(folder, speculative_config=own_draft(folder, num_speculative_tokens=2), block_size=8)
    trace = Trace()
    llm.events.listen(trace)
    stream = llm.stream(SHARED[:9], SamplingParams(temperature=0, max_tokens=30))
    outputs = list(itertools.islice(stream, num_before))
    branch = list(llm.fork(outputs[-1].request_id))
    parent = list(stream)
    assert branch[-1].outputs[0].token_ids == parent[-1].outputs[0].token_ids
    rounds = rounds_of(trace, "draft_model")
    assert len({judged.request_id for judged in rounds}) == 2
    assert all(judged.num_accepted == len(judged.draft_token_ids) for judged in rounds)


class Watched:
    """Looks at a proposer's drafts, and then replaces `num_right` of them by what the target will say."""

    needs_hidden = True

    def __init__(self, llm: LLM, truth: dict[tuple[int, ...], list[int]], num_right: Callable[[int], int]) -> None:
        assert llm.runner.speculation is not None
        self.proposers = dict(llm.runner.speculation.proposers)
        [(method, self.inner)] = self.proposers.items()
        llm.runner.speculation.proposers = {method: self}
        self.truth, self.num_right = truth, num_right
        self.check: Callable[[Request, Draft], None] = lambda request, draft: None
        self.num_rounds = 0
        self.follow, self.move, self.clear = self.inner.follow, self.inner.move, self.inner.clear

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        drafts = self.inner.propose(requests, lengths)
        return [self._replace(request, draft) for request, draft in zip(requests, drafts, strict=True)]

    def _replace(self, request: Request, draft: Draft) -> Draft:
        self.check(request, draft)
        self.num_rounds += 1
        right = self.truth[tuple(request.token_ids[: request.num_prompt])][request.num_output :]
        right = right[: min(self.num_right(self.num_rounds), len(draft.token_ids))]
        wrong = draft.token_ids[len(right) :]
        return Draft([*right, *wrong])


def truth_of(folder: Path) -> dict[tuple[int, ...], list[int]]:
    return {tuple(prompt): output for prompt, output in zip(PROMPTS, calm(folder, "greedy"), strict=True)}


@pytest.fixture(scope="module")
def head(reference_model: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head for llama-gqa whose drafts depend on all that it sees, over every third token."""
    folder, _ = reference_model("llama-gqa")
    config = random_head(engine(folder).model_config)
    torch.manual_seed(3)
    module = EagleHead(config)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_draft(path, module, config, torch.arange(0, 320, 3), "eagle", "llama-gqa", {})
    return path


class WholeAttention:
    """Causal attention over the tokens of one sequence, all given at once: no pages."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)


@torch.inference_mode()
def drafts_of_twin(proposer: EagleProposer, model: PreTrainedModel, token_ids: list[int], length: int) -> list[int]:
    """What the head drafts, from transformers' hidden states, all of the sequence computed anew for every draft."""
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    model(torch.tensor([token_ids]))
    hook.remove()
    features = torch.cat((torch.zeros_like(seen[0][:1]), seen[0][:-1]))
    embed, draft, known = model.get_input_embeddings(), proposer.draft, list(token_ids)
    for _ in range(length):
        out = draft.head(embed(torch.tensor(known)), features, torch.arange(len(known)), WholeAttention())
        row = model.lm_head(model.model.norm(out[-1]))[draft.vocabulary]
        known.append(int(draft.vocabulary[row.argmax()]))
        features = torch.cat((features, out[-1:]))
    return known[len(token_ids) :]


@pytest.mark.parametrize("name", [name for name in PRESSURES if name != "no cache"])
def test_eagle_drafts_as_its_twin_without_pages(reference_model: Build, head: Path, name: str) -> None:
    folder, model = reference_model("llama-gqa")
    options, proof = PRESSURES[name]
    llm = engine(folder, speculative_config={"method": "eagle", "model": head}, **options)
    watched = Watched(llm, truth_of(folder), lambda number: number % 5)
    proposer = watched.inner
    assert isinstance(proposer, EagleProposer)
    drafted: set[tuple[int, ...]] = set()

    def check(request: Request, draft: Draft) -> None:
        assert draft.token_ids == drafts_of_twin(proposer, model, request.token_ids, len(draft.token_ids))
        drafted.add(tuple(draft.token_ids))

    watched.check = check
    for _ in range(2):
        outputs, trace = traced(llm, GREEDY)
        assert outputs == calm(folder, "greedy")
    assert watched.num_rounds > 20 and len(drafted) > 10
    assert len({judged.num_accepted for judged in rounds_of(trace, "eagle")}) > 2
    assert proof is None or trace.of(proof)


@pytest.mark.parametrize("family", ["llama-gqa", "v2-moe"])
def test_an_exit_behind_the_last_layer_is_always_right(reference_model: Build, family: str) -> None:
    folder, _ = reference_model(family)
    llm = engine(folder, speculative_config={"method": "early_exit", "num_layers": 1}, num_blocks=19)
    assert llm.runner.speculation is not None
    proposer = llm.runner.speculation.proposers["early_exit"]
    assert isinstance(proposer, EarlyExitProposer)
    proposer.num_layers = llm.model_config.num_layers
    for _ in range(2):
        outputs, trace = traced(llm, GREEDY)
        assert outputs == calm(folder, "greedy")
        rounds = rounds_of(trace, "early_exit")
        assert len(rounds) > 20 and all(judged.num_accepted == len(judged.draft_token_ids) for judged in rounds)


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "v2-moe"])
@pytest.mark.parametrize("method", ["draft_model", "early_exit", "eagle"])
def test_tokens_are_those_without_speculation(reference_model: Build, tmp_path: Path, method: str, family: str) -> None:
    folder, _ = reference_model(family)
    config: dict[str, object] = {"method": method}
    if method == "eagle":
        model, module = (shape := random_head(engine(folder).model_config)), EagleHead(shape)
        for name, parameter in module.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
        config["model"] = tmp_path / "head.safetensors"
        save_draft(tmp_path / "head.safetensors", module, model, torch.arange(100), "eagle", family, {})
    elif method == "draft_model":
        config["model"] = reference_model("qwen3")[0]
    for sampling in ("greedy", "probabilistic"):
        llm = engine(folder, speculative_config=config | {"draft_sample_method": sampling}, num_blocks=30)
        assert tokens(llm, GREEDY) == calm(folder, "greedy")
        if sampling == "greedy":
            assert tokens(llm, DRAWN) == calm(folder, "drawn")
        else:
            tokens(llm, DRAWN)
        assert llm.engine.speculation.num_drafted > 100


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_small_model_trained_for_the_target(reference_model: Build, tmp_path: Path, load_format: str) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = engine(folder, load_format=load_format)
    config, vocabulary = replace(llm.model_config, num_layers=1, num_heads=2, num_kv_heads=1), torch.arange(0, 320, 2)
    module = small_model(config, llm.runner.model, vocabulary).to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    save_draft(tmp_path / "small.safetensors", module, config, vocabulary, "draft_model", "llama-gqa", {})
    options = {"speculative_config": own_draft(tmp_path / "small.safetensors"), "load_format": load_format}
    drafting = engine(folder, **options)
    assert tokens(drafting, DRAWN) == tokens(engine(folder, load_format=load_format), DRAWN)
    assert drafting.engine.speculation.num_drafted > 100


def test_what_is_drawn_from_the_targets_own_distribution_always_stands(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    config = own_draft(folder, draft_sample_method="probabilistic")
    outputs, trace = traced(engine(folder, speculative_config=config), DRAWN)
    assert is_all_accepted(trace)
    assert outputs != calm(folder, "drawn")  # drafts are drawn with noise of their own


def test_adaptive_lengths_follow_acceptance(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    config = {"method": "early_exit", "num_layers": 1, "adaptive": True, "num_speculative_tokens": 5}
    llm = engine(folder, speculative_config=config, max_num_seqs=1)
    prompt = PROMPTS[8]
    params = SamplingParams(temperature=0, max_tokens=40)
    truth = engine(folder).generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    Watched(llm, {tuple(prompt): truth}, lambda number: 9 if number in (3, 4) else 0)
    trace = Trace()
    llm.events.listen(trace)
    assert llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == truth
    rounds = rounds_of(trace, "early_exit")
    lengths = [len(judged.draft_token_ids) for judged in rounds]
    assert [judged.num_accepted for judged in rounds[:7]] == [0, 0, 3, 5, 0, 0, 0]
    assert lengths[:7] == [5, 4, 3, 5, 5, 4, 3]
    steps = [judged.step for judged in rounds]
    assert steps[7] - steps[6] > 10  # three losses in a row: a pause


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "draft_model", "model": "no-such-model"}, "no-such-model"),
        ({"method": "draft_model", "model": "smollm2-135m"}, "without weights|vocabulary of 49152"),
        ({"method": "draft_model", "model": "smollm2-draft"}, "49152|NAME.json"),
        ({"method": "eagle"}, "trained for smollm2-135m alone"),
        ({"method": "eagle", "model": "nowhere/head.safetensors"}, "no drafter at"),
        ({"method": "early_exit", "num_layers": 2}, "must be below the model's 2 layers"),
        ({"method": "ngram", "num_layers": 2}, "num_layers is an option of early_exit; of its own ngram has prompt_"),
        ({"method": "eagle", "prompt_lookup_max": 3}, "prompt_lookup_max is an option of ngram; of its own eagle has"),
        ({"method": "eagle", "model": ""}, "model must be a name or a folder, not ''"),
    ],
)
def test_errors_are_one_line(reference_model: Build, config: dict[str, object], words: str) -> None:
    folder, _ = reference_model("llama-gqa")
    with pytest.raises(MiniVLLMError, match=words) as caught:
        engine(folder, speculative_config=config)
    assert "\n" not in str(caught.value)


def test_a_draft_model_of_another_tokenizer_is_refused_by_a_token(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("draft", "target", "bare")]
    for folder, words in zip(folders, ("a b c", "a c b", ""), strict=True):
        folder.mkdir()
        if words:
            vocab = {word: index for index, word in enumerate(words.split())}
            Tokenizer(WordLevel(vocab, unk_token="a")).save(str(folder / "tokenizer.json"))
    draft, target, bare = folders
    assert first_other_token(draft, target) == "b" and first_other_token(draft, draft) is None
    assert first_other_token(draft, bare) is None and first_other_token(draft, None) is None


def test_a_wish_for_a_drafter_that_is_not_there_is_refused_in_one_line(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    wish = SamplingParams(speculative_method="eagle")
    with pytest.raises(
        RequestError, match="is 'eagle' and this engine was built without drafts; see speculative_config"
    ):
        engine(folder).generate([[1, 2]], wish, use_tqdm=False)
    with pytest.raises(RequestError, match="is 'eagle' and this engine drafts by ngram; see"):
        engine(folder, speculative_config={"method": "ngram"}).generate([[1, 2]], wish, use_tqdm=False)


def test_a_drafter_takes_its_share_of_the_pool(reference_model: Build, head: Path) -> None:
    folder, _ = reference_model("llama-gqa")
    budget = 2**20

    def blocks(config: dict[str, object] | None) -> int:
        llm = engine(folder, num_blocks=None, kv_cache_memory=budget, speculative_config=config)
        num_bytes = llm.storage.num_bytes
        if config and llm.runner.speculation:
            [proposer] = llm.runner.speculation.proposers.values()
            num_bytes += proposer.storage.num_bytes  # type: ignore[attr-defined]
            num_bytes += proposer.features.data.nbytes if isinstance(proposer, EagleProposer) else 0
        assert budget - 8192 < num_bytes <= budget
        return llm.config.num_blocks

    alone = blocks(None)
    assert blocks(own_draft(folder)) < 0.51 * alone
    assert blocks({"method": "eagle", "model": head}) < 0.51 * alone


def slow_lookup(token_ids: list[int], longest: int, shortest: int, length: int) -> list[int]:
    for size in range(min(longest, len(token_ids) - 1), shortest - 1, -1):
        for start in reversed(range(len(token_ids) - size)):
            if token_ids[start : start + size] == token_ids[-size:]:
                return token_ids[start + size : start + size + length]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_lookup_finds_the_latest_of_the_longest(token_ids: list[int], one: int, other: int, length: int) -> None:
    wish = max(one, other), min(one, other), length
    assert lookup(token_ids, *wish) == slow_lookup(token_ids, *wish)
    assert lookup([1, 2, 3, 1, 2], 3, 1, 4) == [3, 1, 2]
