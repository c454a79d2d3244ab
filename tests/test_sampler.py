"""Tokens are drawn from exactly the distribution asked for, and from nothing but (seed, position, logits)."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minivllm import LLM, RequestOutput, SamplingParams
from minivllm.request import Request
from minivllm.runner.sampler import (
    NUCLEUS_CANDIDATES,
    apply_penalties,
    distribution,
    forbid_early_end,
    noise,
    nucleus_threshold,
    pick,
    sample,
    token_logprobs,
)

Build = Callable[[str], tuple[Path, PreTrainedModel]]
PROMPT = [5, 9, 200, 31, 77, 5, 5, 140]


def asked(params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None) -> Request:
    prompt, output = prompt or [1], output or []
    return Request("r", prompt + output, len(prompt), params, 99)


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tiny(build: Build, **options: object) -> LLM:
    folder, _ = build("llama-gqa")
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 200, "block_size": 4, "max_model_len": 256}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def others(num: int, length: int = 11) -> list[list[int]]:
    return [[(7 * i + 13 * j + 3) % 320 for j in range(length + i % 5)] for i in range(num)]


# --- Greedy, and the whole distribution


def test_greedy_is_the_argmax_also_beside_a_request_that_samples() -> None:
    logits = normal(3, 50)
    requests = [asked(SamplingParams(temperature=t)) for t in (0, 1.0, 0)]
    best = logits.argmax(dim=-1)
    assert sample(logits[[0, 2]], [requests[0], requests[2]], ()).tolist() == best[[0, 2]].tolist()
    assert sample(logits, requests, ())[[0, 2]].tolist() == best[[0, 2]].tolist()


def test_temperature_near_zero_is_greedy() -> None:
    logits = normal(64, seed=4)
    assert distribution(logits, asked(SamplingParams(temperature=1e-9)))[logits.argmax()] == pytest.approx(1.0)


def test_sampling_leaves_the_callers_logits_alone() -> None:
    logits = normal(1, 40)
    before = logits.clone()
    params = SamplingParams(frequency_penalty=1.5, repetition_penalty=3.0, min_tokens=4, max_tokens=9)
    sample(logits, [asked(params, [1, 2], [3, 3])], [7])
    assert torch.equal(logits, before)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """The statistic, and the value that a right sampler exceeds once in 10,000 (Wilson-Hilferty)."""
    expected = probs * counts.sum()
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), limit


def slow_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The twin: plain Python over a sorted list, straight from the definitions."""
    weights = [math.exp(float(x) / params.temperature) for x in logits]
    kept = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = [i for i in kept if weights[i] >= params.min_p * weights[kept[0]]]
    kept = kept[: params.top_k] if params.top_k > 0 else kept
    total, reached, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if reached >= params.top_p * total:
            break
        nucleus.append(i)
        reached += weights[i]
    probs = torch.zeros(len(weights), dtype=torch.float64)
    for i in nucleus:
        probs[i] = weights[i] / reached
    return probs


CHOICES = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=1.8),
    SamplingParams(top_k=7),
    SamplingParams(top_p=0.8),
    SamplingParams(min_p=0.1),
    SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("params", CHOICES, ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_the_distribution_equals_its_slow_twin_and_draws_follow_it(params: SamplingParams) -> None:
    logits = normal(40, seed=1, scale=1.2)
    exact = slow_distribution(logits, params)
    probs = distribution(logits, asked(params))
    torch.testing.assert_close(probs, exact, atol=1e-7, rtol=1e-6)
    draws = torch.tensor([pick(probs, noise(seed, position, 40)) for seed in range(60) for position in range(100)])
    counts = torch.bincount(draws, minlength=40).double()
    assert counts[exact == 0].sum() == 0
    statistic, limit = chi_square(counts, exact)
    assert statistic < limit
    tilted = exact * torch.linspace(0.7, 1.3, 40)  # the power of the test: 6,000 draws tell a tilt of 30 % apart
    tilted_statistic, _ = chi_square(counts, tilted / tilted.sum())
    assert tilted_statistic > limit


def test_engine_samples_follow_the_softmax_of_transformers(reference_model: Build) -> None:
    _, model = reference_model("llama-gqa")
    params = SamplingParams(n=3000, max_tokens=1, temperature=1.5, top_k=12, seed=1)
    [output] = generate(tiny(reference_model, num_blocks=4000, max_num_seqs=512), [PROMPT], [params])
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in output.outputs]), minlength=320).double()
    exact = slow_distribution(logits, params)
    assert counts[exact == 0].sum() == 0
    statistic, limit = chi_square(counts, exact)
    assert statistic < limit


