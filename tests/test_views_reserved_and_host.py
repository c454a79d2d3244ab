"""What the block map and the block table show beside live blocks: reserved ones, host memory, groups of layers."""

from dataclasses import asdict

import pytest

from minivllm.engine.engine import Engine
from minivllm.errors import MiniVLLMError
from minivllm.events import BlocksReserved, SwappedOut
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.trace import Trace
from minivllm.views.block_map import BlockMap
from minivllm.views.block_map_picture import draw
from minivllm.views.block_table import BlockTable
from minivllm.views.pool_fold import PoolFold, pool_state
from minivllm.views.pool_state import PoolState

CONTIGUOUS: dict[str, object] = {"allocator": "contiguous", "enable_prefix_caching": False, "num_blocks": 41}
SWAP: dict[str, object] = {"preemption_mode": "swap", "num_host_blocks": 20, "num_blocks": 13}


def engine_with(options: dict[str, object], facts: dict[str, object] | None = None) -> tuple[Engine, Trace, PoolFold]:
    """A real engine with six requests, its trace and a fold of its events."""
    engine, _ = fake_engine(**options)
    trace = Trace({**asdict(engine.config), "num_layers": 2, "num_kv_heads": 1, **(facts or {})})
    fold = PoolFold(trace.header)
    engine.events.listen(trace)
    engine.events.listen(fold.apply)
    for i in range(6):
        engine.add(fake_request(f"r{i}", [7] * (3 + 2 * i) + [i], max_tokens=10))
    return engine, trace, fold


def step_of(trace: Trace, kind: type[BlocksReserved | SwappedOut]) -> int:
    return trace.of(kind)[0].step


def ran(options: dict[str, object], facts: dict[str, object] | None = None) -> Trace:
    engine, trace, _ = engine_with(options, facts)
    while engine.has_work:
        engine.step()
    return trace


@pytest.mark.parametrize("allocator", ["contiguous", "power_of_two", "oracle", "buddy"])
def test_reserved_blocks_are_those_of_the_real_requests_after_every_step(allocator: str) -> None:
    engine, _, fold = engine_with({**CONTIGUOUS, "allocator": allocator})
    most = 0
    while engine.has_work:
        engine.step()
        state = fold.state()
        expected = {block_id for r in engine.requests.values() for block_id in r.reserved_ids}
        assert {block.block_id for block in state.blocks if block.kind == "reserved"} == expected
        total = 1 + state.num_live + state.num_reserved + state.num_cached_free + state.num_empty
        assert total == state.num_blocks
        most = max(most, len(expected))
    assert most > 0


def test_reserved_blocks_are_drawn_apart_from_used_ones() -> None:
    trace = ran(CONTIGUOUS)
    state = pool_state(trace.header, trace.until(step_of(trace, BlocksReserved)))
    picture = draw(state, next(b.block_id for b in state.blocks if b.kind == "reserved"))
    kinds = [cell.kind for cell in picture["cells"]]
    assert kinds.count("reserved") == state.num_reserved > 0
    assert f"{state.num_reserved} reserved" in picture["title"]
    assert "is set aside for A (request r0): nobody else can have it" in picture["detail"]
    rows = [line.split()[1] for line in picture["text"].splitlines()[1:] if line.split()[0].isdigit()]
    assert "".join(rows).count("-") == state.num_reserved
    assert ("reserved", f"reserved for later ({state.num_reserved})") in picture["legend"]


def assert_host_is_the_real_one(state: PoolState, engine: Engine) -> None:
    held = {host_id: r.id for r in engine.requests.values() for host_id in r.host_ids}
    assert state.host == tuple(held.get(host_id) for host_id in range(1, 21))
    assert state.num_on_host == 20 - engine.scheduler.swap.num_free


@pytest.mark.parametrize("seed_abort", [None, "r4"])
def test_host_blocks_are_those_of_the_real_swap_space_after_every_step(seed_abort: str | None) -> None:
    engine, _, fold = engine_with(SWAP)
    most = 0
    while engine.has_work:
        engine.step()
        assert_host_is_the_real_one(fold.state(), engine)
        most = max(most, fold.state().num_on_host)
        if seed_abort in engine.requests and engine.requests[seed_abort].host_ids:
            engine.abort(seed_abort)
            assert_host_is_the_real_one(fold.state(), engine)
    assert most > 0


def test_swapped_request_stays_on_the_map_with_its_host_blocks() -> None:
    trace = ran(SWAP)
    block_map = BlockMap.replay(trace)
    block_map.move("step", step_of(trace, SwappedOut))
    swapped = trace.of(SwappedOut)[0]
    assert isinstance(swapped, SwappedOut)
    picture = block_map.drawn()
    assert [cell.kind for cell in picture["host"]].count("on_host") == len(swapped.host_ids)
    [owner] = [o for o in picture["owners"] if o["id"] == swapped.request_id]
    assert f"{len(swapped.host_ids)} on the host" in owner["words"] and " 0 tokens" not in owner["words"]
    assert f"On the host, {len(swapped.host_ids)} of 20 blocks wait." in picture["title"]
    assert f"  host {owner['letter'] * len(swapped.host_ids)}..." in picture["text"]
    block_map.move("highlight", swapped.request_id)
    assert block_map.drawn()["highlight"] == swapped.request_id


def test_fallback_shows_host_memory_below_the_pool() -> None:
    with_host, without = BlockMap.replay(ran(SWAP)), BlockMap.replay(ran({"num_blocks": 13}))
    assert without.drawn()["host"] == [] and "host" not in without.drawn()["text"]
    assert with_host.image().height > without.image().height
    assert with_host.png() == with_host.png()


GROUPS: dict[str, object] = {"group_windows": (None, 5, 5), "num_blocks": 80}
FACTS: dict[str, object] = {"layer_groups": [[2, 5], [0, 1], [3, 4]]}


def table_at(step: int, facts: dict[str, object] | None = None) -> tuple[BlockMap, BlockTable]:
    block_map = BlockMap.replay(ran(GROUPS, facts))
    block_map.move("step", step)
    return block_map, BlockTable(block_map, lambda request_id: ["x"] * 30)


def test_group_control_shows_the_table_of_the_real_request() -> None:
    engine, trace, _ = engine_with(GROUPS)
    for _ in range(6):
        engine.step()
    block_map = BlockMap.replay(trace)
    table = BlockTable(block_map, lambda request_id: ["x"] * 30)
    for request in engine.requests.values():
        table.move("request", request.id)
        for group, real in enumerate(request.tables):
            table.move("group", group)
            assert [entry["physical"] for entry in table.drawn()["entries"]] == real.block_ids


def test_groups_say_which_layers_they_serve_when_the_header_tells() -> None:
    _, table = table_at(5, FACTS)
    assert [words for _, words in table.drawn()["groups"]] == [
        "group 0: layers 2, 5", "group 1: layers 0, 1; the last 5 tokens", "group 2: layers 3, 4; the last 5 tokens",
    ]  # fmt: skip
    _, silent = table_at(5)
    assert [words for _, words in silent.drawn()["groups"]][:2] == ["group 0", "group 1: the last 5 tokens"]


def test_token_that_left_the_window_has_no_slot_in_that_group_only() -> None:
    _, table = table_at(6)
    table.move("request", "r5")
    table.move("token", 1)
    assert "lives in physical block" in table.drawn()["title"]
    table.move("group", 2)
    picture = table.drawn()
    assert "has left the window" in picture["title"] and picture["slot"] is None
    assert picture["entries"][0]["physical"] == 0 and not any(t.is_stored for t in picture["entries"][0]["tokens"])
    assert table.png()


def test_block_of_another_group_chosen_on_the_map_turns_to_its_group() -> None:
    block_map, table = table_at(4)
    request = block_map.state.holders[-1]
    block_map.move("block", request.tables[1][-1])
    assert (table.drawn()["group"], table.drawn()["request"]) == (1, request.request_id)
    assert table.drawn()["block"] == request.tables[1][-1]


def test_reserved_block_chosen_on_the_map_is_in_no_table() -> None:
    trace = ran(CONTIGUOUS)
    block_map = BlockMap.replay(trace)
    block_map.move("step", step_of(trace, BlocksReserved))
    table = BlockTable(block_map, lambda request_id: [])
    before = table.drawn()["token"]
    block_map.move("block", block_map.state.holders[0].reserved_ids[0])
    assert table.drawn()["token"] == before
    assert "set aside" in block_map.drawn()["detail"]


@pytest.mark.parametrize("group", [3, -1, "0"])
def test_group_control_refuses_what_it_cannot_take(group: object) -> None:
    _, table = table_at(4)
    with pytest.raises(MiniVLLMError, match="group must be"):
        table.move("group", group)
