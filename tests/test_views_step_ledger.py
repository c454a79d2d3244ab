"""The picture of the step ledger: bars are the rows of the events, whatever control is moved, live or recorded."""

import json
from pathlib import Path

import pytest
from PIL import Image

from minivllm.course.step_ledger import LedgerRow, ledger_rows
from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus, StepCosted, StepRan
from minivllm.trace import Trace
from minivllm.views.sketch import Box
from minivllm.views.step_ledger import StepLedger, save_ledgers
from minivllm.views.step_ledger_picture import (
    BOTTOM,
    NUM_BARS,
    PARTS,
    TOP,
    LedgerControls,
    LedgerPicture,
    amount,
    draw,
)
from tests.view_traces import HOSTILE

GB, GFLOP = 10**9, 10**9


def step(number: int, num_new: tuple[int, ...], cost: StepCosted) -> list[Event]:
    scheduled = tuple((f"{HOSTILE}{i}", new, 900 + new) for i, new in enumerate(num_new))
    return [StepRan(number, scheduled, (), len(num_new), 0, 0, 0.25, cost.run_ms, 0.25, ""), cost]


def trace() -> Trace:
    """A prompt bound by compute, one beside three decodes, then 197 decodes of four that take ever longer."""
    events = step(1, (500,), StepCosted(1, 2 * GB, GB, 0, 900 * GFLOP, 4.0, 9.0, unhidden_ms=1.0))
    events += step(2, (1, 1, 1, 500), StepCosted(2, 2 * GB, GB, GB, 904 * GFLOP, 4.0, 8.0))
    for n in range(3, 200):
        events += step(n, (1, 1, 1, 1), StepCosted(n, 2 * GB, 5 * GB, GB, 4 * GFLOP, 4.0, 5.0 + n / 100))
    return Trace({"live": "recorded", "model": HOSTILE, "machine": "a card"}, events)


def rows() -> tuple[LedgerRow, ...]:
    return ledger_rows(trace())


def boxes(picture: LedgerPicture, part: str) -> list[Box]:
    """Of a part, left to right; heights are shares of the axis."""
    return [m for m in picture["marks"] if isinstance(m, Box) and (m.fill, m.pattern) == PARTS[part][:2]]


def test_title_says_share_of_the_floor_and_where_the_rest_is() -> None:
    view = StepLedger.replay(trace())
    run = 9 + 8 + sum(5 + n / 100 for n in range(3, 200))
    floor, last = 4 * 199, sum(1 + n / 100 for n in range(3, 200))
    title = view.drawn()["title"]
    assert title == (
        f"Recorded: of {run:,.0f} ms in 199 steps the floor is {floor / run:.0%}, most of it for K and V;"
        f" {run - floor:.3g} ms remain, {last:.3g} ms of it in decode 3-4."
    )
    assert "recorded · model" in view.drawn()["provenance"] and "a card" in view.drawn()["provenance"]


def test_bars_are_stacked_of_the_floors_parts_and_the_remainder() -> None:
    picture = draw(rows()[:3], LedgerControls())
    heights = {name: [box.height for box in boxes(picture, name)] for name in PARTS}
    axis = (BOTTOM - TOP) / 10  # pixels for a millisecond: the axis goes to 10
    assert heights["weights"] == pytest.approx([2 * axis, 2 * axis, axis])
    assert heights["kv"] == pytest.approx([axis, axis, 2.5 * axis])
    assert heights["logits"] == pytest.approx([axis, 0.5 * axis])
    assert heights["arithmetic"] == pytest.approx([axis])  # of the one step that is bound by compute
    assert heights["remainder"] == pytest.approx([5 * axis, 4 * axis, 1.03 * axis])
    assert {key.words for key in picture["legend"]} == {key.words for key in PARTS.values()}
    assert "bound by compute" in boxes(picture, "arithmetic")[0].words
    assert "bound by memory" in boxes(picture, "logits")[0].words
    assert "weights 2 GB, K and V 5 GB, logits 1 GB, 4 GFLOP" in boxes(picture, "kv")[-1].words


def test_many_steps_are_means_of_a_few_in_a_row() -> None:
    picture = draw(rows(), LedgerControls())
    assert len(picture["bars"]) == 67 <= NUM_BARS and "means of 3 in a row" in picture["text"]
    assert [bar.label for bar in picture["bars"][:2]] == ["1-3", "4-6"] and picture["bars"][-1].label == "199"
    assert picture["bars"][1].mean.run_ms == pytest.approx(5.05)
    whole = sum(bar.mean.run_ms * bar.mean.num_steps for bar in picture["bars"])
    assert whole == pytest.approx(picture["total"].run_ms) == sum(row.run_ms for row in rows())
    assert "means of" not in draw(rows()[:NUM_BARS], LedgerControls())["text"]