def test_noise_is_exponential_and_unrelated_across_seeds_and_positions() -> None:
    numbers = torch.stack([noise(seed, position, 100) for seed in range(-5, 5) for position in range(10)])
    assert numbers.min() > 0 and numbers.unique().numel() == numbers.numel()
    counts = torch.histc(torch.exp(-numbers), 20, 0, 1).double()  # uniform, if the noise is exponential
    statistic, limit = chi_square(counts, torch.full((20,), 0.05).double())
    assert statistic < limit
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.5  # neighbouring seeds and positions


def test_pick_never_names_an_excluded_token() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.0], dtype=torch.float64)
    assert {pick(probs, noise(seed, 0, 7)) for seed in range(200)} == {1, 3, 4}


def test_rounding_in_the_logits_does_not_change_what_is_drawn() -> None:
    """Noise belongs to a token, so an error of 1e-5 swaps only ties; a walk along the sums would swap neighbours."""
    logits, request = normal(50_000, seed=4, scale=2.0), asked(SamplingParams())
    nudged = logits + 1e-5 * normal(50_000, seed=5)
    draws = [noise(6, position, 50_000) for position in range(200)]
    same = [pick(distribution(logits, request), e) == pick(distribution(nudged, request), e) for e in draws]
    assert sum(same) >= 199


# --- The nucleus without a sort


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 8.0])
def test_nucleus_equals_a_full_sort(scale: float, top_p: float) -> None:
    logits = normal(5000, seed=2, scale=scale).double()
    probs = torch.softmax(logits, dim=-1)
    best = sorted(probs.tolist(), reverse=True)
    reached, size = 0.0, 0
    while reached < top_p and size < len(best):
        reached += best[size]
        size += 1
    if scale > 0:
        assert float(nucleus_threshold(probs, top_p)) == best[size - 1]
    else:  # all tokens are equally likely: none may be left out for its number alone
        assert (probs >= nucleus_threshold(probs, top_p)).all()
    falls_short = sum(best[:NUCLEUS_CANDIDATES]) < top_p
    assert falls_short == (top_p >= {0.0: 0.5, 0.01: 0.5, 1.0: 0.9, 8.0: 2.0}[scale])


# --- The same rules in transformers


