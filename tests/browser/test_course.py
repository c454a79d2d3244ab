"""Every notebook of the course in a real JupyterLab: it runs, nothing complains, and each of its views answers."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from playwright.sync_api import ElementHandle, Locator
from playwright.sync_api import TimeoutError as PlaywrightTimeout

from tests.browser.conftest import ROOT, Lab, Notebook

pytestmark = pytest.mark.browser

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SESSION_BYTES = 2_000_000_000  # what Binder gives a session
ANSWER_MS, TRIES = 10_000, 4
# Each picture of the kernel's writes the text twin anew, with other words or the same; no control touches it.
COUNT_PICTURES = """(root) => {
    root.pictures = 0;
    const observer = new MutationObserver(() => { root.pictures += 1; });
    observer.observe(root.querySelector("details .mv-text"), { childList: true });
}"""
IS_REDRAWN = "([root, before]) => root.pictures > before"
TWIN = "(root) => root.querySelector('details .mv-text').textContent"
AREA = "(root) => root.querySelector('svg') ? root.clientWidth * root.clientHeight : 0"
Act = Callable[[], object]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_each_view_answers(path: Path, open_notebook: Callable[[Path], Notebook], lab: Lab) -> None:
    notebook = open_notebook(path)
    notebook.run_all()
    notebook.assert_no_complaint()
    assert notebook.page.get_by_text("Error displaying widget").count() == 0
    views = notebook.page.locator(".mv-view").all()
    assert views, "no view was drawn"
    keep_hero(notebook, views, path.stem[:2])
    answered = [answers(view) for view in views]
    silent = [name_of(view) for view, answer in zip(views, answered, strict=True) if answer == "silent"]
    assert silent == []
    assert "changed" in answered
    notebook.assert_no_complaint()
    if sys.platform == "linux":
        peak = lab.peak_bytes()
        print(f"{path.stem}: {Counter(answered)}; server and kernel {peak / 1e6:.0f} MB")
        assert peak <= SESSION_BYTES


def answers(view: Locator) -> str:
    """Move one control after the other until the kernel sends a picture: "changed", "redrawn", "silent" or "still"."""
    view.scroll_into_view_if_needed()
    root = view.element_handle()
    root.evaluate(COUNT_PICTURES)
    found = "still"  # nothing to move
    for act in islice(moves(view), TRIES):
        num_pictures, twin = root.evaluate("(root) => root.pictures"), root.evaluate(TWIN)
        act()
        if not is_redrawn(view, root, num_pictures):
            found = "silent" if found == "still" else found
        elif root.evaluate(TWIN) != twin:
            return "changed"
        else:
            found = "redrawn"
    return found


def is_redrawn(view: Locator, root: ElementHandle, num_pictures: int) -> bool:
    try:
        view.page.wait_for_function(IS_REDRAWN, arg=[root, num_pictures], timeout=ANSWER_MS)
    except PlaywrightTimeout:
        return False
    return True


def moves(view: Locator) -> Iterator[Act]:
    """Ways to move a view, the best first: a slider by key, a list by choice, a picture by key, a button by click."""
    is_engine = "mv-view-engine-buttons" in (view.get_attribute("class") or "")  # its slider builds a new engine
    for slider in [] if is_engine else view.locator("input[type=range]:visible").all():
        value, least, most = (slider.evaluate(f"(node) => Number(node.{name})") for name in ("value", "min", "max"))
        if least < most:
            yield partial(slider.press, "Home" if value == most else "ArrowRight")
    for select in view.locator("select:visible").all():
        chosen, count = select.evaluate("(node) => [node.selectedIndex, node.options.length]")
        if count > 1:
            yield partial(select.select_option, index=(chosen + 1) % count)
    for frame in view.locator(".mv-frame[tabindex]:visible").all():
        yield partial(frame.press, "ArrowRight")
    for button in view.locator("button:visible:enabled").all():
        yield button.click


def keep_hero(notebook: Notebook, views: list[Locator], number: str) -> None:
    """The largest picture of the notebook, in both themes, into test-artifacts/."""
    hero = max(views, key=lambda view: float(view.evaluate(AREA)))
    for theme in ("Dark", "Light"):
        notebook.set_theme(f"JupyterLab {theme}")
        hero.scroll_into_view_if_needed()
        notebook.screenshot(f"hero_{number}_{theme.lower()}", hero)


def name_of(view: Locator) -> str:
    return f"{view.get_attribute('class')}: {view.locator('.mv-title').all_text_contents()}"
