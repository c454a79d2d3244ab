"""What if: the engine's own decisions in fitted time, held to runs the fit never saw, refused outside its range."""

import re
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from minivllm.engine.engine import Engine
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.events import StepRan
from minivllm.lab.cost_model import (
    NAMES,
    CostModel,
    EngineShape,
    Features,
    Machine,
    Sample,
    Term,
    features_of,
    fit,
    samples_of,
    scaled,
)
from minivllm.lab.fake_runner import FakeRunner
from minivllm.lab.nnls import nnls
from minivllm.lab.player import VirtualClock, play
from minivllm.lab.simulator import (
    MEASURES,
    SimulatedRunner,
    fit_recordings,
    load_model,
    run_errors,
    simulate,
    study,
    what_if,
    what_if_table,
)
from minivllm.lab.step_recordings import (
    HELD_OUT,
    RECORDINGS,
    TRAINING,
    Recording,
    RunSpec,
    StepCounter,
    load_recordings,
    record_runs,
)
from minivllm.trace import Trace
from minivllm.workloads import Lengths, Workload, agents, chats, fixed, open_loop, poisson, uniform

HERE = Machine("here", gb_per_s=10.0, tflops=0.1)
SHAPE = EngineShape(block_size=4, window=None, allocator="paged")
THERE = Machine("there", gb_per_s=20.0, tflops=1.0)
PRICES_MS = (20.0, 1.0, 5.0, 0.5, 0.25, 0.001, 0.01, 0.02, 0.03, 0.04)
MOST = 10**6
SMALL = uniform(3, 30)
WORKLOADS: dict[str, Workload] = {
    "open loop": open_loop(25, SMALL, poisson(20.0)),
    "chats": chats(4, 3, 16, SMALL, 0.1),
    "agents": agents(3, 3, 4, fixed(16, 8), SMALL, poisson(10.0)),
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small pool, swap": {"num_blocks": 60, "preemption_mode": "swap", "num_host_blocks": 80},
    "small pool, radix": {"num_blocks": 60, "prefix_cache": "radix"},
    "small chunks": {"max_num_batched_tokens": 16},
    "prefill first": {"batching": "prefill_first"},
}


def config_of(**options: Any) -> EngineConfig:
    return EngineConfig(**{"num_blocks": 300, "block_size": 4, "max_model_len": 200} | options)


def made_up(prices_ms: tuple[float, ...] = PRICES_MS, most: int = MOST) -> CostModel:
    """A model whose prices are given and not fitted."""
    terms = tuple(Term(name, ms, 0, most) for name, ms in zip(NAMES, prices_ms, strict=True))
    return CostModel(terms, 100, 0.0, HERE, SHAPE, {"model": "made up", "clock": "none"})


def random_features(random: Random) -> Features:
    return Features(*(random.randrange(100) for _ in NAMES[1:]))


@pytest.mark.parametrize("seed", range(20))
def test_nnls_meets_the_conditions_of_an_optimum(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(30, 8)) * 10.0 ** random.integers(-3, 6, size=8)
    matrix[:, 3] = matrix[:, 5] if seed % 2 else 0  # two alike, or one that says nothing
    target = random.normal(size=30)
    x = nnls(matrix, target)
    gain = matrix.T @ (target - matrix @ x) / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    assert (x >= 0).all()
    assert gain.max() < 1e-9  # no unknown would lower the residual by growing
    assert np.abs(gain[x > 0]).max(initial=0.0) < 1e-9  # and none by shrinking


def test_a_fit_finds_the_prices_that_made_the_steps() -> None:
    random = Random(0)
    features = [random_features(random) for _ in range(200)]
    fitted = fit([Sample(f, made_up().predict_ms(f)) for f in features], HERE, SHAPE, {})
    assert [term.ms for term in fitted.terms] == pytest.approx(PRICES_MS, rel=1e-6)
    assert fitted.mean_error < 1e-9


def test_steps_that_others_delayed_do_not_push_the_prices_down() -> None:
    random = Random(0)
    features = [random_features(random) for _ in range(2000)]
    noisy = [Sample(f, made_up().predict_ms(f) * random.choice((0.5, 1.5))) for f in features]
    fitted = fit(noisy, HERE, SHAPE, {})
    ratios = [fitted.predict_ms(f) / made_up().predict_ms(f) for f in features]
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.02)


