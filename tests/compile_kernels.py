"""Compile what the kernels ship for GPUs that are not here, and hold registers, spills and shared memory to bounds.

Each example of tests/kernel_examples.py calls a real launcher on small CPU tensors. A stand-in driver names the GPU,
and the JIT's last step, which would compile and launch, only notes what it was asked for: so types, alignment,
constants, warps and stages are those of a real launch. What was noted is then compiled down to a cubin, each once.

Runs in a process of its own, without TRITON_INTERPRET: `PYTHONPATH=.:kernels python tests/compile_kernels.py` prints a
table of everything, `--json FILE` keeps it; exit code 1 if a bound is broken. `--only NAME` and `--arch 90` narrow it.
"""

import argparse
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from minivllm_kernels import attention_configs, configs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.kernel_examples import EXAMPLES, Example
from tests.kernel_handover import overtaken_loads
from tests.wgmma_hazards import overwritten_registers

NUM_WORKERS = 2


@dataclass(frozen=True)
class Gpu:
    """What a device class promises: shared memory of one program and of an SM, in bytes."""

    device_class: str
    program_shared_bytes: int
    sm_shared_bytes: int
    num_sms: int


GPUS = {
    80: Gpu("ampere", 163 << 10, 164 << 10, 108),
    86: Gpu("consumer", 99 << 10, 100 << 10, 82),
    90: Gpu("hopper", 227 << 10, 228 << 10, 132),
    100: Gpu("blackwell", 227 << 10, 228 << 10, 148),
}
REFERENCE_ARCH = 90  # the H200's: every example is compiled for it
SM_REGISTERS, MOST_REGISTERS, RESERVED_SHARED_BYTES = 65536, 255, 1024  # the driver takes 1 kB a program


@dataclass(frozen=True)
class Row:
    """One compiled kernel; `error` instead of figures where the compiler gave up."""

    example: str
    kernel: str
    arch: int
    num_warps: int = 0
    registers: int = 0
    stack_bytes: int = 0  # spilled registers live there
    shared_bytes: int = 0
    num_hazards: int = 0  # races that the compiler made: wgmma_hazards.py, kernel_handover.py
    seconds: float = 0.0
    programs_per_sm: int = 1
    allowed_stack_bytes: int = 0
    error: str = ""


def broken_bounds(row: Row) -> list[str]:
    """What this kernel breaks, in words; empty if it is fit to ship."""
    if row.error:
        return [row.error]
    gpu, found = GPUS[row.arch], []
    if row.registers > MOST_REGISTERS:
        found.append(f"{row.registers} registers, at most {MOST_REGISTERS}")
    if row.stack_bytes > row.allowed_stack_bytes:
        found.append(f"{row.stack_bytes} bytes of stack (spills), at most {row.allowed_stack_bytes}")
    if row.shared_bytes > gpu.program_shared_bytes:
        found.append(f"{row.shared_bytes} bytes of shared memory, at most {gpu.program_shared_bytes}")
    if row.num_hazards:
        found.append(f"{row.num_hazards} instructions race: wgmma_hazards.py, kernel_handover.py")
    fit = programs_that_fit(row)
    if fit < row.programs_per_sm:
        found.append(f"{fit} programs fit an SM, the configuration counts on {row.programs_per_sm}")
    return found


def programs_that_fit(row: Row) -> int:
    """Programs of this kernel that one SM holds, by registers (granted in steps of 8 a thread) and shared memory."""
    by_registers = SM_REGISTERS // (math.ceil(max(row.registers, 1) / 8) * 8 * 32 * row.num_warps)
    by_shared = GPUS[row.arch].sm_shared_bytes // (row.shared_bytes + RESERVED_SHARED_BYTES)
    return min(by_registers, by_shared)


def listing(rows: Iterable[Row]) -> str:
    lines = [f"{'example':44} {'kernel':28} {'arch':>5} warps regs stack shared  fit"]
    for row in rows:
        figures = f"{row.num_warps:5} {row.registers:4} {row.stack_bytes:5} {row.shared_bytes:6}"
        fit = f"{programs_that_fit(row)}/{row.programs_per_sm}" if not row.error else "-"
        lines.append(
            f"{row.example:44} {row.kernel:28} sm_{row.arch:<3}{figures} {fit:>4}  {'; '.join(broken_bounds(row))}"
        )
    return "\n".join(line.rstrip() for line in lines)


# --- Noting what a launch asks for


@dataclass(frozen=True)
class Launch:
    """Everything the compiler needs for one kernel."""

    row: Row
    source: Any  # triton's ASTSource, or Gluon's
    options: dict[str, object]

    @property
    def key(self) -> str:
        source = self.source
        return repr(
            (source.fn.cache_key, source.signature, source.constants, source.attrs, self.options, self.row.arch)
        )


