"""Benchmarks measure what they say on a model small enough for a test; the README shows the committed figures."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import xxhash
from transformers import AutoTokenizer, PreTrainedModel

from minivllm.bench import engine as bench
from minivllm.bench import policies, reference_workloads
from minivllm.bench.engine import Draw
from minivllm.bench.reference_workloads import WORKLOADS, EngineChoice, Ledgers, measure, text
from minivllm.bench.table import GPU_OTHERS, GPU_RESULTS, GPU_TEXT, KERNEL_RESULTS, POLICY_RESULTS, RESULTS, write_into
from minivllm.course.calculators import Accelerator
from minivllm.default_model import fetch_default_model
from minivllm.errors import ConfigError
from minivllm.events import StepRan
from minivllm.lab.ledger_table import Steps, ledger_facts, ledger_lines
from minivllm.llm import LLM

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
ROOFS = Accelerator("made up", 2**34, 1e12, {"float32": 1e13}, "this test")
README = Path(__file__).parents[1] / "README.md"
WATCHING = GPU_RESULTS.with_name("watching_h200.json")


def test_readme_shows_the_committed_figures(tmp_path: Path) -> None:
    rewritten = tmp_path / "README.md"
    rewritten.write_text(README.read_text())
    write_into(rewritten)
    assert rewritten.read_text() == README.read_text()


@pytest.mark.parametrize(
    "results",
    [RESULTS, POLICY_RESULTS, KERNEL_RESULTS, GPU_RESULTS, *GPU_OTHERS, GPU_TEXT, WATCHING],
    ids=lambda path: path.stem,
)
def test_result_file_names_machine_commit_seed_and_command(results: Path) -> None:
    facts = json.loads(results.read_text())["provenance"]
    assert all(str(facts[name]) for name in ("machine", "commit", "seed", "command", "torch", "transformers"))
    assert "dirty" not in facts["commit"]


def test_readme_says_what_watching_cost() -> None:
    runs = json.loads(WATCHING.read_text())["runs"]
    assert [run["with the ledger"] for run in runs] == [False, True]
    for run in runs:
        slower = 100 * (min(run["watched, s"]) / min(run["alone, s"]) - 1)
        assert run["slower by, %"] == pytest.approx(slower, abs=0.02)  # seconds were rounded
        assert f"{slower:+.1f} %" in README.read_text()


def test_unknown_part_gets_one_line() -> None:
    with pytest.raises(ConfigError, match="--parts: 'nonsense' is not one of decode, mixed, prefix, overhead"):
        bench.main(["--parts", "nonsense"])


def test_no_workload_is_not_all_parts() -> None:
    with pytest.raises(ConfigError, match="--workload: '' is not one of nano, single"):
        bench.main(["--workload", ""])


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


def test_text_is_what_the_tokenizer_reads_in_help_topics() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch_default_model(show_progress=False))
    prompts, num_out = text(512, tokenizer)
    assert {len(prompt) for prompt in prompts} == {128} and num_out == [128] * 512
    assert any(tokenizer.decode(prompts[0])[:40] in topic for topic in topics.values())
    with pytest.raises(ConfigError, match=r"text32 is text, and qwen3-0.6b has no tokenizer here; leave it out"):
        measure(["text32"], EngineChoice("qwen3-0.6b", "float32", "dummy"), 1)


def test_workload_rows_tell_first_best_and_floor(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = reference_model("qwen3")
    monkeypatch.setitem(WORKLOADS, "nano", lambda: ([[7, 8, 9], [7, 8]], [3, 5]))
    monkeypatch.setattr(reference_workloads, "MAX_MODEL_LEN", 32)
    choice = EngineChoice(str(folder), "float32", "auto", max_num_seqs=4, max_num_batched_tokens=64)
    [row] = measure(["nano"], choice, repeats=2)
    assert {"first_s", "best_s", "tokens/s", "floor_s", "share of floor", "start_s", "roofs"} <= row.keys()
    with pytest.raises(ConfigError, match="--workload: 'huge' is not one of nano, single"):
        measure(["huge"], choice, 1)


@pytest.fixture
def short_workloads(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small model; nano and prefix are lists of a few short prompts."""
    prefix = list(range(40, 90))
    monkeypatch.setitem(WORKLOADS, "nano", lambda: ([[7, 8, 9], [7, 8]], [3, 5]))
    monkeypatch.setitem(WORKLOADS, "prefix", lambda: ([[*prefix, i] for i in range(9)], [4] * 9))
    monkeypatch.setattr(reference_workloads, "MAX_MODEL_LEN", 64)
    monkeypatch.setattr(reference_workloads, "MAX_BATCHED_TOKENS", 64)
    monkeypatch.setattr(reference_workloads, "measured_roofs", lambda device, dtype: ROOFS)
    return reference_model("qwen3")[0]