def test_every_control_changes_what_is_drawn() -> None:
    view = StepLedger.replay(trace())
    view.move("kind", "prefill")
    assert [bar.label for bar in view.drawn()["bars"]] == ["1"]
    assert "1 prefill step the floor is 44%, most of it for weights; 5 ms remain." in view.drawn()["title"]
    view.move("kind", "mixed")
    assert [bar.label for bar in view.drawn()["bars"]] == ["2"]
    view.move("kind", "decode")
    view.move("steps", "30")
    assert [bar.first_step for bar in view.drawn()["bars"]] == list(range(170, 200))
    view.move("step", 100)
    assert view.drawn()["steps"] == (1, 199, 100)
    assert [bar.first_step for bar in view.drawn()["bars"]] == list(range(71, 101))
    view.move("steps", "all")
    assert view.drawn()["total"].num_steps == 98
    view.move("step", 199)
    view.move("kind", "all")
    view.move("unit", "GB")
    picture = view.drawn()
    moved = 3 + 4 + 197 * 8
    assert f"had to move {moved:,} GB: 62% K and V, 25% weights, 13% logits." in picture["title"]
    assert {name for bar in picture["bars"] for name in bar.parts} == {"weights", "kv", "logits"}
    assert not boxes(picture, "remainder") and len(picture["legend"]) == 3
    view.move("unit", "GFLOP")
    assert "had to do 2,592 GFLOP" in view.drawn()["title"] and "all but 1 ms" in view.drawn()["title"]
    assert view.drawn()["bars"][-1].parts == {"arithmetic": 4.0}
    view.move("steps", "100")
    assert view.drawn()["title"].endswith("; moving hides all of it.")
    view.move("unit", "share")
    for bar in view.drawn()["bars"]:
        assert sum(bar.parts.values()) == pytest.approx(100)
    assert view.drawn()["bars"][-1].parts["remainder"] == pytest.approx(100 * 2.985 / 6.985)
    edges = {round(box.y, 6) for box in boxes(view.drawn(), "remainder")}
    assert edges == {TOP}  # all bars end at 100 percent, the top of the axis


def test_control_refuses_what_it_cannot_take() -> None:
    view = StepLedger.replay(trace())
    for control, value in (("unit", "furlong"), ("kind", 3), ("steps", "7"), ("step", 200), ("step", "1"), ("x", 1)):
        with pytest.raises(MiniVLLMError):
            view.move(control, value)
    with pytest.raises(MiniVLLMError, match="unit must be one of ms, GB, GFLOP, share"):
        StepLedger.replay(trace(), unit="hours")
    with pytest.raises(MiniVLLMError, match="draws a Trace"):
        StepLedger.replay([])  # type: ignore[arg-type]


def test_steps_faster_than_their_floor_say_so() -> None:
    events = step(1, (1,), StepCosted(1, GB, GB, GB, GFLOP, 4.0, 3.0))
    picture = StepLedger.replay(Trace({}, events)).drawn()
    assert picture["title"].endswith("the floor is more than all, 4 ms: these steps ran on a faster machine.")
    assert picture["lines"][-1].startswith("1 step took less than the floor")
    assert not boxes(picture, "remainder")


def test_nothing_to_draw_says_what_to_do() -> None:
    silent = StepLedger.replay(Trace({}, [event for event in trace() if isinstance(event, StepRan)])).drawn()
    assert silent["title"].startswith("Recorded: no step has a cost; let keep_ledger(llm) listen")
    assert silent["bars"] == [] and silent["steps"] is None
    assert draw(rows()[2:], LedgerControls(kind="prefill"))["title"].startswith(
        "Recorded: up to this step there is no prefill step;"
    )


def test_live_view_follows_the_bus_and_says_that_it_is_live() -> None:
    bus = EventBus()
    view = StepLedger.follow(bus, {"model": "m"}, unit="share")
    assert view.drawn()["title"].startswith("Live: no step has a cost")
    for event in trace():
        bus.emit(event)
    view.flush()
    assert view.drawn()["title"].startswith("Live: of ") and view.drawn()["total"].num_steps == 199
    assert view.drawn()["provenance"].startswith("live")
    view.move("step", 50)
    assert view.drawn()["total"].num_steps == 50
    view.stop()
    assert not bus
    view.close()


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [StepLedger.replay(trace(), kind="decode")._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    group = next(line for line in text.splitlines() if line.startswith("decode 3-4"))
    run = sum(5 + n / 100 for n in range(3, 200))
    numbers = ["197", f"{run:,.0f}", f"{4 * 197}", f"{788 / run:.0%}", f"{run - 788:,.0f}", "1,576", "0.788"]
    assert group.split() == ["decode", "3-4", *numbers]
    assert "\n198-199 " in text and "remainder" in text
    assert json.loads(json.dumps(StepLedger.replay(trace()).drawn()))["marks"]
    image = StepLedger.replay(trace()).image()
    assert isinstance(image, Image.Image) and len(image.getcolors(1 << 24) or []) > 20


def test_picture_of_several_runs_is_one_file(tmp_path: Path) -> None:
    path = save_ledgers(tmp_path / "ledger.png", {"nano": rows(), "single": rows()[:5]}, "a model on a card")
    one, both = (Image.open(save_ledgers(tmp_path / "one.png", {"nano": rows()}, "")), Image.open(path))
    assert both.width == one.width and both.height > 1.5 * one.height
    with pytest.raises(MiniVLLMError, match="cannot save the picture"):
        save_ledgers(tmp_path / "no folder" / "x.png", {"nano": rows()}, "")


def test_amounts_have_three_figures_and_no_powers_of_ten() -> None:
    assert [amount(value) for value in (16123.4, 99.94, 0.01234, 0)] == ["16,123", "99.9", "0.0123", "0"]
