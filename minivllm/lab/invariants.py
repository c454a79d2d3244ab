"""The invariants I1-I15 of the engine, checked from outside: after a step, on a plan, and when all is drained.

The fake runner adds I16 and the "written once" of I9 (but for the slots of drafts that fell), free_list_twin.py and
witness.py, which hear the events, add I14, I8 (drafts are never cached) and what only the moment shows.
"""

from collections import Counter
from itertools import pairwise

from minivllm.engine import kv_manager
from minivllm.engine.block_pool import NULL_BLOCK, Block, BlockPool, CacheEntry
from minivllm.engine.engine import Engine
from minivllm.engine.kv_manager import blocks_needed
from minivllm.engine.plan import StepPlan
from minivllm.engine.policies import order_of
from minivllm.engine.prefix_cache import HashChainCache, root_hash
from minivllm.engine.tables import held_ids
from minivllm.engine_config import EngineConfig
from minivllm.lab.fake_runner import FakeRunner
from minivllm.request import Request, Status
from minivllm.speculative_config import OFF


def check_invariants(engine: Engine, runner: FakeRunner | None = None) -> None:
    """Assert all that must hold between two steps; with a fake runner also what the slots hold."""
    _check_free_list(engine.kv.pool)
    _check_ownership(engine)
    _check_cache(engine)
    _check_requests(engine)
    if runner is not None:
        _check_cached_contents(engine, runner)


def check_plan(engine: Engine, plan: StepPlan) -> None:
    """Assert what a plan must keep before anything of it runs, and that its blocks have the owners they count."""
    config, pool = engine.config, engine.kv.pool
    _check_free_list(pool)
    _check_ownership(engine)
    # I11: one budget for all, a seat for each.
    assert plan.num_tokens <= config.max_num_batched_tokens, f"I11: {plan.num_tokens} tokens in one step"
    strangers = plan.num_drafts.keys() - {request.id for request, _ in plan.scheduled}
    assert not strangers, f"I11: drafts are planned for {strangers}, who do not run"
    assert len(engine.scheduler.running) <= config.max_num_seqs, f"I11: {len(engine.scheduler.running)} running"
    assert len({request.id for request, _ in plan.scheduled}) == len(plan.scheduled), "I11: scheduled twice"
    for request, num_new in plan.scheduled:
        assert request.status is Status.RUNNING, f"I11: {request.id} is scheduled while {request.status}"
        # I7, I9: a hit leaves a token to compute; nothing beyond the known and the promised token is computed.
        assert num_new > 0, f"I7: {request.id} has nothing to compute"
        end = request.num_computed + num_new
        assert end <= request.num_expected, f"I9: {request.id} would compute {end} of {request.num_expected} tokens"
        if not config.chunks_prompts:
            assert end == request.num_expected, f"I11: {request.id} is chunked"
        num_drafts = plan.num_drafts.get(request.id, 0)
        if request.id in plan.num_drafts:
            _check_drafts(config, request, num_new, num_drafts)
        # I10: exactly the blocks that computed tokens, scheduled ones and drafts need.
        needed = blocks_needed(end + num_drafts, config.block_size)
        for table in request.tables:
            assert len(table.block_ids) == needed, f"I10: {request.id} has {len(table.block_ids)} blocks, not {needed}"
        # I12: only a sole owner writes, and never to a block that is cached.
        first = request.num_computed // config.block_size
        for block_id in (block_id for table in request.tables for block_id in table.block_ids[first:]):
            assert pool.blocks[block_id].ref_count == 1, f"I12: {request.id} writes to shared block {block_id}"
            assert pool.blocks[block_id].entry is None, f"I5: {request.id} writes to cached block {block_id}"


