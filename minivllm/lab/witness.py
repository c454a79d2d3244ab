"""Hears every event of an engine and holds it against the engine at that very moment; counts what was seen."""

from collections import Counter

from minivllm.draft_events import DraftJudged
from minivllm.engine.block_pool import NULL_BLOCK, Block, CacheEntry
from minivllm.engine.engine import Engine
from minivllm.engine.plan import Move, StepPlan, Transfer
from minivllm.engine.policies import order_of
from minivllm.engine.tables import held_ids
from minivllm.engine_config import EngineConfig
from minivllm.events import (
    Admitted,
    BlockCached,
    BlockCopied,
    BlockExchanged,
    BlocksTaken,
    Event,
    Evicted,
    Finished,
    Forked,
    Preempted,
    PrefixHit,
    SwappedIn,
    SwappedOut,
    Waited,
)
from minivllm.lab.draft_witness import DraftWitness
from minivllm.lab.invariants import begins_as_one_who_runs
from minivllm.request import Request

FINISH_REASONS = ("stop", "length", "abort")
PREEMPT_REASONS = ("no_blocks", "itself", "held")


class Witness:
    """Hears all from the first step on: I6 and I7 (hits), I12 (copies), I14 (evictions), I15 (the reasons given)."""

    def __init__(self, engine: Engine, seen: Counter[str]) -> None:
        self.engine = engine
        self.seen = seen
        self.is_resetting = False
        self._key = order_of(engine.config)
        self._entries: dict[int, CacheEntry] = {}  # of cached blocks, by block,
        self._num_hits: Counter[int] = Counter()  # how often each was found since,
        self._priorities: dict[int, int] = {}  # and the most urgent of its users
        self._moves: list[Transfer] = []  # that the next plan must order
        self._lost: list[CacheEntry] = []  # evicted for whoever takes blocks next,
        self._lost_to: dict[str, list[CacheEntry]] = {}  # and by whom they were taken in this step
        self._copied: set[tuple[str, int, int]] = set()  # request, group, index in its table: private since then
        self._num_cached: dict[str, int] = {}  # prompt tokens found at the first admission
        self._drafts = DraftWitness(engine, seen)
        self._passed: tuple[int, set[str]] = 0, set()  # step, and who was passed over in it
        self._swapped: Event | None = None  # the last swap, told just before the preemption or admission it belongs to

    def __call__(self, event: Event) -> None:
        """Be a listener."""
        self.seen[type(event).__name__] += 1
        match event:
            case Waited():
                self._judge_wait(event)
            case Admitted():
                self._judge_admission(event)
            case Preempted():
                self._judge_preemption(event)
            case Finished(reason=reason):
                assert reason in FINISH_REASONS, f"I15: an end for the unknown reason {reason}"
            case PrefixHit():
                self._book_hit(event)
            case BlockCached():
                self._remember(event)
            case BlockExchanged():
                self._book_user(event.request_id, event.cached_id)
                self.seen["exchange with an idle one"] += self.engine.kv.pool.blocks[event.cached_id].ref_count == 1
            case DraftJudged():
                self._drafts.judge(event)
            case Evicted():
                self._judge_eviction(self.engine.kv.pool.blocks[event.block_id])
            case BlocksTaken():
                self._book_lost(event.request_id)
            case _:
                self._expect_moves(event)

    def check(self) -> None:
        """I7: what a request is said to have found is what its first admission found, or what it was forked with."""
        self._drafts.check()
        for request in self.engine.requests.values():
            found = self._num_cached.get(request.id, 0)
            assert request.num_cached == found, f"I7: {request.id} counts {request.num_cached} cached, not {found}"

    def check_plan(self, plan: StepPlan) -> None:
        """I12: a plan moves exactly the blocks that the events since the last plan tell of, in their order."""
        expected, self._moves, self._lost_to = self._moves, [], {}
        assert plan.transfers == expected, f"I12: the plan moves {plan.transfers}, the events say {expected}"

    def _judge_wait(self, event: Waited) -> None:
        config, scheduler = self.engine.config, self.engine.scheduler
        truths = {
            "no_seat": len(scheduler.running) >= config.max_num_seqs,
            "no_budget": True,
            "no_blocks": True,
            "just_preempted": True,
            "batch_runs": config.fills_batches and len(scheduler.running) + len(scheduler.lingering) > 0,
            "prefix_under_way": begins_as_one_who_runs(self.engine, self.engine.requests[event.request_id]),
        }
        self._passed = event.step, {event.request_id} | (self._passed[1] if self._passed[0] == event.step else set())
        assert truths.get(event.reason), f"I15: {event.request_id} waits for the reason {event.reason}"
        self.seen[f"Waited {event.reason}"] += 1

    def _judge_admission(self, event: Admitted) -> None:
        engine, request = self.engine, self.engine.requests[event.request_id]
        has_room = engine.config.allocator != "paged" or engine.kv.pool.num_free >= engine.kv.num_watermark
        truths = {
            "fits": has_room and len(engine.scheduler.running) > 1,
            "alone": len(engine.scheduler.running) == 1,
            "new_batch": engine.config.fills_batches,
            "swapped_in": isinstance(self._swapped, SwappedIn) and self._swapped.request_id == request.id,
        }
        assert truths.get(event.reason), f"I15: {request.id} was admitted for the reason {event.reason}"
        self.seen[f"Admitted {event.reason}"] += 1
        before = [r for r in engine.scheduler.waiting if self._key(r) < self._key(request) and self._is_firm(r)]
        overtaken = {r.id for r in before} - (self._passed[1] if self._passed[0] == event.step else set())
        assert not overtaken, f"I15: {request.id} overtook {overtaken}"
        if self._swapped is None:
            self._judge_hit(request, event.num_computed)
            if event.num_preemptions == 0:
                self._num_cached[request.id] = min(event.num_computed, request.num_prompt)
        self._swapped = None

    def _is_firm(self, request: Request) -> bool:
        """Whether nobody behind it may be admitted before it: where the cache decides, only after a long wait."""
        config = self.engine.config
        if config.scheduling_policy not in ("longest_prefix_first", "dfs"):
            return not request.is_held
        num_waited = self.engine.scheduler.step - request.arrival_step
        return not request.is_held and config.aging_steps is not None and num_waited > config.aging_steps

    def _judge_hit(self, request: Request, num_computed: int) -> None:
        """I6: the slow twin of `match`: look for each next block among all that are cached, by contents alone."""
        size, most = self.engine.config.block_size, request.num_tokens - 1  # at least one token is left to compute
        entries = [*self._entries.values(), *self._lost_to.get(request.id, [])]  # as they were when it was admitted
        parent: int | str | None = request.salt
        num_whole = num_part = 0
        chain: list[int] = []  # serials of the first group's entries
        while parent is not None:
            wanted = tuple(request.token_ids[num_whole : min(num_whole + size, most)])
            following = [entry for entry in entries if entry.parent == parent and entry.group == 0]
            num_part = max((_num_equal(entry.token_ids, wanted) for entry in following), default=0)
            parent = next((e.serial for e in following if len(wanted) == size and e.token_ids == wanted), None)
            if isinstance(parent, int):
                chain.append(parent)
                num_whole += size
        expected = [size * _num_reached(chain, entries, self.engine.config)]
        if self.engine.config.prefix_cache == "radix" and num_part < size:
            expected.append(num_whole + num_part)  # or without the part, where its block and the copy do not both fit
        if request.params.prompt_logprobs is not None:
            expected = [0]
        assert num_computed < request.num_tokens, f"I7: {request.id} found all its {num_computed} tokens"
        assert num_computed in expected, f"I6: {request.id} found {num_computed} cached tokens, not {expected}"
        self.seen["part given up"] += num_computed < expected[-1]

    def _judge_preemption(self, event: Preempted) -> None:
        engine, victim = self.engine, self.engine.requests[event.request_id]
        assert event.reason in PREEMPT_REASONS, f"I15: preempted for the unknown reason {event.reason}"
        assert (event.reason == "held") <= victim.is_held, f"I15: {victim.id} is not held"
        rivals = [request for request in engine.scheduler.running if request.is_held or event.reason != "held"]
        assert self._key(victim) == max(map(self._key, rivals)), f"I15: {victim.id} is not the last"
        is_swapped = isinstance(self._swapped, SwappedOut) and self._swapped.request_id == victim.id
        assert (event.how == "swap") == is_swapped, f"I15: {victim.id} was preempted by {event.how}"
        if engine.config.preemption_mode == "swap" and not is_swapped:
            num_live = len(held_ids(victim))
            is_full = num_live > engine.scheduler.swap.num_free
            assert is_full or num_live == 0, f"I15: {victim.id} had room on the host"
            self.seen["host full"] += is_full
        self.seen[f"Preempted {event.reason}"] += 1
        self.seen[f"Preempted {event.how}"] += 1
        self._swapped = None

    def _expect_moves(self, event: Event) -> None:
        match event:
            case SwappedOut():
                self._swapped = event
                self._expect(Move.SWAP_OUT, event.block_ids, event.host_ids)
            case SwappedIn():
                self._swapped = event
                self._book_lost(event.request_id)
                self._expect(Move.SWAP_IN, event.host_ids, event.block_ids)
            case BlockCopied():
                self._judge_copy(event)
                self._expect(Move.COPY, (event.source_id,), (event.block_id,))
            case Forked():
                parent = self.engine.requests[event.parent_id]
                if event.block_ids:
                    self._num_cached[event.request_id] = parent.num_cached
                if self.engine.config.allocator != "paged" and event.block_ids:
                    self._expect(Move.COPY, tuple(parent.block_ids), event.block_ids)
                self._forget_copies(event.parent_id, event.request_id)

    def _expect(self, move: Move, source_ids: tuple[int, ...], target_ids: tuple[int, ...]) -> None:
        pairs = zip(source_ids, target_ids, strict=True)
        self._moves += [Transfer(move, source, target) for source, target in pairs if source != NULL_BLOCK]

    def _judge_copy(self, event: BlockCopied) -> None:
        """I12: only what others read is copied, never a full block, and once until the next fork or admission."""
        engine, request = self.engine, self.engine.requests[event.request_id]
        source, size = engine.kv.pool.blocks[event.source_id], engine.config.block_size
        index = request.num_computed // size
        [group] = [g for g, table in enumerate(request.tables) if table.block_ids[index:] == [event.block_id]]
        assert engine.config.allocator == "paged", f"I12: {request.id} shares a contiguous block"
        assert source.ref_count > 1 or source.entry, f"I12: block {source.id} was copied for nothing"
        assert request.num_computed % size, f"I12: block {source.id} is full for {request.id} and was copied"
        assert (request.id, group, index) not in self._copied, (
            f"I12: {request.id} copied index {index} of a table twice"
        )
        self._copied.add((request.id, group, index))
        self._book_lost(request.id)
        self.seen["copy of a part" if source.entry else "copy of a tail"] += 1

    def _forget_copies(self, *request_ids: str) -> None:
        self._copied = {copy for copy in self._copied if copy[0] not in request_ids}

    def _remember(self, event: BlockCached) -> None:
        block, request = self.engine.kv.pool.blocks[event.block_id], self.engine.requests[event.request_id]
        assert block.entry, f"I6: block {block.id} is said to be cached"
        self._entries[block.id] = block.entry
        self._num_hits[block.id], self._priorities[block.id] = 0, request.priority
        table = request.tables[event.group]
        self._drafts.note(request, table.block_ids.index(block.id), block.entry)
        before = table.block_ids[table.num_dropped : table.block_ids.index(block.id)]
        self.seen["companion"] += event.group > 0
        self.seen["duplicate block"] += any(self.engine.kv.pool.blocks[id_].entry is None for id_ in before)

    def _judge_eviction(self, block: Block) -> None:
        """I14: the slow twin of the policies: the least of all idle leaves, or the youngest block where none is one."""
        entry = self._entries[block.id]
        self.seen[f"evicted by {self.engine.config.eviction_policy}"] += not self.is_resetting
        is_lru_chain = self.engine.kv.eviction is None  # the order of the free list, which free_list_twin.py checks
        if not is_lru_chain and not self.is_resetting:
            stems = {entry.parent for entry in self._entries.values()}
            blocks = self.engine.kv.pool.blocks
            idle = {id_: e for id_, e in self._entries.items() if blocks[id_].ref_count == 0}
            leaves = [id_ for id_, e in idle.items() if e.serial not in stems]
            expected = max(idle, key=lambda id_: idle[id_].serial)
            if leaves:
                expected = min(leaves, key=lambda id_: (*self._rank(blocks[id_]), -idle[id_].serial))
            assert block.id == expected, f"I14: block {block.id} was evicted, not {expected}"
        del self._entries[block.id]
        if not self.is_resetting:
            self._lost.append(entry)

    def _rank(self, block: Block) -> tuple[int, ...]:
        """The least goes first: least recently used, or least often, or oldest, or never hit, or least urgent."""
        num_hits, last_used = self._num_hits[block.id], block.last_used
        return {
            "lru": (last_used,),
            "lfu": (num_hits, last_used),
            "fifo": (self._entries[block.id].serial,),
            "slru": (num_hits > 0, last_used),
            "priority": (-self._priorities[block.id], last_used),
        }[self.engine.config.eviction_policy]

    def _book_hit(self, event: PrefixHit) -> None:
        request = self.engine.requests[event.request_id]
        self._forget_copies(request.id)
        found = [block_id for block_id in event.block_ids if block_id != NULL_BLOCK]
        self._num_hits.update(found)
        for block_id in found:
            self._book_user(request.id, block_id)
        self.seen["hit beside a window"] += event.group > 0 and len(found) < len(event.block_ids)
        self.seen["hit after preemption"] += request.num_preemptions > 0
        self.seen["salted hit"] += request.salt != ""
        self.seen["partial hit"] += event.num_tokens % self.engine.config.block_size > 0

    def _book_user(self, request_id: str, block_id: int) -> None:
        self._priorities[block_id] = min(self._priorities[block_id], self.engine.requests[request_id].priority)

    def _book_lost(self, request_id: str) -> None:
        self._lost_to.setdefault(request_id, []).extend(self._lost)
        self._lost = []


def _num_reached(chain: list[int], entries: list[CacheEntry], config: EngineConfig) -> int:
    """The longest start of a chain after which every group finds all that its window reaches back to."""
    cached = {(entry.serial, entry.group) for entry in entries}
    for num_blocks in range(len(chain), 0, -1):
        seen = [
            (chain[position // config.block_size], group)
            for group, window in enumerate(config.group_windows[1:], start=1)
            for position in range(num_blocks * config.block_size)
            if window is None or position > num_blocks * config.block_size - window
        ]
        if cached.issuperset(seen):
            return num_blocks
    return 0


def _num_equal(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens at the start agree."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
