"""A run keeps the collector off what was there before, and only for so long as it runs."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm import LLM, AsyncEngine, SamplingParams
from minivllm.collector import OWN_OF_PYTHON, older_objects_frozen

Build = Callable[[str], tuple[Path, PreTrainedModel]]


class Knot:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_was_there_is_looked_at_again_after_the_last_run() -> None:
    knot = weakref.ref(Knot())
    with older_objects_frozen():
        with older_objects_frozen():
            assert gc.get_freeze_count() > OWN_OF_PYTHON
            made = weakref.ref(Knot())
            gc.collect()
            assert made() is None and knot() is not None
        gc.collect()
        assert knot() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert knot() is None


def test_the_few_objects_that_python_itself_freezes_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 375)  # Python 3.12, when it starts
    knot = weakref.ref(Knot())
    with older_objects_frozen():
        gc.collect()
        assert knot() is not None
    gc.collect()
    assert knot() is None


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with older_objects_frozen():
            assert gc.get_freeze_count() <= count
        assert 0 < gc.get_freeze_count() <= count
    finally:
        gc.unfreeze()


def test_runs_freeze_and_thaw(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm, seen = LLM(str(folder), dtype="float32", num_blocks=20, show_progress=False), list[int]()
    llm.events.listen(lambda _: seen.append(gc.get_freeze_count()))
    llm.generate([[3, 4, 5]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert min(seen[-3:]) > OWN_OF_PYTHON and gc.get_freeze_count() == 0
    seen.clear()
    with AsyncEngine(llm) as engine:
        engine.add([3, 4, 5], SamplingParams(max_tokens=3)).result()
    assert max(seen) > OWN_OF_PYTHON and gc.get_freeze_count() == 0


def test_an_engine_that_nobody_holds_is_gone_without_the_collector(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = LLM(str(folder), dtype="float32", num_blocks=20, show_progress=False)
    llm.generate([[3, 4, 5]], SamplingParams(max_tokens=3), use_tqdm=False)
    data = weakref.ref(llm.storage.data)
    gc.disable()
    try:
        del llm
        assert data() is None
    finally:
        gc.enable()
