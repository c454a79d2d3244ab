"""Achieved hit rates beside what is possible."""

from collections.abc import Callable

import pytest

from minivllm.engine.cache_study import achieved, belady, optimum
from minivllm.errors import ConfigError
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
    assert len(lines) == 2 + 1 + 10 + 4 + 3
    assert all(len(line.split()) >= 1 + len(POOLS) for line in lines[2:])


def test_table_says_of_what_and_on_which_engine() -> None:
    first, second, *_ = study(seed=3).splitlines()
    num_tokens = sum(map(len, trace(seed=3)))
    assert first == f"120 questions about 12 documents of 250 tokens, Zipf, seed 3: {num_tokens:,} prompt tokens"
    assert second == "engine: one request at a time, blocks of 16 tokens, pools of 24, 64, 256 blocks"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: achieved([[1, 2]], [3]), r"num_hit_tokens\[0\] must be 0 to 2, its prompt's tokens, not 3"),
        (lambda: achieved([[1, 2]], [1, 1]), "num_hit_tokens has 2 counts for 1 prompts"),
        (lambda: belady([[1, 2]], 0, 4), "block_size must be at least 1 token, not 0"),
        (lambda: optimum([[1, 2]], 0), "block_size must be at least 1 token, not 0"),
    ],
)
def test_hit_rates_of_what_cannot_be_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
