"""Sliding windows free what no query will read again, in each group of layers for itself, and change no token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.config import ModelConfig
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.engine.tables import slot_of
from minivllm.engine_config import EngineConfig, capacity_tokens, most_blocks
from minivllm.errors import ConfigError, ModelError
from minivllm.events import BlocksDropped, Preempted, PrefixHit
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants
from minivllm.layer_groups import group_layers
from minivllm.request import Request
from minivllm.runner.kv_storage import block_bytes
from minivllm.weights import builtin_configs

Build = Callable[[str], tuple[Path, PreTrainedModel]]
WINDOW = 9  # of the mistral in conftest.py


@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_table_keeps_exactly_the_blocks_that_the_next_query_sees(window: int, block_size: int) -> None:
    engine, runner = fake_engine(
        group_windows=(window,), block_size=block_size, num_blocks=60, max_num_batched_tokens=5
    )
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
    engine, _ = fake_engine(group_windows=(8,), num_blocks=60, max_model_len=200)
    engine.add(fake_request("a", range(4), max_tokens=180, ignore_eos=True))
    most_held = 0
    while engine.has_work:
        engine.step()
        most_held = max(most_held, engine.kv.pool.num_usable - engine.kv.pool.num_free)
    assert most_held == 3  # 8 tokens and the new one: two blocks and a part at each end


def test_dropped_prefix_stays_cached_and_is_found() -> None:
    engine, _ = fake_engine(group_windows=(4,), num_blocks=30)
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
    assert llm.config.group_windows == (WINDOW,)
    prompt = [(7 * j + 3) % 320 for j in range(25)]
    with llm.record() as trace:
        [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), use_tqdm=False)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert output.outputs[0].token_ids == expected[0, 25:].tolist()
    assert bool(trace.of(BlocksDropped)) == (block_size < 54 - WINDOW)


def test_layers_that_see_all_keep_all(reference_model: Build) -> None:
    llm = LLM(reference_model("llama-gqa")[0], dtype="float32", num_blocks=40, block_size=4, max_model_len=64)
    assert llm.config.group_windows == (None,)


HYBRIDS = ["ministral-1to1", "qwen3-5to1", "qwen2-window"]
POOLS = {"ministral-1to1": 100, "qwen3-5to1": 200, "qwen2-window": 120}  # blocks of 3 for two or three requests
LOCAL = {"ministral-1to1": 9, "qwen3-5to1": 200, "qwen2-window": 7}
OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": {"max_num_batched_tokens": 7},
    "pressure": {"max_num_seqs": 8},
    "swap": {"preemption_mode": "swap", "swap_space": 0.01},
    "no cache": {"enable_prefix_caching": False},
    "whole prompts": {"enable_chunked_prefill": False},
    "radix: one table": {"prefix_cache": "radix"},
    "contiguous: one table": {"allocator": "contiguous"},
}


@pytest.mark.parametrize(
    ("windows", "group_windows", "places"),
    [
        ((None,) * 3, (None,), [(0, 0), (0, 1), (0, 2)]),
        ((4, 4), (4,), [(0, 0), (0, 1)]),
        ((4, 8), (8,), [(0, 0), (0, 1)]),  # nothing sees all: one table, as wide as the widest
        ((4, None, 4, None), (None, 4), [(1, 0), (0, 0), (1, 1), (0, 1)]),
        ((4, None, 4), (None, 4, 4), [(1, 0), (0, 0), (2, 0)]),
        ((None, None, None, 4), (None, None, None, 4), [(0, 0), (1, 0), (2, 0), (3, 0)]),
        ((4, 4, None, 6, 6, None, 6), (None, 4, 6, 6), [(1, 0), (1, 1), (0, 0), (2, 0), (2, 1), (0, 1), (3, 0)]),
    ],
)
def test_groups_have_as_many_layers_as_the_rarer_kind(
    windows: tuple[int | None, ...], group_windows: tuple[int | None, ...], places: list[tuple[int, int]]
) -> None:
    groups = group_layers(len(windows), windows)
    assert groups.windows == group_windows
    assert list(groups.places) == places


def test_gemma_3_1b_has_one_global_group_and_six_local_ones() -> None:
    groups = group_layers(26, tuple(None if layer % 6 == 5 else 512 for layer in range(26)))
    assert groups.windows == (None, *[512] * 6)
    assert groups.num_rows == 4
    assert len(set(groups.places)) == 26
    assert groups.layers[0] == [5, 11, 17, 23] and groups.layers[6] == [24, 25]
    assert sorted(layer for layers in groups.layers for layer in layers) == list(range(26))


@pytest.mark.parametrize("windows", [(None, 5), (None, 3, 8), (None, 1, None)])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_each_group_keeps_exactly_the_blocks_that_its_layers_see(
    windows: tuple[int | None, ...], block_size: int
) -> None:
    engine, runner = fake_engine(group_windows=windows, block_size=block_size, num_blocks=150, max_num_batched_tokens=5)
    request = fake_request("a", range(17), max_tokens=20)
    engine.add(request)
    while engine.has_work:
        engine.step()
        check_invariants(engine, runner)
        if request.is_finished:
            break
        for window, table in zip(windows, request.tables, strict=True):
            first_seen = 0 if window is None else max(0, request.num_computed - window + 1)
            is_kept = [block_id != NULL_BLOCK for block_id in table.block_ids]
            assert is_kept == [(index + 1) * block_size > first_seen for index in range(len(is_kept))]
    check_drained(engine)


@pytest.mark.parametrize("windows", [(None,), (None, 4), (None, 1, 9, 9), (None, None, 3)])
@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("budget", [1, 5, 64])
def test_longest_request_that_fits_runs_and_needs_what_is_said(
    windows: tuple[int | None, ...], block_size: int, budget: int
) -> None:
    usable = 40 * len(windows) // block_size + 2 * len(windows)
    longest = capacity_tokens(usable, block_size, windows, budget)
    assert most_blocks(longest, block_size, windows, budget) <= usable
    assert most_blocks(longest + 1, block_size, windows, budget) > usable
    engine, runner = fake_engine(
        group_windows=windows, block_size=block_size, num_blocks=usable + 1, max_num_batched_tokens=budget,
        max_model_len=longest,
    )  # fmt: skip
    for prompt in (range(longest - 2), range(3)):
        engine.add(fake_request(str(prompt), prompt, max_tokens=longest, ignore_eos=True))
    while engine.has_work:
        engine.step()
        check_invariants(engine, runner)
    check_drained(engine)


def test_hit_needs_of_a_local_group_only_what_its_window_reaches() -> None:
    engine, _ = fake_engine(group_windows=(None, 4), num_blocks=60)
    engine.add(fake_request("a", range(20), max_tokens=8, ignore_eos=True))
    while engine.has_work:
        engine.step()
    again = fake_request("b", range(20))
    hits: list[PrefixHit] = []
    engine.events.listen(lambda event: hits.append(event) if isinstance(event, PrefixHit) else None)
    engine.add(again)
    engine.step()
    assert again.num_cached == 16
    assert [[block_id != NULL_BLOCK for block_id in hit.block_ids] for hit in hits] == [
        [True] * 4,
        [False, False, False, True],
    ]


def test_hit_ends_where_a_local_group_lost_its_blocks() -> None:
    engine, _ = fake_engine(group_windows=(None, 6), num_blocks=60)
    engine.add(fake_request("a", range(24), max_tokens=1))
    engine.step()
    companions = engine.kv.companions.block_of
    entry = min(companions)  # serials count up: the first blocks' companion ..
    fifth = sorted(companions)[4]
    for key in (entry, fifth):
        engine.kv._evict(companions[key])
    probe = fake_request("b", range(24))
    assert engine.kv.match(probe).num_tokens == 16  # .. is outside the window of the longest, the fifth's is not


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_bytes_follow_the_shorter_of_context_and_window(reference_model: Build, family: str, block_size: int) -> None:
    llm = LLM(reference_model(family)[0], dtype="float32", num_blocks=1300 // block_size, block_size=block_size)
    config, groups = llm.model_config, llm.storage.groups
    layer_bytes = config.kv_bytes_per_token // config.num_layers  # of one token
    request = Request("a", list(range(40)), 40, SamplingParams(max_tokens=20, ignore_eos=True), 20)
    llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
        if request.is_finished:
            break
        held = llm.engine.kv.pool.num_usable - llm.engine.kv.pool.num_free
        context = request.num_computed
        seen = [context if window is None else min(context, window - 1) for window in config.windows]
        least = sum(tokens * layer_bytes for tokens in seen)
        # Whole blocks at both ends of a window, at one end of a whole table; rows that stay unused.
        most = sum(
            tokens + (2 if window else 1) * block_size for tokens, window in zip(seen, config.windows, strict=True)
        )
        num_slack_rows = len(groups.windows) * groups.num_rows - config.num_layers
        most_bytes = (most + num_slack_rows * (LOCAL[family] + 2 * block_size)) * layer_bytes
        assert least <= held * block_bytes(config, block_size, groups) <= most_bytes
    assert llm.storage.data.nbytes == llm.config.num_blocks * block_bytes(config, block_size, groups)


def test_a_slot_shows_what_its_group_s_layer_stored(reference_model: Build) -> None:
    llm = LLM(reference_model("ministral-1to1")[0], dtype="float32", block_size=4, num_blocks=60)
    request = Request("a", list(range(6)), 6, SamplingParams(max_tokens=9, ignore_eos=True), 9)
    llm.engine.add(request)
    llm.engine.step()
    for layer, (group, row) in enumerate(llm.storage.groups.places):
        slot = slot_of(5, request.tables[group].block_ids, 4)
        k, _ = llm.storage.slot(row, slot)
        assert torch.equal(k, llm.storage.layers[layer].k[slot // 4, slot % 4]) and k.any()
        assert llm.trace_header()["layer_groups"][group][row] == layer  # type: ignore[index]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_local_and_global_layers_give_the_tokens_of_transformers(
    reference_model: Build, family: str, name: str
) -> None:
    folder, model = reference_model(family)
    is_apart = "one table" not in name
    llm = LLM(
        folder, dtype="float32", block_size=3, max_model_len=60, num_blocks=POOLS[family] if is_apart else 45,
        **OPTIONS[name],
    )  # fmt: skip
    assert (len(llm.config.group_windows) > 1) == is_apart
    prompts = [[(7 * j + 3 + (j > 20) * i) % 320 for j in range(25 + i)] for i in range(4)] * 2
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with llm.record() as trace:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
    assert trace.of(Preempted) or name in ("chunks", "contiguous: one table")
    assert bool(trace.of(BlocksDropped)) == is_apart
    assert bool(trace.of(PrefixHit)) == (name not in ("no cache", "contiguous: one table"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_windows": (None, 4), "allocator": "buddy", "enable_prefix_caching": False}, "use allocator='paged'"),
        ({"group_windows": (None, 4), "prefix_cache": "radix"}, "use prefix_cache='hash'"),
        ({"group_windows": (4, 4)}, "the first of several groups must see all tokens, not 4"),
        ({"group_windows": ()}, "windows of at least 1 token or None"),
        ({"group_windows": (0,)}, "windows of at least 1 token or None"),
    ],
)
def test_windows_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        EngineConfig(num_blocks=200, max_model_len=64, **options)
    assert "\n" not in str(caught.value)


HYBRID = {**builtin_configs()["tiny-hybrid"]}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sliding_window": None}, "layer_types has sliding_attention, but sliding_window does not say how wide"),
        ({"layer_types": "sliding_attention"}, "layer_types must be a list with the kind of each layer"),
        ({"layer_types": []}, "layer_types must be a list with the kind of each layer, not ..$"),
        ({"layer_types": ["sliding_attention"] * 11}, "layer_types names 11 layers, the model has 12"),
        ({"layer_types": ["chunked_attention"] * 12}, "layer 0 has attention of the kind 'chunked_attention'"),
        ({"sliding_window": 0}, "sliding_window must be at least 1 token or null, not 0"),
    ],
)
def test_layer_types_that_cannot_be_are_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ModelError, match=line) as caught:
        ModelConfig.from_json(HYBRID | changes)
    assert "\n" not in str(caught.value)


def test_pool_too_small_for_all_groups_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"pool of 5 blocks of 1 tokens holds .* each group of layers .6.: raise"):
        LLM("tiny-hybrid", load_format="dummy", block_size=1, num_blocks=6)
