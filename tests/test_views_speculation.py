"""Views of speculation: every control is moved, and what the picture then says are the calculators' numbers."""

import json
from typing import Any

import pytest

from minivllm.course.calculators import acceptance, best_gamma, expected_tokens, residual, ridge_point, speedup
from minivllm.course.speculation import Verification
from minivllm.course.speculation_records import Positions, SpeedRow, SpeedRuns
from minivllm.course.speculation_rounds import RealRound
from minivllm.errors import MiniVLLMError
from minivllm.lab.losslessness import RULES, trials
from minivllm.views.losslessness import Losslessness, p_words
from minivllm.views.sketch import Box, Dot, Slider, Words
from minivllm.views.sketch_view import SketchView
from minivllm.views.speculation_acceptance import AcceptanceBars
from minivllm.views.speculation_batch import BATCHES, SpeculationBatch
from minivllm.views.speculation_round import WORDS, RoundStepper
from minivllm.views.speculation_round_picture import ROWS, STYLES
from minivllm.views.speculation_surface import ALPHAS, COSTS, LENGTHS, LOSS, SpeedupSurface

ROUNDS = [
    RealRound("ngram", 3, (" is", " a"), 2, " list",
              (((" is", 0.9), (" are", 0.1)), ((" a", 0.6), (" the", 0.4)), ((" list", 0.7), (" row", 0.3))),
              (0, 0, 0), "a run"),
    RealRound("ngram", 5, (" x", " y"), 0, " z", (((" z", 0.8), (" x", 0.2)),), (0,), "a run"),
]  # fmt: skip
COUNTS = [Positions("ngram", (100, 80, 60), (80, 60, 54), 100), Positions("early_exit", (50, 10, 5), (10, 5, 1), 50)]
RUNS = SpeedRuns(
    tuple(SpeedRow("qwen3-8b", batch, 4, "planted", 200.0 * gain, 200.0, gain, gain + 0.1, 0.8)
          for batch, gain in ((1, 2.4), (64, 1.5), (256, 0.7))),
    {"gpu": "NVIDIA H200", "commit": "abc"},
)  # fmt: skip
FOUND = trials()


def boxes(view: SketchView, kind: str = "") -> list[Box]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Box) and kind in mark.words]


def texts(view: SketchView) -> list[str]:
    return [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]


def last(view: RoundStepper) -> RoundStepper:
    steps = view.drawn()["steps"]
    assert steps is not None
    view.move("step", steps[1])
    return view


# --- the ladder


def test_stages_lead_from_drafts_to_one_token_more() -> None:
    view = RoundStepper(numbers=4)
    first, num, _ = view.drawn()["steps"] or (0, 0, 0)
    titles = []
    for step in range(first, num + 1):
        view.move("step", step)
        titles.append(view.drawn()["title"])
    assert titles[0].startswith("The drafter wrote A, A, A") and "all 4 places in one step" in titles[0]
    assert [title.split(" is ")[1][:8] for title in titles[1:4]] == ["accepted", "accepted", "rejected"]
    assert "max(p − q, 0)" in titles[4] and titles[5].endswith("one target step gave 3 tokens, 2 of them drafted.")
    assert view.drawn()["tokens"][:2] == ["A", "A"] and len(view.drawn()["tokens"]) == 3
    assert view.drawn()["tokens"][2] in "BC"  # where q is below p


def test_bars_are_p_q_and_the_residual() -> None:
    view = RoundStepper(numbers=4, p_a=5, q_d=0)
    p, q = (5 / 11, 3 / 11, 2 / 11, 1 / 11), (5 / 7, 1 / 7, 1 / 7, 0.0)
    view.move("step", 5)
    told = {box.words for box in boxes(view, " of ")}
    left = residual(p, q).value
    assert isinstance(left, tuple)
    for name, row in (("p", p), ("q", q), ("residual", left)):
        for word, chance in zip(WORDS, row, strict=True):
            assert f"{ROWS[name][2]} of {word}: {chance:.3f}" in told
    assert f"acceptance Σ min(p, q) = {float(acceptance(p, q)):.3f}" in RoundStepper(p_a=5, q_d=0).drawn()["lines"][0]


@pytest.mark.parametrize("name", [f"{row}_{letter}" for row in "pq" for letter in "abcd"])
def test_every_weight_changes_its_row(name: str) -> None:
    view = RoundStepper(numbers=4)
    before = {box.words for box in boxes(view, f"{ROWS[name[0]][2]} of {name[-1].upper()}")}
    view.move(name, 9)
    after = {box.words for box in boxes(view, f"{ROWS[name[0]][2]} of {name[-1].upper()}")}
    assert before != after
    slider = next(c for c in view.drawn()["controls"] if c.name == name)
    assert isinstance(slider, Slider) and slider.shown in " ".join(texts(view))


