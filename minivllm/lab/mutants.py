"""The faults of faults.py as code: each function stands in for one of the engine's and does one thing wrong.

Where a mutant needs the function that it replaces, it knows it by the name given here, with an underscore at the end.
"""

from collections.abc import Sequence
from dataclasses import replace

from minivllm.engine.block_pool import NULL_BLOCK, Block, BlockPool
from minivllm.engine.drafting import Drafting
from minivllm.engine.eviction import Eviction
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import StepResult
from minivllm.engine.prefix_cache import HashChainCache, Hit, chain_hash
from minivllm.engine.radix_cache import RadixCache
from minivllm.engine.scheduler import Scheduled, Scheduler
from minivllm.engine.swap import SwapSpace
from minivllm.engine.tables import held_ids, num_unseen
from minivllm.engine.under_way import Computing
from minivllm.engine_config import EngineConfig
from minivllm.events import BlocksDropped, BlocksReleased
from minivllm.request import BlockTable, Request, Status

pool_release_, remove_ = BlockPool.release, Eviction.remove
let_go_, release_, publish_ = KVManager.let_go, KVManager.release, KVManager.publish
swap_in_, forget_ = SwapSpace.swap_in, SwapSpace.forget
admit_waiting_, begin_, finish_, preempt_ = (
    Scheduler._admit_waiting, Scheduler._begin, Scheduler.finish, Scheduler._preempt,
)  # fmt: skip
radix_match_ = RadixCache.match
plan_drafts_, book_ = Drafting.plan, Drafting.book


def keep_the_map(cache: HashChainCache, block: Block) -> None:
    """Eviction empties the block, and the map still leads to it."""
    block.entry = None


def leave_the_duplicate(kv: KVManager, request: Request, index: int, holder: Block | None) -> None:
    """The duplicate is freed, and the table still names it."""
    duplicate = kv.pool.blocks[request.block_ids[index]]
    if holder is not None and holder is not duplicate:
        kv.let_go(duplicate)


def match_whole_prompt(kv: KVManager, request: Request) -> Hit:
    """No token is left to compute, so there are no logits."""
    if request.params.prompt_logprobs is not None:
        return Hit([], 0)
    kv._extend_hashes(request)
    return kv.cache.match(request, request.num_tokens)


def weak_hash(parent_hash: int, token_ids: list[int]) -> int:
    """A hash of which two inputs with one output are easily found."""
    return chain_hash(parent_hash, token_ids) % 97


