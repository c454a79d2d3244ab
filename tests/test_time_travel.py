"""A recorded run comes back at every step, goes on as it went, and parts where a policy was changed."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.beam_search import BeamSearchParams
from minivllm.course.memory_use import memory_over_time
from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.engine_config import CHOICES
from minivllm.errors import ConfigError, MiniVLLMError, RequestError
from minivllm.events import Event, Forked, Preempted, PrefixHit, StepRan
from minivllm.lab.engine_copy import changed_config, copy_engine
from minivllm.lab.fake_runner import FakeRunner, fake_engine, fake_request
from minivllm.lab.futures import decisions
from minivllm.lab.inputs import End
from minivllm.lab.invariants import check_invariants
from minivllm.lab.player import play
from minivllm.lab.time_travel import TimeMachine, study
from minivllm.request import Request
from minivllm.runner.model_runner import ModelRunner
from minivllm.speculative_config import SpeculativeConfig
from minivllm.trace import Trace
from minivllm.workloads import agents, fixed

Build = Callable[[str], tuple[Path, PreTrainedModel]]
PREFIXES = [[Random(seed).randrange(12) for _ in range(40)] for seed in range(2)]
# Pools so small that requests are preempted and cached blocks evicted.
LIVES: dict[str, dict[str, Any]] = {
    "plain": {"max_model_len": 28},
    "swap": {"preemption_mode": "swap", "num_host_blocks": 9, "max_num_batched_tokens": 9},
    "radix": {"prefix_cache": "radix", "max_model_len": 28},
    "radix lfu dfs": {"prefix_cache": "radix", "eviction_policy": "lfu", "scheduling_policy": "dfs"},
    "hash slru priority": {"eviction_policy": "slru", "scheduling_policy": "priority", "aging_steps": 3},
    "window": {"group_windows": (7,), "max_num_batched_tokens": 5},
    "window swap": {
        "group_windows": (5,),
        "preemption_mode": "swap",
        "num_host_blocks": 20,
        "block_size": 3,
        "num_blocks": 15,
    },
    "static": {"batching": "static", "max_num_seqs": 3},
    "prefill first": {"batching": "prefill_first", "watermark": 0.1},
    "buddy": {"allocator": "buddy", "enable_prefix_caching": False, "num_blocks": 20},
    "one token a block": {"block_size": 1, "num_blocks": 41},
    "drafts": {"speculative": (SpeculativeConfig("ngram"),), "preemption_mode": "swap", "num_host_blocks": 9},
    "drafts of adaptive length": {
        "speculative": (SpeculativeConfig("ngram", 7, adaptive=True, max_step_tokens=99),),
        "prefix_cache": "radix",
        "max_model_len": 28,
    },
}


class RunnerError(Exception):
    """What a runner may raise."""


class Life:
    """Everything that may happen to an engine, at random but the same for the same seed."""

    def __init__(self, engine: Engine, runner: FakeRunner, seed: int) -> None:
        self.engine, self.random, self.seen = engine, Random(seed), Counter[str]()
        self.abort_in_step = self.fails = False
        self.num_requests = 0
        self.advanced: list[str] = []  # who got a token in the last step, in whose text a stop string may be
        self.hashes: dict[int, str] = {}
        self.slots: dict[int, tuple[dict[int, Any], dict[int, Any]]] = {}
        self.runner = runner
        runner.after = self._disturb
        self._look()

    def act(self) -> None:
        """One action; steps are the most frequent."""
        chance, alive = self.random.random(), list(self.engine.requests)
        if chance < 0.3 and len(alive) < 7:
            self._add()
        elif chance < 0.36 and alive:
            self.seen["fork"] += 1
            self.engine.fork(self.random.choice(alive), self._new_id(), self.random.randrange(3))
        elif chance < 0.42 and alive:
            if self.advanced and self.random.random() < 0.5:
                self.seen["stop"] += self.engine.finish(self.random.choice(self.advanced), "stop", "\n")
            else:
                self.seen["abort"] += self.engine.abort(self.random.choice(alive))
        elif chance < 0.46:
            self._pin_or_unpin()
        elif chance < 0.48:
            for request_id in alive if self.random.random() < 0.5 else []:
                self.engine.abort(request_id)
            self.seen["reset"] += self.engine.kv.reset_cache()
        else:
            self.step()

    def step(self) -> None:
        self._steer()
        self.abort_in_step, self.fails = self.random.random() < 0.03, self.random.random() < 0.03
        self.advanced = []
        try:
            self.advanced = [request.id for request in self.engine.step() if not request.is_steered]
        except RunnerError:
            self.seen["failed step"] += 1
        self._look()

    def drain(self) -> None:
        for name in list(self.engine.pins.blocks_of):
            self.engine.pins.unpin(name)
        while self.engine.has_work:
            self.step()

    def _add(self) -> None:
        n = self.random.choice((1, 1, 1, 3))
        prompt = [*self.random.choice(PREFIXES)[: self.random.randint(1, 20)], self.random.randrange(12)]
        max_tokens, priority = self.random.randint(1, 14), self.random.randrange(3)
        first, *others = (
            fake_request(
                self._new_id(), prompt, max_tokens, priority, self.random.choice(("", "", "a")), temperature=int(n > 1)
            )
            for _ in range(n)
        )
        for seed, fork in enumerate(others, 1):
            fork.seed, fork.salt = seed, first.salt
        first.pending_forks = others
        first.is_steered = n == 1 and self.random.random() < 0.25
        self.seen["steered"] += first.is_steered
        self.engine.add(first)

    def _steer(self) -> None:
        """As beam search does: end some of those that wait, fork others, give each a token."""
        for request in [r for r in self.engine.requests.values() if r.is_held]:
            chance = self.random.random()
            if chance < 0.1:
                self.engine.abort(request.id)
                continue
            if chance < 0.4 and len(self.engine.requests) < 9:
                child = self.engine.fork(request.id, self._new_id())
                self.engine.append(child.id, self.random.randrange(12))
                self.seen["steered fork"] += 1
            if chance < 0.9:
                self.engine.append(request.id, self.random.randrange(12))

    def _pin_or_unpin(self) -> None:
        if self.engine.pins.blocks_of:
            self.engine.pins.unpin("it")
            return
        try:
            self.engine.pins.pin("it", PREFIXES[0][:8])
            self.seen["pin"] += 1
        except RequestError:
            pass

    def _disturb(self, plan: StepPlan) -> None:
        if self.abort_in_step and self.engine.requests:
            self.seen["abort in a step"] += self.engine.abort(self.random.choice(list(self.engine.requests)))
        if self.fails:
            raise RunnerError

    def _look(self) -> None:
        step = self.engine.scheduler.step
        self.hashes[step] = self.engine.state_hash()
        self.slots[step] = dict(self.runner.contents), dict(self.runner.host)

    def _new_id(self) -> str:
        self.num_requests += 1
        return f"r{self.num_requests}"


@cache
def live(name: str, seed: int, every: int = 1, num_actions: int = 70) -> tuple[Life, TimeMachine]:
    engine, runner = fake_engine(**LIVES[name])
    life = Life(engine, runner, seed)
    machine = TimeMachine(engine, every)
    for _ in range(num_actions):
        life.act()
    life.drain()
    return life, machine


def tokens(requests: dict[str, Request]) -> dict[str, list[int]]:
    return {request_id: request.token_ids for request_id, request in requests.items()}


def decided(events: Iterable[Event]) -> list[tuple[object, ...]]:
    return [decisions(event) for event in events]


@pytest.mark.parametrize("name", LIVES)
def test_every_step_of_a_random_life_comes_back_and_goes_on_as_it_went(name: str) -> None:
    life, machine = live(name, seed=0)
    assert machine.state_hashes == life.hashes
    for step in range(machine.last_step + 1):
        engine = machine.restore(step)
        assert engine.state_hash() == life.hashes[step]
        assert isinstance(engine.runner, FakeRunner) and engine.runner is not life.runner
        assert (engine.runner.contents, engine.runner.host) == life.slots[step]  # every slot, free ones included
        again = machine.resume(step)
        assert machine.first_departure(again) is None
        assert again.state_hashes == {s: life.hashes[s] for s in range(step, machine.last_step + 1)}
        assert machine.check(again.engine, machine.last_step) == []
        assert decided(again.trace.events) == decided(machine.trace.events[machine.record.num_events[step] :])
        later = sorted(repr(noted) for noted in machine.inputs if noted.is_after(step))
        assert sorted(map(repr, again.inputs)) == later  # the order in which beams got their tokens is not noted
        assert tokens(again.requests).items() <= tokens(machine.record.requests).items()
    assert life.engine.state_hash() == life.hashes[machine.last_step]  # the original is unharmed


def test_random_lives_had_everything_in_them() -> None:
    seen: Counter[str] = Counter()
    for name in LIVES:
        life, machine = live(name, seed=0)
        seen += life.seen
        seen.update(type(event).__name__ for event in machine.trace)
    wanted = (
        "abort", "stop", "fork", "steered fork", "pin", "reset", "failed step", "abort in a step",
        "Preempted", "Evicted", "BlockCopied", "BlockExchanged", "SwappedIn", "BlocksDropped", "PrefixHit",
        "BlocksReserved", "BlocksTrimmed", "DraftJudged",
    )  # fmt: skip
    assert [what for what in wanted if not seen[what]] == []


@pytest.mark.parametrize("name", LIVES)
def test_recording_changes_nothing(name: str) -> None:
    engine, runner = fake_engine(**LIVES[name])
    life = Life(engine, runner, seed=0)
    for _ in range(70):
        life.act()
    life.drain()
    recorded, machine = live(name, seed=0)
    assert life.hashes == recorded.hashes
    assert engine.runner is runner
    machine.close()
    assert recorded.engine.runner is recorded.runner and not recorded.engine.events


@pytest.mark.parametrize("name", ["swap", "radix lfu dfs", "window"])
def test_steps_that_were_not_kept_are_derived(name: str) -> None:
    life, machine = live(name, seed=1, every=7)
    for step in range(machine.last_step + 1):
        engine = machine.restore(step)
        assert engine.state_hash() == life.hashes[step]
        assert isinstance(engine.runner, FakeRunner)
        assert (engine.runner.contents, engine.runner.host) == life.slots[step]
    _, dense = live(name, seed=1)
    assert machine.num_bytes < dense.num_bytes


def test_recording_may_begin_in_the_middle() -> None:
    engine, runner = fake_engine(**LIVES["swap"])
    life = Life(engine, runner, seed=3)
    for _ in range(40):
        life.act()
    machine = TimeMachine(engine)
    first = engine.scheduler.step
    assert machine.first_step == first > 10 and engine.has_work
    for _ in range(40):
        life.act()
    for step in range(first, machine.last_step + 1):
        again = machine.resume(step)
        assert machine.first_departure(again) is None
        assert again.engine.state_hash() == engine.state_hash()  # what came after the last step is there, too


def test_restored_engine_has_nothing_in_common_with_the_record() -> None:
    life, machine = live("radix", seed=0)
    step = machine.last_step // 2
    engine = machine.restore(step)
    while engine.has_work and any(not request.is_held for request in engine.requests.values()):
        engine.step()
    assert engine.state_hash() != life.hashes[step]
    assert machine.check(machine.restore(step), step) == []
    assert life.engine.state_hash() == life.hashes[machine.last_step]


def test_disturbed_restore_is_caught() -> None:
    life, machine = live("swap", seed=0)
    step = next(step for step in reversed(life.hashes) if life.slots[step][1])
    shared = machine.restore(step)
    assert machine.check(shared, step) == []
    shared.kv.pool.first_free().ref_count += 1
    assert [fault.split(" is")[0] for fault in machine.check(shared, step)] == ["the state hash"]
    engine = machine.restore(step)
    assert isinstance(engine.runner, FakeRunner)
    slot, host_id = next(iter(engine.runner.contents)), next(iter(engine.runner.host))
    del engine.runner.contents[slot]
    assert machine.check(engine, step) == [f"block {slot // 4} holds other bytes"]
    engine.runner.host[host_id] = engine.runner.host[host_id][::-1]
    assert machine.check(engine, step)[1:] == [f"host block {host_id} holds other bytes"]


def test_departure_is_the_first_step_that_went_another_way() -> None:
    _, machine = live("plain", seed=0)
    again = machine.resume(4)
    again.state_hashes[9] = again.state_hashes[12] = "another"
    assert machine.first_departure(again) == 9
    del again.state_hashes[6]
    assert machine.first_departure(again) == 6


def test_run_that_cannot_be_repeated_is_refused() -> None:
    engine, runner = fake_engine()
    machine = TimeMachine(engine, every=5)
    engine.add(fake_request("a", range(9), max_tokens=12))
    for step in range(12):
        runner.vocab_size = 2 + step % 3  # the runner's answers depend on what no record can know
        engine.step()
    with pytest.raises(MiniVLLMError, match=r"derived from step 5, is not what was recorded"):
        machine.restore(9)


CHANGES: dict[str, dict[str, object]] = {
    "batching chunked": {"batching": "chunked"},
    "batching decode_first": {"batching": "decode_first", "max_num_batched_tokens": 50},
    "batching prefill_first": {"batching": "prefill_first", "max_num_batched_tokens": 50},
    "batching request_level": {"batching": "request_level"},
    "batching static": {"batching": "static"},
    "priority": {"scheduling_policy": "priority"},
    "aged priority": {"scheduling_policy": "priority", "aging_steps": 2},
    "shortest_first": {"scheduling_policy": "shortest_first"},
    "longest_prefix_first": {"scheduling_policy": "longest_prefix_first"},
    "dfs": {"scheduling_policy": "dfs"},
    "swap": {"preemption_mode": "swap", "num_host_blocks": 25},
    "recompute": {"preemption_mode": "recompute"},
    "watermark": {"watermark": 0.4},
    "budget": {"max_num_batched_tokens": 41},
    "small budget": {"max_num_batched_tokens": 3, "batching": "chunked"},
    "seats": {"max_num_seqs": 2},
    "eviction lfu": {"eviction_policy": "lfu"},
    "eviction fifo": {"eviction_policy": "fifo"},
    "eviction lru": {"eviction_policy": "lru"},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
}


def first_different_step(original: list[Event], changed: list[Event]) -> int | None:
    """The slow twin: all that was decided in each step, step by step."""
    for step in range(max((event.step for event in (*original, *changed)), default=0) + 1):
        if decided([e for e in original if e.step == step]) != decided([e for e in changed if e.step == step]):
            return step
    return None


@pytest.mark.parametrize("change", CHANGES)
def test_other_policy_gives_other_steps_and_the_same_tokens(change: str) -> None:
    differences = []
    for name in ("plain", "swap", "radix lfu dfs", "static", "window swap"):
        _, machine = live(name, seed=0)
        if "window" in name and "eviction" in change:
            continue  # every layer has a window: the starts of prefixes are freed
        for step in (0, machine.last_step // 2):
            futures = machine.fork(step, **CHANGES[change])
            assert futures.tokens_equal, f"{name}: {futures}"
            ours, theirs = list(futures.original.events), list(futures.changed.events)
            difference = futures.first_difference
            assert (difference.step if difference else None) == first_different_step(ours, theirs)
            differences.append(difference)
    assert any(differences)


def crowded_run(**options: Any) -> tuple[Engine, TimeMachine]:
    """Requests come at fixed steps, whatever the engine makes of them."""
    engine, _ = fake_engine(**{"max_num_seqs": 6, "max_num_batched_tokens": 24, "num_host_blocks": 25, **options})
    machine, random = TimeMachine(engine), Random(5)
    for number in range(18):
        prompt = [*PREFIXES[number % 2][: 4 * random.randrange(5)], random.randrange(12)]
        request = fake_request(f"r{number}", prompt, random.randint(2, 16), number % 3, temperature=0, ignore_eos=True)
        engine.add(request)
        for _ in range(random.randrange(4)):
            engine.step()
    while engine.has_work:
        engine.step()
    return engine, machine


@pytest.mark.parametrize("prefix_cache", ["hash", "radix"])
@pytest.mark.parametrize("change", CHANGES)
def test_future_of_the_beginning_is_the_run_of_a_new_engine(change: str, prefix_cache: str) -> None:
    changes = CHANGES[change]
    _, machine = crowded_run(prefix_cache=prefix_cache)
    _, new = crowded_run(prefix_cache=prefix_cache, **changes)
    assert decided(machine.fork(0, **changes).changed.events) == decided(new.trace.events)


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in ("seats", "whole prompts")])
def test_engine_under_other_policies_keeps_every_invariant(change: str) -> None:
    _, machine = live("radix", seed=2)
    for step in range(0, machine.last_step, 5):
        restored = machine.restore(step)
        config = changed_config(restored.config, CHANGES[change])
        engine = copy_engine(restored, restored.runner, config)
        assert engine.config is engine.kv.config is engine.scheduler.config is config
        check_invariants(engine)
        while any(not request.is_held for request in engine.requests.values()):
            engine.step()
            check_invariants(engine)


def test_abort_of_one_who_has_ended_is_dropped() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    machine = TimeMachine(engine)
    engine.add(fake_request("first", range(20), max_tokens=8, temperature=0))
    engine.add(fake_request("second", range(20, 25), max_tokens=4, temperature=0))
    for _ in range(6):
        engine.step()
    engine.abort("second")
    futures = machine.fork(0, max_num_seqs=2)
    assert futures.original.outcome.tokens["second"] == ()  # it was still waiting
    assert len(futures.changed.outcome.tokens["second"]) == 4
    assert [noted.input for noted in futures.dropped] == [End("second", "abort", None, None)]
    assert futures.tokens_equal


def test_unchanged_future_is_the_record_itself() -> None:
    for name in LIVES:
        _, machine = live(name, seed=0)
        futures = machine.fork(machine.last_step // 4)
        assert futures.first_difference is None and futures.original.outcome == futures.changed.outcome
        assert decided(futures.changed.trace.events) == decided(machine.trace.events)


def test_stop_string_is_found_in_every_future_at_the_same_place() -> None:
    engine, _ = fake_engine(num_blocks=40)
    machine = TimeMachine(engine)
    for number in range(4):
        engine.add(fake_request(f"r{number}", range(number, number + 9), max_tokens=20, temperature=0))
    while engine.requests["r3"].num_output < 7:
        engine.step()
    engine.finish("r3", "stop", "word")
    while engine.has_work:
        engine.step()
    outcome = machine.fork(0, max_num_seqs=1).changed.outcome
    assert outcome.num_steps > machine.last_step
    assert len(outcome.tokens["r3"]) == 7 and outcome.finish_reasons["r3"] == "stop"


def test_played_agents_and_chats_come_back() -> None:
    """The player gives a fork tokens and wishes of its own, and its place in the queue."""
    workload = agents(3, 2, 4, fixed(6, 9), fixed(3, 6), vocab=range(12))
    engine, _ = fake_engine(num_blocks=60, max_model_len=80, scheduling_policy="shortest_first")
    machine = TimeMachine(engine)
    play(workload, engine, show_progress=False)
    for step in range(machine.last_step + 1):
        assert machine.first_departure(machine.resume(step)) is None
    assert machine.fork(3, max_num_seqs=2).tokens_equal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 8}, "block_size cannot change in mid-run, it needs an engine of its own: start a new one"),
        ({"num_blocks": 99}, "num_blocks cannot change in mid-run"),
        ({"allocator": "buddy"}, "allocator cannot change in mid-run"),
        ({"prefix_cache": "radix"}, "prefix_cache cannot change in mid-run"),
        ({"policy": "fcfs"}, "EngineConfig has no field 'policy'; change batching, "),
        ({"num_host_blocks": 3}, "num_host_blocks can only grow in mid-run, 9 may be in use; give at least as many"),
        ({"batching": "sometimes"}, "batching must be one of "),
    ],
)
def test_change_that_needs_a_restart_is_refused(changes: dict[str, object], message: str) -> None:
    _, machine = live("swap", seed=0)
    with pytest.raises(ConfigError, match=message) as error:
        machine.fork(3, **changes)
    assert "\n" not in str(error.value)


def test_what_cannot_be_recorded_or_restored_is_refused() -> None:
    engine, _ = fake_engine()
    machine = TimeMachine(engine)
    with pytest.raises(ConfigError, match="step 1 was not recorded; give one from 0 to 0"):
        machine.restore(1)
    for step in ("3", 1.5, None, True):
        with pytest.raises(ConfigError, match=f"a step is an integer, not {step!r}"):
            machine.restore(step)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"already recorded: close\(\) the other first"):
        TimeMachine(engine)
    machine.close()
    for every in (0, 1.5, "x", True):
        with pytest.raises(ConfigError, match=f"every .* must be 1, 2, ..., not {every!r}"):
            TimeMachine(engine, every=every)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give an LLM or an Engine, not NoneType"):
        TimeMachine(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"a bare engine knows no text; build TimeMachine\(llm\)"):
        machine.texts(engine)


def test_what_a_preempted_request_finds_of_its_own_is_no_hit() -> None:
    _, machine = crowded_run(prefix_cache="hash")
    futures = machine.fork(0, preemption_mode="swap")
    original, changed = futures.original.outcome, futures.changed.outcome
    assert original.num_hit_tokens == sum(request.num_cached for request in machine.record.requests.values()) > 0
    assert original.num_preemptions and original.num_found_again > 0
    assert changed.num_preemptions and changed.num_found_again == 0  # all came back from the host
    found = sum(event.num_tokens for event in futures.original.events if isinstance(event, PrefixHit))
    assert original.num_hit_tokens + original.num_found_again == found
    assert re.search(rf"num_found_again +{original.num_found_again} +0\n", str(futures))


def test_trace_of_a_bare_engine_names_its_sizes_and_policies_and_a_future_its_own() -> None:
    engine, machine = crowded_run()
    header = machine.trace.header
    assert (header["num_blocks"], header["block_size"]) == (engine.config.num_blocks, engine.config.block_size)
    assert {name: header[name] for name in CHOICES} == {name: getattr(engine.config, name) for name in CHOICES}
    assert machine.fork(0, batching="static").changed.trace.header["batching"] == "static"


def test_study_prints_two_futures_and_where_they_part() -> None:
    text = study(num_requests=8, step=5, show_progress=False)
    assert re.search(r"after each of (\d+) steps and run on: \1 times every state hash was equal", text)
    assert "DIFFER" not in text
    assert "first difference: step" in text


# A real model, small and random, in fp32: what comes back is equal bit by bit.

PROMPTS = [[(7 * i + 13 * j + 3) % 320 for j in range(3 + 5 * i % 23)] for i in range(10)]
PARAMS = [SamplingParams(temperature=1.1 * (i % 2), seed=i, max_tokens=8 + i % 9, logprobs=5) for i in range(10)]
PRESSURE: dict[str, dict[str, Any]] = {
    "recompute": {"num_blocks": 21},
    "swap": {"num_blocks": 21, "preemption_mode": "swap", "swap_space": 0.001, "max_num_batched_tokens": 16},
    "radix": {"num_blocks": 21, "prefix_cache": "radix"},
}


def real_engine(folder: Path, **options: Any) -> LLM:
    return LLM(folder, dtype="float32", block_size=3, max_model_len=48, **options)


@pytest.mark.parametrize("pressure", PRESSURE)
def test_model_computes_the_same_bits_again(reference_model: Build, pressure: str) -> None:
    llm = real_engine(reference_model("llama-gqa")[0], **PRESSURE[pressure])
    machine = TimeMachine(llm)
    storages, results = {0: (llm.storage.data.clone(), llm.storage.host.clone())}, {}

    def look(event: Event) -> None:
        if isinstance(event, StepRan):
            storages[event.step] = llm.storage.data.clone(), llm.storage.host.clone()
            results[event.step] = llm.engine.last_result

    llm.events.listen(look)
    llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert machine.trace.of(Preempted)
    for step in range(1, machine.last_step + 1, 6):
        engine = machine.restore(step)
        assert isinstance(engine.runner, ModelRunner) and engine.runner.model is llm.runner.model
        while True:
            now, storage = engine.scheduler.step, engine.runner.storage
            assert engine.state_hash() == machine.state_hashes[now]
            assert torch.equal(storage.data, storages[now][0]) and torch.equal(storage.host, storages[now][1])
            assert machine.check(engine, now) == []
            if not engine.has_work:
                break
            engine.step()
            assert engine.last_result == results[now + 1]  # tokens, and six logprobs of each to the last bit
        assert now == machine.last_step


def test_a_run_with_drafts_comes_back_with_the_same_drafts(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    lookup = {"method": "ngram", "prompt_lookup_min": 1, "adaptive": True, "num_speculative_tokens": 5}
    llm = real_engine(folder, num_blocks=60, speculative_config=lookup)
    machine = TimeMachine(llm, every=7)
    greedy = SamplingParams(temperature=0, max_tokens=34, ignore_eos=True)
    llm.generate([[1, 2, 3, 1, 2, 3, 1, 2], [5, 5, 5, 5], [9]], greedy, use_tqdm=False)
    stats = llm.engine.speculation
    assert 0 < stats.num_accepted < stats.num_drafted
    for step in range(0, machine.last_step, 3):
        assert machine.first_departure(machine.resume(step)) is None
    machine.close()
    paged = real_engine(folder, num_blocks=60, speculative_config={"method": "early_exit", "num_layers": 1})
    machine = TimeMachine(paged)
    paged.generate([[1, 2]], SamplingParams(max_tokens=3), use_tqdm=False)
    with pytest.raises(ConfigError, match="keeps the target's blocks, not those of early_exit: record with"):
        machine.restore(1)


def test_trace_of_an_llm_has_its_provenance_and_tells_of_its_memory(reference_model: Build, tmp_path: Path) -> None:
    llm = real_engine(reference_model("llama-gqa")[0], num_blocks=21)
    machine = TimeMachine(llm)
    llm.generate(PROMPTS[:3], PARAMS[:3], use_tqdm=False)
    loaded = Trace.load(machine.trace.save(tmp_path / "trace.json"))
    missing = llm.trace_header().keys() - loaded.header.keys()
    assert not missing and loaded.header["model"] == llm.model
    assert len(memory_over_time(loaded)) == machine.last_step
    future = machine.fork(0, max_num_batched_tokens=4).changed.trace.header
    assert (future["max_num_batched_tokens"], future["model"]) == (4, llm.model)


@dataclass
class Letters:
    """Token i is the i-th character from "A" on."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("A") + token_id) for token_id in token_ids)


