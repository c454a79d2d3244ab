"""The step timeline: every cell is what a real engine did in that step; controls, twins, bounds."""

import json
from dataclasses import asdict
from itertools import product

import pytest

from minivllm.engine.engine import Engine
from minivllm.errors import MiniVLLMError
from minivllm.events import Added, Admitted, Event, EventBus, Finished, StepRan
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.trace import Trace
from minivllm.views.sketch import Box
from minivllm.views.step_timeline import StepTimeline
from minivllm.views.step_timeline_fold import COMPUTED, NUM_KEPT, Run, TimelineFold
from minivllm.views.step_timeline_picture import KINDS, Lane, TimelineControls, draw
from tests.view_traces import HOSTILE

Options = dict[str, object]
STATIC: Options = {"batching": "static", "max_num_seqs": 4, "max_num_batched_tokens": 24, "num_blocks": 30}
TIGHT: Options = {"max_num_seqs": 4, "max_num_batched_tokens": 12, "num_blocks": 13}
POLICIES: list[Options] = [
    {}, STATIC, TIGHT, {**TIGHT, "preemption_mode": "swap", "num_host_blocks": 48},
    {**TIGHT, "enable_prefix_caching": False}, {**TIGHT, "prefix_cache": "radix"},
    {**STATIC, "batching": "request_level"}, {"batching": "prefill_first", "max_num_batched_tokens": 40},
]  # fmt: skip


def recorded(options: Options, num_requests: int = 9) -> Trace:
    """A whole run of a real engine without a model."""
    engine, _ = fake_engine(**options)
    trace = Trace(asdict(engine.config))
    engine.events.listen(trace)
    for i in range(num_requests):
        engine.add(fake_request(HOSTILE if i == 1 else f"r{i}", [7] * (3 + 2 * i) + [i], max_tokens=4 + 3 * (i % 4)))
    while engine.has_work:
        engine.step()
    return trace


def test_steps_launched_ahead_leave_no_cell_that_was_not_computed() -> None:
    engine, runner = fake_engine(num_blocks=60, max_num_seqs=3, max_num_batched_tokens=64, eos_token_ids=(0,))
    runner.is_async = True
    fold, plans, events = TimelineFold(asdict(engine.config)), dict[int, set[str]](), list[Event]()
    engine.events.listen(fold.apply)
    engine.events.listen(events.append)
    runner.before = lambda plan: plans.update({plan.step: {request.id for request, _ in plan.scheduled}})
    for i in range(9):
        engine.add(fake_request(f"r{i}", [7] * (3 + 2 * i) + [i], max_tokens=9 + i))
    num_late = 0
    while engine.has_work:
        for request in engine.step():
            num_late += request.is_finished and request.id in plans.get(engine.scheduler.step, ())
    assert num_late > 0, "nobody had a token too many"
    state, ended = fold.state(), set[str]()
    assert sorted(row.request_id for row in state.rows) == sorted(f"r{i}" for i in range(9))
    for event in events:
        if isinstance(event, StepRan):
            cells = {row.request_id: run.kind for row in state.rows if (run := row.at(event.step)) is not None}
            computed = {id_ for id_, kind in cells.items() if kind in COMPUTED}
            assert computed == {id_ for id_, *_ in event.scheduled} - ended
            assert set(cells.values()) <= {*COMPUTED, "waiting"}
            ended = {end.request_id for end in events[: events.index(event)] if isinstance(end, Finished)}


@pytest.mark.parametrize("policies", POLICIES, ids=str)
def test_cells_are_what_the_real_engine_did_in_every_step(policies: Options) -> None:
    engine, runner = fake_engine(**policies)
    fold = TimelineFold(asdict(engine.config))
    engine.events.listen(fold.apply)
    requests = [fake_request(f"r{i}", [7] * (3 + 2 * i) + [i], max_tokens=4 + 3 * (i % 4)) for i in range(9)]
    for request in requests:
        engine.add(request)
    furthest = dict.fromkeys((r.id for r in requests), 0)  # tokens that were ever stored
    plans: list[dict[str, tuple[int, int]]] = []
    runner.before = lambda plan: plans.append({r.id: (r.num_computed, num_new) for r, num_new in plan.scheduled})
    while engine.has_work:
        engine.step()
        step, state = engine.scheduler.step, fold.state()
        for row in state.rows:
            run = row.at(step)
            request = next(r for r in requests if r.id == row.request_id)
            if request.id in plans[-1]:
                start, num_new = plans[-1][request.id]
                assert run is not None and (run.num_new, run.stored_after(step)) == (num_new, start + num_new)
                kinds = ("recompute",) if start < furthest[request.id] else (
                    ("decode",) if start >= request.num_prompt else ("prefill", "chunk"))  # fmt: skip
                assert run.kind in kinds
                if run.kind == "prefill":
                    assert start + num_new >= request.num_prompt
                furthest[request.id] = max(furthest[request.id], start + num_new)
            elif request.id in engine.requests:
                assert run is not None and run.kind == expected_wait(engine, request.id)
            else:
                assert run is None
        assert state.steps[-1].num_busy == len(plans[-1])
        assert len({row.runs[-1].seat for row in state.rows if row.at(step) and row.runs[-1].kind in COMPUTED}) == len(
            plans[-1]
        )


