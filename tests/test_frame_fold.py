"""Frames against the engine itself: blocks, counts, times; and their file."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

from minivllm.course.block_counts import BlockCounts
from minivllm.course.engine_frames import MOST_DECISIONS, EngineRun, Frame, Load
from minivllm.course.frame_fold import FrameFold
from minivllm.course.latencies import Latencies
from minivllm.engine.engine import Engine
from minivllm.engine_config import EngineConfig
from minivllm.errors import MiniVLLMError
from minivllm.events import Added, Admitted, BlocksTaken, Finished, Preempted, Refused, StepCosted, StepRan, Waited
from minivllm.lab.fake_runner import FakeRunner, fake_request
from minivllm.lab.life import Life
from minivllm.lab.player import VirtualClock
from minivllm.lab.random_life import act_at_random, random_config
from minivllm.request import Request

STEP_S = 0.03


class Stage:
    """A fake engine whose steps take 30 ms on a virtual clock, its fold, and a witness of who got tokens when."""

    def __init__(self, **options: object) -> None:
        defaults = {"num_blocks": 30, "block_size": 4, "max_model_len": 60, "max_num_seqs": 4}
        config = EngineConfig(**{**defaults, **options})  # type: ignore[arg-type]
        self.clock = VirtualClock()
        self.runner = FakeRunner(config.block_size)
        self.runner.after = lambda plan: self.clock.advance(STEP_S)
        self.engine = Engine(config, self.runner, clock=self.clock)
        self.fold = FrameFold(config.num_blocks, Load(), self.clock)
        self.engine.events.listen(self.fold.apply, wants_hash=False)
        self.requests: list[Request] = []
        self.gaps_s: list[float] = []
        self._last_s: dict[str, float] = {}

    def add(self, num_prompt: int, max_tokens: int, start: int = 0) -> None:
        request = fake_request(f"r{len(self.requests)}", range(start, start + num_prompt), max_tokens, ignore_eos=True)
        self.requests.append(request)
        self.engine.add(request)

    def step(self) -> None:
        for request in self.engine.step():
            if request.id in self._last_s:
                self.gaps_s.append(self.clock() - self._last_s[request.id])
            self._last_s[request.id] = self.clock()

    def serve(self, random: Random, num_requests: int) -> None:
        """Requests that come between steps, until all have gone."""
        for i in range(num_requests):
            self.add(random.randrange(3, 20), random.randrange(1, 25), start=random.choice((0, 0, 20 * i)))
            for _ in range(random.randrange(5)):
                if self.engine.has_work:
                    self.step()
        while self.engine.has_work:
            self.step()

    def last(self) -> Frame:
        self.fold.make_frame(self.clock())
        return self.fold.frames[-1]


@pytest.mark.parametrize("seed", range(40))
def test_blocks_are_those_of_the_pool_in_any_life(seed: int) -> None:
    random = Random(seed)
    life = Life(random_config(random), Counter())
    counts, pool = BlockCounts(), life.engine.kv.pool
    life.engine.events.listen(counts.apply, wants_hash=False)
    for _ in range(80):
        act_at_random(life, random)
        assert counts.num_live == pool.num_usable - pool.num_free
        assert counts.num_cached == sum(pool.blocks[i].entry is not None for i in pool.free_ids())


def test_percentiles_are_those_of_numpy_to_a_hundredth() -> None:
    random = Random(0)
    times_s = [random.lognormvariate(-3, 1.5) for _ in range(5000)]
    latencies = Latencies(10.0)
    for i, seconds in enumerate(times_s):
        latencies.add(seconds)
        if i % 50 == 0:
            latencies.roll(i / 1000)
    latencies.roll(5.0)
    wanted = np.percentile(times_s, [50, 95], method="inverted_cdf") * 1e3
    assert latencies.percentiles_ms(0.5, 0.95) == pytest.approx(tuple(wanted), rel=0.0101)


def test_times_leave_the_window_after_its_seconds() -> None:
    latencies = Latencies(10.0)
    assert latencies.percentiles_ms(0.5) == (None,)
    latencies.add(1.0, count=3)
    latencies.roll(0.5)
    latencies.add(0.01)
    latencies.roll(10.4)
    assert latencies.percentiles_ms(0.5, 1.0) == pytest.approx((1000, 1000), rel=0.01)
    latencies.roll(10.6)
    assert latencies.percentiles_ms(0.5) == pytest.approx((10,), rel=0.01)
    latencies.roll(30.0)
    assert latencies.percentiles_ms(0.5) == (None,)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 16}, {"num_blocks": 16, "max_num_batched_tokens": 8}], ids=str)
def test_counts_and_times_are_those_of_the_requests(options: dict[str, object]) -> None:
    stage = Stage(**options)
    stage.serve(Random(1), 30)
    frame, requests = stage.last(), stage.requests
    assert (frame.arrived, frame.finished, frame.refused, frame.num_running) == (30, 30, 0, 0)
    assert frame.output_tokens == sum(request.num_output for request in requests)
    assert frame.preemptions == sum(request.num_preemptions for request in requests)
    assert (frame.preemptions > 0) == (options != {})
    assert frame.prompt_tokens == sum(request.num_prompt for request in requests)
    assert frame.hit_tokens == sum(request.num_cached for request in requests) > 0
    assert (frame.num_live, frame.num_preempted, frame.num_waiting) == (0, 0, 0)
    recent = Latencies(1e9)
    for seconds in stage.gaps_s:
        recent.add(seconds)
    recent.roll(0.0)
    assert stage.clock() < 10  # so that the window holds all
    assert (frame.gap_p50_ms, frame.gap_p95_ms) == recent.percentiles_ms(0.5, 0.95)
    first_s = [r.first_token_s - r.arrival_s for r in requests if r.first_token_s is not None]
    wanted = np.percentile(first_s, [50, 95], method="inverted_cdf") * 1e3
    assert (frame.ttft_p50_ms, frame.ttft_p95_ms) == pytest.approx(tuple(wanted), rel=0.0101)


def test_running_waiting_and_preempted_are_those_of_the_scheduler() -> None:
    stage, random = Stage(num_blocks=16), Random(2)
    most = 0
    for i in range(12):
        stage.add(random.randrange(8, 20), 24, start=20 * i)
    while stage.engine.has_work:
        stage.step()
        frame, scheduler = stage.last(), stage.engine.scheduler
        assert (frame.num_running, frame.num_waiting) == (len(scheduler.running), len(scheduler.waiting))
        assert frame.num_preempted == sum(request.num_preemptions > 0 for request in scheduler.waiting)
        assert frame.num_live + frame.num_cached + frame.num_free == 15
        most = max(most, frame.num_preempted)
    assert most > 0


def test_a_frame_is_made_every_tenth_of_a_second_and_no_more_often() -> None:
    stage = Stage()
    told: list[int] = []
    stage.fold.followers.append(lambda: told.append(len(stage.fold.frames)))
    stage.serve(Random(3), 20)
    times = [frame.time_s for frame in stage.fold.frames]
    gaps = np.diff([0.0, *times])
    assert gaps.min() >= 0.1 and gaps.max() < 0.1 + STEP_S + 1e-9
    assert told == list(range(1, len(times) + 1))
    stage.fold.tick()
    assert len(stage.fold.frames) == len(times)  # it is not time yet
    stage.clock.advance(0.2)
    stage.fold.tick()
    assert len(stage.fold.frames) == len(times) + 1


def test_decisions_stand_in_the_frame_of_their_time_with_their_reasons() -> None:
    stage = Stage(max_num_seqs=1)
    stage.add(5, 2)
    stage.add(5, 2, start=30)
    for _ in range(4):
        stage.step()
    decisions = stage.last().decisions
    assert [(d.step, d.request_id, d.what, d.reason) for d in stage.fold.frames[0].decisions] == [
        (1, "r0", "began", "alone"), (1, "r1", "waits", "no_seat"), (2, "r0", "finished", "length"),
        (3, "r1", "began", "alone"), (4, "r1", "finished", "length"),
    ]  # fmt: skip
    assert decisions == ()  # each is told once, and a wait of the same kind at its beginning


def test_a_frame_keeps_the_newest_decisions() -> None:
    stage = Stage(max_num_seqs=30, num_blocks=60)
    for i in range(20):
        stage.add(3, 1, start=10 * i)
    stage.step()
    assert [d.request_id for d in stage.last().decisions] == [f"r{i}" for i in range(20 - MOST_DECISIONS, 20)]


def test_a_step_told_of_after_the_next_one_s_decisions_counts_the_same() -> None:
    """An engine that plans step 2 before it has read the tokens of step 1."""
    clock = VirtualClock()
    fold = FrameFold(9, Load(), clock)
    ran_1 = StepRan(1, (("a", 5, 5),), (("a", (1,)),), 1, 0, 5, 1.0, 10.0, 1.0, "")
    ran_2 = StepRan(2, (("a", 1, 6), ("b", 5, 5)), (("a", (1,)), ("b", (1,))), 2, 0, 4, 1.0, 10.0, 1.0, "")
    late_3 = StepRan(3, (("b", 1, 6),), (("a", (9,)), ("b", (1,))), 1, 0, 4, 1.0, 10.0, 1.0, "")
    events = [
        Added(0, "a", 5, 2, 0), Added(0, "b", 5, 9, 0), Admitted(1, "a", 0, 0), BlocksTaken(1, "a", (1, 2)),
        Admitted(2, "b", 0, 0), BlocksTaken(2, "b", (3, 4)), ran_1, Finished(2, "a", "length", 2), ran_2, late_3,
    ]  # fmt: skip
    for event in events:
        clock.advance(0.01)
        fold.apply(event)
    fold.make_frame(clock())
    frame = fold.frames[-1]
    assert (frame.output_tokens, frame.computed_tokens, frame.finished, frame.num_live) == (5, 12, 1, 4)
    assert (frame.steps, frame.step_ms, frame.step) == (3, 30.0, 3)
    # first tokens: a after 60 ms, b after 70 ms; later ones after 20 and 10 ms, one that came too late among them
    assert (frame.ttft_p50_ms, frame.ttft_p95_ms) == pytest.approx((60, 70), rel=0.011)
    assert (frame.gap_p50_ms, frame.gap_p95_ms) == pytest.approx((10, 20), rel=0.011)
    fold.apply(StepRan(4, (), (), 1, 0, 4, 1.0, 1.0, 1.0, ""))
    assert set(fold._last_s) == {"b"} and set(fold._num_prompt) == {"b"}


def test_the_ledger_s_bytes_and_floors_add_up() -> None:
    fold = FrameFold(9, Load(), VirtualClock())
    for step in (1, 2):
        fold.apply(StepCosted(step, 100, 20, 3, 10**9, 0.5, 2.0))
    fold.make_frame(0.0)
    frame = fold.frames[0]
    assert (frame.costed_steps, frame.weight_bytes, frame.kv_bytes, frame.logit_bytes) == (2, 200, 40, 6)
    assert (frame.floor_ms, frame.costed_ms) == (1.0, 4.0)


def test_nothing_of_who_has_left_is_kept() -> None:
    stage = Stage()
    stage.serve(Random(4), 30)
    stage.add(5, 1)
    stage.step()
    fold = stage.fold
    fold.apply(Refused(0, "r99", "too long"))
    fold.apply(StepRan(99, (), (), 0, 0, 4, 1.0, 1.0, 1.0, ""))
    assert not (fold._due_s or fold._last_s or fold._num_prompt or fold._gone or fold._preempted)


def test_who_should_have_come_earlier_has_waited_since_then() -> None:
    stage = Stage()
    stage.clock.advance(1.0)
    stage.fold.expect("r0", 0.4)
    stage.add(5, 1)
    stage.step()
    assert stage.last().ttft_p50_ms == pytest.approx(630, rel=0.011)


def test_swaps_and_notes_are_decisions_too() -> None:
    fold = FrameFold(9, Load(), VirtualClock())
    fold.apply(Preempted(3, "a", 7, "no_blocks", "swap"))
    fold.apply(Preempted(3, "b", 7, "itself"))
    fold.apply(Waited(3, "a", "just_preempted"))
    fold.note("slider", "batch limit 4")
    fold.turn_away()
    fold.make_frame(0.0)
    frame = fold.frames[0]
    assert [(d.what, d.reason) for d in frame.decisions] == [
        ("swapped out", "no_blocks"), ("preempted", "itself"), ("waits", "just_preempted"), ("slider", "batch limit 4"),
    ]  # fmt: skip
    assert (frame.preemptions, frame.num_preempted, frame.refused) == (2, 2, 1)


def run_of_a_stage() -> EngineRun:
    stage = Stage()
    stage.serve(Random(5), 20)
    stage.fold.load = Load(rate=4, batch_limit=2)
    stage.last()
    return EngineRun({"model": "fake", "live": "recorded"}, tuple(stage.fold.frames))


def test_a_saved_run_comes_back_to_the_microsecond(tmp_path: Path) -> None:
    run = run_of_a_stage()
    path = run.save(tmp_path / "run.json")
    again = EngineRun.load(path)
    assert again.header == run.header and len(again.frames) == len(run.frames)
    for one, other in zip(run.frames, again.frames, strict=True):
        assert (one.load, one.decisions, one.step, one.num_live) == (
            other.load, other.decisions, other.step, other.num_live,
        )  # fmt: skip
        assert one.time_s == pytest.approx(other.time_s, abs=1e-3)
        assert one.gap_p95_ms == (None if other.gap_p95_ms is None else pytest.approx(other.gap_p95_ms, abs=1e-3))
    assert again.save(tmp_path / "again.json").read_text() == path.read_text()
    assert again.frames[-1].load == Load(rate=4, batch_limit=2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"minivllm_engine_run":1', '"minivllm_engine_run":2'),
        ('"step",', '"stop",'),
        ('"rate",', '"ratio",'),
        ("[[0.", '[["0.'),
        ('"header":{', '"head":{'),
        ("{", "["),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, old: str, new: str) -> None:
    path = run_of_a_stage().save(tmp_path / "run.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(MiniVLLMError, match=r"run\.json: not a run of the engine room .*; record it again") as caught:
        EngineRun.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(MiniVLLMError, match="cannot read the run"):
        EngineRun.load(tmp_path / "missing.json")


def test_looking_at_steps_does_not_cost_their_hash() -> None:
    def ran_with(is_reader: bool) -> StepRan:
        stage, heard = Stage(), list[StepRan]()
        stage.engine.events.listen(lambda e: heard.append(e) if isinstance(e, StepRan) else None, wants_hash=is_reader)
        stage.add(5, 3)
        stage.step()
        return heard[0]

    assert ran_with(is_reader=True).state_hash != "" == ran_with(is_reader=False).state_hash


def test_who_wanted_hashes_and_left_wants_none_any_more() -> None:
    stage = Stage()
    stop = stage.engine.events.listen(lambda event: None)
    assert stage.engine.events.hash_readers
    stop()
    stop()
    assert not stage.engine.events.hash_readers and stage.engine.events  # the fold listens on


@pytest.mark.parametrize(
    ("part", "place", "value", "words"),
    [
        ("frames", 0, None, "a frame in which time_s is None"),
        ("frames", 2, True, "a frame in which num_running is True"),
        ("frames", 1, float("nan"), "a frame in which step is nan"),
        ("frames", -1, 9, "a frame under load 9 of"),
        ("frames", -1, -1, "a frame under load -1 of"),
        ("frames", -1, None, "a frame under load None of"),
        ("decisions", 0, [1, "r0", "began", 7], "a decision that is not a step and three words"),
        ("loads", 0, "2", "Load: rate must be a number, not '2'"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_with_it(
    tmp_path: Path, part: str, place: int, value: object, words: str
) -> None:
    path = run_of_a_stage().save(tmp_path / "run.json")
    document = json.loads(path.read_text())
    next(row for row in document[part] if row)[place] = value
    path.write_text(json.dumps(document))
    with pytest.raises(MiniVLLMError, match=re.escape(f"run.json: not a run of the engine room ({words}")) as caught:
        EngineRun.load(path)
    assert "\n" not in str(caught.value)
