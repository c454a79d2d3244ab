"""Two attacks on a shared prefix cache, and what stops them: tokens compared at every hit, a salt for each tenant.

Collision (GHSA-rm76-4mrf-v9r8, vLLM before 0.7.2): two prompts with one hash, and the second is served the first one's
K and V. Timing (CVE-2025-46570): a prompt that somebody else has sent answers sooner, so its sender can be found out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from random import Random
from unittest.mock import patch

from tqdm.auto import tqdm

from minivllm.config import require_integers
from minivllm.engine import kv_manager, prefix_cache
from minivllm.engine.prefix_cache import chain_hash, root_hash
from minivllm.errors import ConfigError
from minivllm.llm import LLM
from minivllm.outputs import RequestOutput
from minivllm.request import SamplingParams

WEAK_BITS = 12
FIRST_TOKEN = SamplingParams(temperature=0, max_tokens=1)
Measure = Callable[[RequestOutput], float]


@contextmanager
def weak_hash(num_bits: int = WEAK_BITS) -> Iterator[None]:
    """Cut the chained hash to a few bits, as a hash that an attacker can invert; this room may patch, no other."""
    with patch.object(kv_manager, "chain_hash", lambda parent, tokens: chain_hash(parent, tokens) % 2**num_bits):
        yield


@contextmanager
def no_token_check() -> Iterator[None]:
    """Trust the hash alone, as vLLM did: a hit needs no equal tokens and no equal parent."""
    with patch.object(prefix_cache, "_holds", lambda block, parent, token_ids: block.entry is not None):
        yield


@dataclass(frozen=True)
class Collision:
    """Two first blocks with one hash, and what the second prompt got after the first had run."""

    victim: tuple[int, ...]
    attacker: tuple[int, ...]
    num_tried: int
    cached_with_check: int  # tokens served from the cache
    cached_without_check: int
    answer: tuple[int, ...]  # of the attacker's prompt on an empty cache
    answer_with_check: tuple[int, ...]
    answer_without_check: tuple[int, ...]


def find_collision(block_size: int, vocab_size: int, seed: int = 0) -> tuple[list[int], list[int], int]:
    """Two blocks of tokens that the weak hash cannot tell apart, and how many were tried: a birthday search."""
    random, seen = Random(seed), dict[int, list[int]]()
    for num_tried in count(1):
        tokens = [random.randrange(vocab_size) for _ in range(block_size)]
        weak = chain_hash(root_hash(""), tokens) % 2**WEAK_BITS
        if weak in seen and seen[weak] != tokens:
            return seen[weak], tokens, num_tried
        seen[weak] = tokens
    raise AssertionError("count() has no end")


def collide(llm: LLM, seed: int = 0, num_output: int = 8) -> Collision:
    """Run the victim's prompt, then the attacker's, with the check and without it.

    Raises ConfigError for an LLM that looks nothing up by hash: there is nothing to collide.
    """
    if not llm.config.enable_prefix_caching or llm.config.prefix_cache != "hash":
        kind = "a radix tree" if llm.config.enable_prefix_caching else "no prefix cache"
        raise ConfigError(f"security: collide attacks a cache of hashes, not {kind}; build LLM(prefix_cache='hash')")
    size, vocab_size = llm.config.block_size, llm.model_config.vocab_size
    victim, attacker, num_tried = find_collision(size, vocab_size, seed)
    tail = [token % vocab_size for token in (17, 4, 9)]
    params = SamplingParams(temperature=0, max_tokens=num_output, ignore_eos=True)

    def run(tokens: list[int]) -> RequestOutput:
        return llm.generate([[*tokens, *tail]], params, use_tqdm=False)[0]

    def after_the_victim() -> RequestOutput:
        llm.reset_prefix_cache()
        run(victim)
        return run(attacker)

    llm.reset_prefix_cache()
    with weak_hash():
        alone = run(attacker)
        with_check = after_the_victim()
        with no_token_check():
            without_check = after_the_victim()
    llm.reset_prefix_cache()
    answers = [tuple(output.outputs[0].token_ids) for output in (alone, with_check, without_check)]
    cached = with_check.num_cached_tokens, without_check.num_cached_tokens
    return Collision(tuple(victim), tuple(attacker), num_tried, *cached, *answers)


@dataclass(frozen=True)
class Attack:
    """What the attacker measured for prompts that the victim had sent, and for prompts that nobody had."""

    sent: tuple[float, ...]
    not_sent: tuple[float, ...]

    @property
    def auc(self) -> float:
        """How often a sent prompt answers sooner than one that was not: 1 is certainty, 0.5 is guessing."""
        pairs = [(a < b) + (a == b) / 2 for a in self.sent for b in self.not_sent]
        return sum(pairs) / len(pairs)


def seconds_to_first_token(output: RequestOutput) -> float:
    assert output.metrics.time_to_first_token is not None
    return output.metrics.time_to_first_token


def attack(
    llm: LLM,
    is_salted: bool,
    num_trials: int = 20,
    num_tokens: int = 160,
    seed: int = 0,
    measure: Measure = seconds_to_first_token,
) -> Attack:
    """In each trial the victim sends a secret prompt; the attacker sends it too, and one that nobody sent.

    Raises ConfigError for less than one trial or one token.
    """
    counts = {"num_trials": num_trials, "num_tokens": num_tokens}
    require_integers(**counts)
    for name, number in counts.items():
        if number < 1:
            raise ConfigError(f"security: {name} must be at least 1, not {number}")
    random, vocab_size = Random(seed), llm.model_config.vocab_size
    sent, not_sent = list[float](), list[float]()

    def send(tokens: list[int], tenant: str) -> float:
        prompt = {"prompt_token_ids": tokens, "cache_salt": tenant if is_salted else ""}
        return measure(llm.generate([prompt], FIRST_TOKEN, use_tqdm=False)[0])

    def draw() -> list[int]:
        return [random.randrange(vocab_size) for _ in range(num_tokens)]

    send(draw(), "attacker")  # the first call of all is slow for other reasons
    for _ in tqdm(range(num_trials), desc=f"timing attack, {'with' if is_salted else 'without'} a salt"):
        secret, other = draw(), draw()
        send(secret, "victim")
        probes = [(sent, secret), (not_sent, other)]
        random.shuffle(probes)  # so that no drift of the machine tells them apart
        for measured, tokens in probes:
            measured.append(send(tokens, "attacker"))
        llm.reset_prefix_cache()
    return Attack(tuple(sent), tuple(not_sent))


def study(model: str = "smollm2-135m", num_trials: int = 20) -> str:
    """Both attacks on a real model, by the clock."""
    llm = LLM(model)
    collision = collide(llm)
    plain, salted = (attack(llm, is_salted, num_trials) for is_salted in (False, True))

    def outcome(num_cached: int, answer: tuple[int, ...]) -> str:
        return f"{num_cached} tokens from the cache, answer {'right' if answer == collision.answer else 'WRONG'}"

    return "\n".join(
        [
            f"Collision of a {WEAK_BITS}-bit hash, found after {collision.num_tried} blocks; the second prompt gets",
            f"  hash trusted     {outcome(collision.cached_without_check, collision.answer_without_check)}",
            f"  tokens compared  {outcome(collision.cached_with_check, collision.answer_with_check)}",
            f"Timing, {num_trials} trials of 160 tokens: was this prompt sent by somebody else?",
            f"  one cache for all       AUC {plain.auc:.2f}",
            f"  a salt for each tenant  AUC {salted.auc:.2f}",
        ]
    )
