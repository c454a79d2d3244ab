"""What verification costs on a GPU: decode speed with planted acceptance against speed without drafts, by batch size.

The weights are random, with embeddings so large that the next token is certain: bf16 sums differ with the number of
rows, and a continuation would part from what was planted at the first near-tie. Kernels do the same work.

More than 512 rows have no graph: drafts are cut to what it holds, which the mean accepted length then shows.

    formula     (1 - alpha^(k+1)) / (1 - alpha)  x  t(B rows) / t(B (k+1) rows)      t: a step alone on the device
                k: the drafts of a request that fit

Both engines hold the same prompts in their prefix caches; a figure is the best of some repetitions taken in turn.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from random import Random
from typing import Any

import torch

from minivllm.bench.planted import Key, PlantedProposer, expected_tokens
from minivllm.engine.plan import StepPlan
from minivllm.llm import LLM
from minivllm.request import Request, SamplingParams
from minivllm.runner.draft_rows import DraftRows, shortened
from minivllm.runner.step_buffers import MOST_ROWS
from minivllm.speculative.proposer import Draft
from minivllm.text_engine import Generation

EMBEDDING_STD = 100.0  # beside which what 36 layers of random weights add is noise
BLOCK_SIZE = 16
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

SILENT = PlantedProposer({}, 0, 2)

Row = dict[str, Any]  # of a result file


@dataclass(frozen=True)
class Load:
    """What both engines are given."""

    model: str
    batches: Sequence[int] = BATCHES
    alphas: Sequence[float] = (0.6, 0.8)
    num_drafts: int = 4
    context: int = 512
    num_new: int = 96  # tokens of the first request to get so many: then the clock stops
    repeats: int = 2
    seed: int = 0
    dtype: str = "bfloat16"

    @property
    def max_tokens(self) -> int:
        """Beyond what is timed, so that no request ends before."""
        return self.num_new + 8 * (self.num_drafts + 1)

    def drafts_that_fit(self, batch: int) -> int:
        """Of a request: what is left of its drafts in a step with as many rows as the engine's largest."""
        return min(self.num_drafts, max(MOST_ROWS, *self.batches) // batch - 1)

    @property
    def num_blocks(self) -> int:
        """All requests, and half as much again for prompts that wait in the prefix cache."""
        return 1 + max(self.batches) * -(-(self.context + self.max_tokens) // BLOCK_SIZE) * 3 // 2

    @cached_property
    def prompts(self) -> list[list[int]]:
        random = Random(self.seed)
        return [[random.randrange(300) for _ in range(self.context)] for _ in range(max(self.batches))]

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=True, detokenize=False)


@dataclass(frozen=True)
class Timed:
    """A decode phase: tokens per second, and tokens of a request's step with drafts."""

    tokens_per_s: float
    mean_accepted_length: float


def measure_planted(load: Load, tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> list[Row]:
    """A row for each batch size and alpha."""
    off = certain_engine(load, None)
    outputs = off.generate(load.prompts, load.params, use_tqdm=False)
    continuations: dict[Key, list[int]] = {
        (tuple(prompt), None): list(output.outputs[0].token_ids)
        for prompt, output in zip(load.prompts, outputs, strict=True)
    }
    on = certain_engine(load, {"method": "ngram", "num_speculative_tokens": load.num_drafts})
    plant(on, SILENT)  # while the prompts come into its cache
    on.generate(load.prompts, replace(load.params, max_tokens=1), use_tqdm=False)
    vocab_size, rows = on.model_config.vocab_size, list[Row]()
    for batch in load.batches:
        step_us = device_us(on, load, batch)
        runs: dict[float | None, tuple[LLM, PlantedProposer]] = {None: (off, SILENT)}
        for alpha in load.alphas:
            runs[alpha] = (on, PlantedProposer(continuations, alpha, vocab_size, load.seed))
        best: dict[float | None, Timed] = {}
        for _ in range(load.repeats):
            for rate, (llm, proposer) in runs.items():
                plant(llm, proposer)
                found = decode(llm, load, batch, continuations)
                if rate not in best or found.tokens_per_s > best[rate].tokens_per_s:
                    best[rate] = found
        rows += [row(load, batch, alpha, best[None], best[alpha], step_us) for alpha in load.alphas]
        for each in rows[-len(load.alphas) :]:
            tell(" ".join(f"{name}={value}" for name, value in each.items()))
    return rows


def row(load: Load, batch: int, alpha: float, off: Timed, on: Timed, step_us: tuple[float, float]) -> Row:
    """A row of the result file."""
    alone_us, verify_us = step_us
    return {
        "model": load.model, "batch": batch, "context": load.context, "draft_length": load.num_drafts,
        "planted_alpha": alpha, "method": "planted",
        "tokens_per_s_on": round(on.tokens_per_s, 1), "tokens_per_s_off": round(off.tokens_per_s, 1),
        "speedup": round(on.tokens_per_s / off.tokens_per_s, 3),
        "formula_speedup": round(expected_tokens(alpha, load.drafts_that_fit(batch)) * alone_us / verify_us, 3),
        "mean_accepted_length": round(on.mean_accepted_length, 3),
        "step_us": round(alone_us, 1), "verify_step_us": round(verify_us, 1),
    }  # fmt: skip


def certain_engine(load: Load, speculative_config: dict[str, object] | None) -> LLM:
    """An engine of random weights that is certain of each next token."""
    llm = LLM(
        load.model, load_format="dummy", dtype=load.dtype, max_num_seqs=max(load.batches), seed=load.seed,
        max_model_len=load.context + load.max_tokens + 1, num_blocks=load.num_blocks, block_size=BLOCK_SIZE,
        speculative_config=speculative_config, show_progress=False,
    )  # fmt: skip
    decoder = llm.runner.model
    with torch.inference_mode():
        decoder.embed.weight.mul_(EMBEDDING_STD / float(decoder.embed.weight[:1000].float().std()))
        if decoder.lm_head.weight is not decoder.embed.weight:
            decoder.lm_head.weight.copy_(decoder.embed.weight)
    return llm


def plant(llm: LLM, proposer: PlantedProposer) -> None:
    """Let this proposer draft from now on, where anybody does."""
    if llm.runner.speculation is not None:
        llm.runner.speculation.proposers = {"ngram": proposer}


def decode(llm: LLM, load: Load, batch: int, continuations: dict[Key, list[int]]) -> Timed:
    """Time the decode phase: from when all have a token until one has `num_new` more."""
    text, prompts = llm.text_engine, load.prompts[:batch]
    groups = [text.add(text.check(prompt), load.params) for prompt in prompts]
    while not all(request.num_output for request in requests_of(groups)):
        text.step()
    requests, before = requests_of(groups), counts(llm)
    first = [request.num_output for request in requests]
    started_s = time.perf_counter()
    while max(request.num_output for request in requests) < first[0] + load.num_new:
        text.step()
    seconds = time.perf_counter() - started_s
    num_tokens = sum(request.num_output for request in requests) - sum(first)
    rounds, accepted = (after - was for after, was in zip(counts(llm), before, strict=True))
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output_token_ids == continuations[tuple(prompt), None][: request.num_output], "another token"
    for group in groups:
        text.abort(group)
    return Timed(num_tokens / seconds, 1 + accepted / rounds if rounds else 1.0)


def requests_of(groups: Sequence[Generation]) -> list[Request]:
    return [group.samples[0].request for group in groups]


def counts(llm: LLM) -> tuple[int, int]:
    stats = llm.engine.speculation
    return stats.num_rounds, stats.num_accepted


def device_us(llm: LLM, load: Load, batch: int, repeats: int = 10) -> tuple[float, float]:
    """Microseconds of a step on the device alone, without drafts and with all of them."""
    text, fused = llm.text_engine, llm.runner.fused
    assert fused is not None, "only fused steps have graphs"
    plant(llm, SILENT)
    groups = [text.add(text.check(prompt), load.params) for prompt in load.prompts[:batch]]
    while not all(request.num_output for request in requests_of(groups)):
        text.step()
    requests = requests_of(groups)
    assert all(llm.engine.kv.grow(request, 1 + load.num_drafts) for request in requests)
    plan, found = StepPlan(0, [(request, 1) for request in requests], [], []), list[float]()
    all_drafts = {request.id: Draft([1] * load.num_drafts) for request in requests}
    for drafts in ({}, shortened(all_drafts, fused.buffers.limits.max_rows - batch)):
        with torch.inference_mode():
            rows = DraftRows.of(fused.buffers.rows.seat(plan.scheduled), drafts)
            fused.buffers.load_singles(fused.buffers.rows.requests, fused.decode.padded(rows.count), rows)
            found.append(timed_us(partial(fused.decode.run, rows.count), repeats))
    for group in groups:
        text.abort(group)
    return found[0], found[1]


def timed_us(run: Callable[[], object], repeats: int) -> float:
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats * 1e3
