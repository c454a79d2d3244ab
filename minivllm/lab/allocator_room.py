"""The allocators of figure 2 in small: one deck of requests, played again by each whenever a slider moves.

    same engine, same requests, same order, until each run has written as many tokens: only the allocator differs

A run of a second is short, and seven random requests at a time scatter. So lengths are dealt from a deck: 128 pairs
whose prompts and outputs are the means of 128 equal parts of many draws. A run of one deck has the means of the whole
distribution, and nearly its bars: each within 5 points of the published ones (`minivllm study allocators` plays 8,000
random steps for the same, six recorded seeds 30,000).
`spread` pulls every length towards the mean: 1 leaves the deck as it is, 0 makes all requests equal (edge case 3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from random import Random
from statistics import mean

from minivllm.course.memory_fold import read_count
from minivllm.course.memory_use import Refusal, memory_over_time
from minivllm.engine.allocators import blocks_needed
from minivllm.engine.engine import Engine
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError
from minivllm.events import Added, Preempted, Waited
from minivllm.lab.allocator_study import BYTES_PER_SLOT, MAX_MODEL_LEN, NUM_SLOTS
from minivllm.lab.fake_runner import SilentRunner, fake_request
from minivllm.llm import LLM
from minivllm.trace import Trace
from minivllm.workload_shapes import alpaca_like, sharegpt_like

FOUR = ("contiguous", "power_of_two", "buddy", "paged")  # the columns of figure 2, from the left
ALL = ("contiguous", "power_of_two", "buddy", "oracle", "paged")  # and first fit with known lengths
LENGTHS = {"sharegpt": sharegpt_like, "alpaca": alpaca_like}
NUM_TOKENS = 34_000  # of output: a hundred chats, which takes the four of them about a second
NUM_AHEAD = 16  # requests at the door: more than leave in a step, so the largest pool fills with short ones too
NUM_CARDS, NUM_DRAWS = 128, 64  # pairs in a deck, and draws that stand behind each
Pair = tuple[int, int]  # tokens of a prompt, and of its output


class QuietEngine(Engine):
    """The engine without the hash of every step: most of the time of such a run, and nobody resumes it."""

    def state_hash(self) -> str:
        return ""


def play_room(
    *,
    lengths: str = "sharegpt",
    spread: float = 1.0,
    max_model_len: int = MAX_MODEL_LEN,
    block_size: int = 16,
    num_slots: int = NUM_SLOTS,
    allocators: Sequence[str] = FOUR,
    num_tokens: int = NUM_TOKENS,
) -> dict[str, Trace]:
    """Every allocator on the same requests: events by allocator. Raises ConfigError for lengths that do not fit."""
    deck = deal(lengths, spread, max_model_len)
    sizes = {"max_model_len": max_model_len, "block_size": block_size, "num_slots": num_slots}
    return {allocator: serve(allocator, deck, num_tokens=num_tokens, **sizes) for allocator in allocators}


def serve(
    allocator: str, deck: Sequence[Pair], *, max_model_len: int, block_size: int, num_slots: int, num_tokens: int
) -> Trace:
    """Play cards from the deck, shuffled anew each time it is through, until `num_tokens` tokens were written.

    Requests always wait at the door, and neither seats nor the token budget bind: memory alone decides.
    """
    config = EngineConfig(
        num_blocks=num_slots // block_size + 1, block_size=block_size, max_model_len=max_model_len,
        max_num_seqs=num_slots, max_num_batched_tokens=num_slots, enable_prefix_caching=False, allocator=allocator,
    )  # fmt: skip
    header: dict[str, object] = {
        "model": "none: the shapes of OPT-13B", "num_blocks": config.num_blocks, "block_size": block_size,
        "max_model_len": max_model_len, "allocator": allocator, "kv_bytes_per_token": BYTES_PER_SLOT, "seed": 0,
    }  # fmt: skip
    engine, trace, cards = QuietEngine(config, SilentRunner()), Trace(header), shuffled(deck)
    engine.events.listen(trace)
    names, num_written = (f"r{number}" for number in count()), 0
    while num_written < num_tokens:
        while len(engine.scheduler.waiting) < NUM_AHEAD:
            num_prompt, num_output = next(cards)
            engine.add(fake_request(next(names), [0] * num_prompt, num_output, ignore_eos=True))
        num_written += len(engine.step())
    return trace


def deal(lengths: str, spread: float = 1.0, max_model_len: int = MAX_MODEL_LEN) -> tuple[Pair, ...]:
    """The deck: pairs of lengths, all pulled towards their means by 1 - `spread`, none beyond `max_model_len`."""
    if lengths not in LENGTHS:
        raise ConfigError(f"lengths must be one of {', '.join(LENGTHS)}, not {lengths!r}")
    if not 0 <= spread <= 1:
        raise ConfigError(f"spread must be from 0 (all equal) to 1, not {spread}")
    base = _deck(lengths, MAX_MODEL_LEN if spread == 0 else min(max_model_len, MAX_MODEL_LEN))
    prompt_mean, output_mean = (mean(column) for column in zip(*base, strict=True))
    deck = tuple(
        (round(prompt_mean + spread * (prompt - prompt_mean)), round(output_mean + spread * (output - output_mean)))
        for prompt, output in base
    )
    longest = max(prompt + output for prompt, output in deck)
    if longest > max_model_len:
        raise ConfigError(f"requests of {longest} tokens do not fit max_model_len {max_model_len}; raise it")
    return deck


def shuffled(deck: Sequence[Pair]) -> Iterator[Pair]:
    """Cards without end: the whole deck in random order, again and again; the same order for everybody."""
    random = Random("deck")
    while True:
        yield from random.sample(deck, len(deck))


def short_waits(trace: Trace) -> list[Refusal]:
    """Waits of a paged run during which blocks were free, any of which would serve: `need` counts slots in blocks."""
    uses, size = {use.step: use for use in memory_over_time(trace)}, read_count(trace.header, "block_size")
    num_tokens, found = dict[str, int](), list[Refusal]()
    for event in trace:
        if isinstance(event, Added):
            num_tokens[event.request_id] = event.num_prompt
        elif isinstance(event, Preempted):  # what it had computed, and the token that came of it
            num_tokens[event.request_id] = max(num_tokens[event.request_id], event.num_computed + 1)
        elif isinstance(event, Waited) and event.reason == "no_blocks":
            free = uses[event.step].external if event.step in uses else 0
            need = blocks_needed(num_tokens[event.request_id], size) * size
            found += [Refusal(event.step, event.request_id, need, free, largest_hole=free)] if free else []
    return found


@dataclass(frozen=True)
class Answers:
    """What one allocator made of real prompts: their tokens, and where it put them."""

    tokens: tuple[tuple[int, ...], ...]  # of output, by prompt
    tables: tuple[tuple[int, ...], ...]  # blocks of each prompt when it ended, by position
    num_steps: int
    most_at_once: int  # requests in one step


def answer(llm: LLM, allocator: str, prompts: Sequence[str], max_tokens: int) -> Answers:
    """Greedy answers of the LLM's own model and KV storage, under another allocator.

    Only the policy is new: same runner, same weights, same equation. Raises ConfigError while the LLM serves others.
    """
    if llm.engine.has_work or not llm.reset_prefix_cache():  # what it caches is about to be written over
        raise ConfigError("the LLM still serves requests or holds pins; wait until it is idle")
    config = replace(llm.config, allocator=allocator, enable_prefix_caching=False)
    engine, tables, most_at_once = Engine(config, llm.runner), dict[str, tuple[int, ...]](), 0
    requests = [
        fake_request(f"p{i}", llm.get_tokenizer().encode(prompt), max_tokens, temperature=0, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        tables |= {request.id: tuple(request.block_ids) for request in engine.scheduler.running}
        most_at_once = max(most_at_once, len(engine.step()))
    tokens = tuple(tuple(request.token_ids[request.num_prompt :]) for request in requests)
    return Answers(tokens, tuple(tables[request.id] for request in requests), engine.scheduler.step, most_at_once)


@cache
def _deck(lengths: str, max_total: int) -> tuple[Pair, ...]:
    """128 pairs with the means of 8,192 draws: each side cut into 128 equal parts, which are then paired at random."""
    random, shape = Random(f"deal {lengths}"), LENGTHS[lengths](max_total)
    drawn = [shape.draw(random) for _ in range(NUM_CARDS * NUM_DRAWS)]
    prompts, outputs = ([*map(round, _parts(sorted(column)))] for column in zip(*drawn, strict=True))
    random.shuffle(prompts)
    return tuple((p, max(1, min(o, max_total - p))) for p, o in zip(prompts, outputs, strict=True))


def _parts(lengths: Sequence[int]) -> list[float]:
    return [mean(lengths[i : i + NUM_DRAWS]) for i in range(0, len(lengths), NUM_DRAWS)]
