"""The memory strip: its sums are those of memory_over_time at every step, and every control shows another part."""

import json
from collections import Counter
from functools import cache
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivllm.course.memory_use import memory_over_time, refusals
from minivllm.errors import MiniVLLMError
from minivllm.events import Added, Admitted, BlocksTaken
from minivllm.lab.allocator_room import ALL, serve
from minivllm.trace import Trace
from minivllm.views.memory_strip import MemoryStrip, StripFold
from minivllm.views.memory_strip_picture import AREA_PX, USES, StripControls, draw, shares_of
from minivllm.views.sketch import Box, Choice
from tests.test_memory_use import live_at_random
from tests.view_traces import HEADER, HOSTILE, ran, small_trace

DECK = [(4 + i % 9, 4 + 7 * i % 29) for i in range(40)]
SIZES = {"max_model_len": 48, "block_size": 4, "num_slots": 192, "num_tokens": 300}


@cache
def small(allocator: str) -> Trace:
    return serve(allocator, DECK, **SIZES)


def sums(fold: StripFold, step: int) -> dict[str, int]:
    counts = Counter(dict.fromkeys(USES, 0))
    for segment in fold.state(step).segments:
        counts[segment.kind] += segment.length
    return dict(counts)


def expected(fold: StripFold, index: int) -> dict[str, int]:
    use = fold.uses[index]
    parts = {kind: getattr(use, kind) for kind in USES if kind != "free"}
    return {**parts, "free": use.cached + use.empty}


@pytest.mark.parametrize("allocator", ALL)
def test_sums_by_address_are_the_parts_of_memory_over_time_at_every_step(allocator: str) -> None:
    fold = StripFold(small(allocator))
    assert len(fold.uses) > 25
    for index, use in enumerate(fold.uses):
        assert sums(fold, use.step) == expected(fold, index), use.step


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_segments_tile_the_pool_in_any_life(seed: int) -> None:
    engine, trace, _ = live_at_random(Random(seed))
    if not memory_over_time(trace):
        return
    fold = StripFold(trace)
    for index, use in enumerate(fold.uses):
        segments = fold.state(use.step).segments
        assert [s.start for s in segments] == [sum(s.length for s in segments[:i]) for i in range(len(segments))]
        counted, wanted = sums(fold, use.step), expected(fold, index)
        assert counted["free"] == wanted["free"] and counted["external"] == wanted["external"]
        assert sum(counted.values()) == use.num_slots
        if engine.config.allocator != "paged":
            assert counted == wanted


def test_scrubbing_back_shows_what_playing_forward_showed() -> None:
    fold = StripFold(small("buddy"))
    forward = [fold.state(use.step) for use in fold.uses]
    assert [fold.state(use.step) for use in reversed(fold.uses)] == forward[::-1]
    assert fold.state(0) == forward[0] and fold.state(10_000) == forward[-1]


@pytest.mark.parametrize("allocator", ["contiguous", "oracle", "buddy"])
def test_who_waits_needs_what_refusals_say(allocator: str) -> None:
    trace = small(allocator)
    fold, found = StripFold(trace), refusals(trace)
    assert found or allocator == "contiguous"
    for refusal in found:
        refused = fold.state(refusal.step).refused
        assert refused is not None
        told = (refused.request_id, refused.need, refused.free)
        assert told == (refusal.request_id, refusal.need, refusal.free)
        assert allocator == "buddy" or refused.largest_hole == refusal.largest_hole


def test_step_control_moves_strip_cursor_title_and_text() -> None:
    trace = small("oracle")
    view = MemoryStrip.replay(trace)
    refusal = refusals(trace)[0]
    before = view.drawn()
    view.move("step", refusal.step)
    view.flush()
    picture = view.drawn()
    use = next(use for use in memory_over_time(trace) if use.step == refusal.step)
    assert picture["steps"] == (1, trace.last_step, refusal.step) and picture["step"] == refusal.step
    assert picture["shares"] == shares_of(use) and picture["num_requests"] == use.num_requests
    live = f"{100 * use.live / use.num_slots:.1f}% of 192 slots hold a token of 4 requests"
    assert picture["title"].startswith(f"Step {refusal.step}, oracle: {live}") and live in view.picture["title"]
    need = f"it needs {refusal.need} in a row; {refusal.free} slots free, the longest hole {refusal.largest_hole}"
    assert picture["lines"][-1].endswith(f"{need} (external fragmentation)") and need in picture["text"]
    assert f"> {refusal.step}" in picture["text"] and picture["marks"] != before["marks"]
    view.move("step", trace.last_step)
    assert view.drawn() == before
    view.close()


