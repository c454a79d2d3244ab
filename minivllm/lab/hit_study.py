"""How near a prefix cache comes to what is possible: hit rates of caches, evictions and orders, beside two bounds.

The trace: questions about a few long documents, some of them popular, served one by one on the real
engine (the runner computes nothing). The optimum is that of an infinite cache (every distinct token once); Belady's
bound knows the future and the size of the pool, but not another order (engine/cache_study.py).
"""

from dataclasses import dataclass
from random import Random

from tqdm.auto import tqdm

from minivllm.engine.cache_study import achieved, belady, optimum
from minivllm.engine.engine import Engine
from minivllm.engine_config import CHOICES, EngineConfig
from minivllm.lab.fake_runner import SilentRunner
from minivllm.request import Request, SamplingParams
from minivllm.workloads import shared_prefix, uniform

BLOCK_SIZE = 16
NUM_DOCUMENTS = 12
DOCUMENT = 250  # tokens: no whole number of blocks
ORDERS = ("fcfs", "longest_prefix_first", "dfs")
POOLS = (24, 64, 256)  # blocks: one document and a question, three documents, all


@dataclass(frozen=True)
class Rates:
    """Hit rates on one trace in a pool of `num_blocks` usable blocks, as shares of all prompt tokens."""

    num_blocks: int
    by_policy: dict[tuple[str, str, str], float]  # (prefix_cache, eviction_policy, scheduling_policy)
    belady: float  # for the order of arrival, whole blocks
    optimum_blocks: float
    optimum_tokens: float


def trace(num_requests: int = 120, num_documents: int = NUM_DOCUMENTS, seed: int = 0) -> list[list[int]]:
    """Prompts: a document of 250 tokens, which fills no whole number of blocks, and a question of 20 to 60.

    The k-th document is asked about with a probability proportional to 1 / k (Zipf).
    """
    workload = shared_prefix(
        num_requests * num_documents, DOCUMENT, uniform(20, 60), num_prefixes=num_documents, seed=seed
    )  # document i % num_documents for prompt i: the j-th question about document d is prompt d + j * num_documents
    asked = Random(seed).choices(range(num_documents), [1 / (k + 1) for k in range(num_documents)], k=num_requests)
    places = [document + asked[:turn].count(document) * num_documents for turn, document in enumerate(asked)]
    return [list(workload.arrivals[place].token_ids) for place in places]


def serve(prompts: list[list[int]], num_blocks: int, cache: str, eviction: str, order: str) -> float:
    """The hit rate of one combination: all prompts wait from the start, one runs at a time."""
    config = EngineConfig(
        num_blocks=1 + num_blocks, block_size=BLOCK_SIZE, max_model_len=num_blocks * BLOCK_SIZE, max_num_seqs=1,
        prefix_cache=cache, eviction_policy=eviction, scheduling_policy=order,
    )  # fmt: skip
    engine = Engine(config, SilentRunner())
    requests = [Request(str(i), list(prompt), len(prompt), SamplingParams(), 1) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return achieved(prompts, [request.num_cached for request in requests])


def measure(prompts: list[list[int]], num_blocks: int) -> Rates:
    """Every eviction policy of both caches in the order of arrival, and LRU in the other orders."""
    kinds = [(cache, eviction, "fcfs") for cache in CHOICES["prefix_cache"] for eviction in CHOICES["eviction_policy"]]
    kinds += [(cache, "lru", order) for cache in CHOICES["prefix_cache"] for order in ORDERS[1:]]
    return Rates(
        num_blocks,
        {kind: serve(prompts, num_blocks, *kind) for kind in kinds},
        achieved(prompts, belady(prompts, BLOCK_SIZE, num_blocks)),
        optimum(prompts, BLOCK_SIZE),
        optimum(prompts),
    )


def study(seed: int = 0) -> str:
    """Hit rates in percent, for pools of three sizes, under a line that says of what and on which engine."""
    prompts = trace(seed=seed)
    measured = [measure(prompts, num_blocks) for num_blocks in tqdm(POOLS, desc="pools")]
    num_tokens = sum(map(len, prompts))
    lines = [
        f"{len(prompts)} questions about {NUM_DOCUMENTS} documents of {DOCUMENT} tokens, Zipf, seed {seed}: "
        f"{num_tokens:,} prompt tokens",
        f"engine: one request at a time, blocks of {BLOCK_SIZE} tokens, pools of {', '.join(map(str, POOLS))} blocks",
    ]
    lines += [f"{'hit rate, percent; blocks in the pool':46}" + "".join(f"{num_blocks:>8}" for num_blocks in POOLS)]
    for kind in measured[0].by_policy:
        name = " ".join(part.ljust(width) for part, width in zip(kind, (7, 9, 22), strict=True))
        lines.append(f"{name:46}" + "".join(f"{100 * rates.by_policy[kind]:8.1f}" for rates in measured))
    for name, bounds in (
        ("Belady, order of arrival, whole blocks", [rates.belady for rates in measured]),
        ("optimum, whole blocks", [rates.optimum_blocks for rates in measured]),
        ("optimum, token by token", [rates.optimum_tokens for rates in measured]),
    ):
        lines.append(f"{name:46}" + "".join(f"{100 * bound:8.1f}" for bound in bounds))
    return "\n".join(lines)
