"""The block table: token to slot to bytes, every control, and its link with the block map."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.errors import MiniVLLMError
from minivllm.views.block_map import BlockMap
from minivllm.views.block_table import BlockTable, SlotBytes, Translation, translate
from minivllm.views.widget import script
from tests.view_traces import HOSTILE, read_slot, small_trace, token_texts


def linked(step: int = 2) -> tuple[BlockMap, BlockTable]:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", step)
    return block_map, BlockTable(block_map, token_texts, read_slot)


def test_translate_follows_the_table() -> None:
    assert translate(37, [7, 1, 3], 16) == Translation(37, 2, 5, 3, 53)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=40, unique=True), st.integers(1, 256))
def test_translate_is_one_to_one(block_ids: list[int], block_size: int) -> None:
    positions = range(len(block_ids) * block_size)
    assert len({translate(position, block_ids, block_size).slot for position in positions}) == len(positions)


@pytest.mark.parametrize("position", [-1, 12])
def test_translate_refuses_positions_without_a_block(position: int) -> None:
    with pytest.raises(MiniVLLMError, match="positions 0 to 11"):
        translate(position, [4, 2, 9], 4)


def test_token_control_shows_the_whole_chain_and_marks_the_map() -> None:
    block_map, table = linked()
    table.move("token", 9)
    picture = table.drawn()
    assert [(link.formula, link.value) for link in picture["chain"]] == [
        ("", "9"), ("9 // 4 =", "2"), ("9 % 4 =", "1"), ("block_table[2] =", "3"), ("3 × 4 + 1 =", "13"),
        ("32 bytes from", f"{13 * 96:,}"),
    ]  # fmt: skip
    assert picture["title"] == "Token 9 “␣end⏎” of request a lives in physical block 3, slot 13."
    assert (block_map.drawn()["selected"], block_map.drawn()["selected_offset"]) == (3, 1)


def test_layer_and_head_controls_choose_the_bytes() -> None:
    _, table = linked()
    table.move("token", 9)
    table.move("layer", 1)
    table.move("kv_head", 2)
    picture = table.drawn()
    assert picture["values"] == [("K", ["+113.200"] * 6), ("V", ["-113.200"] * 6)]
    assert picture["chain"][-1].value == f"{13 * 96 + 2 * 32:,}"
    assert picture["address"] == hex(0x10000 + 13 * 96 + 2 * 32)


def test_words_control_says_it_as_an_operating_system_would_and_where_that_breaks() -> None:
    _, table = linked()
    table.move("token", 5)
    assert table.drawn()["notes"] == []
    table.move("words", "operating system")
    picture = table.drawn()
    assert [(link.label, link.value) for link in picture["chain"]][:5] == [
        ("virtual address", "5"), ("virtual page", "1"), ("offset in the page", "1"), ("page frame", "2"),
        ("physical address", "9"),
    ]  # fmt: skip
    assert picture["chain"][3].formula == "page_table[1] ="
    assert [note.split(":")[0] for note in picture["notes"]] == ["holds", "holds", *["breaks"] * 4]
    assert "2 blocks of this table are in another table too" in picture["notes"][1]
    assert "all 3 blocks are in the pool" in picture["notes"][2] and "block_table[1]" in picture["notes"][4]
    assert picture["notes"][2] in picture["text"] and len(table.png()) > 0
    table.move("words", "engine")
    assert table.drawn()["notes"] == [] and table.drawn()["chain"][0].label == "position"
    with pytest.raises(MiniVLLMError):
        table.move("words", "French")


def test_request_control_shows_the_other_table_and_shared_blocks_have_equal_slots() -> None:
    _, table = linked()
    table.move("token", 5)
    slot = table.drawn()["slot"]
    table.move("request", HOSTILE)
    table.move("token", 5)
    assert table.drawn()["slot"] == slot
    assert [(e["physical"], e["ref_count"]) for e in table.drawn()["entries"]] == [(1, 2), (2, 2), (4, 1)]


def test_chosen_request_stays_when_it_finishes() -> None:
    block_map, table = linked()
    table.move("token", 5)
    block_map.move("step", 3)
    assert table.drawn()["title"] == "Step 3: token 5 of request a has no slot; its table has 0 blocks."
    assert (table.drawn()["chain"], table.translation) == ([], None)


def test_block_chosen_on_the_map_shows_its_first_token() -> None:
    block_map, table = linked()
    block_map.move("block", 4)
    assert (table.drawn()["request"], table.drawn()["token"]) == (HOSTILE, 8)
    block_map.move("block", 2)
    assert (table.drawn()["request"], table.drawn()["token"]) == (HOSTILE, 4)


def test_new_step_of_the_map_redraws_the_table() -> None:
    block_map, table = linked()
    block_map.move("step", 5)
    block_map.flush()
    table.flush()
    assert table.picture["entries"][0]["physical"] == 2


def test_page_control_walks_through_a_long_table() -> None:
    _, table = linked()
    table.move("page", 3)
    assert (table.drawn()["page"], table.drawn()["num_pages"]) == (0, 1)  # one page is all there is


def test_token_not_stored_yet_says_so() -> None:
    _, table = linked()
    table.move("token", 10)
    assert table.drawn()["title"].endswith("slot 14, reserved but not stored yet.")


@pytest.mark.parametrize(
    ("control", "value"), [("layer", 2), ("kv_head", 3), ("token", -1), ("token", "1"), ("request", 1), ("x", 1)]
)
def test_control_refuses_what_it_cannot_take(control: str, value: object) -> None:
    _, table = linked()
    with pytest.raises(MiniVLLMError):
        table.move(control, value)


def test_message_from_a_second_thread_moves_the_token_and_the_picture_follows() -> None:
    _, table = linked()
    thread = threading.Thread(target=table._handle_custom_msg, args=({"control": "token", "value": 6}, []))
    thread.start()
    thread.join()
    table.flush()
    assert (table.picture["token"], table.picture["slot"], table.picture["status"]) == (6, 10, "")


def test_failing_reader_is_told_in_the_status_line(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(layer: int, slot: int) -> SlotBytes:
        raise RuntimeError("the engine is closed")

    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 2)
    table = BlockTable(block_map, token_texts, fail)
    table.move("token", 3)
    table.flush()
    assert table.picture["status"] == "RuntimeError: the engine is closed"
    assert table.picture["slot"] == 7
    assert capfd.readouterr() == ("", "")


def test_recording_without_a_reader_shows_addresses_only() -> None:
    block_map = BlockMap.replay(small_trace())
    block_map.move("step", 2)
    picture = BlockTable(block_map, token_texts).drawn()
    assert (len(picture["chain"]), picture["values"], picture["address"]) == (5, [], "")


def test_no_table_at_all_is_a_sentence() -> None:
    _, table = linked(step=0)
    assert table.drawn()["title"] == "Step 0: no request holds a block table."
    assert table.png() == table.png()


def test_twins_repeat_and_hold_neither_address_nor_values() -> None:
    bundles = [linked()[1]._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["text/plain"] == bundles[1]["text/plain"]
    assert bundles[0]["image/png"] == bundles[1]["image/png"]
    assert "0x" not in str(bundles[0]["text/plain"])
    assert "table (logical→physical): 0→1 1→2 2→3" in str(bundles[0]["text/plain"])


def test_hostile_token_is_shown_as_text() -> None:
    _, table = linked()
    table.move("token", 10)
    assert table.drawn()["entries"][2]["tokens"][2].text == HOSTILE.replace(" ", "␣")
    assert "createElement(tag)" in script("block_table.js")
