"""Rows that begin with the same blocks: found as by brute force, and read once without changing a token."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minivllm_kernels.shared_prefix_decode import shared_prefix_decode

from minivllm import LLM, SamplingParams
from minivllm.request import BlockTable, Request
from minivllm.runner import shared_prefix
from minivllm.runner.batch_rows import BatchRows
from minivllm.runner.decode_graphs import batch_sizes, shared_sizes
from minivllm.runner.shared_prefix import (
    MOST_GROUPS,
    Group,
    SharedPrefixes,
    begins_with,
    best_groups,
    groups_at,
    join_copies,
)
from tests.kernel_cases import HAS_GPU
from tests.test_fused import GREEDY, drive, engine, folders, fused, interpreted, plain, tokens

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
folders, fused, interpreted = folders, fused, interpreted  # fixtures, by their names
PREFIX = [*range(60, 110)]  # three blocks and two tokens
PROMPTS = [[*PREFIX, *range(200 + 7 * i, 201 + 8 * i)] for i in range(5)]
LEAST_SAVED_BYTES, NEVER = shared_prefix.LEAST_SAVED_BYTES, 2**62


def some_tables(random: Random) -> tuple[np.ndarray, np.ndarray]:
    """Tables that grow out of each other at random places, with what others left behind their ends."""
    tables: list[list[int]] = []
    fresh = iter(range(1, 10_000))
    for _ in range(random.randint(1, 40)):
        parent = random.choice(tables) if tables and random.random() < 0.7 else []
        kept = random.randint(0, len(parent))
        tables.append(parent[:kept] + [next(fresh) for _ in range(random.randint(1, 6))][: 80 - kept])
    table = np.array([[random.randrange(1, 30) for _ in range(80)] for _ in tables], np.int32)
    for row, held in enumerate(tables):
        table[row, : len(held)] = held
    return table, np.array([len(held) for held in tables])


def by_brute_force(table: np.ndarray, num_blocks: np.ndarray, depth: int) -> dict[tuple[int, ...], int]:
    """Rows that share `depth` blocks and have one more each, and how many they share."""
    heads = [row[: count - 1] for row, count in zip(table.tolist(), num_blocks, strict=True)]
    by_head: dict[tuple[int, ...], list[int]] = {}
    for row, head in enumerate(heads):
        if len(head) >= depth:
            by_head.setdefault(tuple(head[:depth]), []).append(row)
    groups = [rows for rows in by_head.values() if len(rows) > 1]
    return {tuple(rows): num_common([heads[row] for row in rows]) for rows in groups}


def num_common(heads: list[list[int]]) -> int:
    columns = enumerate(zip(*heads, strict=False))
    return next((place for place, ids in columns if len(set(ids)) > 1), min(map(len, heads)))


def num_saved(groups: dict[tuple[int, ...], int]) -> int:
    return sum(sorted((len(rows) - 1) * length for rows, length in groups.items())[-MOST_GROUPS:])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32).map(Random), st.integers(1, 4))
def test_groups_are_those_of_brute_force(random: Random, least_blocks: int) -> None:
    table, num_blocks = some_tables(random)
    expected = [by_brute_force(table, num_blocks, depth) for depth in range(80)]
    for depth in range(1, 80):
        found = {tuple(group.rows.tolist()): group.num_blocks for group in groups_at(table, num_blocks, depth)}
        assert found.items() <= expected[depth].items() and num_saved(found) == num_saved(expected[depth])
    groups = best_groups(table, num_blocks, least_blocks)
    saved = sum(group.num_saved for group in groups)
    members = [row for group in groups for row in group.rows.tolist()]
    assert len(members) == len(set(members)) and len(groups) <= MOST_GROUPS
    assert num_saved(expected[least_blocks]) <= saved <= max(map(num_saved, expected[least_blocks:]))


def test_a_long_prefix_of_some_beats_a_short_one_of_all() -> None:
    table = np.arange(8 * 50, dtype=np.int32).reshape(8, 50)
    table[:, :4] = table[0, :4]
    table[:4, 4:40], table[4:, 4:40] = table[0, 4:40], table[7, 4:40]
    groups = best_groups(table, np.full(8, 50), 4)
    assert [(group.rows.tolist(), group.num_blocks) for group in groups] == [([0, 1, 2, 3], 40), ([4, 5, 6, 7], 40)]
    table[4:] = np.arange(4 * 50).reshape(4, 50) + 1000
    table[4:, :4] = table[0, :4]
    assert [(g.rows.tolist(), g.num_blocks) for g in best_groups(table, np.full(8, 6), 4)] == [(list(range(8)), 4)]


def test_of_more_groups_than_there_is_room_for_the_shortest_are_left_out() -> None:
    table = np.arange(40 * 50, dtype=np.int32).reshape(40, 50)
    table[20:, :15] = table[:20, :15]
    lengths = np.array([2 + row % 13 for row in range(40)])
    lengths[20:] = lengths[:20]
    found = [group.num_blocks for group in best_groups(table, lengths, 1)]
    assert found == sorted(lengths[:20] - 1, reverse=True)[:MOST_GROUPS]


def test_groups_follow_whoever_comes_and_goes_and_are_looked_for_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, prefixes, looks = BatchRows(6, 20), SharedPrefixes(6, 16, LEAST_SAVED_BYTES // 64, "cpu"), list[int]()

    def look_and_note(table: np.ndarray, num_blocks: np.ndarray, least_blocks: int) -> list[Group]:
        looks.append(least_blocks)
        return best_groups(table, num_blocks, least_blocks)

    monkeypatch.setattr(shared_prefix, "best_groups", look_and_note)
    known = {name: Request(name, [1], 1, SamplingParams(), 1) for name in "abcde"}

    def look(**tables: list[int]) -> dict[str, int]:
        """Shared tokens of every request in a group, where a step with these tables reads by groups."""
        for name, table in tables.items():
            known[name].tables = [BlockTable(table)]
        rows.seat([(known[name], 1) for name in tables])
        if not prefixes.find(rows):
            return {}
        parts = prefixes.of_rows(6)
        starts, members = parts.group_starts.tolist(), parts.members.tolist()
        assert len(starts) == MOST_GROUPS + 1 and starts[0] == 0 and starts == sorted(starts)
        listed = {rows.requests[row].id: int(parts.num_tokens[row]) for row in members[: starts[-1]]}
        assert sum(parts.num_tokens.tolist()) == sum(listed.values())
        return listed

    one, other = [1, 2, 3, 4], [5, 6, 7, 8, 9]
    assert look(a=[*one, 10], b=[*other, 20]) == {} and len(looks) == 1
    assert look(a=[*one, 10], b=[*other, 20], c=[*one, 30]) == {"a": 64, "c": 64} and len(looks) == 2
    assert look(a=[*one, 10, 11], b=[*other, 20], c=[*one, 30, 31]) == {"a": 64, "c": 64} and len(looks) == 2
    assert look(a=[*one, 10, 11], b=[*other, 20], c=[*one, 33, 31]) == {"a": 64, "c": 64} and len(looks) == 3
    everybody = {"b": [*other, 20], "c": [*one, 33, 31], "d": [*other, 40], "e": [*one, 50]}
    assert look(a=[*one, 10, 11], **everybody) == {"a": 64, "c": 64, "e": 64, "b": 80, "d": 80}
    assert look(**everybody) == {"c": 64, "e": 64, "b": 80, "d": 80}  # the last has taken the place of the first
    assert look(**everybody | {"d": [5, 60, 7, 8, 9, 40]}) == {"c": 64, "e": 64}  # the table of d was exchanged
    assert look(c=[*one, 33, 31], d=[5, 60, 7, 8, 9, 40], b=[*other, 20]) == {}


def test_little_is_not_worth_two_launches() -> None:
    rows = BatchRows(2, 20)
    requests = [Request(name, [1], 1, SamplingParams(), 1) for name in "ab"]
    for number, request in enumerate(requests):
        request.tables = [BlockTable([1, 2, 3, 4, 10 + number])]
    rows.seat([(request, 1) for request in requests])
    token_bytes = LEAST_SAVED_BYTES // 64  # 64 tokens are what one of the two does not read
    assert SharedPrefixes(2, 16, token_bytes, "cpu").find(rows)
    assert not SharedPrefixes(2, 16, token_bytes - 1, "cpu").find(rows)
    assert not SharedPrefixes(2, 8, 8 * token_bytes, "cpu").find(rows)  # shorter than a tile


def test_sizes_of_graphs_with_prefixes() -> None:
    assert shared_sizes(1) == [] and shared_sizes(2) == [2] and shared_sizes(20) == [8, 16, 20]
    assert shared_sizes(512) == [8, 16, 32, *range(64, 513, 64)]
    assert all(max(shared_sizes(n)) == max(batch_sizes(n)) for n in range(2, 600))


@pytest.fixture
def eager_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", 1)
    monkeypatch.setattr(shared_prefix, "LEAST_TOKENS", 16)


def count_groups(llm: LLM) -> list[int]:
    """How many groups each later decode step has."""
    fused = llm.runner.fused
    assert fused is not None and fused.shared_decode is not None and fused.shared_decode.prefixes is not None
    counts, prefixes, find = list[int](), fused.shared_decode.prefixes, fused.shared_decode.prefixes.find

    def find_and_count(rows: BatchRows) -> bool:
        pays = find(rows)
        counts.append(len(prefixes.of_rows(1).group_starts.unique()) - 1 if pays else 0)
        return pays

    prefixes.find = find_and_count  # type: ignore[method-assign]
    return counts


def answer(llm: LLM, **options: Any) -> list[list[list[int]]]:
    """A prompt that fills the cache, then others that begin as it does and end one after another."""
    llm.generate([[*PREFIX, 7]], GREEDY, use_tqdm=False)
    chosen = {"temperature": 0, "ignore_eos": True} | options
    params = [SamplingParams(max_tokens=4 + 3 * i, seed=i, **chosen) for i in range(5)]
    return tokens(llm.generate([*PROMPTS[:4], list(range(30))], params, use_tqdm=False))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("has_graphs", [True, False])
def test_greedy_tokens_are_those_of_the_plain_way(
    family: str, has_graphs: bool, folders: Callable[[str], Path], fused: None, eager_to_share: None
) -> None:
    llm = engine(folders(family), has_graphs=has_graphs)
    counts = count_groups(llm)
    assert answer(llm) == answer(plain(folders(family)))
    assert counts[0] == 0 and counts[6] == 1 and counts[-1] == 0  # alone, together, alone again


def test_samples_of_one_prompt_are_a_group_and_stay_the_same(
    folders: Callable[[str], Path], fused: None, eager_to_share: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(prompt: list[int]) -> list[list[list[int]]]:
        llm = engine(folders("qwen3"), has_graphs=True, enable_prefix_caching=False)
        counts.append(count_groups(llm))
        params = SamplingParams(temperature=1, seed=4, n=4, max_tokens=8, ignore_eos=True)
        return tokens(llm.generate([prompt], params, use_tqdm=False))

    counts = list[list[int]]()
    together = samples(PREFIX)
    assert counts[0] == [1] * 7 and len({tuple(sample) for sample in together[0]}) > 1
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", NEVER)
    assert samples(PREFIX) == together and counts[1] == [0] * 7


def test_requests_that_hold_copies_of_a_prefix_join_its_group(
    folders: Callable[[str], Path], fused: None, eager_to_share: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts compute all of their own, for their owners want logprobs; the others find the first one's."""
    plain_wish = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    wishes = [plain_wish, *[replace(plain_wish, prompt_logprobs=0)] * 2, plain_wish, plain_wish]

    def run(llm: LLM) -> list[list[list[int]]]:
        return tokens(llm.generate([*PROMPTS[:4], list(range(30))], wishes, use_tqdm=False))

    sizes = list[tuple[int, int]]()

    def join_and_note(groups: list[Group], *args: Any) -> list[Group]:
        joined = join_copies(groups, *args)
        sizes.append((sum(len(group.rows) for group in groups), sum(len(group.rows) for group in joined)))
        return joined

    monkeypatch.setattr(shared_prefix, "join_copies", join_and_note)

    assert run(engine(folders("qwen3"), max_num_batched_tokens=155)) == run(plain(folders("qwen3")))
    assert (2, 4) in sizes


