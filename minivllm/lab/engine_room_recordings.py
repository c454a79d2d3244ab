"""Runs of the engine room that others may look at again: what is played, one script that makes them, their files.

`python -m minivllm.lab.engine_room_recordings` records the three runs of a GPU; `--only smollm2_cpu` that of a CPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from minivllm.course.engine_frames import EngineRun, Load
from minivllm.errors import ConfigError
from minivllm.lab.engine_room import EngineRoom
from minivllm.lab.ledger import keep_ledger
from minivllm.lab.room_load import nearest
from minivllm.llm import LLM

FOLDER = Path(__file__).with_name("recordings")
MOST_BYTES = 300_000
WARM_UP_S = 3.0  # kernels are compiled and caches filled before what counts
Move = tuple[float, str, float]  # after this share of the time a slider is set


@dataclass(frozen=True)
class Script:
    """A run: the engine, the load it begins with, and how sliders are moved."""

    name: str
    title: str
    model: str
    load: Load
    moves: tuple[Move, ...]
    num_blocks: int
    max_model_len: int
    load_format: str = "auto"


SCRIPTS = (
    Script(
        "room_smollm2_h200", "SmolLM2-135M on real text, H200", "smollm2-135m",
        Load(rate=32, prompt_tokens=256, output_tokens=128),
        ((0.2, "shared_tokens", 256), (0.4, "rate", 128), (0.55, "batch_limit", 32), (0.75, "batch_limit", 256),
         (0.9, "rate", 16)),
        num_blocks=8192, max_model_len=2048,
    ),
    Script(
        "room_qwen3_0.6b_h200", "shape of Qwen3-0.6B, random weights, H200", "qwen3-0.6b",
        Load(rate=32, prompt_tokens=512, output_tokens=128),
        ((0.2, "rate", 128), (0.4, "token_budget", 512), (0.55, "token_budget", 2048), (0.65, "prompt_tokens", 1024),
         (0.85, "rate", 16)),
        load_format="dummy", num_blocks=4096, max_model_len=4096,
    ),
    Script(
        "room_qwen3_8b_h200", "shape of Qwen3-8B, random weights, H200", "qwen3-8b",
        Load(rate=8, prompt_tokens=512, output_tokens=128),
        ((0.2, "rate", 32), (0.4, "shared_tokens", 512), (0.55, "batch_limit", 16), (0.75, "batch_limit", 256),
         (0.85, "rate", 4)),
        load_format="dummy", num_blocks=3072, max_model_len=4096,
    ),
    Script(
        "room_smollm2_cpu", "SmolLM2-135M on real text, CPU", "smollm2-135m",
        Load(rate=1, prompt_tokens=32, output_tokens=16),
        ((0.2, "shared_tokens", 64), (0.4, "rate", 4), (0.55, "batch_limit", 2), (0.75, "batch_limit", 256),
         (0.85, "rate", 2)),
        num_blocks=256, max_model_len=512,
    ),
)  # fmt: skip


def recordings() -> dict[str, EngineRun]:
    """By title, the runs that were recorded, those of a GPU first."""
    paths = {script.title: FOLDER / f"{script.name}.json" for script in SCRIPTS}
    return {title: EngineRun.load(path) for title, path in paths.items() if path.exists()}


def record(
    script: Script, seconds: float, *, seed: int = 0, rate_factor: float = 1.0, warm_up_s: float = WARM_UP_S
) -> EngineRun:
    """Play a script on this machine, on the wall clock. `rate_factor` suits its rates to another machine."""
    llm = LLM(
        script.model, load_format=script.load_format, seed=seed, show_progress=False, num_blocks=script.num_blocks,
        max_model_len=script.max_model_len,
    )  # fmt: skip
    room = EngineRoom(llm, script.load.changed("rate", script.load.rate * rate_factor), seed=seed)
    with closing(room), keep_ledger(llm):
        for play_s in (warm_up_s, seconds):
            room.reset()
            room.ask("start")
            _move(room, script.moves if play_s == seconds else (), play_s, rate_factor)
            room.stop()
            if room.failure:
                raise ConfigError(f"{script.name}: {room.failure}")
        run = room.recorded()
    return EngineRun({**run.header, "title": script.title, "seconds": seconds, "machine": _machine(llm)}, run.frames)


def _move(room: EngineRoom, moves: Sequence[Move], seconds: float, rate_factor: float) -> None:
    """Set the sliders when it is time for each, and return at the end."""
    started_s = time.monotonic()
    for share, setting, value in (*moves, (1.0, "", 0.0)):
        time.sleep(max(0.0, started_s + share * seconds - time.monotonic()))
        if setting:
            wanted = value * rate_factor if setting == "rate" else value
            room.ask(setting, nearest(room.choices[setting], wanted))


def _machine(llm: LLM) -> str:
    return torch.cuda.get_device_name() if llm.device == "cuda" else str(llm.trace_header()["machine"])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivllm.lab.engine_room_recordings", description=__doc__)
    names = [script.name for script in SCRIPTS]
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(names)}; what is after room_ will do")
    parser.add_argument("--seconds", type=float, default=24.0, help="of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate-factor", type=float, default=1.0, help="for a slower machine: all rates times this")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go")
    args = parser.parse_args(argv)
    wanted = [f"room_{name.removeprefix('room_')}" for name in (args.only or "").split(",") if name]
    if unknown := [name for name in wanted if name not in names]:
        raise ConfigError(f"--only: {unknown[0]!r} is not one of {', '.join(names)}")
    for script in SCRIPTS:
        if script.name in (wanted or names[:3]):
            run = record(script, args.seconds, seed=args.seed, rate_factor=args.rate_factor)
            path = run.save(args.folder / f"{script.name}.json")
            last = run.frames[-1]
            print(f"{path.name}: {path.stat().st_size:,} bytes, {len(run.frames)} frames, {last.steps} steps, "
                  f"{last.output_tokens} tokens, {last.preemptions} preemptions, {last.refused} refused")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
