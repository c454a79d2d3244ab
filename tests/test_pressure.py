"""A real model gives the same tokens under every pressure, and each test proves that the pressure was there."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm import LLM, RequestOutput, SamplingParams
from minivllm.events import Admitted, Evicted, Preempted, StepRan
from minivllm.trace import Trace

Build = Callable[[str], tuple[Path, PreTrainedModel]]
SHARED = [(11 * i + 5) % 320 for i in range(20)]
PROMPTS = [[(7 * i + 13 * j + 3) % 320 for j in range(3 + 5 * i % 23)] for i in range(26)]
PROMPTS += [[*SHARED, i, 2 * i, 77] for i in range(6)]  # six of the 32 share a prefix
# Greedy and sampled side by side: both must hold still.
PARAMS = [SamplingParams(temperature=1.1 * (i % 2), seed=i, max_tokens=12 + i % 9) for i in range(32)]


def engine(folder: Path, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 400, "block_size": 4, "max_model_len": 64}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


@cache
def calm(folder: Path) -> list[list[int]]:
    """Every prompt alone, in one piece, uncached, in a pool with room to spare."""
    llm = engine(folder, enable_prefix_caching=False, max_num_seqs=1)
    return [
        llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


def under_pressure(llm: LLM, **options: object) -> tuple[list[RequestOutput], Trace]:
    trace = Trace()
    stop_listening = llm.events.listen(trace)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, **options)  # type: ignore[arg-type]
    stop_listening()
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable
    return outputs, trace


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def widest_step(trace: Trace) -> int:
    return max(len(event.scheduled) for event in trace if isinstance(event, StepRan))


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "mistral"])
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_batch_of_32_at_any_block_size(reference_model: Build, family: str, block_size: int) -> None:
    folder, _ = reference_model(family)
    num_blocks = {1: 1800, 256: 40}.get(block_size, 600)
    outputs, trace = under_pressure(engine(folder, block_size=block_size, num_blocks=num_blocks))
    assert widest_step(trace) == 32
    assert tokens(outputs) == calm(folder)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_preempted(reference_model: Build, block_size: int) -> None:
    folder, _ = reference_model("llama-gqa")
    outputs, trace = under_pressure(engine(folder, block_size=block_size, num_blocks=1 + -(-80 // block_size)))
    assert sum(output.metrics.num_preemptions for output in outputs) == len(trace.of(Preempted)) > 0
    assert tokens(outputs) == calm(folder)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 33])
def test_chunked(reference_model: Build, chunk_tokens: int) -> None:
    folder, _ = reference_model("llama-gqa")
    outputs, trace = under_pressure(engine(folder, max_num_batched_tokens=chunk_tokens))
    chunks = [new for event in trace if isinstance(event, StepRan) for _, new, _ in event.scheduled]
    assert max(chunks) < max(map(len, PROMPTS)) or chunk_tokens == 33
    assert max(sum(new for _, new, _ in e.scheduled) for e in trace if isinstance(e, StepRan)) <= chunk_tokens
    assert tokens(outputs) == calm(folder)


def test_not_chunked(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    outputs, trace = under_pressure(engine(folder, enable_chunked_prefill=False, max_num_batched_tokens=64))
    first_chunks: dict[str, int] = {}
    for event in trace:
        for request_id, new, _ in event.scheduled if isinstance(event, StepRan) else ():
            first_chunks.setdefault(request_id, new)
    assert sorted(first_chunks.values()) == sorted(len(o.prompt_token_ids) - o.num_cached_tokens for o in outputs)
    assert tokens(outputs) == calm(folder)


def test_cached(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = engine(folder, num_blocks=600)
    for _ in range(2):
        outputs, _ = under_pressure(llm)
        assert tokens(outputs) == calm(folder)
    assert [output.num_cached_tokens for output in outputs] == [(len(prompt) - 1) // 4 * 4 for prompt in PROMPTS]


def test_cached_while_blocks_are_evicted(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = engine(folder, num_blocks=60, max_num_seqs=3)
    for _ in range(2):
        outputs, trace = under_pressure(llm)
        assert trace.of(Evicted)
        assert tokens(outputs) == calm(folder)
    assert sum(output.num_cached_tokens for output in outputs) > 0


def test_few_seats(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    outputs, trace = under_pressure(engine(folder, max_num_seqs=3))
    assert widest_step(trace) == 3
    assert tokens(outputs) == calm(folder)


def test_priorities_change_the_order_but_no_token(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = engine(folder, scheduling_policy="priority", num_blocks=25)
    outputs, trace = under_pressure(llm, priority=[-i for i in range(32)])
    assert trace.of(Preempted)
    admitted = [event.request_id for event in trace if isinstance(event, Admitted)]
    assert admitted[0] == outputs[-1].request_id
    assert tokens(outputs) == calm(folder)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-window", "mistral"])
def test_everything_at_once(reference_model: Build, family: str) -> None:
    folder, _ = reference_model(family)
    num_blocks = {"mistral": 23, "qwen2-window": 40}.get(family, 28)  # windows free blocks; a table for each group
    llm = engine(
        folder, scheduling_policy="priority", num_blocks=num_blocks, block_size=3, max_num_batched_tokens=9,
        max_num_seqs=9,
    )  # fmt: skip
    outputs, trace = under_pressure(llm, priority=[i % 3 for i in range(32)])
    assert trace.of(Preempted) and trace.of(Evicted)
    again, _ = under_pressure(llm)
    assert sum(output.num_cached_tokens for output in outputs + again) > 0
    assert tokens(outputs) == tokens(again) == calm(folder)


def test_the_same_run_twice_leaves_the_same_trace(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    hashes = [under_pressure(engine(folder, num_blocks=28, block_size=3))[1].state_hashes() for _ in range(2)]
    assert len(hashes[0]) > 20 and hashes[0] == hashes[1]
