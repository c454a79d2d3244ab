"""Benchmarks measure what they say on a model small enough for a test; the README shows the committed figures."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from transformers import PreTrainedModel

from minivllm.bench import engine as bench
from minivllm.bench import policies, reference_workloads
from minivllm.bench.reference_workloads import WORKLOADS, EngineChoice, measure
from minivllm.bench.table import GPU_RESULTS, KERNEL_RESULTS, POLICY_RESULTS, RESULTS, write_into
from minivllm.errors import ConfigError

# Of the lists that vLLM 0.26 and nano-vllm were given.
DIGESTS = {
    "nano": "379e34b4",
    "single": "993a5d42",
    "batch512": "50275e8b",
    "longctx": "9041415d",
    "prefill": "cafa0b30",
    "prefix": "472cd2e9",
}
Build = Callable[[str], tuple[Path, PreTrainedModel]]
README = Path(__file__).parents[1] / "README.md"


def test_readme_shows_the_committed_figures(tmp_path: Path) -> None:
    rewritten = tmp_path / "README.md"
    rewritten.write_text(README.read_text())
    write_into(rewritten)
    assert rewritten.read_text() == README.read_text()


@pytest.mark.parametrize("results", [RESULTS, POLICY_RESULTS, KERNEL_RESULTS, GPU_RESULTS], ids=lambda path: path.stem)
def test_result_file_names_machine_commit_seed_and_command(results: Path) -> None:
    facts = json.loads(results.read_text())["provenance"]
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


def test_policy_costs_are_measured_on_a_tiny_model(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = reference_model("llama-gqa")
    monkeypatch.setattr(policies, "NUM_RUNNING", 8)
    monkeypatch.setattr(policies, "CONTEXTS", (32,))
    monkeypatch.setattr(policies, "VOCAB", range(7, 300))
    args = argparse.Namespace(model=str(folder), dtype="float32", repeats=1, seed=0)
    rows = [row for part in ("schedule", "cache", "preemption") for row in policies.PARTS[part](args)]
    assert [row["unit"] for row in rows] == ["ms", "ms", "ms", "share; step in ms", "ms"]
    assert {"swap out", "swap in", "recompute", "swap / recompute"} <= rows[-1].keys()


def test_unknown_part_of_the_policies_gets_one_line() -> None:
    with pytest.raises(ConfigError, match="--parts: 'nonsense' is not one of schedule, radix, cache, preemption"):
        policies.main(["--parts", "nonsense"])


def test_workloads_are_the_reference_lists() -> None:
    lists = {name: make() for name, make in WORKLOADS.items()}
    digests = {
        name: f"{xxhash.xxh3_64(json.dumps(both).encode()).intdigest():016x}"[:8] for name, both in lists.items()
    }
    assert digests == DIGESTS


def test_workload_rows_tell_first_best_and_floor(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = reference_model("qwen3")
    monkeypatch.setitem(WORKLOADS, "nano", lambda: ([[7, 8, 9], [7, 8]], [3, 5]))
    monkeypatch.setattr(reference_workloads, "MAX_MODEL_LEN", 32)
    choice = EngineChoice(str(folder), "float32", "auto", max_num_seqs=4, max_num_batched_tokens=64)
    [row] = measure(["nano"], choice, repeats=2)
    assert {"first_s", "best_s", "tokens/s", "floor_s", "share of floor", "start_s", "roofs"} <= row.keys()
    with pytest.raises(ConfigError, match="--workload: 'huge' is not one of nano, single"):
        measure(["huge"], choice, 1)
