"""Automatic prefix caching: what is found, what is not, what is forgotten first."""

from collections.abc import Callable

import pytest

from minivllm.engine import kv_manager
from minivllm.engine.block_pool import Block
from minivllm.engine.engine import Engine
from minivllm.engine.prefix_cache import HashChainCache, chain_hash, root_hash
from minivllm.events import BlockCached, Evicted, PrefixHit
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_invariants
from minivllm.request import Request
from minivllm.trace import Trace


def run(engine: Engine, *requests: Request) -> None:
    """Run requests together until they are done."""
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()


def holders(engine: Engine) -> list[Block]:
    return [block for block in engine.kv.pool.blocks if block.entry is not None]


def found(cache: HashChainCache, hashes: list[int], token_ids: list[int], salt: str = "") -> list[Block]:
    """Blocks that the cache knows of a request with these tokens and, for this test, these hashes."""
    request = fake_request("probe", token_ids, salt=salt)
    request.block_hashes = hashes
    return cache.match(request, len(token_ids)).blocks


def test_equal_prompt_is_found() -> None:
    engine, _ = fake_engine()
    run(engine, fake_request("a", range(10)))
    second = fake_request("b", range(10))
    run(engine, second)
    assert second.num_cached == 8


def test_hit_leaves_one_token_to_compute() -> None:
    engine, _ = fake_engine()
    run(engine, fake_request("a", range(8)))
    second = fake_request("b", range(8))
    run(engine, second)
    assert second.num_cached == 4


def test_hit_covers_all_full_blocks_before_the_last_token() -> None:
    engine, _ = fake_engine(block_size=1, num_blocks=41)
    run(engine, fake_request("a", range(8)))
    second = fake_request("b", range(8))
    run(engine, second)
    assert second.num_cached == 7


def test_output_is_found_too() -> None:
    engine, _ = fake_engine()
    first = fake_request("a", range(6), max_tokens=8)
    run(engine, first)
    second = fake_request("b", [*first.token_ids, 3])
    run(engine, second)
    assert second.num_cached == 12  # 13 of the 14 tokens were stored


def test_hit_does_not_change_the_answer() -> None:
    engine, _ = fake_engine()
    first, second = fake_request("a", range(10)), fake_request("b", range(10))
    run(engine, first)
    run(engine, second)
    assert first.token_ids == second.token_ids


