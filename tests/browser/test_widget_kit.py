"""The views of the kit in a real JupyterLab: drawn, moved, played, themed."""

import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Locator, expect

from tests.browser.conftest import ROOT, Notebook
from tests.view_traces import HOSTILE

pytestmark = pytest.mark.browser

SETUP = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import asdict, replace
from minivllm.course.calculators import accelerator
from minivllm.events import StepRan
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.ledger import Ledger
from minivllm.lab.step_floor import ModelWork
from minivllm.trace import Trace
from minivllm.views.block_map import BlockMap
from minivllm.views.kv_calculator import KVCalculator
from minivllm.views.prefix_tree import PrefixTree
from minivllm.views.roofline import Roofline
from minivllm.views.step_cost import Machine, StepCost
from minivllm.views.step_ledger import StepLedger
from minivllm.views.step_regimes import StepRegimes
from minivllm.views.step_timeline import StepTimeline

def run(**options):
    engine, _ = fake_engine(num_blocks=26, max_num_batched_tokens=24, max_num_seqs=4, **options)
    trace = Trace(asdict(engine.config))
    engine.events.listen(trace)
    for i in range(8):
        name = {HOSTILE!r} if i == 1 else f"r{{i}}"
        engine.add(fake_request(name, [7] * 8 + [i % 3] * 4 + [i] * 3, max_tokens=4 + 3 * (i % 4)))
    while engine.has_work:
        engine.step()
    return trace

texts = lambda request_id: [{HOSTILE!r}] * 40
static, continuous = run(batching="static"), run()
swapping = run(preemption_mode="swap", num_host_blocks=16)

def costed(trace, run_ms=7.0):
    ledger, events = Ledger(ModelWork("llama-3-8b", "bfloat16"), accelerator("h100"), [2**16]), []
    for event in trace:
        event = replace(event, run_ms=run_ms) if isinstance(event, StepRan) else event
        events += [each for each in (event, ledger.apply(event)) if each]
    return Trace({{**trace.header, "live": "recorded"}}, events)
