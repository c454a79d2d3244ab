"""One request to come (Arrival), and the distributions that its time and its lengths are drawn from."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import erfc, log, sqrt
from random import Random

from minivllm.errors import ConfigError, short

# (mean, sigma of the logarithm) of the prompt, and of the output, in tokens. The means are those of Kwon+ SOSP'23
# (arXiv 2309.06180), figure 11. The sigmas are ours, for the paper prints no spread; that of ShareGPT's outputs makes
# E[output^2] / E[output] 600 tokens; its figure 2 implies 598 (reserved slots of Orca Max: 2 * 13.3 / 91.1 * 2048).
# With the same one for Alpaca's outputs, Orca batches about as many requests of it as in the paper's figure 13.
SHAREGPT = ((161.31, 1.2), (337.99, 0.8))
ALPACA = ((19.31, 0.6), (58.45, 0.8))
MAX_TOTAL = 2048  # tokens of prompt and output that OPT, the paper's model, can hold
MOST_TOTAL = 2**17  # tokens; calibration takes time in proportion, seconds here

Tail = tuple[float, float]  # mean and sigma


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come. Its output has exactly `num_output` tokens: play it with ignore_eos and that max_tokens.

    It comes at `arrival_s`, or, when that is later, `think_s` after the request `after` finished, or in the moment
    when the request `fork_of` has `fork_at` output tokens. `token_ids` is the whole prompt, except: with `continues`
    the prompt and output of `after` stand before it, and for a fork all tokens that `fork_of` had at that moment.
    """

    id: str
    arrival_s: float  # from the start
    token_ids: tuple[int, ...]
    num_output: int
    priority: int = 0  # lower runs first
    salt: str = ""  # namespace of the prefix cache
    after: str | None = None
    think_s: float = 0.0
    continues: bool = False
    fork_of: str | None = None
    fork_at: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id or not self.id.isprintable():
            raise ConfigError(f"id must be a non-empty string of one line, not {short(self.id)}")
        need_seconds(f"{self.id}: arrival_s", self.arrival_s)
        need_seconds(f"{self.id}: think_s", self.think_s)
        need_whole(f"{self.id}: num_output", self.num_output, 1)
        if not isinstance(self.token_ids, tuple) or any(type(t) is not int or t < 0 for t in self.token_ids):
            raise ConfigError(f"{self.id}: token_ids must be a tuple of integers of at least 0")
        if type(self.priority) is not int or not isinstance(self.salt, str) or type(self.continues) is not bool:
            raise ConfigError(f"{self.id}: priority must be an integer, salt a string, continues True or False")
        if not isinstance(self.after, str | None) or not isinstance(self.fork_of, str | None):
            raise ConfigError(f"{self.id}: after and fork_of must be the id of another request, or None")
        if self.after is not None and self.fork_of is not None:
            raise ConfigError(f"{self.id}: give after or fork_of, not both")
        if (self.fork_of is None) != (self.fork_at is None):
            raise ConfigError(f"{self.id}: fork_of and fork_at go together")
        if self.fork_at is not None:
            need_whole(f"{self.id}: fork_at", self.fork_at, 1)
        if self.after is None and (self.continues or self.think_s):
            raise ConfigError(f"{self.id}: continues and think_s need the id of the request before, in after")
        if not self.token_ids and not self.continues and self.fork_of is None:
            raise ConfigError(f"{self.id}: token_ids is empty; give the prompt at least one token")


@dataclass(frozen=True)
class Times:
    """An arrival process: `draw(random, n)` gives n times in seconds from the start, ascending."""

    name: str
    draw: Callable[[Random, int], list[float]]


@dataclass(frozen=True)
class Lengths:
    """A joint distribution: `draw(random)` gives the tokens of one prompt and of its output, each at least 1."""

    name: str
    draw: Callable[[Random], tuple[int, int]]


def all_at_once() -> Times:
    """Everybody is there at time 0: the offline batch."""
    return Times("all at once", lambda random, num: [0.0] * num)


def poisson(rate_per_s: float) -> Times:
    """Independent users, `rate_per_s` requests a second on average: the gaps are exponential, with std = mean."""
    need_positive("rate_per_s", rate_per_s)
    return Times(f"poisson {rate_per_s:g}/s", lambda random, num: _times(lambda: random.expovariate(rate_per_s), num))


def bursts(rate_per_s: float, burstiness: float = 0.25) -> Times:
    """Clustered requests: Gamma gaps of mean 1 / rate_per_s and std = mean / sqrt(burstiness).

    `burstiness` is the Gamma's shape, as in `vllm bench serve`: 1 is Poisson, less comes in bursts, more is regular.
    """
    need_positive("rate_per_s", rate_per_s)
    need_positive("burstiness", burstiness)
    scale_s = 1 / (rate_per_s * burstiness)
    return Times(
        f"bursts {rate_per_s:g}/s, burstiness {burstiness:g}",
        lambda random, num: _times(lambda: random.gammavariate(burstiness, scale_s), num),
    )


def _times(gap_s: Callable[[], float], num: int) -> list[float]:
    """Sums of gaps, to the microsecond: six digits keep the JSON short."""
    return [round(time_s, 6) for time_s in accumulate(gap_s() for _ in range(num))]


def fixed(num_prompt: int, num_output: int) -> Lengths:
    """Every request alike."""
    need_whole("num_prompt", num_prompt, 1)
    need_whole("num_output", num_output, 1)
    return Lengths(f"fixed {num_prompt}+{num_output}", lambda random: (num_prompt, num_output))


