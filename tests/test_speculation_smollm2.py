"""Speculation on the real default model: greedy answers are those without it, beside every other feature.

One engine serves both sides: `speculative_method="off"` is the engine without drafts.
"""

import pydoc_data.topics
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minivllm import LLM, SamplingParams
from minivllm.beam_search import BeamSearchParams
from minivllm.draft_events import DraftJudged
from minivllm.events import Preempted, PrefixHit
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.weights import find_model

pytestmark = pytest.mark.weights
DRAFTED = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
NUM_PROMPTS, NUM_NEW = 200, 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)


def build(**options: Any) -> LLM:
    sizes = {"num_blocks": 900, "max_model_len": 160, "speculative_config": DRAFTED, "dtype": "float32"}
    return LLM("smollm2-135m", **{**sizes, **options})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return build()


def prompts(llm: LLM, num_prompts: int, most: int = 12) -> list[list[int]]:
    """Places in Python's help topics."""
    random, topics = Random(1), " ".join(sorted(pydoc_data.topics.topics.values()))
    starts = [random.randrange(len(topics) - 400) for _ in range(num_prompts)]
    return [llm.get_tokenizer().encode(topics[start : start + 400])[1 : random.randint(5, most)] for start in starts]


def off(params: SamplingParams) -> SamplingParams:
    return replace(params, speculative_method="off")


def tokens(outputs: Sequence[RequestOutput]) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def both(llm: LLM, given: Sequence[Any], params: SamplingParams) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """Without and with drafts, of which some must have been judged."""
    plain = llm.generate(list(given), off(params), use_tqdm=False)
    before = llm.engine.speculation.num_drafted
    drafted = llm.generate(list(given), params, use_tqdm=False)
    assert llm.engine.speculation.num_drafted > before
    return plain, drafted


def test_200_prompts_have_the_same_greedy_tokens() -> None:
    llm = build()
    plain, drafted = both(llm, prompts(llm, NUM_PROMPTS), GREEDY)
    assert tokens(plain) == tokens(drafted)
    stats = llm.engine.speculation
    assert stats.num_accepted > NUM_PROMPTS and stats.mean_accepted_length > 1.2


def test_in_16_bits_answers_part_only_where_rounding_decides() -> None:
    """Batches round differently. Where answers part, both runs are as near to fp32 as transformers in bf16 may be.

    That noise is measured at each such place, over all logits: mostly .05, once 5.8, behind thirteen empty lines.
    """
    llm = build(dtype="bfloat16")
    given = prompts(llm, NUM_PROMPTS)
    answers = both(llm, given, replace(GREEDY, logprobs=20))
    source = find_model("smollm2-135m", "auto")
    in_32, in_16 = (
        AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    num_parted = 0
    for prompt, *outputs in zip(given, *answers, strict=True):
        one, other = (output.outputs[0] for output in outputs)
        place = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b), None)
        if place is None:
            continue
        num_parted += 1
        context = torch.tensor([[*prompt, *one.token_ids[:place]]])
        with torch.no_grad():
            true, rounded = (model(context).logits[0, -1].float() for model in (in_32, in_16))
        noise = (rounded - true).std().item()
        first, second = one.token_ids[place], other.token_ids[place]
        for found in ((sample.logprobs or [])[place] for sample in (one, other)):
            error = found[first].logprob - found[second].logprob - (true[first] - true[second]).item()
            assert abs(error) < 8 * noise, f"{error:.2f} where bf16 rounds by {noise:.2f}: no near tie"
    assert 0 < num_parted < NUM_PROMPTS / 2


@pytest.mark.parametrize(
    ("options", "event"),
    [
        ({"num_blocks": 24, "enable_prefix_caching": False}, Preempted),
        (
            {"num_blocks": 24, "preemption_mode": "swap", "num_host_blocks": 60, "enable_prefix_caching": False},
            Preempted,
        ),
        ({"max_num_batched_tokens": 7, "enable_chunked_prefill": True}, DraftJudged),
        ({"prefix_cache": "radix", "block_size": 8}, PrefixHit),
    ],
    ids=["preemption", "swap", "chunks", "radix hits"],
)
def test_drafts_beside_other_features_of_the_engine(llm: LLM, options: dict[str, Any], event: type) -> None:
    given = [prompt * 3 for prompt in prompts(llm, 8)]
    expected = tokens(llm.generate(given, off(GREEDY), use_tqdm=False))
    other = build(**options)
    with other.record() as trace:
        first = tokens(other.generate(given, GREEDY, use_tqdm=False))
        second = tokens(other.generate(given, GREEDY, use_tqdm=False))
    assert first == second == expected
    assert trace.of(event) and other.engine.speculation.num_accepted > 20
    assert other.engine.kv.pool.num_free == other.engine.kv.pool.num_usable


