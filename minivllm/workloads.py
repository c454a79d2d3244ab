"""Who asks what, and when: seeded workloads that a player feeds to an engine; to and from JSON.

Invariant: an arrival stands after the one it waits for, and equal arguments give equal workloads.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import ClassVar

from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.text_files import read_text, write_text
from minivllm.workload_shapes import (
    Arrival,
    Draws,
    Lengths,
    Times,
    all_at_once,
    alpaca_like,
    bursts,
    fixed,
    need_seconds,
    need_whole,
    poisson,
    sharegpt_like,
    short,
    uniform,
)

__all__ = [
    "Arrival", "Lengths", "Summary", "Times", "Workload", "agents", "all_at_once", "alpaca_like", "bursts", "chats",
    "closed_loop", "few_shot", "fixed", "nano", "open_loop", "poisson", "shared_prefix", "sharegpt_like", "uniform",
]  # fmt: skip

VOCAB = range(10_000)  # token ids that prompts are drawn from, evenly; give a toy model its own range
AT_ONCE = all_at_once()
FIELDS = [field.name for field in fields(Arrival)]


@dataclass(frozen=True, slots=True)
class Summary:
    """A workload in numbers; prompt tokens count the history that a chat or a fork brings along."""

    num_requests: int
    num_prompt_tokens: int
    num_own_tokens: int  # prompt tokens without that history
    num_output_tokens: int
    mean_prompt_tokens: float
    mean_output_tokens: float
    longest_tokens: int  # prompt + output of the longest: max_model_len must be as much
    duration_s: float  # from the start to the last arrival


@dataclass(frozen=True, slots=True)
class Workload:
    """Named arrivals in order of `arrival_s`, and the seed they were drawn with."""

    name: str
    seed: int
    arrivals: tuple[Arrival, ...]

    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or type(self.seed) is not int:
            raise ConfigError("a workload's name must be a string and its seed an integer")
        if not isinstance(self.arrivals, tuple) or not all(isinstance(arrival, Arrival) for arrival in self.arrivals):
            raise ConfigError("a workload's arrivals must be a tuple of Arrival")
        before: dict[str, Arrival] = {}
        last_s = 0.0
        for arrival in self.arrivals:
            if arrival.id in before:
                raise ConfigError(f"{arrival.id}: two requests have this id; give each an id of its own")
            if arrival.arrival_s < last_s:
                raise ConfigError(f"{arrival.id}: comes before the request above it; sort by arrival_s")
            parent = arrival.fork_of if arrival.after is None else arrival.after
            if parent is not None and parent not in before:
                raise ConfigError(f"{arrival.id}: waits for '{short(parent)[1:-1]}', which must stand above it")
            if arrival.fork_of is not None and (arrival.fork_at or 0) >= before[arrival.fork_of].num_output:
                raise ConfigError(
                    f"{arrival.id}: fork_at must be below num_output of {arrival.fork_of}, as it ends then"
                )
            before[arrival.id], last_s = arrival, arrival.arrival_s

    def prompt_lengths(self) -> dict[str, int]:
        """Tokens of every whole prompt by id, the history that a chat or a fork brings along included."""
        prompts: dict[str, int] = {}
        outputs = {arrival.id: arrival.num_output for arrival in self.arrivals}
        for arrival in self.arrivals:
            history = 0
            if arrival.continues and arrival.after is not None:
                history = prompts[arrival.after] + outputs[arrival.after]
            elif arrival.fork_of is not None and arrival.fork_at is not None:
                history = prompts[arrival.fork_of] + arrival.fork_at
            prompts[arrival.id] = history + len(arrival.token_ids)
        return prompts

    def summary(self) -> Summary:
        """Counts, means and the longest request; all 0 for an empty workload."""
        prompts = self.prompt_lengths()
        num = max(1, len(self.arrivals))
        num_prompt, num_output = sum(prompts.values()), sum(a.num_output for a in self.arrivals)
        return Summary(
            num_requests=len(self.arrivals),
            num_prompt_tokens=num_prompt,
            num_own_tokens=sum(len(a.token_ids) for a in self.arrivals),
            num_output_tokens=num_output,
            mean_prompt_tokens=num_prompt / num,
            mean_output_tokens=num_output / num,
            longest_tokens=max((prompts[a.id] + a.num_output for a in self.arrivals), default=0),
            duration_s=max((a.arrival_s for a in self.arrivals), default=0.0),
        )

    def to_json(self) -> str:
        """Compact: the names of the fields once, then one list for each arrival."""
        document = {
            "minivllm_workload": self.VERSION,
            "name": self.name,
            "seed": self.seed,
            "fields": FIELDS,
            "arrivals": [[getattr(arrival, name) for name in FIELDS] for arrival in self.arrivals],
        }
        return json.dumps(document, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> "Workload":
        """Read what `to_json` wrote. Raises MiniVLLMError for anything else."""
        try:
            document = json.loads(text)
            if document["minivllm_workload"] != Workload.VERSION:
                raise ConfigError(f"version {short(document['minivllm_workload'])}, not {Workload.VERSION}")
            if document["fields"] != FIELDS:
                raise ConfigError("written with other fields")
            arrivals = tuple(Arrival(row[0], row[1], tuple(row[2]), *row[3:]) for row in document["arrivals"])
            return Workload(document["name"], document["seed"], arrivals)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise MiniVLLMError(
                f"not a minivllm workload ({' '.join(str(error).split())[:200]}); make it again"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write JSON. Raises MiniVLLMError when the place cannot be written."""
        return write_text(path, self.to_json(), "workload")

    @staticmethod
    def load(path: str | Path) -> "Workload":
        """Read what `save` wrote. Raises MiniVLLMError when the file is missing or holds something else."""
        return read_text(path, Workload.from_json, "workload")


