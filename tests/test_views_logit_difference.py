"""The panel of differences: every number is that of the arrays it was given."""

import json

import numpy as np
import pytest
from PIL import Image

from minivllm.errors import MiniVLLMError
from minivllm.views.logit_difference import BOTTOM, LEFT, RIGHT, TOP, LogitDifference, measure
from minivllm.views.sketch import Box, Dot

RANDOM = np.random.default_rng(0)
ONE = RANDOM.normal(0, 8, (12, 50)).astype(np.float32)
NEAR = ONE + RANDOM.normal(0, 1e-5, ONE.shape).astype(np.float32)
PARTED = NEAR.copy()
PARTED[6] = np.roll(PARTED[6], 1)


def panel(**chosen: object) -> LogitDifference:
    view = LogitDifference(
        {"near": (ONE, NEAR), "same": (ONE, ONE), "parted": (ONE, PARTED)}, lambda ids: f" <{ids[0]}>"
    )
    for control, value in chosen.items():
        view.move(control, value)
    return view


def dots(view: LogitDifference, shape: str) -> list[Dot]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot) and mark.shape == shape]


def test_numbers_are_those_of_numpy() -> None:
    picture = panel().drawn()
    ordered = np.sort(ONE.astype(np.float64), axis=1)
    assert [at.greatest for at in picture["differences"]] == pytest.approx(
        np.abs(ONE.astype(np.float64) - NEAR).max(axis=1)
    )
    assert [at.lead for at in picture["differences"]] == pytest.approx(ordered[:, -1] - ordered[:, -2])
    assert [at.largest for at in picture["differences"]] == pytest.approx(np.abs(ONE).max(axis=1))
    assert [at.chosen[0] for at in picture["differences"]] == ONE.argmax(axis=1).tolist()
    assert "12 of 12 tokens are equal" in picture["title"]


@pytest.mark.parametrize("step", [1, 7, 12])
def test_step_says_its_own_numbers_and_token(step: int) -> None:
    picture = panel(step=step).drawn()
    at = picture["differences"][step - 1]
    assert picture["steps"] == (1, 12, step)
    assert f"near, step {step}: logits as large as {at.largest:.1f} differ by {at.greatest:.1e}" in picture["title"]
    assert f"both choose ␣<{at.chosen[0]}>" in picture["title"]
    picked = [mark for mark in picture["marks"] if isinstance(mark, Box) and mark.border == "pick"]
    assert [mark.click for mark in picked] == [("step", step)]


def test_pair_of_equal_arrays_lies_at_the_foot_and_says_so() -> None:
    view = panel(pair="same")
    assert "are equal in every bit" in view.drawn()["title"]
    assert {dot.y for dot in dots(view, "circle")} == {BOTTOM}
    assert {dot.y for dot in dots(panel(), "circle")} != {BOTTOM}


def test_pair_that_parts_is_compared_up_to_its_first_other_token() -> None:
    view = panel(step=12)
    view.move("pair", "parted")
    picture = view.drawn()
    assert picture["steps"] == (1, 7, 7) and len(picture["differences"]) == 7
    assert not picture["differences"][-1].is_equal and "one chooses" in picture["title"]
    assert "6 of 7 tokens are equal" in picture["title"]
    assert "NOT below the tolerance" in picture["lines"][0] and "step 7" in picture["lines"][-1]
    patterns = [m.pattern for m in picture["marks"] if isinstance(m, Box) and m.y == BOTTOM + 8]
    assert patterns == ["solid"] * 6 + ["cross"]
    assert len(picture["legend"]) == 4 and len(panel().drawn()["legend"]) == 3


def test_tolerance_decides_the_verdict() -> None:
    greatest = max(at.greatest for at in panel().drawn()["differences"])
    below = LogitDifference({"near": (ONE, NEAR)}, tolerance=greatest * 1.01).drawn()
    above = LogitDifference({"near": (ONE, NEAR)}, tolerance=greatest * 0.99).drawn()
    assert ", below" in below["lines"][0] and "NOT below" in above["lines"][0]


def test_near_tie_is_called_one() -> None:
    tie, other = np.array([[1.0, 1.00001]]), np.array([[1.0001, 1.0]])
    picture = LogitDifference({"tie": (tie, other)}).drawn()
    assert "could have changed it" in picture["lines"][1] and "one chooses 1, the other 0" in picture["title"]
    assert "could not have changed" in panel().drawn()["lines"][1]


@pytest.mark.parametrize("num_steps", [1, 19, 80])
def test_all_steps_stay_within_the_plot(num_steps: int) -> None:
    logits = RANDOM.normal(0, 50, (num_steps, 9))
    picture = LogitDifference({"far": (logits, logits + 1e-12), "high": (logits * 99, logits * 99)}).drawn()
    for mark in picture["marks"]:
        if isinstance(mark, Dot):
            assert LEFT <= mark.x <= RIGHT and TOP <= mark.y <= BOTTOM
        if isinstance(mark, Box):
            assert mark.y + mark.height <= picture["height"] and mark.width > 0


def test_values_travel_as_json_numbers() -> None:
    assert json.loads(json.dumps(panel().drawn()))["tolerance"] == 1e-3


@pytest.mark.parametrize(
    ("control", "value"), [("step", 0), ("step", 13), ("step", "1"), ("pair", "x"), ("scale", 1), ("pair", None)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as error:
        panel().move(control, value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [(ONE, ONE[1:], "alike"), (ONE[0], ONE[0], "alike"), (ONE[:0], ONE[:0], "alike"), (ONE[:, :1], ONE[:, :1], "alike"),
     (ONE, np.where(ONE > 9, np.inf, ONE), "finite"), (ONE * np.nan, ONE, "finite")],
)  # fmt: skip
def test_arrays_that_cannot_be_compared_are_refused_in_one_line(one: np.ndarray, other: np.ndarray, words: str) -> None:
    with pytest.raises(MiniVLLMError, match=words) as error:
        measure("pair", one, other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tolerance", [0, -1, float("nan")])
def test_panel_needs_a_pair_and_a_tolerance(tolerance: float) -> None:
    with pytest.raises(MiniVLLMError, match="one pair"):
        LogitDifference({})
    with pytest.raises(MiniVLLMError, match="tolerance"):
        LogitDifference({"near": (ONE, NEAR)}, tolerance=tolerance)


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [panel(step=3)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert all(f"{at.greatest:.1e}" in text and f"␣<{at.chosen[0]}>" in text for at in panel().drawn()["differences"])
    image = panel().image()
    assert isinstance(image, Image.Image) and image.width > 1400 and len(image.getcolors(1 << 24) or []) > 20


def test_page_gets_what_a_move_changed() -> None:
    view = panel()
    view.move("pair", "same")
    view.flush()
    assert view.picture["title"] == view.drawn()["title"] and view.picture["status"] == ""
    view.close()
