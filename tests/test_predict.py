"""Guesses: written down before the answer, never changed after it, compared on a log axis; a notebook never stops."""

import math
from pathlib import Path

import pytest

from minivllm.course.calibration import Calibration, Guess, figure, text
from minivllm.course.predict import Predict
from minivllm.course.progress import ProgressFile
from minivllm.course.records import Kept
from minivllm.views.answer_box import AnswerBox


def predictor() -> tuple[Predict, Kept]:
    kept = Kept()
    return Predict(lambda: kept), kept


def test_an_unfilled_prediction_is_red_stores_nothing_and_folds_the_answer() -> None:
    predict, kept = predictor()
    blocks = predict("05.1", "How many blocks?", ..., unit="blocks")
    assert blocks.card().tone == "open" and "No guess yet" in repr(blocks)
    assert "Answer: 3 blocks" in repr(blocks.reveal(3))
    assert "<details><summary>Answer</summary>3 blocks.</details>" in blocks.reveal(3)._repr_html_()
    assert kept.read("guess", "05.1") is None


def test_a_guess_cannot_be_changed_after_the_answer() -> None:
    predict, kept = predictor()
    predict("05.1", "How many?", 6).reveal(3)
    again = predict("05.1", "How many?", 3)
    assert "stays as it was" in repr(again)
    assert (kept.read("guess", "05.1") or {})["guess"] == 6


def test_who_runs_all_cells_first_can_still_guess_and_is_then_locked() -> None:
    predict, kept = predictor()
    predict("05.1", "How many?").reveal(3)
    predict("05.1", "How many?", 6).reveal(3)
    assert "stays as it was" in repr(predict("05.1", "How many?", 3))
    assert (kept.read("guess", "05.1") or {})["guess"] == 6


def test_a_guess_can_be_changed_before_the_answer() -> None:
    predict, kept = predictor()
    predict("05.1", "How many?", 6)
    predict("05.1", "How many?", 4)
    assert (kept.read("guess", "05.1") or {})["guess"] == 4


def test_running_the_cell_again_shows_the_stored_guess() -> None:
    predict, _ = predictor()
    predict("05.1", "How many?", 6, unit="blocks").reveal(3)
    assert "your guess: 6 blocks" in repr(predict("05.1", "How many?", 6, unit="blocks"))
    assert "stays" not in repr(predict("05.1", "How many?", 6, unit="blocks"))


def test_the_first_answer_counts() -> None:
    predict, kept = predictor()
    time = predict("00.3", "How many ms?", 20, unit="ms")
    time.reveal(25.0)
    assert "the first one counts" in repr(time.reveal(31.0))
    assert (kept.read("guess", "00.3") or {})["truth"] == 25.0


@pytest.mark.parametrize("value", ["many", True, float("nan"), float("inf"), [1], object(), "3 GB"])
def test_what_is_no_number_is_refused_in_words(value: object) -> None:
    predict, kept = predictor()
    assert "Guess one number" in repr(predict("05.1", "How many?", value, unit="blocks"))
    assert kept.read("guess", "05.1") is None


def test_a_guess_may_be_text_with_a_unit() -> None:
    predict, kept = predictor()
    predict("02.1", "How many bytes?", "128 KiB", unit="bytes")
    assert (kept.read("guess", "02.1") or {})["guess"] == 131072


def test_choices_are_guessed_by_letter_or_words() -> None:
    predict, _ = predictor()
    assert predict("01.1", "Which?", "b", choices=("prefill", "decode")).reveal("decode").tone == "right"
    assert predict("01.2", "Which?", "prefill", choices=("prefill", "decode")).reveal("decode").tone == "wrong"


def test_guesses_last_in_the_learner_s_file(tmp_path: Path) -> None:
    predict = Predict(lambda: ProgressFile(tmp_path / "progress.json"))
    predict("05.1", "How many?", 6).reveal(3)
    again = Predict(lambda: ProgressFile(tmp_path / "progress.json"))
    assert again.calibration("05").guesses[0].ratio == 2


def test_a_damaged_file_is_one_red_line_and_the_notebook_goes_on(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text("{")
    predict = Predict(lambda: ProgressFile(tmp_path / "progress.json"))
    made = predict("05.1", "How many?", 6)
    assert "damaged" in repr(made) and "damaged" in repr(made.reveal(3))
    assert predict.calibration().guesses == ()


GUESSES = (
    Guess("05.1", "a", "", 2, 2),
    Guess("05.2", "b", "", 100, 10),
    Guess("05.3", "c", "", 1, 8.0),
    Guess("05.4", "d", "", None, 3),
    Guess("05.5", "<i>e</i>", "", "yes", "no"),
)


def test_the_plot_shows_ratios_on_a_log_axis_with_a_shape_for_each_direction() -> None:
    drawn = figure(GUESSES)
    assert drawn.layout.xaxis.type == "log"
    assert {trace.name: list(trace.x) for trace in drawn.data} == {"near": [1], "too large": [10], "too small": [0.125]}
    assert len({trace.marker.symbol for trace in drawn.data}) == len({trace.marker.color for trace in drawn.data}) == 3
    low, high = drawn.layout.xaxis.range
    assert low < math.log10(0.125) and math.log10(10) < high


def test_the_text_twin_puts_the_truth_in_the_middle() -> None:
    rows = text(GUESSES).splitlines()
    assert rows[0] == "Calibration: 1 of 4 guesses within a factor of 2"
    assert rows[1].split()[1] == "·" * 20 + "●" + "·" * 20
    assert rows[2].split()[1].endswith("●") and "10 times too large" in rows[2]


def test_the_calibration_of_a_notebook_holds_its_guesses_alone() -> None:
    predict, _ = predictor()
    for id_ in ("04.1", "05.1", "05.2"):
        predict(id_, "How many?", 2).reveal(3)
    predict("05.3", "not answered", 2)
    assert [guess.id for guess in predict.calibration("05").guesses] == ["05.1", "05.2"]


def test_no_guesses_are_no_figure_but_a_sentence() -> None:
    bundle = Calibration(())._repr_mimebundle_()
    assert bundle["text/plain"] == "Calibration: No guesses yet" and len(bundle) == 2


def test_questions_are_escaped() -> None:
    predict, _ = predictor()
    page = predict("05.1", "<script>alert(1)</script>", 3)._repr_html_() + Calibration(GUESSES)._repr_html_()
    assert "<script" not in page and "<i>" not in page


def test_the_box_writes_a_guess_down_until_the_answer_shows() -> None:
    predict, kept = predictor()
    made = predict("05.1", "How many?", unit="blocks")
    box = AnswerBox(made)
    box.field.value = "7"
    box.buttons["write it down"].click()
    made.reveal(3)
    box.field.value = "3"
    box.buttons["write it down"].click()
    assert (kept.read("guess", "05.1") or {})["guess"] == 7
    assert "stays as it was" in box.shown.value and "stays as it was" in repr(box)