def open_loop(
    num_requests: int, lengths: Lengths, arrivals: Times = AT_ONCE, *, seed: int = 0, vocab: range = VOCAB
) -> Workload:
    """Requests that come whether or not the engine keeps up: open_loop(300, sharegpt_like(), poisson(2.0))."""
    return _prefixed("open loop", [()], num_requests, lengths, arrivals, Draws(seed, vocab))


def shared_prefix(
    num_requests: int, prefix_tokens: int, lengths: Lengths, arrivals: Times = AT_ONCE, *,
    num_prefixes: int = 1, seed: int = 0, vocab: range = VOCAB,
) -> Workload:  # fmt: skip
    """A system prompt, one of `num_prefixes` in turn, before own tokens and output of which `lengths` tells."""
    need_whole("prefix_tokens", prefix_tokens, 1)
    need_whole("num_prefixes", num_prefixes, 1)
    draws = Draws(seed, vocab)
    prefixes = [draws.tokens(prefix_tokens) for _ in range(num_prefixes)]
    return _prefixed(f"shared prefix {prefix_tokens}", prefixes, num_requests, lengths, arrivals, draws)


def few_shot(
    num_requests: int, shots: Sequence[int], example_tokens: int, lengths: Lengths, arrivals: Times = AT_ONCE, *,
    seed: int = 0, vocab: range = VOCAB,
) -> Workload:  # fmt: skip
    """The first shots[i] of one list of examples, then a question: with shots (1, 5) prefixes nest, as in a tree."""
    if not isinstance(shots, list | tuple) or not shots:
        raise ConfigError(f"shots must list how many examples each prompt has, such as (1, 5), not {short(shots)}")
    for num_examples in shots:
        need_whole("shots", num_examples, 0)
    need_whole("example_tokens", example_tokens, 1)
    draws = Draws(seed, vocab)
    examples = draws.tokens(max(shots) * example_tokens)
    prefixes = [examples[: num_examples * example_tokens] for num_examples in shots]
    return _prefixed(f"few-shot {shots}", prefixes, num_requests, lengths, arrivals, draws)


def closed_loop(
    num_users: int, requests_per_user: int, lengths: Lengths, think_s: float = 0.0, arrivals: Times = AT_ONCE, *,
    seed: int = 0, vocab: range = VOCAB,
) -> Workload:  # fmt: skip
    """Users who wait: each asks again, something new, `think_s` after its last answer; `arrivals` are their starts."""
    need_whole("requests_per_user", requests_per_user, 1)
    need_seconds("think_s", think_s)
    draws = Draws(seed, vocab)
    rows = [
        row
        for i, start_s in enumerate(draws.times(arrivals, "num_users", num_users))
        for row in _chain(f"u{i}.", start_s, (), requests_per_user, lengths, think_s, draws)
    ]
    return Workload(f"closed loop, {num_users} users, {lengths.name}", seed, tuple(rows))