def test_block_in_another_place_is_not_found() -> None:
    engine, _ = fake_engine()
    run(engine, fake_request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    second = fake_request("b", [5, 6, 7, 8, 9])
    run(engine, second)
    assert second.num_cached == 0


def test_salts_separate() -> None:
    engine, _ = fake_engine()
    run(engine, fake_request("a", range(10), salt="alice"))
    bob, alice = fake_request("b", range(10), salt="bob"), fake_request("c", range(10), salt="alice")
    run(engine, bob, alice)
    assert (bob.num_cached, alice.num_cached) == (0, 8)


def test_salt_is_never_taken_for_a_serial() -> None:
    cache = HashChainCache(1)
    serial = cache.insert(Block(1), "", 10, [5])
    assert cache.insert(Block(2), str(serial), 11, [6]) and found(cache, [11], [6], "1")
    assert found(cache, [10, 11], [5, 6]) == found(cache, [10], [5])


def test_freed_block_keeps_its_hash_until_reused() -> None:
    engine, _ = fake_engine(num_blocks=4, max_model_len=12)
    run(engine, fake_request("a", range(4), max_tokens=1))
    (block,) = holders(engine)
    run(engine, fake_request("b", [9, 9, 9], max_tokens=1))  # finds an empty block
    assert (block.ref_count, holders(engine)) == (0, [block])
    run(engine, fake_request("c", [8] * 11, max_tokens=1))  # needs all three
    assert block not in holders(engine)


def test_end_of_a_prefix_is_evicted_before_its_start() -> None:
    engine, _ = fake_engine(num_blocks=4, max_model_len=12)
    run(engine, fake_request("a", range(11), max_tokens=1))  # caches two blocks
    run(engine, fake_request("b", [9] * 5, max_tokens=1))  # needs two: the empty one and the end of a
    assert (0, 1, 2, 3) in [block.entry.token_ids for block in holders(engine) if block.entry]
    assert (4, 5, 6, 7) not in [block.entry.token_ids for block in holders(engine) if block.entry]


def test_least_recently_used_prefix_is_evicted_first() -> None:
    engine, _ = fake_engine(num_blocks=4, max_model_len=12)
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        run(engine, fake_request(name, [token] * 4, max_tokens=1))
    run(engine, fake_request("again", [1, 1, 1, 1, 5], max_tokens=1))  # needs one block: b's is the oldest
    assert sorted(block.entry.token_ids[0] for block in holders(engine) if block.entry) == [1, 3]


def test_evicted_prefix_is_computed_again() -> None:
    engine, _ = fake_engine(num_blocks=4, max_model_len=12)
    first = fake_request("a", range(9), max_tokens=2)
    run(engine, first, fake_request("b", [9] * 11, max_tokens=1))
    again = fake_request("c", range(9), max_tokens=2)
    run(engine, again)
    assert (again.num_cached, again.token_ids) == (0, first.token_ids)


def test_hit_on_a_block_in_use_shares_it() -> None:
    engine, _ = fake_engine()
    first, second = fake_request("a", range(9)), fake_request("b", range(9))
    engine.add(first)
    engine.step()
    engine.add(second)
    engine.step()
    assert second.block_ids[:2] == first.block_ids[:2]
    assert [engine.kv.pool.blocks[b].ref_count for b in first.block_ids] == [2, 2, 1]


def test_duplicates_of_one_step_stay_plain_duplicates() -> None:
    engine, runner = fake_engine()
    first, second = fake_request("a", range(9)), fake_request("b", range(9))
    engine.add(first)
    engine.add(second)
    engine.step()
    assert set(first.block_ids).isdisjoint(second.block_ids)
    assert [block.id for block in holders(engine)] == first.block_ids[:2]
    check_invariants(engine, runner)


def test_chain_goes_on_behind_a_duplicate() -> None:
    engine, _ = fake_engine()
    first, second = fake_request("a", range(5)), fake_request("b", [0, 1, 2, 3, 9, 9, 9, 9])
    run(engine, first, second)
    third = fake_request("c", [0, 1, 2, 3, 9, 9, 9, 9, 9])
    run(engine, third)
    assert third.num_cached == 8


@pytest.mark.parametrize("weak_hash", [lambda parent, ids: 1, lambda parent, ids: sum(ids) % 3])
def test_hash_collision_never_gives_a_wrong_hit(
    monkeypatch: pytest.MonkeyPatch, weak_hash: Callable[[int, list[int]], int]
) -> None:
    monkeypatch.setattr(kv_manager, "chain_hash", weak_hash)
    engine, _ = fake_engine()  # its runner reads every prefix back
    run(engine, *(fake_request(f"a{token}", [token] * 9) for token in range(4)))
    collided = fake_request("b", [7] * 9)
    run(engine, collided)
    assert collided.num_cached == 0


def test_equal_block_behind_another_prefix_is_refused_though_its_hash_collides() -> None:
    cache = HashChainCache(1)
    first = cache.insert(Block(1), "", 10, [5])
    assert first is not None
    cache.insert(Block(2), first, 99, [7])
    other = cache.insert(Block(3), "", 11, [6])
    assert other is not None
    assert [block.id for block in found(cache, [11, 99], [6, 7])] == [3]


def test_colliding_block_is_not_cached_and_the_old_one_stays() -> None:
    cache, kept, late = HashChainCache(1), Block(1), Block(2)
    cache.insert(kept, "", 10, [5])
    assert cache.insert(late, "", 10, [6]) is None
    assert late.entry is None and found(cache, [10], [5]) == [kept]


def test_serials_are_never_reused() -> None:
    cache, block = HashChainCache(1), Block(1)
    first = cache.insert(block, "", 10, [5])
    cache.evict(block)
    assert cache.insert(block, "", 10, [5]) != first


def test_hash_depends_on_tokens_parent_and_salt() -> None:
    hashes = [
        chain_hash(root_hash(salt), token_ids) for salt in ("", "a") for token_ids in ([1, 2], [2, 1], [1], [258])
    ]
    assert len(set(hashes)) == 8


def test_prompt_logprobs_skip_the_cache_and_still_fill_it() -> None:
    engine, _ = fake_engine()
    first, second = fake_request("a", range(9), prompt_logprobs=1), fake_request("b", range(9), prompt_logprobs=1)
    run(engine, first)
    run(engine, second)
    third = fake_request("c", range(9))
    run(engine, third)
    assert [first.num_cached, second.num_cached, third.num_cached] == [0, 0, 8]


def test_without_prefix_caching_nothing_is_kept() -> None:
    engine, _ = fake_engine(enable_prefix_caching=False)
    trace = Trace()
    engine.events.listen(trace)
    run(engine, fake_request("a", range(9)))
    run(engine, fake_request("b", range(9)))
    assert trace.of(PrefixHit) == trace.of(BlockCached) == trace.of(Evicted) == []


def test_reset_forgets_everything() -> None:
    engine, _ = fake_engine()
    run(engine, fake_request("a", range(9)))
    assert engine.kv.reset_cache() and holders(engine) == []


def test_reset_is_refused_while_a_block_is_in_use() -> None:
    engine, _ = fake_engine()
    engine.add(fake_request("a", range(9)))
    engine.step()
    assert not engine.kv.reset_cache() and len(holders(engine)) == 2
