"""Where memory went, told from the events alone, against a witness that looks into the engine while it runs."""

from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minivllm.course.memory_fold import slots_asked
from minivllm.course.memory_use import PARTS, MemoryUse, Refusal, average, memory_over_time, refusals, saturated
from minivllm.engine.allocators import RULES, ContiguousAllocator
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.engine.tables import slot_of
from minivllm.engine_config import CHOICES, EngineConfig
from minivllm.errors import MiniVLLMError, RequestError
from minivllm.events import BlocksReserved
from minivllm.lab.fake_runner import FakeRunner, fake_engine, fake_request
from minivllm.request import Request
from minivllm.speculative_config import SpeculativeConfig
from minivllm.trace import Trace

KV_BYTES = 512


def header(config: EngineConfig) -> dict[str, object]:
    """What LLM's header has, and more."""
    return {"kv_bytes_per_token": KV_BYTES, **asdict(config)}


def recorded(**options: object) -> tuple[Engine, FakeRunner, Trace]:
    engine, runner = fake_engine(**options)
    trace = Trace(header(engine.config))
    engine.events.listen(trace)
    return engine, runner, trace


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def parts(use: MemoryUse) -> dict[str, int]:
    return {part: getattr(use, part) for part in PARTS}


class Witness:
    """Counts slots one by one when the runner has stored K and V; what they come to is asked after the last step."""

    def __init__(self, engine: Engine, runner: FakeRunner) -> None:
        self.engine, self.runner = engine, runner
        self.seen: list[tuple[dict[tuple[int, int], int], int, int, int]] = []
        self._generation = [0] * len(engine.kv.pool.blocks)  # how often a block became free
        self._rounded: dict[str, int] = {}
        release = engine.kv.pool.release

        def count_and_release(block: object) -> None:
            release(block)  # type: ignore[arg-type]
            self._generation[block.id] += block.ref_count == 0  # type: ignore[attr-defined]

        engine.kv.pool.release = count_and_release  # type: ignore[method-assign]
        engine.events.listen(self._hear)
        runner.after = self._look

    def expected(self) -> list[dict[str, int]]:
        """Parts of each step; blocks are told apart by their generation."""
        size, pool = self.engine.config.block_size, self.engine.kv.pool
        at_last: dict[tuple[int, int], int] = defaultdict(int)
        for fills, _, _, _ in self.seen:
            for life, fill in fills.items():
                at_last[life] = max(at_last[life], fill)
        rows = []
        for fills, num_held, num_rounded, num_cached in self.seen:
            live, filled = sum(fills.values()), sum(at_last[life] for life in fills)
            free = (pool.num_usable - num_held) * size
            row = {"live": live, "reserved": filled - live, "internal": num_held * size - num_rounded - filled}
            rows.append({**row, "rounded": num_rounded, "cached": num_cached * size, "free": free})
        return rows

    def _num_stored(self, request: Request, num_new: int) -> int:
        """With the drafts that stand, which the runner knows."""
        _, written = self.runner._written.get(request, (0, 0))
        return max(request.num_computed + num_new, written if num_new else 0)

    def _hear(self, event: object) -> None:
        if isinstance(event, BlocksReserved) and isinstance(self.engine.kv.allocator, ContiguousAllocator):
            request = self.engine.requests[event.request_id]
            rule, _ = RULES[self.engine.config.allocator]
            num_given = len(event.block_ids) * self.engine.config.block_size
            self._rounded[request.id] = num_given - rule(request, self.engine.config)

    def _look(self, plan: StepPlan) -> None:
        size, kv = self.engine.config.block_size, self.engine.kv
        num_new, running = dict(plan.scheduled), list(self.engine.scheduler.running)
        held = {id_ for r in running for id_ in (*chain(*(t.block_ids for t in r.tables)), *r.reserved_ids)}
        held.update(id_ for ids in self.engine.pins.blocks_of_ids().values() for id_ in ids)
        live = {
            slot_of(position, table.block_ids, size)
            for request in running
            for table in request.tables
            for position in range(self._num_stored(request, num_new.get(request, 0)))
            if table.block_ids[position // size] != NULL_BLOCK
        }
        live |= {id_ * size + i for id_ in held if kv.pool.blocks[id_].entry is not None for i in range(size)}
        assert live <= self.runner.contents.keys()
        fills = {(id_, self._generation[id_]): 0 for id_ in held - {NULL_BLOCK}}
        for slot in live:
            fills[slot // size, self._generation[slot // size]] += 1
        num_held = sum(block.ref_count > 0 for block in kv.pool.blocks)
        runs = kv.allocator.runs if isinstance(kv.allocator, ContiguousAllocator) else {}
        num_rounded = sum(self._rounded[id_] for id_ in runs)
        num_cached = sum(block.ref_count == 0 and block.entry is not None for block in kv.pool.blocks)
        self.seen.append((fills, num_held, num_rounded, num_cached))


def random_options(random: Random) -> dict[str, object]:
    allocator = random.choice(CHOICES["allocator"])
    caches = allocator == "paged" and random.random() < 0.7
    size = random.choice((1, 2, 3, 4, 8))
    num_blocks = random.randint(-(-30 // size) + 1, -(-30 // size) + 24)
    options: dict[str, object] = {
        "allocator": allocator, "enable_prefix_caching": caches, "block_size": size, "num_blocks": num_blocks,
        "max_model_len": 30, "prefix_cache": random.choice(CHOICES["prefix_cache"]),
        "eviction_policy": random.choice(CHOICES["eviction_policy"]), "batching": random.choice(CHOICES["batching"]),
        "max_num_batched_tokens": random.choice((30, 45, 100)), "max_num_seqs": random.choice((2, 5, 9)),
        "scheduling_policy": random.choice(CHOICES["scheduling_policy"]), "watermark": random.choice((0.0, 0.1)),
        "eos_token_ids": random.choice(((), (0,))),
    }  # fmt: skip
    if allocator == "paged" and random.random() < 0.3:
        options |= {"speculative": (SpeculativeConfig("ngram"),), "eos_token_ids": ()}
    if random.random() < 0.5:
        options |= {"preemption_mode": "swap", "num_host_blocks": random.choice((4, 40))}
    if random.random() < 0.3:
        windows = random.choice(((2,), (5,), (9,), (None, 3), (None, 5, 5)))
        windows = windows if allocator == "paged" else windows[-1:]
        options |= {
            "group_windows": windows,
            "num_blocks": num_blocks * len(windows),
            "prefix_cache": "hash",
            "eviction_policy": "lru",
        }
    return options


def live_at_random(random: Random, num_actions: int = 60) -> tuple[Engine, Trace, Witness]:
    """Requests with common beginnings, forks, samples, aborts and pins; then all run to their ends."""
    engine, runner, trace = recorded(**random_options(random))
    witness = Witness(engine, runner)
    for number in range(num_actions):
        chance, alive = random.random(), sorted(engine.requests)
        if chance < 0.25 and len(alive) < 8:
            prompt = [random.randrange(2)] * random.randint(1, 20) + [random.randrange(9)] * random.randint(1, 5)
            request = fake_request(f"r{number}", prompt, random.choice((1, 4, 9, 30)), priority=random.randint(0, 2))
            samples = [f"r{number}.{i}" for i in range(random.choice((0, 0, 0, 2)))]
            wish = (request.params, request.max_tokens)
            request.pending_forks = [
                Request(s, list(prompt), len(prompt), *wish, seed=i) for i, s in enumerate(samples)
            ]
            engine.add(request)
        elif chance < 0.33 and alive:
            engine.fork(random.choice(alive), f"f{number}", seed=number)
        elif chance < 0.36 and alive:
            engine.abort(random.choice(alive))
        elif chance < 0.4 and engine.config.enable_prefix_caching:
            try_to_pin(engine, f"p{number}", [random.randrange(2)] * 8)
        elif alive:
            engine.step()
    for name in list(engine.pins.blocks_of):
        engine.pins.unpin(name)
    drain(engine)
    return engine, trace, witness


def try_to_pin(engine: Engine, name: str, token_ids: list[int]) -> None:
    if engine.pins.blocks_of:
        engine.pins.unpin(next(iter(engine.pins.blocks_of)))
        return
    with suppress(RequestError):  # nothing of it is cached, or too little would be left
        engine.pins.pin(name, token_ids)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_parts_are_what_a_witness_counts_and_sum_to_the_pool(seed: int) -> None:
    engine, trace, witness = live_at_random(Random(seed))
    uses, expected = memory_over_time(trace), witness.expected()
    assert len(uses) == len(expected)
    for use, row in zip(uses, expected, strict=True):
        assert min(parts(use).values()) >= 0
        assert use.num_slots == (engine.config.num_blocks - 1) * engine.config.block_size
        assert (use.live, use.reserved, use.internal) == (row["live"], row["reserved"], row["internal"])
        assert use.external == row["rounded"] + (row["free"] if use.is_short else 0)
        assert use.cached == (0 if use.is_short else row["cached"])


def test_picture_of_the_docstring() -> None:
    # 4 tokens of prompt and 9 of output ask for 12 slots, 3 blocks; buddies give 4. It is aborted with 8 tokens stored.
    engine, _, trace = recorded(allocator="buddy", enable_prefix_caching=False)
    engine.add(fake_request("a", [1, 2, 3, 4], max_tokens=9, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.abort("a")
    assert parts(memory_over_time(trace)[1]) == {
        "live": 5, "reserved": 3, "internal": 4, "external": 4, "cached": 0, "empty": 24
    }  # fmt: skip


def test_seed_course_3001_tokens_in_blocks_of_128_leave_71_slots() -> None:
    engine, _, trace = recorded(block_size=128, num_blocks=33, max_model_len=4096, max_num_batched_tokens=4096)
    engine.add(fake_request("a", [1] * 3001, max_tokens=1))
    drain(engine)
    [use] = memory_over_time(trace)
    assert (use.live, use.reserved, use.internal) == (3001, 0, 24 * 128 - 3001)
    assert use.in_bytes()["internal"] == 71 * KV_BYTES


@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_paging_wastes_less_than_a_block_of_each_request(seed: int) -> None:
    random = Random(seed)
    engine, _, trace = recorded(
        enable_prefix_caching=False, block_size=random.choice((1, 4, 16)), num_blocks=60, max_num_seqs=6
    )
    for number in range(12):
        engine.add(fake_request(f"r{number}", [number] * random.randint(1, 20), random.randint(1, 19)))
    drain(engine)
    for use in memory_over_time(trace):
        assert use.reserved + use.internal <= use.num_requests * (engine.config.block_size - 1)


def test_shared_blocks_count_once() -> None:
    engine, _, trace = recorded(enable_prefix_caching=False)
    engine.add(fake_request("a", range(8), max_tokens=3, ignore_eos=True))
    engine.step()
    engine.fork("a", "b", seed=1)
    engine.step()
    assert [(use.live, use.num_requests) for use in memory_over_time(trace)] == [(8, 1), (8 + 2, 2)]


def test_what_ended_requests_keep_in_a_static_batch_is_internal() -> None:
    engine, _, trace = recorded(enable_prefix_caching=False, batching="static")
    engine.add(fake_request("short", range(4), max_tokens=1, ignore_eos=True))
    engine.add(fake_request("long", range(4), max_tokens=3, ignore_eos=True))
    drain(engine)
    assert [use.live for use in memory_over_time(trace)] == [8, 5, 6]
    assert [use.internal for use in memory_over_time(trace)] == [0, 4 + 2, 4 + 2]


def test_trace_that_is_cut_counts_on_max_tokens() -> None:
    engine, _, trace = recorded(allocator="contiguous", enable_prefix_caching=False)
    engine.add(fake_request("a", range(4), max_tokens=9, ignore_eos=True))
    drain(engine)
    whole = memory_over_time(trace)
    assert memory_over_time(Trace(trace.header, trace.until(3))) == whole[:3]
    assert (whole[0].reserved, whole[0].internal) == (8, 28)


def test_refusal_is_told_with_its_hole() -> None:
    engine, _, trace = recorded(
        allocator="oracle", enable_prefix_caching=False, block_size=1, num_blocks=13, max_model_len=12
    )
    for name, num_tokens in (("a", 1), ("b", 4), ("c", 1)):
        engine.add(fake_request(name, [1] * (5 - num_tokens), max_tokens=num_tokens, ignore_eos=True))
    engine.step()  # a and c have ended: 4 + 4 slots are free, with b in between
    engine.add(fake_request("d", [1, 2, 3], max_tokens=3, ignore_eos=True))
    engine.step()
    assert refusals(trace) == [Refusal(step=2, request_id="d", need=5, free=8, largest_hole=4)]
    assert memory_over_time(trace)[1].external == 8


def test_paging_refuses_nobody_who_would_fit() -> None:
    engine, _, trace = recorded(enable_prefix_caching=False, num_blocks=11)
    for number in range(9):
        engine.add(fake_request(f"r{number}", [number] * 15, max_tokens=9))
    drain(engine)
    assert refusals(trace) == []


@pytest.mark.parametrize("allocator", RULES)
@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(1, 1), (7, 25), (30, 32), (39, 1), (20, 20)])
def test_slots_asked_are_those_of_the_allocator(allocator: str, num_prompt: int, max_tokens: int) -> None:
    engine, _ = fake_engine(allocator=allocator, enable_prefix_caching=False)
    rule, _ = RULES[allocator]
    request = fake_request("a", [1] * num_prompt, max_tokens)
    assert slots_asked(allocator, num_prompt, max_tokens, 40) == rule(request, engine.config)


def test_average_counts_all_that_is_not_set_aside_as_external() -> None:
    use = MemoryUse(1, 2, 10, 5, 5, 10, 3, 7, KV_BYTES, True)
    shares = average([use, replace(use, num_requests=4, live=20, empty=0, cached=0)])
    assert (shares.live, shares.reserved, shares.internal, shares.external) == (37.5, 12.5, 12.5, 37.5)
    assert (shares.num_requests, shares.live_slots_per_request) == (3, 5)


def test_saturated_part_begins_at_the_first_wait_and_skips_the_warm_up() -> None:
    use = MemoryUse(1, 1, 10, 0, 0, 0, 0, 0, KV_BYTES, False)
    uses = [replace(use, step=step, is_short=step in (3, 5, 10)) for step in range(1, 13)]
    assert [use.step for use in saturated(uses)] == [5, 6, 7, 8, 9, 10]


def test_what_cannot_be_measured_is_said_in_one_line() -> None:
    with pytest.raises(MiniVLLMError, match="no request ever waited"):
        saturated([])
    with pytest.raises(MiniVLLMError, match="no steps to average over"):
        average([])
    with pytest.raises(MiniVLLMError, match="the header of the trace has no num_blocks"):
        memory_over_time(Trace())
    engine, _, trace = recorded()
    engine.add(fake_request("a", range(8)))
    engine.step()
    with pytest.raises(MiniVLLMError, match="a: the trace begins after this request came"):
        memory_over_time(Trace(trace.header, trace.events[1:]))