def test_restored_and_resumed_requests_have_their_texts(
    reference_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = real_engine(reference_model("llama-gqa")[0], num_blocks=21)
    monkeypatch.setattr(llm, "tokenizer", Letters())
    monkeypatch.setattr(llm.text_engine, "tokenizer", Letters())
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [whole] = llm.generate([PROMPTS[0]], plain, use_tqdm=False)
    said = whole.outputs[0].token_ids
    stops = [{"stop": Letters().decode(said[4:6])}, {"stop_token_ids": [said[5]]}, {}]
    machine = TimeMachine(llm)
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **stop) for stop in stops]  # type: ignore[arg-type]
    outputs = llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    assert texts[0] == Letters().decode(said[:4])
    assert texts[2] == Letters().decode(said)
    assert list(machine.texts(machine.resume(machine.first_step)).values()) == texts
    later = machine.resume(machine.first_step + 7)  # one has ended and left
    assert list(machine.texts(later).values()) == texts[-len(later.requests) :] and len(later.requests) < 3
    engine = machine.restore(machine.first_step + 3)
    [*_, (request_id, text)] = machine.texts(engine).items()
    assert text == Letters().decode(engine.requests[request_id].output_token_ids) and text


def test_one_bit_in_one_slot_is_caught(reference_model: Build) -> None:
    llm = real_engine(reference_model("llama-gqa")[0], num_blocks=21)
    machine = TimeMachine(llm)
    llm.generate(PROMPTS[:3], PARAMS[:3], use_tqdm=False)
    engine = machine.restore(4)
    assert isinstance(engine.runner, ModelRunner)
    block_id = next(iter(engine.requests.values())).block_ids[0]
    slot = engine.runner.storage.layers[1].v[block_id, 2]
    slot[0, 0] = torch.nextafter(slot[0, 0], torch.tensor(9.0))
    assert machine.check(engine, 4) == [f"block {block_id} holds other bytes"]


