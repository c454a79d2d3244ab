"""Step cost, calculated and measured: the parts are the calculators', their sum is the floor, the rest is overhead."""

import json

import pytest

from minivllm.course.calculators import (
    Accelerator,
    attention_flops,
    compute_ms,
    decode_floor_ms,
    kv_bytes_of_sequence,
    num_parameters,
    read_ms,
    weight_bytes,
)
from minivllm.errors import MiniVLLMError
from minivllm.events import EventBus, StepRan
from minivllm.lab.step_floor import ModelWork
from minivllm.trace import Trace
from minivllm.views.sketch import Box, Line
from minivllm.views.stacked_bars import BOTTOM, PARTS, StepParts, tick_ms
from minivllm.views.step_cost import NUM_KEPT, CostFold, Machine, StepCost, cost
from minivllm.views.step_regimes import RegimeControls, StepRegimes, draw, step_parts
from minivllm.views.step_work import BATCHES, model_names
from tests.view_traces import HOSTILE

H100 = Machine("llama-3-8b", "h100-sxm")


def ran(step: int, run_ms: float, *scheduled: tuple[str, int, int]) -> StepRan:
    return StepRan(step, scheduled, (), len(scheduled), 0, 0, 0.1, run_ms, 0.1, "")


def decode_trace(num_steps: int) -> Trace:
    events = [ran(i, 8.0 + i % 3, (HOSTILE, 1, 1000 + i), ("b", 1, 3000 + i)) for i in range(1, num_steps + 1)]
    return Trace({"live": "recorded", "model": HOSTILE}, [*events])


@pytest.mark.parametrize("context", [128, 4096, 131_072])
@pytest.mark.parametrize("batch", BATCHES)
def test_floor_of_every_batch_is_that_of_decode_floor_ms(batch: int, context: int) -> None:
    parts = step_parts(RegimeControls(batch=batch, context=context))
    assert parts.floor == pytest.approx(float(decode_floor_ms("llama-3-8b", "h100", context, batch_size=batch)))


@pytest.mark.parametrize("name", model_names())
def test_every_model_of_the_picker_draws(name: str) -> None:
    picture = draw(RegimeControls(model=name))
    assert name in picture["title"] and len(picture["parts"]) == len(BATCHES)


@pytest.mark.parametrize(
    ("chosen", "regime"),
    [({"batch": 1, "context": 128}, "weights"), ({"batch": 256, "context": 32768}, "kv"),
     ({"batch": 1024, "context": 128}, "arithmetic"), ({"batch": 1, "host_ms": 20.0}, "overhead")],
)  # fmt: skip
def test_controls_reach_all_four_regimes(chosen: dict[str, float | str], regime: str) -> None:
    picture = StepRegimes(**chosen).drawn()
    assert picture["regime"] == regime


@pytest.mark.parametrize(
    ("control", "value", "part"),
    [("batch", 64, "kv"), ("context", 8192, "kv"), ("weights", "int8", "weights"), ("kv", "fp8", "kv"),
     ("host_ms", 50.0, "overhead"), ("chip", "b200-sxm", "weights"), ("model", "qwen3-8b", "weights")],
)  # fmt: skip
def test_every_control_changes_its_part(control: str, value: float | str, part: str) -> None:
    view = StepRegimes()

    def here() -> StepParts:
        picture = view.drawn()
        [slider] = [c for c in picture["controls"] if c.name == "batch"]
        return picture["parts"][int(slider.value)]

    before = getattr(here(), part)
    view.move(control, value)
    view.flush()
    assert getattr(here(), part) != before and view.picture["title"] == view.drawn()["title"]
    view.close()


def test_a_slow_host_hides_behind_a_large_batch() -> None:
    parts = StepRegimes(host_ms=10.0).drawn()["parts"]
    assert parts[1].total == pytest.approx(10.0) and parts[1].overhead > 5
    assert parts[256].overhead == 0


def test_heights_are_in_proportion_to_milliseconds() -> None:
    picture = StepRegimes(batch=1).drawn()
    boxes = [mark for mark in picture["marks"] if isinstance(mark, Box) and mark.click == ("batch", 512)]
    p = picture["parts"][512]
    assert [box.height / boxes[0].height for box in boxes] == pytest.approx(
        [1, p.kv / p.weights, p.arithmetic / p.weights]
    )
    assert boxes[0].y + boxes[0].height == BOTTOM
    assert [box.fill for box in boxes] == [PARTS[name].fill for name in ("weights", "kv", "arithmetic")]


