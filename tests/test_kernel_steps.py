"""The stepped kernel: each turn that it reports is held against float64 attention over keys looked up by the test."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import exp, isfinite, log
from pathlib import Path

import numpy as np
import pytest
import torch
from minivllm_kernels.reference import paged_attention_twin

from minivllm.course.kernel_turns import LOG2_E, End, KernelSteps, Stage, Turn, distinct_blocks
from minivllm.engine.tables import slot_of
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab import kernel_steps as lab
from minivllm.lab.kernel_steps import KernelInputs, example_inputs, kernel_steps
from tests.kernel_cases import HAS_GPU

needs_interpreter = pytest.mark.skipif(HAS_GPU, reason="with a GPU this process compiles its kernels")


@pytest.fixture(scope="module")
def inputs() -> KernelInputs:
    return example_inputs()


@pytest.fixture(scope="module")
def steps(inputs: KernelInputs) -> KernelSteps:
    return kernel_steps(inputs)


def keys_of(inputs: KernelInputs, turn: Turn) -> tuple[np.ndarray, np.ndarray]:
    """K and V of the tokens of a turn, found by position, not by what the turn says; [tokens, D] in float64."""
    size, length = inputs.k_cache.shape[1], int(inputs.num_tokens[turn.request])
    tokens = range(turn.start, min(turn.start + 16, length))
    places = [(int(inputs.block_table[turn.request, t // size]), t % size) for t in tokens]
    k, v = (
        np.array([cache[block, offset, turn.kv_head].double().numpy() for block, offset in places])
        for cache in (inputs.k_cache, inputs.v_cache)
    )
    return k, v


def segments(steps: KernelSteps) -> Iterator[tuple[list[Turn], End]]:
    """The turns of one program on one pair, and the end that follows them."""
    turns: list[Turn] = []
    for stage in steps.stages:
        if isinstance(stage, Turn):
            turns.append(stage)
        else:
            yield turns, stage
            turns = []


def expected(inputs: KernelInputs) -> torch.Tensor:
    starts = torch.arange(len(inputs.q) + 1)
    return paged_attention_twin(*inputs.tensors, starts)


def test_each_turn_is_the_online_softmax_of_its_keys_in_float64(inputs: KernelInputs, steps: KernelSteps) -> None:
    """Not a running sum of our own: after each turn, one softmax over all keys of the segment so far."""
    num_turns = 0
    for turns, _ in segments(steps):
        for upto in range(1, len(turns) + 1):
            turn, parts = turns[upto - 1], [keys_of(inputs, t) for t in turns[:upto]]
            k, v = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            for row in range(2):
                q = inputs.q[turn.request, turn.kv_head * 2 + row].double().numpy()
                scores = k @ q / 8  # the root of head size 64
                peak, weights = scores.max(), np.exp(scores - scores.max())
                assert turn.peak[row] / LOG2_E == pytest.approx(peak, abs=1e-5)
                assert turn.total[row] == pytest.approx(weights.sum(), rel=1e-5)
                np.testing.assert_allclose(turn.output[row], weights @ v, atol=2e-5)
                newest = scores[-len(turn.slots) :]
                np.testing.assert_allclose(np.array(turn.scores[row]) / LOG2_E, newest, atol=1e-5)
            num_turns += 1
    assert num_turns == len(steps.turns) == 12  # 2 + 3 + 1 tiles, 2 KV heads


def test_slots_are_those_of_the_engine_and_addresses_lead_to_the_keys(inputs: KernelInputs, steps: KernelSteps) -> None:
    flat = inputs.k_cache.flatten()
    for turn in steps.turns:
        table = inputs.block_table[turn.request].tolist()
        tokens = range(turn.start, turn.start + len(turn.slots))
        assert list(turn.slots) == [slot_of(token, table, 8) for token in tokens]
        found = np.array([flat[offset : offset + 64].double().numpy() for offset in turn.k_offsets])
        assert np.array_equal(found, keys_of(inputs, turn)[0])


def test_a_tile_spans_blocks_and_the_last_one_is_masked(steps: KernelSteps) -> None:
    first, tail = steps.turns[:2]
    assert distinct_blocks(first, 8) == [11, 8] and len(first.slots) == 16
    assert distinct_blocks(tail, 8) == [10] and len(tail.slots) == 7  # 23 tokens: 9 places of the tile are empty
    assert all(isfinite(x) for end in steps.ends for row in end.output for x in row)  # empty slots hold NaN


def test_each_key_is_read_once_for_all_query_heads_of_its_group(steps: KernelSteps) -> None:
    read = [offset for turn in steps.turns for offset in turn.k_offsets]
    assert len(read) == len(set(read)) == 2 * (23 + 40 + 9)
    assert all(len(turn.scores) == len(turn.peak) == 2 == steps.case.group for turn in steps.turns)


def test_programs_share_the_tiles_equally_and_cut_pairs_where_they_must(steps: KernelSteps) -> None:
    counts = [sum(turn.program == program for turn in steps.turns) for program in range(4)]
    assert counts == [steps.case.share] * 4 == [3] * 4
    cut = {(end.request, end.kv_head) for end in steps.ends if end.slot is not None}
    assert cut == {(0, 1), (1, 0), (1, 1)}
    assert steps.case.pairs == [(0, 0, 2), (0, 1, 2), (1, 0, 3), (1, 1, 3), (2, 0, 1), (2, 1, 1)]


def test_parts_merge_to_the_reference_and_whole_pairs_are_it(inputs: KernelInputs, steps: KernelSteps) -> None:
    wanted, parts = expected(inputs).numpy(), {end.slot: end for end in steps.ends if end.slot is not None}
    seen = 0
    for end in steps.ends:
        if end.slot is not None and not end.merged_slots:
            continue
        merged = [parts[slot] for slot in end.merged_slots] or [end]
        for row in range(2):
            sums = [exp(part.lse[row] / LOG2_E) for part in merged]
            output = sum(s * np.array(part.output[row]) for s, part in zip(sums, merged, strict=True)) / sum(sums)
            np.testing.assert_allclose(output, wanted[end.request, end.kv_head * 2 + row], atol=1e-5)
        seen += 1
    assert seen == 6 and sum(len(end.merged_slots) for end in steps.ends) == 6
    np.testing.assert_allclose(np.array(steps.out), wanted, atol=1e-5)


def test_an_end_stores_the_log_of_its_segments_sum(steps: KernelSteps) -> None:
    for turns, end in segments(steps):
        assert {(t.program, t.request, t.kv_head) for t in turns} == {(end.program, end.request, end.kv_head)}
        for row in range(2):
            wanted = turns[-1].peak[row] / LOG2_E + log(turns[-1].total[row])
            assert end.lse[row] / LOG2_E == pytest.approx(wanted, abs=1e-5)


def test_shuffled_blocks_change_slots_and_nothing_else(inputs: KernelInputs, steps: KernelSteps) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = KernelInputs(
        inputs.q, inputs.k_cache[order], inputs.v_cache[order], order.argsort()[inputs.block_table.long()].int(),
        inputs.num_tokens,
    )  # fmt: skip
    found = kernel_steps(moved)
    assert found.out == steps.out  # every bit
    for new, old in zip(found.stages, steps.stages, strict=True):
        if isinstance(new, Turn) and isinstance(old, Turn):
            assert new.slots != old.slots and (new.scores, new.peak, new.total, new.output) == (
                old.scores, old.peak, old.total, old.output,
            )  # fmt: skip


def test_blocks_that_are_stored_head_by_head_have_the_same_slots(inputs: KernelInputs, steps: KernelSteps) -> None:
    k, v = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (inputs.k_cache, inputs.v_cache))
    found = kernel_steps(replace(inputs, k_cache=k, v_cache=v))
    assert found.out == steps.out
    assert [turn.slots for turn in found.turns] == [turn.slots for turn in steps.turns]


def test_one_request_alone_is_split_among_all_programs() -> None:
    given = example_inputs()
    alone = KernelInputs(given.q[1:2, :2], given.k_cache[:, :, :1], given.v_cache[:, :, :1], given.block_table[1:2],
                         given.num_tokens[1:2])  # fmt: skip
    found = kernel_steps(KernelInputs.of(*alone.tensors))
    assert [turn.program for turn in found.turns] == [0, 1, 2]  # 40 tokens: three tiles
    np.testing.assert_allclose(np.array(found.out), expected(alone).numpy(), atol=1e-5)


def test_saved_steps_are_the_same_to_seven_digits(steps: KernelSteps, tmp_path: Path) -> None:
    loaded = KernelSteps.load(steps.save(tmp_path / "steps.json"))
    assert loaded.case == steps.case and loaded.origin == steps.origin
    assert close(loaded.stages, steps.stages)
    assert KernelSteps.load(loaded.save(tmp_path / "again.json")) == loaded


def test_the_recording_is_what_the_kernel_does_today(steps: KernelSteps) -> None:
    recorded = KernelSteps.load(lab.RECORDING)
    assert recorded.case == steps.case and close(recorded.stages, steps.stages)
    assert {"machine", "torch", "commit", "seed", "command"} <= set(recorded.facts)
    assert lab.RECORDING.stat().st_size < 100_000


@needs_interpreter
def test_another_process_finds_the_same_and_leaves_this_one_alone(inputs: KernelInputs, steps: KernelSteps) -> None:
    before = dict(os.environ)
    found = lab.step_elsewhere(inputs)
    assert dict(os.environ) == before
    assert close(found.stages, steps.stages) and found.origin == steps.origin


def test_another_process_that_fails_says_why_in_one_line(inputs: KernelInputs) -> None:
    odd = replace(inputs, q=inputs.q[:, :3])
    with pytest.raises(MiniVLLMError, match="3 query heads do not divide among 2 KV heads") as caught:
        lab.step_elsewhere(odd)
    assert "\n" not in str(caught.value)


def test_a_padded_row_has_nothing_to_step_through(inputs: KernelInputs) -> None:
    with pytest.raises(MiniVLLMError, match="every request needs a token or more"):
        kernel_steps(replace(inputs, num_tokens=torch.tensor([23, 0, 9], dtype=torch.int32)))


def test_without_triton_the_recording_answers_and_says_so(
    inputs: KernelInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    other = replace(inputs, q=inputs.q * 2)
    given, found = lab.stepped(other)
    assert found.origin.startswith("recorded: this machine has no triton")
    assert torch.equal(given.q, inputs.q)  # the recording's inputs, not the caller's
    np.testing.assert_allclose(np.array(found.out), expected(given).numpy(), atol=1e-5)


def test_where_the_interpreter_fails_the_recording_answers_and_gives_the_reason(
    inputs: KernelInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "is_interpreting", lambda: False)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    given, found = lab.stepped(replace(inputs, q=inputs.q * 2))
    assert found.origin.startswith("recorded: the interpreter's process ended with 1 (it said nothing), so this is")
    assert torch.equal(given.q, inputs.q)


def test_compiled_kernels_cannot_be_watched(inputs: KernelInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "is_interpreting", lambda: False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1 before Python starts"):
        lab.step_here(inputs)


@needs_interpreter
def test_watching_gives_the_trace_function_back(inputs: KernelInputs) -> None:
    def tracer(*_: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        lab.step_here(inputs)
        after = sys.gettrace()
    finally:
        sys.settrace(before)
    assert after is tracer


@needs_interpreter
def test_the_command_writes_the_example(tmp_path: Path, steps: KernelSteps) -> None:
    path = tmp_path / "steps.json"
    assert lab.main(["--output", str(path)]) == 0
    loaded = KernelSteps.load(path)
    assert close(loaded.stages, steps.stages)
    assert loaded.facts["command"] == f"python -m minivllm.lab.kernel_steps --output {path}"


@pytest.mark.parametrize("text", ["", "[]", '{"stages": [], "case": {"tile": 16}}', '{"case": 1}'])
def test_other_files_are_named_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(MiniVLLMError, match=r"odd\.json: these are no kernel steps") as caught:
        KernelSteps.load(path)
    assert "\n" not in str(caught.value)


def close(found: tuple[Stage, ...], wanted: tuple[Stage, ...]) -> bool:
    """The same stages: whole numbers equal, floats to five digits."""
    return len(found) == len(wanted) and all(
        type(one) is type(other) and near(vars(one), vars(other)) for one, other in zip(found, wanted, strict=True)
    )


def near(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(near, one, other))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=1e-5, abs=1e-5)
    return one == other
