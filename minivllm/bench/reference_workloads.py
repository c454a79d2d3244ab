"""Workloads that engines are compared on, the same token lists for each: `minivllm bench engine --workload NAME`.

    nano      256 prompts of 100 to 1024 tokens, as many out     nano-vllm's own benchmark
    single    one prompt of 128, 512 out                         what a step costs beside the weights
    batch512  512 prompts of 128, 256 out                        many small requests
    longctx   32 prompts of 8192, 128 out                        decode over long contexts
    prefill   64 prompts of 4096, 1 out                          prompts alone
    prefix    256 prompts of 2048 shared + 128 own, 64 out       a prefix read by everybody
    text32    32 prompts of 128, 128 out (also text1, text512)   Python's help topics, for a model that has a tokenizer

Each repetition begins with an empty prefix cache; the first one and the best are told apart. The floor is the sum of
the floors of an ideal engine's steps: all prompts at once, then all requests together, a token each. With a ledger,
every step of one more repetition is held against its own floor, however well the steps were chosen; costs are counted
after the run, not during it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random

from tqdm import tqdm

from minivllm.defaults import load_tokenizer
from minivllm.errors import ConfigError
from minivllm.events import Event
from minivllm.lab.corpus import help_topics, packed
from minivllm.lab.ledger import block_bytes_by_group
from minivllm.lab.ledger_table import Steps, ledger_facts, ledger_lines, steps_of
from minivllm.lab.step_floor import ModelWork, measured_roofs
from minivllm.llm import LLM
from minivllm.outputs import Tokenizer
from minivllm.request import SamplingParams
from minivllm.weights import ModelSource, find_model

Lists = tuple[list[list[int]], list[int]]  # prompts, and how many tokens each is to get
MAX_NUM_SEQS, MAX_BATCHED_TOKENS, MAX_MODEL_LEN = 512, 16384, 16384
TEMPERATURE = 0.6


def nano(num_seqs: int = 256, least: int = 100, most: int = 1024, seed: int = 0) -> Lists:
    random = Random(seed)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(least, most))] for _ in range(num_seqs)]
    return prompts, [random.randint(least, most) for _ in range(num_seqs)]


def fixed(num_seqs: int, num_in: int, num_out: int, seed: int = 1) -> Lists:
    random = Random(seed)
    return [[random.randint(0, 10000) for _ in range(num_in)] for _ in range(num_seqs)], [num_out] * num_seqs


def shared_prefix(num_seqs: int = 256, shared: int = 2048, own: int = 128, num_out: int = 64, seed: int = 2) -> Lists:
    random = Random(seed)
    prefix = [random.randint(0, 10000) for _ in range(shared)]
    return [prefix + [random.randint(0, 10000) for _ in range(own)] for _ in range(num_seqs)], [num_out] * num_seqs


WORKLOADS: dict[str, Callable[[], Lists]] = {
    "nano": nano,
    "single": lambda: fixed(1, 128, 512),
    "batch512": lambda: fixed(512, 128, 256),
    "longctx": lambda: fixed(32, 8192, 128),
    "prefill": lambda: fixed(64, 4096, 1),
    "prefix": shared_prefix,
}


TEXTS = {"text1": 1, "text32": 32, "text512": 512}  # requests of each


def text(num_seqs: int, tokenizer: Tokenizer) -> Lists:
    """128 tokens of Python's help topics each, and as many out."""
    return packed(help_topics(held_out=False), tokenizer, 128)[:num_seqs].tolist(), [128] * num_seqs


@dataclass(frozen=True)
class EngineChoice:
    """The engine that is measured."""

    model: str
    dtype: str
    load_format: str
    enforce_eager: bool = False
    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int = MAX_BATCHED_TOKENS
    block_size: int = 16
    seed: int = 0


@dataclass
class Ledgers:
    """What `measure` fills where a ledger is wanted: each workload's steps in one more repetition, and tables."""

    steps: dict[str, Steps] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    machine: str = ""


