"""The KV calculator: every bar, count and line is what the calculators say, whatever control is moved."""

import json

import pytest

from minivllm.course.calculators import (
    accelerator,
    attention_shape,
    capacity,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    mha_bytes_per_token,
    mqa_bytes_per_token,
    tokens_where_kv_passes_weights,
    weight_bytes,
)
from minivllm.errors import MiniVLLMError
from minivllm.views.kv_calculator import KVCalculator, KVControls, draw
from minivllm.views.kv_calculator_picture import BAR_PX, LEFT, in_unit
from minivllm.views.sketch import Box, Slider
from minivllm.views.step_work import model_names


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_its_published_bytes(name: str) -> None:
    picture = draw(KVControls().of_model(name))
    assert picture["bytes_per_token"]["as published"] == kv_bytes_per_token(name)
    assert picture["sequence_bytes"] >= int(kv_bytes_of_sequence(name, 4096))


@pytest.mark.parametrize("name", ["llama-2-13b", "llama-3-8b", "qwen3-8b", "deepseek-v3", "deepseek-v2"])
def test_bars_of_the_picked_model_are_the_calculators(name: str) -> None:
    view = KVCalculator(model=name)
    bars, kind = view.drawn()["bytes_per_token"], attention_shape(name).kind
    assert bars["MHA"] == mha_bytes_per_token(name)
    assert bars["MQA"] == mqa_bytes_per_token(name)
    assert bars[kind] == bars["as published"]  # the sliders stand where the model is


def test_published_figures_come_out() -> None:
    assert KVCalculator(model="opt-13b").drawn()["bytes_per_token"]["as published"] == 819_200  # SOSP 2023: 800 KB
    assert KVCalculator(model="deepseek-v3").drawn()["bytes_per_token"]["MLA"] == 70_272
    assert KVCalculator(model="llama-3-8b").drawn()["num_fitting"] == 104


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("context", [1024, 32768])
def test_sequences_on_the_card_are_those_of_capacity(dtype: str, context: int) -> None:
    view = KVCalculator(model="qwen3-8b", dtype=dtype, context=context, chip="a100-80gb-sxm")
    assert view.drawn()["num_fitting"] == capacity("qwen3-8b", "a100", context, kv_dtype=dtype)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_context_where_kv_passes_the_weights(batch: int) -> None:
    live = int(tokens_where_kv_passes_weights(weight_bytes("llama-3-8b"), kv_bytes_per_token("llama-3-8b")))
    assert KVCalculator(batch=batch).drawn()["passing_context"] == live // batch


def test_windows_can_keep_kv_below_the_weights_for_ever() -> None:
    view = KVCalculator(model="mistral-7b-v0.1")
    assert view.drawn()["passing_context"] is None
    assert "however long the context" in view.drawn()["text"]


@pytest.mark.parametrize(
    ("control", "value", "kind", "expected"),
    [("layers", 64, "GQA", 64 * 2 * 8 * 128 * 2), ("heads", 64, "MHA", 32 * 2 * 64 * 128 * 2),
     ("kv_heads", 4, "GQA", 32 * 2 * 4 * 128 * 2), ("head_size", 64, "MQA", 32 * 2 * 64 * 2),
     ("latent", 256, "MLA", 32 * (256 + 64) * 2), ("rope", 32, "MLA", 32 * (512 + 32) * 2),
     ("dtype", "fp8", "GQA", 32 * 2 * 8 * 128)],
)  # fmt: skip
def test_every_size_moves_its_bar(control: str, value: int | str, kind: str, expected: int) -> None:
    view = KVCalculator()
    view.move(control, value)
    assert view.drawn()["bytes_per_token"][kind] == expected


def test_moved_size_makes_it_another_model_than_the_published_one() -> None:
    view = KVCalculator()
    view.move("layers", 16)
    assert "with GQA takes 65.5 kB" in view.drawn()["title"]
    view.move("model", "llama-3-8b")
    assert "with" not in view.drawn()["title"].split(";")[0]


def test_kv_heads_always_divide_the_query_heads() -> None:
    view = KVCalculator()
    for heads in (12, 9, 64, 1):
        view.move("heads", heads)
        [slider] = [c for c in view.drawn()["controls"] if isinstance(c, Slider) and c.name == "kv_heads"]
        assert isinstance(slider.value, int) and heads % slider.value == 0


def test_unit_toggle_changes_every_byte_count_but_the_exact_ones() -> None:
    view = KVCalculator()
    assert "131 kB" in view.drawn()["title"] and "16.1 GB" in view.drawn()["text"]
    view.move("unit", "binary")
    assert "128 KiB" in view.drawn()["title"] and "15 GiB" in view.drawn()["text"]
    assert "kB" not in view.drawn()["title"] and "131,072" in view.drawn()["text"]
    assert (in_unit(80 * 10**9, "decimal"), in_unit(80 * 10**9, "binary")) == ("80 GB", "74.5 GiB")


@pytest.mark.parametrize(
    ("control", "value"), [("context", 8192), ("weights", "int4"), ("chip", "h200-sxm"), ("attention", "MQA")]
)
def test_other_controls_change_how_many_fit(control: str, value: int | str) -> None:
    view = KVCalculator()
    before = view.drawn()["num_fitting"]
    view.move(control, value)
    view.flush()
    assert view.picture["num_fitting"] != before and view.picture["status"] == ""
    view.close()


def test_weights_that_do_not_fit_are_a_sentence_and_no_error() -> None:
    picture = KVCalculator(model="deepseek-v3", chip="t4").drawn()
    assert "cannot hold the weights" in picture["title"] and picture["num_fitting"] == 0


def test_lengths_of_bars_are_in_proportion() -> None:
    bars = [mark for mark in KVCalculator().drawn()["marks"] if isinstance(mark, Box)][:5]
    assert [bar.x for bar in bars] == [LEFT] * 5
    assert [round(bar.width / BAR_PX, 3) for bar in bars[:4]] == [0.25, 1.0, 0.25, round(1 / 32, 3)]
    assert bars[3].click == ("attention", "MQA")


def test_card_is_drawn_to_scale() -> None:
    boxes = [mark for mark in KVCalculator(batch=32).drawn()["marks"] if isinstance(mark, Box)][5:]
    whole = sum(box.width for box in boxes)
    weights, kv = (box.width / whole for box in boxes[:2])
    memory = accelerator("h100").memory_bytes
    assert weights == pytest.approx(int(weight_bytes("llama-3-8b")) / memory, rel=0.01)
    assert kv == pytest.approx(32 * 4096 * 131_072 / memory, rel=0.01)


def test_derivation_is_the_calculators_own() -> None:
    picture = KVCalculator().drawn()
    assert str(kv_bytes_per_token("llama-3-8b")) in picture["lines"]
    assert any("55,939,477,504 / 536,870,912" in line for line in picture["lines"])


@pytest.mark.parametrize(
    ("control", "value"), [("layers", 0), ("heads", "8"), ("unit", "bits"), ("y", 1), ("dtype", 2)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        KVCalculator().move(control, value)


def test_twins_repeat_and_fit_json() -> None:
    bundles = [KVCalculator(model="gemma-3-27b-text")._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert "gemma-3-27b-text" in str(bundles[0]["text/plain"])
    assert json.loads(json.dumps(KVCalculator().drawn()))["bytes_per_token"]["GQA"] == 131_072
