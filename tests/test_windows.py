"""Sliding windows free what no query will read again, and change no token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.events import BlocksDropped
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants

Build = Callable[[str], tuple[Path, PreTrainedModel]]
WINDOW = 9  # of the mistral in conftest.py


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_table_keeps_exactly_the_blocks_that_the_next_query_sees(window: int, block_size: int) -> None:
    engine, runner = fake_engine(window=window, block_size=block_size, num_blocks=60, max_num_batched_tokens=5)
    request = fake_request("a", range(17), max_tokens=20)
    engine.add(request)
    while engine.has_work:
        engine.step()
        check_invariants(engine, runner)
        if request.is_finished:
            break
        first_seen = max(0, request.num_computed - window + 1)  # by a query at num_computed
        is_kept = [block_id != NULL_BLOCK for block_id in request.block_ids]
        assert is_kept == [(index + 1) * block_size > first_seen for index in range(len(is_kept))]
    check_drained(engine)


def test_memory_of_a_long_answer_is_bounded_by_the_window() -> None:
    engine, _ = fake_engine(window=8, num_blocks=60, max_model_len=200)
    engine.add(fake_request("a", range(4), max_tokens=180, ignore_eos=True))
    most_held = 0
    while engine.has_work:
        engine.step()
        most_held = max(most_held, engine.kv.pool.num_usable - engine.kv.pool.num_free)
    assert most_held == 3  # 8 tokens and the new one: two blocks and a part at each end


def test_dropped_prefix_stays_cached_and_is_found() -> None:
    engine, _ = fake_engine(window=4, num_blocks=30)
    engine.add(fake_request("a", range(20), max_tokens=8))
    while engine.has_work:
        engine.step()
    again = fake_request("b", range(20))
    engine.add(again)
    engine.step()
    assert again.num_cached == 16


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_real_windows_free_blocks_and_give_the_tokens_of_transformers(reference_model: Build, block_size: int) -> None:
    folder, model = reference_model("mistral")
    llm = LLM(folder, dtype="float32", block_size=block_size, num_blocks=1 + 80 // block_size, max_model_len=64)
    assert llm.config.window == WINDOW
    prompt = [(7 * j + 3) % 320 for j in range(25)]
    with llm.record() as trace:
        [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert output.outputs[0].token_ids == expected[0, 25:].tolist()
    assert bool(trace.of(BlocksDropped)) == (block_size < 54 - WINDOW)


@pytest.mark.parametrize("family", ["qwen2-window", "llama-gqa"])
def test_one_layer_that_sees_all_keeps_all(reference_model: Build, family: str) -> None:
    llm = LLM(reference_model(family)[0], dtype="float32", num_blocks=40, block_size=4, max_model_len=64)
    assert llm.config.window is None
