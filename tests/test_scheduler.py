"""What runs next: one budget for all, order, admission, preemption, refusal, abort, failure."""

import pytest

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.errors import ConfigError, RequestError
from minivllm.events import Added, Finished, Preempted, PrefixHit, Refused, StepRan, Waited
from minivllm.lab.fake_runner import FakeRunner, fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants
from minivllm.request import Request, Status
from minivllm.trace import Trace

Scheduled = list[tuple[str, int]]


def steps(engine: Engine, num_steps: int | None = None) -> list[Scheduled]:
    """Run some steps, or all; what each scheduled."""
    trace = Trace()
    stop_listening = engine.events.listen(trace)
    while engine.has_work and (num_steps is None or len(trace.state_hashes()) < num_steps):
        engine.step()
    stop_listening()
    return [[(id_, n) for id_, n, _ in event.scheduled] for event in trace if isinstance(event, StepRan)]


def waits(engine: Engine, num_steps: int = 1) -> list[str]:
    """Why the head of the queue waited in these steps."""
    trace = Trace()
    stop_listening = engine.events.listen(trace)
    for _ in range(num_steps):
        engine.step()
    stop_listening()
    return [event.reason for event in trace if isinstance(event, Waited)]


def add_all(engine: Engine, *requests: Request) -> tuple[Request, ...]:
    for request in requests:
        engine.add(request)
    return requests


def under_pressure(**options: object) -> tuple[Engine, FakeRunner]:
    """Four blocks of two tokens: two requests that grow cannot both stay."""
    return fake_engine(**{"num_blocks": 5, "block_size": 2, "max_model_len": 8, **options})


def test_prefill_then_one_token_a_step() -> None:
    engine, _ = fake_engine()
    engine.add(fake_request("a", range(6), max_tokens=3))
    assert steps(engine) == [[("a", 6)], [("a", 1)], [("a", 1)]]


def test_long_prompt_is_computed_in_chunks() -> None:
    engine, _ = fake_engine(max_num_batched_tokens=4)
    engine.add(fake_request("a", range(10), max_tokens=2))
    assert steps(engine) == [[("a", 4)], [("a", 4)], [("a", 2)], [("a", 1)]]


def test_one_budget_is_shared_by_decodes_and_chunks_of_the_same_step() -> None:
    engine, _ = fake_engine(max_num_batched_tokens=5)
    add_all(engine, fake_request("a", range(3)), fake_request("b", [7] * 9))
    assert steps(engine, 3) == [[("a", 3), ("b", 2)], [("a", 1), ("b", 4)], [("a", 1), ("b", 3)]]


def test_those_who_run_come_before_guests() -> None:
    engine, _ = fake_engine(max_num_batched_tokens=1)
    engine.add(fake_request("a", [1], max_tokens=3))
    engine.step()
    engine.add(fake_request("b", [2], max_tokens=1))
    assert steps(engine) == [[("a", 1)], [("a", 1)], [("b", 1)]]


def test_without_chunks_a_prompt_waits_for_the_whole_budget() -> None:
    engine, _ = fake_engine(max_num_batched_tokens=10, max_model_len=10, enable_chunked_prefill=False)
    add_all(engine, fake_request("a", range(6), max_tokens=2), fake_request("b", [5] * 9, max_tokens=1))
    assert steps(engine) == [[("a", 6)], [("a", 1), ("b", 9)]]


def test_without_chunks_a_budget_below_the_longest_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise max_num_batched_tokens"):
        fake_engine(max_num_batched_tokens=10, enable_chunked_prefill=False)


def test_fcfs_serves_in_order_of_arrival() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    add_all(engine, *(fake_request(name, [1, 2], max_tokens=1, priority=-ord(name)) for name in "cab"))
    assert steps(engine) == [[("c", 2)], [("a", 2)], [("b", 2)]]


def test_priority_serves_lowest_value_first_then_arrival() -> None:
    engine, _ = fake_engine(max_num_seqs=1, scheduling_policy="priority")
    urgency = {"a": 1, "b": 0, "c": 1, "d": -5}
    add_all(engine, *(fake_request(name, [3], max_tokens=1, priority=value) for name, value in urgency.items()))
    assert steps(engine) == [[("d", 1)], [("b", 1)], [("a", 1)], [("c", 1)]]


def test_seats_are_limited() -> None:
    engine, _ = fake_engine(max_num_seqs=2)
    add_all(engine, *(fake_request(name, [1], max_tokens=2) for name in "abc"))
    assert waits(engine) == ["no_seat"]