def test_copies_are_told_by_all_of_their_tokens() -> None:
    prefix = [1, 2, 3, 4]
    assert begins_with([1, 2, 3, 4, 5], prefix, 4) and begins_with(prefix, prefix, 4)
    assert not begins_with([1, 2, 9, 4, 5], prefix, 4) and not begins_with([9, 2, 3, 4, 5], prefix, 4)
    assert not begins_with([1, 2, 3], prefix, 4) and not begins_with([1, 2, 3], [1, 2, 3], 4)
    names = {"a": [1, 2, 3, 4, 5], "b": [1, 2, 3, 4, 6], "c": [1, 2, 3, 4, 7], "d": [1, 2, 3, 8, 7], "e": [1, 2, 3, 4]}
    names["another salt"] = names["c"]
    requests = [Request(name, ids, len(ids), SamplingParams(), 1, salt=name[1:]) for name, ids in names.items()]
    found = join_copies([Group(np.array([0, 1]), 2)], requests, np.array([3, 3, 3, 3, 2, 3]), block_size=2)
    assert [(group.rows.tolist(), group.num_blocks) for group in found] == [([0, 1, 2], 2)]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_whole_life_is_the_same_with_groups_graphs_and_without(
    mode: str, folders: Callable[[str], Path], fused: None, eager_to_share: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "num_blocks": 10, "kv_cache_memory": None, "max_num_batched_tokens": 40, "max_model_len": 80,
        "preemption_mode": mode, **({"num_host_blocks": 16} if mode == "swap" else {}),
    }  # fmt: skip
    lives = []
    for has_graphs in (True, False):
        llm = engine(folders("llama"), has_graphs=has_graphs, **options)
        counts = count_groups(llm)
        lives.append(drive(llm))
        assert 1 in counts and 0 in counts
    monkeypatch.setattr(shared_prefix, "LEAST_SAVED_BYTES", NEVER)
    assert lives[0] == lives[1] == drive(engine(folders("llama"), **options))


