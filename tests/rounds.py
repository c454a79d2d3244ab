"""Rounds of speculation on a vocabulary of four, many times over, and the exact distribution they must have.

The judged part is the engine's: `verify`, its rule and random streams, and RequestTarget's distributions. The rows of
logits are a table (a token's row depends on the token before it), and each distribution is asked for once.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import product
from math import exp, log, sqrt
from typing import Any

import torch

from minivllm import SamplingParams
from minivllm.request import Request
from minivllm.runner.sampler import noise, pick
from minivllm.runner.speculation import RequestTarget
from minivllm.speculative.proposer import Draft
from minivllm.speculative.verify import draft_noise, verify

VOCAB, LENGTH, MOST_DRAFTS, EOS = 4, 3, 2, 0
PROMPT = [1, 2]
LOGITS = torch.tensor(
    [[1.13, 0.31, -0.42, 0.93], [-0.71, 1.61, 0.23, 0.12], [0.41, 0.53, 0.67, 0.19], [2.03, -1.07, -0.55, 0.81]]
)
DRAFTER = torch.tensor(
    [[0.5, 0.2, 0.1, 0.2], [0.3, 0.3, 0.4, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.45, 0.1, 0.2]], dtype=torch.float64
)
Sequence = tuple[int, ...]
Noise = Callable[[int, int, int], torch.Tensor]


class Case:
    """One way of sampling and of drafting; `draw` gives the tokens of one seed."""

    def __init__(self, params: SamplingParams, *, is_drawn: bool, drafter_noise: Noise = draft_noise) -> None:
        self.params, self.is_drawn, self.drafter_noise = params, is_drawn, drafter_noise
        self.accepted: Counter[int] = Counter()  # of the first round
        self._probs: dict[Sequence, torch.Tensor] = {}

    def draw(self, seed: int) -> Sequence:
        """LENGTH tokens, in as many rounds as it takes."""
        tokens: Sequence = ()
        while len(tokens) < LENGTH:
            draft = self.propose(tokens, min(MOST_DRAFTS, LENGTH - len(tokens) - 1), seed)
            found = verify(draft, TableTarget(self, tokens, seed))
            self.accepted[len(found) - 1] += not tokens
            tokens += tuple(found)
        return tokens

    def counts(self, num_samples: int, first_seed: int = 0) -> Counter[Sequence]:
        return Counter(self.draw(seed) for seed in range(first_seed, first_seed + num_samples))

    def propose(self, tokens: Sequence, length: int, seed: int) -> Draft:
        drafted = [PROMPT[-1], *tokens][-1:]
        for index in range(length):
            q = DRAFTER[drafted[-1]]
            position = len(PROMPT) + len(tokens) + index
            drafted.append(pick(q, self.drafter_noise(seed, position, VOCAB)) if self.is_drawn else int(q.argmax()))
        return Draft(drafted[1:], DRAFTER[drafted[:-1]] if self.is_drawn and length else None)

    def probs(self, tokens: Sequence) -> torch.Tensor:
        """The engine's distribution after these tokens."""
        if tokens not in self._probs:
            self._probs[tokens] = RequestTarget(self.request(()), rows(tokens), [EOS]).probs(tokens)
        return self._probs[tokens]

    def request(self, tokens: Sequence, seed: int = 0) -> Request:
        return Request("r", [*PROMPT, *tokens], len(PROMPT), self.params, 99, seed=seed)

    def exact(self) -> dict[Sequence, float]:
        """The probability of each LENGTH tokens without speculation, by the formulas and not by the engine's code."""
        chances = dict.fromkeys(product(range(VOCAB), repeat=LENGTH), 1.0)
        for tokens in chances:
            for index in range(LENGTH):
                chances[tokens] *= exact_row(self.params, tokens[:index])[tokens[index]]
        return chances


class TableTarget:
    """RequestTarget, its distributions looked up; `sample` draws from them in the same way."""

    def __init__(self, case: Case, tokens: Sequence, seed: int) -> None:
        self.case, self.tokens, self.seed = case, tokens, seed
        self.num_tokens = len(PROMPT) + len(tokens)

    def probs(self, accepted: Iterable[int]) -> torch.Tensor:
        return self.case.probs((*self.tokens, *accepted))

    def choose(self, accepted: Collection[int]) -> int:
        return pick(self.probs(accepted), noise(self.seed, self.num_tokens + len(accepted), VOCAB))


def rows(drafts: Sequence) -> torch.Tensor:
    """The target's logits [1 + drafts, vocab] behind the prompt."""
    return LOGITS[[PROMPT[-1], *drafts]]


def exact_row(params: SamplingParams, tokens: Sequence) -> list[float]:
    """min_tokens, penalties, temperature, min_p, top_k, top_p, one after the other, in plain Python."""
    scores = LOGITS[tokens[-1] if tokens else PROMPT[-1]].tolist()
    if len(tokens) < params.min_tokens:
        scores[EOS] = float("-inf")
    for token in {*PROMPT, *tokens}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(tokens):
        scores[token] -= params.frequency_penalty * tokens.count(token) + params.presence_penalty
    weights = [exp(score / params.temperature) for score in scores]
    probs = [weight / sum(weights) for weight in weights]
    kept = [p if p >= params.min_p * max(probs) else 0.0 for p in probs]
    if params.top_k:
        least = sorted(kept)[-params.top_k]
        kept = [p if p >= least else 0.0 for p in kept]
    kept = [p / sum(kept) for p in kept]
    before = [sum(other for other in kept if other > p) for p in kept]
    kept = [p if ahead < params.top_p else 0.0 for p, ahead in zip(kept, before, strict=True)]
    return [p / sum(kept) for p in kept]


def p_value(counts: Counter[Any], chances: Mapping[Any, float]) -> float:
    """Chi-square of counts against exact chances; 0 where something happened that cannot."""
    num = sum(counts.values())
    if any(counts[key] for key in counts if chances.get(key, 0.0) == 0):
        return 0.0
    cells = [(float(counts[key]), num * chance) for key, chance in chances.items() if chance > 0]
    rare = [cell for cell in cells if cell[1] < 5]
    pooled = [cell for cell in cells if cell[1] >= 5] + ([tuple(map(sum, zip(*rare, strict=True)))] if rare else [])
    square = sum((seen - expected) ** 2 / expected for seen, expected in pooled if expected > 0)
    return chi_square_tail(square, len(pooled) - 1)


def chi_square_tail(square: float, degrees: int) -> float:
    """The probability of at least this; chi_square_tail(2 ln 20, 2) == 0.05."""
    half = torch.tensor([degrees / 2, square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def variation(counts: Counter[Any], chances: Mapping[Any, float]) -> float:
    """Total variation between what was counted and what is expected."""
    num = sum(counts.values())
    return sum(abs(counts[key] / num - chances.get(key, 0.0)) for key in {*counts, *chances}) / 2


def most_variation(num_samples: int, num_cells: int, doubt: float = 1e-6) -> float:
    """What the variation of true samples stays below but once in 1 / doubt times (McDiarmid 1989)."""
    return sqrt(num_cells / num_samples) / 2 + sqrt(log(1 / doubt) / (2 * num_samples))


def marginal(table: dict[Sequence, float] | Counter[Sequence], index: int) -> Counter[Sequence]:
    """The token at one place, whatever the others."""
    found: Counter[Sequence] = Counter()
    for tokens, amount in table.items():
        found[(tokens[index],)] += amount  # type: ignore[assignment]  # chances, or counts
    return found