def test_guests_wait_when_the_budget_is_spent() -> None:
    engine, _ = fake_engine(max_num_batched_tokens=4)
    add_all(engine, fake_request("a", range(4)), fake_request("b", [1]))
    assert waits(engine) == ["no_budget"]


def test_guests_wait_when_the_pool_is_full() -> None:
    engine, _ = under_pressure()
    add_all(engine, fake_request("a", range(7), max_tokens=1), fake_request("b", [1]))
    assert waits(engine) == ["no_blocks"]


def test_watermark_keeps_blocks_for_those_who_run() -> None:
    admitted = []
    for watermark in (0.0, 0.25):  # of four blocks: none or one
        engine, _ = under_pressure(watermark=watermark)
        add_all(engine, fake_request("a", [1, 2]), fake_request("b", [3] * 5))
        engine.step()
        admitted.append(len(engine.scheduler.running) == 2)
    assert admitted == [True, False]


def test_lone_request_may_use_the_watermark() -> None:
    engine, _ = under_pressure(watermark=0.9)
    engine.add(fake_request("a", range(7), max_tokens=1))
    assert steps(engine) == [[("a", 7)]]


def test_hit_on_free_blocks_counts_as_use_of_the_pool() -> None:
    engine, runner = under_pressure()
    engine.add(fake_request("a", [1, 2, 3, 4, 5], max_tokens=1))
    steps(engine)  # two blocks are free and cached, two are empty
    add_all(engine, fake_request("b", [9] * 4, max_tokens=2), fake_request("c", [1, 2, 3, 4, 5], max_tokens=1))
    assert waits(engine) == ["no_blocks"]
    check_invariants(engine, runner)


def preempted_ids(engine: Engine) -> list[str]:
    trace = Trace()
    engine.events.listen(trace)
    while engine.has_work:
        engine.step()
    return [event.request_id for event in trace if isinstance(event, Preempted)]


def test_youngest_is_preempted_first() -> None:
    engine, _ = under_pressure()
    add_all(engine, *(fake_request(name, [ord(name)], max_tokens=6) for name in "abc"))
    assert preempted_ids(engine)[0] == "c"


def test_lowest_priority_is_preempted_first() -> None:
    engine, _ = under_pressure(scheduling_policy="priority")
    add_all(engine, fake_request("low", [1], 7, priority=5), fake_request("high", [2], 7, priority=0))
    assert set(preempted_ids(engine)) == {"low"}


def test_last_in_order_gives_up_its_own_blocks() -> None:
    engine, _ = under_pressure()
    old, young = add_all(engine, fake_request("old", [1, 2, 3], 4), fake_request("young", [4, 5, 6, 7], 4))
    engine.step()
    engine.step()
    assert (old.num_preemptions, young.num_preemptions, young.block_ids) == (0, 1, [])


def test_preempted_request_keeps_its_place() -> None:
    engine, _ = under_pressure()
    old, young = add_all(engine, fake_request("old", [1, 2, 3], 4), fake_request("young", [4, 5, 6, 7], 4))
    engine.step()
    engine.add(fake_request("late", [8]))
    while not young.num_preemptions:
        engine.step()
    assert [request.id for request in engine.scheduler.waiting] == ["young", "late"]
    assert old.status is Status.RUNNING


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    engine, _ = under_pressure()
    add_all(engine, fake_request("old", [1, 2, 3], 4), fake_request("young", [4, 5, 6, 7], 4))
    engine.step()
    engine.add(fake_request("late", [8]))
    assert waits(engine) == ["just_preempted"]


def test_preempted_request_gives_the_same_tokens() -> None:
    outputs = []
    for num_blocks in (5, 50):
        engine, _ = under_pressure(num_blocks=num_blocks)
        requests = add_all(engine, *(fake_request(name, [ord(name)], max_tokens=7) for name in "abc"))
        outputs.append((bool(preempted_ids(engine)), [request.token_ids for request in requests]))
    (was_pressed, pressed), (was_roomy_pressed, roomy) = outputs
    assert (was_pressed, was_roomy_pressed) == (True, False) and pressed == roomy