def test_beam_search_comes_back_and_chooses_the_same_beams_in_every_future(reference_model: Build) -> None:
    llm = real_engine(reference_model("llama-gqa")[0], num_blocks=21)
    machine = TimeMachine(llm)
    llm.beam_search(PROMPTS[:3], BeamSearchParams(beam_width=3, max_tokens=7), use_tqdm=False)
    assert machine.trace.of(Forked)
    for step in range(0, machine.last_step + 1, 2):
        again = machine.resume(step)
        assert machine.first_departure(again) is None
        assert again.engine.state_hash() == llm.engine.state_hash()
    futures = machine.fork(0, max_num_batched_tokens=4, max_num_seqs=4)
    assert futures.tokens_equal and futures.first_difference is not None
    assert futures.dropped == ()
    assert not futures.changed.outcome.finish_reasons.keys() - futures.original.outcome.finish_reasons.keys()
    assert set(futures.changed.outcome.finish_reasons.values()) == {"abort"}


@cache
def recorded_model(folder: Path) -> TimeMachine:
    machine = TimeMachine(real_engine(folder, **PRESSURE["recompute"]))
    for number, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        machine.record.engine.add(Request(str(number), list(prompt), len(prompt), params, params.max_tokens or 1))
        machine.record.engine.step()
    while machine.record.engine.has_work:
        machine.record.engine.step()
    return machine


@pytest.mark.parametrize("change", CHANGES)
def test_futures_of_a_model_are_token_equal(reference_model: Build, change: str) -> None:
    machine = recorded_model(reference_model("llama-gqa")[0])
    futures = machine.fork(5, **CHANGES[change])
    assert futures.tokens_equal and futures.changed.outcome.greedy_ids == {str(i) for i in range(0, 10, 2)}
    assert futures.original.outcome.tokens == {
        r.id: tuple(r.output_token_ids) for r in machine.record.requests.values()
    }