def _check_drafts(config: EngineConfig, request: Request, num_new: int, num_drafts: int) -> None:
    """Who gets drafts: one whose next token is chosen now, for whom they are wished, with room for all and one more."""
    id_, params = request.id, request.params
    methods = {each.method: each for each in config.speculative}
    assert params.speculative_method != OFF and methods, f"I11: {id_} has drafts and wants none"
    most = methods.get(params.speculative_method or "", config.speculative[0]).num_speculative_tokens
    most = most if params.num_speculative_tokens is None else params.num_speculative_tokens
    assert 0 < num_drafts <= most, f"I11: {id_} has {num_drafts} drafts, of {most} at most"
    is_decode = num_new == 1 and request.num_computed + 1 == request.num_tokens and not request.num_promised
    assert is_decode, f"I9: {id_} has drafts behind a token that is not its last"
    assert not request.is_steered and not request.pending_forks, f"I9: {id_} has drafts, and others choose its token"
    num_output, num_tokens = request.num_output + num_drafts + 1, request.num_tokens + num_drafts + 1
    assert num_output <= request.max_tokens, f"I9: {id_} would get {num_output} tokens of {request.max_tokens}"
    assert num_tokens <= config.max_model_len, f"I9: {id_} would have {num_tokens} tokens, beyond max_model_len"


def check_drained(engine: Engine) -> None:
    """I13: with no request left, every block is free and nothing is remembered but the cache."""
    pool = engine.kv.pool
    assert not engine.requests and not engine.has_work, f"I13: {list(engine.requests)} linger"
    assert len(engine.scheduler.running) == len(engine.scheduler.waiting) == 0, "I13: a queue is not empty"
    assert not engine.scheduler.lingering, "I13: a finished batch still holds blocks"
    assert not engine.pins.blocks_of, "I13: a prefix is still pinned"
    assert engine.scheduler.swap.num_free == engine.config.num_host_blocks, "I13: host blocks are lost"
    assert all(block.ref_count == 0 for block in pool.blocks), "I13: a block still has an owner"
    assert pool.num_free == pool.num_usable == len(pool.blocks) - 1, f"I13: {pool.num_free} of {pool.num_usable} free"


def most_steps_to_drain(engine: Engine) -> int:
    """I15: so many steps are enough for all that is there, if nobody else comes and steered requests get tokens.

    The first of those that run computes at least one token in each step and is never preempted, so it ends within the
    tokens it has. While everybody who runs stands before everybody who waits, this stays so to the end, and the sum of
    all tokens is enough. Else an older guest may become the first and cost the one before it its work, but only by
    ending before it: one such sum until the next request ends, and so one for each. With prefill_first up to one
    admitting step for each request stands between two that decode.
    """
    num_requests = len(engine.requests)
    num_steps = sum(request.num_prompt + request.max_tokens for request in engine.requests.values())
    if engine.config.batching == "prefill_first":
        num_steps *= 1 + num_requests
    return num_steps if _stands_in_order(engine) else num_steps * num_requests


def _stands_in_order(engine: Engine) -> bool:
    config, scheduler = engine.config, engine.scheduler
    if config.fills_batches or config.scheduling_policy in ("longest_prefix_first", "dfs"):
        return False
    in_line = [*scheduler.running, *scheduler.waiting]
    return in_line == sorted(in_line, key=order_of(config)) and not any(r.pending_forks for r in in_line)


def _check_ownership(engine: Engine) -> None:
    pool, owners = engine.kv.pool, [*engine.requests.values(), *engine.scheduler.lingering]
    held = Counter(block_id for request in owners for block_id in (*held_ids(request), *request.reserved_ids))
    held.update(block_id for ids in engine.pins.blocks_of_ids().values() for block_id in ids)
    free = list(pool.free_ids())
    # I4: no table points to a free block.
    assert held.keys().isdisjoint(free), f"I4: tables point to free blocks {held.keys() & set(free)}"
    # I1: as many owners as table entries.
    for block in pool.blocks:
        assert block.ref_count == held[block.id], f"I1: block {block.id} counts {block.ref_count}, not {held[block.id]}"
    # I2: the null block, the free and the used are disjoint and complete.
    assert NULL_BLOCK not in free and NULL_BLOCK not in held, "I2: the null block was handed out"
    assert {NULL_BLOCK, *free, *held} == set(range(len(pool.blocks))), "I2: a block is lost"
    for request in owners:
        live = held_ids(request)
        assert len(set(live)) == len(live), f"I1: {request.id} holds a block twice"
        assert NULL_BLOCK not in live, f"I2: the null block is in the live part of {request.id}"
        for table in request.tables:
            passed = set(table.block_ids[: table.num_dropped])
            assert passed <= {NULL_BLOCK}, f"I10: {request.id} dropped and kept {passed}"
    host_ids = [id_ for request in owners for id_ in request.host_ids]
    all_host_ids = sorted([*host_ids, *engine.scheduler.swap.free_ids])
    assert all_host_ids == list(range(1, engine.config.num_host_blocks + 1)), f"I2: host blocks {all_host_ids}"