def test_what_does_not_fit_the_card_is_marked() -> None:
    view = StepRegimes(model="llama-3-8b", chip="h200-sxm", batch=512, context=1024)
    picture = view.drawn()
    held = {batch: batch * int(kv_bytes_of_sequence("llama-3-8b", 1024)) for batch in BATCHES}
    weights = int(weight_bytes("llama-3-8b"))
    assert picture["needed_bytes"] == {batch: weights + num_bytes for batch, num_bytes in held.items()}
    assert [batch for batch, n in picture["needed_bytes"].items() if n > picture["card_bytes"]] == [1024]
    [dashes] = [mark for mark in picture["marks"] if isinstance(mark, Line) and mark.is_dashed]
    boxes = [mark for mark in picture["marks"] if isinstance(mark, Box)]
    edges = [next(box.x for box in boxes if box.click == ("batch", batch)) for batch in (512, 1024)]
    assert edges[0] < dashes.x < edges[1] and "does not fit: 153 GB of 141 GB" in picture["text"]
    assert "does not fit" not in picture["title"]
    view.move("batch", 1024)
    assert view.drawn()["title"].endswith("But it does not fit: 153 GB of 141 GB.")
    view.move("kv", "fp8")
    assert not [mark for mark in view.drawn()["marks"] if isinstance(mark, Line) and mark.is_dashed]
    view.move("chip", "l4")
    assert "does not fit: 85 GB of 24 GB" in view.drawn()["title"]


def test_measured_decode_step_is_its_parts_and_the_rest() -> None:
    found = cost(ran(1, 9.0, ("a", 1, 1000), ("b", 1, 3000)), H100)
    held = sum(int(kv_bytes_of_sequence("llama-3-8b", n)) for n in (1000, 3000))
    weights, kv = float(read_ms(weight_bytes("llama-3-8b"), "h100")), float(read_ms(held, "h100"))
    assert found.parts == pytest.approx((weights, kv, 0.0, 9.0 - weights - kv))
    assert found.parts.total == pytest.approx(9.0)


def test_prefill_step_counts_products_and_pairs_of_attention() -> None:
    parts = cost(ran(1, 80.0, ("a", 4096, 4096)), H100).parts
    products = float(compute_ms(2 * 4096 * int(num_parameters("llama-3-8b")), "h100"))
    attention = float(compute_ms(attention_flops("llama-3-8b", 4096), "h100"))
    assert parts.floor == pytest.approx(products + attention)


@pytest.mark.parametrize("scheduled", [[(1, 500)] * 8, [(512, 512)], [(1, 900), (128, 640)]])
def test_floor_agrees_with_the_labs_which_hides_all_reads_behind_all_arithmetic(
    scheduled: list[tuple[int, int]],
) -> None:
    chip = Accelerator("some chip", 10**9, 2e11, {"bf16": 5e12})
    config = "llama-3-8b"
    mine = cost(
        ran(1, 1.0, *((str(i), new, stored) for i, (new, stored) in enumerate(scheduled))), Machine(config, chip)
    )
    labs = ModelWork(config, "bfloat16").floor(scheduled, len(scheduled), chip)
    assert mine.parts.floor >= 0.9 * labs.ms  # it hides less, and reads the table of embeddings as well
    assert mine.parts.floor <= 2.2 * labs.ms


def test_step_control_frames_its_bar_and_says_its_numbers() -> None:
    view = StepCost.replay(decode_trace(100), H100)
    view.move("step", 40)
    picture = view.drawn()
    assert picture["steps"] == (1, 100, 40) and picture["title"].startswith(
        "Step 40, 2 tokens of 2 requests, took 9 ms"
    )
    assert len(picture["costs"]) == 60 and "\n40 " in picture["text"]
    assert picture["lines"][0].startswith("100 steps, 900 ms: reading the weights 53.3%")
    with pytest.raises(MiniVLLMError):
        view.move("step", 101)
    with pytest.raises(MiniVLLMError):
        view.move("chip", "h100")


def test_step_faster_than_its_floor_says_so() -> None:
    picture = StepCost.replay(Trace({}, [ran(1, 0.5, ("a", 1, 10))]), H100).drawn()
    assert "less than its floor" in picture["title"] and "name the machine" in picture["lines"][0]


def test_live_view_follows_and_keeps_a_bounded_number_of_steps() -> None:
    bus, fold = EventBus(), CostFold(H100)
    view = StepCost.follow(bus, {}, H100)
    assert view.drawn()["title"] == "No step has run yet." and view.drawn()["steps"] is None
    for event in decode_trace(5000):
        fold.apply(event)
    assert len(fold.state()) == NUM_KEPT and fold.step == 5000
    bus.emit(ran(1, 7.0, ("a", 1, 10)))
    view.flush()
    assert view.picture["step"] == 1
    view.close()
    assert not bus


def test_hostile_names_stay_text_and_twins_repeat() -> None:
    bundles = [StepCost.replay(decode_trace(5), H100)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    picture = StepCost.replay(decode_trace(5), H100).drawn()
    assert HOSTILE in picture["provenance"] and json.loads(json.dumps(picture))["view"] == "step-cost"
    assert StepRegimes().png() == StepRegimes().png()


@pytest.mark.parametrize("value", [Trace, None, "x"])
def test_what_is_no_trace_gets_one_line(value: Trace) -> None:
    with pytest.raises(MiniVLLMError, match="draws a Trace"):
        StepCost.replay(value, H100)


@pytest.mark.parametrize(("highest", "tick"), [(8.3, 2), (0.04, 0.01), (10.0, 2), (101.0, 50)])
def test_ticks_are_round(highest: float, tick: float) -> None:
    assert tick_ms(highest) == tick
