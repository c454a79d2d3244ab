"""Eviction: the order of each policy, leaves only, nothing in use; and the bound that no policy passes."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache as remember
from itertools import combinations
from random import Random

import pytest

from minivllm.engine.block_pool import Block
from minivllm.engine.cache_study import achieved, belady, block_chains, optimum
from minivllm.engine.eviction import POLICIES, Eviction
from minivllm.engine.prefix_cache import HashChainCache, PrefixCache, chain_hash, root_hash
from minivllm.engine.radix_cache import RadixCache, dfs_order
from minivllm.errors import ConfigError
from minivllm.request import Request, SamplingParams

CACHES: dict[str, Callable[[int], PrefixCache]] = {"hash": HashChainCache, "radix": RadixCache}


class Pool:
    """What the KV manager does with a cache and a policy, with the slow twin beside it at every victim."""

    def __init__(self, cache: PrefixCache, block_size: int, policy: str, num_blocks: int) -> None:
        self.cache, self.block_size, self.policy = cache, block_size, policy
        self.eviction = Eviction(policy, cache)
        self.blocks = [Block(id_) for id_ in range(num_blocks)]
        self.num_uses = 0

    def slow_victim(self) -> Block:
        """Sort all idle leaves; where there is none, the youngest idle block."""
        idle = {block: block.entry.serial for block in self.blocks if block.entry and block.ref_count == 0}
        leaves = [block for block in idle if self.cache.is_leaf(block)]
        if not leaves:
            return max(idle, key=lambda block: idle[block])
        return min(leaves, key=lambda block: (*POLICIES[self.policy](block), -idle[block]))

    def start(self, request: Request) -> tuple[list[Block], int] | None:
        """Adopt the whole blocks that are cached and take the others; None where they do not fit."""
        hit = self.cache.match(request, request.num_tokens)
        num_hit, num_blocks = hit.num_tokens // self.block_size, request.num_tokens // self.block_size
        found = hit.blocks[:num_hit]
        num_free = sum(block.ref_count == 0 for block in self.blocks)
        if num_free < num_blocks - num_hit + sum(block.ref_count == 0 for block in found):
            return None
        self.num_uses += 1
        for block in found:
            block.num_hits += 1
            self.share(block)
        return found + [self.take() for _ in range(num_blocks - num_hit)], num_hit * self.block_size

    def take(self) -> Block:
        block = next((block for block in self.blocks if block.ref_count == 0 and block.entry is None), None)
        if block is None:
            block = self.eviction.victim()
            assert block is self.slow_victim() is self.eviction.victim()
            self.eviction.remove(block)
            self.cache.evict(block)
        block.ref_count = 1
        return block

    def share(self, block: Block) -> None:
        if block.ref_count == 0:
            self.eviction.remove(block)
        block.ref_count, block.last_used = block.ref_count + 1, self.num_uses

    def publish(self, request: Request, table: list[Block]) -> None:
        parent: int | str | None = request.salt
        for index, block in enumerate(table):
            assert parent is not None or not self.cache.deduplicates
            if parent is None:
                break
            contents = request.token_ids[index * self.block_size : (index + 1) * self.block_size]
            parent = self.cache.insert(block, parent, request.block_hashes[index], contents)
            holder = self.cache.holder(parent) if parent is not None else None
            if self.cache.deduplicates and holder is not None and holder is not block:
                table[index] = holder
                self.share(holder)
                block.ref_count = 0

    def serve(self, request: Request) -> int:
        """Run a request alone, from start to end; the tokens that were found."""
        started = self.start(request)
        assert started is not None
        table, num_hit = started
        self.publish(request, table)
        self.finish(table)
        return num_hit

    def finish(self, table: list[Block]) -> None:
        self.num_uses += 1
        for block in reversed(table):
            block.ref_count, block.last_used = block.ref_count - 1, self.num_uses
            if block.ref_count == 0 and block.entry is not None:
                self.eviction.add(block)


def make_request(token_ids: Sequence[int], block_size: int) -> Request:
    request = Request("", list(token_ids), len(token_ids), SamplingParams(), 1)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        before = request.block_hashes[-1] if request.block_hashes else root_hash("")
        request.block_hashes.append(chain_hash(before, request.token_ids[start : start + block_size]))
    return request


def replay(prompts: Sequence[Sequence[int]], block_size: int, num_blocks: int, policy: str) -> list[int]:
    """Tokens found for each prompt when they are served one after the other."""
    pool = Pool(RadixCache(block_size), block_size, policy, num_blocks)
    return [pool.serve(make_request(token_ids, block_size)) for token_ids in prompts]


def random_prompts(random: Random, num_prompts: int, most_tokens: int) -> list[list[int]]:
    return [random.choices((0, 0, 0, 1), k=random.randrange(1, most_tokens + 1)) for _ in range(num_prompts)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", CACHES)
def test_every_victim_is_that_of_the_slow_twin(kind: str, policy: str) -> None:
    for seed in range(6):
        random = Random(seed)
        block_size = random.choice((1, 2, 3))
        pool = Pool(CACHES[kind](block_size), block_size, policy, random.choice((4, 12, 40)))
        running: list[tuple[Request, list[Block]]] = []
        for token_ids in random_prompts(random, 300, 4 * block_size):
            request = make_request(token_ids, block_size)
            while (started := pool.start(request)) is None:
                pool.finish(running.pop(random.randrange(len(running)))[1])
            for block in started[0]:
                block.priority = random.randrange(3)
            running.append((request, started[0]))
            for held_request, table in random.sample(running, random.randrange(len(running) + 1)):
                pool.publish(held_request, table)


def cached(pool: Pool, last_used: int, num_hits: int = 0, priority: int = 0) -> Block:
    """An idle block of its own, cached after all before."""
    block = next(block for block in pool.blocks if block.entry is None)
    assert pool.cache.insert(block, "", block.id, [block.id]) is not None
    block.last_used, block.num_hits, block.priority = last_used, num_hits, priority
    pool.eviction.add(block)
    return block


def order(pool: Pool) -> list[int]:
    """Block ids in the order in which they are evicted."""
    ids = []
    while any(block.entry for block in pool.blocks):
        block = pool.eviction.victim()
        pool.eviction.remove(block)
        pool.cache.evict(block)
        ids.append(block.id)
    return ids


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("lru", [3, 1, 2, 0]),
        ("lfu", [3, 2, 0, 1]),  # 3 and 2 were never hit, 0 once, 1 often but long ago
        ("fifo", [0, 1, 2, 3]),
        ("slru", [3, 2, 1, 0]),  # of those that were hit, how often does not count
        ("priority", [1, 3, 0, 2]),  # 2 is the most urgent; 3 and 0 are equal
    ],
)
def test_order_of_a_policy(policy: str, expected: list[int]) -> None:
    pool = Pool(RadixCache(1), 1, policy, 4)
    cached(pool, last_used=40, num_hits=1, priority=0)
    cached(pool, last_used=20, num_hits=9, priority=5)
    cached(pool, last_used=30, num_hits=0, priority=-1)
    cached(pool, last_used=10, num_hits=0, priority=0)
    assert order(pool) == expected


def test_scan_empties_lru_and_spares_what_was_hit_under_slru() -> None:
    prompts = [[0], [0], [1], [2], [3], [0]]
    assert [replay(prompts, 1, 2, policy)[-1] for policy in ("lru", "lfu", "slru")] == [0, 1, 1]


@pytest.mark.parametrize("policy", POLICIES)
def test_end_of_a_chain_goes_before_its_start_whatever_the_keys(policy: str) -> None:
    pool = Pool(RadixCache(1), 1, policy, 3)
    pool.serve(make_request([5, 6, 7], 1))
    for later, block in enumerate(pool.blocks):
        pool.eviction.remove(block)
        block.last_used = block.num_hits = later
        block.priority = -later
        pool.eviction.add(block)
    assert order(pool) == [2, 1, 0]


def test_equal_keys_lose_the_youngest_first() -> None:
    pool = Pool(RadixCache(1), 1, "lru", 3)
    for _ in range(3):
        cached(pool, last_used=7)
    assert order(pool) == [2, 1, 0]


def test_block_that_is_used_again_is_no_victim() -> None:
    pool = Pool(RadixCache(1), 1, "lru", 2)
    pool.share(cached(pool, last_used=1))
    assert cached(pool, last_used=2) is pool.eviction.victim()


def test_block_in_use_is_neither_added_nor_a_victim() -> None:
    pool = Pool(RadixCache(1), 1, "lru", 1)
    pool.share(cached(pool, last_used=1))
    with pytest.raises(AssertionError, match="in use"):
        pool.eviction.add(pool.blocks[0])
    with pytest.raises(AssertionError, match="no cached block is idle"):
        pool.eviction.victim()


def test_youngest_goes_when_duplicates_hide_that_a_chain_is_used_and_then_the_one_before_it() -> None:
    pool = Pool(HashChainCache(1), 1, "lru", 5)
    first, second = make_request([5, 6], 1), make_request([5, 6, 7], 1)
    tables = [started[0] for started in (pool.start(first), pool.start(second)) if started]
    pool.publish(first, tables[0])
    pool.publish(second, tables[1])  # its 7 stands behind the 6 of `first`, of which it owns a duplicate
    pool.finish(tables[0])
    assert pool.take() is tables[0][1]
    pool.finish(tables[1])
    assert order(pool) == [0, 4]


def test_heap_stays_as_small_as_what_is_idle() -> None:
    for num_served in range(60, 76):  # somewhere between it is rebuilt
        pool = Pool(RadixCache(1), 1, "fifo", 4)
        for token_ids in [[1, 2]] + [[3, 4]] * num_served:
            pool.serve(make_request(token_ids, 1))
        assert len(pool.eviction._heap) <= 2 * 4 + 65 and order(pool) == [1, 0, 3, 2]


def test_copy_goes_its_own_way() -> None:
    pool = Pool(RadixCache(2), 2, "lfu", 6)
    pool.serve(make_request([1, 2, 3, 4, 5, 6], 2))
    copy = deepcopy(pool)
    assert order(copy) == [2, 1, 0]
    assert pool.eviction.victim() is pool.blocks[2] and pool.blocks[2].entry is not None


def most_hits(chains: list[list[int]], num_blocks: int) -> int:
    """Blocks found at best: try every choice of victims, leaves or not, among those that the prompt does not use."""

    @remember
    def best(now: int, held: frozenset[int]) -> int:
        if now == len(chains):
            return 0
        chain = chains[now]
        num_hit = next((index for index, block in enumerate(chain) if block not in held), len(chain))
        num_evicted = max(0, len(held | set(chain)) - num_blocks)
        choices = combinations(sorted(held - set(chain)), num_evicted)
        return num_hit + max(best(now + 1, (held | set(chain)) - set(victims)) for victims in choices)

    return best(0, frozenset())


def test_belady_is_the_best_of_all_choices() -> None:
    num_tight = 0
    for seed in range(300):
        random = Random(seed)
        block_size, num_blocks = random.choice((1, 2)), random.choice((3, 4, 5))
        prompts = random_prompts(random, random.randrange(1, 9), num_blocks * block_size)
        hits = belady(prompts, block_size, num_blocks)
        assert sum(hits) == block_size * most_hits(block_chains(prompts, block_size), num_blocks)
        num_tight += achieved(prompts, hits) < optimum(prompts, block_size)
    assert num_tight > 80  # where memory was short


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_passes_belady(policy: str) -> None:
    for seed in range(40):
        random = Random(seed)
        block_size, num_blocks = random.choice((1, 2, 3)), random.choice((4, 8, 16))
        prompts = random_prompts(random, 60, min(6, num_blocks) * block_size)
        hits, bound = replay(prompts, block_size, num_blocks, policy), belady(prompts, block_size, num_blocks)
        assert sum(hits) <= sum(bound) and achieved(prompts, bound) <= optimum(prompts, block_size)


def test_belady_refuses_a_prompt_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="prompt 1 alone fills 3 blocks"):
        belady([[1], [1, 2, 3]], 1, 2)


def test_optimum_counts_the_trie() -> None:
    for seed in range(100):
        prompts = random_prompts(Random(seed), 12, 9)
        for block_size in (1, 2, 3):
            cuts = [(p, end) for p in prompts for end in range(block_size, len(p) + 1, block_size)]
            num_shared = len(cuts) - len({tuple(p[:end]) for p, end in cuts})
            total = sum(map(len, prompts))
            assert optimum(prompts, block_size) == pytest.approx(num_shared * block_size / total)


@pytest.mark.parametrize("seed", range(20))
def test_depth_first_order_reaches_the_optimum_with_room_for_the_longest_prompt(seed: int) -> None:
    queue = [make_request(token_ids, 1) for token_ids in random_prompts(Random(seed), 40, 12)]
    prompts = [request.token_ids for request in dfs_order(queue)]
    assert achieved(prompts, replay(prompts, 1, max(map(len, prompts)), "lru")) == optimum(prompts)