def begins_as_one_who_runs(engine: Engine, request: Request) -> bool:
    """Whether one that runs begins with half of a request's tokens, to a block, and the request could find them."""
    size = engine.config.block_size
    others = [other.token_ids for other in engine.scheduler.running if other.salt == request.salt]
    ends = range(size, request.num_tokens, size)
    shared = max((end for end in ends for ids in others if ids[:end] == request.token_ids[:end]), default=0)
    return shared > 0 and 2 * (shared + size) > request.num_tokens and request.params.prompt_logprobs is None


def _check_free_list(pool: BlockPool) -> None:
    """I3: links agree both ways, the count is right, and blocks without contents stand before cached ones."""
    chain: list[Block] = [pool._head]
    while chain[-1].next is not None:
        chain.append(chain[-1].next)
        assert len(chain) <= len(pool.blocks) + 1, "I3: the free list has a loop"
    assert chain[-1] is pool._tail, "I3: the free list is torn"
    assert all(after.previous is before for before, after in pairwise(chain)), "I3: the links disagree"
    free_ids = [block.id for block in chain[1:-1]]
    assert len(free_ids) == len(set(free_ids)), f"I3: duplicates in the free list {free_ids}"
    assert pool.num_free == len(chain) - 2, f"I3: num_free is {pool.num_free}, the list has {len(chain) - 2}"
    is_cached = [block.entry is not None for block in chain[1:-1]]
    assert is_cached == sorted(is_cached), "I14: a cached block stands before an empty one"
    assert all(b.previous is b.next is None for b in pool.blocks if b.ref_count), "I3: a used block is linked"


def _check_cache(engine: Engine) -> None:
    cache, blocks = engine.kv.cache, engine.kv.pool.blocks
    holders = [block for block in blocks if block.entry is not None]
    firsts = [block for block in holders if block.entry and block.entry.group == 0]
    for block in holders:
        assert block.entry and _holder(engine, block.entry) is block, f"I6: block {block.id} is not its own holder"
        # I5: a cached block is full.
        assert len(block.entry.token_ids) == engine.config.block_size, f"I5: block {block.id} is not full"
    contents = Counter((e.parent, e.token_ids, e.group) for e in (b.entry for b in firsts) if e)
    assert all(num == 1 for num in contents.values()), f"I6: two blocks cache the same contents: {contents}"
    if isinstance(cache, HashChainCache):
        _check_map(cache, blocks, len(firsts))
        return
    # I6: a tree has no branch without its stem.
    serials = {block.entry.serial for block in holders if block.entry}
    stems = {block.entry.parent for block in holders if block.entry and isinstance(block.entry.parent, int)}
    assert stems <= serials, f"I6: entries {stems - serials} were evicted before those that continue them"


def _holder(engine: Engine, entry: CacheEntry) -> Block | None:
    """The block that the cache finds for an entry: a companion stands beside an entry of the first group."""
    if entry.group:
        return engine.kv.companions.block_of.get((entry.serial, entry.group))
    return engine.kv.cache.holder(entry.serial)


def _check_map(cache: HashChainCache, blocks: list[Block], num_holders: int) -> None:
    # I6: the map and the blocks agree, one entry for each.
    for block_hash, block in cache.block_of.items():
        assert blocks[block.id] is block, f"I6: the map leads to a strange block {block.id}"
        assert block.entry and block.entry.block_hash == block_hash, f"I6: block {block.id} does not hold its key"
    assert num_holders == len(cache.block_of), f"I6: {num_holders} blocks cache, the map has {len(cache.block_of)}"


