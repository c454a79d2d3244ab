"""The faults of museum.py: which they are, where they happened, and what must catch them in how many steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minivllm.engine import kv_manager
from minivllm.engine.block_pool import BlockPool
from minivllm.engine.drafting import Drafting
from minivllm.engine.eviction import Eviction
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.prefix_cache import HashChainCache
from minivllm.engine.radix_cache import RadixCache
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.swap import SwapSpace
from minivllm.lab import mutants
from minivllm.speculative_config import SpeculativeConfig

Patch = tuple[object, str, Callable[..., object]]  # a class or module, the name of a function in it, what replaces it
PAGED = {"allocator": "paged"}
CACHED = {**PAGED, "enable_prefix_caching": True}
HASHED = {**CACHED, "prefix_cache": "hash"}
TREE = {**CACHED, "prefix_cache": "radix"}
SWAPPED = {
    **PAGED, "batching": "chunked", "max_num_seqs": 8, "preemption_mode": "swap", "num_host_blocks": 28,
    "num_blocks": 14, "block_size": 2, "speculative": (),
}  # fmt: skip

DRAFTED = {**PAGED, "speculative": (SpeculativeConfig("ngram"),), "max_num_seqs": 8}


@dataclass(frozen=True)
class Fault:
    """One fault: its story, where it happened, and which invariant must catch it within how many steps."""

    name: str
    story: str
    source: str  # project#number is an issue or a pull request on GitHub; planted: a mistake that is easily made
    invariant: str  # "I1" to "I16", as in lab/invariants.py
    within_steps: int
    patches: tuple[Patch, ...]
    options: dict[str, Any] = field(default_factory=dict)  # what must be switched on in the engine for it to show


FAULTS = (
    Fault(
        "stale hash entry",
        "An evicted block stays in the map, so a prompt can hit what was overwritten.",
        "nano-vllm#163", "I6", 200,
        ((HashChainCache, "evict", mutants.keep_the_map),), {**HASHED, "eviction_policy": "lru"},
    ),
    Fault(
        "freed duplicate in a table",
        "A duplicate of a cached block is freed, and the block table still names it.",
        "mini-sglang#142", "I4", 1000,
        ((KVManager, "_exchange", mutants.leave_the_duplicate), (BlockPool, "release", mutants.release_unguarded)),
        TREE,
    ),
    Fault(
        "whole prompt cached",
        "A hit covers the whole prompt, and no token is left whose logits give the next one.",
        "nano-vllm#144", "I7", 1500,
        ((KVManager, "match", mutants.match_whole_prompt),), CACHED,
    ),
    Fault(
        "off by one at a block edge",
        "The number of blocks is rounded down: wrong whenever the last one is not full.",
        "asked in nano-vllm#30", "I10", 50,
        ((kv_manager, "blocks_needed", mutants.one_block_short),), {"block_size": 4},
    ),
    Fault(
        "progress survives preemption",
        "A preempted request is computed on from where it stood, without its blocks.",
        "nano-vllm#211", "I9", 1000,
        ((Scheduler, "_preempt", mutants.preempt_and_keep_progress),), {**PAGED, "preemption_mode": "recompute"},
    ),
    Fault(
        "recompute counted as a hit",
        "A preempted request finds its own blocks when it comes back, and the statistics call it a hit.",
        "vllm#25780", "I7", 1500,
        ((Scheduler, "_begin", mutants.begin_and_count_again),), CACHED,
    ),
    Fault(
        "reference leaked on abort",
        "The blocks of an aborted request keep their count and are never free again.",
        "vllm#54947", "I1", 200,
        ((Scheduler, "finish", mutants.abort_without_release),),
    ),
    Fault(
        "shared block freed under a reader",
        "Two paths of one end both let a block go, and its other owner reads what is free.",
        "atlas#373", "I4", 8000,
        ((Scheduler, "finish", mutants.finish_twice),),
        {**PAGED, "batching": "chunked", "num_blocks": 40, "max_num_seqs": 8, "block_size": 2},
    ),
    Fault(
        "hash collision",
        "Equal hashes are taken for equal prompts: who finds a collision reads another's cache.",
        "GHSA-rm76-4mrf-v9r8", "I6", 4000,
        ((kv_manager, "chain_hash", mutants.weak_hash), (HashChainCache, "match", mutants.match_by_hash_alone)), HASHED,
    ),
    Fault(
        "salt forgotten",
        "The namespace is no part of the key, so one tenant's prompts show in another's latency.",
        "CVE-2025-46570", "I6", 300,
        ((RadixCache, "match", mutants.match_any_salt),), TREE,
    ),
    Fault(
        "host block freed twice",
        "A finished transfer and whoever ordered it both free the same host block.",
        "sglang#13501", "I2", 1000,
        ((SwapSpace, "forget", mutants.free_host_blocks_twice),), SWAPPED,
    ),
    Fault(
        "aborted on the host",
        "Who is aborted while its blocks are elsewhere never gives them back.",
        "vllm#46283", "I2", 2000,
        ((SwapSpace, "forget", mutants.forget_only_who_returns),), SWAPPED,
    ),
    Fault(
        "evictable counted twice",
        "An idle cached block is counted as free and as evictable, and the sums disagree.",
        "sglang#35270", "I3", 100,
        ((KVManager, "let_go", mutants.count_evictable_twice),), CACHED,
    ),
    Fault(
        "samples lost with their leader",
        "Aborting the first of n samples leaves the others alive and in no queue.",
        "vllm#14326", "I15", 2500,
        ((Scheduler, "finish", mutants.finish_without_samples),),
    ),
    Fault(
        "swap-in to a taken block",
        "A request comes back from the host to a block that another one holds by now.",
        "planted", "I1", 1500,
        ((SwapSpace, "swap_in", mutants.swap_in_to_a_taken_block),), SWAPPED,
    ),
    Fault(
        "copy-on-write skipped",
        "A fork writes its own token into the block that its parent still reads.",
        "planted", "I12", 1000,
        ((KVManager, "_writes_to_shared", mutants.never_shared),), {**PAGED, "prefix_cache": "hash"},
    ),
    Fault(
        "window freed one token early",
        "A block is dropped while one token in it is still inside the window.",
        "planted", "I16", 500,
        ((KVManager, "drop_outside_window", mutants.drop_one_token_early),),
        {**PAGED, "enable_prefix_caching": False, "group_windows": (3,)},
    ),
    Fault(
        "published before computed",
        "A block is cached when its tokens are known, before their K and V are stored.",
        "planted", "I5", 4000,
        ((KVManager, "publish", mutants.publish_before_computed),), CACHED,
    ),
    Fault(
        "prefix evicted from its start",
        "Blocks are freed head first, so what remains of a prefix can no longer be found.",
        "planted", "I14", 2000,
        ((KVManager, "release", mutants.release_head_first),), {**HASHED, "eviction_policy": "lru"},
    ),
    Fault(
        "budget counted from zero",
        "Guests are admitted with the whole token budget beside those who used it.",
        "planted", "I11", 1000,
        ((Scheduler, "_admit_waiting", mutants.admit_with_a_budget_of_its_own),),
        {**PAGED, "batching": "chunked", "max_num_seqs": 8, "max_num_batched_tokens": 5},
    ),
    Fault(
        "batch that never ends",
        "The last of a static batch is preempted, and those who ended keep their blocks for ever.",
        "ours, found by this fuzz", "I15", 2500,
        ((Scheduler, "_preempt", mutants.preempt_and_leave_lingering),), {"batching": "static"},
    ),
    Fault(
        "waiting for each other",
        "A beam that is done keeps its blocks, and the one that it waits for falls for want of them, again and again.",
        "ours, found by beam search", "I15", 20000,
        ((Scheduler, "_make_room", mutants.make_room_beside_the_held),),
        {**PAGED, "batching": "chunked", "max_num_seqs": 8, "num_blocks": 14, "block_size": 2},
    ),
    Fault(
        "leaf out of sight",
        "A block becomes a leaf when one behind it goes, and the heap of leaves never hears of it.",
        "ours, found by this fuzz", "I14", 4000,
        ((Eviction, "remove", mutants.forget_new_leaves),),
        {**SWAPPED, **HASHED, "eviction_policy": "slru", "block_size": 1},
    ),
    Fault(
        "rejected tail kept",
        "The blocks of drafts that fell stay in the table: nobody else may have them.",
        "planted", "I10", 1000,
        ((KVManager, "trim", mutants.keep_the_tail),), {**DRAFTED, "block_size": 2},
    ),
    Fault(
        "rejected draft counted as computed",
        "The count of stored tokens goes on over a draft that fell, and its K and V are read as the next token's.",
        "planted", "I9", 1000,
        ((Drafting, "book", mutants.count_rejected_as_computed),), {**DRAFTED, "enable_prefix_caching": False},
    ),
    Fault(
        "draft published",
        "A block is cached with a draft in it that the target rejects in the same step.",
        "planted", "I8", 1000,
        ((Drafting, "book", mutants.publish_drafts),), {**DRAFTED, **HASHED, "block_size": 2},
    ),
    Fault(
        "drafts beside the budget",
        "Drafts are not counted, and a step computes more tokens than its buffers have room for.",
        "planted", "I11", 1000,
        ((Drafting, "plan", mutants.draft_beyond_the_budget),), {**DRAFTED, "max_num_batched_tokens": 5},
    ),
)  # fmt: skip
