"""Random lives of the engine: every invariant in every step, every answer equal to that of the request alone.

CI lives 40,000 steps here, and those of the state machine (test_engine_machine.py) and of the museum. The whole proof:

    MINIVLLM_FUZZ_STEPS=100000 MINIVLLM_FUZZ_SEEDS=0,1,2 pytest tests/test_engine_fuzz.py -k random_lives

lives that many steps with each of these seeds; `live_at_random` (lab/random_life.py) does it for any.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations, product
from random import Random

import pytest

from minivllm.engine import kv_manager, prefix_cache
from minivllm.engine.block_pool import Block, BlockPool
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import Move
from minivllm.engine.prefix_cache import HashChainCache, Hit, chain_hash
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.swap import SwapSpace
from minivllm.engine.under_way import Computing
from minivllm.engine_config import CHOICES, EngineConfig
from minivllm.lab.random_life import fitting, live_at_random, live_once
from minivllm.request import BlockTable, Request
from minivllm.speculative_config import SpeculativeConfig
from minivllm.trace import KINDS

STEPS_PER_SEED = int(os.environ.get("MINIVLLM_FUZZ_STEPS", "40000"))
SEEDS = [int(seed) for seed in os.environ.get("MINIVLLM_FUZZ_SEEDS", "0").split(",")]
STATES = (
    "waiting", "pending", "in prefill", "leader in prefill", "in decode", "at a block edge", "held", "preempted",
    "preempted held", "swapped", "swapped held",
)  # fmt: skip
MUST_SEE = (
    *(kind for kind in KINDS if kind != "StepCosted"),  # told by a listener, never by the engine
    *(f"{name} {choice}" for name, choices in CHOICES.items() for choice in choices),
    *(f"{what} {state}" for what in ("abort", "fork") for state in STATES),
    *(f"Waited {reason}" for reason in ("no_seat", "no_budget", "no_blocks", "just_preempted", "batch_runs")),
    "Waited prefix_under_way",
    *(f"Admitted {reason}" for reason in ("fits", "alone", "new_batch", "swapped_in")),
    *(f"Preempted {why}" for why in ("no_blocks", "itself", "held", "recompute", "swap")),
    *(f"evicted by {policy}" for policy in CHOICES["eviction_policy"]),
    "a token too many", "abort in a step", "abort in a step with drafts", "chunk", "chunk beside decode", "companion",
    "copy of a part",
    "copy of a tail", "drafts all stood", "drafts beside a prompt", "drafts by early_exit", "drafts by ngram",
    "drafts in a window", "drafts none stood", "drafts some stood", "duplicate block", "end inside drafts",
    "end length", "end stop", "end stop token", "exchange with an idle one",
    "failed step",
    "fork outside a window", "fork without a seat", "hit after preemption", "hit beside a window", "host full",
    "lingering", "lingering cleared under pressure", "others unharmed", "overtaken", "part given up", "partial hit",
    "pin refused", "prompt logprobs", "reset", "reset refused", "salted hit", "samples", "short with a step under way",
    "stop string",
)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_random_lives_keep_every_invariant(seed: int) -> None:
    seen = live_at_random(Random(seed), STEPS_PER_SEED)
    assert seen["steps"] >= STEPS_PER_SEED
    assert [what for what in MUST_SEE if not seen[what]] == []


DRAFTERS = {
    "fixed": (SpeculativeConfig("ngram"),),
    "adaptive": (SpeculativeConfig("ngram", 7, adaptive=True, max_step_tokens=40),),
    "by request": (SpeculativeConfig("ngram", 2), SpeculativeConfig("early_exit", 5, adaptive=True)),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_lives_with_drafts_keep_every_invariant(name: str) -> None:
    seen = live_at_random(Random(4), STEPS_PER_SEED // 5, allocator="paged", speculative=DRAFTERS[name])
    assert seen["drafts all stood"] > 100 < seen["drafts none stood"] and seen["drafts some stood"] > 30
    met = ("BlocksTrimmed", "BlockCached", "PrefixHit", "Preempted recompute", "Preempted swap", "SwappedIn", "chunk")
    more = (
        "Forked",
        "samples",
        "prefix_cache radix",
        "end inside drafts",
        "abort in a step with drafts",
        "failed step",
    )
    assert [what for what in (*met, *more) if not seen[what]] == []
    assert all(seen[f"drafts by {each.method}"] for each in DRAFTERS[name])


SIZES = {"num_blocks": 25, "max_model_len": 20, "max_num_seqs": 4, "max_num_batched_tokens": 8, "num_host_blocks": 9}
PAIRED: dict[str, tuple[object, ...]] = {
    **CHOICES, "enable_prefix_caching": (True, False), "group_windows": ((None,), (3,), (None, 3)),
    "block_size": (1, 5), "speculative": ((), DRAFTERS["fixed"], DRAFTERS["adaptive"]),
}  # fmt: skip


def pairs_of(config: EngineConfig) -> set[frozenset[tuple[str, object]]]:
    """Every two options with the values they have: batching="static" beside allocator="buddy"."""
    return {frozenset(pair) for pair in combinations([(name, getattr(config, name)) for name in PAIRED], 2)}


def covering_configs(random: Random) -> list[EngineConfig]:
    """Few configs in which every two values that do not contradict each other stand together."""
    configs: list[EngineConfig] = []
    covered: set[frozenset[tuple[str, object]]] = set()
    while True:  # of some guesses the one that adds most, until none adds anything
        guesses = [{name: random.choice(values) for name, values in PAIRED.items()} for _ in range(800)]
        best = max((fitting(**SIZES, **guess) for guess in guesses), key=lambda config: len(pairs_of(config) - covered))
        if pairs_of(best) <= covered:
            return configs
        covered |= pairs_of(best)
        configs.append(best)


def test_every_two_policies_live_together() -> None:
    random, seen = Random(0), Counter[str]()
    configs = covering_configs(random)
    covered = {pair for config in configs for pair in pairs_of(config)}
    all_pairs = {
        frozenset([(first, value), (second, other)])
        for first, second in combinations(PAIRED, 2)
        for value, other in product(PAIRED[first], PAIRED[second])
    }
    rivals = CHOICES["allocator"][1:]  # each request has blocks of its own: nothing to cache
    drafted = [("speculative", DRAFTERS[name]) for name in ("fixed", "adaptive")]
    shared = (("enable_prefix_caching", True), ("group_windows", (None, 3)), *drafted)
    assert all_pairs - covered == {frozenset([("allocator", rival), what]) for rival in rivals for what in shared}
    for config in configs:
        live_once(config, random, seen)
    assert seen["steps"] > 3_000


def test_weak_hash_never_changes_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_manager, "chain_hash", lambda parent, token_ids: chain_hash(parent, token_ids) % 5)
    seen = live_at_random(Random(1), 1_000, prefix_cache="hash", allocator="paged", enable_prefix_caching=True)
    assert seen["PrefixHit"] > 0


# Faults that we could have, beside those of the museum: each must be caught, by an invariant or by a wrong answer.


def match_one_block(cache: HashChainCache, request: Request, most_tokens: int) -> Hit:
    return match(cache, request, min(most_tokens, cache.block_size))


def preempt_first(self: Scheduler, victim: Request, reason: str) -> None:
    preempt(self, self.running.first, reason)


def grow_too_early(num_tokens: int, block_size: int) -> int:
    return num_tokens // block_size + 1


def share_without_counting(pool: BlockPool, block: Block) -> None:
    if block.ref_count == 0:
        pool._unlink(block)
        block.ref_count = 1


def share_in_free_list(pool: BlockPool, block: Block) -> None:
    block.ref_count += 1


def hash_without_parent(parent_hash: int, token_ids: list[int]) -> int:
    return chain_hash(0, token_ids)


def trust_any_hash(block: Block, parent: int | str, token_ids: list[int]) -> bool:
    return block.entry is not None


def compare_tokens_only(block: Block, parent: int | str, token_ids: list[int]) -> bool:
    return block.entry is not None and block.entry.token_ids == tuple(token_ids)


def admit_beyond_seats(self: Scheduler, request: Request, budget: int, others: Computing) -> tuple[int, str]:
    return self._admit_after(request, self.kv.match(request), budget)


def end_one_late(request: Request, token_id: int, eos_token_ids: Sequence[int]) -> str | None:
    return "length" if request.num_output > request.max_tokens else None


def clear_what_was_copied(kv: KVManager, request: Request, group: int) -> None:
    copy_tail(kv, request, group)
    kv._taken_ids.append(request.block_ids[request.num_computed // kv.block_size])


def copy_and_keep(kv: KVManager, request: Request, group: int) -> None:
    copy_tail(kv, request, group)
    kv.move(Move.COPY, request.block_ids[:1], request.block_ids[:1])


def swap_in_reversed(swap: SwapSpace, request: Request) -> None:
    request.host_ids.reverse()
    swap_in(swap, request)


def fork_without_sharing(kv: KVManager, parent: Request, child: Request) -> bool:
    child.tables = [BlockTable(list(table.block_ids), table.num_dropped) for table in parent.tables]
    child.num_computed = parent.num_computed
    return True


def leave_it_to_the_leader(self: Scheduler, fork: Request, reason: str, stop_reason: int | str | None = None) -> None:
    """Forget to take an aborted sample away from its leader."""
    forks_of = {leader: list(leader.pending_forks) for leader in (*self.running, *self.waiting)}
    finish(self, fork, reason, stop_reason)
    for leader, forks in forks_of.items():
        leader.pending_forks = forks if fork in forks else leader.pending_forks


match, preempt, copy_tail, swap_in, finish = (
    HashChainCache.match, Scheduler._preempt, KVManager._copy_tail, SwapSpace.swap_in, Scheduler.finish,
)  # fmt: skip
Patches = list[tuple[object, str, Callable[..., object]]]
FAULTS: dict[str, Patches] = {
    "preemption takes the oldest": [(Scheduler, "_preempt", preempt_first)],
    "a block is taken one token early": [(kv_manager, "blocks_needed", grow_too_early)],
    "sharing does not count": [(BlockPool, "share", share_without_counting)],
    "a shared block stays free": [(BlockPool, "share", share_in_free_list)],
    "hashes without parents, tokens not compared": [
        (kv_manager, "chain_hash", hash_without_parent),
        (prefix_cache, "_holds", trust_any_hash),
    ],
    "hashes without parents, parents not compared": [
        (kv_manager, "chain_hash", hash_without_parent),
        (prefix_cache, "_holds", compare_tokens_only),
    ],
    "guests without a seat": [(Scheduler, "_try_to_admit", admit_beyond_seats)],
    "hits are missed": [(HashChainCache, "match", match_one_block)],
    "the end comes one token late": [(Request, "end_reason", end_one_late)],
    "a copy is cleared after it was made": [(KVManager, "_copy_tail", clear_what_was_copied)],
    "a full block is copied as well": [(KVManager, "_copy_tail", copy_and_keep)],
    "blocks come back from the host in another order": [(SwapSpace, "swap_in", swap_in_reversed)],
    "a fork does not count as an owner": [(KVManager, "fork", fork_without_sharing)],
    "an aborted sample stays with its leader": [(Scheduler, "finish", leave_it_to_the_leader)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, attribute, fault in FAULTS[name]:
        monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises((AssertionError, LookupError)):
        live_at_random(Random(2), num_steps=3_000)
