"""Five ways of batching and five orders on one engine: what differs is when, never what."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from minivllm.engine.engine import Engine
from minivllm.engine_config import CHOICES, EngineConfig
from minivllm.errors import ConfigError
from minivllm.events import Admitted, BlocksReleased, Finished, StepRan, Waited
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants
from minivllm.request import Request
from minivllm.trace import Trace

LENGTHS = (5, 500, 20, 300, 8, 40, 250, 10)  # output tokens: N66 of the course's numbers


def run(requests: list[Request], **options: Any) -> tuple[Engine, Trace]:
    """All requests there from the start, run to the end with the invariants checked."""
    engine, runner = fake_engine(**options)
    trace = Trace()
    engine.events.listen(trace)
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        check_invariants(engine, runner)
    check_drained(engine)
    return engine, trace


def steps(trace: Trace) -> list[StepRan]:
    return [event for event in trace if isinstance(event, StepRan)]


def admissions(trace: Trace) -> list[str]:
    return [event.request_id for event in trace if isinstance(event, Admitted)]


def of_lengths(lengths: tuple[int, ...]) -> list[Request]:
    """One prompt token each, so that every step of a request gives one token."""
    return [fake_request(f"r{i}", [i], max_tokens=length, ignore_eos=True) for i, length in enumerate(lengths)]


def seats(batching: str) -> tuple[int, float]:
    """Steps for the eight lengths on four seats, and the share of seats that gave a token."""
    _, trace = run(of_lengths(LENGTHS), batching=batching, max_num_seqs=4, num_blocks=600, max_model_len=600)
    num_steps = len(steps(trace))
    return num_steps, sum(len(event.scheduled) for event in steps(trace)) / (4 * num_steps)


@pytest.mark.parametrize(
    ("batching", "num_steps", "percent"),
    [("static", 750, 37.77), ("request_level", 750, 37.77), ("chunked", 500, 56.65), ("decode_first", 500, 56.65)],
)
def test_static_batches_idle_where_continuous_ones_refill(batching: str, num_steps: int, percent: float) -> None:
    counted, share = seats(batching)
    assert counted == num_steps
    assert 100 * share == pytest.approx(percent, abs=0.005)


def test_equal_lengths_close_the_gap() -> None:
    batches = [
        run(of_lengths((7,) * 8), batching=way, max_num_seqs=4, num_blocks=60)[1] for way in ("static", "chunked")
    ]
    assert [len(steps(trace)) for trace in batches] == [14, 14]


def test_who_ends_in_a_static_batch_keeps_its_blocks_until_the_batch_is_over() -> None:
    for batching, is_kept in (("static", True), ("request_level", False)):
        _, trace = run(of_lengths((2, 9)), batching=batching)
        released = {event.request_id: event.step for event in trace if isinstance(event, BlocksReleased)}
        ended = {event.request_id: event.step for event in trace if isinstance(event, Finished)}
        assert (released["r0"] == ended["r1"]) == is_kept
        assert ended["r0"] == 2


def test_static_batch_that_needs_room_gives_up_the_blocks_of_those_who_ended_first() -> None:
    requests = [fake_request("short", range(10), max_tokens=2), fake_request("long", range(8), max_tokens=12)]
    _, trace = run(requests, batching="static", num_blocks=7, max_model_len=24)
    assert not [event for event in trace if type(event).__name__ == "Preempted"]
    assert all(request.is_finished for request in requests)


def test_guests_of_a_batch_wait_with_the_reason() -> None:
    _, trace = run(of_lengths((3, 3, 3)), batching="request_level", max_num_seqs=2)
    reasons = [event.reason for event in trace if isinstance(event, Waited)]
    assert reasons == ["no_seat", "batch_runs", "batch_runs"]
    admitted = [(event.request_id, event.reason) for event in trace if isinstance(event, Admitted)]
    assert admitted == [("r0", "new_batch"), ("r1", "new_batch"), ("r2", "new_batch")]


def mixed(batching: str) -> list[StepRan]:
    """A decode in flight, then a prompt of 20 tokens at a budget of 8 (or of one whole prompt)."""
    budget = {"max_num_batched_tokens": 8} if batching == "chunked" else {"max_num_batched_tokens": 40}
    engine, _ = fake_engine(batching=batching, num_blocks=20, **budget)
    trace = Trace()
    engine.events.listen(trace)
    engine.add(fake_request("decode", [1], max_tokens=8))
    engine.step()
    engine.add(fake_request("prompt", range(20), max_tokens=2))
    while engine.has_work:
        engine.step()
    return steps(trace)


def test_chunks_ride_beside_decodes() -> None:
    scheduled = [event.scheduled for event in mixed("chunked")][1:4]
    assert [[num_new for _, num_new, _ in step] for step in scheduled] == [[1, 7], [1, 7], [1, 6]]


def test_decode_first_takes_a_prompt_whole_beside_the_decodes() -> None:
    assert [num_new for _, num_new, _ in mixed("decode_first")[1].scheduled] == [1, 20]


def test_prefill_first_stalls_the_decode_for_the_prompt() -> None:
    second, third = mixed("prefill_first")[1:3]
    assert [(id_, num_new) for id_, num_new, _ in second.scheduled] == [("prompt", 20)]
    assert [num_new for _, num_new, _ in third.scheduled] == [1, 1]


def test_whole_prompts_need_a_budget_for_the_longest() -> None:
    for batching in ("decode_first", "prefill_first"):
        with pytest.raises(ConfigError, match="raise max_num_batched_tokens"):
            EngineConfig(num_blocks=20, max_model_len=200, max_num_batched_tokens=100, batching=batching)


@pytest.mark.parametrize("batching", CHOICES["batching"])
@pytest.mark.parametrize("policy", CHOICES["scheduling_policy"])
def test_no_policy_changes_a_token(batching: str, policy: str) -> None:
    def requests() -> list[Request]:
        return [
            fake_request(f"r{i}", [*([7] * (5 * i % 11)), i], max_tokens=3 + 5 * i % 7, priority=i % 3)
            for i in range(12)
        ]

    calm, pressed = requests(), requests()
    run(calm, num_blocks=400, enable_prefix_caching=False)
    run(pressed, num_blocks=12, max_num_seqs=5, batching=batching, scheduling_policy=policy, aging_steps=4)
    assert [request.token_ids for request in pressed] == [request.token_ids for request in calm]


def test_shortest_first_goes_by_all_tokens() -> None:
    requests = [fake_request("long", [1] * 9, 9), fake_request("short", [2], 2), fake_request("middle", [3] * 4, 4)]
    _, trace = run(requests, scheduling_policy="shortest_first", max_num_seqs=1)
    assert admissions(trace) == ["short", "middle", "long"]


def test_longest_prefix_first_goes_by_what_is_cached_now() -> None:
    engine, _ = fake_engine(scheduling_policy="longest_prefix_first", max_num_seqs=1, num_blocks=20)
    trace = Trace()
    engine.add(fake_request("first", range(12), 1))
    engine.step()
    engine.events.listen(trace)
    for request in (fake_request("cold", [9] * 8), fake_request("warm", range(6)), fake_request("hot", range(11))):
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert admissions(trace) == ["hot", "warm", "cold"]


def test_dfs_visits_a_subtree_before_the_next() -> None:
    prompts = {"a": [1, 1, 1, 1, 2], "b": [5] * 5, "c": [1, 1, 1, 1, 3], "d": [5, 5, 5, 5, 6]}
    _, trace = run([fake_request(*item) for item in prompts.items()], scheduling_policy="dfs", max_num_seqs=1)
    assert admissions(trace) == ["a", "c", "b", "d"]


def starved(aging_steps: int | None, policy: str, next_guest: Callable[[int], Request]) -> int:
    """At which step a request is first admitted that every newcomer overtakes; one arrives in each step."""
    engine, _ = fake_engine(scheduling_policy=policy, aging_steps=aging_steps, max_num_seqs=1, num_blocks=20)
    trace = Trace()
    engine.events.listen(trace)
    engine.add(next_guest(0))
    engine.step()
    engine.add(fake_request("patient", [9] * 8, max_tokens=8, priority=5))
    for number in range(1, 100):
        engine.add(next_guest(number))
        engine.step()
    return next((e.step for e in trace if isinstance(e, Admitted) and e.request_id == "patient"), 10**9)


@pytest.mark.parametrize("policy", ["priority", "shortest_first"])
def test_aging_ends_starvation(policy: str) -> None:
    def guest(number: int) -> Request:
        return fake_request(f"guest {number}", [1], max_tokens=2)

    assert starved(None, policy, guest) == 10**9
    # It is 13 tokens longer than a guest (or 5 less urgent), so 26 steps of guests go first, two steps each.
    assert starved(2, policy, guest) < 60


def test_aging_never_swaps_two_that_wait() -> None:
    engine, _ = fake_engine(scheduling_policy="priority", aging_steps=3, max_num_seqs=1, num_blocks=20)
    engine.add(fake_request("runs", [1], max_tokens=30))
    for number in range(8):
        engine.add(fake_request(f"r{number}", [2], max_tokens=2, priority=number * 5 % 7))
        engine.step()
    orders = []
    for _ in range(10):
        engine.step()
        orders.append([request.id for request in engine.scheduler.waiting])
    assert all(before == after for before, after in pairwise(orders))


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_policy_gets_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must be one of [^\n]+, not 'none'$"):
        EngineConfig(num_blocks=200, **{name: "none"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"allocator": "buddy"}, "enable_prefix_caching=False"),
        ({"preemption_mode": "swap"}, "swap_space"),
        ({"group_windows": (8,), "prefix_cache": "radix"}, "prefix_cache='hash'"),
        ({"group_windows": (8,), "eviction_policy": "lfu"}, "eviction_policy='lru'"),
        ({"aging_steps": 0}, "aging_steps"),
        ({"num_host_blocks": -3}, "num_host_blocks must be at least 0"),
        ({"num_host_blocks": None}, "num_host_blocks must be at least 0"),
        ({"max_num_seqs": None}, "max_num_seqs"),
    ],
)
def test_policies_that_contradict_each_other_get_one_line(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=rf"^[^\n]*{word}[^\n]*$"):
        EngineConfig(num_blocks=200, **options)
