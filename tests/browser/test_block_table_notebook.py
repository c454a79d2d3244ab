"""The block table notebook in a real JupyterLab: run, click, replay, by mouse and by keyboard, light and dark."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect

from tests.browser.conftest import ROOT, Notebook
from tests.view_traces import HOSTILE

pytestmark = pytest.mark.browser

NOTEBOOK = ROOT / "notebooks" / "05_block_table.ipynb"
MAP, TABLE = ".mv-view-block-map", ".mv-view-block-table"
HAND_MADE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from minivllm.views.block_map import BlockMap
from minivllm.views.block_table import BlockTable
from tests.view_traces import read_slot, small_trace, token_texts
block_map = BlockMap.replay(small_trace())
block_map.move("step", 2)
block_map
"""
OpenNotebook = Callable[[Path], Notebook]


@pytest.fixture
def hand_made(tmp_path: Path, open_notebook: OpenNotebook) -> Notebook:
    """A notebook with both views on a recorded run, already executed."""
    cells = [new_code_cell(HAND_MADE), new_code_cell("BlockTable(block_map, token_texts, read_slot)")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "views.ipynb")
    notebook = open_notebook(tmp_path / "views.ipynb")
    notebook.run_all()
    expect(notebook.page.locator(f"{TABLE} .mv-title")).to_be_visible()
    return notebook


def choose_token(table: Locator, position: int) -> dict[str, int]:
    """Click a token, wait until the chain is about it; what its links say."""
    table.locator(f'[data-token="{position}"]').click()
    expect(table.locator('[data-link="position"] .mv-link-value')).to_have_text(str(position))
    links = table.locator(".mv-link").all()
    values = [link.locator(".mv-link-value").text_content() or "" for link in links]
    names = [link.get_attribute("data-link") or "" for link in links]
    return {name: int(value.replace(",", ""), 0) for name, value in zip(names, values, strict=True)}


def assert_no_complaint(notebook: Notebook) -> None:
    assert notebook.tracebacks() == []
    assert notebook.complaints == []
    assert [words for words in notebook.page.locator(".mv-status").all_text_contents() if words] == []


def test_clicked_token_shows_its_slot_and_the_map_marks_it(hand_made: Notebook) -> None:
    assert choose_token(hand_made.page.locator(TABLE), 9) == {
        "position": 9, "logical block": 2, "offset": 1, "physical block": 3, "slot": 13,
        "bytes in layer 0's K, KV head 0": 1248, "address in memory": 0x10000 + 1248,
    }  # fmt: skip
    expect(hand_made.page.locator(f"{MAP} .mv-detail")).to_contain_text("Block 3, offset 1")
    expect(hand_made.page.locator(f'{MAP} [data-block="3"] .mv-selected-slot')).to_have_count(1)
    assert_no_complaint(hand_made)


def test_every_control_works_by_keyboard(hand_made: Notebook) -> None:
    page = hand_made.page
    page.locator(f"{MAP} .mv-slider").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(f"{MAP} .mv-title")).to_contain_text("Step 3:")
    page.locator(f"{MAP} .mv-frame").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(f"{MAP} .mv-detail")).to_contain_text("Block 0 is the null block")
    page.locator(f'{TABLE} [data-token="4"]').focus()
    page.keyboard.press("Enter")
    expect(page.locator(f"{TABLE} .mv-title")).to_contain_text("slot 8")
    page.keyboard.press("ArrowRight")
    expect(page.locator(f"{TABLE} .mv-title")).to_contain_text("slot 9")
    page.get_by_label("layer").select_option("1")
    page.get_by_label("KV head").select_option("2")
    expect(page.locator(f"{TABLE} .mv-numbers")).to_contain_text("+109.200")
    assert_no_complaint(hand_made)


def test_replay_plays_to_its_end_and_an_owner_stands_out(hand_made: Notebook) -> None:
    page = hand_made.page
    page.get_by_label("previous step").click()
    expect(page.locator(f"{MAP} .mv-title")).to_contain_text("Step 1:")
    page.get_by_label("play", exact=True).click()
    expect(page.locator(f"{MAP} .mv-value")).to_have_text("step 5 of 5", timeout=20_000)
    page.get_by_label("previous step").click()
    expect(page.locator(f'{MAP} [data-kind="cached"]')).to_have_count(2)
    page.get_by_label("previous step").click()
    page.locator(f'{MAP} [data-owner="{HOSTILE}"]').click()
    expect(page.locator(f"{MAP} .mv-dimmed")).to_have_count(9)
    assert_no_complaint(hand_made)