def test_run_control_chooses_among_traces() -> None:
    view = MemoryStrip.replay(oracle=small("oracle"), paged=small("paged"))
    assert ", oracle: " in view.drawn()["title"]
    view.move("run", "paged")
    picture = view.drawn()
    assert ", paged: " in picture["title"] and picture["shares"]["internal"] < 3
    [choice] = picture["controls"]
    assert isinstance(choice, Choice) and choice.value == "paged"
    assert MemoryStrip.replay(small("paged")).drawn()["controls"] == []


def test_widths_are_in_proportion_to_slots_and_heights_to_percent() -> None:
    fold = StripFold(small("contiguous"))
    state = fold.state(fold.uses[20].step)
    boxes = [mark for mark in draw(state, StripControls(), [""])["marks"] if isinstance(mark, Box)]
    strip, area = [b for b in boxes if b.click is None], [b for b in boxes if b.click]
    per_slot = sum(box.width for box in strip) / 192
    for kind, number in sums(fold, fold.uses[20].step).items():
        fill, pattern, _ = USES[kind]
        widths = sum(box.width for box in strip if (box.fill, box.pattern) == (fill, pattern))
        assert widths == pytest.approx(number * per_slot)
    columns = {box.x for box in area}
    assert len(columns) == 60 and sum(box.height for box in area) == pytest.approx(60 * AREA_PX)


def test_a_click_on_a_column_names_a_step_that_the_view_takes() -> None:
    view = MemoryStrip.replay(small("paged"))
    clicks = [mark.click for mark in view.drawn()["marks"] if isinstance(mark, Box) and mark.click]
    for control, value in {*clicks}:
        view.move(control, value)
        assert view.drawn()["step"] == value


def test_requests_of_contiguous_allocators_are_named_where_they_lie() -> None:
    picture = MemoryStrip.replay(small("contiguous")).drawn()
    words = [mark.words for mark in picture["marks"] if isinstance(mark, Box)]
    assert any("r" in w and "internal: slots" in w for w in words)
    assert {use.words.split(":")[0] for use in picture["legend"]} == {*USES}
    assert len({(key.fill, key.pattern) for key in picture["legend"]}) == 5


@pytest.mark.parametrize(("control", "value"), [("step", 0), ("step", 10**6), ("step", True), ("run", "x"), ("y", 1)])
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    view = MemoryStrip.replay(a=small("paged"), b=small("oracle"))
    with pytest.raises(MiniVLLMError) as caught:
        view.move(control, value)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_gets_one_line() -> None:
    with pytest.raises(MiniVLLMError, match="draws traces"):
        MemoryStrip.replay()
    with pytest.raises(MiniVLLMError, match="draws traces"):
        MemoryStrip.replay("run.json")  # type: ignore[arg-type]
    with pytest.raises(MiniVLLMError, match="no step ran"):
        MemoryStrip.replay(Trace(HEADER))
    late = Trace(HEADER, small_trace().events[4:])
    with pytest.raises(MiniVLLMError, match="begins after"):
        MemoryStrip.replay(late)


def test_hostile_names_stay_text_and_twins_repeat() -> None:
    header = {**HEADER, "allocator": "paged", "max_model_len": 20}
    events = [Added(0, HOSTILE, 5, 4, 0), BlocksTaken(1, HOSTILE, (1, 2)), Admitted(1, HOSTILE, 0, 0)]
    trace = Trace(header, [*events, ran(1, (HOSTILE, 5, 5)), ran(2, (HOSTILE, 1, 6))])
    bundles = [MemoryStrip.replay(trace)._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert "13.6% of 44 slots hold a token of 1 request" in str(bundles[0]["text/plain"])
    assert json.loads(json.dumps(MemoryStrip.replay(trace).drawn()))["view"] == "memory-strip"


def test_fallback_is_a_picture_of_the_right_size() -> None:
    image = MemoryStrip.replay(small("power_of_two")).image()
    assert isinstance(image, Image.Image) and image.width > 1400
    assert len(image.getcolors(1 << 24) or []) > 10
