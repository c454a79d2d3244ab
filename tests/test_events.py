"""Events and traces: complete, cheap, saved and loaded, equal when the run is equal."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from random import Random

import pytest

from minivllm.errors import MiniVLLMError
from minivllm.events import Admitted, Event, EventBus, Evicted, Preempted, Refused, StepCosted, StepRan
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.speculative_config import SpeculativeConfig
from minivllm.trace import KINDS, Trace


def record(**options: object) -> Trace:
    """Twelve requests on a small pool, recorded: hits, evictions, preemptions, a refusal."""
    engine, _ = fake_engine(**{"num_blocks": 9, "max_model_len": 32, "max_num_batched_tokens": 16, **options})
    trace = Trace({"num_blocks": 9, "block_size": 4, "note": "ünicode"})
    engine.events.listen(trace)
    random = Random(3)
    for index in range(12):
        prompt = [*range(8), *(random.randrange(9) for _ in range(index))]
        engine.add(fake_request(f"r{index}", prompt, max_tokens=8, priority=-index))
        engine.step()
    with pytest.raises(MiniVLLMError):
        engine.add(fake_request("empty", []))
    while engine.has_work:
        engine.step()
    return trace


def record_policies() -> Trace:
    """What takes another policy to happen: forks and copies, exchanges, pins, swaps, reservations, windows."""
    trace = Trace()
    for options in (
        {"prefix_cache": "radix", "max_model_len": 20},
        {"preemption_mode": "swap", "num_host_blocks": 8, "num_blocks": 5, "max_model_len": 16},
        {"allocator": "contiguous", "enable_prefix_caching": False},
        {"group_windows": (3,), "enable_prefix_caching": False},
        {"speculative": (SpeculativeConfig("ngram"),), "block_size": 2, "num_blocks": 40},
    ):
        engine, _ = fake_engine(**options)
        engine.events.listen(trace)
        for name in "ab":
            engine.add(fake_request(name, range(6), max_tokens=8))
        engine.step()
        engine.fork("a", "c")
        while engine.has_work:
            engine.step()
        if engine.config.prefix_cache == "radix":
            engine.pins.pin("system", [*range(6)])
            engine.pins.unpin("system")
        engine.events.emit(StepCosted(engine.scheduler.step, 1, 2, 3, 4, 0.5, 2.0))  # as a ledger that listens would
    return trace


def test_recorded_runs_show_every_kind_of_event() -> None:
    shown = {type(event) for event in (*record(), *record_policies())}
    assert shown == set(KINDS.values())


def test_trace_with_every_kind_of_event_loads_equal(tmp_path: Path) -> None:
    trace = Trace({}, [*record(), *record_policies()])
    assert Trace.load(trace.save(tmp_path / "run.json")) == trace


def test_saved_trace_loads_equal(tmp_path: Path) -> None:
    trace = record()
    assert Trace.load(trace.save(tmp_path / "run.json")) == trace


def test_saved_trace_is_compact(tmp_path: Path) -> None:
    trace = record()
    assert trace.save(tmp_path / "run.json").stat().st_size < 100 * len(trace)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    trace = record()
    loaded = Trace.load(trace.save(tmp_path / "one.json"))
    assert loaded.save(tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_equal_runs_have_equal_state_hashes() -> None:
    assert record().state_hashes() == record().state_hashes()


@pytest.mark.parametrize(
    "other", [{"scheduling_policy": "priority"}, {"max_num_batched_tokens": 7}, {"enable_prefix_caching": False}]
)
def test_another_policy_has_other_state_hashes(other: dict[str, object]) -> None:
    assert record(**other).state_hashes() != record().state_hashes()


def test_every_step_has_one_state_hash() -> None:
    trace = record()
    assert [event.step for event in trace.of(StepRan)] == list(range(1, trace.last_step + 1))


def test_until_cuts_after_a_step() -> None:
    trace = record()
    assert {event.step for event in trace.until(3)} <= {0, 1, 2, 3}
    assert trace.until(trace.last_step) == trace.events


def test_of_selects_one_kind() -> None:
    trace = record()
    assert all(isinstance(event, Preempted) for event in trace.of(Preempted)) and trace.of(Preempted)


def test_event_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Evicted(1, 2).block_id = 3  # type: ignore[misc]


def test_events_hold_no_live_object() -> None:
    def is_plain(value: object) -> bool:
        if isinstance(value, tuple):
            return all(is_plain(item) for item in value)
        return isinstance(value, int | float | str)

    events = [*record(), *record_policies()]
    values = [getattr(event, name) for event in events for name in type(event).__dataclass_fields__]
    assert all(is_plain(value) for value in values)


def test_nobody_hears_after_the_end_of_listening() -> None:
    bus, heard = EventBus(), Trace()
    stop_listening = bus.listen(heard)
    bus.emit(Evicted(1, 1))
    stop_listening()
    stop_listening()  # twice is no error
    bus.emit(Evicted(2, 2))
    assert heard.events == [Evicted(1, 1)]


def test_all_listeners_hear_in_order() -> None:
    bus = EventBus()
    heard: list[tuple[str, Event]] = []
    bus.listen(lambda event: heard.append(("first", event)))
    bus.listen(lambda event: heard.append(("second", event)))
    bus.emit(Evicted(1, 1))
    assert [name for name, _ in heard] == ["first", "second"]


def test_without_a_listener_a_decode_step_emits_nothing_and_hashes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = fake_engine()
    engine.add(fake_request("a", [1], max_tokens=4))
    engine.step()
    calls: list[object] = []
    monkeypatch.setattr(engine.events, "emit", calls.append)
    monkeypatch.setattr(engine, "state_hash", lambda: calls.append("hash"))
    engine.step()
    assert calls == []


def test_listening_does_not_change_the_run() -> None:
    outputs = []
    for is_heard in (False, True):
        engine, _ = fake_engine(num_blocks=5, max_model_len=16)
        if is_heard:
            engine.events.listen(Trace())
        requests = [fake_request(name, [ord(name)] * 5, max_tokens=9) for name in "abc"]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
        outputs.append([request.token_ids for request in requests])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", '"text"', "{}", '{"minivllm_trace": 1}', '{"minivllm_trace": 99}',
        '{"minivllm_trace": 1, "header": {}, "kinds": [], "events": []}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": ["step"]}, "events": []}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Unheard": []}, "events": []}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": ["step", "block_id"]}, "events": [[0, 1]]}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": ["step", "block_id"]}, "events": [[5, 1, 2]]}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": ["step", "block_id"]}, "events": [[-1, 1, 2]]}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": ["step", "block_id"]}, "events": [[0, "x", {}]]}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": ["step", "block_id"]}, "events": 7}',
        '{"minivllm_trace": 1, "header": 7, "kinds": {}, "events": []}',
        '{"minivllm_trace": 1, "header": {}, "kinds": {"Evicted": 7}, "events": []}',
    ],
)  # fmt: skip
def test_broken_trace_gives_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(MiniVLLMError) as caught:
        Trace.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_trace_gives_one_line(tmp_path: Path) -> None:
    path = record().save(tmp_path / "run.json")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MiniVLLMError, match="not a minivllm trace"):
        Trace.load(path)


def test_binary_and_missing_files_give_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("binary.json", "missing.json", "."):
        with pytest.raises(MiniVLLMError, match="cannot read the trace"):
            Trace.load(tmp_path / name)


def test_admission_after_preemption_is_told_apart() -> None:
    trace = record(num_blocks=9)
    again = [event for event in trace.of(Admitted) if isinstance(event, Admitted) and event.num_preemptions]
    assert len(again) == len(trace.of(Preempted))


def test_refusal_names_the_reason() -> None:
    (refused,) = record().of(Refused)
    assert "the prompt is empty" in str(refused)
