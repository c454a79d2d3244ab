"""The pool of blocks: who owns what, and in which order free blocks are taken."""

import pytest

from minivllm.engine.allocators import blocks_needed
from minivllm.engine.block_pool import NULL_BLOCK, Block, BlockPool, CacheEntry
from minivllm.engine.tables import slot_of
from minivllm.lab.fake_runner import fake_engine, fake_request


def cached(pool: BlockPool, serial: int) -> Block:
    """Take a block, fill it, let it go: it is free and keeps its contents."""
    block = pool.take()
    block.entry = CacheEntry(serial, serial, (serial,), "")
    pool.release(block)
    return block


def test_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert NULL_BLOCK not in [pool.take().id for _ in range(pool.num_usable)]


def test_exhausted_pool_says_so() -> None:
    pool = BlockPool(2)
    pool.take()
    with pytest.raises(AssertionError, match="no free block"):
        pool.take()


def test_taken_block_has_one_owner() -> None:
    assert BlockPool(3).take().ref_count == 1


def test_shared_block_stays_in_use_until_its_last_owner_lets_go() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.share(block)
    pool.release(block)
    assert (block.ref_count, block.id in pool.free_ids()) == (1, False)
    pool.release(block)
    assert (block.ref_count, block.id in pool.free_ids()) == (0, True)


def test_freeing_twice_is_an_error() -> None:
    pool = BlockPool(3)
    block = pool.take()
    pool.release(block)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.release(block)


def test_removal_from_the_middle_keeps_the_order() -> None:
    pool = BlockPool(6)
    pool.share(pool.blocks[3])
    assert list(pool.free_ids()) == [1, 2, 4, 5]


def test_removal_from_the_middle_touches_only_the_neighbours() -> None:
    pool = BlockPool(1_000)
    before = [(block.previous, block.next) for block in pool.blocks]
    pool.share(pool.blocks[500])
    after = [(block.previous, block.next) for block in pool.blocks]
    assert [i for i in range(1_000) if before[i] != after[i]] == [499, 500, 501]


def test_num_free_follows_every_move() -> None:
    pool = BlockPool(6)
    first = pool.take()
    counts = [pool.num_free]
    pool.share(pool.blocks[4])
    counts.append(pool.num_free)
    pool.release(first)
    counts.append(pool.num_free)
    assert counts == [4, 3, 4]


def test_empty_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(5)
    kept, used = cached(pool, 1), pool.take()
    pool.release(used)
    assert list(pool.free_ids()) == [used.id, 3, 4, kept.id]


def test_cached_blocks_are_taken_least_recently_freed_first() -> None:
    pool = BlockPool(4)
    first, second = cached(pool, 1), cached(pool, 2)
    pool.share(first)
    pool.release(first)
    assert list(pool.free_ids()) == [3, second.id, first.id]


def test_block_that_still_caches_is_not_taken() -> None:
    pool = BlockPool(2)
    cached(pool, 1)
    with pytest.raises(AssertionError, match="evict it first"):
        pool.take()


def test_block_that_lost_its_contents_moves_to_the_front() -> None:
    pool = BlockPool(4)
    block = cached(pool, 1)
    block.entry = None
    pool.move_to_front(block)
    assert pool.first_free() is block


def test_table_grows_exactly_when_a_block_is_full() -> None:
    assert [blocks_needed(n, 16) for n in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]


def test_slot_is_found_through_the_table() -> None:
    assert slot_of(37, [7, 1, 3], 16) == 53


def test_last_token_takes_no_slot() -> None:
    engine, _ = fake_engine(num_blocks=3, max_model_len=8)  # two blocks of four
    engine.add(fake_request("a", range(5), max_tokens=4))  # nine tokens, the ninth is never stored
    for _ in range(4):
        engine.step()
    assert not engine.has_work
