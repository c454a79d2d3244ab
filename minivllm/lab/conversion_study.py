"""Four attentions with one set of weights, side by side: cache bytes, held-out loss and speed, here and now.

Bytes are those of the engine's own KV tensors. The loss is the engine's, by prompt logprobs, on help topics that
nothing was fitted to. What tuning heals was measured once (lab/tune_conversions.py) and is read from its files.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from minivllm.config import DTYPE_BYTES, ModelConfig
from minivllm.errors import ModelError
from minivllm.events import StepRan
from minivllm.lab.conversion import convert
from minivllm.lab.corpus import help_topics, packed
from minivllm.lab.latent_weights import most_rank
from minivllm.lab.tune_conversions import device_name, tuned_table
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import SamplingParams
from minivllm.text_files import read_text, write_text
from minivllm.weights import find_model

RESULTS = Path(__file__).with_name("conversions")  # what lab/tune_conversions.py wrote
BATCHES = (1, 32)
CONTEXT, NUM_NEW = 128, 24  # tokens of a prompt, and decoded after it
ROWS = 4  # of held-out text, 512 tokens each


@dataclass(frozen=True)
class Row:
    """One variant as measured here."""

    variant: str
    numbers_per_layer: int  # that the cache holds of one token
    bytes_per_token: int
    loss: float  # nats per token, before any tuning
    tokens_per_s: dict[str, float]  # decoded, by batch


def variants_of(config: ModelConfig) -> list[str]:
    """MHA, the model itself, MQA, and latents of 3, 2 and 1 head sizes where the model has as much to keep."""
    ranks = [n * config.head_size for n in (3, 2, 1) if n * config.head_size <= most_rank(config)]
    heads = dict.fromkeys(("mha", f"gqa-{config.num_kv_heads}", "mqa"))
    return [*heads, *(f"mla-{rank}" for rank in ranks)]


def measure(model: str | Path, variant: str, seed: int = 0) -> Row:
    """Convert, load into the engine, and measure."""
    with TemporaryDirectory() as scratch:
        folder = convert(model, variant, Path(scratch) / variant, show_progress=False)
        num_blocks = 1 + max(BATCHES) * (CONTEXT + NUM_NEW + 16) // 16
        llm = LLM(folder, num_blocks=num_blocks, max_model_len=1024, max_num_seqs=max(BATCHES), show_progress=False)
        rows = packed(help_topics(held_out=True), llm.get_tokenizer())[:ROWS].tolist()
        loss = held_out_loss(llm, rows)
        speeds = {str(batch): decode_speed(llm, batch, seed) for batch in BATCHES}
    config, num_tokens = llm.model_config, num_blocks * llm.config.block_size
    numbers = llm.storage.num_bytes // (num_tokens * config.num_layers * DTYPE_BYTES[config.dtype])
    return Row(variant, numbers, llm.storage.num_bytes // num_tokens, loss, speeds)


def held_out_loss(llm: LLM, rows: Sequence[Sequence[int]]) -> float:
    """Nats per token, of every token but the first of each row."""
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    total, num_tokens = 0.0, 0
    for output in llm.generate([list(row) for row in rows], params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for token_id, judged in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if judged is not None:  # nothing foretells the first token
                total, num_tokens = total - judged[token_id].logprob, num_tokens + 1
    return total / num_tokens


def decode_speed(llm: LLM, batch: int, seed: int = 0) -> float:
    """Tokens/s of `batch` requests behind 128 tokens each, by the median step in which each of them gets one."""
    random = Random(seed)
    prompts = [[random.randrange(llm.model_config.vocab_size) for _ in range(CONTEXT)] for _ in range(batch)]
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, detokenize=False)
    with llm.record() as trace:
        llm.generate(prompts, params, use_tqdm=False)
    steps = [event for event in trace if isinstance(event, StepRan)]
    decodes = [step for step in steps if [num_new for _, num_new, _ in step.scheduled] == [1] * batch]
    return batch / median((step.schedule_ms + step.run_ms + step.update_ms) / 1e3 for step in decodes[1:])


def study(model: str = "smollm2-135m", seed: int = 0) -> str:
    """The table of this machine, and under it what tuning gave where it was recorded."""
    variants = variants_of(ModelConfig.from_json(find_model(model).config))
    rows = [measure(model, variant, seed) for variant in tqdm(variants, desc="attentions")]
    here = f"{device_name()}, here and now"
    return "\n".join([measured_table(rows, here), *(recorded_table(path) for path in sorted(RESULTS.glob("*.json")))])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivllm.lab.conversion_study", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--output", type=Path, required=True, help="write the rows to this JSON file, one after the other"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    facts, rows = {**provenance(options.seed), "device": device_name()}, list[Row]()
    for variant in variants_of(ModelConfig.from_json(find_model(options.model).config)):
        rows.append(measure(options.model, variant, options.seed))
        document = {"provenance": facts, "measured": [asdict(row) for row in rows]}
        write_text(options.output, json.dumps(document, indent=1) + "\n", "figures")
    print(measured_table(rows, device_name()))
    return 0


def measured_table(rows: Sequence[Row], where: str) -> str:
    """Bytes, loss and speed by variant."""
    heads = "".join(f"{f'{batch} requests':>14}" for batch in BATCHES)
    lines = [f"{where}, before tuning; numbers and bytes in the cache per token, decoded tokens/s"]
    lines += [f"{'variant':10}{'a layer':>9}{'bytes':>9}{'loss':>9}{'perplexity':>12}{heads}"]
    for row in rows:
        speeds = "".join(f"{speed:14,.0f}" for speed in row.tokens_per_s.values())
        lines.append(
            f"{row.variant:10}{row.numbers_per_layer:9,}{row.bytes_per_token:9,}{row.loss:9.3f}"
            f"{math.exp(row.loss):12,.1f}{speeds}"
        )
    return "\n".join(lines)


def recorded_table(path: Path) -> str:
    """A file of lab/tune_conversions.py, or one of this command, as a table. Raises ModelError when it is neither."""
    document = read_text(path, json.loads, "results")
    try:
        facts = document["provenance"]
        where = f"recorded: {facts['device']}, commit {facts['commit']}, seed {facts['seed']}"
        if "measured" in document:
            return measured_table([Row(**row) for row in document["measured"]], where)
        return f"{where}; held-out loss in nats per token\n{tuned_table(document['rows'])}"
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: no result of lab/tune_conversions.py ({error!r}); remove it") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
