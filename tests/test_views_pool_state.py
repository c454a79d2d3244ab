"""The fold from events to the state of the pool, and what it refuses to believe."""

from itertools import count

import pytest

from minivllm.errors import MiniVLLMError
from minivllm.events import Added, BlocksReleased, BlocksTaken, Event, Finished, PrefixHit
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.speculative_config import SpeculativeConfig
from minivllm.views.pool_fold import NUM_GONE, PoolFold, pool_state
from minivllm.views.pool_state import PoolState
from minivllm.views.theme import OWNER_COLOURS, contrast, escape, ink_on, owner_colour, owner_letter, visible
from tests.view_traces import HEADER, HOSTILE, small_trace


def state_at(step: int) -> PoolState:
    trace = small_trace()
    return pool_state(trace.header, trace.until(step))


def kinds(state: PoolState) -> dict[int, str]:
    return {block.block_id: block.kind for block in state.blocks if block.kind not in ("null", "empty")}


@pytest.mark.parametrize("step", range(6))
def test_every_block_is_exactly_one_kind(step: int) -> None:
    state = state_at(step)
    assert 1 + state.num_live + state.num_cached_free + state.num_empty == state.num_blocks == 12


def test_table_and_fill_follow_the_tokens_stored() -> None:
    state = state_at(1)
    assert state.holders[0].block_ids == (1, 2, 3)
    assert [state.blocks[i].num_filled for i in (1, 2, 3)] == [4, 4, 1]
    assert state.num_wasted_slots == 3


def test_prefix_hit_gives_a_block_two_owners_in_order_of_arrival() -> None:
    state = state_at(2)
    assert state.blocks[1].owners == ("a", HOSTILE)
    assert (state.num_shared, state.num_live) == (2, 4)


def test_published_block_stays_cached_when_its_last_owner_leaves() -> None:
    assert kinds(state_at(3)) == {1: "live", 2: "live", 4: "live"}
    assert kinds(state_at(4)) == {1: "cached", 2: "cached"}


def test_finished_in_a_step_stores_nothing_by_the_end_of_it() -> None:
    request = state_at(3).request("a")
    assert request is not None
    assert (request.status, request.num_computed, request.block_ids) == ("finished", 0, ())


def test_preempted_request_comes_back_and_an_evicted_block_forgets() -> None:
    state = state_at(5)
    request = state.request(HOSTILE)
    assert request is not None
    assert (request.status, request.num_preemptions, request.block_ids) == ("running", 1, (2, 3, 5))
    assert not state.blocks[2].is_cached


def test_decisions_are_sentences_and_runs_of_published_blocks_are_one() -> None:
    assert "Step 1: request a filled blocks 1, 2, which others may now find." in state_at(1).decisions
    assert all(words.startswith("Step ") and words.endswith(".") for words in state_at(5).decisions)


@pytest.mark.parametrize(
    "event",
    [
        BlocksTaken(2, "b", (1,)),  # has an owner
        BlocksTaken(2, "b", (0,)),  # the null block
        BlocksTaken(2, "b", (12,)),  # no such block
        PrefixHit(2, "a", (1,), 4),  # twice in one table
        BlocksReleased(2, "a", (1, 2)),  # not the whole table
        BlocksReleased(2, "b", (1,)),  # not its own
    ],
)
def test_what_no_pool_can_do_is_refused(event: Event) -> None:
    trace = small_trace()
    with pytest.raises(MiniVLLMError, match="recorded from the start"):
        pool_state(trace.header, [*trace.until(1), event])


@pytest.mark.parametrize("header", [{}, {**HEADER, "num_blocks": 0}, {**HEADER, "block_size": "16"}])
def test_header_without_sizes_is_refused(header: dict[str, object]) -> None:
    with pytest.raises(MiniVLLMError, match="header needs a whole number"):
        PoolFold(header)


