"""What a prefix cache could reach at best on a sequence of prompts, to set what was achieved against; what it costs.

The prompts share one namespace and are served one after the other. Generated tokens do not count as kept: a chat whose
next prompt holds the last answer can do better.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, pairwise
from math import inf
from random import Random
from statistics import median
from time import perf_counter

from minivllm.config import require_integers
from minivllm.engine.block_pool import Block
from minivllm.engine.eviction import Eviction
from minivllm.engine.radix_cache import RadixCache, num_common
from minivllm.errors import ConfigError
from minivllm.request import Request, SamplingParams

Prompts = Sequence[Sequence[int]]


def achieved(prompts: Prompts, num_hit_tokens: Sequence[int]) -> float:
    """The hit rate: tokens found, one count for each prompt, as a share of all prompt tokens.

    Raises ConfigError for another number of counts than of prompts, and for a count that its prompt cannot have.
    """
    if len(num_hit_tokens) != len(prompts):
        raise ConfigError(f"num_hit_tokens has {len(num_hit_tokens)} counts for {len(prompts)} prompts; give one each")
    total = sum(len(prompt) for prompt in prompts)
    for index, (prompt, num_hit) in enumerate(zip(prompts, num_hit_tokens, strict=True)):
        if not 0 <= num_hit <= len(prompt):
            raise ConfigError(f"num_hit_tokens[{index}] must be 0 to {len(prompt)}, its prompt's tokens, not {num_hit}")
    return sum(num_hit_tokens) / total if total else 0.0


def optimum(prompts: Prompts, block_size: int = 1) -> float:
    """The hit rate of an infinite cache: 1 - distinct tokens in the trie of the prompts / all tokens, in any order.

    By blocks only whole ones are found: optimum([[1, 2, 3, 4], [1, 2, 3, 9]]) == 3 / 8, with block_size=2 it is 2 / 8.
    An engine that always computes a prompt's last token (I7) stays below it where prompts repeat.
    """
    _require_block_size(block_size)
    words = sorted(list(prompt) for prompt in prompts)  # the longest start shared with any before is that with the last
    shared = [num_common(before, word) // block_size * block_size for before, word in pairwise(words)]
    return achieved(words, [0, *shared][: len(words)])


def belady(prompts: Prompts, block_size: int, num_blocks: int) -> list[int]:
    """Tokens found for each prompt when the victim is always the block whose next use is farthest (Belady 1966).

    An upper bound for every policy that finds whole blocks and serves the prompts in this order: no choice of victims
    finds more in total, be they leaves or not, as long as a prompt's own blocks stay while it runs. Taking only leaves
    costs nothing: whoever uses a block uses all before it, so theirs is the earlier next use, and equal ones go deepest
    first. Tails that fill no block take no room here and are never found: a token-exact cache may find up to
    block_size - 1 tokens more for each prompt.
    """
    chains = block_chains(prompts, block_size)
    uses: dict[int, deque[int]] = defaultdict(deque)  # when each block will be used
    for now, chain in enumerate(chains):
        if len(chain) > num_blocks:
            raise ConfigError(f"num_blocks={num_blocks} is too few: prompt {now} alone fills {len(chain)} blocks")
        for block in chain:
            uses[block].append(now)
    cached: set[int] = set()
    farthest: list[tuple[float, int, int]] = []  # (-next use, -index in the chain, block); what is past sinks for good
    hits: list[int] = []
    for chain in chains:
        num_hit = next((index for index, block in enumerate(chain) if block not in cached), len(chain))
        hits.append(num_hit * block_size)
        for block in chain:
            uses[block].popleft()
        for block in chain[num_hit:]:
            if len(cached) == num_blocks:
                cached.remove(heappop(farthest)[2])
            cached.add(block)
        for index, block in enumerate(chain):
            heappush(farthest, (-_next_use(uses[block]), -index, block))
    return hits


def block_chains(prompts: Prompts, block_size: int) -> list[list[int]]:
    """Each prompt's full blocks, numbered by contents and prefix: [[1, 2], [1, 3]] -> [[0, 1], [0, 2]] (size 1)."""
    _require_block_size(block_size)
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    chains: list[list[int]] = []
    for prompt in prompts:
        chain: list[int] = []
        for start in range(0, len(prompt) - block_size + 1, block_size):
            contents = (chain[-1] if chain else -1, tuple(prompt[start : start + block_size]))
            chain.append(numbers.setdefault(contents, len(numbers)))
        chains.append(chain)
    return chains


@dataclass(frozen=True, slots=True)
class RadixCosts:
    """Times on the CPU at hand, in a tree that is full."""

    num_nodes: int
    insert_us: float  # of one block, on average while the tree fills
    match_ms: float  # of one prompt, best of three; median over the prompts
    slowest_match_ms: float
    evict_us: float  # of one block: victim, remove and evict, on average until the tree is empty


def measure_radix(num_blocks: int = 100_000, block_size: int = 16, num_prompt: int = 8_000) -> RadixCosts:
    """Fill a tree with prompts that each share a random beginning with an earlier one; match them all; empty it."""
    cache, random, requests = RadixCache(block_size), Random(0), list[Request]()
    eviction, blocks = Eviction("lru", cache), list[Block]()
    insert_s = 0.0
    for name in count():
        num_shared = random.randrange(num_prompt) if requests else 0
        shared = random.choice(requests).token_ids[:num_shared] if requests else []
        token_ids = shared + [random.randrange(50_000) for _ in range(num_prompt - num_shared)]
        requests.append(Request(str(name), token_ids, num_prompt, SamplingParams(), 1))
        start_s = perf_counter()
        blocks += _insert_all(cache, token_ids, len(blocks))
        insert_s += perf_counter() - start_s
        if len(blocks) >= num_blocks:
            break
    match_ms = [min(_match_ms(cache, request) for _ in range(3)) for request in requests]  # others use the CPU too
    num_nodes = cache.num_nodes
    for block in reversed(blocks):
        eviction.add(block)
    start_s = perf_counter()
    for _ in blocks:
        victim = eviction.victim()
        eviction.remove(victim)
        cache.evict(victim)
    evict_us = (perf_counter() - start_s) * 1e6 / len(blocks)
    return RadixCosts(num_nodes, insert_s * 1e6 / len(blocks), median(match_ms), max(match_ms), evict_us)


def _insert_all(cache: RadixCache, token_ids: list[int], first_id: int) -> list[Block]:
    """Cache the full blocks of a prompt; the blocks that were new to the cache."""
    added: list[Block] = []
    parent: int | str = ""
    for start in range(0, len(token_ids) - cache.block_size + 1, cache.block_size):
        block = Block(first_id + len(added))
        serial = cache.insert(block, parent, 0, token_ids[start : start + cache.block_size])
        assert serial is not None
        parent = serial
        if block.entry is not None:
            added.append(block)
    return added


def _match_ms(cache: RadixCache, request: Request) -> float:
    start_s = perf_counter()
    hit = cache.match(request, request.num_tokens - 1)
    elapsed_ms = (perf_counter() - start_s) * 1e3
    assert hit.num_tokens >= (request.num_tokens - 1) // cache.block_size * cache.block_size
    return elapsed_ms


def _require_block_size(block_size: int) -> None:
    require_integers(block_size=block_size)
    if block_size < 1:
        raise ConfigError(f"block_size must be at least 1 token, not {block_size}")


def _next_use(times: deque[int]) -> float:
    return times[0] if times else inf
