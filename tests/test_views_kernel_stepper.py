"""The kernel stepper: whatever control is moved, the picture shows the recorded stage and its numbers."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from minivllm.course.kernel_turns import LOG2_E, End, KernelSteps, Turn, distinct_blocks
from minivllm.errors import MiniVLLMError
from minivllm.lab.kernel_steps import RECORDING
from minivllm.views.kernel_stepper import KernelStepper, places
from minivllm.views.kernel_stepper_picture import Moment, merged, outputs
from minivllm.views.sketch import Box, Choice, Slider, Words
from minivllm.views.theme import owner_colour

STEPS = KernelSteps.load(RECORDING)


def boxes(view: KernelStepper, words: str) -> list[Box]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Box) and words in mark.words]


def texts(view: KernelStepper) -> list[str]:
    return [mark.text for mark in view.drawn()["marks"] if isinstance(mark, Words)]


@pytest.mark.parametrize("step", range(1, len(STEPS.stages) + 1))
def test_every_step_shows_its_own_stage(step: int) -> None:
    view, stage = KernelStepper(STEPS), STEPS.stages[step - 1]
    view.move("step", step)
    picture = view.drawn()
    assert picture["program"] == stage.program and picture["steps"] == (1, 21, step)
    assert f"Program {stage.program} " in picture["title"] and picture["provenance"] == STEPS.origin
    if isinstance(stage, Turn):
        assert picture["slots"] == list(stage.slots) and picture["peak"] == list(stage.peak)
        assert f"tokens {stage.start} to {stage.start + len(stage.slots) - 1} of request" in picture["title"]
        blocks = " and ".join(map(str, distinct_blocks(stage, 8)))
        assert f"lie in block{'s' if 'and' in blocks else ''} {blocks}" in picture["title"]


def test_programs_and_turns_walk_the_same_stages_as_the_steps() -> None:
    view = KernelStepper(STEPS)
    for program in range(4):
        view.move("program", program)
        assert view.drawn()["turn"] == 1 and view.drawn()["program"] == program
        for turn, step in enumerate(places(STEPS, program), 1):
            view.move("turn", turn)
            assert (view.drawn()["steps"] or (0, 0, 0))[2] == step


def test_a_click_on_a_tile_goes_to_its_turn() -> None:
    view = KernelStepper(STEPS)
    for turn in STEPS.turns:
        letter = "ABC"[turn.request]
        [tile] = boxes(view, f"request {letter}, KV head {turn.kv_head}, tokens from {turn.start}")
        assert tile.click is not None
        view.move(*tile.click)
        assert STEPS.stages[(view.drawn()["steps"] or (0, 0, 1))[2] - 1] is turn


def test_table_entries_and_slots_of_the_turn_are_filled_and_others_are_not() -> None:
    view = KernelStepper(STEPS)
    view.move("step", places(STEPS, 1)[3])  # request B, tokens 16 .. 31, entries 2 and 3: blocks 9 and 2
    entries = boxes(view, "and on lie in block")
    assert [box.pattern for box in entries] == ["outline", "outline", "solid", "solid", "outline"]
    assert {box.fill for box in entries} == {owner_colour(1)}
    pool = {box.words: box.pattern for box in boxes(view, ", slots ")}
    assert pool["block 9, slots 72 to 79"] == pool["block 2, slots 16 to 23"] == "solid"
    assert pool["block 7, slots 56 to 63"] == pool["block 6, slots 48 to 55"] == "dots"
    assert len(pool) == 5  # nobody else's slots


def test_the_masked_tail_is_hatched_in_the_pool_and_among_the_weights() -> None:
    view = KernelStepper(STEPS, turn=2)  # request A: tokens 16 .. 22 of a tile of 16
    assert "9 places of the tile are masked" in view.drawn()["title"]
    assert [box.pattern for box in boxes(view, "block 10, slots")] == ["solid", "hatch"]
    masked = boxes(view, ": masked")
    assert len(masked) == 9 and all(box.pattern == "hatch" for box in masked)
    bars = boxes(view, ", weight ")
    turn = STEPS.turns[1]
    assert len(bars) == 7
    for bar, score in zip(bars, turn.scores[0], strict=True):
        assert bar.words.endswith(f"weight {2 ** (score - turn.peak[0]):.4g}")
    tallest = max(turn.scores[0]) - turn.peak[0]
    assert max(bar.height for bar in bars) == pytest.approx(66 * 2**tallest)


def test_running_maximum_and_sum_are_shown_before_and_after() -> None:
    view = KernelStepper(STEPS)
    view.move("step", 9)
    old, new = STEPS.stages[7], STEPS.stages[8]
    assert isinstance(old, Turn) and isinstance(new, Turn)
    for row in range(2):
        assert f"{old.peak[row] / LOG2_E:.4g} → {new.peak[row] / LOG2_E:.4g}" in texts(view)
        assert f"{old.total[row]:.4g} → {new.total[row]:.4g}" in texts(view)
    view.move("step", 8)  # the first tile of the pair: nothing before
    assert f"{old.total[0]:.4g}" in texts(view)


def test_the_arithmetic_below_adds_up() -> None:
    view = KernelStepper(STEPS, head="1")
    view.move("step", 9)  # the maximum of this head rises
    [slot, peak, total] = view.drawn()["lines"]
    assert slot.startswith("slot of token 16 = table[16 // 8] × 8 + 16 % 8 = 9 × 8 + 0 = 72")
    assert "older terms shrink by e^(0.7031 − 2.093) = 0.2491" in peak
    before, shrink, fresh, after = (float(word) for word in total.split() if word[0].isdigit())
    assert before * shrink + fresh == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("head", ["0", "1"])
def test_the_head_chosen_is_the_head_drawn(head: str) -> None:
    view = KernelStepper(STEPS, head=head)
    view.move("step", 9)
    assert f"query head {head}" in " ".join(texts(view))
    turn = STEPS.stages[8]
    assert isinstance(turn, Turn)
    wanted = turn.output[int(head)][0] / turn.total[int(head)]
    assert boxes(view, "number 0: ")[0].words.startswith(f"number 0: {wanted:.4g} now")
    choice = view.drawn()["controls"][-1]
    assert isinstance(choice, Choice) and choice.value == head


def test_the_output_so_far_reaches_the_finished_one_at_a_whole_pair_and_at_a_merge() -> None:
    for index, stage in enumerate(STEPS.stages):
        now, final = outputs(Moment(STEPS, index, 1))
        difference = max(abs(a - b) for a, b in zip(now, final, strict=True))
        is_done = isinstance(stage, End) and (stage.slot is None or bool(stage.merged_slots))
        assert difference < 1e-5 if is_done else True
    part = next(
        i for i, s in enumerate(STEPS.stages) if isinstance(s, End) and s.slot is not None and not s.merged_slots
    )
    now, final = outputs(Moment(STEPS, part, 0))
    assert max(abs(a - b) for a, b in zip(now, final, strict=True)) > 0.01  # a part is not the whole


def test_a_merge_shows_its_parts_and_their_weights() -> None:
    view = KernelStepper(STEPS)
    view.move("step", 12)
    assert "so it merges 2 parts and writes the output" in view.drawn()["title"]
    shown = boxes(view, "%")
    assert [box.words.split(":")[0] for box in shown] == ["program 1, slot 1", "program 2, slot 6"]
    shares = [float(box.words.split(": ")[1].rstrip("%")) for box in shown]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    parts = Moment(STEPS, 11, 0).parts
    assert merged(parts, 0) == pytest.approx(STEPS.out[1][0], abs=1e-5)
    first = 2 ** parts[0].lse[0] / sum(2 ** part.lse[0] for part in parts)
    assert shares[0] == pytest.approx(100 * first, abs=0.06)


@pytest.mark.parametrize(
    ("control", "value"), [("step", 0), ("step", 22), ("program", 4), ("turn", 9), ("head", "2"), ("head", 0), ("x", 1)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    view = KernelStepper(STEPS)
    before = view.drawn()["title"]
    with pytest.raises(MiniVLLMError) as caught:
        view.move(control, value)
    assert "\n" not in str(caught.value) and view.drawn()["title"] == before


def test_other_things_are_refused() -> None:
    with pytest.raises(MiniVLLMError, match="KernelStepper draws KernelSteps"):
        KernelStepper("steps.json")  # type: ignore[arg-type]


def test_a_large_pool_shows_the_blocks_that_tables_name() -> None:
    view = KernelStepper(replace(STEPS, case=replace(STEPS.case, num_blocks=4096)))
    assert any("10 of its 4096 blocks" in text for text in texts(view))
    assert len(boxes(view, ", slots ")) > 0


def test_twins_hold_the_same_numbers_and_repeat() -> None:
    bundles = [KernelStepper(STEPS, turn=2)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    text = str(bundles[0]["text/plain"])
    assert "slots 80, 81, 82, 83, 84, 85, 86" in text and "2.753" in text and STEPS.origin in text
    assert json.loads(json.dumps(KernelStepper(STEPS).drawn()))["marks"]
    image = KernelStepper(STEPS).image()
    assert isinstance(image, Image.Image) and image.width > 1400


def test_sliders_say_where_they_are() -> None:
    sliders = [c for c in KernelStepper(STEPS, program=2, turn=3).drawn()["controls"] if isinstance(c, Slider)]
    assert [slider.shown for slider in sliders] == ["program 2 of 4", "3 of 5"]
