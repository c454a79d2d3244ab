"""Who comes to the engine room, when and with what: an open loop whose settings may change while it runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from random import Random

from minivllm.course.engine_frames import Load
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, short
from minivllm.lab.corpus import help_topics
from minivllm.llm import LLM

NUM_TOKENS = 20_000  # that prompts are cut from
NUM_TOPICS = 12
RATES = (0, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Guest:
    """A request that is due."""

    due_s: float
    token_ids: list[int]
    num_output: int


class Guests:
    """Poisson arrivals with even lengths; equal seeds and equal settings at equal times give equal guests."""

    def __init__(self, text: Sequence[int], load: Load, seed: int) -> None:
        self._text = text
        self._gaps, self._lengths, self._places = (Random(f"{seed} {what}") for what in ("gaps", "lengths", "places"))
        self.load = load
        self.next_s = inf
        self.change(load, 0.0)

    def change(self, load: Load, now_s: float) -> None:
        """Other settings from now on; Poisson arrivals forget, so the wait for the next one may be drawn anew."""
        if load.rate != self.load.rate or self.next_s == inf:
            self.next_s = now_s + self._gap(load.rate)
        self.load = load

    def due(self, now_s: float) -> list[Guest]:
        """All who should have come by now."""
        guests = []
        while self.next_s <= now_s:
            guests.append(self._guest(self.next_s))
            self.next_s += self._gap(self.load.rate)
        return guests

    def _guest(self, due_s: float) -> Guest:
        load = self.load
        num_own, num_output = (
            max(1, round(mean * self._lengths.uniform(0.5, 1.5))) for mean in (load.prompt_tokens, load.output_tokens)
        )
        start = self._places.randrange(len(self._text) - num_own)
        own = self._text[start : start + num_own]
        return Guest(due_s, [*self._text[: load.shared_tokens], *own], num_output)

    def _gap(self, rate: float) -> float:
        return self._gaps.expovariate(rate) if rate else inf


def text_of(llm: LLM, seed: int) -> tuple[list[int], str]:
    """Token ids to cut prompts from, and what they are: Python's help topics, or random ids where no words are."""
    if llm.tokenizer is None:
        most = min(llm.model_config.vocab_size, 10_000)
        random = Random(seed)
        return [random.randrange(most) for _ in range(NUM_TOKENS)], "random token ids"
    words = "\n\n".join(text for _, text in help_topics(held_out=False)[:NUM_TOPICS])
    token_ids = llm.tokenizer.encode(words)
    repeats = -(-NUM_TOKENS // len(token_ids))
    return (token_ids * repeats)[:NUM_TOKENS], "Python's help topics"


def choices_of(config: EngineConfig) -> dict[str, tuple[float, ...]]:
    """The values of each slider. The longest prompt and output of all fit into max_model_len together."""
    lengths = _doubling(4, min(config.max_model_len // 4, NUM_TOKENS // 4))
    budgets = [
        budget
        for budget in _doubling(16, config.max_num_batched_tokens)
        if config.chunks_prompts or budget >= config.max_model_len
    ]
    return {
        "rate": RATES,
        "prompt_tokens": lengths,
        "output_tokens": lengths,
        "shared_tokens": (0, *(length for length in lengths if length >= config.block_size)),
        "token_budget": tuple(budgets),
        "batch_limit": _doubling(1, config.max_num_seqs),
    }


def possible(load: Load | None, choices: Mapping[str, Sequence[float]]) -> Load:
    """The nearest that the sliders have; None is the usual load. Raises ConfigError for what is no Load."""
    load = Load() if load is None else load
    if not isinstance(load, Load):
        raise ConfigError(f"the load of an engine room is a Load, such as Load(rate=4), not {short(load)}")
    for name, value in asdict(load).items():
        load = load.changed(name, nearest(choices[name], value))
    return load


def nearest(values: Sequence[float], wanted: float) -> float:
    """The largest value that is not above the wanted one, else the least."""
    return max((value for value in values if value <= wanted), default=values[0])


def _doubling(least: int, most: int) -> tuple[int, ...]:
    """_doubling(4, 20) == (4, 8, 16, 20)."""
    values = []
    while least < most:
        values.append(least)
        least *= 2
    return (*values, most)