def test_finished_requests_are_forgotten_after_a_while() -> None:
    fold = PoolFold(HEADER)
    for i in range(NUM_GONE + 50):
        fold.apply(Added(0, str(i), 1, 1, 0))
        fold.apply(Finished(0, str(i), "stop", 1))
    assert len(fold.state().requests) == NUM_GONE
    assert fold.state().requests[-1].ordinal == NUM_GONE + 49


def test_fold_of_an_incremental_run_equals_a_fold_from_the_start() -> None:
    trace, fold = small_trace(), PoolFold(HEADER)
    for event in trace:
        fold.apply(event)
    assert fold.state() == pool_state(trace.header, trace)


POLICIES: list[dict[str, object]] = [
    {},
    {"prefix_cache": "radix", "eviction_policy": "fifo"},
    {"preemption_mode": "swap", "num_host_blocks": 48},
    {"group_windows": (5,)},
    {"group_windows": (None, 5, 5)},
    {"group_windows": (None, 3), "preemption_mode": "swap", "num_host_blocks": 48},
    {"batching": "static"},
    {"speculative": (SpeculativeConfig("ngram"),)},
    {"speculative": (SpeculativeConfig("ngram", 7, adaptive=True, max_step_tokens=99),), "prefix_cache": "radix"},
    {"speculative": (SpeculativeConfig("ngram"),), "group_windows": (None, 3)},
    {"allocator": "oracle", "enable_prefix_caching": False},
    {"allocator": "buddy", "enable_prefix_caching": False, "preemption_mode": "swap", "num_host_blocks": 20},
]


@pytest.mark.parametrize("policies", POLICIES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
def test_fold_agrees_with_the_real_pool_after_every_step(block_size: int, policies: dict[str, object]) -> None:
    num_groups = len(policies.get("group_windows", "1"))  # type: ignore[arg-type]
    num_blocks = 1 + num_groups * 48 // block_size
    sizes = {"block_size": block_size, "num_blocks": num_blocks, "max_num_batched_tokens": 16}
    engine, _ = fake_engine(**sizes, **policies)
    fold = PoolFold({"num_blocks": num_blocks, "block_size": block_size})
    engine.events.listen(fold.apply)
    requests = [fake_request(str(i), [7] * 9 + [i] * i, max_tokens=12) for i in range(5)]
    for request in requests:
        engine.add(request)
    for step in count(1):
        if not engine.has_work:
            break
        engine.step()
        if step in (2, 5) and "1" in engine.requests:
            requests.append(engine.fork("1", f"fork {step}", seed=step))
        state, pool = fold.state(), engine.scheduler.kv.pool
        assert state.num_free == pool.num_free
        assert [b.ref_count for b in state.blocks] == [b.ref_count for b in pool.blocks]
        assert [b.is_cached for b in state.blocks] == [b.entry is not None for b in pool.blocks]
        assert {r.request_id: [list(ids) for ids in (r.block_ids, *r.other_tables)] for r in state.holders} == {
            r.id: [table.block_ids for table in r.tables] for r in requests if r.block_ids
        }
        alive = [r for r in state.requests if r.request_id in engine.requests and r.block_ids]
        assert [r.num_computed for r in alive] == [engine.requests[r.request_id].num_computed for r in alive]


def test_owner_colours_never_change_and_letters_never_end() -> None:
    assert owner_colour(3) == owner_colour(3 + len(OWNER_COLOURS))
    assert [owner_letter(i) for i in (0, 25, 26, 52, 702)] == ["A", "Z", "AA", "BA", "AAA"]


def test_ink_is_readable_on_every_owner_colour() -> None:
    assert all(contrast(colour, ink_on(colour)) >= 4.5 for colour in OWNER_COLOURS)


def test_text_helpers_show_and_escape() -> None:
    assert visible(" a\n\t\x1b") == "␣a⏎⇥\\x1b"
    assert escape(HOSTILE) == "&lt;img src=x onerror=window.hacked=1&gt;"