def test_ledger_holds_each_step_of_a_repetition_of_its_own(short_workloads: Path) -> None:
    choice = EngineChoice(str(short_workloads), "float32", "auto", max_num_seqs=16, max_num_batched_tokens=64)
    ledgers = Ledgers()
    nano, prefix = measure(["nano", "prefix"], choice, repeats=2, ledgers=ledgers)
    assert [(row.kind, row.num_requests, row.num_tokens) for row in ledgers.steps["nano"]] == [
        ("prefill", 2, 5), ("decode", 2, 2), ("decode", 2, 2), ("decode", 1, 1), ("decode", 1, 1),
    ]  # fmt: skip
    kinds = {row.group for row in ledgers.steps["prefix"]}
    assert {"prefill", "mixed", "decode 9-16"} <= kinds
    assert sum(row.num_tokens for row in ledgers.steps["prefix"]) < 9 * 51  # the prefix was computed for few
    for name, row in (("nano", nano), ("prefix", prefix)):
        facts = json.loads(json.dumps(row["ledger"]))
        assert facts["kinds"][-1]["steps"] == len(ledgers.steps[name])
        run_ms = sum(step.run_ms + step.host_ms for step in ledgers.steps[name])
        assert 0 < run_ms / 1e3 <= facts["recorded_s"] + 1e-3
    assert [line.split(":")[0] for line in ledgers.lines if ": the floor is" in line] == ["nano", "prefix"]
    assert ledgers.machine == "made up"


def test_a_shared_prefix_does_not_count_for_each_reader(short_workloads: Path) -> None:
    """In the steps in which all nine decode: K and V of 48 tokens twice, for two began with nothing to share."""
    choice = EngineChoice(str(short_workloads), "float32", "auto", max_num_seqs=16, max_num_batched_tokens=64)
    ledgers = Ledgers()
    measure(["prefix"], choice, repeats=1, ledgers=ledgers)
    per_token = 4 * 2 * 2 * 32 * 4  # layers, K and V, KV heads, head size, bytes
    full = [row for row in ledgers.steps["prefix"] if row.group == "decode 9-16"]
    assert full
    for row in full:
        assert 48 + 9 * 4 < row.kv_bytes / per_token < 2 * 48 + 9 * 9


def test_table_of_a_ledger_says_where_the_remainder_is(short_workloads: Path) -> None:
    choice = EngineChoice(str(short_workloads), "float32", "auto", max_num_seqs=16, max_num_batched_tokens=64)
    ledgers = Ledgers()
    measure(["nano"], choice, repeats=1, ledgers=ledgers)
    steps = tuple(replace(row, run_ms=10.0 * row.num_requests) for row in ledgers.steps["nano"])
    lines, facts = ledger_lines("nano", steps, 0.1), ledger_facts(steps, 0.1)
    assert lines[0].endswith("of 0.080 s in 5 steps")
    assert [line.split("  ")[1].strip() for line in lines[2:-1]] == ["prefill", "decode 1", "decode 2", "all"]
    assert "the most of it in decode 2: 40.0 ms; not in steps: 20.0 ms of 100.0 ms" in lines[-1]
    kinds = facts["kinds"]
    assert isinstance(kinds, list) and [kind["run_ms"] for kind in kinds] == [20.0, 20.0, 40.0, 80.0]
    assert len(json.dumps(facts)) < 2000


def test_bench_engine_draws_the_ledger_and_leaves_its_summary_in_the_result(
    short_workloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = list[object]()

    def draw(path: Path, steps: Mapping[str, Steps], origin: str) -> Path:
        drawn.extend((path, [*steps], origin))
        return path

    def drawing() -> Draw:
        return draw

    output, picture = tmp_path / "rows.json", tmp_path / "ledger.png"
    options = ["--model", str(short_workloads), "--dtype", "float32", "--workload", "nano", "--repeats", "1"]
    assert bench.main([*options, "--ledger", str(picture), "--output", str(output)], drawing) == 0
    assert drawn == [picture, ["nano"], f"{short_workloads}, float32, made up"]
    out = capsys.readouterr().out
    assert "nano: the floor is" in out and f"wrote {picture}" in out and "'kinds'" not in out
    assert json.loads(output.read_text())["rows"][0]["ledger"]["kinds"][-1]["kind"] == "all"
    assert bench.main([*options, "--output", str(output)], drawing) == 0
    assert "ledger" not in json.loads(output.read_text())["rows"][0] and len(drawn) == 3


def test_only_a_repetition_of_its_own_is_recorded_and_not_hashed(short_workloads: Path) -> None:
    llm = LLM(short_workloads, dtype="float32", num_blocks=20, show_progress=False)
    for is_recorded in (True, False):
        first = llm.engine.scheduler.step
        run = reference_workloads._run("nano", llm, ([[7, 8, 9]], [4]), 2, is_recorded=is_recorded)
        steps = [event for event in run.events if isinstance(event, StepRan)]
        assert [event.step - first for event in steps] == ([9, 10, 11, 12] if is_recorded else [])
        assert len(run.times) == 2 and (run.recorded_s > 0) == is_recorded
        assert all(event.state_hash == "" for event in steps) and llm.engine.state_hash() and not llm.events


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ledger", "x.png"], "--ledger: name what is to run, such as --workload nano"),
        (["--ledger", "x.svg", "--workload", "nano"], "--ledger: x.svg must end in .png"),
        (["--ledger", "no/where/x.png", "--workload", "nano"], "--ledger: no/where is no folder that can be written"),
        (["--ledger", "x.png", "--workload", "nano"], "--ledger: only `minivllm bench engine` can draw; run that"),
    ],
)
def test_a_ledger_that_cannot_be_drawn_is_refused_before_anything_is_measured(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench.main(options)
