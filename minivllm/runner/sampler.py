"""From logits to tokens. Every random choice is a function of (seed, position) alone, never of the batch.

Each token of the vocabulary gets its own noise from a generator seeded afresh, and the largest probability / noise
wins (the exponential race, which is the Gumbel-max trick). No generator state lives on, so a preempted or re-batched
request draws what it would have drawn anyway; and rounding in the logits can only swap two tokens that tie.
"""

from collections.abc import Sequence

import numpy as np
import torch

from minivllm.engine.plan import TokenLogprobs
from minivllm.request import Request

NUCLEUS_CANDIDATES = 1024  # top_p looks at this many tokens first; it sorts the vocabulary only when they fall short


def sample(logits: torch.Tensor, requests: Sequence[Request], eos_token_ids: Sequence[int]) -> torch.Tensor:
    """The next token of each request, [R]; row r of logits [R, vocab] belongs to requests[r]."""
    if all(r.params.is_greedy and not r.params.has_penalties and not r.params.min_tokens for r in requests):
        return logits.float().argmax(dim=-1)  # in fp32: torch's bf16 argmax takes five times as long
    logits = logits.to(torch.float32, copy=True)  # logprobs are read from the caller's, which stay raw
    for row, request in enumerate(requests):
        forbid_early_end(logits[row], request, eos_token_ids)
        apply_penalties(logits[row], request)
    token_ids = logits.argmax(dim=-1)
    for row, request in enumerate(requests):
        if not request.params.is_greedy:
            probs = distribution(logits[row], request)
            token_ids[row] = pick(probs, noise(request.seed, request.num_tokens, len(probs)))
    return token_ids


def forbid_early_end(logits: torch.Tensor, request: Request, eos_token_ids: Sequence[int]) -> None:
    """Before min_tokens no token may end the request."""
    params = request.params
    if request.num_output < params.min_tokens:
        ending = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_token_ids)]
        logits[[token_id for token_id in ending if token_id < len(logits)]] = float("-inf")


def apply_penalties(logits: torch.Tensor, request: Request) -> None:
    """Repetition (Keskar et al. 2019) over prompt and output; presence and frequency (OpenAI) over the output."""
    params = request.params
    if not params.has_penalties:
        return
    if params.repetition_penalty != 1:
        seen = torch.tensor(request.token_ids, device=logits.device).unique()
        scores = logits[seen]
        scores = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        logits[seen] = scores.clamp(max=torch.finfo(scores.dtype).max)  # the softmax of inf is nan
    if request.num_output:
        output, counts = torch.tensor(request.output_token_ids, device=logits.device).unique(return_counts=True)
        logits[output] -= params.frequency_penalty * counts + params.presence_penalty


def distribution(logits: torch.Tensor, request: Request) -> torch.Tensor:
    """Probabilities [vocab] after temperature, min_p, top_k and top_p; zero for what these exclude."""
    params = request.params
    probs = torch.softmax(logits.double() / max(params.temperature, 1e-5), dim=-1)
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs.max(), 0.0)
    if 0 < params.top_k < len(probs):
        probs = probs.where(probs >= probs.topk(params.top_k).values[-1], 0.0)
    if params.top_p < 1:
        probs = probs / probs.sum()
        probs = probs.where(probs >= nucleus_threshold(probs, params.top_p), 0.0)
    return probs / probs.sum()


def nucleus_threshold(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability in the nucleus: the fewest most likely tokens that reach `top_p` together."""
    best = probs.topk(min(NUCLEUS_CANDIDATES, len(probs))).values
    if best.sum() < top_p:
        best = probs.sort(descending=True).values
    before = best.cumsum(0) - best  # probability of the tokens ahead of each
    return best[before < top_p][-1]


def pick(probs: torch.Tensor, exponential: torch.Tensor) -> int:
    """A token drawn from `probs` [vocab], given exponential noise: P(argmax p/e = i) = p_i (Gumbel 1954)."""
    return int((probs / exponential.to(probs.device)).argmax())


def noise(seed: int, position: int, vocab_size: int) -> torch.Tensor:
    """Exponential noise [vocab], the same for the same seed and position whatever else is sampled."""
    generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed % 2**64, position])))
    return torch.from_numpy(np.maximum(generator.standard_exponential(vocab_size), 1e-300))  # 0 / 0 would be NaN


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprobs]:
    """Raw logprobs of given tokens [R] and of the `num_top` best, from logits [R, vocab]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=1) + 1
    best = logprobs.topk(num_top, dim=-1)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(top_ids, top_values, strict=True)))
        for token_id, logprob, rank, top_ids, top_values in zip(
            token_ids.tolist(), chosen[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist(),
            strict=True,
        )
    ]  # fmt: skip


def judge_prompt(request: Request, first: int, end: int, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Logprobs of the prompt tokens at first+1 .. that the logits at first .. predict."""
    assert request.params.prompt_logprobs is not None
    judged = request.token_ids[first + 1 : min(end + 1, request.num_prompt)]
    if not judged:
        return []
    token_ids = torch.tensor(judged, device=logits.device)
    return token_logprobs(logits[: len(judged)], token_ids, request.params.prompt_logprobs)
