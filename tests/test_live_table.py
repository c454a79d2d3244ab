"""The engine behind the block table: any block size of the slider, the same tokens, and the bytes of a slot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from minivllm import LLM
from minivllm.lab.invariants import check_invariants
from minivllm.lab.live_table import GREEDY, LiveTable, resized

Build = Callable[[str], tuple[Path, PreTrainedModel]]
PROMPT = list(range(3, 24))


@pytest.fixture
def llm(reference_model: Build) -> LLM:
    folder, _ = reference_model("llama-gqa")
    return LLM(folder, dtype="float32", num_blocks=24, block_size=8)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 32])
def test_another_block_size_gives_the_same_tokens(llm: LLM, block_size: int) -> None:
    room = LiveTable(llm)
    [wanted] = llm.generate([PROMPT], GREEDY, use_tqdm=False)
    said = room.restart(str(block_size))
    assert said == f"a new pool: {184 // block_size} blocks of {block_size}; add a request"
    assert room.llm.config.block_size == block_size and room.llm.runner.model is llm.runner.model
    [found] = room.llm.generate([PROMPT], GREEDY, use_tqdm=False)
    assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
    check_invariants(room.llm.engine)


def test_back_at_the_first_block_size_there_is_the_first_pool(llm: LLM) -> None:
    room = LiveTable(llm)
    for block_size in ("32", "8"):
        room.restart(block_size)
    assert room.llm.config.capacity_tokens == 184 and room.llm is not llm


def test_a_slot_s_bytes_are_those_of_the_layer_s_tensor(llm: LLM) -> None:
    small = resized(llm, 4, 64)
    room = LiveTable(small)
    generation = small.text_engine.add(small.text_engine.check(PROMPT), GREEDY)
    small.text_engine.step()
    block_id = generation.samples[0].request.block_ids[1]
    found = room.read_slot(1, 4 * block_id + 2)
    k = small.storage.layers[1].k
    assert found.byte_offset == (4 * block_id + 2) * k.stride(1) * k.itemsize
    np.testing.assert_array_equal(np.array(found.k, np.float32), k[block_id, 2].numpy())
    assert np.abs(found.k).max() > 0
    small.text_engine.abort(generation)
