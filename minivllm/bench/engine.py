"""`minivllm bench engine`: our engine beside transformers, on the same weights, dtype and threads, in one run.

With --workload, our engine alone on the workloads of reference_workloads.py, against the floor of the machine; with
--ledger too, every step of one more repetition against its own floor, as a table and a picture.
Every figure is a ratio of times taken in turn within one process; the best of the repetitions counts for each side.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from minivllm.bench.reference_workloads import TEXTS, WORKLOADS, EngineChoice, Ledgers, measure
from minivllm.bench.rivals import load_rival, run_continuous, run_generate
from minivllm.engine.plan import StepPlan
from minivllm.errors import ConfigError
from minivllm.events import StepRan
from minivllm.lab.ledger_table import Steps
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import BlockTable, Request, SamplingParams
from minivllm.runner.batch import build_batches
from minivllm.text_files import write_text
from minivllm.trace import Trace
from minivllm.weights import find_model

Row = dict[str, object]
Draw = Callable[[Path, Mapping[str, Steps], str], Path]  # a picture of each workload's steps, and where they ran
NUM_NEW = 64  # tokens a request gets in the decode part
DECODE_BATCHES = (1, 8, 16)
PREFIX_TOKENS = 512
UNPRINTED = ("what", "unit", "ledger")  # columns that stand elsewhere


def main(argv: Sequence[str], ledger_drawing: Callable[[], Draw] | None = None) -> int:
    """Parse the command line, measure, print a table, write the result file.

    `ledger_drawing` gives the function that draws ledgers; it is asked for one before anything is measured.
    """
    parser = argparse.ArgumentParser(prog="minivllm bench engine", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default="decode,mixed,prefix,overhead", help="comma-separated, of these four")
    parser.add_argument("--workload", help="instead: comma-separated, of " + ", ".join((*WORKLOADS, *TEXTS)))
    parser.add_argument("--load-format", default="auto", help="with --workload: dummy for random weights")
    parser.add_argument("--block-size", type=int, default=16, help="with --workload")
    parser.add_argument("--enforce-eager", action="store_true", help="with --workload: no CUDA graphs")
    parser.add_argument("--ledger", type=Path, metavar="FILE.png", help="with --workload: draw each step and its floor")
    parser.add_argument("--output", type=Path, help="write the figures and their provenance to this JSON file")
    args = parser.parse_args(argv)
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        raise ConfigError(f"--parts: '{unknown.pop()}' is not one of {', '.join(PARTS)}")
    if args.threads < 1 or args.repeats < 1:
        raise ConfigError(f"--threads and --repeats must be at least 1, not {args.threads} and {args.repeats}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for option, path in (("--output", args.output), ("--ledger", args.ledger)):  # before minutes of measuring
        if path and not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{option}: {path.parent} is no folder that can be written; choose another")
    draw = _ledger_drawing(args, ledger_drawing) if args.ledger else None
    rows, ledgers = list[Row](), Ledgers() if draw else None
    if args.workload is not None:
        choice = EngineChoice(
            args.model, args.dtype, args.load_format, args.enforce_eager, block_size=args.block_size, seed=args.seed
        )
        rows = measure(args.workload.split(","), choice, args.repeats, ledgers)
    for part in [] if args.workload is not None else args.parts.split(","):
        rows += PARTS[part](args)
    _print_table(rows)
    if args.output:
        facts = {"provenance": provenance(args.seed), "rows": rows}
        write_text(args.output, json.dumps(facts, indent=1) + "\n", "figures")
    if draw and ledgers:
        print("\n".join(ledgers.lines))
        print(f"wrote {draw(args.ledger, ledgers.steps, f'{args.model}, {args.dtype}, {ledgers.machine}')}")
    return 0


def _ledger_drawing(args: argparse.Namespace, ledger_drawing: Callable[[], Draw] | None) -> Draw:
    """What --ledger needs, or a refusal."""
    if args.workload is None:
        raise ConfigError("--ledger: name what is to run, such as --workload nano")
    if args.ledger.suffix != ".png":
        raise ConfigError(f"--ledger: {args.ledger.name} must end in .png")
    if ledger_drawing is None:
        raise ConfigError("--ledger: only `minivllm bench engine` can draw; run that")
    return ledger_drawing()


def bench_decode(args: argparse.Namespace) -> list[Row]:
    """Decode tokens/s of ragged batches: the time of 64 new tokens less the time of the first."""
    llm = _engine(args, enable_prefix_caching=False)
    rival = load_rival(_folder(llm), args.dtype)
    rows: list[Row] = []
    for num_seqs in DECODE_BATCHES:
        prompts = _prompts(num_seqs, 64, 192, args.seed)
        lengths = {"first": [1] * num_seqs, "all": [NUM_NEW] * num_seqs}
        best = _interleave(
            f"decode, {num_seqs} requests", args.repeats,
            {
                **{f"ours {k}": _ours(llm, prompts, n) for k, n in lengths.items()},
                **{f"generate {k}": _rival(rival, prompts, n, num_seqs) for k, n in lengths.items()},
                **{f"continuous {k}": _continuous(rival, prompts, n) for k, n in lengths.items()},
            },
        )  # fmt: skip
        speeds = {
            who: num_seqs * (NUM_NEW - 1) / (best[f"{who} all"] - best[f"{who} first"])
            for who in ("ours", "generate", "continuous")
        }
        rows.append(_compared(f"decode, {num_seqs} requests", "tokens/s", speeds))
    return rows


def bench_mixed(args: argparse.Namespace) -> list[Row]:
    """End to end on 32 requests of mixed lengths: static batches pad, the engine does not."""
    llm = _engine(args, enable_prefix_caching=False)
    rival = load_rival(_folder(llm), args.dtype)
    prompts, random = _prompts(32, 16, 256, args.seed), Random(args.seed + 1)
    num_new = [random.randint(8, 128) for _ in prompts]
    best = _interleave(
        "32 mixed requests", args.repeats,
        {
            "ours": _ours(llm, prompts, num_new),
            "generate batch 8": _rival(rival, prompts, num_new, 8),
            "generate batch 16": _rival(rival, prompts, num_new, 16),
            "generate batch 32": _rival(rival, prompts, num_new, 32),
            "continuous": _continuous(rival, prompts, num_new),
        },
    )  # fmt: skip
    speeds = {who: sum(num_new) / seconds for who, seconds in best.items()}
    return [_compared("end to end, 32 requests of mixed lengths", "tokens/s", speeds)]


def bench_prefix(args: argparse.Namespace) -> list[Row]:
    """Time to first token behind a shared prefix of 512 tokens, cold and warm."""
    llm = _engine(args, enable_prefix_caching=True)
    prefix, tails = _prompts(1, PREFIX_TOKENS, PREFIX_TOKENS, args.seed)[0], _prompts(2, 32, 32, args.seed + 1)

    def first_token(tail: Sequence[int], is_warm: bool) -> float:
        llm.reset_prefix_cache()
        if is_warm:
            llm.generate([list(prefix)], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        output = llm.generate([[*prefix, *tail]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)[0]
        assert output.num_cached_tokens == (PREFIX_TOKENS if is_warm else 0)
        assert output.metrics.time_to_first_token is not None
        return output.metrics.time_to_first_token

    runs = [(first_token(tails[0], False), first_token(tails[1], True)) for _ in range(args.repeats + 1)]
    cold_s, warm_s = (min(times) for times in zip(*runs, strict=True))
    row: Row = {"what": f"time to first token, {PREFIX_TOKENS} shared + 32 own tokens", "unit": "ms"}
    return [
        row | {"cold": round(cold_s * 1e3, 1), "warm": round(warm_s * 1e3, 1), "warm / cold": round(warm_s / cold_s, 3)}
    ]


def bench_overhead(args: argparse.Namespace) -> list[Row]:
    """What a decode step of 16 requests spends outside the model, and what recording it costs."""
    llm = _engine(args, enable_prefix_caching=True)
    prompts = _prompts(16, 64, 192, args.seed)
    trace = Trace()
    run = _ours(llm, prompts, [NUM_NEW] * 16)

    def recorded() -> float:
        trace.events.clear()
        stop = llm.events.listen(trace)
        seconds = run()
        stop()
        return seconds

    best = _interleave("overhead", args.repeats, {"silent": run, "recorded": recorded})
    steps = [event for event in trace if isinstance(event, StepRan) and len(event.scheduled) == 16][1:]
    median = {
        name: sorted(getattr(s, name) for s in steps)[len(steps) // 2]
        for name in ("schedule_ms", "run_ms", "update_ms")
    }
    batch_ms = _time_batches(llm)
    row: Row = {"what": "decode step of 16 requests", "unit": "ms (median)"}
    row |= {name.removesuffix("_ms"): round(value, 3) for name, value in median.items()}
    row |= {
        "of run: batch tensors": round(batch_ms, 3),
        "recording, share of run": round(best["recorded"] / best["silent"] - 1, 4),
    }
    return [row]


def _time_batches(llm: LLM) -> float:
    """Milliseconds to turn a 16-request decode plan into tensors."""
    requests = [
        Request(str(i), [0] * 200, 199, SamplingParams(), 1, num_computed=199, tables=[BlockTable([*range(1, 14)])])
        for i in range(16)
    ]
    plan = StepPlan(1, [(request, 1) for request in requests], [], [])
    started_s = time.perf_counter()
    for _ in range(200):
        build_batches(plan, llm.config.block_size, llm.device)
    return (time.perf_counter() - started_s) / 200 * 1e3


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "decode": bench_decode,
    "mixed": bench_mixed,
    "prefix": bench_prefix,
    "overhead": bench_overhead,
}


def _engine(args: argparse.Namespace, enable_prefix_caching: bool) -> LLM:
    return LLM(args.model, dtype=args.dtype, enable_prefix_caching=enable_prefix_caching, seed=args.seed)


def _folder(llm: LLM) -> Path:
    folder = find_model(llm.model).folder
    assert folder is not None, "a benchmark beside transformers needs weights on disk"
    return folder


def _prompts(num_prompts: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    random = Random(seed)
    return [[random.randint(100, 40_000) for _ in range(random.randint(shortest, longest))] for _ in range(num_prompts)]


def _ours(llm: LLM, prompts: list[list[int]], num_new: Sequence[int]) -> Callable[[], float]:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in num_new]

    def run() -> float:
        llm.reset_prefix_cache()
        started_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == sum(num_new)
        return time.perf_counter() - started_s

    return run


def _rival(
    model: PreTrainedModel, prompts: list[list[int]], num_new: Sequence[int], batch_size: int
) -> Callable[[], float]:
    return lambda: run_generate(model, prompts, num_new, batch_size)


def _continuous(model: PreTrainedModel, prompts: list[list[int]], num_new: Sequence[int]) -> Callable[[], float]:
    return lambda: run_continuous(model, prompts, num_new, budget=2048)


def _interleave(title: str, repeats: int, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Run each in turn, `repeats` times after one round to warm up; the best seconds of each."""
    best: dict[str, float] = {}
    for repeat in tqdm(range(repeats + 1), desc=title):
        for name, run in runs.items():
            seconds = run()
            if repeat > 0:
                best[name] = min(seconds, best.get(name, seconds))
    return best


def _compared(what: str, unit: str, speeds: dict[str, float]) -> Row:
    best_generate = max(speed for who, speed in speeds.items() if who.startswith("generate"))
    return {
        "what": what, "unit": unit, **{who: round(speed, 1) for who, speed in speeds.items()},
        "ours / generate": round(speeds["ours"] / best_generate, 2),
        "ours / continuous": round(speeds["ours"] / speeds["continuous"], 2),
    }  # fmt: skip


def _print_table(rows: list[Row]) -> None:
    for row in rows:
        print(f"{row['what']} [{row['unit']}]")
        print("   " + "   ".join(f"{name}: {value}" for name, value in row.items() if name not in UNPRINTED))
