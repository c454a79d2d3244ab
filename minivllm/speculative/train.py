"""Train the drafts of SmolLM2-135M, an EAGLE head and a small Llama, on the target's own answers; one command.

    python -m minivllm.lab.corpus FOLDER                                       (once, on a machine with apt)
    python -m minivllm.speculative.train --corpus FOLDER --output FOLDER2      (about ten minutes on an H200)

Our engine answers prompts of our own grammar (prompts.py); the target's features and its distribution over the draft
vocabulary are what both drafts learn. The head learns the way it drafts: each step of a chain reads the features of the
step before (as in HASS, Zhang et al. 2024, and EAGLE-3, Li et al. 2025). AdamW, cosine, weights of the optimiser in
fp32. With --steps and --data-tokens the same seed gives the same weights on the same machine, as far as its kernels
repeat; time limits end where the time ends.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.llm import LLM
from minivllm.models.decoder import Decoder
from minivllm.provenance import provenance
from minivllm.speculative.eagle_model import EagleDraft, SmallDraft, load_eagle, load_small, save_draft
from minivllm.speculative.held_out import Figures, measure
from minivllm.speculative.train_data import Corpus, Example, frequent_tokens, held_out_examples, training_examples
from minivllm.speculative.training import LINE_EVERY, PARTS, Settings, new_drafts, shapes, train

DRAFT_LENGTH = 4  # that the figures are for
KV_BYTES = 12 * 2**30  # of the engine that answers; the rest of a GPU holds features


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    settings = Settings(seconds=options.seconds, steps=options.steps, tokens_per_batch=options.batch_tokens,
                        vocabulary=options.vocabulary, unrolled=options.unrolled, learning_rate=options.learning_rate,
                        seed=options.seed)  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory, num_seqs = (KV_BYTES, 512) if device == "cuda" else (None, 64)
    llm = LLM(
        options.model,
        max_model_len=1024,
        seed=options.seed,
        device=device,
        kv_cache_memory=memory,
        max_num_seqs=num_seqs,
    )
    training, judging = _corpus(options.corpus)
    judged = held_out_examples(llm, judging, options.held_out, options.seed + 1)
    examples = training_examples(
        llm, training, options.data_seconds, options.data_tokens, options.per_round, options.seed
    )
    target, config = llm.runner.model, llm.model_config
    special = [*range(17)] if options.model == "smollm2-135m" else list(config.eos_token_ids)
    vocabulary = frequent_tokens(examples, settings.vocabulary, config.vocab_size, special)
    head_config, small_config = shapes(config)
    head, small = new_drafts(target, head_config, small_config, vocabulary, settings.seed)
    curve = train(head, small, target, examples, settings)
    facts = provenance(settings.seed) | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "settings": asdict(settings),
        "data": _described(examples, options.corpus),
        "curve": {"parts": list(PARTS), "every": LINE_EVERY, "losses": curve},
    }
    eagle_path, small_path = options.output / "eagle_smollm2.safetensors", options.output / "draft_smollm2.safetensors"
    save_draft(eagle_path, head.head, head_config, vocabulary, "eagle", options.model, facts)
    save_draft(small_path, small.model, small_config, vocabulary, "draft_model", options.model, facts)
    _judge(eagle_path, load_eagle(eagle_path, target), target, judged)
    _judge(small_path, load_small(small_path, target), target, judged)
    return 0


def _judge(path: Path, draft: EagleDraft | SmallDraft, target: Decoder, judged: Sequence[Example]) -> Figures:
    """Measure what was saved, print it, and write it into the JSON beside the weights."""
    figures = measure(draft, target, judged, DRAFT_LENGTH)
    print(path.stem, json.dumps(figures), flush=True)
    document = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    document["held_out"] = figures
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return figures


def _described(examples: Sequence[Example], corpus: Path | None) -> dict[str, object]:
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.kind] = counts.get(example.kind, 0) + 1
    answers = sum(len(e.token_ids) - e.num_prompt for e in examples)
    prompts = sum(e.num_prompt for e in examples)
    return {"answers": dict(sorted(counts.items())), "answer_tokens": answers, "prompt_tokens": prompts,
            "greedy_share": 0.5, "temperatures": [0.7, 1.0], "corpus": corpus is not None}  # fmt: skip


def _corpus(folder: Path | None) -> tuple[Corpus, Corpus]:
    """Rows to train with and rows to judge with, of what lab/corpus.py wrote; none without a folder."""
    if folder is None:
        return None, None
    try:
        with np.load(folder / "corpus.npz") as arrays:
            held_out = np.concatenate([arrays[name] for name in arrays.files if name.startswith("held out")])
            return torch.from_numpy(arrays["training"].astype(np.int64)), torch.from_numpy(held_out.astype(np.int64))
    except (OSError, KeyError, ValueError) as error:
        raise MiniVLLMError(f"{folder}: no corpus ({error}); make one: python -m minivllm.lab.corpus") from error


def _options(argv: Sequence[str]) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m minivllm.speculative.train", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder for weights and their JSON files")
    parser.add_argument("--corpus", type=Path, help="folder that lab/corpus.py made; without it chats alone")
    parser.add_argument("--model", default="smollm2-135m", help="the target (%(default)s)")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="of training (%(default)s)")
    parser.add_argument("--steps", type=int, help="of training, instead of seconds: repeats bit for bit")
    parser.add_argument("--data-seconds", type=float, default=200, help="of answering, at most (%(default)s)")
    parser.add_argument("--data-tokens", type=int, default=20_000_000, help="of answers, at least (%(default)s)")
    parser.add_argument("--per-round", type=int, default=8192, help="prompts answered together (%(default)s)")
    parser.add_argument("--held-out", type=int, default=400, help="prompts to judge with (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=defaults.tokens_per_batch, help="(%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=defaults.vocabulary, help="tokens drafted (%(default)s)")
    parser.add_argument("--unrolled", type=int, default=defaults.unrolled, help="steps of a chain (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate, help="the peak (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(argv)
    least = (options.batch_tokens, options.vocabulary, options.unrolled, options.held_out, options.per_round)
    if min(least) < 1 or not options.learning_rate > 0:
        raise ConfigError("sizes and --learning-rate must be above 0; give larger ones")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
