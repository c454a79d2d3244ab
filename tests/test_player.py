"""The player: every request of every kind of workload gets exactly its tokens, or a reason; and Ctrl-C cleans up."""

import os
import signal
from collections.abc import Callable
from dataclasses import astuple, replace
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.events import Added, Event, StepRan
from minivllm.lab.fake_runner import FakeRunner, fake_request
from minivllm.lab.invariants import check_drained, check_invariants
from minivllm.lab.played import Outcome, Percentiles, Played, percentile
from minivllm.lab.player import CpuClock, VirtualClock, play
from minivllm.request import Request
from minivllm.trace import Trace
from minivllm.workloads import (
    Arrival,
    Workload,
    agents,
    bursts,
    chats,
    closed_loop,
    few_shot,
    fixed,
    open_loop,
    poisson,
    shared_prefix,
    uniform,
)

STEP_S = 0.01
SHORT = uniform(3, 9)
KINDS: dict[str, Workload] = {
    "open loop": open_loop(20, SHORT, poisson(30.0)),
    "bursts": open_loop(20, SHORT, bursts(30.0)),
    "closed loop": closed_loop(3, 4, SHORT, 0.5),
    "chats": chats(3, 4, 16, SHORT, 0.25, poisson(1.0)),
    "shared prefix": shared_prefix(6, 16, SHORT, num_prefixes=2),
    "few-shot": few_shot(6, (1, 5), 8, SHORT),
    "agents": agents(3, 3, 4, fixed(16, 8), SHORT, poisson(30.0)),
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small pool": {"num_blocks": 40},
    "small pool, swap": {"num_blocks": 40, "preemption_mode": "swap", "num_host_blocks": 80},
    "radix, priority": {"prefix_cache": "radix", "scheduling_policy": "priority"},
    "oracle, static": {"allocator": "oracle", "enable_prefix_caching": False, "batching": "static"},
    "shortest first": {"scheduling_policy": "shortest_first", "max_num_seqs": 3},
    "prefill first": {"batching": "prefill_first", "max_num_batched_tokens": 150},
}


class CheckedEngine(Engine):
    """Looks at every invariant after each step, with what the player did before it."""

    def step(self) -> list[Request]:
        advanced = super().step()
        check_invariants(self, self.runner if isinstance(self.runner, FakeRunner) else None)
        return advanced


class Theatre:
    """An engine on a virtual clock with a fake runner, and all tokens that it ever held."""

    def __init__(self, **options: Any) -> None:
        self.clock = VirtualClock()
        config = EngineConfig(**{"num_blocks": 200, "block_size": 4, "max_model_len": 150} | options)
        self.runner = FakeRunner(config.block_size)
        self.engine = CheckedEngine(config, self.runner, clock=self.clock)
        self.tokens: dict[str, list[int]] = {}
        self.runner.after = self.tick

    def tick(self, plan: StepPlan) -> None:
        self.clock.advance(STEP_S)
        self.tokens.update((request.id, request.token_ids) for request, _ in plan.scheduled)

    def play(self, workload: Workload) -> Played:
        return play(workload, self.engine, self.clock, show_progress=False)


def one(id_: str = "a", prompt: int = 5, output: int = 3, **more: Any) -> Arrival:
    return Arrival(id_, 0.0, tuple(range(prompt)), output, **more)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_is_served_exactly_its_tokens(kind: str, policy: str) -> None:
    theatre, workload = Theatre(**POLICIES[policy]), KINDS[kind]
    played = theatre.play(workload)
    lengths = workload.prompt_lengths()
    assert not played.refusals
    assert [(o.id, o.num_prompt, o.num_output) for o in played.outcomes] == [
        (a.id, lengths[a.id], a.num_output) for a in workload.arrivals
    ]
    assert all(a.arrival_s <= o.arrival_s < o.first_token_s <= o.finished_s
               for a, o in zip(workload.arrivals, played.outcomes, strict=True))  # fmt: skip
    check_drained(theatre.engine)


@pytest.mark.parametrize("kind", KINDS)
def test_policies_change_times_and_never_tokens(kind: str) -> None:
    runs = [Theatre(**options).play(KINDS[kind]) for options in POLICIES.values()]
    assert len({tuple(o.tokens_hash for o in run.outcomes) for run in runs}) == 1


def test_chats_continue_all_that_was_said() -> None:
    theatre = Theatre()
    theatre.play(KINDS["chats"])
    for arrival in KINDS["chats"].arrivals:
        if arrival.after is not None:
            history = [*theatre.tokens[arrival.after], *arrival.token_ids]
            assert theatre.tokens[arrival.id][: len(history)] == history


