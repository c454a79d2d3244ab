"""What a forward pass takes: many new tokens of one request (prefill), one new token of many requests (decode).

    python -m minivllm.lab.forward_sweep --model qwen3-0.6b --load-format dummy --output FILE

Each step is a plan of the engine's own runner, timed to the end of the device's work: `ms` as the engine runs it,
`graph_ms` with its kernels launched at once (a CUDA graph). Work and floors come from the calculators (step_floor.py);
counted_steps.py counts the same work on the tensors of a running engine. `busy` is what utilisation tools show:
nvidia-smi's figure, or on a CPU the share of its threads' time.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from tqdm.auto import tqdm

from minivllm.course.calculators import Accelerator
from minivllm.engine.allocators import blocks_needed
from minivllm.engine.plan import StepPlan
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.gpu_steps import captured, nvidia_busy
from minivllm.lab.step_floor import ModelWork, measured_roofs
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import BlockTable, Request, SamplingParams
from minivllm.text_files import read_text, write_text
from minivllm.weights import find_model

RECORDINGS = Path(__file__).with_name("recordings")
VERSION = 1
FEWEST, MOST = 3, 30  # times that a step is run


@dataclass(frozen=True)
class Shape:
    """A step of requests that are all alike."""

    num_requests: int
    num_new: int  # tokens of each that the step computes
    num_stored: int  # tokens of each whose K and V it reads, the new ones among them

    @property
    def kind(self) -> str:
        return "prefill" if self.num_new == self.num_stored else "decode"

    @property
    def num_tokens(self) -> int:
        return self.num_requests * self.num_new


@dataclass(frozen=True)
class Step:
    """A shape, the work that the calculators find in it, and what it took."""

    shape: Shape
    flops: int
    weight_bytes: int
    kv_bytes: int
    floor_ms: float  # at the rates of the sweep's machine
    ms: float
    graph_ms: float | None
    busy: float | None  # percent; on a GPU only of the smallest and the largest steps
    graph_busy: float | None = None

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of weights, K and V."""
        return self.flops / self.num_bytes

    @property
    def best_s(self) -> float:
        """Seconds, without waiting for the host where that was timed."""
        return (self.ms if self.graph_ms is None else min(self.ms, self.graph_ms)) / 1e3


@dataclass(frozen=True)
class Sweep:
    """All steps of one model on one machine, whose roofs were measured in the same process."""

    model: str
    dtype: str
    machine: str
    bandwidth: float  # bytes/s
    flops_per_s: float
    steps: tuple[Step, ...]
    provenance: dict[str, object]

    def series(self, kind: str, num_stored: int | None = None) -> list[Step]:
        """Steps of a kind, for decode those of one context, by their number of tokens."""
        chosen = [s for s in self.steps if s.shape.kind == kind and num_stored in (None, s.shape.num_stored)]
        return sorted(chosen, key=lambda s: s.shape.num_tokens)

    def share_of_flops(self, step: Step) -> float:
        """Percent of the FLOP/s, of a step at its best."""
        return 100 * step.flops / step.best_s / self.flops_per_s


def save_sweeps(path: str | Path, sweeps: Sequence[Sweep]) -> Path:
    """Write a recording."""
    document = {"minivllm_forward_sweep": VERSION, "sweeps": [asdict(sweep) for sweep in sweeps]}
    return write_text(path, json.dumps(document, indent=1) + "\n", "sweep")


def load_sweeps(path: str | Path) -> list[Sweep]:
    """Read what `save_sweeps` wrote. Raises MiniVLLMError for anything else."""
    return read_text(path, _parsed, "sweep")


def shapes_of(most_tokens: int, most_requests: int, contexts: Sequence[int]) -> list[Shape]:
    """Prefills of 1, 2, 4 .. tokens; for each context, decodes of 1, 2, 4 .. requests that hold so many tokens."""
    prefills = [Shape(1, num, num) for num in _doublings(most_tokens)]
    return prefills + [Shape(num, 1, length) for length in contexts for num in _doublings(most_requests)]


def sweep(
    llm: LLM, machine: Accelerator, shapes: Sequence[Shape], *,
    budget_s: float = 0.5, with_graphs: bool = False, with_busy: bool = True, show_progress: bool = False,
) -> Sweep:  # fmt: skip
    """Time every shape on an idle engine: the median of up to 30 runs within `budget_s`, after two to warm up.

    A roof that a step goes beyond was measured too low, as happens on a machine that others use too: it is raised.
    """
    _fill_pool(llm, shapes)
    dtype, (rate,) = llm.model_config.dtype, machine.flops.values()
    work = ModelWork(find_model(llm.model, "dummy").config, dtype)
    most = {kind: max(s.num_tokens for s in shapes if s.kind == kind) for kind in {s.kind for s in shapes}}
    steps = []
    for shape in tqdm(shapes, desc=llm.model, disable=not show_progress):
        plan = plan_of(llm, shape)
        floor = work.floor([(shape.num_new, shape.num_stored)] * shape.num_requests, shape.num_requests, machine)
        run = partial(llm.runner.logits, plan)
        with llm.runner.by_modules():  # kernel by kernel, as eager code runs
            ms, busy = _timed(run, llm.device, budget_s)
        replay = captured(llm, plan) if with_graphs else None
        graph_ms = _timed(replay, llm.device, budget_s)[0] if replay else None
        graph_busy = None
        if llm.device == "cuda" and with_busy and shape.num_tokens in (1, most[shape.kind]):
            with llm.runner.by_modules():
                busy = nvidia_busy(run)
            graph_busy = nvidia_busy(replay) if replay else None
        work_done = floor.flops, floor.weight_bytes, floor.kv_bytes, floor.ms
        steps.append(Step(shape, *work_done, ms, graph_ms, busy, graph_busy))
    facts = provenance(llm.seed) | ({"gpu": torch.cuda.get_device_name()} if llm.device == "cuda" else {})
    bandwidth = max(machine.bandwidth, *(s.num_bytes / s.best_s for s in steps))
    rate = max(rate, *(s.flops / s.best_s for s in steps))
    floors = [1e3 * max(s.num_bytes / bandwidth, s.flops / rate) for s in steps]
    placed = tuple(replace(s, floor_ms=floor_ms) for s, floor_ms in zip(steps, floors, strict=True))
    return Sweep(llm.model, dtype, machine.name, bandwidth, rate, placed, facts)