def test_hostile_text_never_becomes_markup(hand_made: Notebook) -> None:
    page = hand_made.page
    page.get_by_label("request", exact=True).select_option(HOSTILE)
    expect(page.locator(f"{TABLE} .mv-title")).to_contain_text("onerror")
    page.locator(f'{TABLE} [data-token="10"]').click()
    expect(page.locator(f"{TABLE} .mv-title")).to_contain_text("Token 10")
    assert page.locator(f"{MAP} img, {TABLE} img").count() == 0
    assert page.evaluate("window.hacked") is None
    for theme in ("Light", "Dark"):
        hand_made.set_theme(f"JupyterLab {theme}")
        hand_made.screenshot(f"block_map_{theme.lower()}", MAP)
        hand_made.screenshot(f"block_table_{theme.lower()}", TABLE)


def test_block_table_notebook_runs_and_answers(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(NOTEBOOK)
    notebook.run_all()
    assert_replay_moves(notebook)
    assert_buttons_drive_the_engine(notebook)
    assert_slider_starts_over(notebook)
    assert_patterns_are_each_maps_own(notebook)
    assert_no_complaint(notebook)
    assert notebook.page.evaluate("window.hacked") is None
    for theme in ("Light", "Dark"):
        notebook.set_theme(f"JupyterLab {theme}")
        notebook.page.locator(".mv-view-engine-buttons").scroll_into_view_if_needed()
        notebook.screenshot(f"notebook_05_{theme.lower()}")


def assert_replay_moves(notebook: Notebook) -> None:
    replay = notebook.page.locator(f"{MAP}:has([aria-label=replay]:not([hidden]))").first
    replay.scroll_into_view_if_needed()
    before = replay.locator(".mv-title").text_content() or ""
    replay.get_by_label("previous step").click()
    expect(replay.locator(".mv-title")).not_to_have_text(before)
    replay.locator(".mv-slider").focus()
    notebook.page.keyboard.press("End")
    expect(replay.locator(".mv-title")).to_have_text(before)


def assert_patterns_are_each_maps_own(notebook: Notebook) -> None:
    """Ids belong to the page: two maps with equal ones would draw their hatching from a hidden map, so not at all."""
    ids = notebook.page.locator("pattern").evaluate_all("patterns => patterns.map(pattern => pattern.id)")
    assert len(ids) == len(set(ids)) > 2


def assert_buttons_drive_the_engine(notebook: Notebook) -> None:
    """Add a hostile prompt, step, and follow one of its tokens on the live map and in the live tensors."""
    page = notebook.page
    live, table = in_panel(notebook, MAP), in_panel(notebook, TABLE)
    before = live.locator(".mv-title").text_content() or ""
    page.locator(".mv-view-engine-buttons .mv-field").fill(f"One block, {HOSTILE}")
    page.get_by_role("button", name="add", exact=True).click()
    said = page.locator(".mv-view-engine-buttons .mv-detail")
    expect(said).to_contain_text("waits with")
    request_id = (said.text_content() or "").split()[1]
    page.get_by_role("button", name="one step", exact=True).click()
    expect(live.locator(".mv-title")).not_to_have_text(before)
    table.get_by_label("request", exact=True).select_option(request_id)
    first, later = choose_token(table, 0), choose_token(table, 9)
    for found in (first, later):
        assert found["slot"] == found["physical block"] * 8 + found["offset"]
        assert found["logical block"] * 8 + found["offset"] == found["position"]
    assert (later["logical block"], later["offset"]) == (1, 1)
    expect(live.locator(".mv-detail")).to_contain_text(f"Block {later['physical block']}, offset 1")
    assert page.locator(".mv-view img").count() == 0


def in_panel(notebook: Notebook, view: str) -> Locator:
    """The view that stands under the buttons."""
    panels = notebook.page.locator(".widget-vbox").filter(has=notebook.page.locator(".mv-view-engine-buttons"))
    return panels.last.locator(view)


def assert_slider_starts_over(notebook: Notebook) -> None:
    """Another block size: a new pool on the same map, and the buttons drive it."""
    page = notebook.page
    live = in_panel(notebook, MAP)
    title = live.locator(".mv-title")
    page.get_by_label("block size", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".mv-view-engine-buttons")).to_contain_text("11 blocks of 16", timeout=30_000)
    expect(title).to_contain_text("0 of 11 blocks live")
    expect(live.locator("[data-block]")).to_have_count(12)
    page.get_by_role("button", name="add", exact=True).click()
    page.get_by_role("button", name="one step", exact=True).click()
    expect(title).not_to_contain_text("0 of 11 blocks live")
    page.get_by_role("button", name="finish the oldest", exact=True).click()
    expect(title).to_contain_text("0 of 11 blocks live")
