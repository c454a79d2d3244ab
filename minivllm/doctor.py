"""What this machine has, as a list of findings; each lack carries one line that says what to do about it.

Invariant: no check raises, whatever is missing or broken; heavy imports stay inside the check that needs them.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "FAIL"
COLOURS = {OK: "\033[32m", WARN: "\033[33m", FAIL: "\033[31m"}
INSTALL = "run `make lab`, or `pip install -e '.[lab]'`"
GIB = 2**30
WEIGHT_BYTES = 2 * 134_515_008  # the default model in bf16
CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX512", "avx512_bf16": "bf16", "avx512_vnni": "VNNI", "amx_bf16": "AMX"}


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, how it stands, what was found, and what to do about a lack."""

    part: str
    mark: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Run every check; one that breaks is itself a finding."""
    return [finding for name, check in CHECKS.items() for finding in _survive(name, check)]


def exit_code(findings: list[Finding]) -> int:
    return int(any(finding.mark == FAIL for finding in findings))


def table(findings: list[Finding], *, is_coloured: bool = False) -> str:
    """Align the findings; advice stands on a line of its own below its row."""
    width = max(len(finding.part) for finding in findings)
    lines = []
    for finding in findings:
        mark = f"{finding.mark:4}"
        mark = f"{COLOURS[finding.mark]}{mark}\033[0m" if is_coloured else mark
        lines.append(f"{mark}  {finding.part:{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':4}  {'':{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _survive(part: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # a broken install may raise anything; the other checks still matter
        if isinstance(error, ModuleNotFoundError) and error.name == "torch" and part != "torch":
            return [Finding(part, WARN, "not looked at, for want of torch")]
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        return [Finding(part, FAIL, f"{type(error).__name__}: {reason}", INSTALL)]


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} in {sys.prefix}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        yield Finding("python", OK, found)
    else:
        yield Finding("python", FAIL, found, "minivllm needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.11 lab")


def _cpu() -> Iterator[Finding]:
    description = cpu_description(_read("/proc/cpuinfo")) or platform.processor() or platform.machine()
    yield Finding("cpu", OK, f"{_usable_cores()} cores, {description}")


def cpu_description(cpuinfo: str) -> str:
    """Model and the flags that matter, of the first processor: `AMD EPYC; AVX2 AVX512 bf16`."""
    fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    shown = " ".join(label for flag, label in CPU_FLAGS.items() if flag in flags)
    return "; ".join(part for part in (fields.get("model name", ""), shown) if part)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding("gpu", OK, "none that torch can use; the engine runs on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        yield Finding(f"gpu {index}", OK, found)


def _packages() -> Iterator[Finding]:
    for package in ("transformers", "safetensors", "huggingface_hub", "gguf"):
        found = _version(package)
        yield Finding(package, OK, found) if found else Finding(package, FAIL, "absent", INSTALL)


def _kernels() -> Iterator[Finding]:
    import torch

    triton = _version("triton")
    has_gpu, is_interpreted = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
    wants_triton = "pip install -e '.[gpu]'"
    if triton:
        yield Finding("triton", OK, triton)
    else:
        yield Finding("triton", WARN if has_gpu else OK, "absent", wants_triton if has_gpu else "")
    if is_interpreted and triton:
        yield Finding("kernels", OK, "Triton interpreter (TRITON_INTERPRET=1): exact and very slow, for study")
    elif is_interpreted:
        yield Finding("kernels", WARN, "TRITON_INTERPRET=1 without triton: torch backend", wants_triton)
    else:
        yield Finding("kernels", OK, "Triton kernels on the GPU" if has_gpu and triton else "torch backend on the CPU")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    needs_compiler = has_gpu and bool(triton) and not compiler
    found = compiler or ("absent" if needs_compiler else "absent; nothing needs one on a CPU")
    advice = "Triton compiles its launcher with it: apt-get install gcc" if needs_compiler else ""
    yield Finding("c compiler", WARN if needs_compiler else OK, found, advice)


def _model_cache() -> Iterator[Finding]:
    from minivllm.default_model import BUILD_BYTES, DEFAULT_MODEL, cache_folder, default_model_folder, is_intact

    folder, model = cache_folder(), default_model_folder()
    is_present = is_intact(model)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    found = f"{folder}, {free_bytes / 1e9:.1f} GB free"
    elsewhere = "set MINIVLLM_CACHE to a folder that you can write, with 600 MB free"
    lack = WARN if is_present else FAIL  # a complete cache is only read
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("model cache", lack, f"{found}, not writable", elsewhere)
    elif free_bytes < BUILD_BYTES and not is_present:
        yield Finding("model cache", FAIL, f"{found}, too little", elsewhere)
    else:
        yield Finding("model cache", OK, found)
    if is_present:
        yield Finding("model", OK, f"{DEFAULT_MODEL}, complete")
    else:
        state = "incomplete" if model.exists() else "not fetched yet"
        yield Finding("model", WARN, f"{DEFAULT_MODEL}, {state}", "run `minivllm fetch` (93 MB, once)")


def _memory() -> Iterator[Finding]:
    from minivllm.runner.device import available_memory, choose_device, default_kv_cache_memory

    available_bytes, budget_bytes = available_memory(), default_kv_cache_memory(choose_device("auto"), WEIGHT_BYTES)
    found = f"{available_bytes / GIB:.1f} GiB available"
    if available_bytes >= GIB:
        yield Finding("memory", OK, found)
    else:
        yield Finding("memory", WARN, found, "close something: the default model and its KV cache want 1 GiB")
    yield Finding("kv cache", OK, f"{budget_bytes / GIB:.2f} GiB by default; LLM(kv_cache_memory=...) changes it")


def _notebooks() -> Iterator[Finding]:
    for package in ("jupyterlab", "ipywidgets", "anywidget", "plotly"):
        found = _version(package)
        yield Finding(package, OK, found) if found else Finding(package, WARN, "absent; notebooks need it", INSTALL)


def _version(package: str) -> str:
    """Return the installed version, or an empty string; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(path: str) -> str:
    return Path(path).read_text(errors="replace") if Path(path).exists() else ""


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "cpu": _cpu,
    "torch": _torch,
    "packages": _packages,
    "kernels": _kernels,
    "model cache": _model_cache,
    "memory": _memory,
    "notebooks": _notebooks,
}
