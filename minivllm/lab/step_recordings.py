"""Runs of a real model, measured step by step: which are played, how they are measured, and their files.

Only the counts and the time of each step are kept, and what each request met with. The runs of TRAINING are what a
cost model is fitted to; those of HELD_OUT, at other rates and lengths, are what its simulations are compared with.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
from tqdm.auto import tqdm

from minivllm.engine.engine import Engine
from minivllm.engine.plan import Runner, StepPlan, StepResult
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.cost_model import Features, Machine, Sample, features_of
from minivllm.lab.played import Played
from minivllm.lab.player import Clock, CpuClock, WallClock, play
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.text_files import write_text
from minivllm.workloads import Workload, open_loop, poisson, uniform

RECORDINGS = Path(__file__).with_name("recordings")
CLOCKS: dict[str, Callable[[], Clock]] = {"cpu": CpuClock, "wall": WallClock}


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A workload of Poisson arrivals with even lengths, and the engine that serves it."""

    name: str
    num_requests: int
    least: int  # tokens of prompts and of outputs
    most: int
    rate_per_s: float
    seed: int
    num_blocks: int = 600
    max_num_batched_tokens: int = 512
    num_host_blocks: int = 0  # any: preemption by swap

    def workload(self) -> Workload:
        lengths, arrivals = uniform(self.least, self.most), poisson(self.rate_per_s)
        return open_loop(self.num_requests, lengths, arrivals, seed=self.seed, vocab=range(256))  # any model has these

    def config(self) -> EngineConfig:
        return EngineConfig(
            num_blocks=self.num_blocks, max_model_len=512, max_num_seqs=16, num_host_blocks=self.num_host_blocks,
            max_num_batched_tokens=self.max_num_batched_tokens,
            preemption_mode="swap" if self.num_host_blocks else "recompute",
        )  # fmt: skip


WARM_UP = RunSpec("warm_up", 4, 20, 60, 4.0, 0)
# In the order of measuring: a machine whose speed drifts must not favour one of the two kinds.
RUNS = (
    RunSpec("calm", 16, 20, 250, 0.5, 1),
    RunSpec("slow", 20, 30, 180, 0.8, 7),
    RunSpec("held_out_slow", 18, 40, 160, 0.7, 11),
    RunSpec("steady", 24, 20, 200, 1.0, 2),
    RunSpec("busy", 30, 20, 250, 2.5, 3),
    RunSpec("held_out_fast", 28, 40, 160, 1.4, 12),
    RunSpec("all_at_once", 32, 20, 250, 1e6, 4),
    RunSpec("fast", 28, 30, 180, 1.7, 8),
    RunSpec("small_chunks", 20, 20, 250, 2.0, 5, max_num_batched_tokens=96),
    RunSpec("held_out_fast_again", 28, 40, 160, 1.4, 12),  # how far two recordings of one run differ: the noise
    RunSpec("small_pool", 20, 20, 200, 3.0, 6, num_blocks=80, num_host_blocks=64),
)
HELD_OUT = tuple(spec for spec in RUNS if spec.name.startswith("held_out"))
TRAINING = tuple(spec for spec in RUNS if spec not in HELD_OUT)


