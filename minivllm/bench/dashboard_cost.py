"""What watching costs: the same requests with nobody there, and under the engine room with its dashboard.

Both are played in turn in one process; the best repetition of each side counts. The picture is drawn, compared with the
last one and written out as JSON by the views' own publisher, as a kernel does; no browser takes part, and no widget.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random

from tqdm import tqdm

from minivllm.course.engine_frames import Load
from minivllm.errors import ConfigError
from minivllm.lab.engine_room import EngineRoom
from minivllm.lab.ledger import keep_ledger
from minivllm.llm import LLM
from minivllm.provenance import provenance
from minivllm.request import SamplingParams
from minivllm.text_engine import Checked, Generation
from minivllm.text_files import write_text
from minivllm.views.dashboard_picture import Chosen, buttons, draw, sliders
from minivllm.views.publisher import Publisher

VOCAB = range(10_000)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivllm.bench.dashboard_cost", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--ledger", action="store_true", help="who watches keeps the ledger of steps too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures and their provenance to this JSON file")
    args = parser.parse_args(argv)
    if min(args.requests, args.prompt_tokens, args.output_tokens, args.repeats) < 1:
        raise ConfigError("--requests, --prompt-tokens, --output-tokens and --repeats must be at least 1")
    longest = args.prompt_tokens + args.output_tokens
    num_blocks = 2 + args.requests * -(-longest // 16) * 11 // 10
    llm = LLM(
        args.model, load_format=args.load_format, seed=args.seed, show_progress=False, max_num_seqs=args.requests,
        num_blocks=num_blocks, max_model_len=longest,
    )  # fmt: skip
    lengths = args.prompt_tokens, args.output_tokens
    figures = measure(llm, args.requests, *lengths, args.repeats, args.seed, has_ledger=args.ledger)
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.output:
        facts = provenance(args.seed) | {"model": llm.model, "device": llm.device, "figures": figures}
        write_text(args.output, json.dumps(facts, indent=1) + "\n", "figures")
    return 0


def measure(
    llm: LLM, num_requests: int, num_prompt: int, num_output: int, repeats: int, seed: int, *, has_ledger: bool = False
) -> dict[str, object]:
    """Seconds of both sides, and by how much the watched one is slower; the first repetition warms up."""
    random = Random(seed)
    prompts = [random.choices(VOCAB, k=num_prompt) for _ in range(num_requests)]
    alone_s, watched_s, num_pictures = list[float](), list[float](), 0
    for _ in tqdm(range(repeats + 1), desc="alone and watched", file=sys.stderr):
        alone_s.append(_alone(llm, prompts, num_output))
        with keep_ledger(llm) if has_ledger else nullcontext():
            seconds, num_pictures = _watched(llm, prompts, num_output)
        watched_s.append(seconds)
    best_s, best_watched_s = min(alone_s[1:]), min(watched_s[1:])
    num_steps = num_output  # all at once: the steps of the prompts give the first tokens
    return {
        "requests": num_requests, "prompt tokens": num_prompt, "output tokens": num_output, "repeats": repeats,
        "with the ledger": has_ledger,
        "alone, s": [round(s, 4) for s in alone_s[1:]], "watched, s": [round(s, 4) for s in watched_s[1:]],
        "pictures sent in the last": num_pictures,
        "a step alone, ms": round(best_s / num_steps * 1e3, 3),
        "slower by, %": round(100 * (best_watched_s / best_s - 1), 2),
        "slower by, ms a step": round((best_watched_s - best_s) / num_steps * 1e3, 4),
    }  # fmt: skip


def _alone(llm: LLM, prompts: Sequence[list[int]], num_output: int) -> float:
    generations = _add(llm, prompts, num_output)
    while llm.text_engine.has_work:
        llm.text_engine.step()
    llm.reset_prefix_cache()
    return _seconds(generations)


def _watched(llm: LLM, prompts: Sequence[list[int]], num_output: int) -> tuple[float, int]:
    """The room plays, nobody else comes; its picture is drawn and written ten times a second."""
    room = EngineRoom(llm, Load(rate=0, batch_limit=llm.config.max_num_seqs))
    header, sent = room.header, list[dict[str, object]]([{}])

    def publish() -> None:
        controls = [*buttons(room.is_playing), *sliders(room.choices, room.wished)]
        picture = dict(draw(room.frames, header, Chosen(), controls, room.failure, room.said))
        if picture != sent[-1]:
            json.dumps(picture)
            sent.append(picture)

    publisher = Publisher(publish)
    room.follow(publisher.request)
    room.ask("start")
    try:
        generations = _add(llm, prompts, num_output)
        while not all(generation.is_finished for generation in generations) and not room.failure:
            time.sleep(0.05)
    finally:
        room.stop()
        publisher.stop()
        room.close()
    if room.failure:
        raise ConfigError(room.failure)
    return _seconds(generations), len(sent) - 1


def _add(llm: LLM, prompts: Sequence[list[int]], num_output: int) -> list[Generation]:
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True, detokenize=False)
    with llm.text_engine.lock:  # so that all are there when the first step begins
        return [llm.text_engine.add(Checked(None, prompt), params) for prompt in prompts]


def _seconds(generations: Sequence[Generation]) -> float:
    """From the first step to the last token."""
    requests = [sample.request for generation in generations for sample in generation.samples]
    begun_s = min(request.first_scheduled_s or 0.0 for request in requests)
    return max(request.finished_s or 0.0 for request in requests) - begun_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