def support(probs: torch.Tensor) -> list[int]:
    return probs.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        (SamplingParams(top_k=5), TopKLogitsWarper(5)),
        (SamplingParams(top_k=1), TopKLogitsWarper(1)),
        (SamplingParams(top_p=0.7), TopPLogitsWarper(0.7)),
        (SamplingParams(top_p=0.05), TopPLogitsWarper(0.05)),
        (SamplingParams(min_p=0.2), MinPLogitsWarper(0.2)),
        (SamplingParams(min_p=1.0), MinPLogitsWarper(1.0)),
    ],
    ids=["top_k=5", "top_k=1", "top_p=0.7", "top_p=0.05", "min_p=0.2", "min_p=1"],
)
def test_what_may_be_drawn_is_what_transformers_keeps(params: SamplingParams, warper: Callable) -> None:
    logits = normal(8, 300, seed=3)
    warped = warper(torch.zeros(8, 1, dtype=torch.int64), logits.clone())
    for row in range(8):
        probs = distribution(logits[row], asked(params))
        assert support(probs) == support(warped[row].isfinite())
        torch.testing.assert_close(probs.float(), torch.softmax(warped[row], dim=-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    prompt, output = [3, 9, 9, 4], [7, 3, 7]
    logits = normal(1, 60, seed=5)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    apply_penalties(logits[0], asked(SamplingParams(repetition_penalty=penalty), prompt, output))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("num_output", [0, 2, 3, 4])
def test_min_tokens_forbids_the_end_as_transformers_does(num_output: int) -> None:
    output = [1] * num_output
    logits = normal(1, 30, seed=6)
    processor = MinNewTokensLengthLogitsProcessor(4, 3, [7, 9], device="cpu")
    expected = processor(torch.tensor([[2] * 4 + output]), logits.clone())
    request = asked(SamplingParams(min_tokens=3, stop_token_ids=[9, 10_000]), [2] * 4, output)
    forbid_early_end(logits[0], request, [7])
    assert torch.equal(logits, expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    prompt, output = [3, 3, 4], [7, 8, 7, 7]
    logits = normal(20, seed=7)
    expected = logits.clone()
    expected[7] -= 0.5 * 3 + 0.25
    expected[8] -= 0.5 * 1 + 0.25
    apply_penalties(logits, asked(SamplingParams(frequency_penalty=0.5, presence_penalty=0.25), prompt, output))
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_an_extreme_penalty_still_leaves_a_distribution(penalty: float) -> None:
    request = asked(SamplingParams(repetition_penalty=penalty, top_p=0.9), [3, 4], [5])
    logits = normal(20, seed=8).abs()
    apply_penalties(logits, request)
    assert distribution(logits, request).sum() == pytest.approx(1.0)


# --- The same tokens whatever else happens

SEEDED = SamplingParams(temperature=1.2, top_p=0.95, seed=11, max_tokens=24)


def seeded_tokens(llm: LLM, num_others: int = 0) -> list[int]:
    params = [SEEDED, *[SamplingParams(temperature=1.2, max_tokens=24)] * num_others]
    return generate(llm, [PROMPT, *others(num_others)], params)[0].outputs[0].token_ids


def test_seed_and_prompt_fix_the_tokens_under_every_pressure(reference_model: Build) -> None:
    roomy = tiny(reference_model, num_blocks=600)
    alone = seeded_tokens(roomy)
    assert len(set(alone)) > 5
    assert seeded_tokens(roomy, num_others=32) == alone
    assert roomy.generate(PROMPT, SEEDED, use_tqdm=False)[0].num_cached_tokens == 4  # and so it was just above
    assert seeded_tokens(tiny(reference_model, max_num_batched_tokens=3)) == alone
    assert seeded_tokens(tiny(reference_model, enable_prefix_caching=False, block_size=16)) == alone


def test_seed_and_prompt_fix_the_tokens_when_preempted(reference_model: Build) -> None:
    alone = seeded_tokens(tiny(reference_model))
    crowded = tiny(reference_model, num_blocks=20, max_model_len=64)
    outputs = generate(crowded, [*others(6), PROMPT], [*[SamplingParams(max_tokens=24)] * 6, SEEDED])
    assert outputs[-1].metrics.num_preemptions > 0
    assert outputs[-1].outputs[0].token_ids == alone


def test_other_seeds_and_no_seed_give_other_tokens(reference_model: Build) -> None:
    llm = tiny(reference_model)
    params = [SamplingParams(temperature=1.2, seed=seed, max_tokens=24) for seed in (1, 2, -1, None, None)]
    found = {tuple(output.outputs[0].token_ids) for output in generate(llm, [PROMPT] * 5, params)}
    assert len(found) == 5


def test_an_engine_seed_repeats_a_whole_session(reference_model: Build) -> None:
    def session(seed: int) -> list[list[int]]:
        llm = tiny(reference_model, seed=seed)
        params = SamplingParams(temperature=1.2, max_tokens=8)
        return [output.outputs[0].token_ids for _ in range(2) for output in generate(llm, [PROMPT] * 3, params)]

    assert session(1) == session(1) != session(2)
    assert len(set(map(tuple, session(1)))) == 6


def test_n_samples_differ_and_repeat(reference_model: Build) -> None:
    params = SamplingParams(n=6, temperature=1.2, seed=3, max_tokens=16)
    [first], [second] = (generate(tiny(reference_model), [PROMPT], params) for _ in range(2))
    tokens = [sample.token_ids for sample in first.outputs]
    assert [sample.index for sample in first.outputs] == list(range(6))
    assert len(set(map(tuple, tokens))) == 6
    assert [sample.token_ids for sample in second.outputs] == tokens


# --- Logprobs


def reference_logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].float(), dim=-1)  # [T, vocab]


def test_token_logprobs_give_value_rank_and_the_best() -> None:
    [judged] = token_logprobs(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), torch.tensor([2]), num_top=2)
    logprobs = torch.log_softmax(torch.tensor([0.0, 3.0, 1.0, 2.0]), dim=-1)
    assert (judged.token_id, judged.rank, [t for t, _ in judged.top]) == (2, 3, [1, 3])
    assert judged.logprob == pytest.approx(float(logprobs[2]))