@dataclass(frozen=True)
class Recording:
    """One measured run."""

    spec: RunSpec
    samples: tuple[Sample, ...]
    played: Played
    machine: Machine
    provenance: dict[str, object]

    VERSION: ClassVar[int] = 1

    @property
    def is_held_out(self) -> bool:
        return self.spec.name in {spec.name for spec in HELD_OUT}

    def save(self, folder: Path) -> Path:
        """Write folder/NAME.json: the names of the counts once, then a short list for each step."""
        document = {
            "minivllm_recording": self.VERSION, "provenance": self.provenance, "machine": asdict(self.machine),
            "spec": asdict(self.spec), "fields": [*(field.name for field in fields(Features)), "ms"],
            "steps": [[*astuple(sample.features), round(sample.ms, 3)] for sample in self.samples],
            "played": json.loads(self.played.to_json()),
        }  # fmt: skip
        text = json.dumps(document, separators=(",", ":")) + "\n"
        return write_text(folder / f"{self.spec.name}.json", text, "recording")

    @staticmethod
    def load(path: Path) -> "Recording":
        """Read what `save` wrote. Raises MiniVLLMError for anything else."""
        try:
            document = json.loads(path.read_text())
            if document["minivllm_recording"] != Recording.VERSION:
                raise ValueError("another version")
            if document["fields"] != [*(field.name for field in fields(Features)), "ms"]:
                raise ValueError("other counts")
            samples = tuple(Sample(Features(*row[:-1]), row[-1]) for row in document["steps"])
            spec, machine = RunSpec(**document["spec"]), Machine(**document["machine"])
            played = Played.from_json(json.dumps(document["played"]))
            return Recording(spec, samples, played, machine, document["provenance"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = " ".join(str(error).split())[:200]
            raise MiniVLLMError(f"{path}: not a recording ({text}); record it again with study(record=True)") from error


def load_recordings(folder: Path = RECORDINGS) -> list[Recording]:
    """All RUNS, in that order."""
    return [Recording.load(folder / f"{spec.name}.json") for spec in RUNS]


class StepCounter:
    """A runner that notes what it is asked to do before the real one does it."""

    def __init__(self, runner: Runner, block_size: int) -> None:
        self.runner = runner
        self.block_size = block_size
        self.features: list[Features] = []

    def run(self, plan: StepPlan) -> StepResult:
        self.features.append(features_of(plan, self.block_size))
        return self.runner.run(plan)


def record_runs(
    folder: Path = RECORDINGS, specs: Sequence[RunSpec] = RUNS, *,
    model: str = "smollm2-135m", clock: str = "cpu", num_threads: int = 1, load_format: str = "auto",
) -> list[Path]:  # fmt: skip
    """Play the runs on a real model on the CPU and, when all are done, save one file for each; minutes.

    clock="cpu" counts the time that this process computes, so that a machine may be shared; it takes one thread.
    clock="wall" is for a quiet machine. Raises ConfigError for other clocks, and for more threads than that.
    """
    if clock not in CLOCKS:
        raise ConfigError(f"clock must be one of {', '.join(CLOCKS)}, not {clock!r}")
    if clock == "cpu" and num_threads != 1:
        raise ConfigError(f"clock='cpu' adds up what all {num_threads} threads compute: use 1 thread or clock='wall'")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return _record(folder, specs, model, clock, load_format)
    finally:
        torch.set_num_threads(threads_before)


def _record(folder: Path, specs: Sequence[RunSpec], model: str, clock: str, load_format: str) -> list[Path]:
    most_blocks = max(spec.num_blocks for spec in specs)
    llm = LLM(model, device="cpu", num_blocks=most_blocks, max_model_len=512, swap_space=0.05, load_format=load_format)
    if llm.config.num_host_blocks < max(spec.num_host_blocks for spec in specs):
        raise ConfigError(f"{model}: blocks are too large for the {llm.config.num_host_blocks} host blocks of the runs")
    machine = measure_machine(getattr(torch, llm.model_config.dtype), CLOCKS[clock]())
    facts = provenance(llm.seed) | {"model": llm.model, "dtype": llm.model_config.dtype, "clock": clock}
    _play(WARM_UP, llm.runner, CLOCKS[clock]())
    recordings = []
    for spec in tqdm(specs, desc="recording"):
        samples, played = _play(spec, llm.runner, CLOCKS[clock]())
        load = round(os.getloadavg()[0], 1)  # processes that wanted to run: on a shared machine, the noise
        recordings.append(Recording(spec, samples, played, machine, facts | {"load_average": load}))
    return [recording.save(folder) for recording in recordings]


def _play(spec: RunSpec, runner: Runner, clock: Clock) -> tuple[tuple[Sample, ...], Played]:
    config = spec.config()
    counter = StepCounter(runner, config.block_size)
    played = play(spec.workload(), Engine(config, counter, clock=clock), clock, show_progress=False)
    samples = zip(counter.features, played.step_s, strict=True)
    return tuple(Sample(features, seconds * 1e3) for features, seconds in samples), played


def measure_machine(dtype: torch.dtype, clock: Clock) -> Machine:
    """The roofs that this process reaches: the best of ten copies of 64 MiB, and of ten products of 1024 x 1024."""
    source = torch.ones(2**26, dtype=torch.uint8)
    target, square = torch.empty_like(source), torch.ones(1024, 1024).to(dtype)
    copy_s = min(_seconds(lambda: target.copy_(source), clock) for _ in range(10))
    product_s = min(_seconds(lambda: square @ square, clock) for _ in range(10))
    name = f"{provenance(0)['machine']}, {torch.get_num_threads()} threads"
    return Machine(name, round(2 * source.nbytes / copy_s / 1e9, 2), round(2 * 1024**3 / product_s / 1e12, 4))


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    started_s = clock()
    run()
    return clock() - started_s
