"""`minivllm bench speculation`: speed with drafts against speed without, in one run.

On a CPU: a single greedy request of SmolLM2 on prompts that ask for a copy with an edit or for a summary
(speculation_prompts.py), each method against "off" in the same engine, repetitions in turn, the best of each. With
--planted, on a GPU: see planted_speed.py.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from minivllm.bench.planted_speed import BATCHES, Load, Row, measure_planted
from minivllm.bench.speculation_prompts import PROMPTS
from minivllm.errors import ConfigError
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import SamplingParams
from minivllm.runner.proposers import DRAFT_NAME
from minivllm.speculative_config import OFF
from minivllm.text_files import write_text


def main(argv: Sequence[str]) -> int:
    """Parse the command line, measure, print, write the result file."""
    parser = argparse.ArgumentParser(prog="minivllm bench speculation", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="with --planted: comma-separated")
    parser.add_argument(
        "--methods", default="ngram", help="comma-separated, of speculative_config's; eagle:4 sets the draft length"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-speculative-tokens", type=int, default=None, help="default: 8; with --planted 4")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--planted", action="store_true", help="a GPU, random weights, acceptance as one likes")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="with --planted")
    parser.add_argument("--output", type=Path, help="write the figures and their provenance to this JSON file")
    args = parser.parse_args(argv)
    if args.planted and not torch.cuda.is_available():
        raise ConfigError("--planted needs a CUDA device: a CPU only interprets the kernels")
    if args.output and not os.access(args.output.parent, os.W_OK):  # before minutes of measuring
        raise ConfigError(f"--output: {args.output.parent} is no folder that can be written; choose another")
    rows = list[Row]()
    if args.planted:
        batches, length = tuple(map(int, args.batches.split(","))), args.num_speculative_tokens or 4
        for model in args.model.split(","):
            load = Load(model, batches, num_drafts=length, repeats=args.repeats, seed=args.seed, dtype=args.dtype)
            rows += measure_planted(load)
            save(args, rows)  # of each model as soon as it is there
    else:
        rows = measure_edits(args)
        save(args, rows)
        print(*means(rows), sep="\n")
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))
    return 0


def save(args: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Write the file that was asked for: one line a row."""
    if args.output:
        facts = provenance(args.seed) | ({"gpu": torch.cuda.get_device_name()} if args.planted else {})
        lines = ",\n ".join(json.dumps(row) for row in rows)
        text = json.dumps({"provenance": facts}, indent=1)[:-2] + f',\n "rows": [\n {lines}\n ]\n}}\n'
        write_text(args.output, text, "figures")


def measure_edits(args: argparse.Namespace) -> list[Row]:
    """A row for each prompt and method."""
    drafts = [method_and_length(entry, args.num_speculative_tokens or 8) for entry in args.methods.split(",")]
    longest = {method: max(length for other, length in drafts if other == method) for method, _ in drafts}
    configs = [
        {"method": method, "num_speculative_tokens": length}
        | ({"model": DRAFT_NAME} if method == "draft_model" else {})
        for method, length in longest.items()
    ]
    llm = LLM(
        args.model, dtype=args.dtype, max_num_seqs=1, seed=args.seed, enable_prefix_caching=False,
        speculative_config=configs, show_progress=False,
    )  # fmt: skip
    rows = list[Row]()
    for name, (kind, prompt) in tqdm(PROMPTS.items(), "prompts", disable=None):
        best: dict[tuple[str, int], tuple[float, int, int]] = {}
        for repeat in range(args.repeats + 1):
            for draft in ((OFF, 0), *drafts):
                found = answer(llm, prompt, *draft, args.max_tokens)
                if repeat > 0:  # the first warms up
                    best[draft] = max(found, best.get(draft, found))
        off_tokens_per_s = best[OFF, 0][0]
        for method, length in drafts:
            tokens_per_s, num_accepted, num_tokens = best[method, length]
            rows.append({
                "model": args.model, "prompt": name, "kind": kind, "batch": 1, "draft_length": length,
                "planted_alpha": None, "method": method, "tokens_per_s_on": round(tokens_per_s, 1),
                "tokens_per_s_off": round(off_tokens_per_s, 1),
                "speedup": round(tokens_per_s / off_tokens_per_s, 3), "formula_speedup": None,
                "tokens_per_step": round((num_tokens - 1) / max(1, num_tokens - 1 - num_accepted), 3),
                "num_tokens": num_tokens,
            })  # fmt: skip
    return rows


def method_and_length(entry: str, default: int) -> tuple[str, int]:
    """("eagle", 4) for "eagle:4"; the default where no length is given."""
    method, _, length = entry.partition(":")
    if length and not length.isdecimal():
        raise ConfigError(f"--methods: {entry!r} has no draft length behind the colon; say {method}:4")
    return method, int(length or default)


def means(rows: Sequence[Row]) -> list[str]:
    """A line for each method and kind of prompt: tokens over steps of all answers, and the geometric mean speed-up."""
    lines = list[str]()
    for key in dict.fromkeys((row["method"], row["draft_length"], row["kind"]) for row in rows):
        part = [row for row in rows if (row["method"], row["draft_length"], row["kind"]) == key]
        tokens = sum(row["num_tokens"] - 1 for row in part)
        steps = sum((row["num_tokens"] - 1) / row["tokens_per_step"] for row in part)
        speedup = statistics.geometric_mean(row["speedup"] for row in part)
        lines.append(f"{key[0]}:{key[1]} {key[2]}: {tokens / steps:.2f} tokens a step, {speedup:.2f}x")
    return lines


def answer(llm: LLM, prompt: str, method: str, length: int, max_tokens: int) -> tuple[float, int, int]:
    """Tokens per second behind the first one, how many of them were accepted drafts, and how many tokens came."""
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, speculative_method=method, num_speculative_tokens=length
    )
    accepted = llm.engine.speculation.num_accepted
    started_s = time.perf_counter()
    [output] = llm.chat([{"role": "user", "content": prompt}], params, use_tqdm=False)
    seconds = time.perf_counter() - started_s - (output.metrics.time_to_first_token or 0.0)
    num_tokens = len(output.outputs[0].token_ids)
    return (num_tokens - 1) / seconds, llm.engine.speculation.num_accepted - accepted, num_tokens
