"""Benchmarks measure what they say on a model small enough for a test; the README shows the committed figures."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm.bench import engine as bench
from minivllm.bench.table import (
    BEGIN,
    END,
    KERNEL_BEGIN,
    KERNEL_END,
    KERNEL_RESULTS,
    RESULTS,
    kernel_table,
    table,
)
from minivllm.errors import ConfigError

Build = Callable[[str], tuple[Path, PreTrainedModel]]
README = Path(__file__).parents[1] / "README.md"


def test_readme_shows_the_committed_figures() -> None:
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table()


@pytest.mark.skipif(not KERNEL_RESULTS.exists(), reason="not measured yet")
def test_readme_shows_the_committed_kernel_figures() -> None:
    text = README.read_text()
    shown = text[text.index(KERNEL_BEGIN) + len(KERNEL_BEGIN) : text.index(KERNEL_END)]
    assert shown == kernel_table()


def test_result_file_names_machine_commit_seed_and_command() -> None:
    facts = json.loads(RESULTS.read_text())["provenance"]
    assert all(str(facts[name]) for name in ("machine", "commit", "seed", "command", "torch", "transformers"))
    assert "dirty" not in facts["commit"]


def test_unknown_part_gets_one_line() -> None:
    with pytest.raises(ConfigError, match="--parts: 'nonsense' is not one of decode, mixed, prefix, overhead"):
        bench.main(["--parts", "nonsense"])


def test_every_part_runs_on_a_tiny_model(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = reference_model("llama-gqa")
    monkeypatch.setattr(bench, "_prompts", lambda num, low, high, seed: [list(range(7, 7 + min(low, 32)))] * num)
    monkeypatch.setattr(bench, "NUM_NEW", 4)
    monkeypatch.setattr(bench, "PREFIX_TOKENS", 32)
    monkeypatch.setattr(bench, "DECODE_BATCHES", (1, 3))
    args = argparse.Namespace(model=str(folder), dtype="float32", repeats=1, seed=0)
    rows = [row for part in ("decode", "prefix") for row in bench.PARTS[part](args)]
    assert [row["unit"] for row in rows] == ["tokens/s", "tokens/s", "ms"]
    # Names, not values: on so small a model a busy machine makes any difference of two times noise, even negative.
    assert all({"ours", "generate", "continuous", "ours / generate"} <= row.keys() for row in rows[:2])
    assert {"cold", "warm", "warm / cold"} <= rows[2].keys()
