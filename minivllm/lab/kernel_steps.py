"""Steps the real paged decode kernel, program by program: `python -m minivllm.lab.kernel_steps --output FILE`.

Under Triton's interpreter a kernel is a Python function that runs once for each program. A trace function looks at its
variables whenever it comes by the head of the loop over tiles: what it read, and its running maximum, sum and output.
The interpreter is chosen when Python starts, so where this process has none, a second process does the work.
"""

import argparse
import ast
import inspect
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from minivllm.course.kernel_turns import End, KernelCase, KernelSteps, Rows, Stage, Turn
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.provenance import provenance

RECORDING = Path(__file__).parent / "recordings" / "kernel_steps.json"
TILE_TOKENS = 16  # the least that the kernel takes: small enough to look at
RECORDED = "recorded: {}, so this is the launch that minivllm/lab/recordings holds"
Local = Callable[..., Any] | None  # the trace function of a frame
Locals = Mapping[str, Any]  # a frame's variables
Place = tuple[str, int]  # a function's name, and a line of its file


@dataclass(frozen=True)
class KernelInputs:
    """One layer's decode step, as `paged_decode` takes it, on the CPU in fp32."""

    q: torch.Tensor  # [B, H, D]
    k_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [B, M] int32
    num_tokens: torch.Tensor  # [B] int32

    @classmethod
    def of(cls, *tensors: torch.Tensor) -> "KernelInputs":
        """Copies of tensors of any float type, on any device."""
        floats, indexes = tensors[:3], tensors[3:]
        return cls(*(x.float().cpu().contiguous() for x in floats), *(x.int().cpu().contiguous() for x in indexes))

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k_cache, self.v_cache, self.block_table, self.num_tokens


class InterpreterError(MiniVLLMError):
    """Triton's interpreter could not run the kernel."""


