"""The block map: every control, its twins, its thread, and that no text of a prompt becomes markup."""

import gc
import json
import re
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from minivllm.errors import MiniVLLMError
from minivllm.events import BlocksReleased, BlocksTaken, EventBus
from minivllm.trace import Trace
from minivllm.views.block_map import BlockMap, draw
from minivllm.views.block_map_picture import MAX_HEIGHT_PX, WIDTH_PX, layout
from minivllm.views.pool_fold import pool_state
from minivllm.views.publisher import Publisher
from minivllm.views.widget import STATIC, Panel, View, script
from tests.view_traces import HEADER, HOSTILE, ran, small_trace

FORBIDDEN_JS = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\bfetch\(|\bimport\b|https?://(?!www\.w3\.org/2000/svg\")"


def from_the_page(view: View, control: object, value: object) -> None:
    """What the kernel does with a message of the browser."""
    view._handle_custom_msg({"control": control, "value": value}, [])


def test_step_control_changes_title_cells_and_slider() -> None:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 2)
    block_map.flush()
    assert block_map.picture["title"].startswith("Step 2: 4 of 11 blocks live (2 shared)")
    assert block_map.picture["cells"][1] == ("live", 4, True, [0, 1])
    assert block_map.picture["steps"] == (0, 5, 2)


def test_steps_backward_and_forward_agree() -> None:
    block_map = BlockMap.replay(small_trace())
    seen = {}
    for step in (1, 2, 3, 4, 5):
        block_map.move("step", step)
        seen[step] = block_map.drawn()["cells"]
    for step in (4, 2, 3, 1):
        block_map.move("step", step)
        assert block_map.drawn()["cells"] == seen[step]


def test_block_control_describes_and_marks_the_block() -> None:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 2)
    block_map.move("block", 1)
    assert "reference count 2, 4 of 4 slots filled" in block_map.drawn()["detail"]
    block_map.move("block", None)
    assert (block_map.drawn()["selected"], block_map.drawn()["detail"]) == (None, "")


@pytest.mark.parametrize(("block", "words"), [(0, "null block"), (9, "free and empty"), (1, "stay findable")])
def test_every_kind_of_block_has_its_sentence(block: int, words: str) -> None:
    trace = small_trace()
    assert words in draw(pool_state(trace.header, trace.until(4)), block)["detail"]


def test_highlight_control_takes_a_request_and_forgets_one_that_is_gone() -> None:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 2)
    block_map.move("highlight", "a")
    assert block_map.drawn()["highlight"] == "a"
    block_map.move("step", 3)
    assert block_map.drawn()["highlight"] is None


@pytest.mark.parametrize(
    ("control", "value"),
    [("step", 6), ("step", "2"), ("step", True), ("block", 12), ("block", -1), ("highlight", 3), ("colour", 1)],
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError):
        BlockMap.replay(small_trace()).move(control, value)


@pytest.mark.parametrize("message", [("step", 99), ("nonsense", 1), (None, None)])
def test_error_of_a_callback_ends_in_the_status_line(
    message: tuple[object, object], capfd: pytest.CaptureFixture[str]
) -> None:
    block_map = BlockMap.replay(small_trace())
    thread = threading.Thread(target=from_the_page, args=(block_map, *message))
    thread.start()
    thread.join()
    block_map.flush()
    assert block_map.picture["status"]
    block_map.move("step", 1)
    block_map.flush()
    assert block_map.picture["status"] == ""
    assert capfd.readouterr() == ("", "")


