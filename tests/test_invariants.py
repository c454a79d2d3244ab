"""The checks themselves: what the random lives rarely see alone, they see when it is planted by hand."""

import pytest

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants, check_plan, most_steps_to_drain


def running(num_steps: int = 1, **options: object) -> Engine:
    """Two requests with a common start of two blocks, which the second found in the cache."""
    engine, _ = fake_engine(**options)
    engine.add(fake_request("a", range(9), max_tokens=20))
    engine.step()
    engine.add(fake_request("b", [*range(8), 77], max_tokens=20))
    for _ in range(num_steps):
        engine.step()
    check_invariants(engine)
    return engine


def test_living_request_and_pinned_prefix_are_no_drained_engine() -> None:
    engine = running(max_model_len=30)
    with pytest.raises(AssertionError, match="I13"):
        check_drained(engine)
    engine.pins.pin("x", range(8))
    engine.abort("a")
    engine.abort("b")
    with pytest.raises(AssertionError, match="I13: a prefix is still pinned"):
        check_drained(engine)
    engine.pins.unpin("x")
    check_drained(engine)


def test_lost_owner_is_seen_though_the_block_is_in_use() -> None:
    engine = running()
    shared = engine.kv.pool.blocks[engine.requests["b"].block_ids[0]]
    assert shared.ref_count == 2
    shared.ref_count = 1
    with pytest.raises(AssertionError, match="I1: block"):
        check_invariants(engine)


def test_table_in_the_wrong_order_is_seen_by_the_slots() -> None:
    engine = running()
    engine.requests["a"].block_ids[:2] = engine.requests["a"].block_ids[1::-1]
    check_invariants(engine)  # all counts are right
    with pytest.raises(AssertionError, match="I16: a at 0"):
        engine.step()


def test_stale_contents_of_a_cached_block_are_seen_with_the_runner() -> None:
    engine, runner = fake_engine()
    engine.add(fake_request("a", range(9), max_tokens=4))
    engine.step()
    check_invariants(engine, runner)
    slot = 4 * engine.requests["a"].block_ids[0]
    runner.contents[slot] = runner.contents[slot + 1]
    with pytest.raises(AssertionError, match="I5: block 1 changed while it was cached"):
        check_invariants(engine, runner)


def test_plan_beyond_the_known_tokens_is_refused() -> None:
    engine = running()
    request = engine.requests["a"]
    with pytest.raises(AssertionError, match="I9: a would compute"):
        check_plan(engine, StepPlan(9, [(request, 5)], [], []))


def test_drain_bound_holds_and_is_not_beyond_all_the_tokens_of_an_orderly_queue() -> None:
    engine = running()
    most_steps = most_steps_to_drain(engine)
    assert most_steps == 2 * (9 + 20)
    num_steps = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
    assert 0 < num_steps <= most_steps