def test_number_of_drafts_and_random_numbers_change_the_round() -> None:
    assert len(RoundStepper(num_drafts=4).drawn()["title"].split(",")) > len(
        RoundStepper(num_drafts=1).drawn()["title"].split(",")
    )
    ends = {tuple(last(RoundStepper(numbers=n)).drawn()["tokens"]) for n in range(1, 12)}
    assert len(ends) > 4
    assert all(1 <= len(end) <= 4 for end in ends) and {len(end) for end in ends} >= {2, 4}


def test_equal_rows_accept_every_draft() -> None:
    same: dict[str, Any] = {"q_a": 4, "q_b": 3, "q_c": 2, "q_d": 1}
    for numbers in range(1, 8):
        picture = last(RoundStepper(numbers=numbers, **same)).drawn()
        assert picture["num_accepted"] == 3 and "the extra token, drawn from p" in picture["title"]


def test_a_row_of_zeros_is_refused_and_the_round_stays() -> None:
    view = RoundStepper(q_b=0, q_c=0, q_d=0)
    before = view.drawn()["title"]
    with pytest.raises(MiniVLLMError):
        view.move("q_a", 0)
    assert view.drawn()["title"] == before


def test_real_rounds_are_told_in_the_models_words() -> None:
    view = RoundStepper(ROUNDS, round="1")
    assert [c.name for c in view.drawn()["controls"]] == ["round"]
    picture = last(view).drawn()
    assert picture["title"] == "“␣list” is the extra token: one target step gave 3 tokens, 2 of them drafted."
    assert picture["tokens"] == ["␣is", "␣a", "␣list"] and picture["provenance"] == "a run"
    other = RoundStepper(ROUNDS, round="2")
    other.move("step", 2)
    assert "draft “␣x” is rejected: the target wants “␣z”" in other.drawn()["title"]
    states = [box.words.split(": ", 1)[1] for box in boxes(other, ": ") if box.y < 100]
    assert states == [STYLES["rejected"][2], STYLES["dropped"][2], STYLES["dropped"][2]]


# --- the surface


def test_every_cell_is_the_closed_form() -> None:
    picture = SpeedupSurface(cost=0.1).drawn()
    for alpha in ALPHAS:
        assert picture["values"][alpha] == [float(speedup(alpha, n, 0.1)) for n in LENGTHS]
        assert picture["best"][alpha] == min(int(best_gamma(alpha, 0.1)), LENGTHS[-1])
    assert len(boxes(SpeedupSurface(), "acceptance")) == len(ALPHAS) * len(LENGTHS)


def test_sliders_and_clicks_choose_a_point() -> None:
    view = SpeedupSurface(alpha=0.75, num_drafts=4, cost=0.03)
    assert (
        view.drawn()["chosen"] == pytest.approx(2.72, abs=0.005)
        and "the best is 8 drafts, 2.98×" in view.drawn()["title"]
    )
    view.move("cell", "0.75 8")
    assert "no other length drawn here does better" in view.drawn()["title"]
    view.move("cost", 0.8)
    assert "are a loss" in view.drawn()["title"]
    view.move("alpha", 0.05)
    view.move("num_drafts", 2)
    assert "every draft length loses here" in view.drawn()["title"]
    assert str(float(expected_tokens(0.05, 2)))[:4] in view.drawn()["lines"][0]


def test_losses_are_outlined_and_a_free_drafter_has_none() -> None:
    def losses(cost: float) -> int:
        return sum(box.fill == LOSS for box in boxes(SpeedupSurface(cost=cost), "acceptance"))

    assert losses(0.0) == 0 and 0 < losses(0.05) < losses(0.2) < losses(0.8)
    assert SpeedupSurface(cost=0.0).drawn()["best"][0.5] == LENGTHS[-1]
    assert COSTS[0] == 0


# --- the batch


def test_the_batch_moves_checking_over_the_ridge() -> None:
    small, large = SpeculationBatch(batch=1).drawn(), SpeculationBatch(batch=512).drawn()
    assert small["ridge"] == float(ridge_point("h100-sxm"))
    assert (
        small["intensities"][1] == pytest.approx(5 * small["intensities"][0])
        and small["intensities"][1] < small["ridge"]
    )
    assert "left of the ridge" in small["title"] and "gains: 2.31" in small["title"]
    assert "right of the ridge" in large["title"] and "loses" in large["title"]
    assert small["gains"] == large["gains"]  # the curve is of all batches


@pytest.mark.parametrize(
    ("control", "value"),
    [("chip", "l4"), ("model", "llama-3-8b"), ("num_drafts", 8), ("alpha", 0.9), ("cost", 0.2), ("context", 32768)],
)
def test_every_control_changes_the_curve(control: str, value: int | str) -> None:
    view = SpeculationBatch(batch=64)
    before = view.drawn()["gains"]
    view.move(control, value)
    view.flush()
    picture = view.drawn()
    assert picture["gains"] != before and view.picture["title"] == picture["title"]
    chosen: dict[str, Any] = {
        "chip": "h100-sxm",
        "model": "llama-3-70b",
        "num_drafts": 4,
        "alpha": 0.7,
        "cost": 0.05,
        "context": 256,
    }
    chosen |= {control: value}
    alpha, cost = float(chosen.pop("alpha")), float(chosen.pop("cost"))
    wanted = {b: Verification(batch=b, **chosen).speedup(alpha, cost) for b in BATCHES}
    assert picture["gains"] == pytest.approx(wanted)
    view.close()


