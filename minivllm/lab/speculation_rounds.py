"""Rounds of speculation as an engine ran them, with what the target thought at each place: for the ladder of W8."""

from collections.abc import Sequence
from dataclasses import replace
from math import exp

from minivllm.course.speculation_rounds import RealRound, Top
from minivllm.draft_events import DraftJudged
from minivllm.errors import ConfigError
from minivllm.events import StepRan
from minivllm.llm import LLM
from minivllm.outputs import Logprob
from minivllm.request import SamplingParams

NUM_TOPS = 4  # likely tokens of a place


def real_rounds(llm: LLM, prompt: str, params: SamplingParams, most: int = 12) -> list[RealRound]:
    """Generate once and tell the first `most` rounds that had drafts. Raises ConfigError where nobody drafted."""
    with llm.record() as trace:
        [output] = llm.generate([prompt], replace(params, logprobs=NUM_TOPS), use_tqdm=False)
    sample = output.outputs[0]
    logprobs = sample.logprobs or []
    judged = {event.step: event for event in trace.of(DraftJudged) if isinstance(event, DraftJudged)}
    rounds: list[RealRound] = []
    num_before = 0
    for event in trace.of(StepRan):
        assert isinstance(event, StepRan), "asked for StepRan"
        num_new = sum(len(tokens) for _, tokens in event.new_tokens)
        one = judged.get(event.step)
        if one is not None and num_new == one.num_accepted + 1 and num_before + num_new <= len(sample.token_ids):
            places = range(num_before, num_before + num_new)
            found = [_place(llm, sample.token_ids[i], logprobs[i]) for i in places]
            rounds.append(_round(llm, one, sample.token_ids[places[-1]], found))
        num_before += num_new
    if not rounds:
        raise ConfigError("no round had drafts; give a speculative_config, and a prompt that its proposer knows to use")
    return rounds[:most]


def _round(llm: LLM, one: DraftJudged, last: int, found: Sequence[tuple[Top, int]]) -> RealRound:
    drafts = tuple(_text(llm, token) for token in one.draft_token_ids)
    tops, chosen = zip(*found, strict=True)
    origin = f"{llm.trace_header().get('model')}, step {one.step} of this run"
    return RealRound(one.method, one.step, drafts, one.num_accepted, _text(llm, last), tops, chosen, origin)


def _place(llm: LLM, token_id: int, logprobs: dict[int, Logprob]) -> tuple[Top, int]:
    """The likely tokens of a place, the one that came out among them, and its index."""
    best = sorted(logprobs, key=lambda token: (-logprobs[token].logprob, token))[:NUM_TOPS]
    best = best if token_id in best else [*best[: NUM_TOPS - 1], token_id]
    return tuple((_text(llm, token), exp(logprobs[token].logprob)) for token in best), best.index(token_id)


def _text(llm: LLM, token_id: int) -> str:
    return llm.tokenizer.decode([token_id]) if llm.tokenizer else str(token_id)