def test_too_few_steps_and_steps_without_time_are_refused() -> None:
    random = Random(0)
    samples = [Sample(random_features(random), 1.0) for _ in range(60)]
    with pytest.raises(ConfigError, match="49 steps are too few for 10 prices"):
        fit(samples[:49], HERE, SHAPE, {})
    with pytest.raises(ConfigError, match="took no time"):
        fit([*samples, replace(samples[0], ms=0.0)], HERE, SHAPE, {})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", WORKLOADS)
def test_plans_and_events_tell_the_same_counts(kind: str, policy: str) -> None:
    config, clock, trace = config_of(**POLICIES[policy]), VirtualClock(), Trace()
    counter = StepCounter(SimulatedRunner(made_up(), clock, config.block_size), config.block_size)
    engine = Engine(config, counter, clock=clock)
    engine.events.listen(trace)
    play(WORKLOADS[kind], engine, clock, show_progress=False)
    assert [sample.features for sample in samples_of(trace.events, config.block_size)] == counter.features


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", WORKLOADS)
def test_the_simulation_decides_as_an_engine_that_really_stores_tokens(kind: str, policy: str) -> None:
    config, seen = config_of(**POLICIES[policy]), []
    for is_simulated in (True, False):
        clock, trace = VirtualClock(), Trace()
        simulated, fake = SimulatedRunner(made_up(), clock, config.block_size), FakeRunner(config.block_size)
        fake.after = lambda plan, clock=clock: clock.advance(  # type: ignore[misc]
            made_up().predict_ms(features_of(plan, config.block_size)) / 1e3
        )
        engine = Engine(config, simulated if is_simulated else fake, clock=clock)
        engine.events.listen(trace)
        played = play(WORKLOADS[kind], engine, clock, show_progress=False)
        times = [(o.id, o.first_token_s, o.finished_s, o.num_cached, o.num_preemptions) for o in played.outcomes]
        seen.append((times, [event.scheduled for event in trace if isinstance(event, StepRan)]))
    assert seen[0] == seen[1]


def test_one_request_takes_the_sum_of_its_steps() -> None:
    model = made_up((10.0, 1.0, 0.0, 2.0, *[0.0] * 6))  # 10 ms a step, 1 ms a single, 2 ms a token of a chunk
    played = simulate(open_loop(1, fixed(50, 5)), config_of(), model)
    assert played.outcomes[0].ttft_s == pytest.approx((10 + 50 * 2) / 1e3)
    assert played.outcomes[0].tpot_s == pytest.approx((10 + 1) / 1e3)


def test_a_step_outside_the_measured_counts_is_refused_in_one_line() -> None:
    model = made_up(most=40)
    workload = open_loop(1, fixed(50, 5))
    text = (
        r"the cost model was fitted on chunk_tokens from 0 to 40 and a step has 50: one prompt makes it at any rate: .*"
    )
    with pytest.raises(ConfigError, match=text) as caught:
        simulate(workload, config_of(), model)
    assert "\n" not in str(caught.value)
    assert simulate(workload, config_of(), model, is_guessing=True).num_steps == 5


def test_ten_percent_beyond_the_measured_counts_is_still_predicted() -> None:
    features = Features(44, *[0] * 8)
    made_up(most=40).require_within_range(features)
    with pytest.raises(ConfigError, match="fitted on singles from 0 to 40 and a step has 45"):
        made_up(most=40).require_within_range(replace(features, singles=45))


def test_another_machine_is_a_guess_that_must_be_asked_for_and_says_so() -> None:
    with pytest.raises(ConfigError, match=r"measured on here; for there it is a guess .* extrapolate=True"):
        scaled(made_up(), THERE)
    guess = scaled(made_up(), THERE, extrapolate=True)
    prices = dict(zip(NAMES, PRICES_MS, strict=True))
    found = {term.name: term.ms for term in guess.terms}
    assert (found["step"], found["chunks"]) == (prices["step"], prices["chunks"])
    assert found["single_kv"] == pytest.approx(prices["single_kv"] / 2)
    assert found["chunk_tokens"] == pytest.approx(prices["chunk_tokens"] / 10)
    played = simulate(WORKLOADS["open loop"], config_of(), guess)
    assert played.clock == "simulated: extrapolated to there from here, NOT fitted there"