def measure(
    names: Sequence[str], choice: EngineChoice, repeats: int, ledgers: Ledgers | None = None
) -> list[dict[str, object]]:
    """Rows of the result file, one a workload; the machine's own rates are measured once the engine is gone."""
    known = (*WORKLOADS, *TEXTS)
    if unknown := set(names) - set(known):
        raise ConfigError(f"--workload: {unknown.pop()!r} is not one of {', '.join(known)}")
    source = find_model(choice.model, choice.load_format)
    lists = {name: _lists(name, source) for name in names}
    work = ModelWork(source.config, choice.dtype)
    longest = max(len(prompt) + n for prompts, outs in lists.values() for prompt, n in zip(prompts, outs, strict=True))
    started_s = time.perf_counter()
    most = int(str(source.config.get("max_position_embeddings", MAX_MODEL_LEN)))
    llm = LLM(**asdict(choice), max_model_len=max(longest, min(most, MAX_MODEL_LEN)))
    start_s = time.perf_counter() - started_s
    runs = [_run(name, llm, lists[name], repeats, is_recorded=ledgers is not None) for name in names]
    device, block_bytes = llm.device, block_bytes_by_group(llm)
    del llm  # the roofs need memory, too
    machine = measured_roofs(device, choice.dtype)
    rows = []
    for name, run in zip(names, runs, strict=True):
        row, best_s, (prompts, num_out) = _row(name, lists[name], run.times), min(run.times), lists[name]
        num_shared = shared_tokens(prompts)
        floor_s = work.ideal_seconds([len(prompt) for prompt in prompts], num_out, machine, num_shared)
        row |= {"floor_s": round(floor_s, 3), "share of floor": round(floor_s / best_s, 3)}
        row |= {"start_s": round(start_s, 2), **asdict(choice), "roofs": asdict(machine)}
        if ledgers is not None:
            steps = steps_of(run.events, work, machine, block_bytes)
            ledgers.steps[name], ledgers.machine = steps, machine.name
            ledgers.lines += ledger_lines(name, steps, run.recorded_s)
            row["ledger"] = ledger_facts(steps, run.recorded_s)
        rows.append(row)
    return rows


def _lists(name: str, source: ModelSource) -> Lists:
    if name in WORKLOADS:
        return WORKLOADS[name]()
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise ConfigError(f"--workload: {name} is text, and {source.name} has no tokenizer here; leave it out")
    return text(TEXTS[name], tokenizer)


def shared_tokens(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with, if there are several: shared_tokens([[1, 2, 3], [1, 2, 4]]) == 2."""
    if len(prompts) == 1:
        return 0
    places = enumerate(zip(*prompts, strict=False))
    return next((place for place, tokens in places if len(set(tokens)) > 1), min(map(len, prompts)))


@dataclass
class Run:
    """A workload's repetitions: seconds of each; of one more, which is recorded, its seconds and events."""

    times: list[float] = field(default_factory=list)
    recorded_s: float = 0.0
    events: list[Event] = field(default_factory=list)


def _run(name: str, llm: LLM, lists: Lists, repeats: int, *, is_recorded: bool) -> Run:
    prompts, num_out = lists
    wish = SamplingParams(temperature=TEMPERATURE, ignore_eos=True, detokenize=name in TEXTS)
    params = [replace(wish, max_tokens=n) for n in num_out]

    def seconds() -> float:
        llm.reset_prefix_cache()
        started_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        ended_s = time.perf_counter()
        assert [len(output.outputs[0].token_ids) for output in outputs] == num_out
        return ended_s - started_s

    run = Run([seconds() for _ in tqdm(range(repeats), desc=name)])
    if is_recorded:  # nobody listens to those that count
        stop = llm.events.listen(run.events.append, wants_hash=False)
        run.recorded_s = seconds()
        stop()
    return run


def _row(name: str, lists: Lists, times: list[float]) -> dict[str, object]:
    prompts, num_out = lists
    best = min(times)
    num_in = sum(map(len, prompts))
    return {
        "what": name, "unit": "s", "first_s": round(times[0], 3), "best_s": round(best, 3),
        "all_s": [round(seconds, 3) for seconds in times], "tokens/s": round(sum(num_out) / best, 1),
        "input tokens/s": round(num_in / best, 1), "requests": len(prompts), "temperature": TEMPERATURE,
    }  # fmt: skip
