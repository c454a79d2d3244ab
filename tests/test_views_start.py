"""Readiness radar and unit trainer: every control moved, and what the picture then says."""

import json
from math import hypot

import pytest
from PIL import Image

from minivllm.course.learner import open_records
from minivllm.course.progress import ProgressFile
from minivllm.course.records import Kept
from minivllm.course.unit_drill import TOPICS
from minivllm.errors import MiniVLLMError
from minivllm.views.choice_rows import RIGHT, WRONG
from minivllm.views.readiness import CENTRE_X, NOTHING_PX, RADIUS_PX, SHAPE, ReadinessRadar
from minivllm.views.sketch import Box, Choice, Dot, SketchPicture, Words
from minivllm.views.sketch_view import SketchView
from minivllm.views.unit_trainer import UnitTrainer


def radar(seed: str = "example") -> ReadinessRadar:
    return ReadinessRadar(Kept(seed))


def choice_named(picture: SketchPicture, name: str) -> Choice:
    found = next(control for control in picture["controls"] if control.name == name)
    assert isinstance(found, Choice)
    return found


def answer(view: ReadinessRadar, *, is_right: bool) -> str:
    """Answer the question on the table by the controls; returns its number and words."""
    diagnostic = view._diagnostic
    item = diagnostic.items[view._controls.item - 1]
    letters = [letter for letter, _ in item.question.lettered()]
    letter = next(one for one in letters if item.question.by_letter(one).is_right is is_right)
    view.move("answer", letter)
    view.move("hand in", "yes")
    return item.question.by_letter(letter).words


def boxes(view: SketchView) -> list[Box]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Box)]


def test_radar_takes_twenty_answers_and_says_where_to_start() -> None:
    view = radar()
    for _ in range(20):
        answer(view, is_right=view._diagnostic.items[view._controls.item - 1].group != "E")
    picture = view.drawn()
    assert picture["title"].startswith("18 of 20 right. Start with notebook 03, then 09 (Continuous batching")
    assert [score.share for score in picture["scores"]] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert len(picture["lines"]) == 2 and all("Right: " in line for line in picture["lines"])
    assert picture["verdict"] == "" or picture["verdict"].startswith("Question 20: Right")


def test_radar_draws_shares_as_distances_from_the_centre() -> None:
    view = radar()
    for _ in range(20):
        answer(view, is_right=view._diagnostic.items[view._controls.item - 1].group in "AC")
    dots = [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot)]
    centre_y = dots[0].y + RADIUS_PX  # A stands straight up
    reach = [hypot(dot.x - CENTRE_X, dot.y - centre_y) for dot in dots]
    wanted = [RADIUS_PX if score.group in "AC" else NOTHING_PX for score in view.drawn()["scores"]]
    assert reach == pytest.approx(wanted, abs=0.2) and {dot.shape for dot in dots} == {"circle"}
    assert {dot.fill for dot in dots} == {SHAPE}


def test_a_subject_that_is_half_answered_has_a_diamond_and_others_none() -> None:
    view = radar()
    answer(view, is_right=True)
    dots = [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot)]
    assert [dot.shape for dot in dots] == ["diamond"] and "1 of 1 right" in dots[0].words
    labels = [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]
    assert "A: 100%" in labels and "B: ?" in labels


def test_a_wrong_answer_is_explained_in_one_line_and_marked() -> None:
    view = radar()
    words = answer(view, is_right=False)
    picture = view.drawn()
    assert picture["verdict"].startswith("Question 1: Not so. ") and words.removesuffix(".") in picture["lines"][0]
    assert "So far: start with notebook 02" in picture["title"]
    assert [box.pattern for box in boxes(view) if box.fill == WRONG] == ["hatch"]  # its square
    view.move("item", 1)
    fills = [(box.fill, box.pattern) for box in boxes(view)]
    assert fills.count((WRONG, "hatch")) == 2 and fills.count((RIGHT, "solid")) == 1
    assert "(wrong)" in view.drawn()["text"]
    assert choice_named(view.drawn(), "answer").options == [("", "answered")]


def test_item_slider_opens_any_question_and_picks_are_dropped() -> None:
    view = radar()
    view.move("answer", "b")
    assert [box.border for box in boxes(view)].count("pick") == 3  # the row, the button, the square of the question
    view.move("item", 12)
    picture = view.drawn()
    assert view._diagnostic.items[11].question.ask in picture["text"]
    assert choice_named(picture, "answer").value == ""


def test_nothing_is_handed_in_without_a_pick_and_an_answer_counts_once() -> None:
    view = radar()
    with pytest.raises(MiniVLLMError, match="pick an answer first"):
        view.move("hand in", "yes")
    view.move("hand in", "no")
    answer(view, is_right=True)
    view.move("item", 1)
    for control, value in (("answer", "a"), ("hand in", "yes")):
        with pytest.raises(MiniVLLMError, match="must be one of"):
            view.move(control, value)
    assert view.drawn()["scores"][0].num_answered == 1


def test_begin_again_forgets_and_draws_other_numbers() -> None:
    view = radar()
    answer(view, is_right=False)
    before = view._diagnostic.item("A2").question.ask
    view.move("begin again", "no")
    assert view.drawn()["lines"]
    view.move("begin again", "yes")
    picture = view.drawn()
    assert picture["title"].startswith("20 questions, none answered yet") and picture["lines"] == []
    assert view._diagnostic.item("A2").question.ask != before


def test_a_click_on_a_row_is_the_same_control_as_the_list() -> None:
    view = radar()
    clicks = [box.click for box in boxes(view) if box.click]
    assert [click for click in clicks if click[0] == "answer"] == [("answer", letter) for letter in "abcd"]
    assert [value for name, value in clicks if name == "item"].count(1) == 1 and ("hand in", "yes") in clicks
    for control, value in clicks:
        if control == "answer":
            view.move(control, value)
            assert choice_named(view.drawn(), "answer").value == value