def test_recompute_is_not_counted_as_a_hit() -> None:
    engine, _ = under_pressure(num_blocks=7, max_model_len=12)
    trace = Trace()
    engine.events.listen(trace)
    _, young = add_all(engine, fake_request("old", range(7), max_tokens=2), fake_request("young", [9, 8, 7, 6]))
    steps(engine)
    assert [event.num_tokens for event in trace if isinstance(event, PrefixHit)] == [4]  # young found its own again
    assert (young.num_preemptions, young.num_cached) == (1, 0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "why"),
    [
        ([], 1, "the prompt is empty"),
        ([1] * 40, 1, "shorten the prompt or raise max_model_len"),
    ],
)
def test_request_that_can_never_fit_is_refused_with_a_reason(prompt: list[int], max_tokens: int, why: str) -> None:
    engine, _ = fake_engine()
    trace = Trace()
    engine.events.listen(trace)
    with pytest.raises(RequestError, match=why):
        engine.add(fake_request("a", prompt, max_tokens))
    assert [type(event) for event in trace] == [Refused] and not engine.has_work


def test_id_in_use_is_refused_and_its_owner_goes_on() -> None:
    engine, _ = fake_engine()
    engine.add(fake_request("a", [1], max_tokens=2))
    with pytest.raises(RequestError, match="its id is in use"):
        engine.add(fake_request("a", [2]))
    assert steps(engine) == [[("a", 1)], [("a", 1)]]


def test_output_is_cut_to_the_room_that_max_model_len_leaves() -> None:
    engine, _ = fake_engine()
    request = fake_request("a", [1] * 38, max_tokens=9)
    engine.add(request)
    assert [len(scheduled) for scheduled in steps(engine)] == [1, 1]
    assert (request.num_tokens, request.finish_reason) == (40, "length")


def test_pool_too_small_for_one_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower max_model_len to 40"):
        fake_engine(max_model_len=41)


def test_work_ends_in_a_bounded_number_of_steps() -> None:
    engine, _ = under_pressure(max_num_batched_tokens=1)
    requests = add_all(engine, *(fake_request(f"r{i}", [i] * 3, max_tokens=5) for i in range(10)))
    assert len(steps(engine)) <= sum(request.num_prompt + request.max_tokens for request in requests)


def test_abort_while_waiting() -> None:
    engine, _ = fake_engine(max_num_seqs=1)
    add_all(engine, fake_request("a", [1], max_tokens=2), fake_request("b", [2]))
    engine.step()
    assert engine.abort("b") and steps(engine) == [[("a", 1)]]


def test_abort_while_running_frees_its_blocks_at_once() -> None:
    engine, _ = fake_engine()
    engine.add(fake_request("a", range(9)))
    engine.step()
    engine.abort("a")
    check_drained(engine)


def test_abort_while_preempted() -> None:
    engine, _ = under_pressure()
    _, young = add_all(engine, fake_request("old", [1, 2, 3], 4), fake_request("young", [4, 5, 6, 7], 4))
    while not young.num_preemptions:
        engine.step()
    engine.abort("young")
    assert all(id_ == "old" for scheduled in steps(engine) for id_, _ in scheduled)
    check_drained(engine)


def test_abort_in_the_middle_of_a_step_drops_its_token() -> None:
    engine, runner = fake_engine()
    gone, stays = add_all(engine, fake_request("gone", [1]), fake_request("stays", [2]))

    def abort(plan: StepPlan) -> None:
        engine.abort("gone")

    runner.after = abort
    assert engine.step() == [stays]
    assert gone.num_output == 0 and gone.finish_reason == "abort"


def test_abort_of_a_stranger_is_no_error() -> None:
    engine, _ = fake_engine()
    assert not engine.abort("nobody")


def test_failing_runner_drops_only_what_it_ran() -> None:
    def fail(plan: StepPlan) -> None:
        raise OSError("the device is gone")

    engine, runner = fake_engine(max_num_seqs=1)
    ran, waited = add_all(engine, fake_request("ran", range(9)), fake_request("waited", [2], max_tokens=1))
    runner.after = fail
    with pytest.raises(OSError, match="the device is gone"):
        engine.step()
    runner.after = lambda plan: None
    assert (ran.finish_reason, steps(engine)) == ("abort", [[("waited", 1)]])
    assert waited.finish_reason == "length"
    check_drained(engine)


def test_failed_step_leaves_nothing_in_the_cache() -> None:
    def fail(plan: StepPlan) -> None:
        raise OSError

    engine, runner = fake_engine()
    engine.add(fake_request("a", range(9)))
    runner.after = fail
    with pytest.raises(OSError):
        engine.step()
    assert all(block.entry is None for block in engine.kv.pool.blocks)


def first_tokens(prompt: list[int]) -> list[int]:
    """What the fake model answers to a prompt."""
    engine, _ = fake_engine()
    request = fake_request("free", prompt, max_tokens=8)
    engine.add(request)
    steps(engine)
    return request.output_token_ids


