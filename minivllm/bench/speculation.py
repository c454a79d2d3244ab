"""`minivllm bench speculation`: speed with drafts against speed without, in one run.

Greedy requests of SmolLM2 on prompts that ask for a copy with an edit or for a summary (speculation_prompts.py), each
method in an engine of its own against one without drafts, repetitions in turn, the best of each; a batch is the same
prompt so many times. With --planted, on a GPU: see planted_speed.py.
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

from minivllm.bench.planted_speed import BATCHES, BLOCK_SIZE, Load, Row, measure_planted
from minivllm.bench.speculation_prompts import PROMPTS
from minivllm.errors import ConfigError
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import SamplingParams
from minivllm.runner.proposers import DRAFT_NAME
from minivllm.speculative_config import OFF
from minivllm.text_files import write_text

MAX_MODEL_LEN = 1024  # the longest prompt and its answer take half of it


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
    planted_batches = ",".join(map(str, BATCHES))
    parser.add_argument(
        "--batches", help=f"requests at once, comma-separated; default: 1; with --planted {planted_batches}"
    )
    parser.add_argument("--output", type=Path, help="write the figures and their provenance to this JSON file")
    args = parser.parse_args(argv)
    if args.planted and not torch.cuda.is_available():
        raise ConfigError("--planted needs a CUDA device: a CPU only interprets the kernels")
    if args.output and not os.access(args.output.parent, os.W_OK):  # before minutes of measuring
        raise ConfigError(f"--output: {args.output.parent} is no folder that can be written; choose another")
    for option, value, least in (("--repeats", args.repeats, 1), ("--max-tokens", args.max_tokens, 2)):
        if value < least:
            raise ConfigError(f"{option} must be at least {least}, not {value}")
    rows = list[Row]()
    if args.planted:
        batches, length = batches_of(args.batches, BATCHES), args.num_speculative_tokens or 4
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
        facts = provenance(args.seed) | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
        lines = ",\n ".join(json.dumps(row) for row in rows)
        text = json.dumps({"provenance": facts}, indent=1)[:-2] + f',\n "rows": [\n {lines}\n ]\n}}\n'
        write_text(args.output, text, "figures")


def measure_edits(args: argparse.Namespace) -> list[Row]:
    """A row for each prompt, batch and method."""
    drafts = [method_and_length(entry, args.num_speculative_tokens or 8) for entry in args.methods.split(",")]
    batches = batches_of(args.batches, (1,))
    longest = {method: max(length for other, length in drafts if other == method) for method, _ in drafts}
    engines = {method: engine_of(args, method, length, max(batches)) for method, length in {OFF: 0, **longest}.items()}
    rows = list[Row]()
    loads = [(batch, name) for batch in batches for name in PROMPTS]
    for batch, name in tqdm(loads, "prompts", disable=None):
        kind, prompt = PROMPTS[name]
        best: dict[tuple[str, int], tuple[float, int, int]] = {}
        for repeat in range(args.repeats + 1):
            for draft in ((OFF, 0), *drafts):
                found = answer(engines[draft[0]], [prompt] * batch, draft[1], args.max_tokens)
                if repeat > 0:  # the first warms up
                    best[draft] = max(found, best.get(draft, found))
        off_tokens_per_s = best[OFF, 0][0]
        for method, length in drafts:
            tokens_per_s, num_accepted, num_tokens = best[method, length]
            num_drawn = num_tokens - batch  # behind the first of each request
            rows.append({
                "model": args.model, "prompt": name, "kind": kind, "batch": batch, "draft_length": length,
                "planted_alpha": None, "method": method, "tokens_per_s_on": round(tokens_per_s, 1),
                "tokens_per_s_off": round(off_tokens_per_s, 1),
                "speedup": round(tokens_per_s / off_tokens_per_s, 3), "formula_speedup": None,
                "tokens_per_step": round(num_drawn / max(1, num_drawn - num_accepted), 3),
                "num_tokens": num_tokens,
            })  # fmt: skip
    return rows


def engine_of(args: argparse.Namespace, method: str, length: int, max_num_seqs: int) -> LLM:
    """An engine that drafts by one method; "off": by none, so that it bears nothing of what drafting costs."""
    config: dict[str, object] = {"method": method, "num_speculative_tokens": length}
    config |= {"model": DRAFT_NAME} if method == "draft_model" else {}
    return LLM(
        args.model, dtype=args.dtype, max_num_seqs=max_num_seqs, max_model_len=MAX_MODEL_LEN, seed=args.seed,
        num_blocks=1 + max_num_seqs * MAX_MODEL_LEN // BLOCK_SIZE, block_size=BLOCK_SIZE, enable_prefix_caching=False,
        speculative_config=None if method == OFF else config, show_progress=False,
    )  # fmt: skip


def batches_of(text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """The sizes that --batches names."""
    parts = text.split(",") if text else [str(size) for size in default]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--batches: {text!r} is no list of sizes; say 1,8,32")
    return tuple(map(int, parts))


def method_and_length(entry: str, default: int) -> tuple[str, int]:
    """("eagle", 4) for "eagle:4"; the default where no length is given."""
    method, _, length = entry.partition(":")
    if length and not length.isdecimal():
        raise ConfigError(f"--methods: {entry!r} has no draft length behind the colon; say {method}:4")
    return method, int(length or default)


def means(rows: Sequence[Row]) -> list[str]:
    """A line for each batch, method and kind of prompt: tokens over steps of all answers, geometric mean speed-up."""
    lines = list[str]()
    for key in dict.fromkeys((row["batch"], row["method"], row["draft_length"], row["kind"]) for row in rows):
        batch, method, length, kind = key
        part = [row for row in rows if (row["batch"], row["method"], row["draft_length"], row["kind"]) == key]
        tokens = sum(row["num_tokens"] - batch for row in part)
        steps = sum((row["num_tokens"] - batch) / row["tokens_per_step"] for row in part)
        speedup = statistics.geometric_mean(row["speedup"] for row in part)
        lines.append(f"batch {batch}, {method}:{length}, {kind}: {tokens / steps:.2f} tokens a step, {speedup:.2f}x")
    return lines


def answer(llm: LLM, prompts: Sequence[str], length: int, max_tokens: int) -> tuple[float, int, int]:
    """Tokens per second behind the first ones, how many of them were accepted drafts, and how many tokens came."""
    wished = length if llm.engine.config.speculative else None
    params = SamplingParams(temperature=0, max_tokens=max_tokens, num_speculative_tokens=wished)
    accepted = llm.engine.speculation.num_accepted
    started_s = time.perf_counter()
    outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params, use_tqdm=False)
    first_s = max(output.metrics.time_to_first_token or 0.0 for output in outputs)
    seconds = time.perf_counter() - started_s - first_s
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return (num_tokens - len(prompts)) / seconds, llm.engine.speculation.num_accepted - accepted, num_tokens