def plan_of(llm: LLM, shape: Shape) -> StepPlan:
    """A step as the scheduler would plan it, with tokens, K and V drawn from the model's seed."""
    draw, params = random.Random(llm.seed), SamplingParams(temperature=0)
    size = blocks_needed(shape.num_stored, llm.config.block_size)
    scheduled = []
    for r in range(shape.num_requests):
        token_ids = draw.choices(range(llm.model_config.vocab_size), k=shape.num_stored)
        table = BlockTable(list(range(1 + r * size, 1 + (r + 1) * size)))
        request = Request(f"sweep {r}", token_ids, shape.num_stored, params, 1, tables=[table])
        request.num_computed = shape.num_stored - shape.num_new
        scheduled.append((request, shape.num_new))
    return StepPlan(0, scheduled, [], [])


def _fill_pool(llm: LLM, shapes: Sequence[Shape]) -> None:
    """Refuse what the pool cannot hold; then write noise into the blocks, for nobody reads zeros at an honest speed."""
    if len(llm.config.group_windows) > 1:
        raise ConfigError(f"{llm.model} keeps a block table for each group of layers; sweep a model whose layers agree")
    needed = max(s.num_requests * blocks_needed(s.num_stored, llm.config.block_size) for s in shapes)
    if needed >= llm.config.num_blocks:
        raise ConfigError(f"the sweep needs {needed} blocks; build the LLM with num_blocks={needed + 1} or more")
    if not llm.reset_prefix_cache():
        raise ConfigError("the sweep writes to the pool; finish or abort the requests that hold blocks first")
    generator = torch.Generator(llm.device).manual_seed(llm.seed)
    llm.storage.data[:, :, 1 : needed + 1].normal_(generator=generator)


def _timed(run: Callable[[], object], device: str, budget_s: float) -> tuple[float, float | None]:
    """The median in milliseconds; and on a CPU, the percent of the time in which the process's threads worked."""

    def once() -> tuple[float, float]:
        started_s, worked_s = perf_counter(), process_time()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started_s, process_time() - worked_s

    once(), once()
    times = [once() for _ in range(FEWEST)]
    while sum(wall_s for wall_s, _ in times) < budget_s and len(times) < MOST:
        times.append(once())
    wall_s, worked_s = (sum(column) for column in zip(*times, strict=True))
    busy = 100 * worked_s / wall_s / torch.get_num_threads() if device == "cpu" else None
    return 1e3 * median(wall_s for wall_s, _ in times), busy


def _doublings(most: int) -> list[int]:
    """_doublings(6) == [1, 2, 4]."""
    return [2**power for power in range(most.bit_length())]


def _parsed(text: str) -> list[Sweep]:
    try:
        document = json.loads(text)
        if document["minivllm_forward_sweep"] != VERSION:
            raise ValueError("another version")
        return [
            Sweep(**{**raw, "steps": tuple(Step(**{**step, "shape": Shape(**step["shape"])}) for step in raw["steps"])})
            for raw in document["sweeps"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise MiniVLLMError(f"not a sweep ({' '.join(str(error).split())[:200]}); record it again") from error


def main(argv: Sequence[str]) -> int:
    """Sweep each model in turn and write one file."""
    parser = argparse.ArgumentParser(prog="python -m minivllm.lab.forward_sweep", description=__doc__)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m"], help="one or more (%(default)s)")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=4096, help="of the longest prefill (%(default)s)")
    parser.add_argument("--requests", type=int, default=256, help="of the largest decode (%(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048], help="of decodes (%(default)s)")
    parser.add_argument("--graphs", action="store_true", help="also time every step as a CUDA graph")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds for each timing (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="write the recording to this JSON file")
    options = parser.parse_args(argv)
    if min(options.tokens, options.requests, min(options.contexts) - 1) < 1:
        raise ConfigError("--tokens and --requests must be above 0, --contexts above 1; give larger ones")
    shapes = shapes_of(options.tokens, options.requests, options.contexts)
    needed = max(s.num_requests * blocks_needed(s.num_stored, 16) for s in shapes)
    sweeps, machine = [], None
    for name in options.model:
        llm = LLM(
            name, load_format=options.load_format, dtype=options.dtype, device=options.device, num_blocks=needed + 1,
            enable_prefix_caching=False,
        )  # fmt: skip
        machine = machine or measured_roofs(llm.device, llm.model_config.dtype)
        sweeps.append(
            sweep(llm, machine, shapes, budget_s=options.budget, with_graphs=options.graphs, show_progress=True)
        )
        save_sweeps(options.output, sweeps)
        del llm
        torch.cuda.empty_cache()
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MiniVLLMError as error:
        sys.exit(f"forward_sweep: {error}")
