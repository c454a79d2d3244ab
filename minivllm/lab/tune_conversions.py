"""Heal converted models: convert, judge on held-out text, tune for a fixed number of tokens, judge again; one command.

    python -m minivllm.lab.corpus FOLDER                      (once, on a machine with apt)
    python -m minivllm.lab.tune_conversions --corpus FOLDER --output tuned.json

All weights are tuned, also those that conversion left alone: the residual stream has to learn what the new attention
gives. gqa-3 is SmolLM2 itself, tuned alike: what it gains is the text, and what the others lack beside it is the price
of their attention. transformers' classes do the training; AdamW, cosine, bf16 autocast. Results are written after each
variant. Tuned weights are not kept (270 MB a variant): the command makes them again.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.conversion import convert
from minivllm.provenance import provenance
from minivllm.runner.device import choose_device
from minivllm.text_files import write_text

VARIANTS = ("gqa-3", "mha", "mqa", "mla-192", "mla-128", "mla-64")
HELD_OUT_ROWS = 128  # of each source, at most
LINE_EVERY = 100  # steps

Losses = dict[str, float]  # nats per token, by source of held-out text; "all": over all their tokens


class Tuned(TypedDict):
    """One row of the result file."""

    variant: str
    before: Losses
    after: Losses
    curve: list[float]  # mean training loss of every 100 steps
    num_tokens: int
    tokens_per_s: int
    converted_s: float


@dataclass(frozen=True)
class Settings:
    """How a model is tuned. An Adam step moves what conversion left alone as far as what it made: hence one rate."""

    num_tokens: int = 8_000_000
    rows_per_step: int = 32
    learning_rate: float = 5e-4  # the peak, after 5 % of the steps; then a cosine down to 0
    weight_decay: float = 0.1  # of matrices
    seed: int = 0

    def num_steps(self, row_length: int) -> int:
        return max(1, self.num_tokens // (self.rows_per_step * row_length))

    def rate_at(self, step: int, num_steps: int) -> float:
        warm_up = max(1, num_steps // 20)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


@dataclass(frozen=True)
class Corpus:
    """Token ids, [rows, tokens] each."""

    training: Tensor
    calibration: Tensor
    held_out: dict[str, Tensor]

    @staticmethod
    def load(folder: Path) -> "Corpus":
        """Read what lab/corpus.py wrote. Raises MiniVLLMError, one line."""
        try:
            with np.load(folder / "corpus.npz") as arrays:
                rows = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays.files}
            held_out = {name.removeprefix("held out "): rows[name] for name in rows if name.startswith("held out ")}
            return Corpus(rows["training"], rows["calibration"], held_out)
        except (OSError, KeyError, ValueError) as error:
            raise MiniVLLMError(f"{folder}: no corpus ({error}); make one: python -m minivllm.lab.corpus") from error


@torch.inference_mode()
def held_out_losses(model: PreTrainedModel, held_out: dict[str, Tensor], rows_at_a_time: int = 32) -> Losses:
    """Mean loss per predicted token of each source, in bf16 autocast."""
    sums, losses = [0.0, 0], Losses()
    for source, rows in held_out.items():
        rows = rows[:HELD_OUT_ROWS]
        total = sum(float(_loss(model, part)) * len(part) for part in rows.split(rows_at_a_time))
        losses[source] = total / len(rows)
        sums = [sums[0] + total, sums[1] + len(rows)]
    return losses | {"all": sums[0] / sums[1]}


def tune(model: PreTrainedModel, training: Tensor, settings: Settings, show_progress: bool = True) -> list[float]:
    """Train all weights in place; the mean training loss of every 100 steps."""
    num_steps = settings.num_steps(training.shape[1])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=model.device.type == "cuda")
    model.train()
    lines, recent, begun = list[float](), list[Tensor](), time.perf_counter()
    bar = tqdm(range(num_steps), desc="tune", unit=" steps", disable=not show_progress, mininterval=10)
    for step, rows in zip(bar, _batches(training, settings), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(step, num_steps)
        loss = _loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if len(recent) == LINE_EVERY or step == num_steps - 1:
            lines.append(float(torch.stack(recent).mean()))
            seconds = time.perf_counter() - begun
            if show_progress:
                tokens_per_s = (step + 1) * rows.numel() / seconds
                tqdm.write(f"step {step + 1:5} of {num_steps}: loss {lines[-1]:.3f}, {tokens_per_s:,.0f} tokens/s")
            recent.clear()
    model.eval()
    return lines


def tune_variant(name: str, model: str, corpus: Corpus, settings: Settings) -> Tuned:
    """One row of the result: losses before and after, and how it went."""
    torch.manual_seed(settings.seed)
    with TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        folder = convert(model, name, Path(scratch) / name, calibration=corpus.calibration)
        converted_s = time.perf_counter() - begun
        tuned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    tuned = tuned.to(choose_device("auto")).eval()
    before = held_out_losses(tuned, corpus.held_out)
    print(f"{name}: converted in {converted_s:.0f} s, held-out loss {before['all']:.4f}", flush=True)
    begun = time.perf_counter()
    curve = tune(tuned, corpus.training, settings)
    seconds = time.perf_counter() - begun
    after = held_out_losses(tuned, corpus.held_out)
    print(f"{name}: tuned in {seconds:.0f} s, held-out loss {after['all']:.4f}", flush=True)
    steps = settings.num_steps(corpus.training.shape[1])
    num_tokens = steps * settings.rows_per_step * corpus.training.shape[1]
    return {"variant": name, "before": before, "after": after, "curve": curve, "num_tokens": num_tokens,
            "tokens_per_s": round(num_tokens / seconds), "converted_s": round(converted_s, 1)}  # fmt: skip


def tuned_table(rows: Sequence[Tuned]) -> str:
    """Held-out loss and perplexity by variant, before and after tuning."""
    lines = [f"{'variant':10}{'tokens':>13}{'before':>9}{'after':>9}{'perplexity':>12}{'after':>9}"]
    for row in rows:
        before, after = row["before"]["all"], row["after"]["all"]
        perplexities = f"{math.exp(before):12,.1f}{math.exp(after):9,.1f}"
        lines.append(f"{row['variant']:10}{row['num_tokens']:13,}{before:9.3f}{after:9.3f}{perplexities}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivllm.lab.tune_conversions", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder that lab/corpus.py made")
    parser.add_argument("--output", type=Path, required=True, help="write the results to this JSON file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (%(default)s)")
    parser.add_argument("--tokens", type=int, default=Settings.num_tokens, help="to tune for, each (%(default)s)")
    parser.add_argument("--rows", type=int, default=Settings.rows_per_step, help="sequences a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if min(options.tokens, options.rows) < 1 or not options.learning_rate > 0:
        raise ConfigError("--tokens, --rows and --learning-rate must be above 0; give larger ones")
    corpus = Corpus.load(options.corpus)
    settings = Settings(options.tokens, options.rows, options.learning_rate, seed=options.seed)
    facts = {**provenance(settings.seed), "device": device_name(), "settings": asdict(settings)}
    rows = list[Tuned]()
    for name in options.variants.split(","):
        rows.append(tune_variant(name, options.model, corpus, settings))
        write_text(options.output, json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n", "results")
    print(tuned_table(rows))
    return 0


def device_name() -> str:
    """What tuned or measured: the GPU's name, or cpu."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _batches(training: Tensor, settings: Settings) -> Iterator[Tensor]:
    """Rows in a seeded order, each once before any twice."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(training), generator=generator)
        for places in order.split(settings.rows_per_step):
            if len(places) == settings.rows_per_step or len(order) < settings.rows_per_step:
                yield training[places]


def _loss(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Mean cross entropy of the next token, over all rows of one length."""
    rows = rows.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
