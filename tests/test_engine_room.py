"""The engine room: what is asked reaches the engine between two steps, from any thread, and nothing is left behind."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.course.engine_frames import EngineRun, Frame, Load
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.events import StepRan
from minivllm.lab import engine_room
from minivllm.lab.engine_room import EngineRoom
from minivllm.lab.room_clock import RoomClock
from minivllm.lab.room_load import Guests, choices_of, nearest

Build = Callable[[str], tuple[Path, PreTrainedModel]]
LOAD = Load(rate=8, prompt_tokens=16, output_tokens=8, token_budget=64, batch_limit=8)
TIMES = {"step_ms", "costed_ms", "floor_ms"}
STEPS = {"step", "decisions"}
WAIT_S = 30.0


@pytest.fixture
def llm(reference_model: Build) -> LLM:
    folder, _ = reference_model("llama-gqa")
    return LLM(
        folder, dtype="float32", num_blocks=40, block_size=8, max_model_len=128, max_num_batched_tokens=128,
        max_num_seqs=16, show_progress=False,
    )  # fmt: skip


@pytest.fixture
def room(llm: LLM) -> Iterator[EngineRoom]:
    room = EngineRoom(llm, LOAD, seed=1, step_s=0.05)
    yield room
    room.close()
    assert not llm.events and not llm.engine.has_work


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()


def counts(frame: Frame) -> dict[str, object]:
    """All of a frame that hangs neither on the machine nor on the steps that the engine ran before."""
    decided = [(decision.request_id, decision.what, decision.reason) for decision in frame.decisions]
    rest = {name: value for name, value in asdict(frame).items() if name not in TIMES | STEPS}
    return rest | {"decided": decided}


def test_equal_seeds_and_wishes_give_equal_frames(llm: LLM) -> None:
    def played(seed: int) -> list[dict[str, object]]:
        room = EngineRoom(llm, LOAD, seed=seed, step_s=0.05)
        room.run(30)
        room.run(30, batch_limit=2)
        frames = [counts(frame) for frame in room.frames]
        room.close()
        return frames

    first = played(1)
    assert first == played(1) and first != played(2)
    assert first[-1]["arrived"] > first[-1]["finished"] > 0  # type: ignore[operator]


def test_steps_are_the_engine_s_and_frames_count_them(room: EngineRoom) -> None:
    steps: list[StepRan] = []
    room.llm.events.listen(lambda event: steps.append(event) if isinstance(event, StepRan) else None, wants_hash=False)
    frames = room.run(25)
    room.llm.events._listeners.pop()
    assert len(steps) == 25 == frames[-1].steps
    assert frames[-1].output_tokens == sum(len(tokens) for step in steps for _, tokens in step.new_tokens)
    assert frames[-1].time_s == pytest.approx(25 * 0.05, abs=1.0)  # and the wait for the first one
    assert frames[-1].num_running == len(room.llm.engine.scheduler.running)


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [("batch_limit", 1, "no_seat"), ("token_budget", 16, "no_budget")],
)
def test_a_lower_limit_makes_requests_wait_for_that_reason(
    room: EngineRoom, setting: str, value: int, named: str
) -> None:
    room.run(10, rate=32, prompt_tokens=32)
    frames = room.run(20, **{setting: value})
    reasons = [d.reason for frame in frames for d in frame.decisions if d.what == "waits"]
    assert named in reasons
    assert getattr(frames[-1].load, setting) == value
    told = [d.reason for frame in frames for d in frame.decisions if d.what == "slider"]
    assert told in ([f"{setting.replace('_', ' ')} {value}"], [])  # shown, unless eight others came in that frame


def test_limits_hold_from_the_next_step_on(room: EngineRoom) -> None:
    heard: list[StepRan] = []
    room.llm.events.listen(lambda event: heard.append(event) if isinstance(event, StepRan) else None, wants_hash=False)
    room.run(20, rate=64, output_tokens=32)
    busy = max(len(step.scheduled) for step in heard)
    heard.clear()
    room.run(40, batch_limit=2, token_budget=16)
    room.llm.events._listeners.pop()
    assert busy > 4
    assert len(heard[0].scheduled) <= 16  # who runs goes on, one token each, within the budget
    assert all(sum(num_new for _, num_new, _ in step.scheduled) <= 16 for step in heard)
    assert all(len(step.scheduled) <= 2 for step in heard[-5:])
    room.run(1, batch_limit=16, token_budget=128)
    assert room.llm.config == room.llm.engine.built_config


def test_engine_takes_no_limits_above_those_it_was_built_with(llm: LLM) -> None:
    for limits in ((17, 64), (4, 256)):
        with pytest.raises(ConfigError, match="was built for at most max_num_seqs=16 and max_num_batched_tokens=128"):
            llm.engine.limit(*limits)
    with pytest.raises(ConfigError, match="max_num_seqs must be at least 1"):
        llm.engine.limit(0, 64)
    assert llm.config == llm.engine.built_config


def test_a_shared_prefix_is_found_in_the_cache(room: EngineRoom) -> None:
    alone = room.run(40)[-1]
    shared = room.run(80, shared_tokens=32)[-1]
    assert alone.hit_tokens == 0
    assert shared.hit_tokens >= 32 and shared.hit_tokens % 8 == 0
    assert shared.prompt_tokens > alone.prompt_tokens


def test_a_played_room_starts_pauses_and_leaves_no_thread(llm: LLM) -> None:
    room = EngineRoom(llm, LOAD)  # on the wall clock
    told: list[int] = []
    stop = room.follow(lambda: told.append(len(room.frames)))
    assert not room.frames
    room.ask("start")
    wait_until(lambda: len(room.frames) >= 3 and room.frames[-1].output_tokens > 0)
    assert room.is_playing
    room.stop()
    assert not room.is_playing and room.failure == "" and told
    assert not [thread for thread in threading.enumerate() if thread.name == "minivllm-engine-room"]
    num_frames, time_s = len(room.frames), room.frames[-1].time_s
    time.sleep(0.15)
    room.ask("one step")
    assert room.wait()
    assert len(room.frames) == num_frames + 1
    assert room.frames[-1].time_s - time_s < 0.15  # pauses do not count
    stop()
    num_told = len(told)
    room.close()
    assert len(told) == num_told


def test_wishes_from_many_threads_are_all_obeyed_by_one(room: EngineRoom) -> None:
    room.ask("start")
    values = room.choices["prompt_tokens"]
    threads = [threading.Thread(target=room.ask, args=("prompt_tokens", value)) for value in values * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    room.ask("rate", 16)
    room.stop()
    assert (room.load, room.failure) == (room.wished, "") and room.load.rate == 16
    shown = [d.reason for frame in room.frames for d in frame.decisions if d.what == "slider"]
    assert "rate 16" in shown


def test_asking_takes_no_time_while_a_step_is_long(room: EngineRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    is_in_step, may_go_on = threading.Event(), threading.Event()
    run = room.llm.runner.run

    def slow(plan: StepPlan) -> StepResult:
        is_in_step.set()
        assert may_go_on.wait(WAIT_S)
        return run(plan)

    monkeypatch.setattr(room.llm.runner, "run", slow)
    room.ask("start")
    assert is_in_step.wait(WAIT_S)
    room.ask("batch_limit", 2)  # returns, though the step is not over
    assert (room.wished.batch_limit, room.load.batch_limit) == (2, 8)
    room.ask("pause")
    may_go_on.set()
    assert room.wait() and room.load.batch_limit == 2


def test_reset_drops_all_keeps_the_sliders_and_begins_at_zero(room: EngineRoom) -> None:
    room.run(30, shared_tokens=16, rate=32)
    assert room.llm.engine.has_work and room.frames
    room.reset()
    pool = room.llm.engine.kv.pool
    assert not room.llm.engine.has_work and pool.num_free == pool.num_usable
    assert all(block.entry is None for block in pool.blocks)
    assert room.frames == [] and room.load.shared_tokens == 16 and room.failure == ""
    again = [counts(frame) for frame in room.run(30)]
    assert room.frames[-1].step > 30  # the engine's steps go on; the room's seconds do not
    room.reset()
    assert [counts(frame) for frame in room.run(30)] == again


def test_a_step_that_fails_stops_the_room_and_says_why(room: EngineRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: StepPlan) -> StepResult:
        raise RuntimeError("the device fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr(room.llm.runner, "run", fail)
        room.ask("start")
        wait_until(lambda: room.failure != "")
        assert room.wait() and not room.is_playing
    assert room.failure == "RuntimeError: the device fell off the bus"
    room.reset()
    assert room.failure == "" and room.run(5)[-1].output_tokens > 0


def test_with_nobody_to_come_a_step_is_refused_and_play_waits(room: EngineRoom) -> None:
    with pytest.raises(ConfigError, match="nobody is there and nobody comes: raise the rate"):
        room.run(1, rate=0)
    room.ask("one step")
    assert room.wait()
    assert room.failure == "nobody is there and nobody comes: raise the rate"
    room.ask("start")
    wait_until(lambda: room.is_playing)
    with pytest.raises(ConfigError, match=r"plays: ask\('pause'\) first"):
        room.run(1)
    room.ask("rate", 8)
    wait_until(lambda: bool(room.frames) and room.frames[-1].arrived > 0)
    room.stop()


def test_who_comes_when_a_thousand_wait_is_turned_away(room: EngineRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_room, "MOST_WAITING", 3)
    frame = room.run(20, rate=512, batch_limit=1)[-1]
    assert frame.refused > 0 and frame.num_waiting <= 3


@pytest.mark.parametrize(
    ("wish", "value", "named"),
    [
        ("rate", 3, "rate must be one of 0, 0.25"),
        ("rate", True, "rate must be one of"),
        ("batch_limit", 17, "batch_limit must be one of 1, 2, 4, 8, 16, not 17"),
        ("token_budget", "many", "token_budget must be one of 16, 32, 64, 128"),
        ("speed", 1, "there is no 'speed'; there are: start, pause, one step, reset, save, rate"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_at_the_door(room: EngineRoom, wish: str, value: object, named: str) -> None:
    with pytest.raises(MiniVLLMError, match=named) as caught:
        room.ask(wish, value)
    assert "\n" not in str(caught.value) and room.wished == room.load
    with pytest.raises(MiniVLLMError, match=named):
        room.run(1, **{wish: value})  # type: ignore[arg-type]


def test_the_room_wants_an_idle_engine_of_its_own(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="drives an LLM"):
        EngineRoom(llm.engine)  # type: ignore[arg-type]
    generation = llm.text_engine.add(llm.text_engine.check([1, 2, 3]), SamplingParams(max_tokens=3))
    with pytest.raises(ConfigError, match="the engine has requests or pinned prefixes"):
        EngineRoom(llm)
    llm.text_engine.abort(generation)
    llm.pin_prefix(list(range(10)), "mine")
    with pytest.raises(ConfigError, match="the engine has requests or pinned prefixes"):
        EngineRoom(llm)


def test_saved_by_the_button_it_is_the_run_and_where_it_came_from(
    room: EngineRoom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    room.run(20)
    room.ask("save")
    assert room.wait() and room.said == f"{len(room.frames)} frames were saved to engine_room.json"
    run = EngineRun.load(tmp_path / "engine_room.json")
    assert len(run.frames) == len(room.frames) and run.header["live"] == "recorded"
    assert {"machine", "commit", "seed", "command", "prompts", "model"} <= set(run.header)
    assert run.header["max_num_seqs"] == 16  # what it was built with, not the slider's 8
    assert json.loads((tmp_path / "engine_room.json").read_text())["minivllm_engine_run"] == 1


def test_a_folder_that_cannot_be_written_does_not_stop_a_room_that_plays(
    room: EngineRoom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_room, "SAVED_AS", tmp_path / "nowhere" / "run.json")
    room.run(3)
    room._obey(("start", 0.0))
    room._obey(("save", 0.0))
    assert room.is_playing and not room.failure and "nowhere" in room.said
    room.stop()


def test_guests_come_at_the_rate_with_the_lengths_that_were_set() -> None:
    guests = Guests(range(100), Load(rate=4, prompt_tokens=20, output_tokens=8, shared_tokens=10), seed=0)
    come = guests.due(500.0)
    assert len(come) == pytest.approx(2000, rel=0.07)
    assert [guest.due_s for guest in come] == sorted(guest.due_s for guest in come)
    own = [len(guest.token_ids) - 10 for guest in come]
    assert (min(own), max(own)) == (10, 30) and sum(own) / len(own) == pytest.approx(20, rel=0.02)
    assert {guest.num_output for guest in come} == set(range(4, 13))
    assert all(guest.token_ids[:10] == list(range(10)) for guest in come)
    guests.change(Load(rate=0), 500.0)
    assert guests.due(1e9) == []
    guests.change(Load(rate=1, prompt_tokens=1, output_tokens=1), 600.0)
    assert guests.due(1000.0)[0].due_s > 600


def test_the_longest_of_all_sliders_fits_into_the_engine(llm: LLM) -> None:
    room = EngineRoom(llm, Load(), step_s=0.05)
    choices = choices_of(llm.config)
    most = {name: max(choices[name]) for name in ("prompt_tokens", "output_tokens", "shared_tokens")}
    frame = room.run(300, rate=2, **most)[-1]
    assert frame.refused == 0 and frame.finished > 5
    longest = most["shared_tokens"] + 1.5 * (most["prompt_tokens"] + most["output_tokens"])
    assert longest == llm.config.max_model_len
    room.close()


def test_sliders_have_the_nearest_value_not_above_the_wish() -> None:
    assert nearest((1, 2, 4, 8), 7) == 4 and nearest((4, 8), 1) == 4 and nearest((0, 0.25, 1), 0.5) == 0.25


def test_the_clock_counts_steps_or_driven_seconds() -> None:
    counted = RoomClock(step_s=0.5)
    counted.run()
    counted.count_step()
    counted.rest(0.75)
    counted.halt()
    assert counted() == 0.75
    wall = RoomClock()
    wall.run()
    time.sleep(0.02)
    wall.halt()
    passed_s = wall()
    time.sleep(0.02)
    assert wall() == passed_s >= 0.02
    wall.skip_to(9.0)
    assert wall() == pytest.approx(9.0)


def test_an_emptied_room_keeps_what_it_shows_and_goes_on(room: EngineRoom) -> None:
    room.run(30, rate=32)
    num_frames, pool = len(room.frames), room.llm.engine.kv.pool
    room.empty()
    assert not room.llm.engine.has_work and pool.num_free == pool.num_usable
    assert len(room.frames) >= num_frames and room.frames[-1].num_live == 0 and room.load.rate == 32
    assert room.run(5)[-1].output_tokens > room.frames[num_frames - 1].output_tokens


def test_a_closed_room_says_so(llm: LLM) -> None:
    room = EngineRoom(llm, LOAD, step_s=0.05)
    room.run(5)
    room.close()
    with pytest.raises(MiniVLLMError, match=r"this engine room is closed: make another EngineRoom\(llm\)"):
        room.ask("start")
    assert room.frames and llm.config == llm.engine.built_config and not llm.events
    EngineRoom(llm, LOAD, step_s=0.05).close()


def test_counted_seconds_become_those_of_the_machine(room: EngineRoom) -> None:
    counted_s = room.run(20)[-1].time_s
    room.count_steps(None)
    frames = room.run(5)
    assert 0 < frames[-1].time_s - counted_s < 5 * 0.05 + 2.0
    room.count_steps(100.0)
    assert room.run(1, rate=8)[-1].time_s - frames[-1].time_s >= 100


def test_a_reset_while_it_plays_pauses_it_and_steps_come_after_what_was_asked(room: EngineRoom) -> None:
    room.ask("start")
    wait_until(lambda: room.is_playing)
    room.reset()
    assert not room.is_playing and not room.llm.engine.has_work
    room.ask("batch_limit", 1)
    room.run(2)
    assert room.load.batch_limit == room.wished.batch_limit == 1
    assert all(frame.load.batch_limit == 1 for frame in room.frames[-1:])
    room.ask("start")
    with pytest.raises(ConfigError, match="the engine room plays"):
        room.run(1)


def test_a_closed_room_takes_no_step(llm: LLM) -> None:
    room = EngineRoom(llm, LOAD, step_s=0.05)
    room.close()
    with pytest.raises(ConfigError, match="is closed: make another"):
        room.run(1)
    assert not llm.engine.has_work


@pytest.mark.parametrize("step_s", [-1, 0, "1", True, float("nan"), float("inf")])
def test_a_step_that_counts_no_time_is_refused(llm: LLM, room: EngineRoom, step_s: float) -> None:
    for attempt in (lambda: room.count_steps(step_s), lambda: EngineRoom(llm, step_s=step_s)):
        with pytest.raises(ConfigError, match="a number above 0, or None for those of the clock, not "):
            attempt()
    before_s, after_s = (room.run(1)[-1].time_s for _ in range(2))
    assert after_s - before_s == pytest.approx(0.05)  # it counts as before


def test_what_is_no_load_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match=r"is a Load, such as Load\(rate=4\), not \{\}"):
        EngineRoom(llm, {})  # type: ignore[arg-type]
    for rate in ("2", None, True, float("nan")):
        with pytest.raises(MiniVLLMError, match="Load: rate must be a number, not "):
            Load(rate=rate)  # type: ignore[arg-type]
    assert not llm.events