def test_radar_keeps_its_answers_for_the_next_time(tmp_path: object) -> None:
    store = ProgressFile(tmp_path / "progress.json")  # type: ignore[operator]
    view = ReadinessRadar(store)
    answer(view, is_right=True)
    again = ReadinessRadar(store)
    assert again.drawn()["title"].startswith("1 of 1 right, 19 to come")
    assert again._controls.item == 2


def test_an_example_learner_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("MINIVLLM_LEARNER", "example")
    monkeypatch.setenv("MINIVLLM_DATA", str(tmp_path))
    open_records.cache_clear()
    answer(ReadinessRadar(), is_right=True)
    UnitTrainer()
    open_records.cache_clear()
    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]


def right_and_wrong(view: UnitTrainer) -> tuple[str, list[str]]:
    question = view._drill.question
    letters = [letter for letter, _ in question.lettered()]
    wrong = [letter for letter in letters if not question.by_letter(letter).is_right]
    return next(letter for letter in letters if letter not in wrong), wrong


def test_trainer_names_the_slip_at_once_and_counts_first_tries() -> None:
    view = UnitTrainer("GB and GiB", seed="example")
    right, wrong = right_and_wrong(view)
    option = view._drill.question.by_letter(wrong[0])
    view.move("answer", wrong[0])
    assert option.slip in view.drawn()["verdict"] and view.drawn()["num_done"] == 0
    view.move("answer", right)
    picture = view.drawn()
    assert picture["verdict"].startswith("Right: ") and picture["slips"] == {option.slip: 1}
    assert (picture["num_done"], picture["num_right_at_once"]) == (1, 0) and f"{option.slip}: once" in picture["text"]
    view.move("new question", "yes")
    view.move("answer", right_and_wrong(view)[0])
    picture = view.drawn()
    assert (picture["num_done"], picture["num_right_at_once"]) == (2, 1)
    assert picture["title"].startswith("1 of 2 questions right at the first try")


def test_trainer_new_question_differs_and_start_over_counts_from_zero() -> None:
    view = UnitTrainer(seed="example")
    first = view._drill.question.ask
    view.move("new question", "no")
    assert view._drill.question.ask == first
    view.move("answer", right_and_wrong(view)[0])
    view.move("new question", "yes")
    assert view._drill.question.ask != first and view.drawn()["verdict"] == ""
    view.move("start over", "no")
    assert view.drawn()["num_done"] == 1
    view.move("start over", "yes")
    assert view.drawn()["num_done"] == 0 and view._drill.question.ask != first


@pytest.mark.parametrize("topic", TOPICS)
def test_trainer_draws_every_topic(topic: str) -> None:
    view = UnitTrainer(seed="example")
    view.move("topic", topic)
    picture = view.drawn()
    assert choice_named(picture, "topic").value == topic and view._drill.question.ask in picture["text"]
    marked = [box for box in boxes(view) if box.border == "ink"]
    assert len(marked) == (8 if not view._drill.prefix else 2)  # the byte's bits, or the two parts of a bar
    assert view.image().width > 1400


def test_trainer_ends_a_question_with_its_right_answer() -> None:
    view = UnitTrainer(seed="example")
    right, wrong = right_and_wrong(view)
    view.move("answer", wrong[0])
    with pytest.raises(MiniVLLMError, match="tried already"):
        view.move("answer", wrong[0])
    view.move("answer", right)
    with pytest.raises(MiniVLLMError, match="must be one of"):
        view.move("answer", wrong[1])
    clicks = [box.click for box in boxes(view) if box.click]
    assert clicks == [("new question", "yes")]


def test_ladder_is_drawn_to_scale() -> None:
    rows = [box for box in boxes(UnitTrainer(seed="example")) if box.words.endswith("more")]
    whole = next(box for box in boxes(UnitTrainer(seed="example")) if box.words == "1 GB").width
    shares = [round(100 * box.width / whole, 1) for box in rows]
    assert shares == [2.4, 4.9, 7.4, 10.0] and [box.words for box in rows][2] == "7.4% more"


@pytest.mark.parametrize(
    ("view", "control", "value"),
    [(radar, "item", 21), (radar, "item", True), (radar, "answer", "e"), (radar, "begin again", "maybe"),
     (radar, "x", 1), (lambda: UnitTrainer(seed="1"), "answer", "z"),
     (lambda: UnitTrainer(seed="1"), "topic", "miles")],
)  # fmt: skip
def test_controls_refuse_what_they_cannot_take(view: object, control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as caught:
        view().move(control, value)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("view", [radar, lambda: UnitTrainer(seed="1")], ids=["radar", "trainer"])
def test_twins_repeat_and_pictures_are_plain_data(view: object) -> None:
    bundles = [view()._repr_mimebundle_()[0] for _ in range(2)]  # type: ignore[operator]
    assert bundles[0]["image/png"] == bundles[1]["image/png"] and bundles[0]["text/plain"] == bundles[1]["text/plain"]
    made = view()  # type: ignore[operator]
    assert json.loads(json.dumps(made.drawn()))["marks"]
    image = made.image()
    assert isinstance(image, Image.Image) and image.width > 1400


def test_the_page_hears_of_every_move() -> None:
    view = radar()
    view.move("answer", "c")
    view.flush()
    assert view.picture["title"] == view.drawn()["title"] and view.picture["status"] == ""
    view._receive(view, {"control": "answer", "value": "q"}, [])
    view.flush()
    assert "must be one of" in view.picture["status"]
    view.close()