def test_the_busier_the_later_until_it_cannot_be_said() -> None:
    model = made_up(most=5000)  # the products of many prompts at once are more
    rows = what_if((1, 10, 1000), config_of(), model, lengths=fixed(20, 20), num_requests=50, show_progress=False)
    slow, fast = rows[0].played, rows[1].played
    assert slow is not None and slow.ttft is not None and fast is not None and fast.ttft is not None
    assert slow.throughput < fast.throughput and slow.ttft.p90 < fast.ttft.p90
    assert rows[2].played is None and "a step has" in rows[2].reason


@pytest.mark.parametrize(
    ("counts", "advice"),
    [
        ({"chunks": 1, "products": 99}, "one prompt makes it at any rate: lower max_num_batched_tokens, or record"),
        ({"chunks": 1, "chunk_kv": 99}, "one request makes it at any rate: shorten the requests, or record"),
        ({"singles": 1, "single_kv": 99}, "one request makes it at any rate: shorten the requests, or record"),
        ({"chunks": 2, "products": 99}, "lower the rate, max_num_seqs or max_num_batched_tokens, or record"),
    ],
)
def test_a_lower_rate_is_advised_only_where_it_helps(counts: dict[str, int], advice: str) -> None:
    with pytest.raises(ConfigError, match=f"a step has 99: {advice}"):
        made_up(most=40).require_within_range(replace(Features(*[0] * 9), **counts))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"block_size": 8}, "fitted on block_size=4, not 8: set block_size=4, or record"),
        ({"group_windows": (50,)}, "fitted on window=None, not 50"),
        ({"allocator": "buddy", "enable_prefix_caching": False}, "fitted on allocator='paged', not 'buddy'"),
    ],
)
def test_an_engine_of_another_shape_is_refused(options: dict[str, Any], text: str) -> None:
    for ask in (
        lambda: simulate(WORKLOADS["chats"], config_of(**options), made_up(), is_guessing=True),
        lambda: what_if((1.0,), config_of(**options), made_up(), show_progress=False),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("roof", ["a", None, True, 0, float("nan")])
def test_a_machine_needs_two_numbers(roof: Any) -> None:
    with pytest.raises(ConfigError, match=r"^machine x: gb_per_s must be a finite number above 0, not "):
        Machine("x", roof, 1)


def table_of(rates_per_s: tuple[float, ...], lengths: Lengths, num_requests: int = 40) -> list[str]:
    model, config = made_up(), config_of()
    rows = what_if(rates_per_s, config, model, lengths=lengths, num_requests=num_requests, seed=3, show_progress=False)
    return what_if_table(rows, model).splitlines()


def test_the_table_counts_refused_requests_and_leaves_undefined_times_out() -> None:
    assert table_of((1.0,), uniform(80, 120))[-1].split()[1] not in ("0", "40")
    assert table_of((1.0,), fixed(20, 1))[-1].split()[-2:] == ["-", "-"]
    assert re.match(
        r"      1        40  all refused, the first: request \S+: 190 prompt and 50 output tokens are more than "
        r"max_model_len 200; .*", table_of((1.0,), fixed(190, 50))[-1]
    )  # fmt: skip


def test_the_table_says_what_it_played_and_where_its_model_comes_from() -> None:
    text = "\n".join(table_of((1.0,), SMALL))
    assert "played: 40 requests, lengths uniform 3..30, Poisson arrivals, seed 3\nengine: 300 blocks of 4" in text
    assert "p99" not in text
    saved = what_if_table([], load_model())
    assert all(f"{load_model().provenance[name]}" in saved for name in ("commit", "machine", "command"))


def test_rates_beyond_capacity_are_marked() -> None:
    slow, fast, note = table_of((0.1, 1000.0), fixed(20, 20), num_requests=2000)[-3:]
    assert slow.startswith("    0.1 ") and fast.startswith("   1000*") and note.startswith("* beyond capacity: ")


def test_a_model_survives_json() -> None:
    assert CostModel.from_json(made_up().to_json()) == made_up()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"minivllm_cost_model": 2, "terms": []}'])
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(MiniVLLMError, match=r"not a cost model .*; fit it again"):
        CostModel.from_json(text)