def test_callbacks_of_many_threads_end_in_one_true_picture() -> None:
    block_map = BlockMap.replay(small_trace())
    threads = [threading.Thread(target=from_the_page, args=(block_map, "step", i % 6)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    from_the_page(block_map, "step", 2)
    block_map.flush()
    assert (block_map.picture["step"], block_map.picture["status"]) == (2, "")


def test_live_map_follows_the_bus_and_its_last_picture_is_the_final_state() -> None:
    bus, trace = EventBus(), small_trace()
    block_map = BlockMap.follow(bus, HEADER)
    for event in trace:
        bus.emit(event)
    block_map.flush()
    assert block_map.picture["cells"] == BlockMap.replay(trace).drawn()["cells"]
    assert block_map.picture["steps"] is None
    assert block_map.picture["provenance"].startswith("live · model hand-made")
    block_map.close()


def test_live_map_refuses_a_step_and_stops_listening_when_closed() -> None:
    bus = EventBus()
    block_map = BlockMap.follow(bus, HEADER, past=small_trace().until(1))
    with pytest.raises(MiniVLLMError, match="shows the present"):
        block_map.move("step", 1)
    assert block_map.drawn()["step"] == 1
    block_map.close()
    assert not bus


def test_events_that_contradict_show_in_the_status_and_never_reach_the_engine() -> None:
    bus = EventBus()
    block_map = BlockMap.follow(bus, HEADER)
    bus.emit(BlocksTaken(1, "a", (1,)))
    bus.emit(BlocksReleased(1, "b", (1,)))
    block_map.flush()
    assert "request b holds []" in block_map.picture["status"]
    block_map.close()


def test_updates_are_at_most_ten_a_second_and_the_latest_wins() -> None:
    bus, times = EventBus(), []
    block_map = BlockMap.follow(bus, HEADER)
    block_map.observe(lambda change: times.append(time.monotonic()), "picture")
    bus.emit(BlocksTaken(1, "a", (1, 2, 3)))
    for i in range(12):
        bus.emit(ran(i, ("a", 1, i + 1)))
        time.sleep(0.02)
    block_map.flush()
    assert block_map.picture["step"] == 11
    assert all(later - earlier >= 0.09 for earlier, later in pairwise(times))
    block_map.close()


def test_thread_ends_when_stopped_and_by_itself_when_idle() -> None:
    calls: list[int] = []
    idle = Publisher(lambda: calls.append(1), interval_s=0.001, idle_s=0.01)
    idle.request()
    deadline = time.monotonic() + 10
    while idle.is_running and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (idle.is_running, calls) == (False, [1])
    idle.request()  # a new thread serves it
    assert idle.flush()
    idle.stop()
    idle.request()
    assert (idle.is_running, len(calls)) == (False, 2)


def test_publisher_survives_an_error_and_serves_what_came_before_the_stop() -> None:
    calls: list[int] = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the page is gone")

    publisher = Publisher(fail_once, interval_s=0.001)
    publisher.request()
    publisher.flush()
    publisher.request()
    publisher.stop()
    assert len(calls) == 2


def test_closed_views_leave_no_thread() -> None:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 1)
    block_map.close()
    assert not block_map._publisher.is_running


@pytest.mark.parametrize("num_blocks", [2, 10, 63, 64, 257, 1000, 4001])
def test_map_of_any_size_fits_and_draws(num_blocks: int) -> None:
    events = [BlocksTaken(1, "a", (1,)), ran(1, ("a", 1, 1))]
    picture = BlockMap.replay(Trace({**HEADER, "num_blocks": num_blocks}, list(events))).drawn()
    columns, width, height = layout(num_blocks)
    assert columns * width <= WIDTH_PX
    assert -(-num_blocks // columns) * height <= MAX_HEIGHT_PX
    assert len(json.loads(json.dumps(picture))["cells"]) == num_blocks


def test_text_twin_shows_owner_fill_sharing_and_cache() -> None:
    trace = small_trace()
    rows = {s: draw(pool_state(trace.header, trace.until(s)))["text"].splitlines()[1].split()[1] for s in (1, 2, 4)}
    assert rows == {1: "0AAa........", 2: "0**ab.......", 4: "0~~........."}


def test_repr_and_bundle_repeat_and_hold_no_address() -> None:
    one, two = (BlockMap.replay(small_trace()) for _ in range(2))
    assert repr(one) == repr(two) == str(one)
    assert "0x" not in repr(one)
    bundles = [view._repr_mimebundle_()[0] for view in (one, two)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert bundles[0]["text/plain"] == bundles[1]["text/plain"] == one.drawn()["text"]
    assert "application/vnd.jupyter.widget-view+json" in bundles[0]


def test_png_is_small_and_changes_with_the_state(tmp_path: Path) -> None:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 1)
    first = block_map.png()
    block_map.move("step", 2)
    assert first != block_map.png()
    (tmp_path / "map.png").write_bytes(first)
    assert Image.open(tmp_path / "map.png").width > WIDTH_PX
    assert len(first) < 60_000


def test_panel_has_the_twins_of_its_views() -> None:
    block_map = BlockMap.replay(small_trace())
    data, _ = Panel(block_map, block_map)._repr_mimebundle_()
    assert data["text/plain"] == f"{block_map.drawn()['text']}\n\n{block_map.drawn()['text']}"
    assert repr(Panel(block_map)) == f"Panel({block_map!r})"


def test_aria_label_says_what_the_title_says() -> None:
    picture = BlockMap.replay(small_trace()).drawn()
    assert picture["title"] in picture["aria"]


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.glob("*.js")))
def test_scripts_never_parse_markup_nor_load_anything(name: str) -> None:
    assert re.findall(FORBIDDEN_JS, (STATIC / name).read_text()) == []


def test_hostile_request_id_travels_as_text_only() -> None:
    picture = BlockMap.replay(small_trace()).drawn()
    assert any(owner["id"] == HOSTILE for owner in picture["owners"])
    assert "textContent" in script("block_map.js")


@pytest.mark.parametrize(
    ("trace", "word"), [(Trace(), "header needs a whole number"), ("x", "not str"), (None, "None")]
)
def test_what_is_no_trace_gets_one_line_and_leaves_no_widget(
    trace: Trace, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MiniVLLMError, match=word):
        BlockMap.replay(trace)
    gc.collect()
    assert capsys.readouterr().err == ""
