"""`minivllm bench speculation` measures what it says: planted drafts on the fused way, edits on a CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minivllm.bench import planted_speed, speculation
from minivllm.bench.planted import expected_tokens
from minivllm.bench.planted_speed import Load, Timed, measure_planted
from minivllm.errors import ConfigError
from minivllm.runner.draft_rows import shortened
from minivllm.runner.step_buffers import StepLimits
from minivllm.speculative.proposer import Draft
from tests.test_fused import folders, fused, interpreted

folders, fused, interpreted = folders, fused, interpreted  # the fixtures, by their names


@pytest.mark.parametrize("family", ["llama", "window"], ids=["two matrices", "one matrix for both ends"])
def test_planted_rows_count_what_was_planted_and_compare_with_the_formula(
    family: str, folders: Callable[[str], Path], fused: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_seen = []

    def a_row_costs_a_microsecond(run: Any, repeats: int) -> float:
        run()
        rows_seen.append(run.args[-1])
        return rows_seen[-1]

    monkeypatch.setattr(planted_speed, "timed_us", a_row_costs_a_microsecond)
    load = Load(
        str(folders(family)), (1, 3), (0.0, 1.0), num_drafts=3, context=20, num_new=12, repeats=1, dtype="float32"
    )
    told = list[str]()
    rows = measure_planted(load, told.append)
    assert [(row["batch"], row["planted_alpha"]) for row in rows] == [(1, 0.0), (1, 1.0), (3, 0.0), (3, 1.0)]
    assert rows_seen == [1, 4, 3, 12] and len(told) == 4
    assert [row["mean_accepted_length"] for row in rows] == [1, 4, 1, 4]
    assert [row["formula_speedup"] for row in rows] == [0.25, 1, 0.25, 1]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["tokens_per_s_on"] / row["tokens_per_s_off"], rel=0.01)
    assert expected_tokens(0.5, 1) == 1.5


@pytest.mark.parametrize(("batch", "num_drafts"), [(64, 4), (102, 4), (103, 3), (128, 3), (192, 1), (256, 1), (512, 0)])
def test_the_formula_counts_the_drafts_that_fit_into_the_largest_graph(batch: int, num_drafts: int) -> None:
    load, timed = Load("m", (batch,), num_drafts=4), Timed(1.0, 1.0)
    found = planted_speed.row(load, batch, 1.0, timed, timed, (1.0, 2.0))
    assert (found["draft_length"], found["formula_speedup"]) == (4, (1 + num_drafts) / 2)
    limits = StepLimits(batch, 2048, 1024, planted_speed.BLOCK_SIZE, load.num_drafts)
    drafts = {str(i): Draft([1] * load.num_drafts) for i in range(batch)}
    kept = shortened(drafts, limits.max_rows - batch)  # as the engine cuts them
    assert {len(draft.token_ids) for draft in kept.values()} == ({num_drafts} if num_drafts else set())


def test_edits_are_measured_by_each_method_against_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speculation, "PROMPTS", {"copy": ("edit", "Repeat: red green blue red green blue red green")})
    path = tmp_path / "rows.json"
    methods = ["--methods", "ngram:2,ngram,draft_model:3", "--batches", "1,2"]
    assert speculation.main([*methods, "--max-tokens", "6", "--repeats", "1", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    assert [(row["batch"], row["method"], row["draft_length"]) for row in found["rows"]] == [
        (batch, *draft) for batch in (1, 2) for draft in (("ngram", 2), ("ngram", 8), ("draft_model", 3))
    ]
    assert all(row["planted_alpha"] is None and 1 <= row["tokens_per_step"] <= 5 for row in found["rows"])
    alone, both = found["rows"][:3], found["rows"][3:]
    for one, two in zip(alone, both, strict=True):
        assert (two["num_tokens"], two["tokens_per_step"]) == (2 * one["num_tokens"], one["tokens_per_step"])
    assert "batch 2, ngram:8, edit: " in capsys.readouterr().out
    assert found["provenance"]["seed"] == 0


def test_the_summary_counts_steps_of_all_answers_and_speaks_up_for_a_length_that_is_none() -> None:
    row = {"batch": 1, "method": "eagle", "draft_length": 4, "kind": "edit"}
    rows = [
        row | {"num_tokens": 13, "tokens_per_step": 4.0, "speedup": 4.0},
        row | {"num_tokens": 4, "tokens_per_step": 1.0, "speedup": 1.0},
        row | {"batch": 3, "num_tokens": 12, "tokens_per_step": 1.5, "speedup": 1.0},
    ]
    assert speculation.means(rows) == [
        "batch 1, eagle:4, edit: 2.50 tokens a step, 2.00x",
        "batch 3, eagle:4, edit: 1.50 tokens a step, 1.00x",
    ]
    with pytest.raises(ConfigError, match="--methods: 'eagle:x' has no draft length"):
        speculation.method_and_length("eagle:x", 8)
    with pytest.raises(ConfigError, match="--batches: '1,0' is no list of sizes"):
        speculation.batches_of("1,0", (1,))


def test_the_readme_shows_the_recorded_figures() -> None:
    root = Path(__file__).parents[1]
    rows = json.loads((root / "minivllm/bench/results/speculation_cpu.json").read_text())["rows"]
    table = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| ")]
    for kind, name in (("edit", "copy and edit"), ("summarise", "summarise")):
        found = [
            line.split(": ")[1].split(" tokens a step, ") for line in speculation.means(rows) if f" {kind}:" in line
        ]
        [tokens, speed] = [line for line in table if line.startswith(f"| {name}: ")]
        assert tokens.endswith(" | ".join(["", *(figures[0] for figures in found)]) + " |")
        assert speed.endswith(" | ".join(["", *(figures[1] for figures in found)]) + " |")


def test_planted_needs_a_gpu_and_a_folder() -> None:
    with pytest.raises(ConfigError, match="--planted needs a CUDA device"):
        speculation.main(["--planted"])
    with pytest.raises(ConfigError, match="--repeats must be at least 1, not 0"):
        speculation.main(["--repeats", "0"])
    with pytest.raises(ConfigError, match="--max-tokens must be at least 2, not 1"):
        speculation.main(["--max-tokens", "1"])  # there is no time behind the first
    with pytest.raises(ConfigError, match=r"--output: .* is no folder"):
        speculation.main(["--output", "/nowhere/x.json"])
