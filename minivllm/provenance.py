"""Where a figure comes from: machine, versions, commit, seed and command; in every result file and every trace."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(seed: int) -> dict[str, object]:
    """The facts that a reader needs to judge a figure or to make it again."""
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": _commit(),
        "seed": seed,
        "command": _command(sys.argv),
    }


def _command(arguments: list[str]) -> str:
    """What was typed, without folders; a notebook's kernel was started by nobody's hand."""
    program = Path(arguments[0]).name
    return "a notebook" if program == "ipykernel_launcher.py" else " ".join([program, *arguments[1:]])


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of the code that runs, marked when files differ from it; a copy without git: MINIVLLM_COMMIT's."""
    told = os.environ.get("MINIVLLM_COMMIT", "unknown")
    if shutil.which("git") is None:
        return told
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip() or told
