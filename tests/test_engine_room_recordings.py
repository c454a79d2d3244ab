"""Recorded runs: small files that say where they come from, replayed by the live view, and made again by one script."""

import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from minivllm.bench import dashboard_cost
from minivllm.course.engine_frames import EngineRun
from minivllm.errors import ConfigError
from minivllm.lab import engine_room_recordings as recorded
from minivllm.lab.engine_room_recordings import FOLDER, MOST_BYTES, SCRIPTS, recordings
from minivllm.runner.model_runner import ModelRunner
from minivllm.views.dashboard import Dashboard

RUNS = recordings()
each = pytest.mark.parametrize("title", RUNS)


def test_a_run_of_a_cpu_is_there() -> None:
    assert "SmolLM2-135M on real text, CPU" in RUNS


@each
def test_a_file_is_small_and_says_where_it_comes_from(title: str) -> None:
    [script] = [script for script in SCRIPTS if script.title == title]
    header = RUNS[title].header
    assert (FOLDER / f"{script.name}.json").stat().st_size < MOST_BYTES
    assert {"machine", "commit", "seed", "command", "torch", "model", "dtype", "prompts"} <= set(header)
    assert (header["live"], header["title"], header["model"]) == ("recorded", title, script.model)
    assert ("H200" in str(header["machine"])) == title.endswith("H200")
    assert (header["device"] == "cuda") == title.endswith("H200")
    assert "engine_room_recordings" in str(header["command"]) and re.fullmatch("[0-9a-f]{12}", str(header["commit"]))


@each
def test_a_recorded_run_holds_together(title: str) -> None:
    [script] = [script for script in SCRIPTS if script.title == title]
    frames = RUNS[title].frames
    usable = int(str(RUNS[title].header["num_blocks"])) - 1
    for before, frame in pairwise(frames):
        assert frame.time_s > before.time_s
        for total in ("step", "arrived", "finished", "output_tokens", "computed_tokens", "steps", "hit_tokens"):
            assert getattr(frame, total) >= getattr(before, total)
        assert frame.num_live + frame.num_cached + frame.num_free == usable
        assert frame.num_preempted <= frame.num_waiting
        assert frame.num_running <= max(frame.load.batch_limit, before.num_running)
    last = frames[-1]
    assert last.costed_steps == last.steps and 0 < last.floor_ms < last.costed_ms  # a ledger was kept
    assert last.output_tokens > 100 and last.finished > 10 and last.hit_tokens > 0
    assert 5 <= len(frames) / last.time_s <= 10.1
    loads = [frame.load for before, frame in pairwise(frames) if before.load != frame.load]
    assert len(loads) == len(script.moves)  # every slider that the script moves was moved


@each
def test_it_is_replayed_by_the_view_of_a_live_engine(title: str) -> None:
    view = Dashboard.replay(RUNS[title])
    last = len(RUNS[title].frames) - 1
    for step in (0, last // 2, last):
        view.move("step", step)
        picture = view.drawn()
        assert picture["title"].startswith("Recorded, ") and picture["provenance"].startswith("recorded · ")
        assert f"step {RUNS[title].frames[step].step}:" in picture["title"]
        assert str(RUNS[title].header["machine"]) in picture["provenance"]
    assert len(view.png()) > 10_000


def test_the_script_makes_it_again_on_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(
        replace(script, model="smollm2-135m", load_format="dummy", num_blocks=200, max_model_len=512)
        for script in SCRIPTS
    )
    monkeypatch.setattr(recorded, "SCRIPTS", small)
    monkeypatch.setattr(recorded, "WARM_UP_S", 0.2)
    args = ["--only", "qwen3_8b_h200", "--seconds", "1.5", "--rate-factor", "0.5", "--folder", str(tmp_path)]
    assert recorded.main(args) == 0
    run = EngineRun.load(tmp_path / "room_qwen3_8b_h200.json")
    moves = next(script.moves for script in SCRIPTS if script.name == "room_qwen3_8b_h200")
    assert run.frames[-1].load.rate == moves[-1][2] * 0.5 and run.frames[-1].output_tokens > 0
    assert run.header["title"] == "shape of Qwen3-8B, random weights, H200"


def test_an_unknown_name_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="--only: 'room_gpt' is not one of room_smollm2_h200"):
        recorded.main(["--only", "smollm2_cpu,gpt"])


def test_a_run_that_fails_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(ModelRunner, "run", fail)
    monkeypatch.setattr(recorded, "SCRIPTS", (replace(SCRIPTS[-1], load_format="dummy"),))
    args = ["--only", "smollm2_cpu", "--seconds", "0.5", "--rate-factor", "64", "--folder", str(tmp_path)]
    with pytest.raises(ConfigError, match="room_smollm2_cpu: RuntimeError: the device fell off the bus"):
        recorded.main(args)
    assert list(tmp_path.iterdir()) == []


def test_what_watching_costs_is_measured_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.json"
    sizes = ["--requests", "2", "--prompt-tokens", "8", "--output-tokens", "20", "--repeats", "1", "--ledger"]
    assert dashboard_cost.main([*sizes, "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "slower by, %" in printed and '"commit"' in path.read_text()
    with pytest.raises(ConfigError, match="must be at least 1"):
        dashboard_cost.main(["--requests", "0"])


def test_scripts_run_where_no_widgets_are_installed() -> None:
    probe = (
        "import sys; sys.modules |= dict.fromkeys(('anywidget', 'ipywidgets', 'traitlets', 'PIL', 'plotly'));"
        "import minivllm.bench.dashboard_cost, minivllm.lab.engine_room_recordings"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stderr == ""
