"""A round of flash cards in a real browser, by keyboard: nothing complains, and what was typed stays text."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser.conftest import Notebook

pytestmark = pytest.mark.browser
ROOT = ".mv-view-flash-cards"
CELL = """
import tempfile
from pathlib import Path
from minivllm.course.progress import ProgressFile
from minivllm.views.flash_cards import FlashCards
FlashCards("A", 3, store=ProgressFile(Path(tempfile.mkdtemp()) / "progress.json"))
"""


def test_a_round_by_keyboard(open_notebook: Callable[[Path], Notebook], tmp_path: Path) -> None:
    path = tmp_path / "cards.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CELL)], metadata=kernel), path)
    notebook = open_notebook(path)
    notebook.run_all()
    page = notebook.page
    page.locator(f"{ROOT} input[type=text]").focus()
    page.keyboard.type("a thought")
    page.keyboard.press("Enter")  # shows the key points; the first box has the focus
    page.wait_for_selector(f"{ROOT} fieldset input")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    notebook.screenshot("flash-cards-ticking", ROOT)
    page.locator(f"{ROOT} button", has_text="these I named").press("Enter")
    page.wait_for_selector(f"{ROOT} >> text=2 of 4.")
    field = page.locator(f"{ROOT} input[type=text]")
    field.fill("<img src=x onerror=alert(1)>")
    field.press("Enter")
    page.wait_for_selector(f"{ROOT} >> text=Write one number")
    assert field.input_value().startswith("<img")  # no answer: what was typed stays
    field.fill("1")
    field.press("Enter")
    page.wait_for_selector(f"{ROOT} >> text=once more")
    notebook.screenshot("flash-cards-number", ROOT)
    assert page.locator(f"{ROOT} img").count() == 0
    assert (notebook.complaints, notebook.tracebacks()) == ([], [])