def test_runs_are_recorded_from_a_real_model(
    reference_model: Callable[[str], tuple[Path, PreTrainedModel]], tmp_path: Path
) -> None:
    spec = RunSpec("tiny", 12, 5, 30, 50.0, 0, num_blocks=60, num_host_blocks=8)
    [path] = record_runs(tmp_path, [spec], model=str(reference_model("llama-gqa")[0]))
    recording = Recording.load(path)
    assert recording.spec == spec and recording.provenance["clock"] == "cpu"
    assert [o.num_output for o in recording.played.outcomes] == [a.num_output for a in spec.workload().arrivals]
    assert len(recording.samples) == recording.played.num_steps
    model = fit(recording.samples, recording.machine, EngineShape.of(spec.config()), recording.provenance)
    model.require_within_range(recording.samples[0].features)
    assert run_errors(model, recording, is_guessing=True).keys() == MEASURES.keys()


def test_clocks_that_would_mislead_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clock must be one of cpu, wall, not 'sun'"):
        record_runs(tmp_path, clock="sun")
    with pytest.raises(ConfigError, match="use 1 thread or clock='wall'"):
        record_runs(tmp_path, num_threads=2)


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "calm.json").write_text("{}")
    with pytest.raises(MiniVLLMError, match=r"calm\.json: not a recording .*study\(record=True\)"):
        load_recordings(tmp_path)
    with pytest.raises(MiniVLLMError, match=r"cost_model\.json: cannot read the cost model"):
        load_model(tmp_path)


def test_the_committed_model_is_the_fit_of_the_committed_runs() -> None:
    fitted, saved = fit_recordings(load_recordings()), load_model()
    assert [astuple(term) for term in fitted.terms] == [pytest.approx(astuple(term)) for term in saved.terms]
    assert fitted.run_errors == pytest.approx(saved.run_errors)


@pytest.mark.parametrize("spec", HELD_OUT, ids=lambda spec: spec.name)
def test_held_out_runs_lie_within_the_error_that_the_model_states(spec: RunSpec) -> None:
    recording = Recording.load(RECORDINGS / f"{spec.name}.json")
    model = load_model()
    errors = run_errors(model, recording)
    assert {name: abs(error) for name, error in errors.items() if abs(error) > model.run_errors[name]} == {}


def test_held_out_runs_have_rates_and_lengths_that_no_training_run_has() -> None:
    trained = {(spec.rate_per_s, spec.least, spec.most) for spec in TRAINING}
    assert all(spec.rate_per_s not in {rate for rate, _, _ in trained} for spec in HELD_OUT)
    assert all((spec.least, spec.most) not in {(least, most) for _, least, most in trained} for spec in HELD_OUT)
    assert all(spec.seed not in {spec.seed for spec in TRAINING} for spec in HELD_OUT)


def test_recordings_are_small_and_tell_where_they_come_from() -> None:
    for recording in load_recordings():
        assert (RECORDINGS / f"{recording.spec.name}.json").stat().st_size < 200_000
        assert recording.provenance.keys() >= {"machine", "threads", "commit", "seed", "command", "model", "clock"}


def test_the_study_prints_prices_errors_and_rates_and_refuses_what_was_never_seen() -> None:
    text = study(rates_per_s=(1.0,), num_requests=30)
    assert all(heading in text for heading in ("Prices, fitted on", "Held-out runs", "stated: ", "What if, fitted on"))
    with pytest.raises(ConfigError, match="extrapolate=True"):
        study(rates_per_s=(1.0,), num_requests=30, machine=THERE)
    assert "NOT fitted there" in study(rates_per_s=(1.0,), num_requests=30, machine=THERE, extrapolate=True)
    big = replace(HELD_OUT[0].config(), max_num_seqs=200)
    [row] = what_if((100.0,), big, load_model(), num_requests=200, show_progress=False)
    assert row.played is None and "the cost model was fitted on" in row.reason