def test_turns_come_think_s_after_the_answer() -> None:
    played = Theatre().play(KINDS["chats"])
    outcomes = {o.id: o for o in played.outcomes}
    assert [outcomes[a.id].arrival_s for a in KINDS["chats"].arrivals if a.after] == pytest.approx(
        [outcomes[a.after].finished_s + 0.25 for a in KINDS["chats"].arrivals if a.after]
    )


def test_forks_share_what_their_parent_has_computed() -> None:
    theatre = Theatre(enable_prefix_caching=False)
    played = theatre.play(KINDS["agents"])
    branches = [o for o in played.outcomes if "." in o.id]
    assert all(o.num_cached == 16 + 4 - 1 for o in branches)  # all but the newest token, whose K and V come next
    for arrival in KINDS["agents"].arrivals:
        if arrival.fork_of is not None:
            history = [*theatre.tokens[arrival.fork_of][:20], *arrival.token_ids]
            assert theatre.tokens[arrival.id][: -arrival.num_output] == history


def test_the_events_of_a_branch_tell_its_own_lengths() -> None:
    theatre, trace = Theatre(), Trace()
    theatre.engine.events.listen(trace)
    branch, bare = (
        Arrival("b", 0.0, (7, 7), 4, fork_of="a", fork_at=2),
        Arrival("c", 0.0, (), 4, fork_of="a", fork_at=2),
    )
    played = theatre.play(Workload("branch", 0, (one(output=6), branch, bare)))
    added = {event.request_id: (event.num_prompt, event.max_tokens) for event in trace if isinstance(event, Added)}
    assert added == {"a": (5, 6), "b": (5 + 2 + 2, 4), "c": (5 + 2, 4)}
    assert [(o.num_prompt, o.num_output) for o in played.outcomes] == list(added.values())


def test_a_late_branch_goes_on_from_the_same_tokens() -> None:
    late = Arrival("late", 9.0, (7, 7), 3, fork_of="a", fork_at=2)
    soon = Arrival("soon", 0.0, (7, 7), 3, fork_of="a", fork_at=2)
    theatre = Theatre()
    played = theatre.play(Workload("late", 0, (one(output=6), soon, late)))
    assert theatre.tokens["late"] == theatre.tokens["soon"]
    assert played.outcomes[2].arrival_s == 9.0


def test_a_branch_in_another_namespace_shares_nothing() -> None:
    branch = one("b", fork_of="a", fork_at=2, salt="other")
    played = Theatre().play(Workload("salted", 0, (one(prompt=20, output=6), branch)))
    assert played.outcomes[1].num_cached == 0


def test_refused_requests_are_counted_with_the_reason_and_so_is_who_needs_their_tokens() -> None:
    arrivals = (
        one("long", prompt=149, output=5),
        one("turn", after="long", continues=True),
        one("branch", fork_of="long", fork_at=1),
        one("user", after="long"),
        one("fine"),
    )
    played = Theatre().play(Workload("refused", 0, arrivals))
    assert {refusal.id for refusal in played.refusals} == {"long", "turn", "branch"}
    assert "149 prompt and 5 output tokens are more than max_model_len 150" in played.refusals[0].reason
    assert "goes on from long, which was refused" in played.refusals[1].reason
    assert [o.id for o in played.outcomes] == ["user", "fine"]


def test_priorities_and_salts_reach_the_engine() -> None:
    arrivals = (one("first", priority=5), one("last", priority=1, salt="s"))
    played = Theatre(scheduling_policy="priority", max_num_seqs=1).play(Workload("order", 0, arrivals))
    assert played.outcomes[1].finished_s < played.outcomes[0].first_token_s
    assert [o.num_cached for o in played.outcomes] == [0, 0]


def abort_after(event: Event, engine: Engine) -> None:
    if isinstance(event, StepRan):
        engine.abort("gone")


@pytest.mark.parametrize("is_in_step", [True, False])
def test_an_outside_abort_counts_as_refused_with_who_needed_its_tokens(is_in_step: bool) -> None:
    theatre = Theatre()
    arrivals = (one("gone"), one("turn", after="gone", continues=True), one("user", after="gone"), one("fine"))

    def abort(plan: StepPlan) -> None:
        theatre.tick(plan)
        theatre.engine.abort("gone")

    if is_in_step:
        theatre.runner.after = abort
    else:
        theatre.engine.events.listen(lambda event: abort_after(event, theatre.engine))
    played = theatre.play(Workload("aborted", 0, arrivals))
    assert [(refusal.id, refusal.reason) for refusal in played.refusals] == [
        ("gone", "request gone: aborted from outside while it was played"),
        ("turn", "request turn: goes on from gone, which was refused"),
    ]
    assert [o.id for o in played.outcomes] == ["user", "fine"]
    check_drained(theatre.engine)


