"""Achieved hit rates beside what is possible."""

import pytest

from minivllm.engine.cache_study import optimum
from minivllm.lab.hit_study import BLOCK_SIZE, POOLS, Rates, measure, serve, study, trace

PROMPTS = trace(num_requests=60)


@pytest.fixture(scope="module", params=POOLS)
def rates(request: pytest.FixtureRequest) -> Rates:
    return measure(PROMPTS, request.param)


def test_no_policy_beats_belady_in_the_order_of_arrival(rates: Rates) -> None:
    hash_rates = {kind: rate for kind, rate in rates.by_policy.items() if kind[0] == "hash" and kind[2] == "fcfs"}
    assert len(hash_rates) == 5
    assert all(rate <= rates.belady + 1e-12 for rate in hash_rates.values()), hash_rates
    assert rates.belady <= rates.optimum_blocks <= rates.optimum_tokens


def test_radix_tree_finds_the_tokens_behind_the_last_whole_block(rates: Rates) -> None:
    for (cache, eviction, order), rate in rates.by_policy.items():
        if cache == "radix" and order != "fcfs":
            assert rate > rates.by_policy["hash", eviction, order]


@pytest.mark.parametrize("cache", ["hash", "radix"])
def test_room_for_all_reaches_the_optimum(cache: str) -> None:
    num_blocks = sum(1 + len(prompt) // BLOCK_SIZE for prompt in PROMPTS)
    best = optimum(PROMPTS, BLOCK_SIZE if cache == "hash" else 1)
    assert serve(PROMPTS, num_blocks, cache, "lru", "fcfs") == pytest.approx(best)


def test_depth_first_order_reaches_the_optimum_in_a_pool_for_one_prompt() -> None:
    num_blocks = 2 + max(len(prompt) for prompt in PROMPTS) // BLOCK_SIZE
    assert serve(PROMPTS, num_blocks, "hash", "lru", "dfs") == pytest.approx(optimum(PROMPTS, BLOCK_SIZE))


def test_table_has_every_combination_and_the_bounds() -> None:
    lines = study().splitlines()
    assert len(lines) == 1 + 10 + 4 + 3
    assert all(len(line.split()) >= 1 + len(POOLS) for line in lines)
