"""`minivllm bench policies`: what the engine's policies cost: scheduling, prefix caches, swap beside recompute."""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import torch
from tqdm import tqdm

from minivllm.engine.cache_study import measure_radix
from minivllm.engine.engine import Engine
from minivllm.engine.plan import Move, StepPlan, Transfer
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError
from minivllm.events import StepRan
from minivllm.lab.fake_runner import SilentRunner
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import Request, SamplingParams
from minivllm.text_files import write_text

Row = dict[str, object]
NUM_RUNNING = 512
VOCAB = range(100, 40_000)
CONTEXTS = (128, 512, 1024)  # tokens of the request that is preempted


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, print a table, write the result file."""
    parser = argparse.ArgumentParser(prog="minivllm bench policies", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures and their provenance to this JSON file")
    args = parser.parse_args(argv)
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        raise ConfigError(f"--parts: '{unknown.pop()}' is not one of {', '.join(PARTS)}")
    if args.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, not {args.repeats}")
    if args.output and not os.access(args.output.parent, os.W_OK):  # before minutes of measuring
        raise ConfigError(f"--output: {args.output.parent} is no folder that can be written; choose another")
    rows: list[Row] = []
    for part in args.parts.split(","):
        rows += PARTS[part](args)
    for row in rows:
        figures = ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("what", "unit"))
        print(f"{row['what']} [{row['unit']}]: {figures}")
    if args.output:
        facts = {"provenance": provenance(args.seed), "rows": rows}
        write_text(args.output, json.dumps(facts, indent=1) + "\n", "figures")
    return 0


def bench_schedule(args: argparse.Namespace) -> list[Row]:
    """Time to schedule 512 decoding requests, whose lengths differ, so that some need a block in every step."""
    rows: list[Row] = []
    for policy in ("fcfs", "priority", "longest_prefix_first"):
        config = EngineConfig(
            num_blocks=20_000, max_num_seqs=NUM_RUNNING, max_num_batched_tokens=100_000, scheduling_policy=policy
        )
        engine, random = Engine(config, SilentRunner()), Random(args.seed)
        for number in range(2 * NUM_RUNNING):  # half of them wait
            prompt = [number] * random.randint(50, 150)
            params = SamplingParams(ignore_eos=True)
            engine.add(Request(str(number), prompt, len(prompt), params, max_tokens=1000, priority=number % 3))
        engine.step()
        times_ms = sorted(_timed_ms(engine.scheduler.schedule, engine) for _ in range(200))
        figures = {"median": times_ms[100], "p99": times_ms[198]}
        rows.append(
            {"what": f"schedule {NUM_RUNNING} running requests, {NUM_RUNNING} waiting, {policy}", "unit": "ms"}
            | {name: round(value, 3) for name, value in figures.items()}
        )
    return rows


def _timed_ms(schedule: Callable[[], StepPlan], engine: Engine) -> float:
    started_s = time.perf_counter()
    plan = schedule()
    elapsed_ms = (time.perf_counter() - started_s) * 1e3
    engine.scheduler.update(plan, engine.runner.run(plan))
    return elapsed_ms


def bench_radix(args: argparse.Namespace) -> list[Row]:
    """A prompt of 8,000 tokens looked up in a tree of 100,000 blocks."""
    costs = asdict(measure_radix())
    row: Row = {"what": "radix tree of 100,000 blocks, prompts of 8,000 tokens", "unit": "as named"}
    return [row | {name: round(value, 3) for name, value in costs.items()}]


def bench_cache(args: argparse.Namespace) -> list[Row]:
    """What a prefix cache costs where nothing is shared: the engine's own time, as a share of the whole step."""
    random = Random(args.seed)
    prompts = [[random.choice(VOCAB) for _ in range(random.randint(64, 192))] for _ in range(16)]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    own_ms: dict[str, list[float]] = {"off": [], "hash": [], "radix": []}
    whole_ms: list[float] = []
    llms = {
        kind: LLM(
            args.model, dtype=args.dtype, enable_prefix_caching=kind != "off", prefix_cache=kind.replace("off", "hash")
        )
        for kind in own_ms
    }
    for _ in tqdm(range(args.repeats + 1), desc="prefix cache, nothing shared"):
        for kind, llm in llms.items():
            with llm.record() as trace:
                llm.generate(prompts, params, use_tqdm=False)
            llm.reset_prefix_cache()
            steps = [event for event in trace if isinstance(event, StepRan)]
            own_ms[kind].append(sum(step.schedule_ms + step.update_ms for step in steps) / len(steps))
            whole_ms.append(sum(step.schedule_ms + step.run_ms + step.update_ms for step in steps) / len(steps))
    step_ms, base_ms = median(whole_ms), min(own_ms["off"][1:])
    shares = {
        f"{kind}, share of a step": round((min(own_ms[kind][1:]) - base_ms) / step_ms, 5) for kind in ("hash", "radix")
    }
    row: Row = {"what": "prefix cache on, 16 requests that share nothing, beside off", "unit": "share; step in ms"}
    return [row | shares | {"step": round(step_ms, 2)}]


def bench_preemption(args: argparse.Namespace) -> list[Row]:
    """A preempted request's way back: its blocks out and in again, beside computing its tokens once more."""
    llm = LLM(args.model, dtype=args.dtype, preemption_mode="swap", swap_space=0.25, enable_prefix_caching=False)
    params, random, rows = SamplingParams(temperature=0, max_tokens=1), Random(args.seed), list[Row]()
    for num_tokens in CONTEXTS:
        prompt = [random.choice(VOCAB) for _ in range(num_tokens)]
        ids = range(1, 1 + -(-num_tokens // llm.config.block_size))
        moves = {
            move: [Transfer(move, block_id, block_id) for block_id in ids] for move in (Move.SWAP_OUT, Move.SWAP_IN)
        }
        times_ms: dict[str, list[float]] = {"swap out": [], "swap in": [], "recompute": []}
        for _ in range(args.repeats + 1):
            for name, move in (("swap out", Move.SWAP_OUT), ("swap in", Move.SWAP_IN)):
                times_ms[name].append(_elapsed_ms(llm, partial(llm.storage.move, moves[move])))
            times_ms["recompute"].append(_elapsed_ms(llm, partial(llm.generate, prompt, params, use_tqdm=False)))
        best = {name: min(times[1:]) for name, times in times_ms.items()}
        num_bytes = len(ids) * llm.storage.num_bytes // llm.config.num_blocks
        row: Row = {"what": f"preempt {num_tokens} tokens ({num_bytes / 1e6:.1f} MB) and come back", "unit": "ms"}
        figures = {name: round(value, 2) for name, value in best.items()}
        rows.append(
            row | figures | {"swap / recompute": round((best["swap out"] + best["swap in"]) / best["recompute"], 3)}
        )
    return rows


def _elapsed_ms(llm: LLM, act: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    act()
    if llm.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started_s) * 1e3


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "schedule": bench_schedule,
    "radix": bench_radix,
    "cache": bench_cache,
    "preemption": bench_preemption,
}