def test_recorded_runs_are_dots_beside_their_formula() -> None:
    view = SpeculationBatch(RUNS)
    assert not [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot) and mark.shape == "diamond"]
    view.move("recorded", "qwen3-8b, planted, 4 drafts, α 0.8")
    picture = view.drawn()
    diamonds = [mark for mark in picture["marks"] if isinstance(mark, Dot) and mark.shape == "diamond"]
    assert [dot.words for dot in diamonds] == ["speedup: 2.40", "speedup: 1.50", "speedup: 0.70"]
    assert diamonds[0].y < diamonds[1].y < diamonds[2].y and diamonds[0].x < diamonds[2].x
    assert "NVIDIA H200" in picture["provenance"] and "0.70" in picture["text"]


def test_a_long_context_says_why_it_always_gains() -> None:
    assert "reading K and V" in SpeculationBatch(model="llama-3-8b", context=32768).drawn()["lines"][-1]
    assert SpeculationBatch(alpha=0.0).drawn()["lines"][-1] == "it loses even for one request"
    assert SpeculationBatch().drawn()["lines"][-1] == f"it gains up to batch {SpeculationBatch().drawn()['last_gain']}"


# --- acceptance by position


def test_bars_by_position_have_their_numbers() -> None:
    view = AcceptanceBars(COUNTS)
    assert view.drawn()["bars"] == {"ngram": [0.8, 0.75, 0.9], "early_exit": [0.2, 0.5, 0.2]}
    assert {"n 100", "n 80", "n 60", "80%", "75%", "90%"} <= set(texts(view))
    means = view.drawn()["means"]
    assert means["ngram"][0] == pytest.approx(1 + 1.94) and means["ngram"][1] == float(expected_tokens(194 / 240, 3))
    view.move("show", "shares")
    assert view.drawn()["bars"]["ngram"] == [0.8, 0.6, 0.54] and texts(view).count("n 100") == 3
    view.move("method", "early_exit")
    assert list(view.drawn()["bars"]) == ["early_exit"] and "ngram" not in view.drawn()["title"]
    assert "10/50" in view.drawn()["text"]


# --- the lab


@pytest.mark.parametrize("rule", list(RULES))
def test_the_verdict_is_the_trial_s(rule: str) -> None:
    view = Losslessness(FOUND, rule=rule)
    picture, found = view.drawn(), next(t for t in FOUND if t.name == rule)
    assert picture["is_passed"] == (rule == "as published") == (found.p_value(100_000) > 0.01)
    assert picture["distance"] == found.total_variation(100_000) and f"{picture['distance']:.4f}" in picture["title"]
    assert ("passes" in picture["title"]) == picture["is_passed"]


def test_few_samples_let_a_broken_rule_pass() -> None:
    view = Losslessness(FOUND, rule="replace from p", samples=100)
    assert view.drawn()["is_passed"] and "100 samples" in view.drawn()["title"]
    view.move("samples", 1000)
    assert not view.drawn()["is_passed"] and p_words(view.drawn()["p_value"]) in view.drawn()["lines"][0]
    assert len(boxes(view, "expected")) == 32


# --- all of them

VIEWS = [
    RoundStepper(ROUNDS), SpeedupSurface(), SpeculationBatch(RUNS, recorded="qwen3-8b, planted, 4 drafts, α 0.8"),
    AcceptanceBars(COUNTS), Losslessness(FOUND),
]  # fmt: skip


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_twins_repeat_and_unknown_values_are_refused(view: SketchView) -> None:
    bundles = [view._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert str(bundles[0]["text/plain"]).startswith(view.drawn()["title"])
    assert view.image().width > 1400 and json.loads(json.dumps(view.drawn()))["marks"]
    for control, value in (("nothing", 1), (view.drawn()["controls"][0].name, "no such value"), ("step", 99)):
        with pytest.raises(MiniVLLMError) as error:
            view.move(control, value)
        assert "\n" not in str(error.value)


def test_a_cell_that_is_none_is_refused() -> None:
    with pytest.raises(MiniVLLMError, match=r"'0\.70 4'"):
        SpeedupSurface().move("cell", 7)


def test_views_refuse_what_they_cannot_draw() -> None:
    wrong: Any = [1]
    for make in (RoundStepper, AcceptanceBars, Losslessness, SpeculationBatch):
        with pytest.raises(MiniVLLMError):
            make(wrong)
    for make in (AcceptanceBars, Losslessness):
        with pytest.raises(MiniVLLMError):
            make([])