def match_by_hash_alone(cache: HashChainCache, request: Request, most_tokens: int) -> Hit:
    """Equal hashes are taken for equal tokens."""
    blocks: list[Block] = []
    for block_hash in request.block_hashes[: most_tokens // cache.block_size]:
        if block_hash not in cache.block_of or cache.block_of[block_hash] in blocks:
            break
        blocks.append(cache.block_of[block_hash])
    return Hit(blocks, len(blocks) * cache.block_size)


def match_any_salt(cache: RadixCache, request: Request, most_tokens: int) -> Hit:
    """Whatever namespace knows most of the tokens serves the request."""
    probes = [Request("", request.token_ids, request.num_prompt, request.params, 1, salt=s) for s in cache._roots]
    hits = [radix_match_(cache, probe, most_tokens) for probe in probes]
    return max(hits, key=lambda hit: hit.num_tokens, default=Hit([], 0))


def publish_before_computed(kv: KVManager, request: Request) -> None:
    """A block counts as full when its tokens are known, before their K and V are stored."""
    num_computed = request.num_computed
    request.num_computed = min(request.num_tokens, len(request.block_ids) * kv.block_size)
    publish_(kv, request)
    request.num_computed = num_computed


def forget_new_leaves(eviction: Eviction, block: Block) -> None:
    """What becomes a leaf when a block in the middle of a chain goes is not told to the heap."""
    if eviction.cache.is_leaf(block):
        remove_(eviction, block)
    elif block.entry is not None:
        eviction._idle.discard(block.entry.serial)


def release_unguarded(pool: BlockPool, block: Block) -> None:
    """Who frees does not look whether the block is free already."""
    if block.ref_count > 0:
        pool_release_(pool, block)


def release_head_first(kv: KVManager, request: Request) -> None:
    """The start of a prefix is freed first, so it is evicted first and its end can no longer be found."""
    head_first = request.tables[0].live_ids
    kv.events.emit(BlocksReleased(kv.step, request.id, tuple(head_first)))
    for block_id in head_first:
        kv.let_go(kv.pool.blocks[block_id])
    request.tables = [BlockTable()]
    release_(kv, request)


def count_evictable_twice(kv: KVManager, block: Block) -> None:
    """An idle cached block counts as free and once more as evictable."""
    let_go_(kv, block)
    if block.ref_count == 0 and block.entry is not None:
        kv.pool.num_free += 1


def one_block_short(num_tokens: int, block_size: int) -> int:
    """Rounds down: right until the last block is not full."""
    return num_tokens // block_size


def never_shared(kv: KVManager, request: Request, group: int) -> bool:
    """Who writes does not look who else reads."""
    return False


def drop_one_token_early(kv: KVManager, request: Request) -> None:
    """The window is taken to be one token shorter."""
    [window], [table] = kv.config.group_windows, request.tables
    if window is None or kv.allocator.is_contiguous:
        return
    num_past = min(num_unseen(request.num_computed + 1, window, kv.block_size), len(table.block_ids))
    dropped = table.block_ids[table.num_dropped : num_past]
    if dropped:
        table.block_ids[table.num_dropped : num_past] = [NULL_BLOCK] * len(dropped)
        table.num_dropped = num_past
        kv.events.emit(BlocksDropped(kv.step, request.id, tuple(dropped)))
        for block_id in dropped:
            kv.let_go(kv.pool.blocks[block_id])


def swap_in_to_a_taken_block(swap: SwapSpace, request: Request) -> None:
    """One of the blocks that the request comes back to belongs to somebody else by now."""
    swap_in_(swap, request)
    table, own = request.tables[0], held_ids(request)
    taken = [block.id for block in swap._kv.pool.blocks if block.ref_count and block.id not in own]
    if taken and len(own) > 1:
        table.block_ids[table.num_dropped] = taken[0]


def free_host_blocks_twice(swap: SwapSpace, request: Request) -> None:
    """The transfer and whoever ordered it both give the last host block back."""
    last = request.host_ids[-1:]
    forget_(swap, request)
    swap._free += last


def forget_only_who_returns(swap: SwapSpace, request: Request) -> None:
    """Who is aborted while it waits on the host leaves its host blocks behind."""
    if request.status is Status.RUNNING:
        forget_(swap, request)
    request.host_ids = []


def abort_without_release(
    scheduler: Scheduler, request: Request, reason: str, stop_reason: int | str | None = None
) -> None:
    """The table of an aborted request is dropped, and its blocks keep their count."""
    if reason == "abort":
        request.tables, request.reserved_ids = [BlockTable()], []
    finish_(scheduler, request, reason, stop_reason)


def finish_twice(scheduler: Scheduler, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
    """Whoever finds a stop string and the scheduler both give the last shared block back."""
    blocks = [scheduler.kv.pool.blocks[block_id] for block_id in held_ids(request)]
    shared = [block for block in blocks if block.ref_count == 2 and isinstance(stop_reason, str)]
    finish_(scheduler, request, reason, stop_reason)
    for block in shared[-1:]:
        scheduler.kv.let_go(block)


def finish_without_samples(
    scheduler: Scheduler, request: Request, reason: str, stop_reason: int | str | None = None
) -> None:
    """The samples that were to fork off a request go down with it, and nobody tells their owner."""
    request.pending_forks = []
    finish_(scheduler, request, reason, stop_reason)


def preempt_and_keep_progress(scheduler: Scheduler, victim: Request, reason: str) -> None:
    """The blocks are gone, and the request still counts their tokens as computed."""
    num_computed = victim.num_computed
    preempt_(scheduler, victim, reason)
    victim.num_computed = num_computed


def preempt_and_leave_lingering(scheduler: Scheduler, victim: Request, reason: str) -> None:
    """The last of a static batch is preempted, and those who ended before it keep their blocks for ever."""
    lingering, scheduler.lingering = scheduler.lingering, []
    preempt_(scheduler, victim, reason)
    scheduler.lingering = lingering


def make_room_beside_the_held(scheduler: Scheduler, request: Request, num_new: int, preempted: list[Request]) -> bool:
    """Who cannot grow falls itself, though one before it only waits; it is admitted again and falls again."""
    while not scheduler.kv.grow(request, num_new):
        if scheduler.lingering:
            scheduler._clear_lingering()
            continue
        if scheduler._is_under_way:
            scheduler._is_short = True
            return False
        victim = scheduler.running.last
        scheduler._preempt(victim, "itself" if victim is request else "no_blocks")
        preempted.append(victim)
        if victim is request:
            return False
    return True


def begin_and_count_again(scheduler: Scheduler, request: Request, hit: Hit, num_new: int) -> None:
    """What a recomputed request finds of its own blocks counts as a hit."""
    begin_(scheduler, request, hit, num_new)
    request.num_cached = request.num_computed


def admit_with_a_budget_of_its_own(scheduler: Scheduler, budget: int, others: Computing) -> Scheduled:
    """Guests may use the whole budget, whatever those who run have used of it."""
    return admit_waiting_(scheduler, scheduler.config.max_num_batched_tokens, others)


def keep_the_tail(kv: KVManager, request: Request) -> None:
    """The blocks of a rejected tail stay in the table."""


def count_rejected_as_computed(drafting: Drafting, request: Request, result: StepResult, step: int) -> None:
    """K and V of drafts that fell are taken for those of tokens that are still to come."""
    judged = result.judged.get(request.id)
    if judged is not None and not request.is_finished:
        request.num_computed += len(judged.draft_token_ids) - judged.num_accepted
    book_(drafting, request, result, step)


def publish_drafts(drafting: Drafting, request: Request, result: StepResult, step: int) -> None:
    """Blocks are full when they hold drafts, too, whatever became of these."""
    judged, kv = result.judged.get(request.id), drafting._kv
    if judged is not None and not request.is_finished:
        token_ids, num_computed = request.token_ids, request.num_computed
        request.token_ids = [*token_ids[:num_computed], *judged.draft_token_ids[judged.num_accepted :]]
        request.num_computed = len(request.token_ids)
        publish_(kv, request)
        request.token_ids, request.num_computed = token_ids, num_computed
    book_(drafting, request, result, step)


def draft_beyond_the_budget(
    drafting: Drafting, scheduled: Sequence[tuple[Request, int]], limits: EngineConfig
) -> dict[str, int]:
    """Drafts are no tokens to whoever counts the budget."""
    return plan_drafts_(drafting, scheduled, replace(limits, max_num_batched_tokens=1 << 20))