def _check_requests(engine: Engine) -> None:
    size, scheduler = engine.config.block_size, engine.scheduler
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    everyone = [*running, *waiting]
    everyone += [fork for request in everyone for fork in request.pending_forks]
    assert len(everyone) == len(engine.requests), "I15: a request is in no queue, or in two"
    assert set(map(id, everyone)) == set(map(id, engine.requests.values())), "I15: the queues hold strangers"
    assert len(running) <= engine.config.max_num_seqs, f"I11: {len(running)} running"
    for request in waiting:
        assert request.status is Status.WAITING, f"I15: {request.id} waits while {request.status}"
        assert not held_ids(request) and not request.reserved_ids, f"I9: {request.id} waits and holds blocks"
        assert bool(request.host_ids) == (request.num_computed > 0), f"I9: {request.id} waits, computed and lost"
        num_hit = engine.kv.match(request).num_tokens
        assert num_hit < request.num_tokens, f"I7: {request.id} would find all its {num_hit} tokens"
    for request in everyone:
        # I7, I9: a hit counts prompt tokens (all of them only in a fork); none beyond the known ones is computed.
        assert request.num_cached <= request.num_prompt, f"I7: {request.id} hit {request.num_cached}"
        assert request.num_computed <= request.num_tokens, f"I9: {request.id} computed {request.num_computed}"
        assert request.num_output < request.max_tokens, f"I15: {request.id} should have ended"
        # I10: the table has exactly the blocks of what is computed; on the host, all that have not been dropped.
        needed = blocks_needed(request.num_computed, size)
        if request.host_ids:
            num_live = sum(needed - table.num_dropped for table in request.tables)
            assert len(request.host_ids) == num_live, f"I10: {request.id} left blocks behind"
            continue
        for table in request.tables:
            assert len(table.block_ids) == needed, f"I10: {request.id} has {len(table.block_ids)} blocks, not {needed}"
    assert not scheduler.lingering or running, "I15: a batch is over and its blocks are still held"
    under_way = [request for request, _ in engine.plan_in_flight.scheduled] if engine.plan_in_flight else []
    for request in running:
        assert request.status is Status.RUNNING, f"I15: {request.id} runs while {request.status}"
        if engine.config.allocator == "paged" and request not in under_way:  # windows move when a step has ended
            for table, window in zip(request.tables, engine.config.group_windows, strict=True):
                num_past = 0 if window is None else max(0, request.num_computed - window + 1) // size
                assert table.num_dropped >= num_past, f"I10: {request.id} keeps blocks that its layers do not see"


def _check_cached_contents(engine: Engine, runner: FakeRunner) -> None:
    """I5: contents never change under an entry; its hash follows from its tokens and its parents'."""
    size = engine.config.block_size
    cached = [(block, block.entry) for block in engine.kv.pool.blocks if block.entry]
    for block, entry in sorted(cached, key=lambda holder: holder[1].serial):  # parents before children
        serial = entry.serial, entry.group
        slots = range(block.id * size, (block.id + 1) * size)
        contents = [runner.contents[slot] for slot in slots if slot in runner.contents]
        assert len(contents) == size, f"I5: block {block.id} is cached with {len(contents)} tokens written"
        if serial in runner.entries:
            first_seen = runner.entries[serial]
            assert first_seen == (entry, contents), f"I5: block {block.id} changed while it was cached"
            continue
        runner.entries[serial] = entry, contents
        depth, parent_hash = 0, root_hash(str(entry.parent))
        if isinstance(entry.parent, int):
            assert (entry.parent, 0) in runner.entries, (
                f"I5: block {block.id} continues an unknown entry {entry.parent}"
            )
            parent, before = runner.entries[entry.parent, 0]
            depth, parent_hash = before[-1].position + 1, parent.block_hash
        token_ids = entry.token_ids
        assert entry.block_hash == kv_manager.chain_hash(parent_hash, token_ids), f"I5: hash of {block.id}"
        assert tuple(slot.token_id for slot in contents) == token_ids, f"I5: block {block.id} holds other tokens"
        assert [s.position for s in contents] == list(range(depth, depth + size)), f"I5: positions of {block.id}"
    for request in engine.scheduler.running:
        _check_salt(engine, runner, request)


def _check_salt(engine: Engine, runner: FakeRunner, request: Request) -> None:
    """I6: whatever a table shares stands under the request's own salt."""
    for block_id in held_ids(request):
        entry = engine.kv.pool.blocks[block_id].entry
        while entry is not None and isinstance(entry.parent, int):
            entry, _ = runner.entries[entry.parent, 0]
        assert entry is None or entry.parent == request.salt, f"I6: {request.id} crossed salts"