def expected_wait(engine: Engine, request_id: str) -> str:
    request = engine.requests[request_id]
    if request in list(engine.scheduler.running):
        return "paused"
    if request.num_preemptions == 0:
        return "waiting"
    return "swapped" if request.host_ids else "preempted"


def test_static_and_continuous_stand_on_one_axis() -> None:
    view = StepTimeline.replay(recorded(STATIC), recorded(TIGHT), names=("static", "continuous"))
    picture = view.drawn()
    assert picture["cells"][0]["A r0"] == "PDDD"
    assert picture["cells"][0]["E r4"] == "w" * 14 + "PDDD"
    assert "continuous had ended" in picture["title"]
    assert picture["idle_share"][0] > picture["idle_share"][1]
    busy = sum(cell.isalpha() and cell != "w" for row in picture["cells"][0].values() for cell in row)
    assert picture["idle_share"][0] == pytest.approx(1 - busy / (4 * 32))


def test_step_control_shows_no_future_and_says_what_was_decided() -> None:
    view = StepTimeline.replay(recorded(TIGHT))
    view.move("step", 3)
    picture = view.drawn()
    assert picture["steps"] is not None and picture["steps"][2] == 3
    assert all(len(cells) <= 3 for cells in picture["cells"][0].values())
    assert picture["title"].startswith("Step 3: computed ")
    assert all(line.startswith("Step 3:") for line in picture["lines"]) and picture["lines"]


def test_playing_to_the_end_and_back_gives_the_same_pictures() -> None:
    view = StepTimeline.replay(recorded(TIGHT))
    steps = view.drawn()["steps"]
    assert steps is not None
    seen = []
    for step in range(steps[0], steps[1] + 1):
        view.move("step", step)
        seen.append(view.drawn()["cells"])
    for step in range(steps[1], steps[0] - 1, -1):
        view.move("step", step)
        assert view.drawn()["cells"] == seen[step - steps[0]]


def test_rows_control_turns_requests_into_seats() -> None:
    view = StepTimeline.replay(recorded(STATIC))
    view.move("rows", "seats")
    cells = view.drawn()["cells"][0]
    assert list(cells) == ["seat 0", "seat 1", "seat 2", "seat 3"]
    assert cells["seat 0"].startswith("AAAA..........EEEE")
    idle = sum(row.count(".") for row in cells.values())
    assert view.drawn()["idle_share"][0] == pytest.approx(idle / (4 * 32))


def test_page_control_walks_through_many_requests() -> None:
    view = StepTimeline.replay(recorded({}, 16), recorded({}, 16))
    view.move("step", 3)
    assert len(view.drawn()["cells"][0]) == 10
    view.move("page", 1)
    assert next(iter(view.drawn()["cells"][0])).startswith("K ") and len(view.drawn()["cells"][0]) == 6


