"""Measured steps as pictures: every dot is a measured number, under each control."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from minivllm.errors import MiniVLLMError
from minivllm.lab.forward_sweep import RECORDINGS, Shape, Step, Sweep, load_sweeps
from minivllm.views.measured_points import LEFT, RIGHT, MeasuredPoints
from minivllm.views.sketch import Dot, Line, Words

FACTS: dict[str, object] = {"command": "made up", "commit": "none"}


def made_up(model: str, with_graphs: bool) -> Sweep:
    """Prefills of 1 and 100 tokens in 10 and 20 ms, a decode of 4 requests at two contexts."""
    graph_ms = 5.0 if with_graphs else None
    shapes = [Shape(1, 1, 1), Shape(1, 100, 100), Shape(4, 1, 32), Shape(4, 1, 64)]
    times = [10.0, 20.0, 12.0, 14.0]
    steps = [Step(s, 2_000_000 * s.num_tokens, 10**6, 1000 * s.num_stored, 1.0, ms, graph_ms, None)
             for s, ms in zip(shapes, times, strict=True)]  # fmt: skip
    return Sweep(model, "bfloat16", "a machine", 1e9, 1e12, tuple(steps), FACTS)


SWEEPS = [made_up("small", False), made_up("large", True)]


def dots(view: MeasuredPoints) -> list[Dot]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot)]


def test_time_per_token_falls_with_the_tokens_in_a_step() -> None:
    view = MeasuredPoints(SWEEPS)
    assert view.drawn()["series"]["prefill of one prompt"] == [(1.0, 10.0), (100.0, 0.2)]
    assert view.drawn()["series"]["decode, context 64"] == [(4.0, 3.5)]
    first, last = dots(view)[:2]
    assert (first.x, last.x, first.shape) == (LEFT, RIGHT, "square") and last.y > first.y
    assert "10 ms alone and 0.2 ms among 100" in view.drawn()["title"]
    assert {dot.shape for dot in dots(view)} == {"square", "circle", "diamond"}


@pytest.mark.parametrize(
    ("show", "points", "words"),
    [("per step", [(1.0, 10.0), (100.0, 20.0)], "1 token takes 10 ms, prefill of 100 tokens 20 ms"),
     ("roofline", [(2e6 / 1_001_000, 2e8), (2e8 / 1_100_000, 1e10)], "reaches 1%")],
)  # fmt: skip
def test_show_changes_what_the_dots_stand_for(show: str, points: list[tuple[float, float]], words: str) -> None:
    view = MeasuredPoints(SWEEPS)
    view.move("show", show)
    view.flush()
    for drawn, expected in zip(view.picture["series"]["prefill of one prompt"], points, strict=True):
        assert tuple(drawn) == pytest.approx(expected)
    assert words in view.picture["title"] and view.picture["status"] == ""
    view.close()


def test_sweep_changes_the_model_and_graphs_draw_solid_lines() -> None:
    view = MeasuredPoints(SWEEPS)
    assert view.drawn()["title"].startswith("small")
    thick = [m for m in view.drawn()["marks"] if isinstance(m, Line) and m.thickness == 2]
    assert thick == []
    view.move("sweep", "large, a machine")
    assert view.drawn()["title"].startswith("large")
    assert "5 ms alone and 0.05 ms among 100, launched at once" in view.drawn()["title"]
    assert [m for m in view.drawn()["marks"] if isinstance(m, Line) and m.thickness == 2]


def test_a_roof_that_a_step_set_itself_says_so() -> None:
    steps = [replace(step, flops=int(1e12 * step.best_s)) for step in SWEEPS[0].steps]
    view = MeasuredPoints([replace(SWEEPS[0], steps=tuple(steps))])
    assert "the roof of FLOP/s is the rate of the fastest step itself" in view.drawn()["lines"][-1]
    assert " 100%" in view.drawn()["text"] and "e+02" not in view.drawn()["text"]
    assert not any("by construction" in line for line in MeasuredPoints(SWEEPS).drawn()["lines"])


def test_roofline_has_its_ridge_and_no_dot_beyond_the_plot() -> None:
    view = MeasuredPoints(SWEEPS, show="roofline")
    words = [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]
    assert "ridge 1,000" in words and "1 TFLOP/s" in words
    assert all(LEFT <= dot.x <= RIGHT for dot in dots(view))


@pytest.mark.parametrize(("control", "value"), [("show", "all"), ("sweep", "small"), ("show", 1), ("x", "per step")])
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        MeasuredPoints(SWEEPS).move(control, value)


def test_nothing_measured_is_one_line() -> None:
    with pytest.raises(MiniVLLMError, match="no measured step"):
        MeasuredPoints([])


def test_recording_in_the_package_draws_and_its_work_is_below_its_roofs() -> None:
    sweeps = load_sweeps(RECORDINGS / "forward_h200.json")
    assert [sweep.model for sweep in sweeps] == ["qwen3-0.6b", "llama-3-8b"]
    for sweep in sweeps:
        assert {"machine", "commit", "seed", "command", "gpu"} <= sweep.provenance.keys()
        assert all(step.floor_ms <= 1e3 * step.best_s for step in sweep.steps)
        assert all(sweep.share_of_flops(step) <= 100 for step in sweep.steps)
    for show in ("per token", "per step", "roofline"):
        picture = MeasuredPoints(sweeps, show=show).drawn()
        assert len([mark for mark in picture["marks"] if mark.kind == "dot"]) == len(sweeps[0].steps)


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [MeasuredPoints(SWEEPS)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert "prefill of one prompt     100" in text and "0.2" in text
    assert json.loads(json.dumps(MeasuredPoints(SWEEPS).drawn()))["marks"]
    image = MeasuredPoints(SWEEPS, show="roofline").image()
    assert isinstance(image, Image.Image) and image.width > 1400 and len(image.getcolors(1 << 24) or []) > 20
