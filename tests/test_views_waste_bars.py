"""Waste bars: each control plays the engine again with its own value, and the published figures stand beside."""

import json
from collections.abc import Mapping
from functools import cache

import pytest
from PIL import Image

from minivllm.course.memory_use import average, memory_over_time, saturated
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.allocator_room import FOUR, play_room
from minivllm.lab.allocator_study import FIGURE_2, NAMES
from minivllm.trace import Trace
from minivllm.views.memory_strip import MemoryStrip
from minivllm.views.memory_strip_picture import USES
from minivllm.views.sketch import Box, Slider, Words
from minivllm.views.waste_bars import BOTTOM, PARTS, TOP, WasteBars


@cache
def short(**chosen: object) -> Mapping[str, Trace]:
    """Runs that are just long enough to fill the pool; brief requests write more tokens before it is full."""
    num_tokens = 16_000 if chosen["lengths"] == "alpaca" else 5_000
    return play_room(num_tokens=num_tokens, **chosen)  # type: ignore[arg-type]


class Watched:
    """Plays short runs and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def __call__(self, **chosen: object) -> Mapping[str, Trace]:
        self.asked.append(chosen)
        return short(**chosen)


def bars(**chosen: int | str) -> tuple[WasteBars, Watched]:
    play = Watched()
    return WasteBars(play, FIGURE_2, NAMES, **chosen), play


def test_it_begins_at_the_papers_setting_and_folds_the_events() -> None:
    view, play = bars()
    assert play.asked == [
        {"lengths": "sharegpt", "spread": 1.0, "max_model_len": 2048, "block_size": 16, "num_slots": 15_728}
    ]
    picture = view.drawn()
    assert tuple(picture["columns"]) == FOUR
    for name, trace in view.traces.items():
        shares = average(saturated(memory_over_time(trace)))
        assert view.columns[name].shares == shares and view.columns[name].num_steps == trace.last_step
        assert picture["columns"][name]["live"] == shares.live
    requests = [picture["columns"][name]["num_requests"] for name in ("contiguous", "paged")]
    assert requests[0] == 7 and picture["gap"] == requests[1] / requests[0]
    assert f"{picture['gap']:.1f} times as many" in picture["title"]


@pytest.mark.parametrize(
    ("control", "value", "asked"),
    [("lengths", "alpaca", "alpaca"), ("spread", 50, 0.5), ("block_size", 128, 128), ("max_model_len", 4096, 4096),
     ("num_slots", 10_485, 10_485)],
)  # fmt: skip
def test_every_control_plays_with_its_value_and_redraws(control: str, value: int | str, asked: object) -> None:
    view, play = bars()
    before = view.drawn()
    view.move(control, value)
    view.flush()
    assert play.asked[-1][control] == asked and len(play.asked) == 2
    assert view.picture["columns"] != before["columns"] and view.picture["status"] == ""
    assert view.picture["title"] == view.drawn()["title"] and len(play.asked) == 2  # played once for each setting
    view.close()


def test_longer_promises_leave_fewer_requests_and_a_larger_block_a_longer_tail() -> None:
    view, _ = bars()
    view.move("max_model_len", 4096)
    assert view.columns["contiguous"].shares.num_requests == 3  # 15,728 / 4,096
    assert "⌊15,728 / 4,096⌋ = 3" in view.drawn()["lines"][0] and "21.87%" in view.drawn()["lines"][1]
    shares = view.columns["paged"].shares
    view.move("block_size", 256)
    wide = view.columns["paged"].shares
    assert wide.reserved + wide.internal > 5 * (shares.reserved + shares.internal)


def test_toggle_makes_all_lengths_equal_and_back() -> None:
    view, play = bars()
    gap = view.drawn()["gap"]
    view.move("lengths", "equal")
    assert play.asked == play.asked[:1]  # it plays when it draws
    picture = view.drawn()
    assert (play.asked[-1]["lengths"], play.asked[-1]["spread"], play.asked[-1]["max_model_len"]) == (
        "sharegpt",
        0,
        512,
    )
    assert picture["title"].startswith("All lengths equal and known: contiguous memory") and picture["gap"] < gap / 3
    assert view.columns["contiguous"].shares.num_requests == 30 and view.columns["contiguous"].shares.internal < 4
    view.move("spread", 25)  # chats of unlike lengths do not fit 512
    values = {control.name: control.value for control in view.drawn()["controls"]}
    assert values["lengths"] == "sharegpt" and values["max_model_len"] == 1024
    view.move("lengths", "equal")
    view.move("lengths", "sharegpt")
    assert {c.name: c.value for c in view.drawn()["controls"]} == {
        "lengths": "sharegpt", "spread": 100, "max_model_len": 2048, "block_size": 16, "num_slots": 15_728
    }  # fmt: skip
    assert view.drawn()["gap"] == gap


def test_every_setting_of_the_promise_can_be_played() -> None:
    two = ("contiguous", "paged")
    view = WasteBars(lambda **chosen: short(allocators=two, **chosen), FIGURE_2, NAMES, num_slots=10_485)
    for lengths in ("alpaca", "sharegpt", "equal"):
        view.move("lengths", lengths)
        [slider] = [c for c in view.drawn()["controls"] if c.name == "max_model_len"]
        assert isinstance(slider, Slider)
        for value in (slider.values[0], slider.values[-1]):
            view.move("max_model_len", value)
            assert view.drawn()["columns"]["paged"]["live"] > 70
        assert (512 in slider.values) == (lengths != "sharegpt")


def test_published_and_own_bars_are_in_proportion() -> None:
    view, _ = bars()
    boxes = [mark for mark in view.drawn()["marks"] if isinstance(mark, Box)]
    for name, published in FIGURE_2.items():
        ours = [getattr(view.columns[name].shares, part) for part in PARTS]
        for label, figures in (("paper", published), ("ours", ours)):
            for part, share in zip(PARTS, figures, strict=True):
                if share:
                    words = f"{label}, {part}: {share:.1f}%"
                    box = next(b for b in boxes if b.words == words)
                    assert box.height == pytest.approx(share / 100 * (BOTTOM - TOP))
                    assert (box.fill, box.pattern) == USES[part][:2]
    assert any(box.words == "paper: 3.7% without labels" and box.pattern == "outline" for box in boxes)
    written = [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]
    assert {"20.4", "26.8", "38.2", "96.3", "contiguous = Orca (Max)", "paged = vLLM"} <= {*written}


def test_published_bars_stand_only_beside_requests_like_theirs_and_the_text_says_so() -> None:
    view, _ = bars()
    for control, value, is_there in (("max_model_len", 4096, True), ("lengths", "alpaca", False),
                                     ("lengths", "sharegpt", True), ("spread", 50, False)):  # fmt: skip
        view.move(control, value)
        picture = view.drawn()
        boxes = [mark for mark in picture["marks"] if isinstance(mark, Box)]
        assert any(box.words.startswith("paper") for box in boxes) == is_there
        assert ("(20.4)" in picture["text"]) == ("ours (paper)" in picture["text"]) == is_there
        said = "the paper's bars stay those of" if is_there else "the paper's bars are left out"
        assert picture["lines"][-1].startswith(said) and picture["text"].endswith(picture["lines"][-1])


def test_strip_beside_follows_the_sliders() -> None:
    view, play = bars()
    strip = MemoryStrip.beside(view)
    strip.move("run", "buddy")
    before = strip.drawn()
    view.move("block_size", 64)
    view.flush()
    strip.flush()
    assert strip.picture["title"] != before["title"] and ", buddy: " in strip.picture["title"]
    assert len(play.asked) == 2  # one run feeds both
    for each in (view, strip):
        each.close()


def test_what_the_engine_refuses_is_said_in_the_status_line() -> None:
    def refuse(**chosen: object) -> Mapping[str, Trace]:
        if chosen["block_size"] == 8:
            raise ConfigError("no such pool")
        return short(**chosen)

    view = WasteBars(refuse, FIGURE_2, NAMES)
    view.move("block_size", 8)
    view.flush()
    assert view.picture["status"] == "no such pool"
    view.move("block_size", 16)
    view.flush()
    assert view.picture["status"] == ""
    view.close()


@pytest.mark.parametrize(
    ("control", "value"), [("lengths", "x"), ("spread", 33), ("block_size", True), ("max_model_len", 512), ("pool", 1)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    view, _ = bars()
    with pytest.raises(MiniVLLMError) as caught:
        view.move(control, value)
    assert "\n" not in str(caught.value)


def test_twins_hold_the_numbers_and_repeat() -> None:
    bundles = [bars()[0]._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert "(20.4)" in text and "(57.3)" in text and "(96.3)" in text and "power_of_two = Orca (Pow2)" in text
    assert "steps" in text and json.loads(json.dumps(bars()[0].drawn()))["view"] == "waste-bars"


def test_fallback_is_a_picture_of_the_right_size() -> None:
    image = bars(lengths="equal")[0].image()
    assert isinstance(image, Image.Image) and image.width > 1400
    assert len(image.getcolors(1 << 24) or []) > 10