@pytest.mark.parametrize(
    ("control", "value"), [("step", 0), ("step", "1"), ("rows", "columns"), ("page", 1), ("z", 1), ("step", 10**9)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        StepTimeline.replay(recorded({}, 2)).move(control, value)


def test_preempted_requests_show_it_and_what_they_compute_again() -> None:
    trace = recorded({**TIGHT, "enable_prefix_caching": False})
    letters = "".join(StepTimeline.replay(trace).drawn()["cells"][0].values())
    assert "x" in letters and "R" in letters
    swapped = recorded({**TIGHT, "preemption_mode": "swap", "num_host_blocks": 48})
    letters = "".join(StepTimeline.replay(swapped).drawn()["cells"][0].values())
    assert "s" in letters and "R" not in letters


def long_run(num_steps: int) -> list[Event]:
    """Each request lives for ten steps; two at a time."""
    events: list[Event] = []
    for step in range(1, num_steps + 1):
        if step % 5 == 1:
            events += [Added(step - 1, f"r{step}", 3, 10, 0), Admitted(step, f"r{step}", 0, 0)]
        born = [b for b in (step - (step - 1) % 5 - 5, step - (step - 1) % 5) if b > 0]
        scheduled = tuple((f"r{b}", 3 if step == b else 1, 3 + step - b) for b in born)
        if step % 5 == 0 and step > 5:
            events.append(Finished(step, f"r{born[0]}", "length", 10))
        events.append(StepRan(step, scheduled, (), 2, 0, 0, 0.1, 1.0, 0.1, ""))
    return events


def test_live_fold_stays_small_and_draws_after_5000_steps() -> None:
    fold, sizes = TimelineFold({"max_num_seqs": 4}), []
    for event in long_run(5000):
        fold.apply(event)
        if isinstance(event, StepRan) and event.step % 1000 == 0:
            state = fold.state()
            sizes.append((len(state.steps), len(state.rows), sum(len(row.runs) for row in state.rows)))
    assert sizes[0] == sizes[-1] and sizes[0][0] == NUM_KEPT
    picture = draw([Lane("", fold.state())], TimelineControls())
    assert picture["steps"] == (5000 - NUM_KEPT + 1, 5000, 5000) and len(picture["marks"]) < 2000


def test_long_trace_is_kept_whole_in_few_runs() -> None:
    view = StepTimeline.replay(Trace({"max_num_seqs": 4}, long_run(5000)))
    view.move("step", 2500)
    assert view.drawn()["steps"] == (1, 5000, 2500)
    [row] = [cells for name, cells in view.drawn()["cells"][0].items() if name.endswith(" r2496")]
    assert row.endswith("PDDDD")


def test_runs_join_equal_steps() -> None:
    fold = TimelineFold({})
    for event in long_run(10):
        fold.apply(event)
    assert fold.state().rows[0].runs == (Run("prefill", 1, 1, 3, 3, 0), Run("decode", 2, 9, 1, 12, 0))


def test_live_view_follows_the_bus_and_stops_when_closed() -> None:
    bus = EventBus()
    view = StepTimeline.follow(bus, {"max_num_seqs": 2})
    assert "has not run yet" in view.drawn()["title"]
    for event in long_run(20):
        bus.emit(event)
    view.flush()
    assert view.picture["step"] == 20 and "live" in view.picture["provenance"]
    view.move("step", 7)
    assert view.drawn()["step"] == 7
    view.close()
    assert not bus


def test_cells_have_a_letter_a_pattern_and_words_so_colour_is_never_alone() -> None:
    assert len({letter for letter, _ in KINDS.values()}) == len(KINDS)
    boxes = [m for m in StepTimeline.replay(recorded(TIGHT)).drawn()["marks"] if isinstance(m, Box)]
    assert all(box.words.startswith("step ") and box.click is not None for box in boxes)


def test_hostile_ids_stay_text_and_twins_repeat() -> None:
    views = [StepTimeline.replay(recorded(TIGHT)) for _ in range(2)]
    bundles = [view._repr_mimebundle_()[0] for view in views]
    assert bundles[0]["image/png"] == bundles[1]["image/png"] and len(bundles[0]["image/png"]) < 80_000  # type: ignore[arg-type]
    assert bundles[0]["text/plain"] == bundles[1]["text/plain"]
    assert f"B {HOSTILE}" in views[0].drawn()["cells"][0]
    assert json.loads(json.dumps(views[0].drawn()))["view"] == "step-timeline"


@pytest.mark.parametrize("traces", [(), (None,), (Trace(), Trace(), Trace())])
def test_what_is_no_trace_gets_one_line(traces: tuple[Trace, ...]) -> None:
    with pytest.raises(MiniVLLMError, match="one Trace or two"):
        StepTimeline.replay(*traces)


@pytest.mark.parametrize(("rows", "num_lanes"), [*product(["requests", "seats"], [1, 2])])
def test_empty_traces_draw(rows: str, num_lanes: int) -> None:
    view = StepTimeline.replay(*[Trace()] * num_lanes)
    view.move("rows", rows)
    assert "has not run yet" in view.drawn()["title"] and view.png()
