"""The Makefile's promises that need no install: clear refusals, and no pip when nothing changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE = shutil.which("make") or ""
pytestmark = pytest.mark.skipif(not MAKE, reason="make is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The three files that decide about the environment, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    return subprocess.run([MAKE, *arguments], cwd=folder, env={**clean, **environment}, capture_output=True, text=True)


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_python(path: Path, version: str) -> Path:
    """A Python of another version: it answers the version question and fails the range check."""
    return script(path, f'case "$*" in *print*) echo {version};; *) exit 1;; esac')


def install_nothing(folder: Path) -> None:
    """A real venv whose pip says where it is and records each call, so that `make` runs to its stamp in a moment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    packages = next((folder / ".venv" / "lib").glob("python3*")) / "site-packages" / "pip"
    packages.mkdir(parents=True)
    calls = folder / "pip-calls"
    (packages / "__init__.py").write_text("")
    (packages / "__main__.py").write_text(
        f"import sys; open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
    )
    script(folder / ".venv/bin/pip", f'echo "pip 1 from {folder.resolve()}/.venv/lib/pip (python 3)"')
    script(folder / ".venv/bin/minivllm", "echo $*")


def num_installs(folder: Path) -> int:
    calls = folder / "pip-calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_make_alone_lists_the_commands(clone: Path) -> None:
    assert [line.split()[1] for line in make(clone).stdout.splitlines() if line.startswith("make ")] == [
        *("lab", "test", "lint", "notebooks", "clean")
    ]


def test_old_python_gets_one_line(clone: Path, tmp_path: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        fake_python(tmp_path / "bin" / name, "3.9.2")
    run = make(clone, "lab", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    wanted = "minivllm needs Python 3.11 to 3.13; python3 is 3.9.2: set PYTHON=/path/to/python3.11"
    assert run.returncode != 0
    assert [line for line in run.stderr.splitlines() if not line.startswith("make")] == [wanted]


def test_a_chosen_python_that_is_missing_leaves_the_environment_alone(clone: Path) -> None:
    install_nothing(clone)
    run = make(clone, "model", "PYTHON=/nowhere/python3")
    assert "/nowhere/python3 is missing" in run.stderr
    assert (clone / ".venv/bin/python").exists()


def test_missing_venv_module_gets_one_line(clone: Path, tmp_path: Path) -> None:
    bare = script(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    run = make(clone, "model", f"PYTHON={bare}")
    assert [line for line in run.stderr.splitlines() if not line.startswith("make")] == [
        f"{bare} cannot make a virtual environment: apt-get install python3-venv"
    ]


def test_pip_runs_once_until_something_changes(clone: Path) -> None:
    install_nothing(clone)
    assert make(clone, "model").returncode == 0
    assert make(clone, "model").returncode == 0
    assert num_installs(clone) == 1
    assert "pip install" not in make(clone, "-n", "model").stdout
    (clone / "constraints.txt").write_text("torch==0\n")
    assert make(clone, "model").returncode == 0
    assert num_installs(clone) == 2


def test_missing_compiler_is_one_note_and_no_obstacle(clone: Path, tmp_path: Path) -> None:
    install_nothing(clone)
    for tool in ("cat", "cksum", "cut", "echo", "grep", "rm", "touch", "sh"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")
    run = make(clone, "model", PATH=str(tmp_path / "bin"))
    notes = [line for line in run.stdout.splitlines() if line.startswith("note:")]
    assert notes == ["note: no C compiler; a CPU needs none, Triton on a GPU does: apt-get install gcc"]
    assert run.returncode == 0


def test_interrupted_install_is_done_again(clone: Path) -> None:
    install_nothing(clone)
    module = next((clone / ".venv").rglob("__main__.py"))
    working = module.read_text()
    module.write_text("import sys; sys.exit(1)\n")
    assert make(clone, "model").returncode != 0
    module.write_text(working)
    assert make(clone, "model").returncode == 0
    assert num_installs(clone) == 1


def test_moved_folder_asks_for_a_new_environment(clone: Path, tmp_path: Path) -> None:
    install_nothing(clone)
    make(clone, "model")
    moved = clone.rename(tmp_path / "moved")
    # its pip still reports the old folder; a Python that cannot make a venv shows that a new one was wanted
    bare = script(tmp_path / "bare", f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')
    assert "cannot make a virtual environment" in make(moved, "model", f"PYTHON={bare}").stderr
