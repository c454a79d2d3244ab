"""A minute of live pictures, ten a second, in a real JupyterLab: drawn, answering, and no memory that grows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import CDPSession

from tests.browser.conftest import ROOT, Lab, Notebook

pytestmark = pytest.mark.browser

SECONDS, WARM_SECONDS, PER_SECOND = 60, 15, 10
HEAP_BYTES, KERNEL_BYTES = 4_000_000, 10_000_000  # growth that is none: caches that fill, dictionaries that double
VIEWS = ("block-map", "step-timeline")
VIEW_CELL = f"""
import sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import asdict
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.views.block_map import BlockMap
from minivllm.views.step_timeline import StepTimeline

engine, _ = fake_engine(num_blocks=49, max_num_batched_tokens=24, max_num_seqs=8)
views = [view.follow(engine.events, asdict(engine.config)) for view in (BlockMap, StepTimeline)]
pictures = [0, 0]  # sent to the page, by view

def count(i):
    pictures[i] += 1

for i, view in enumerate(views):
    view.follow_with(lambda i=i: count(i))
    display(view)
"""
ENGINE_CELL = f"""
def serve():
    begin = time.monotonic()
    for step in range({SECONDS * PER_SECOND}):
        while len(engine.requests) < 6:
            engine.add(fake_request(f"r{{step}}.{{len(engine.requests)}}", range(8), max_tokens=5 + step % 11))
        engine.step()
        time.sleep(max(0, begin + (step + 1) / {PER_SECOND} - time.monotonic()))

serving = threading.Thread(target=serve, daemon=True)
serving.start()
"""
COUNT_DRAWN = """(names) => {
    window.drawn = names.map(() => 0);
    names.forEach((name, i) => {
        const observer = new MutationObserver(() => { window.drawn[i] += 1; });
        observer.observe(document.querySelector(`.mv-view-${name} .mv-title`), { childList: true });
    });
}"""


@dataclass(frozen=True)
class Memory:
    """Bytes, after what was garbage in the page is gone."""

    heap: int
    kernel: int


def test_a_minute_of_pictures_is_drawn_and_leaves_nothing(
    tmp_path: Path, open_notebook: Callable[[Path], Notebook], lab: Lab
) -> None:
    notebook = opened(tmp_path, open_notebook)
    devtools = notebook.page.context.new_cdp_session(notebook.page)
    notebook.page.evaluate(COUNT_DRAWN, list(VIEWS))
    notebook.execute(ENGINE_CELL)
    notebook.page.wait_for_timeout(WARM_SECONDS * 1000)
    before = memory(devtools, lab)
    for _ in range(3):
        notebook.page.wait_for_timeout((SECONDS - WARM_SECONDS) * 1000 / 4)
        assert notebook.execute("print(serving.is_alive())") == "True\n"  # a cell answers while pictures are drawn
    notebook.execute("serving.join()\nfor view in views: view.flush()")
    notebook.page.wait_for_timeout(500)  # the last picture is on its way to the page
    after = memory(devtools, lab)
    sent = [int(number) for number in notebook.execute("print(*pictures)").split()]
    drawn = notebook.page.evaluate("window.drawn")
    print(f"pictures sent {sent}, drawn {drawn}; {before} -> {after}")
    for num_sent, num_drawn in zip(sent, drawn, strict=True):
        assert SECONDS * PER_SECOND / 2 <= num_sent <= SECONDS * PER_SECOND + 1  # no more often than it may
        assert num_drawn >= 0.6 * num_sent  # all but a few, and 85 % of them with four busy processes on two cores
    for name in VIEWS:
        title = notebook.page.locator(f".mv-view-{name} .mv-title").text_content() or ""
        assert title.startswith(f"Step {SECONDS * PER_SECOND}:")
    assert after.heap - before.heap < HEAP_BYTES
    assert after.kernel - before.kernel < KERNEL_BYTES
    notebook.assert_no_complaint()


def opened(folder: Path, open_notebook: Callable[[Path], Notebook]) -> Notebook:
    """A notebook with two live views of an engine that stands still."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(VIEW_CELL)], metadata=kernel), folder / "smooth.ipynb")
    notebook = open_notebook(folder / "smooth.ipynb")
    notebook.run_all()
    for name in VIEWS:
        notebook.page.wait_for_selector(f".mv-view-{name} .mv-title")
    return notebook


def memory(devtools: CDPSession, lab: Lab) -> Memory:
    devtools.send("HeapProfiler.collectGarbage")
    return Memory(int(devtools.send("Runtime.getHeapUsage")["usedSize"]), lab.kernel_bytes())