def test_when_all_are_aborted_the_run_ends() -> None:
    theatre = Theatre()
    theatre.runner.after = lambda plan: [theatre.engine.abort(id_) for id_ in list(theatre.engine.requests)]  # type: ignore[assignment]
    played = theatre.play(Workload("aborted", 0, (one("a"), one("b"))))
    assert [refusal.id for refusal in played.refusals] == ["a", "b"] and not played.outcomes


def test_ctrl_c_leaves_the_engine_empty() -> None:
    theatre = Theatre()

    def press(plan: StepPlan) -> None:
        if plan.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    theatre.runner.before = press
    with pytest.raises(KeyboardInterrupt):
        theatre.play(KINDS["open loop"])
    check_drained(theatre.engine)


def test_a_failing_runner_leaves_the_engine_empty() -> None:
    theatre = Theatre()
    theatre.runner.after = lambda plan: 1 // 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        theatre.play(KINDS["open loop"])
    check_drained(theatre.engine)


def test_the_wall_clock_keeps_arrivals_waiting_until_their_time() -> None:
    arrivals = (Arrival("now", 0.0, (1, 2), 2), Arrival("later", 0.05, (1, 2), 2))
    config = EngineConfig(num_blocks=20, block_size=4, max_model_len=40)
    played = play(Workload("wall", 0, arrivals), Engine(config, FakeRunner(4)), show_progress=False)
    assert played.outcomes[1].first_token_s >= 0.05


def test_cpu_time_skips_the_idle_time() -> None:
    clock = CpuClock()
    config = EngineConfig(num_blocks=20, block_size=4, max_model_len=40)
    arrivals = (Arrival("now", 0.0, (1, 2), 2), Arrival("tomorrow", 86_400.0, (1, 2), 2))
    played = play(Workload("cpu", 0, arrivals), Engine(config, FakeRunner(4), clock=clock), clock, show_progress=False)
    assert played.clock == "CpuClock" and played.outcomes[1].first_token_s >= 86_400.0


def test_two_clocks_and_a_busy_engine_are_refused() -> None:
    theatre = Theatre()
    with pytest.raises(ConfigError, match="another clock"):
        play(KINDS["open loop"], theatre.engine, VirtualClock())
    theatre.engine.add(fake_request("busy", [1, 2, 3]))
    with pytest.raises(ConfigError, match="1 requests are in the engine"):
        theatre.play(KINDS["open loop"])


def test_what_is_no_workload_and_no_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^play: needs a Workload and an Engine, and was given a str$"):
        play("x", Theatre().engine)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"was given a str$"):
        play(KINDS["chats"], "x")  # type: ignore[arg-type]


def test_json_keeps_the_run(tmp_path: Path) -> None:
    played = Theatre().play(KINDS["agents"])
    loaded = Played.load(played.save(tmp_path / "runs" / "agents.json"))
    assert loaded.to_json() == played.to_json()
    assert replace(loaded, step_s=(), outcomes=()) == replace(played, step_s=(), outcomes=())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"minivllm_played": 2}', '{"minivllm_played": 1, "fields": []}'])
def test_what_is_no_run_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(MiniVLLMError, match=r"not a played workload .*; play it again") as caught:
        Played.from_json(text)
    assert "\n" not in str(caught.value)


def test_percentiles_are_numpys() -> None:
    values = [Random(0).random() for _ in range(37)]
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)))


def test_latencies_throughput_and_goodput_follow_from_the_times() -> None:
    fast = Outcome("fast", 1.0, 1.5, 3.5, 10, 5, 0, 0, "")
    slow = Outcome("slow", 2.0, 6.0, 11.0, 10, 6, 0, 0, "")
    played = Played("by hand", 0, "WallClock", (), (fast, slow))
    assert (fast.ttft_s, fast.tpot_s, fast.end_to_end_s) == (0.5, 0.5, 2.5)
    assert (played.duration_s, played.throughput) == (10.0, 1.1)
    assert played.tpot is not None and astuple(played.tpot) == pytest.approx((0.75, 0.95, 0.995))
    assert (played.goodput(1.0, 0.6), played.goodput(inf, inf)) == (0.1, 0.2)


def test_an_empty_run_has_no_percentiles() -> None:
    empty = Theatre().play(Workload("empty", 0, ()))
    assert (empty.ttft, empty.throughput, empty.duration_s) == (None, 0.0, 0.0)


@pytest.mark.parametrize("measure", [lambda p: p.ttft, lambda p: p.end_to_end])
def test_a_faster_machine_is_faster_in_every_percentile(measure: Callable[[Played], Percentiles]) -> None:
    slow, fast = Theatre(), Theatre()
    fast.runner.after = lambda plan: fast.clock.advance(STEP_S / 2)
    runs = [measure(theatre.play(KINDS["few-shot"])) for theatre in (slow, fast)]
    assert runs[0].p50 > runs[1].p50 and runs[0].p99 > runs[1].p99