class StandInDriver:
    """As much of a CUDA driver as the JIT asks before it compiles; each architecture is a device of its own."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def pretend(arch: int) -> None:
    """From here on a launch is one for this architecture, with the configurations of its device class."""
    triton.runtime.driver.set_active(StandInDriver(arch))
    facts = {"device_class": GPUS[arch].device_class, "num_multiprocessors": GPUS[arch].num_sms, "can_run": True}
    for module in kernel_modules():
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()  # what it remembers was for another GPU
        for name in facts.keys() & vars(module).keys():
            setattr(module, name, lambda device, fact=facts[name]: fact)


def kernel_modules() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("minivllm_kernels.")]


def noted_launches(example: Example, arch: int) -> list[Launch]:
    """What one example asks to compile for the architecture that we pretend to have."""
    launches: list[Launch] = []

    def note(
        kernel: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:
        config = example.config() if kernel.__name__ == example.kernel else None
        row = Row(
            example.name, kernel.__name__, arch, programs_per_sm=getattr(config, "programs_per_sm", 1),
            allowed_stack_bytes=example.allowed_stack_bytes,
        )  # fmt: skip
        launches.append(Launch(row, kernel.ASTSource(kernel, signature, constexprs, attrs), options.__dict__))

    JITFunction._do_compile = note  # gives None, and a launch without a kernel ends there
    example.call()
    names = [launch.row.kernel for launch in launches]
    if not names or example.kernel not in ("", *names):
        raise ValueError(f"it should launch {example.kernel or 'a kernel'}, it launched {names}")
    return launches


# --- Compiling


def compile_all(examples: Sequence[Example], archs: Sequence[int]) -> list[Row]:
    """A row for each distinct kernel of the examples, compiled side by side, and for each example that fails."""
    compile_one, failed = JITFunction._do_compile, []
    noted: dict[str, Launch] = {}
    for arch in archs:
        pretend(arch)
        for example in examples:
            if arch != REFERENCE_ARCH and not example.is_for_every_gpu:
                continue
            try:
                noted |= {launch.key: launch for launch in noted_launches(example, arch)} | noted
            except Exception as error:  # one kernel that is broken should not hide the others
                failed.append(Row(example.name, "", arch, error=one_line(error)))
    JITFunction._do_compile = compile_one
    LAUNCHES.extend(noted.values())
    with multiprocessing.get_context("fork").Pool(NUM_WORKERS) as pool:  # forked: what was noted cannot be pickled
        return failed + pool.map(compiled, range(len(LAUNCHES)), chunksize=1)


LAUNCHES: list[Launch] = []  # for the forked workers


def compiled(index: int) -> Row:
    launch, started_s = LAUNCHES[index], time.perf_counter()
    try:
        kernel = triton.compile(launch.source, GPUTarget("cuda", launch.row.arch, 32), launch.options)
    except Exception as error:  # whatever the compiler says belongs in the table
        return replace(launch.row, error=one_line(error))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = nvidia_tool("nvdisasm", "-c", file.name) if "wgmma" in kernel.asm["ptx"] else ""
    hazards = overwritten_registers(sass) + overtaken_loads(kernel.asm["ptx"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return replace(
        launch.row, num_warps=kernel.metadata.num_warps, registers=int(found[1]), stack_bytes=int(found[2]),
        shared_bytes=kernel.metadata.shared, num_hazards=len(hazards), seconds=round(time.perf_counter() - started_s),
    )  # fmt: skip


def nvidia_tool(name: str, *arguments: str) -> str:
    """What one of the tools in Triton's wheel prints."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def one_line(error: Exception) -> str:
    """Its last words, where the compiler says what it minds."""
    return f"{type(error).__name__}: ...{' '.join(str(error).split())[-250:]}"


class Watched(dict[Any, Any]):
    """A table of configurations that remembers which entries were looked up."""

    def __init__(self, name: str, table: dict[Any, Any]) -> None:
        super().__init__({k: Watched(f"{name}[{k!r}]", v) if isinstance(v, dict) else v for k, v in table.items()})
        self.name, self.seen = name, set[object]()

    def __getitem__(self, key: object) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def unseen(self) -> list[str]:
        """Entries that nothing looked up, those of the interpreter apart: no GPU ever runs them."""
        keys = [key for key in self if key != "interpreter"]
        missed = [f"{self.name}[{key!r}]" for key in keys if key not in self.seen]
        inner = [
            table for table in (super(Watched, self).__getitem__(key) for key in keys) if isinstance(table, Watched)
        ]
        return missed + [name for table in inner for name in table.unseen()]


def watch_tables() -> list[Watched]:
    """Put a watched copy in the place of each configuration table, wherever it was imported."""
    found = {
        name: value
        for name, value in (vars(configs) | vars(attention_configs)).items()
        if name.isupper() and type(value) is dict
    }
    inner = [id(entry) for value in found.values() for entry in value.values()]  # watched as part of its table
    tables = [Watched(name, value) for name, value in found.items() if id(value) not in inner]
    for module in kernel_modules():
        for table in tables:
            if table.name in vars(module):
                setattr(module, table.name, table)
    return tables


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(GPUS), default=list(GPUS))
    parser.add_argument("--only", default="", help="examples whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: a process interprets or compiles, never both")
    started_s = time.perf_counter()
    tables = watch_tables()
    rows = compile_all([example for example in EXAMPLES if args.only in example.name], args.arch)
    is_whole = not args.only and args.arch == list(GPUS)
    unseen = [name for table in tables for name in table.unseen()] if is_whole else []
    print(listing(rows))
    print(f"triton {triton.__version__}: {len(rows)} kernels in {time.perf_counter() - started_s:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "unseen": unseen}, indent=1) + "\n")
    return int(bool(unseen) or any(map(broken_bounds, rows)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
