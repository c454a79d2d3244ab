"""Who begins as another does who is being computed waits for its blocks, and for nothing else."""

import pytest

from minivllm.engine.engine import Engine
from minivllm.events import StepRan, Waited
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.request import Request, SamplingParams
from minivllm.trace import Trace

SIZES = {"block_size": 4, "num_blocks": 400, "max_model_len": 100, "max_num_seqs": 32, "max_num_batched_tokens": 256}


def sharing(num: int, prefix: range, num_own: int = 8) -> list[Request]:
    """Requests with a common beginning, and tokens of their own."""
    own = [[(index + place) % 12 for place in range(num_own)] for index in range(num)]
    own = [[index % 12, index // 12, *tail[2:]] for index, tail in enumerate(own)]
    prompts = [[*(token % 12 for token in prefix), *tail] for tail in own]
    return [fake_request(f"{prefix.start}.{index}", prompt, max_tokens=3) for index, prompt in enumerate(prompts)]


def run(engine: Engine, requests: list[Request], num_steps: int | None = None) -> Trace:
    trace = Trace()
    stop = engine.events.listen(trace)
    for request in requests:
        engine.add(request)
    while engine.has_work and (num_steps is None or len(scheduled(trace)) < num_steps):
        engine.step()
    stop()
    return trace


def passed_over(trace: Trace) -> list[tuple[int, str]]:
    """Steps, and who waited in them for a prefix under way."""
    return [(e.step, e.request_id) for e in trace if isinstance(e, Waited) and e.reason == "prefix_under_way"]


def scheduled(trace: Trace) -> list[list[tuple[str, int]]]:
    """What each step computed, by request."""
    return [[(id_, num_new) for id_, num_new, _ in event.scheduled] for event in trace if isinstance(event, StepRan)]


@pytest.mark.parametrize("is_async", [False, True], ids=["step by step", "launched ahead"])
def test_a_prefix_of_many_requests_is_computed_once(is_async: bool) -> None:
    engine, runner = fake_engine(**SIZES)
    runner.is_async = is_async
    trace = run(engine, sharing(20, range(64)))
    computed = sum(num_new for step in scheduled(trace) for _, num_new in step)
    assert computed == 64 + 20 * 8 + 20 * 2  # each token of a prompt, and all outputs but the last
    steps = {step for step, _ in passed_over(trace)}
    assert steps == ({1, 2} if is_async else {1})
    assert len(passed_over(trace)) == 19 * len(steps)


def test_two_prefixes_begin_in_one_step_and_the_order_is_kept_behind_them() -> None:
    engine, _ = fake_engine(**SIZES)
    alone = fake_request("own", [11] * 9, max_tokens=3)
    first, second, *_ = scheduled(run(engine, [*sharing(2, range(32)), *sharing(2, range(5, 37)), alone]))
    assert [id_ for id_, _ in first] == ["0.0", "5.0", "own"]
    assert second[3:] == [("0.1", 8), ("5.1", 8)]


def test_a_short_beginning_that_all_have_holds_nobody_up() -> None:
    engine, _ = fake_engine(**SIZES)
    assert not passed_over(run(engine, sharing(6, range(8), num_own=17)))
    engine, _ = fake_engine(**SIZES)
    assert len(passed_over(run(engine, sharing(6, range(8), num_own=7)))) == 5  # two blocks of fifteen tokens


def test_chunk_by_chunk_the_one_behind_waits_until_what_is_left_is_its_own() -> None:
    engine, _ = fake_engine(**SIZES | {"max_num_batched_tokens": 24})
    trace = run(engine, sharing(2, range(64)))
    assert scheduled(trace)[:4] == [[("0.0", 24)], [("0.0", 24)], [("0.0", 24)], [("0.0", 1), ("0.1", 8)]]


def test_when_the_one_before_leaves_the_other_computes_for_itself() -> None:
    engine, _ = fake_engine(**SIZES | {"max_num_batched_tokens": 24})
    run(engine, sharing(2, range(64)), num_steps=1)
    engine.abort("0.0")
    trace = run(engine, [], num_steps=1)
    assert scheduled(trace) == [[("0.1", 24)]] and not passed_over(trace)


@pytest.mark.parametrize(
    ("options", "prompt_logprobs"),
    [
        ({"enable_prefix_caching": False}, None),
        ({"batching": "static"}, None),
        ({"batching": "request_level"}, None),
        ({}, 1),
    ],
    ids=["no cache", "static batches", "batches of requests", "prompt logprobs"],
)
def test_nobody_waits_where_nothing_would_be_saved(options: dict[str, object], prompt_logprobs: int | None) -> None:
    engine, _ = fake_engine(**SIZES | options)
    requests = sharing(3, range(32))
    for request in requests:
        request.params = SamplingParams(max_tokens=3, prompt_logprobs=prompt_logprobs)
    trace = run(engine, requests)
    assert not passed_over(trace) and len(scheduled(trace)[0]) == 3


def test_a_salt_of_its_own_waits_for_nobody() -> None:
    engine, _ = fake_engine(**SIZES)
    requests = sharing(3, range(32))
    requests[1].salt = requests[2].salt = "b"
    assert passed_over(run(engine, requests)) == [(1, "0.2")]
