"""The dashboard of a live engine in a real JupyterLab: every button, sliders while it runs, ten pictures a second."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator

from tests.browser.conftest import ROOT, Notebook

pytestmark = pytest.mark.browser

WAIT_MS = 30_000
CELL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from minivllm import LLM
from minivllm.course.engine_frames import Load
from minivllm.lab.engine_room import EngineRoom
from minivllm.views.dashboard import Dashboard

llm = LLM("smollm2-135m", load_format="dummy", num_blocks=128, max_model_len=256, show_progress=False)
room = EngineRoom(llm, Load(rate=4, prompt_tokens=16, output_tokens=16))
dashboard = Dashboard.follow(room)
dashboard
"""
COUNT = """(view) => {
    window.pictures = 0;
    const observer = new MutationObserver(() => { window.pictures += 1; });
    observer.observe(view.querySelector("details .mv-text"), { childList: true });
}"""


def test_a_live_engine_is_driven_from_the_page(tmp_path: Path, open_notebook: Callable[[Path], Notebook]) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CELL)], metadata=kernel), tmp_path / "dashboard.ipynb")
    notebook = open_notebook(tmp_path / "dashboard.ipynb")
    notebook.run_all()
    view = notebook.page.locator(".mv-view-dashboard")
    says(view, "Live: nothing has run yet")
    press(view, "one step")
    says(view, "step 1:")
    press(view, "start")
    says(view, "Live, smollm2-135m, second")
    view.element_handle().evaluate(COUNT)
    notebook.page.wait_for_timeout(3000)
    assert 9 <= notebook.page.evaluate("window.pictures") <= 33  # at most ten a second, and nearly so on a busy machine
    slide(view, "rate", "ArrowRight", "In force: 8 arrivals a second")
    slide(view, "batch_limit", "Home", "and 1 request a step at most")
    slide(view, "prompt_tokens", "Home", "prompts of 0 + 2..6 tokens")
    slide(view, "output_tokens", "End", "outputs of 32..96;")
    slide(view, "shared_tokens", "End", "prompts of 64 + 2..6")
    slide(view, "token_budget", "Home", "16 tokens and")
    says(view, "all seats are taken")
    assert notebook.execute("print(room.is_playing, room.load == room.wished)") == "True True\n"
    notebook.screenshot("dashboard_live", view)
    press(view, "pause")
    expect(view, "button[aria-label=pause][aria-pressed=true]")
    notebook.execute("room.wait()")
    assert notebook.execute("print(room.is_playing, room._thread)") == "False None\n"
    view.locator("select").select_option("10")
    says(view, "each plot spans 10 s")
    press(view, "save")
    says(view, "frames were saved to engine_room.json")
    press(view, "reset")
    says(view, "Live: nothing has run yet")
    notebook.execute("pool = llm.engine.kv.pool\nassert pool.num_free == pool.num_usable and not llm.engine.has_work")
    notebook.assert_no_complaint()


def says(view: Locator, words: str) -> None:
    view.get_by_text(words).first.wait_for(state="attached", timeout=WAIT_MS)


def expect(view: Locator, selector: str) -> None:
    view.locator(selector).wait_for(timeout=WAIT_MS)


def press(view: Locator, name: str) -> None:
    view.get_by_role("button", name=name, exact=True).click()


def slide(view: Locator, control: str, key: str, words: str) -> None:
    """Move a slider by key and wait until the engine has it."""
    view.locator(f"input[data-control={control}]").press(key)
    says(view, words)