"""
CELLS = (
    SETUP, "Roofline()", "KVCalculator()", "StepRegimes()",
    'StepCost.replay(continuous, Machine("llama-3-8b", "h100"))',
    "StepLedger.replay(costed(continuous))", 'StepTimeline.replay(static, continuous, names=("static", "continuous"))',
    "PrefixTree.replay(continuous, texts)", "BlockMap.replay(swapping)",
)  # fmt: skip
VIEWS = ("roofline", "kv-calculator", "step-regimes", "step-cost", "step-ledger", "step-timeline", "prefix-tree")
PLAYING = """
import time
moving = Roofline()
display(moving)
"""
MOVED = "for i in range(60):\n    moving.move('batch', [1, 64][i % 2]); time.sleep(0.1)"


@pytest.fixture
def kit(tmp_path: Path, open_notebook: Callable[[Path], Notebook]) -> Notebook:
    """A notebook with every view of the kit, already executed."""
    cells = [new_code_cell(source) for source in (*CELLS, PLAYING, MOVED)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "kit.ipynb")
    notebook = open_notebook(tmp_path / "kit.ipynb")
    notebook.run_all()
    return notebook


def view(notebook: Notebook, name: str) -> Locator:
    root = notebook.page.locator(f".mv-view-{name}").first
    root.scroll_into_view_if_needed()
    return root


def press(notebook: Notebook, control: Locator, key: str) -> None:
    control.focus()
    notebook.page.keyboard.press(key)


def test_every_view_of_the_kit_draws_and_answers(kit: Notebook) -> None:
    assert kit.tracebacks() == []
    for name in VIEWS:
        expect(view(kit, name).locator("svg.mv-sketch")).to_have_attribute("aria-label", re.compile(r"\w+ .*\."))
    assert_calculators_answer(kit)
    assert_traces_answer(kit)
    assert_the_hostile_stay_text(kit)
    for theme in ("Light", "Dark"):
        kit.set_theme(f"JupyterLab {theme}")
        for name in VIEWS:
            view(kit, name)
            kit.screenshot(f"{name}_{theme.lower()}", f".mv-view-{name}")
    assert kit.complaints == []
    assert [words for words in kit.page.locator(".mv-status").all_text_contents() if words] == []


def assert_calculators_answer(kit: Notebook) -> None:
    """A slider by keyboard and a list by choice; the title has the new number."""
    roofline = view(kit, "roofline")
    press(kit, roofline.locator('[data-control="batch"]'), "ArrowRight")
    expect(roofline.locator(".mv-title")).to_contain_text("at batch 48 waits for bytes")
    roofline.get_by_label("chip", exact=True).select_option("tpu-v5e")
    expect(roofline.locator(".mv-title")).to_contain_text("the ridge is at 240")
    calculator = view(kit, "kv-calculator")
    calculator.get_by_label("units", exact=True).select_option("binary")
    expect(calculator.locator(".mv-title")).to_contain_text("128 KiB")
    press(kit, calculator.locator('[data-control="kv_heads"]'), "ArrowRight")
    expect(calculator.locator(".mv-title")).to_contain_text("with GQA takes 256 KiB")
    calculator.locator('g.mv-cell:has(title:text-matches("^MQA"))').click()
    expect(calculator.locator(".mv-title")).to_contain_text("with MQA takes 16 KiB")
    regimes = view(kit, "step-regimes")
    press(kit, regimes.locator('[data-control="host_ms"]'), "End")
    expect(regimes.locator(".mv-title")).to_contain_text("waits for the host")


def assert_traces_answer(kit: Notebook) -> None:
    """Scrub, play to the end, turn rows into seats."""
    timeline = view(kit, "step-timeline")
    press(kit, timeline.get_by_label("step of the recorded run"), "Home")
    expect(timeline.locator(".mv-title")).to_contain_text("Step 1:")
    timeline.get_by_label("rows", exact=True).select_option("seats")
    expect(timeline.locator("svg.mv-sketch")).to_contain_text("seat 3")
    timeline.get_by_label("play", exact=True).click()
    expect(timeline.locator(".mv-title")).to_contain_text("Step 4:", timeout=20_000)
    timeline.get_by_label("pause", exact=True).click()
    tree = view(kit, "prefix-tree")
    press(kit, tree.get_by_label("step of the recorded run"), "Home")
    expect(tree.locator(".mv-title")).to_contain_text("Step 0: 0 blocks cached")
    press(kit, tree.get_by_label("step of the recorded run"), "End")
    expect(tree.locator(".mv-title")).not_to_contain_text("Step 0")
    cost = view(kit, "step-cost")
    before = cost.locator(".mv-title").text_content() or ""
    cost.get_by_label("previous step").click()
    expect(cost.locator(".mv-title")).not_to_have_text(before)
    ledger = view(kit, "step-ledger")
    ledger.get_by_label("kind", exact=True).select_option("decode")
    expect(ledger.locator(".mv-title")).to_contain_text("decode steps the floor is")
    ledger.get_by_label("unit", exact=True).select_option("GB")
    expect(ledger.locator(".mv-title")).to_contain_text("decode steps had to move")
    press(kit, ledger.get_by_label("step of the recorded run"), "Home")
    expect(ledger.locator(".mv-title")).to_contain_text("there is no decode step")
    press(kit, ledger.get_by_label("step of the recorded run"), "End")
    ledger.get_by_label("unit", exact=True).select_option("ms")
    expect(ledger.locator(".mv-title")).to_contain_text("decode steps the floor is")
    assert kit.page.locator("[data-host]").count() == 16  # host memory below the block map


def assert_the_hostile_stay_text(kit: Notebook) -> None:
    assert kit.page.locator(".mv-view img").count() == 0
    assert kit.page.evaluate("window.hacked") is None