def test_windows_are_never_read_by_groups(folders: Callable[[str], Path], fused: None, eager_to_share: None) -> None:
    llm = engine(folders("window"))
    assert llm.runner.fused is not None and llm.runner.fused.shared_decode is None
    assert answer(llm) == answer(plain(folders("window")))


def compare_ways(llm: LLM) -> list[float]:
    """How far logits by groups are from those without, in each later step that has groups."""
    fused = llm.runner.fused
    assert fused is not None and fused.shared_decode is not None
    apart, run = list[float](), fused.shared_decode.run

    def run_both(num_requests: int) -> None:
        fused.decode.run(num_requests)
        expected = fused.logits[:num_requests].double()
        run(num_requests)
        error = (fused.logits[:num_requests].double() - expected).norm() / expected.norm()
        apart.append(float(error.nan_to_num(torch.inf)))

    fused.shared_decode.run = run_both  # type: ignore[method-assign, assignment]
    return apart


def test_the_kernels_give_the_logits_that_they_give_without_groups(
    folders: Callable[[str], Path], interpreted: None, eager_to_share: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(folders("qwen3"), max_num_seqs=3, max_model_len=80)
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 3, 4, 4)]
    apart, launches = compare_ways(llm), list[int]()

    def launch(*args: Any, **options: Any) -> None:
        launches.append(1)
        shared_prefix_decode(*args, **options)

    monkeypatch.setattr("minivllm.models.fused_llama.shared_prefix_decode", launch)
    llm.generate([[*PREFIX[:33]]], params[0], use_tqdm=False)
    llm.generate([[*PREFIX[:33], *range(n)] for n in (1, 14, 2)], params[1:], use_tqdm=False)
    assert len(apart) == 3 and max(apart) < 1e-5
    assert len(launches) == len(apart) * llm.runner.config.num_layers


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_graphs_change_no_token_of_a_large_batch_with_groups(
    dtype: str, folders: Callable[[str], Path], eager_to_share: None
) -> None:
    prefixes = [[(5 * i + n) % 320 for i in range(length)] for n, length in ((1, 200), (2, 90))]
    prompts = [[*prefixes[i % 3 > 1], i, *range(3 * i % 41)] for i in range(70)]
    params = [
        SamplingParams(temperature=(i % 3) * 0.5, seed=i, max_tokens=5 + i % 23, ignore_eos=True) for i in range(70)
    ]
    options: dict[str, Any] = {"dtype": dtype, "max_num_seqs": 40, "max_num_batched_tokens": 512}
    found = []
    for has_graphs in (True, False):  # steps ahead would make other batches, and 16 bits round in each otherwise
        llm = engine(folders("qwen3"), has_graphs=has_graphs, async_scheduling=False, kv_cache_memory=2**25, **options)
        counts = count_groups(llm)
        llm.generate([[*prefix, 0] for prefix in prefixes], GREEDY, use_tqdm=False)
        found.append(tokens(llm.generate(prompts, params, use_tqdm=False)))
        assert 2 in counts
    assert found[0] == found[1]
    apart = compare_ways(llm)
    llm.reset_prefix_cache()
    llm.generate([[*prefix, 0] for prefix in prefixes], GREEDY, use_tqdm=False)
    llm.generate(prompts, params, use_tqdm=False)
    assert apart and max(apart) < 2e-2
