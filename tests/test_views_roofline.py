"""The roofline: its points are the calculators' numbers, whatever control is moved."""

import json

import pytest
from PIL import Image

from minivllm.course.calculators import (
    accelerators,
    compute_ms,
    critical_batch,
    decode_attention_intensity,
    kv_bytes_of_sequence,
    matmul_intensity,
    num_parameters,
    read_ms,
    ridge_point,
    weight_bytes,
)
from minivllm.errors import MiniVLLMError
from minivllm.views.roofline import LEFT, RIGHT, Point, Roofline, RooflineControls, draw, works
from minivllm.views.sketch import Dot, Slider
from minivllm.views.step_work import BATCHES, model_names


def point(view: Roofline, name: str) -> Point:
    return next(p for p in view.drawn()["points"] if p["name"] == name)


def dots(view: Roofline) -> list[Dot]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Dot)]


def test_points_are_the_calculators_numbers() -> None:
    view = Roofline(model="llama-3-8b", chip="h100-sxm", batch=64, context=4096)
    decode, attention = point(view, "decode products"), point(view, "decode attention")
    held = kv_bytes_of_sequence("llama-3-8b", 4096)
    assert decode["floor_ms"] == float(read_ms(weight_bytes("llama-3-8b"), "h100-sxm"))  # 4.79 ms
    assert decode["flops"] == 2 * 64 * int(num_parameters("llama-3-8b"))
    assert attention["floor_ms"] == float(read_ms(64 * int(held), "h100-sxm"))
    assert attention["intensity"] == float(decode_attention_intensity("llama-3-8b")) == 4
    prefill = compute_ms(2 * 4096 * int(num_parameters("llama-3-8b")), "h100-sxm")
    assert point(view, "prefill products")["floor_ms"] == pytest.approx(float(prefill))
    assert view.drawn()["ridge"] == float(ridge_point("h100-sxm"))


def test_intensity_of_a_small_batch_is_that_of_one_large_product() -> None:
    intensity = point(Roofline(batch=8), "decode products")["intensity"]
    assert intensity == pytest.approx(float(matmul_intensity(8, 4096, 14336)), rel=0.01)


def test_batch_moves_the_products_and_leaves_attention_where_it_is() -> None:
    small, large = Roofline(batch=1), Roofline(batch=256)
    prefill, decode, attention = zip(dots(small), dots(large), strict=True)
    assert decode[1].x > decode[0].x and decode[1].y < decode[0].y
    assert attention[0][:4] == attention[1][:4] and prefill[0][:4] == prefill[1][:4]


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("chip", ["h100-sxm", "tpu-v5e", "l4"])
def test_products_are_bound_by_compute_from_the_critical_batch_on(chip: str, weights: str) -> None:
    limit = float(critical_batch(chip, weights))
    below = works(RooflineControls(chip=chip, weights=weights, batch=int(limit)))["decode products"]
    above = works(RooflineControls(chip=chip, weights=weights, batch=int(limit) + 1))["decode products"]
    ridge = float(ridge_point(chip))
    assert below.intensity <= ridge < above.intensity


@pytest.mark.parametrize("chip", sorted(accelerators()))
def test_every_chip_draws_its_own_roof_and_all_points_lie_under_it(chip: str) -> None:
    view = Roofline(chip=chip)
    picture, card = view.drawn(), accelerators()[chip]
    rate = card.flops[picture["controls"][-1].value]  # type: ignore[index]  # a choice of words
    for p in picture["points"]:
        assert p["attainable"] == pytest.approx(min(rate, p["intensity"] * card.bandwidth))
    assert all(LEFT <= dot.x <= RIGHT for dot in dots(view))
    assert chip in picture["title"] and f"{picture['ridge']:.0f}" in picture["title"]


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_picker_draws(name: str) -> None:
    picture = draw(RooflineControls(model=name))
    assert len(picture["points"]) == 3 and name in picture["title"]


@pytest.mark.parametrize(
    ("control", "value", "part"),
    [("weights", "int8", "decode products"), ("kv", "fp8", "decode attention"), ("context", 32768, "decode attention"),
     ("compute", "fp8", "prefill products"), ("chip", "a100", "decode products"), ("batch", 8, "decode attention"),
     ("model", "deepseek-v3", "decode attention")],
)  # fmt: skip
def test_every_control_changes_its_floor(control: str, value: int | str, part: str) -> None:
    view = Roofline()
    before = point(view, part)["floor_ms"]
    view.move(control, "a100-80gb-sxm" if value == "a100" else value)
    view.flush()
    assert point(view, part)["floor_ms"] != before
    assert view.picture["status"] == "" and view.picture["title"] == view.drawn()["title"]
    view.close()


def test_halved_weights_halve_the_critical_batch_of_the_picture() -> None:
    assert 2 * Roofline(weights="int8").drawn()["critical_batch"] == Roofline().drawn()["critical_batch"]


def test_chip_without_the_chosen_type_falls_back_to_its_own() -> None:
    view = Roofline(compute="fp8")
    view.move("chip", "t4")
    assert view.drawn()["controls"][-1].value == "fp16"


@pytest.mark.parametrize(("control", "value"), [("chip", "h1"), ("batch", 3), ("batch", True), ("x", 1), ("model", 3)])
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        Roofline().move(control, value)


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [Roofline(batch=64)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert "4.79 ms" in text and "10.3 ms" in text and "989 TFLOP/s" in text
    assert json.loads(json.dumps(Roofline().drawn()))["marks"]


def test_fallback_is_a_picture_of_the_right_size() -> None:
    image = Roofline().image()
    assert isinstance(image, Image.Image) and image.width > 1400
    assert image.getcolors(1 << 24) is not None and len(image.getcolors(1 << 24) or []) > 20


def test_sliders_have_units_and_say_what_they_are_at() -> None:
    sliders = [control for control in Roofline(batch=1).drawn()["controls"] if isinstance(control, Slider)]
    assert [slider.shown for slider in sliders] == ["1 sequence", "4,096 tokens"]
    assert sliders[0].values == [*BATCHES]
