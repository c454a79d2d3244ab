"""Runs notebooks as a Binder session does: one core, and 2 GB of memory for JupyterLab's server and all it starts.

python tests/binder_limit.py notebooks/*.ipynb    # with the Python that has what binder/postBuild installs

Where we may make a control group, the kernel of this machine kills what goes beyond the limit, as Binder's does. The
figures are resident bytes of all processes, added up twenty times a second: shared pages count once for each process.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2_000_000_000  # bytes
FILES = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}  # versions 1, 2
SERVER_S = 15  # until an idle server has all that it loads
RUN_S = 400  # at the limit a process may read its own code from disk again and again, and never end


def main(paths: Sequence[str]) -> int:
    """Print the peak of each notebook; 1 where one failed or took more than the limit."""
    with memory_group() as group:
        print(
            f"limit {LIMIT / 1e9} GB, {'held by a control group' if group else 'watched only: no control group here'}"
        )
        return max(int(not runs_within(Path(path).resolve(), group)) for path in paths)


def runs_within(path: Path, group: Path | None) -> bool:
    """Run one notebook beside a server of its own, from a copy."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        as_root = ["--allow-root"] if os.geteuid() == 0 else []
        lab = ["-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", *as_root]
        server = start([*lab, f"--ServerApp.root_dir={folder}"], folder, group)
        try:
            time.sleep(SERVER_S)
            begin = time.monotonic()
            run = start(["-c", "from nbclient.cli import main; main()", str(Path(folder) / path.name)], folder, group)
            peak = peak_bytes(server, run)
            seconds = time.monotonic() - begin
        finally:
            end(server)
        is_well = run.returncode == 0 and peak <= LIMIT
        print(f"{path.name}: peak {peak / 1e6:.0f} MB, {seconds:.0f} s, {'ok' if is_well else 'FAILED'}", flush=True)
        if run.returncode:
            print((Path(folder) / "log").read_text(errors="replace")[-2000:])
        return is_well


def start(arguments: list[str], folder: str, group: Path | None) -> subprocess.Popen[bytes]:
    """A Python process as Binder starts one, through binder/start, on one core and in the group."""

    def enter() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [str(ROOT / "binder" / "start"), sys.executable, *arguments]
    environment = {**os.environ, "MINIVLLM_LEARNER": "example", "JUPYTER_RUNTIME_DIR": f"{folder}/runtime"}
    with (Path(folder) / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, preexec_fn=enter)


def peak_bytes(server: subprocess.Popen[bytes], run: subprocess.Popen[bytes]) -> int:
    """The most that the server, the run and their children had at once, until the run ends; RUN_S at most."""
    peak, deadline = 0, time.monotonic() + RUN_S
    while run.poll() is None and time.monotonic() < deadline:
        peak = max(peak, resident_bytes(server.pid) + resident_bytes(run.pid))
        time.sleep(0.05)
    end(run)
    return peak


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started; nothing where it has ended by itself."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
    process.wait(30)


def resident_bytes(pid: int) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):  # it has just ended
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    return total


@contextmanager
def memory_group() -> Iterator[Path | None]:
    """A control group that holds the limit; None where we may not make one."""
    for parent, file in FILES.items():
        group = parent / f"minivllm-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(LIMIT))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    yield None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