def example_inputs(seed: int = 0) -> KernelInputs:
    """Requests of 23, 40 and 9 tokens in scattered blocks of 8; 4 query heads, 2 KV heads; NaN where no token is."""
    random, lengths, block_size = torch.Generator().manual_seed(seed), (23, 40, 9), 8
    caches = [torch.full((16, block_size, 2, 64), torch.nan) for _ in "kv"]
    free = (torch.randperm(15, generator=random) + 1).tolist()
    table = torch.zeros(len(lengths), 5, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for column in range(-(-length // block_size)):
            block = table[row, column] = free.pop()
            used = min(block_size, length - column * block_size)
            for cache in caches:
                cache[block, :used] = torch.randn(used, 2, 64, generator=random)
    q = torch.randn(len(lengths), 4, 64, generator=random)
    return KernelInputs(q, caches[0], caches[1], table, torch.tensor(lengths, dtype=torch.int32))


def is_interpreting() -> bool:
    """Whether kernels of this process run in Triton's interpreter."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def kernel_steps(inputs: KernelInputs) -> KernelSteps:
    """Every turn of every program on these inputs; without triton, the recorded launch, whose `origin` says so.

    Raises MiniVLLMError where a request has no token: the kernel writes its zeros without a turn to look at.
    """
    if not (inputs.num_tokens > 0).all():
        raise MiniVLLMError("kernel steps: every request needs a token or more; leave the padded rows out")
    if find_spec("triton") is None:
        return recorded_steps("this machine has no triton")
    return step_here(inputs) if is_interpreting() else step_elsewhere(inputs)


def stepped(inputs: KernelInputs) -> tuple[KernelInputs, KernelSteps]:
    """The steps, and the inputs that they belong to: yours, or where they cannot be stepped those of the recording.

    That is where there is no triton, or one whose interpreter fails: triton 3.6's does with numpy 2.4.
    """
    try:
        steps = kernel_steps(inputs)
    except InterpreterError as failure:
        steps = recorded_steps(str(failure))
    return (example_inputs() if steps.origin.startswith("recorded") else inputs), steps


def recorded_steps(reason: str) -> KernelSteps:
    """The launch on `example_inputs` that the package brings along; its `origin` gives the reason."""
    return replace(KernelSteps.load(RECORDING), origin=RECORDED.format(reason))


def step_elsewhere(inputs: KernelInputs) -> KernelSteps:
    """The same in a process that starts with the interpreter on; this one stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "inputs.pt", Path(folder) / "steps.json"
        torch.save(inputs.tensors, given)
        command = [sys.executable, "-m", "minivllm.lab.kernel_steps", "--inputs", str(given), "--output", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise InterpreterError(f"the interpreter's process ended with {run.returncode} ({last})")
        return KernelSteps.load(made)


def step_here(inputs: KernelInputs) -> KernelSteps:
    """Launch the kernel in this process and watch it. Raises ConfigError where kernels are compiled."""
    if not is_interpreting():
        raise ConfigError("only Triton's interpreter can be watched: set TRITON_INTERPRET=1 before Python starts")
    from minivllm_kernels.attention_configs import decode_config
    from minivllm_kernels.configs import num_multiprocessors
    from minivllm_kernels.paged_decode import paged_decode
    from minivllm_kernels.workspace import SplitWorkspace

    device, (num_heads, head_size) = torch.device("cpu"), inputs.q.shape[1:]
    num_blocks, block_size, num_kv_heads, _ = inputs.k_cache.shape
    config = replace(decode_config(device), tile_bytes=TILE_TOKENS * head_size * inputs.q.element_size())
    num_programs = config.programs_per_sm * num_multiprocessors(device)
    lengths = inputs.num_tokens.tolist()
    tables = tuple(
        tuple(row[: -(-n // block_size)]) for row, n in zip(inputs.block_table.tolist(), lengths, strict=True)
    )
    case = KernelCase(
        num_heads, num_kv_heads, head_size, block_size, num_blocks, config.tile_tokens(head_size * 4), num_programs,
        tuple(lengths), tables,
    )  # fmt: skip
    out = torch.full_like(inputs.q, torch.nan)
    workspace = SplitWorkspace.allocate(device, 0, case.group, head_size)
    watch = KernelWatch(case, inputs.k_cache.stride())
    with watch.watching():
        paged_decode(*inputs.tensors, out, workspace, config=config)
    origin = "live: the kernel ran in Triton's interpreter on this machine"
    rows = tuple(tuple(map(tuple, request)) for request in out.tolist())
    return KernelSteps(case, tuple(watch.stages), rows, origin, provenance(0))


class KernelWatch:
    """Notes stages while the kernel runs; knows the kernel by the names of its functions and variables."""

    def __init__(self, case: KernelCase, k_strides: Sequence[int]) -> None:
        from minivllm_kernels import paged_decode, split_kv

        self.case = case
        self.stages: list[Stage] = []
        self._k_strides = k_strides
        self._loops = {line_of_loop(split_kv.attend_tiles.fn), line_of_loop(paged_decode.stream_kernel.fn)}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Trace this thread, and give back whatever traced it before."""
        before = sys.gettrace()
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)

    def _called(self, frame: FrameType, event: str, _: object) -> Local:
        """A call of anything: the two loops of the kernel get a look at their lines, all else runs on unwatched."""
        return self._line if place_of(frame)[0] in {name for name, _ in self._loops} else None

    def _line(self, frame: FrameType, event: str, _: object) -> Local:
        """At the head of a loop, where a round has just ended; before the first round its variables are not there."""
        if event == "line" and place_of(frame) in self._loops:
            seen = frame.f_locals
            if "new_peak" in seen:
                self.stages.append(self._turn(seen, kernel_frame(frame).f_locals))
            elif "segment_stop" in seen:
                self.stages.append(self._end(seen))
        return self._line

    def _turn(self, seen: Locals, kernel: Locals) -> Turn:
        """What attend_tiles has just done with one tile."""
        group, start, kv_head = self.case.group, whole(seen["start"]), whole(kernel["head"])
        count = min(whole(seen["end"]) - start, self.case.tile)
        rows = value_of(seen["rows"])[:count]  # of K, in elements from the start of the KV head
        stride_block, stride_slot, stride_head = self._k_strides[:3]
        slots = rows // stride_block * self.case.block_size + rows % stride_block // stride_slot
        return Turn(
            whole(kernel["program"]), whole(kernel["request"]), kv_head, start,
            tuple(slots.tolist()), tuple((rows + kv_head * stride_head).tolist()),
            matrix(seen["scores"], group, count), column(seen["peak"], group), column(seen["total"], group),
            matrix(seen["output"], group, self.case.head_size),
        )  # fmt: skip

    def _end(self, seen: Locals) -> End:
        """What stream_kernel has just written: an output, or a part, and perhaps the merge of all parts of a pair."""
        group, programs = self.case.group, self.case.num_programs
        first, last = whole(seen["first_part"]), whole(seen["last_part"])
        slot, merged = None, list[int]()
        if first != last:
            slot = whole(seen["slot"])
            if whole(seen["arrived"]) == last - first:
                merged = [first, *range(programs + first + 1, programs + last + 1)]
        lse = value_of(seen["peak"]) + np.log2(value_of(seen["total"]))
        output = matrix(seen["output"], group, self.case.head_size)
        program, request, kv_head = (whole(seen[name]) for name in ("program", "request", "head"))
        return End(program, request, kv_head, slot, tuple(lse[:group].tolist()), output, tuple(merged))


def line_of_loop(function: Callable[..., object]) -> Place:
    """A kernel's name, and the line in its file at which its loop begins; its first one, if it has several."""
    lines, start = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.For | ast.While))
    return function.__name__, start + loop.lineno - 1


def place_of(frame: FrameType) -> Place:
    return frame.f_code.co_name, frame.f_lineno


def kernel_frame(frame: FrameType) -> FrameType:
    """The program that called a function of the kernel, past the interpreter's own frames."""
    caller = frame.f_back
    while caller is not None and caller.f_code.co_name != "stream_kernel":
        caller = caller.f_back
    assert caller is not None, "attend_tiles was called by another kernel"
    return caller


def value_of(tensor: Any) -> np.ndarray:
    """A tensor of the interpreter as an array."""
    return np.asarray(tensor.handle.data if hasattr(tensor, "handle") else tensor)


def whole(tensor: Any) -> int:
    return int(value_of(tensor).reshape(-1)[0])


def column(tensor: Any, count: int) -> tuple[float, ...]:
    return tuple(value_of(tensor)[:count].tolist())


def matrix(tensor: Any, num_rows: int, num_columns: int) -> Rows:
    return tuple(map(tuple, value_of(tensor)[:num_rows, :num_columns].tolist()))


def main(argv: Sequence[str]) -> int:
    """Step the kernel on the inputs of a file, or on the example's, and save the launch."""
    parser = argparse.ArgumentParser(prog="python -m minivllm.lab.kernel_steps", description=__doc__)
    parser.add_argument("--inputs", type=Path, help="tensors of KernelInputs, saved by torch (default: the example)")
    parser.add_argument("--output", type=Path, required=True, help="write the steps to this JSON file")
    args = parser.parse_args(argv)
    inputs = KernelInputs(*torch.load(args.inputs)) if args.inputs else example_inputs()
    steps = kernel_steps(inputs)
    command = " ".join([parser.prog, *argv])
    replace(steps, facts={**steps.facts, "command": command}).save(args.output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MiniVLLMError as error:
        sys.exit(f"kernel_steps: {error}")