def end_of(engine: Engine, request: Request) -> tuple[int, str | None, int | str | None]:
    engine.add(request)
    steps(engine)
    return request.num_output, request.finish_reason, request.stop_reason


def test_max_tokens_ends_with_length() -> None:
    engine, _ = fake_engine()
    assert end_of(engine, fake_request("a", [1], max_tokens=3)) == (3, "length", None)


def test_eos_ends_with_stop_and_no_reason() -> None:
    engine, _ = fake_engine(eos_token_ids=(first_tokens([1])[0],))
    assert end_of(engine, fake_request("a", [1], max_tokens=8)) == (1, "stop", None)


def test_ignored_eos_does_not_end() -> None:
    engine, _ = fake_engine(eos_token_ids=(first_tokens([1])[0],))
    assert end_of(engine, fake_request("a", [1], max_tokens=8, ignore_eos=True)) == (8, "length", None)


def test_stop_token_ends_and_is_the_reason() -> None:
    token_id = first_tokens([1])[0]
    engine, _ = fake_engine()
    assert end_of(engine, fake_request("a", [1], max_tokens=8, stop_token_ids=[token_id])) == (1, "stop", token_id)


def test_ignored_eos_that_is_a_stop_token_is_the_reason() -> None:
    token_id = first_tokens([1])[0]
    engine, _ = fake_engine(eos_token_ids=(token_id,))
    request = fake_request("a", [1], max_tokens=8, ignore_eos=True, stop_token_ids=[token_id])
    assert end_of(engine, request) == (1, "stop", token_id)


def test_min_tokens_defer_the_end() -> None:
    token_ids = first_tokens([1])
    engine, _ = fake_engine()
    request = fake_request("a", [1], max_tokens=8, min_tokens=3, stop_token_ids=token_ids)
    assert end_of(engine, request) == (3, "stop", token_ids[2])


def test_finish_by_the_front_is_told_once() -> None:
    engine, _ = fake_engine()
    trace = Trace()
    engine.events.listen(trace)
    engine.add(fake_request("a", [1]))
    engine.step()
    assert (engine.finish("a", "stop", "\n"), engine.finish("a", "stop", "\n")) == (True, False)
    assert trace.of(Finished) == [Finished(1, "a", "stop", 1)]


def test_step_without_requests_does_nothing() -> None:
    engine, _ = fake_engine()
    assert engine.step() == []


def test_step_tells_what_a_request_had_stored_when_it_ended() -> None:
    engine, _ = fake_engine()
    trace = Trace()
    engine.events.listen(trace)
    engine.add(fake_request("a", range(5), max_tokens=2))
    while engine.has_work:
        engine.step()
    assert [event.scheduled for event in trace if isinstance(event, StepRan)] == [(("a", 5, 5),), (("a", 1, 6),)]


def test_fork_in_the_middle_of_a_step_is_refused() -> None:
    engine, runner = fake_engine()
    engine.add(fake_request("a", range(5)))
    refused: list[str] = []

    def fork(plan: StepPlan) -> None:
        with pytest.raises(RequestError, match="fork between two steps") as error:
            engine.fork("a", "b")
        refused.append(str(error.value))

    runner.after = fork
    engine.step()
    assert len(refused) == 1 and list(engine.requests) == ["a"]


def test_fork_with_tokens_of_its_own_shares_what_stands_before_them() -> None:
    engine, _ = fake_engine()
    trace = Trace()
    engine.add(fake_request("a", range(9), max_tokens=6))
    engine.step()
    engine.events.listen(trace)
    child = engine.fork("a", "b", token_ids=[7, 7], max_tokens=3)
    added = trace.of(Added)[0]
    assert isinstance(added, Added) and (added.num_prompt, added.max_tokens) == (9 + 1 + 2, 3)
    assert child.block_ids == engine.requests["a"].block_ids
    while engine.has_work:
        engine.step()
    assert child.num_output == 3
    with pytest.raises(RequestError, match=r"^fork: no request 'a' is here[^\n]+$"):
        engine.fork("a", "c")


def test_fork_with_more_tokens_than_there_is_room_gets_one_line() -> None:
    engine, _ = fake_engine()
    engine.add(fake_request("a", range(9)))
    with pytest.raises(RequestError, match=r"^fork: 9 tokens and 40 of its own leave no room[^\n]+$"):
        engine.fork("a", "b", token_ids=[1] * 40)
    engine.abort("a")