@pytest.mark.parametrize("penalty", [1.0, 1.8])
def test_logprobs_are_those_of_the_raw_logits_of_transformers(reference_model: Build, penalty: float) -> None:
    _, model = reference_model("llama-gqa")
    params = SamplingParams(
        temperature=1.3, seed=5, max_tokens=10, logprobs=4, repetition_penalty=penalty, top_k=30, frequency_penalty=0.3
    )
    [output] = generate(tiny(reference_model), [PROMPT], params)
    [answer] = output.outputs
    assert answer.logprobs is not None and len(answer.logprobs) == 10
    expected = reference_logprobs(model, PROMPT + answer.token_ids)[len(PROMPT) - 1 :]
    for row, token_id, found in zip(expected, answer.token_ids, answer.logprobs, strict=False):
        assert next(iter(found)) == token_id  # the chosen one first, then the best
        assert found[token_id].rank == int((row > row[token_id]).sum()) + 1
        assert set(found) == {token_id, *row.topk(4).indices.tolist()}
        for known_id, logprob in found.items():
            assert logprob.logprob == pytest.approx(float(row[known_id]), abs=1e-4)
    total = sum(float(row[t]) for row, t in zip(expected, answer.token_ids, strict=False))
    assert answer.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_logprobs_zero_gives_the_chosen_token_alone_and_none_gives_nothing(reference_model: Build) -> None:
    params = [SamplingParams(logprobs=0, max_tokens=3, seed=1), SamplingParams(max_tokens=3)]
    with_zero, without = generate(tiny(reference_model), [PROMPT, PROMPT], params)
    assert [list(found) for found in with_zero.outputs[0].logprobs or []] == [
        [token_id] for token_id in with_zero.outputs[0].token_ids
    ]
    assert without.outputs[0].logprobs is None and without.outputs[0].cumulative_logprob is None
    assert without.prompt_logprobs is None


def check_prompt_logprobs(model: PreTrainedModel, output: RequestOutput, num_top: int) -> None:
    prompt, judged = output.prompt_token_ids, output.prompt_logprobs
    assert judged is not None and len(judged) == len(prompt) and judged[0] is None
    for position, row in enumerate(reference_logprobs(model, prompt)[:-1]):
        found, token_id = judged[position + 1], prompt[position + 1]
        assert found is not None
        assert set(found) == {token_id, *row.topk(num_top).indices.tolist()}
        assert found[token_id].rank == int((row > row[token_id]).sum()) + 1
        for known_id, logprob in found.items():
            assert logprob.logprob == pytest.approx(float(row[known_id]), abs=1e-4)


@pytest.mark.parametrize("chunk_tokens", [2048, 5, 1])
def test_prompt_logprobs_equal_transformers_chunked_and_with_a_warm_cache(
    reference_model: Build, chunk_tokens: int
) -> None:
    _, model = reference_model("llama-gqa")
    llm, prompt = tiny(reference_model, max_num_batched_tokens=chunk_tokens), [*PROMPT, *range(40, 60)]
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3)
    for _ in range(2):  # the second time every block of the prompt is cached
        check_prompt_logprobs(model, generate(llm, [prompt], params)[0], num_top=3)
    [plain] = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=4))
    assert plain.num_cached_tokens > 0


def test_prompt_logprobs_survive_preemption_and_n(reference_model: Build) -> None:
    _, model = reference_model("llama-gqa")
    llm = tiny(reference_model, num_blocks=20, max_model_len=64, max_num_batched_tokens=7)
    params = SamplingParams(max_tokens=24, prompt_logprobs=2, logprobs=1, n=2, seed=1)
    outputs = generate(llm, others(5), params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output in outputs:
        check_prompt_logprobs(model, output, num_top=2)
        assert [len(s.logprobs or []) for s in output.outputs] == [24, 24]


def test_prompt_logprobs_of_one_token_are_none_alone(reference_model: Build) -> None:
    [output] = generate(tiny(reference_model), [[7]], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert output.prompt_logprobs == [None]


def test_logprobs_may_cover_the_vocabulary_but_no_more(reference_model: Build) -> None:
    llm = tiny(reference_model)
    [output] = generate(llm, [PROMPT], SamplingParams(max_tokens=1, logprobs=320))
    assert [len(found) for found in output.outputs[0].logprobs or []] == [320]
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match=f"{name} of 321"):
            generate(llm, [PROMPT], SamplingParams(max_tokens=1, **{name: 321}))  # type: ignore[arg-type]
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable
