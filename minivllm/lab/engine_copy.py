"""A second engine in the state of a first: one deep copy of all that decides, under the same or under other policies.

One memo for the whole copy keeps identities: a request that stands in a queue and in the engine's dict is one request
in the copy, too. Shared with the original are the clock and what is frozen (config, wishes of requests, cache entries).
What blocks hold is not copied here: a Place names a block whose contents must be.
"""

import copy
from dataclasses import asdict, dataclass, replace

from minivllm.engine.allocators import blocks_needed
from minivllm.engine.block_pool import BlockPool
from minivllm.engine.engine import Engine
from minivllm.engine.eviction import Eviction
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import Move, Runner, StepPlan
from minivllm.engine.policies import RequestQueue, order_of
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError
from minivllm.events import EventBus

CHANGEABLE = (
    "batching", "scheduling_policy", "aging_steps", "preemption_mode", "watermark", "max_num_batched_tokens",
    "max_num_seqs", "enable_chunked_prefill", "eviction_policy", "num_host_blocks",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """A block of the device's pool, or of the host's."""

    block_id: int
    on_host: bool = False


def copy_engine(engine: Engine, runner: Runner, config: EngineConfig | None = None) -> Engine:
    """An engine in the same state, round `runner`, with nobody listening; `engine` must stand between two steps.

    With another `config` (see `changed_config`) the copy goes on from this state under the new policies.
    Cost: 30 ms for a pool of 4,000 blocks and 64 requests of 500 tokens (one core of an AMD EPYC).
    """
    config = config or engine.config
    memo: dict[int, object] = {
        id(engine.runner): runner,
        id(engine.config): config,
        id(engine.events): EventBus(),
        id(engine.clock): engine.clock,
    }
    memo |= _twin_blocks(engine.kv.pool)
    for request in (*engine.requests.values(), *engine.scheduler.lingering):
        memo[id(request.params)] = request.params
        for ids in (request.token_ids, request.block_hashes, *(table.block_ids for table in request.tables)):
            memo[id(ids)] = list(ids)  # at C speed; deepcopy would visit every integer
    copied = copy.deepcopy(engine, memo)
    if config != engine.config:
        _adjust(copied, engine.config)
    return copied


def changed_config(config: EngineConfig, changes: dict[str, object]) -> EngineConfig:
    """The config with some policies changed. Raises ConfigError for what cannot change while requests run."""
    fixed = [name for name in changes if name in asdict(config) and name not in CHANGEABLE]
    unknown = [name for name in changes if name not in asdict(config)]
    if unknown:
        raise ConfigError(f"time travel: EngineConfig has no field {unknown[0]!r}; change {', '.join(CHANGEABLE)}")
    if fixed:
        raise ConfigError(
            f"time travel: {fixed[0]} cannot change in mid-run, it needs an engine of its own: start a new one and "
            f"play the same requests; here change {', '.join(CHANGEABLE)}"
        )
    changed = replace(config, **changes)  # type: ignore[arg-type]  # EngineConfig checks the types itself
    if changed.num_host_blocks < config.num_host_blocks:
        raise ConfigError(
            f"time travel: num_host_blocks can only grow in mid-run, {config.num_host_blocks} may be in use; "
            f"give at least as many, not {changed.num_host_blocks}"
        )
    return changed


def places_written(plan: StepPlan, block_size: int) -> set[Place]:
    """Every block that running this plan writes to; ask before it runs."""
    places = {Place(transfer.target_id, transfer.move is Move.SWAP_OUT) for transfer in plan.transfers}
    places |= {Place(block_id) for block_id in plan.fresh_block_ids}
    for request, num_new in plan.scheduled:
        num_stored = request.num_computed + num_new + plan.num_drafts.get(request.id, 0)
        first, end = request.num_computed // block_size, blocks_needed(num_stored, block_size)
        places |= {Place(block_id) for table in request.tables for block_id in table.block_ids[first:end]}
    return places


def places_in_use(engine: Engine) -> set[Place]:
    """Blocks whose contents somebody may yet read."""
    places = {Place(block.id) for block in engine.kv.pool.blocks if block.ref_count or block.entry is not None}
    return places | {Place(host_id, on_host=True) for r in engine.requests.values() for host_id in r.host_ids}


def _twin_blocks(pool: BlockPool) -> dict[int, object]:
    """Copies of all blocks by the id() of the original, linked alike.

    deepcopy would follow the links of the free list, one level of recursion for each block.
    """
    chain = [pool._head, *pool.blocks, pool._tail]
    twins = {id(block): replace(block, previous=None, next=None) for block in chain}
    for block in chain:
        twin = twins[id(block)]
        twin.previous = twins[id(block.previous)] if block.previous else None
        twin.next = twins[id(block.next)] if block.next else None
    return {**twins}


def _adjust(engine: Engine, before: EngineConfig) -> None:
    """Renew what follows from the policies; requests, tables, blocks and cache stay as they are.

    A seat or a cut prompt that the new policy would not have given is kept until it is used up: nobody is thrown out.
    """
    config, kv, scheduler = engine.config, engine.kv, engine.scheduler
    fresh = KVManager(config, engine.events)  # says what a manager of this config starts with
    kv.num_watermark = fresh.num_watermark
    if config.eviction_policy != before.eviction_policy:
        kv.eviction = None if fresh.eviction is None else _eviction(config.eviction_policy, kv)
    for name in ("running", "waiting"):
        queue = RequestQueue(order_of(config))
        for request in getattr(scheduler, name):
            queue.add(request)
        setattr(scheduler, name, queue)
    if config.batching != "static":
        scheduler._clear_lingering()
    scheduler.swap.num_blocks = config.num_host_blocks
    added_ids = range(config.num_host_blocks, before.num_host_blocks, -1)
    scheduler.swap._free = [*added_ids, *scheduler.swap._free]  # taken from the end: the old ones first


def _eviction(policy: str, kv: KVManager) -> Eviction:
    eviction = Eviction(policy, kv.cache)
    for block in kv.pool.blocks:
        if block.ref_count == 0 and block.entry is not None:
            eviction.add(block)
    return eviction