def chats(
    num_chats: int, num_turns: int, system_tokens: int, lengths: Lengths, think_s: float = 0.0,
    arrivals: Times = AT_ONCE, *, seed: int = 0, vocab: range = VOCAB,
) -> Workload:  # fmt: skip
    """Conversations under one system prompt: a turn's prompt is all that was said, and the new words of the user.

    `lengths` tells of one turn: the user's tokens and the reply's. A later turn carries only the user's (`continues`).
    """
    need_whole("num_turns", num_turns, 1)
    need_whole("system_tokens", system_tokens, 0)
    need_seconds("think_s", think_s)
    draws = Draws(seed, vocab)
    system = draws.tokens(system_tokens)
    rows = [
        replace(row, continues=row.after is not None)
        for i, start_s in enumerate(draws.times(arrivals, "num_chats", num_chats))
        for row in _chain(f"c{i}.", start_s, system, num_turns, lengths, think_s, draws)
    ]
    return Workload(f"{num_chats} chats of {num_turns} turns, {lengths.name}", seed, tuple(rows))


def agents(
    num_agents: int, num_branches: int, fork_at: int, root: Lengths, branch: Lengths, arrivals: Times = AT_ONCE, *,
    seed: int = 0, vocab: range = VOCAB,
) -> Workload:  # fmt: skip
    """Agents that split: after `fork_at` output tokens of the root, branches go on from there, each with own tokens.

    `root` tells of the first prompt and output, which go on too; `branch` of what a branch appends and then writes.
    """
    need_whole("num_branches", num_branches, 1)
    draws = Draws(seed, vocab)
    rows: list[Arrival] = []
    for i, start_s in enumerate(draws.times(arrivals, "num_agents", num_agents)):
        num_prompt, num_output = draws.lengths(root)
        rows.append(Arrival(f"a{i}", start_s, draws.tokens(num_prompt), num_output))
        for k in range(num_branches):
            num_own, num_output = draws.lengths(branch)
            own = draws.tokens(num_own)
            rows.append(Arrival(f"a{i}.{k}", start_s, own, num_output, fork_of=f"a{i}", fork_at=fork_at))
    return Workload(f"{num_agents} agents with {num_branches} branches", seed, tuple(rows))


def nano(num_requests: int = 256, least: int = 100, most: int = 1024, seed: int = 0) -> Workload:
    """The benchmark of nano-vllm: prompts and outputs of 100 to 1024 tokens, all at once; token ids 0 to 10,000."""
    need_whole("num_requests", num_requests, 1)
    need_whole("least", least, 1)
    need_whole("most", most, least)
    random = Random(seed)  # drawn in this order, so that it equals our reference workload token for token
    prompts = [
        tuple(random.randint(0, 10_000) for _ in range(random.randint(least, most))) for _ in range(num_requests)
    ]
    rows = [Arrival(f"r{i}", 0.0, prompt, random.randint(least, most)) for i, prompt in enumerate(prompts)]
    return Workload("nano", seed, tuple(rows))


def _prefixed(
    name: str, prefixes: Sequence[tuple[int, ...]], num_requests: int, lengths: Lengths, arrivals: Times, draws: Draws
) -> Workload:
    """Requests r0, r1 ... that wait for nobody, with the prefixes in turn."""
    rows: list[Arrival] = []
    for i, arrival_s in enumerate(draws.times(arrivals, "num_requests", num_requests)):
        num_own, num_output = draws.lengths(lengths)
        rows.append(Arrival(f"r{i}", arrival_s, prefixes[i % len(prefixes)] + draws.tokens(num_own), num_output))
    return Workload(f"{name}, {lengths.name}, {arrivals.name}", draws.seed, tuple(rows))


def _chain(
    name: str, start_s: float, first: tuple[int, ...], num: int, lengths: Lengths, think_s: float, draws: Draws
) -> Iterator[Arrival]:
    """Requests name0, name1 ... that wait each for the one before; the tokens `first` open the first prompt."""
    for k in range(num):
        num_own, num_output = draws.lengths(lengths)
        own = draws.tokens(num_own)
        if k == 0:
            yield Arrival(f"{name}0", start_s, first + own, num_output)
        else:
            yield Arrival(f"{name}{k}", start_s, own, num_output, after=f"{name}{k - 1}", think_s=think_s)
