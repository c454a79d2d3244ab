"""The dashboard under each of its controls: what it draws is what the frames say, live and replayed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from minivllm.course.engine_frames import MOST_DECISIONS, Decision, EngineRun, Frame, Load
from minivllm.errors import MiniVLLMError
from minivllm.views.dashboard import Dashboard
from minivllm.views.dashboard_panels import HEAD, NUM_POINTS, PANEL_WIDTH, PANELS, PLOT, amount, window
from minivllm.views.dashboard_picture import SETTINGS
from minivllm.views.sketch import Choice, Line, Press, Slider, Trail, Words

HOSTILE = "<img src=x onerror=window.hacked=1>"
HEADER: dict[str, object] = {
    "model": "hand-made", "dtype": "float32", "machine": "none", "commit": "abc", "seed": 0, "command": "by hand",
}  # fmt: skip
CHOICES: dict[str, tuple[float, ...]] = {
    "rate": (0, 1, 2), "prompt_tokens": (4, 64), "output_tokens": (4, 32), "shared_tokens": (0, 16),
    "token_budget": (16, 2048), "batch_limit": (1, 8, 256),
}  # fmt: skip


def frame(i: int, **changes: object) -> Frame:
    """Frame i at i tenths of a second: ten tokens out in each, 40 computed, two steps of 30 ms, one request."""
    made = Frame(
        time_s=i / 10, step=2 * i, num_running=i % 7, num_waiting=3, num_preempted=1, num_live=20, num_cached=5,
        num_free=15, arrived=2 * i, finished=i, refused=0, preemptions=1, output_tokens=10 * i, computed_tokens=40 * i,
        prompt_tokens=30 * i, hit_tokens=6 * i, steps=2 * i, step_ms=60.0 * i, costed_steps=0, costed_ms=0.0,
        floor_ms=0.0, weight_bytes=0, kv_bytes=0, logit_bytes=0, ttft_p50_ms=80.0, ttft_p95_ms=200.0, gap_p50_ms=30.0,
        gap_p95_ms=None, load=Load(), decisions=(Decision(2 * i, f"r{i}", "began", "fits"),),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def a_run(num: int = 101) -> EngineRun:
    return EngineRun({**HEADER, "live": "recorded"}, tuple(frame(i) for i in range(num)))


class FakeRoom:
    """A room that only notes what is asked."""

    def __init__(self, frames: Sequence[Frame] = ()) -> None:
        self.frames, self.header = list(frames), {**HEADER, "live": "live"}
        self.is_playing, self.failure, self.said, self.wished = False, "", "", Load()
        self.choices: Mapping[str, Sequence[float]] = CHOICES
        self.asked: list[tuple[str, object]] = []
        self.followers: list[Callable[[], None]] = []

    def ask(self, wish: str, value: object = None) -> None:
        self.asked.append((wish, value))
        if isinstance(value, int | float):
            self.wished = self.wished.changed(wish, value)

    def follow(self, follower: Callable[[], None]) -> Callable[[], None]:
        self.followers.append(follower)
        return lambda: self.followers.remove(follower) if follower in self.followers else None


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_numbers_are_those_of_the_last_second() -> None:
    picture = Dashboard.replay(a_run()).drawn()
    assert picture["title"] == (
        "Recorded, hand-made, second 10.0, step 200: 2 run, 3 wait, 1 of them preempted."
    )  # fmt: skip
    wanted = {
        "tokens per second": "out 100 computed 400", "first token after": "half within 80 95% within 200",
        "between two tokens": "half within 30 95% within -", "a step": "took 30 floor -",
        "requests  ": "running 2 waiting 3 preempted 1", "blocks": "live 20 cached 5 free 15",
        "prompt tokens found": "hit rate 20", "requests per second": "arrived 20 finished 10 turned away 0",
    }  # fmt: skip
    for title, numbers in wanted.items():
        assert line_of(picture["text"], title).split()[-len(numbers.split()) :] == numbers.split()
    words = [mark.text for mark in picture["marks"] if isinstance(mark, Words)]
    assert {"out 100", "computed 400", "floor -", "preempted 1", "hit rate 20", "arrived 20"} <= set(words)
    assert picture["lines"][1] == "No ledger kept: nobody worked out what these steps had to move."


def test_with_a_ledger_the_floor_and_the_bytes_are_shown() -> None:
    frames = [
        replace(f, costed_steps=f.steps, costed_ms=f.step_ms, floor_ms=f.steps * 6.0,
                weight_bytes=f.steps * 269 * 10**6, kv_bytes=f.steps * 12 * 10**6, logit_bytes=f.steps * 2 * 10**5)
        for f in a_run().frames
    ]  # fmt: skip
    picture = Dashboard.replay(EngineRun(HEADER, tuple(frames))).drawn()
    assert "took 30" in line_of(picture["text"], "a step") and "floor 6" in line_of(picture["text"], "a step")
    assert picture["lines"][1] == (
        "Ledger, a step of the last second: 269 MB weights, 12 MB K and V, 0.2 MB logits; the floor is 20% of what it "
        "took."
    )


def test_trails_stand_where_the_numbers_are() -> None:
    frames = [frame(i, num_running=i % 5) for i in range(101)]
    picture = Dashboard.replay(EngineRun(HEADER, tuple(frames))).drawn()
    index = next(i for i, panel in enumerate(PANELS) if panel.title == "requests")
    left, top = index % 4 * (PANEL_WIDTH + 12), index // 4 * (HEAD + PLOT + 10 + 12)
    floor = top + HEAD + PLOT
    trails = [
        mark for mark in picture["marks"]
        if isinstance(mark, Trail) and all(left <= x <= left + PANEL_WIDTH and top < y <= floor for x, y in mark.points)
    ]  # fmt: skip
    running = next(trail for trail in trails if trail.thickness == 2)
    drawn = {round((x - left) / PANEL_WIDTH * 30, 1): (floor - y) / PLOT * 5 for x, y in running.points}
    assert drawn and len(drawn) <= NUM_POINTS + 1
    for time_s, value in drawn.items():
        assert value == pytest.approx(frames[round(time_s * 10)].num_running, abs=0.05)
    assert {trail.is_dashed for trail in trails} == {True, False} and len({t.thickness for t in trails}) == 3


def test_unknown_values_leave_a_gap() -> None:
    frames = [frame(i, gap_p50_ms=None if 20 < i < 60 else 30.0) for i in range(101)]
    picture = Dashboard.replay(EngineRun(HEADER, tuple(frames))).drawn()
    level = [
        m for m in picture["marks"] if isinstance(m, Trail) and m.thickness == 2 and len({y for _, y in m.points}) == 1
    ]
    spans = [[round(x) for x, _ in trail.points] for trail in level if trail.points[0][0] > 2 * (PANEL_WIDTH + 12) - 1]
    ends = [(span[0], span[-1]) for span in spans if span[-1] < 3 * PANEL_WIDTH + 24]
    left, pitch = 2 * (PANEL_WIDTH + 12), PANEL_WIDTH / 300
    np.testing.assert_allclose(ends[:2], [(left, left + 20 * pitch), (left + 60 * pitch, left + 100 * pitch)], atol=1.1)


@pytest.mark.parametrize(("seconds", "first_s"), [("10", 20.0), ("30", 0.0), ("120", 0.0)])
def test_the_window_is_as_long_as_chosen_and_thinned_evenly(seconds: str, first_s: float) -> None:
    frames = a_run(301).frames
    shown = window(frames, 300, float(seconds))
    times = [each.time_s for _, each in shown.pairs]
    assert times[0] == pytest.approx(first_s, abs=0.6) and times[-1] == 30.0
    assert len(times) <= NUM_POINTS + 1
    assert all(each.time_s - before.time_s == pytest.approx(min(1.0, each.time_s)) for before, each in shown.pairs)
    view = Dashboard.replay(a_run(301))
    view.move("seconds", seconds)
    assert f"each plot spans {seconds} s" in [m.text for m in view.drawn()["marks"] if isinstance(m, Words)][-1]
    with pytest.raises(MiniVLLMError, match="seconds must be one of 10, 30, 120, not '7'"):
        view.move("seconds", "7")


def test_a_second_later_the_same_frames_are_drawn_and_some_more() -> None:
    frames = a_run(1300).frames
    one, later = (window(frames, index, 120.0) for index in (1250, 1260))
    inner = {each.time_s for _, each in one.pairs[1:-1]}
    assert len(inner - {each.time_s for _, each in later.pairs}) <= 1


def test_a_moved_slider_is_a_line_across_the_plots() -> None:
    frames = [frame(i, load=Load(rate=1 if i < 50 else 4)) for i in range(101)]
    picture = Dashboard.replay(EngineRun(HEADER, tuple(frames))).drawn()
    upright = [m for m in picture["marks"] if isinstance(m, Line) and m.x == m.to_x]
    assert len(upright) == len(PANELS)
    assert upright[0].x == pytest.approx(PANEL_WIDTH * 5.0 / 30, abs=1.5)
    assert "In force: 4 arrivals a second" in picture["lines"][0]


@pytest.mark.parametrize("step", [0, 50, 100])
def test_a_replay_shows_the_frame_of_its_step(step: int) -> None:
    view = Dashboard.replay(a_run())
    view.move("step", step)
    picture = view.drawn()
    assert picture["steps"] == (0, 100, step) and (picture["step_word"], picture["tick_ms"]) == ("frame", 100)
    assert f"second {step / 10:.1f}, step {2 * step}:" in picture["title"]
    newest = [(str(2 * i), f"r{i}", "began") for i in range(step, max(step - MOST_DECISIONS, -1), -1)]
    assert [row[:3] for row in picture["decided"]] == newest
    for wrong in (-1, 101, "3"):
        with pytest.raises(MiniVLLMError, match="step must be a whole number from 0 to 100"):
            view.move("step", wrong)


def test_decisions_are_a_table_with_reasons_in_words() -> None:
    reasons = {
        ("began", "alone"): "nobody else runs", ("waits", "no_budget"): "token budget",
        ("preempted", "no_blocks"): "had to grow", ("finished", "length"): "all the tokens",
        ("slider", "rate 4"): "rate", ("swapped out", "itself"): "last in the order",
        ("refused", "too long"): "too long",
    }  # fmt: skip
    decisions = tuple(Decision(7, f"q{i}", what, reason) for i, (what, reason) in enumerate(reasons))
    picture = Dashboard.replay(EngineRun(HEADER, (frame(0, decisions=decisions),))).drawn()
    rows = picture["decided"][::-1]
    for i, ((what, _), words) in enumerate(reasons.items()):
        assert rows[i][:3] == ("7", f"q{i}", what) and words in rows[i][3]
        assert f"step 7: q{i} {what}, because: {rows[i][3]}" in picture["text"]
    shown = {mark.text for mark in picture["marks"] if isinstance(mark, Words)}
    assert {"step", "request", "decision", "because", "q3", "the token budget of this step is spent"} <= shown


def test_names_from_outside_stay_text_and_short() -> None:
    odd = Decision(1, HOSTILE, "waits", HOSTILE * 9)
    picture = Dashboard.replay(EngineRun({**HEADER, "model": HOSTILE}, (frame(0, decisions=(odd,)),))).drawn()
    shown = [mark.text for mark in picture["marks"] if isinstance(mark, Words) and mark.text.startswith("<img")]
    assert shown and all(len(words) <= 74 for words in shown)


def test_pictures_reach_the_page_as_json() -> None:
    json.dumps(Dashboard.replay(a_run()).drawn())
    json.dumps(Dashboard.follow(FakeRoom(a_run().frames)).drawn())


@pytest.mark.parametrize("button", ["start", "pause", "one step", "reset", "save"])
def test_each_button_leaves_a_wish(button: str) -> None:
    room = FakeRoom()
    view = Dashboard.follow(room)
    assert isinstance(next(c for c in view.drawn()["controls"] if c.name == button), Press)
    view.move(button, "press")
    assert room.asked == [(button, "press")]
    with pytest.raises(MiniVLLMError, match=f"{button} must be one of press"):
        view.move(button, "hold")
    view.close()
    assert room.followers == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_slider_leaves_a_wish_and_shows_it_at_once(setting: str) -> None:
    room = FakeRoom(a_run().frames)
    view = Dashboard.follow(room)
    for value in CHOICES[setting]:
        view.move(setting, value)
        slider = next(c for c in view.drawn()["controls"] if c.name == setting)
        assert isinstance(slider, Slider) and slider.value == value and slider.shown.startswith(f"{value:g} ")
        label, unit = SETTINGS[setting]
        assert f"{label} {value:g} {unit}" in line_of(view.drawn()["text"], "sliders: ")
    assert room.asked == [(setting, value) for value in CHOICES[setting]]
    with pytest.raises(MiniVLLMError, match=f"{setting} must be one of"):
        view.move(setting, 3)
    assert "In force: 2 arrivals a second" in view.drawn()["lines"][0]  # the engine has not read the wishes yet


def test_a_live_view_says_so_shows_the_present_and_what_came_of_it() -> None:
    room = FakeRoom()
    view = Dashboard.follow(room)
    assert view.drawn()["title"] == "Live: nothing has run yet. Press start, or one step."
    room.frames += a_run().frames
    room.is_playing, room.said, room.failure = True, "saved", "the device fell off the bus"
    picture = view.drawn()
    assert picture["title"].startswith("Live, hand-made, second 10.0") and picture["provenance"].startswith("live")
    assert picture["steps"] is None and picture["lines"][-1] == "saved"
    assert picture["status"] == "the device fell off the bus" and picture["text"].endswith(picture["status"])
    with_failure = view.image().height
    room.failure = ""
    assert view.image().height == with_failure - 30  # a line of words less, two pixels each
    pressed = {c.name: c.is_down for c in picture["controls"] if isinstance(c, Press)}
    assert pressed == {"start": True, "pause": False, "one step": False, "reset": False, "save": False}
    with pytest.raises(MiniVLLMError, match="a live view shows the present"):
        view.move("step", 3)
    view.close()


def test_a_recording_says_so_and_where_it_is_from() -> None:
    view = Dashboard.replay(a_run())
    picture = view.drawn()
    assert picture["title"].startswith("Recorded, hand-made") and picture["aria"].startswith("Dashboard. Recorded")
    assert picture["provenance"] == (
        "recorded · model hand-made · dtype float32 · machine none · commit abc · seed 0 · made by: by hand"
    )
    assert [type(control) for control in picture["controls"]] == [Choice]
    with pytest.raises(MiniVLLMError, match="there is no control 'rate'"):
        view.move("rate", 1)
    wrong: tuple[object, ...] = ([], {}, {"a": 3})
    for runs in wrong:
        with pytest.raises(MiniVLLMError, match="draws an EngineRun"):
            Dashboard.replay(runs)  # type: ignore[arg-type]


def test_several_runs_are_chosen_by_their_titles() -> None:
    view = Dashboard.replay({"short": a_run(31), "long": a_run(101)})
    assert "second 3.0" in view.drawn()["title"]
    view.move("step", 7)
    view.move("run", "long")
    assert "second 10.0" in view.drawn()["title"] and view.drawn()["steps"] == (0, 100, 100)
    assert "run long" in view.drawn()["text"]
    with pytest.raises(MiniVLLMError, match="run must be one of short, long, not 'middle'"):
        view.move("run", "middle")


def test_a_new_frame_reaches_the_page_by_the_publisher() -> None:
    room = FakeRoom()
    view = Dashboard.follow(room)
    room.frames += a_run(3).frames
    for follower in room.followers:
        follower()
    view.flush()
    assert "second 0.2" in view.picture["title"]
    view._receive(None, {"control": "rate", "value": 9}, None)
    view.flush()
    assert view.picture["status"] == "rate must be one of 0, 1, 2, not 9"
    view.close()


@pytest.mark.parametrize("num", [0, 1, 2, 101])
def test_the_png_twin_renders_at_any_length(num: int) -> None:
    view = Dashboard.replay(a_run(num))
    assert len(view.png()) > 1000 and view.image().width > 1400
    assert ("nothing has run yet" in repr(view)) == (num == 0)


@pytest.mark.parametrize(
    ("value", "words"), [(None, "-"), (0, "0"), (0.1234, "0.123"), (12.34, "12.3"), (23456.7, "23,457"), (100.0, "100")]
)
def test_amounts_have_three_digits_that_matter(value: float | None, words: str) -> None:
    assert amount(value) == words


@pytest.mark.parametrize("room", [None, {}, "room"])
def test_what_is_no_engine_room_is_refused(room: object) -> None:
    with pytest.raises(MiniVLLMError, match=r"Dashboard\.follow watches an EngineRoom\(llm\), not "):
        Dashboard.follow(room)  # type: ignore[arg-type]