def uniform(least: int, most: int) -> Lengths:
    """Prompt and output each from `least` to `most` tokens, both included, all equally likely."""
    need_whole("least", least, 1)
    need_whole("most", most, least)
    return Lengths(
        f"uniform {least}..{most}", lambda random: (random.randint(least, most), random.randint(least, most))
    )


def sharegpt_like(max_total: int = MAX_TOTAL, scale: float = 1.0) -> Lengths:
    """Chat lengths: 161.31 tokens in and 337.99 out on average, times `scale`; prompt + output <= max_total.

    Our generator, not the data set: two clipped lognormals with the published means (see SHAREGPT above).
    """
    return _heavy_tailed("sharegpt_like", SHAREGPT, max_total, scale)


def alpaca_like(max_total: int = MAX_TOTAL, scale: float = 1.0) -> Lengths:
    """Instruction lengths: 19.31 tokens in and 58.45 out on average; else as `sharegpt_like`."""
    return _heavy_tailed("alpaca_like", ALPACA, max_total, scale)


def _heavy_tailed(name: str, tails: tuple[Tail, Tail], max_total: int, scale: float) -> Lengths:
    """Rounded lognormals: the prompt clipped to 1 .. max_total - 1, the output to 1 .. max_total - prompt."""
    need_whole("max_total", max_total, 2)
    need_positive("scale", scale)
    if max_total > MOST_TOTAL:
        raise ConfigError(f"max_total must be at most {MOST_TOTAL}, not {max_total}")
    (prompt_mean, prompt_sigma), (output_mean, output_sigma) = tails
    prompt_mean, output_mean = prompt_mean * scale, output_mean * scale
    if min(prompt_mean, output_mean) <= 1 or prompt_mean + output_mean > 0.8 * max_total:
        raise ConfigError(
            f"{name}: means of {prompt_mean:g} + {output_mean:g} tokens do not fit between 1 each and 80 % of "
            f"max_total ({max_total}); change scale or max_total"
        )
    prompt_mu, output_mu = _calibrate((prompt_mean, prompt_sigma), (output_mean, output_sigma), max_total)

    def draw(random: Random) -> tuple[int, int]:
        num_prompt = _clip(random.lognormvariate(prompt_mu, prompt_sigma), max_total - 1)
        return num_prompt, _clip(random.lognormvariate(output_mu, output_sigma), max_total - num_prompt)

    return Lengths(f"{name} x{scale:g}, at most {max_total}", draw)


def _clip(length: float, most: int) -> int:
    return max(1, min(most, round(length)))


@cache
def _calibrate(prompt: Tail, output: Tail, max_total: int) -> tuple[float, float]:
    """The two mu for which the clipped and rounded lengths have exactly the wanted means; no sampling."""
    cuts = range(1, max_total)  # a prompt has 1 .. max_total - 1 tokens
    prompt_mu = _solve(lambda mu: sum(_reach(mu, prompt[1], max_total - 1)), prompt[0])
    at_least = [*_reach(prompt_mu, prompt[1], max_total - 1), 0.0]

    def output_mean(mu: float) -> float:
        means = list(accumulate(_reach(mu, output[1], max_total - 1)))  # [c - 1]: the mean when clipped to c
        return sum((at_least[n - 1] - at_least[n]) * means[max_total - n - 1] for n in cuts)

    return prompt_mu, _solve(output_mean, output[0])


def _reach(mu: float, sigma: float, most: int) -> list[float]:
    """P(length >= k) for k = 1 .. most, which sum to the mean; a rounded length is k or more from k - 0.5 on."""
    return [1.0] + [0.5 * erfc((log(k - 0.5) - mu) / (sigma * sqrt(2))) for k in range(2, most + 1)]


def _solve(mean_at: Callable[[float], float], wanted: float) -> float:
    """The mu whose mean is `wanted`, by bisection; rounded, so that every machine gets the same."""
    low, high = -10.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < wanted else (low, middle)
    return round(low, 9)


class Draws:
    """Three streams of one seed, so that another arrival process leaves lengths and tokens as they were."""

    def __init__(self, seed: int, vocab: range) -> None:
        if type(seed) is not int:
            raise ConfigError(f"seed must be an integer, not {short(seed)}")
        if not isinstance(vocab, range) or not vocab or min(vocab[0], vocab[-1]) < 0:
            raise ConfigError(f"vocab must be a range of token ids such as range(10_000), not {short(vocab)}")
        self.seed = seed
        self._times, self._lengths, self._tokens = (Random(f"{seed} {use}") for use in ("times", "lengths", "tokens"))
        self._vocab = vocab

    def times(self, arrivals: Times, name: str, num: int) -> list[float]:
        need_whole(name, num, 1)
        if not isinstance(arrivals, Times):
            raise ConfigError(f"arrivals must be poisson(2.0), bursts(2.0) or all_at_once(), not {short(arrivals)}")
        return arrivals.draw(self._times, num)

    def lengths(self, lengths: Lengths) -> tuple[int, int]:
        if not isinstance(lengths, Lengths):
            raise ConfigError(f"lengths must be fixed(128, 64), sharegpt_like() or the like, not {short(lengths)}")
        return lengths.draw(self._lengths)

    def tokens(self, num: int) -> tuple[int, ...]:
        return tuple(self._tokens.choices(self._vocab, k=num))


def need_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {short(value)}")


def need_positive(name: str, value: float) -> None:
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{name} must be a number above 0, not {short(value)}")


def need_seconds(name: str, value: float) -> None:
    if not _is_number(value) or value < 0:
        raise ConfigError(f"{name} must be a number of seconds, 0 or more, not {short(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