def test_logprobs_are_those_without_drafts(llm: LLM) -> None:
    plain, drafted = both(llm, prompts(llm, 6), replace(GREEDY, logprobs=3))
    for a, b in zip(plain, drafted, strict=True):
        ours, theirs = a.outputs[0].logprobs or [], b.outputs[0].logprobs or []
        assert [list(at) for at in ours] == [list(at) for at in theirs] and len(ours) == NUM_NEW
        for one, other in zip(ours, theirs, strict=True):
            assert [x.logprob for x in one.values()] == pytest.approx([x.logprob for x in other.values()], abs=2e-4)
        assert b.outputs[0].cumulative_logprob == pytest.approx(a.outputs[0].cumulative_logprob, abs=1e-3)


def test_stop_strings_tokens_and_limits_cut_in_the_middle_of_accepted_drafts(llm: LLM) -> None:
    """Every word of a copied text as the stop string, every length as the limit, some token as the stop token."""
    text = "red green blue yellow red green blue yellow red green blue yellow red green"
    [whole] = llm.generate([text], off(GREEDY), use_tqdm=False)
    words = [word for word in dict.fromkeys(whole.outputs[0].text.split()) if len(word) > 2]
    cuts = [replace(GREEDY, stop=word) for word in words] + [replace(GREEDY, max_tokens=n) for n in range(1, 12)]
    cuts += [replace(GREEDY, stop_token_ids=[token]) for token in dict.fromkeys(whole.outputs[0].token_ids)]
    cuts += [replace(GREEDY, stop_token_ids=[whole.outputs[0].token_ids[2]], min_tokens=9, max_tokens=20)]
    cuts += [replace(cut, include_stop_str_in_output=True, logprobs=1) for cut in cuts[: len(words)]]
    with llm.record() as trace:
        drafted = llm.generate([text] * len(cuts), cuts, use_tqdm=False)
    plain = llm.generate([text] * len(cuts), [off(cut) for cut in cuts], use_tqdm=False)
    for one, other in zip(plain, drafted, strict=True):
        assert seen_of(one.outputs[0]) == seen_of(other.outputs[0])
    assert {output.outputs[0].finish_reason for output in drafted} == {"stop", "length"}
    inside = [e for e in trace if isinstance(e, DraftJudged) and e.num_accepted + 1 <= len(e.draft_token_ids)]
    assert inside


def seen_of(sample: CompletionOutput) -> tuple[Any, ...]:
    num_judged = None if sample.logprobs is None else len(sample.logprobs)
    return list(sample.token_ids), sample.text, sample.finish_reason, sample.stop_reason, num_judged


@pytest.mark.parametrize(
    "wish",
    [
        {"temperature": 0.7, "seed": 3, "n": 3},
        {"temperature": 1.0, "seed": 5, "top_p": 0.6, "top_k": 20, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 0.4, "seed": 8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "min_tokens": 6},
    ],
    ids=["samples", "filters", "penalties"],
)
def test_certain_drafts_leave_seeded_samples_as_they_are(llm: LLM, wish: dict[str, Any]) -> None:
    given = [prompt * 2 for prompt in prompts(llm, 4)]
    plain, drafted = both(llm, given, SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, **wish))
    assert tokens(plain) == tokens(drafted)


def test_requests_with_and_without_drafts_an_abort_a_stream_and_beams_share_steps(llm: LLM) -> None:
    given = [prompt * 2 for prompt in prompts(llm, 4)]
    expected = tokens(llm.generate(given, off(GREEDY), use_tqdm=False))
    beams = llm.beam_search([given[0]], BeamSearchParams(beam_width=2, max_tokens=6))
    engine = llm.text_engine
    wishes = [GREEDY, off(GREEDY), replace(GREEDY, num_speculative_tokens=1), GREEDY]
    running = [engine.add(engine.check(prompt), wish) for prompt, wish in zip(given, wishes, strict=True)]
    streamed: list[int] = []
    while not running[0].is_finished:
        engine.step()
        known = engine.result(running[0]).outputs[0].token_ids
        assert known[: len(streamed)] == streamed and len(known) >= len(streamed)
        streamed = list(known)
        if len(engine.result(running[3]).outputs[0].token_ids) > 3 and not running[3].is_finished:
            engine.abort(running[3])
    while not all(each.is_finished for each in running):
        engine.step()
    ends = [list(engine.result(each).outputs[0].token_ids) for each in running]
    assert ends[:3] == [each[0] for each in expected[:3]] and streamed == ends[0]
    assert ends[3] == expected[3][0][: len(ends[3])] and len(ends[3]) < NUM_NEW
    again = llm.beam_search([given[0]], BeamSearchParams(beam_width=2, max_tokens=6))
    assert [s.tokens for s in again[0].sequences] == [s.tokens for s in beams[0].sequences]
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable
