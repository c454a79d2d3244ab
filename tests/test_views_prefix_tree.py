"""The prefix tree: folded from events alone it is the real cache after every step, hash chain or radix."""

import json
import random
from dataclasses import asdict

import pytest

from minivllm.engine.block_pool import Block
from minivllm.engine.engine import Engine
from minivllm.errors import MiniVLLMError
from minivllm.events import (
    Added,
    Admitted,
    BlockCached,
    BlocksReleased,
    BlocksTaken,
    Event,
    EventBus,
    Evicted,
    Finished,
    PrefixHit,
    StepRan,
)
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.speculative_config import SpeculativeConfig
from minivllm.trace import Trace
from minivllm.views.prefix_tree import PrefixTree
from minivllm.views.prefix_tree_fold import PrefixTreeFold
from minivllm.views.prefix_tree_picture import NUM_COLUMNS, NUM_ROWS, TreeControls, draw, layout
from minivllm.views.prefix_tree_state import NodeState, TreeState
from minivllm.views.sketch import Box, Words
from tests.view_traces import HOSTILE, ran

Options = dict[str, object]
POLICIES: list[Options] = [
    {}, {"prefix_cache": "radix"}, {"eviction_policy": "lfu"}, {"prefix_cache": "radix", "eviction_policy": "fifo"},
    {"preemption_mode": "swap", "num_host_blocks": 40}, {"group_windows": (None, 5)},
    {"speculative": (SpeculativeConfig("ngram"),)},
    {"speculative": (SpeculativeConfig("ngram", 7, adaptive=True, max_step_tokens=99),), "prefix_cache": "radix"},
]  # fmt: skip


def assert_is_the_cache(state: TreeState, engine: Engine) -> int:
    """Nodes, edges, users, hits and the order of use; returns how many edges the events leave unknown."""
    cached = {b.id: b for b in engine.kv.pool.blocks if b.entry is not None and not b.entry.group}
    assert {node.block_id for node in state.nodes} == set(cached)
    block_of = {node.id: node.block_id for node in state.nodes}
    for node in state.nodes:
        block = cached[node.block_id]
        assert (node.num_owners, node.num_hits) == (block.ref_count, block.num_hits)
        if node.is_parent_known:
            parent = engine.kv.cache.parent_of(block)
            assert (block_of[node.parent] if node.parent else None) == (parent.id if parent else None)
            assert block.entry is not None
            assert node.is_cut == (isinstance(block.entry.parent, int) and parent is None)
    assert_order_of_use(state, cached)
    return sum(not node.is_parent_known for node in state.nodes)


def assert_order_of_use(state: TreeState, cached: dict[int, Block]) -> None:
    idle = [node for node in state.nodes if not node.num_owners]
    for one in idle:
        for other in idle:
            used = cached[one.block_id].last_used < cached[other.block_id].last_used
            assert used == (one.last_use < other.last_use)


def real_victim(engine: Engine) -> int | None:
    """The cached block that the engine would forget next."""
    pool = engine.kv.pool
    idle = [block_id for block_id in pool.free_ids() if pool.blocks[block_id].entry is not None]
    if not idle or engine.kv.eviction is None:
        return idle[0] if idle else None
    return engine.kv.eviction.victim().id


def live(engine: Engine, rng: random.Random, step: int) -> None:
    """One step of a life full of shared beginnings, forks and aborts."""
    for i in range(rng.choice([0, 0, 1, 2])):
        words = [[word] * 4 + [word + 1] * (word % 3) for word in rng.choices(range(4), k=rng.randint(1, 4))]
        prompt = [token for word in words for token in word] + [rng.randrange(12)] * rng.randint(0, 3)
        engine.add(fake_request(f"r{step}.{i}", prompt, max_tokens=rng.randint(1, 12)))
    if engine.has_work:
        engine.step()
    if engine.requests and rng.random() < 0.1:
        engine.fork(rng.choice([*engine.requests]), f"f{step}", seed=step)
    if engine.requests and rng.random() < 0.1:
        engine.abort(rng.choice([*engine.requests]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("policies", POLICIES, ids=str)
def test_folded_tree_is_the_real_cache_after_every_step(policies: Options, seed: int) -> None:
    rng, num_blocks = random.Random(seed), 60 if "group_windows" in policies else 30
    engine, _ = fake_engine(max_num_batched_tokens=rng.choice([16, 40]), num_blocks=num_blocks, **policies)
    fold = PrefixTreeFold(asdict(engine.config))
    engine.events.listen(fold.apply)
    num_nodes = num_unknown = 0
    for step in range(50):
        live(engine, rng, step)
        state = fold.state()
        num_unknown += assert_is_the_cache(state, engine)
        num_nodes += len(state.nodes)
        if state.next_victim is not None:
            victim = next(node.block_id for node in state.nodes if node.id == state.next_victim)
            assert victim == real_victim(engine)
    assert num_nodes > 100
    if policies.get("prefix_cache") == "radix":
        assert num_unknown == 0  # every duplicate is exchanged, and says for what
    assert num_unknown < 0.1 * num_nodes


def test_hits_are_those_of_the_engine() -> None:
    trace, _ = shared_prompts()
    state = PrefixTree.replay(trace).state
    found = sum(event.num_tokens for event in trace.of(PrefixHit))  # type: ignore[attr-defined]
    prompts = sum(event.num_prompt for event in trace.of(Added))  # type: ignore[attr-defined]
    assert (state.num_hit_tokens, state.num_prompt_tokens) == (found, prompts)


def shared_prompts(**options: object) -> tuple[Trace, dict[str, list[str]]]:
    """Ten requests: 8 tokens that all share, 4 that a third share, 5 of their own."""
    engine, _ = fake_engine(num_blocks=26, max_num_seqs=3, max_num_batched_tokens=24, **options)
    trace, texts = Trace(asdict(engine.config)), {}
    engine.events.listen(trace)
    for i in range(10):
        name, prompt = HOSTILE if i == 4 else f"r{i}", [7] * 8 + [1 + i % 3] * 4 + [i] * 5
        engine.add(fake_request(name, prompt, max_tokens=6))
        texts[name] = [f"t{token} " for token in prompt] + [HOSTILE] * 6
    while engine.has_work:
        engine.step()
    return trace, texts


@pytest.mark.parametrize("prefix_cache", ["hash", "radix"])
def test_shared_beginning_is_one_path_that_branches(prefix_cache: str) -> None:
    trace, _ = shared_prompts(prefix_cache=prefix_cache)
    view = PrefixTree.replay(trace)
    view.move("step", 12)
    nodes = {node["id"]: node for node in view.drawn()["nodes"]}
    roots = [node for node in nodes.values() if node["parent"] is None]
    assert len(roots) == 1 and roots[0]["owners"] == 2
    second = [node for node in nodes.values() if node["column"] == 1]
    assert len(second) == 1 and len([n for n in nodes.values() if n["column"] == 2]) == 3


def test_kinds_follow_the_life_of_a_block() -> None:
    header: dict[str, object] = {"num_blocks": 6, "block_size": 4}
    events: list[Event] = [
        Added(0, "a", 5, 4, 0), BlocksTaken(1, "a", (1, 2)), Admitted(1, "a", 0, 0), BlockCached(1, "a", 1, 11),
        ran(1, ("a", 5, 5)), ran(2, ("a", 1, 6)), Added(2, "b", 5, 4, 0), PrefixHit(3, "b", (1,), 4),
        Admitted(3, "b", 4, 0), ran(3, ("a", 1, 7), ("b", 1, 5)), BlocksReleased(4, "a", (1, 2)),
        Finished(4, "a", "stop", 2), BlocksReleased(4, "b", (1,)), Finished(4, "b", "stop", 1), ran(4), Evicted(5, 1),
        ran(5),
    ]  # fmt: skip
    view = PrefixTree.replay(Trace(header, events))
    kinds = []
    for step in range(6):
        view.move("step", step)
        kinds.append([node["kind"] for node in view.drawn()["nodes"]])
    assert kinds == [[], ["new"], ["used"], ["hit"], ["idle"], ["evicted"]]
    view.move("step", 4)
    assert view.drawn()["next_victim"] == 1 and "block 1 goes next" in view.drawn()["text"]
    assert view.drawn()["hit_rate"] == 4 / 10


def test_request_control_frames_its_path() -> None:
    trace, _ = shared_prompts()
    view = PrefixTree.replay(trace)
    view.move("step", 12)
    request, table = next(iter(view.state.tables.items()))
    view.move("request", request)
    framed = [mark for mark in view.drawn()["marks"] if isinstance(mark, Box) and mark.border == "ink"]
    cached = {node.block_id for node in view.state.nodes}
    assert len(framed) == len(cached & set(table)) > 0
    view.move("request", "")
    assert not [m for m in view.drawn()["marks"] if isinstance(m, Box) and m.border == "ink"]


def test_token_texts_stand_in_the_boxes_and_stay_text() -> None:
    trace, texts = shared_prompts()
    view = PrefixTree.replay(trace, texts.__getitem__)
    words = [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]
    assert "t7␣t7␣t7…" in words
    hover = "".join(mark.words for mark in view.drawn()["marks"] if isinstance(mark, Box))
    assert HOSTILE.replace(" ", "␣") in hover


def test_failing_reader_of_texts_is_told_in_the_status_line() -> None:
    trace, _ = shared_prompts()
    no_texts: dict[str, list[str]] = {}
    picture = PrefixTree.replay(trace, no_texts.__getitem__).drawn()
    assert picture["status"].startswith("KeyError") and picture["nodes"]


def wide_tree(num_branches: int, depth: int) -> TreeState:
    """Branches without a common beginning, each a chain of blocks numbered from 1 on."""
    nodes = []
    for i in range(num_branches * depth):
        index = i % depth
        parent = i if index else None  # nodes count from 1, so the one before is number i
        nodes.append(NodeState(i + 1, i + 1, index, "a", parent, False, True, 0, 0, 0, False, False, False))
    return TreeState(1, 4, 0, tuple(nodes), (), 0, None, 0, 0, {}, ())


def test_page_and_depth_controls_show_the_rest_of_a_large_tree() -> None:
    state = wide_tree(2 * NUM_ROWS + 1, NUM_COLUMNS + 3)

    def blocks(chosen: TreeControls) -> list[int]:
        marks = draw(state, chosen)["marks"]
        return [int(mark.words.split()[1].rstrip(",")) for mark in marks if isinstance(mark, Box)]

    first, later = blocks(TreeControls()), blocks(TreeControls(page=2, depth=3))
    assert len(first) == NUM_ROWS * NUM_COLUMNS and first[0] == 1
    assert later == [i + 1 for i in range(2 * NUM_ROWS * 13 + 3, 2 * NUM_ROWS * 13 + 13)]
    names = [control.name for control in draw(state, TreeControls())["controls"]]
    assert names == ["request", "page", "depth"]


def test_page_and_depth_are_controls_of_the_view() -> None:
    events: list[Event] = [Added(0, "a", 60, 4, 0), BlocksTaken(1, "a", tuple(range(1, 16))), Admitted(1, "a", 0, 0)]
    events += [BlockCached(1, "a", i, i) for i in range(1, 16)]
    view = PrefixTree.replay(Trace({"num_blocks": 20, "block_size": 4}, [*events, ran(1, ("a", 60, 60))]))
    view.move("depth", 5)
    shown = [mark for mark in view.drawn()["marks"] if isinstance(mark, Box)]
    assert len(shown) == 10 and shown[0].words.startswith("block 6,")


def test_no_two_boxes_overlap() -> None:
    trace, _ = shared_prompts()
    view = PrefixTree.replay(trace)
    for step in range(1, trace.last_step + 1):
        view.move("step", step)
        places = [(place.row, place.column) for place in layout([*view.state.nodes, *view.state.ghosts])]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("control", "value"), [("step", -1), ("request", "nobody"), ("page", 1), ("q", 1), ("step", "1")]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        PrefixTree.replay(shared_prompts()[0]).move(control, value)


def test_scrubbing_back_and_forth_gives_the_same_pictures() -> None:
    trace, _ = shared_prompts(prefix_cache="radix")
    view, seen = PrefixTree.replay(trace), []
    for step in range(trace.last_step + 1):
        view.move("step", step)
        seen.append(view.drawn()["text"])
    for step in (9, 3, 15, 1):
        view.move("step", step)
        assert view.drawn()["text"] == seen[step]


def test_live_tree_follows_the_bus_and_twins_repeat() -> None:
    bus, (trace, _) = EventBus(), shared_prompts()
    view = PrefixTree.follow(bus, trace.header)
    for event in trace:
        bus.emit(event)
    view.flush()
    assert view.picture["title"] == PrefixTree.replay(trace).drawn()["title"]
    assert view.picture["steps"] is None
    with pytest.raises(MiniVLLMError, match="shows the present"):
        view.move("step", 1)
    view.close()
    assert not bus
    bundles = [PrefixTree.replay(trace)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert json.loads(json.dumps(PrefixTree.replay(trace).drawn()))["nodes"]


def test_fold_stays_small_over_5000_steps() -> None:
    engine, _ = fake_engine(num_blocks=30, max_num_batched_tokens=40)
    fold = PrefixTreeFold(asdict(engine.config))
    engine.events.listen(fold.apply)
    for step in range(1700):
        engine.add(fake_request(f"r{step}", [step % 7] * 8 + [step % 11] * 4, max_tokens=3))
        while engine.has_work:
            engine.step()
    assert fold.step > 5000
    state = fold.state()
    assert len(state.nodes) <= 29 and len(state.tables) == 0 and len(state.ghosts) <= 29
    assert len(fold.pool.state().requests) <= 64


@pytest.mark.parametrize("kind", [StepRan, None, 3])
def test_what_is_no_trace_gets_one_line(kind: Trace) -> None:
    with pytest.raises(MiniVLLMError, match="draws a Trace"):
        PrefixTree.replay(kind)


def test_empty_cache_draws() -> None:
    view = PrefixTree.replay(Trace({"num_blocks": 4, "block_size": 4}))
    assert view.drawn()["title"].startswith("Step 0: 0 blocks cached") and view.png()
