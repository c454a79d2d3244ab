"""What Binder reads agrees with the project; a build stops at its first error; a session gets one core's threads."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests import binder_limit

ROOT = Path(__file__).resolve().parents[1]
BINDER = ROOT / "binder"
SCRIPTS = ("postBuild", "start")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BADGE = re.compile(r"mybinder\.org/v2/gh/[\w-]+/[\w-]+/[\w-]+\?labpath=([^)\s]+)")
STUB = '#!/bin/sh\necho "$(basename "$0") $*" >> "$CALLS"\n[ "$(basename "$0")" != "$FAILING" ]\n'


def test_binder_has_no_files_that_would_replace_these() -> None:
    assert sorted(path.name for path in BINDER.iterdir()) == ["postBuild", "requirements.txt", "runtime.txt", "start"]
    assert not (ROOT / ".binder").exists()  # two folders are an error
    assert [path.name for path in BINDER.iterdir() if "://" in path.read_text()] == []


def test_python_is_one_that_the_project_supports() -> None:
    name, version = (BINDER / "runtime.txt").read_text().strip().split("-")
    assert name == "python"
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_installer_is_pinned_and_knows_torch_backends() -> None:
    lines = (BINDER / "requirements.txt").read_text().splitlines()
    (uv,) = [Requirement(line) for line in lines if not line.startswith("#")]
    assert uv.name == "uv"
    (pin,) = uv.specifier
    assert pin.operator == "=="
    assert pin.version in SpecifierSet(">=0.7.14")  # --torch-backend has been stable since


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_can_be_executed(name: str) -> None:
    path = BINDER / name
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_build_takes_the_cpu_build_and_the_tested_versions(tmp_path: Path) -> None:
    code, calls = post_build(tmp_path, failing="none")
    assert code == 0
    install, check, fetch = calls
    assert install.startswith("uv pip install ")
    assert " --torch-backend cpu " in install
    constraints, extras = re.findall(r"-c (\S+) -e \.\[(\w+)\]", install)[0]
    assert (ROOT / constraints).is_file()
    assert extras in PROJECT["optional-dependencies"]
    assert check.startswith("uv pip check ")
    assert fetch == "minivllm fetch"


def test_build_stops_where_an_install_fails(tmp_path: Path) -> None:
    code, calls = post_build(tmp_path, failing="uv")
    assert code != 0
    assert len(calls) == 1


def test_session_runs_what_it_is_given_with_one_thread() -> None:
    probe = [sys.executable, "-c", "import os, sys; print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])", "two words"]
    run = subprocess.run([str(BINDER / "start"), *probe], capture_output=True, text=True, check=True)
    assert run.stdout == "1 two words\n"


def test_badge_opens_a_notebook_that_exists() -> None:
    opened = [unquote(path) for path in BADGE.findall((ROOT / "README.md").read_text())]
    assert opened, "README.md has no badge that opens a notebook on Binder"
    assert [path for path in opened if not (ROOT / path).is_file()] == []


def test_memory_beyond_the_limit_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binder_limit, "LIMIT", 100_000_000)
    with binder_limit.memory_group() as group:
        greedy = binder_limit.start(
            ["-c", "import time; held = b'x' * 300_000_000; time.sleep(1)"], str(tmp_path), group
        )
        idle = binder_limit.start(["-c", "import time; time.sleep(1)"], str(tmp_path), group)
        peak = binder_limit.peak_bytes(idle, greedy)
        assert idle.wait(30) == 0
        assert peak > binder_limit.LIMIT or greedy.returncode != 0  # seen, or killed before it was
        assert group is None or greedy.returncode != 0
    assert group is None or not group.exists()


def post_build(folder: Path, failing: str) -> tuple[int, list[str]]:
    """Run postBuild with commands that only say how they were called; its exit code and those calls."""
    for name in ("uv", "minivllm"):
        stub = folder / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "FAILING": failing}
    run = subprocess.run([str(BINDER / "postBuild")], cwd=ROOT, env=environment)
    return run.returncode, calls.read_text().splitlines()
