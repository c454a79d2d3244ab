"""What if: the real engine and its scheduler, on a runner that computes nothing and lets a fitted time pass.

python -m minivllm.lab.simulator            prices, the error on runs that the fit never saw, a table over rates
python -m minivllm.lab.simulator record     measures the runs anew first, on this machine
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan, StepResult, needs_token
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.cost_model import BOUND, CostModel, EngineShape, Machine, features_of, fit, scaled
from minivllm.lab.played import Percentiles, Played, percentile
from minivllm.lab.player import VirtualClock, play
from minivllm.lab.step_recordings import HELD_OUT, RECORDINGS, Recording, load_recordings, record_runs
from minivllm.workloads import Lengths, Workload, open_loop, poisson, uniform

MODEL_FILE = "cost_model.json"
NUM_SIGMAS = 3  # a run beyond the stated error should be rare
LENGTHS = uniform(40, 160)  # those of the held-out runs
GROWTH = 2.0  # of the TTFT from the first to the last quarter of arrivals; more: the queue was still growing
MEASURES: dict[str, Callable[[Played], float]] = {
    "tokens/s": lambda played: played.throughput,
    "TTFT p50": lambda played: _known(played.ttft).p50,
    "TTFT p90": lambda played: _known(played.ttft).p90,
    "TPOT p50": lambda played: _known(played.tpot).p50,
    "TPOT p90": lambda played: _known(played.tpot).p90,
}


class SimulatedRunner:
    """No tensors: every token is 0, and the clock goes on by what the model predicts for the plan.

    Raises ConfigError for a plan that the model was not fitted on, unless told to guess.
    """

    def __init__(self, model: CostModel, clock: VirtualClock, block_size: int, is_guessing: bool = False) -> None:
        self.model = model
        self.clock = clock
        self.block_size = block_size
        self.is_guessing = is_guessing

    def run(self, plan: StepPlan) -> StepResult:
        features = features_of(plan, self.block_size)
        if not self.is_guessing:
            self.model.require_within_range(features)
        self.clock.advance(self.model.predict_ms(features) / 1e3)
        up_to_date = [request for request, num_new in plan.scheduled if needs_token(request, num_new)]
        return StepResult({each.id: [0] for request in up_to_date for each in (request, *request.pending_forks)})


@dataclass(frozen=True, slots=True)
class WhatIf:
    """One rate: what was asked, and the simulated run or why it is refused."""

    rate_per_s: float
    workload: Workload
    config: EngineConfig
    lengths: Lengths
    played: Played | None
    reason: str = ""

    @property
    def is_beyond_capacity(self) -> bool:
        """Whether the queue was still growing when the last requests came, so that more of them would wait longer.

        The rule: the median TTFT of the last quarter of arrivals is more than GROWTH times that of the first.
        """
        waits = [outcome.ttft_s for outcome in self.played.outcomes] if self.played else []
        quarter = len(waits) // 4
        return quarter > 0 and percentile(waits[-quarter:], 0.5) > GROWTH * percentile(waits[:quarter], 0.5)


def simulate(workload: Workload, config: EngineConfig, model: CostModel, *, is_guessing: bool = False) -> Played:
    """Play a workload in predicted time; `Played.clock` says that it is simulated, and for which machine.

    Raises ConfigError for an engine of another shape than the model was fitted on and, unless `is_guessing`, when a
    step is outside the counts that it was fitted on.
    """
    model.require_shape(config)
    clock = VirtualClock()
    engine = Engine(config, SimulatedRunner(model, clock, config.block_size, is_guessing), clock=clock)
    played = play(workload, engine, clock, show_progress=False)
    return replace(played, clock=f"simulated: {label_of(model)}")


def label_of(model: CostModel) -> str:
    """For which machine a model speaks, and whether it was fitted there."""
    if model.extrapolated_from is None:
        return f"fitted on {model.machine.name}"
    return f"extrapolated to {model.machine.name} from {model.extrapolated_from}, NOT fitted there"


def what_if(
    rates_per_s: Sequence[float], config: EngineConfig, model: CostModel, *,
    lengths: Lengths = LENGTHS, num_requests: int = 200, seed: int = 0, show_progress: bool = True,
) -> list[WhatIf]:  # fmt: skip
    """Simulate Poisson arrivals at each rate; a rate that leads outside the fitted range is refused, with the count.

    Raises ConfigError for an engine of another shape than the model was fitted on.
    """
    model.require_shape(config)
    rows = []
    for rate_per_s in tqdm(rates_per_s, desc="what if", disable=not show_progress):
        workload = open_loop(num_requests, lengths, poisson(rate_per_s), seed=seed)
        try:
            played, reason = simulate(workload, config, model), ""
        except ConfigError as error:
            played, reason = None, str(error)
        rows.append(WhatIf(rate_per_s, workload, config, lengths, played, reason))
    return rows


def fit_recordings(recordings: Sequence[Recording]) -> CostModel:
    """A model of the training runs, with the errors of whole runs that it may be held to.

    Each training run in turn is left out, predicted by a fit to the others, and compared. What is stated is three times
    the root mean square of these errors. The held-out runs take no part: they are what the statement is tested on.
    Raises ConfigError when the recordings come from different machines or engine shapes.
    """
    training = [recording for recording in recordings if not recording.is_held_out]
    sources = {
        (r.machine.name, r.provenance["model"], r.provenance["clock"], EngineShape.of(r.spec.config()))
        for r in recordings
    }
    if len(sources) != 1:
        raise ConfigError(
            "the recordings come from several machines, models, clocks or engine shapes; record all of them in one go"
        )
    model = _fit(training)
    errors: list[dict[str, float]] = []
    for left_out in training:
        others = _fit([recording for recording in training if recording is not left_out])
        errors.append(run_errors(others, left_out, is_guessing=True))
    stated = {name: NUM_SIGMAS * fmean(error[name] ** 2 for error in errors) ** 0.5 for name in MEASURES}
    return replace(model, run_errors=stated)


def _fit(recordings: Sequence[Recording]) -> CostModel:
    samples = [sample for recording in recordings for sample in recording.samples]
    first = recordings[0]
    return fit(samples, first.machine, EngineShape.of(first.spec.config()), first.provenance)


def run_errors(model: CostModel, recording: Recording, *, is_guessing: bool = False) -> dict[str, float]:
    """By measure: simulated / recorded - 1, of the same workload on the same configuration."""
    simulated = simulate(recording.spec.workload(), recording.spec.config(), model, is_guessing=is_guessing)
    return {name: measure(simulated) / measure(recording.played) - 1 for name, measure in MEASURES.items()}


def load_model(folder: Path = RECORDINGS) -> CostModel:
    """The fitted model that lies beside the recordings. Raises MiniVLLMError when there is none."""
    path = folder / MODEL_FILE
    try:
        return CostModel.from_json(path.read_text())
    except (OSError, MiniVLLMError) as error:
        raise MiniVLLMError(f"{path}: cannot read the cost model ({error}); run study(record=True)") from error


def study(
    *, record: bool = False, rates_per_s: Sequence[float] = (0.5, 1, 1.5, 2, 3, 4), num_requests: int = 200,
    seed: int = 0, folder: str | Path = RECORDINGS, machine: Machine | None = None, extrapolate: bool = False,
    clock: str = "cpu", num_threads: int = 1,
) -> str:  # fmt: skip
    """Fit the recorded runs, compare with those held out, and tabulate what other rates would bring.

    `record` measures all runs anew (minutes) and saves the fit beside them. With `machine` the last table is for that
    machine, scaled by its roofs, which needs extrapolate=True.
    """
    folder = Path(folder)
    if record:
        record_runs(folder, clock=clock, num_threads=num_threads)
        (folder / MODEL_FILE).write_text(fit_recordings(load_recordings(folder)).to_json())
    model, recordings = load_model(folder), load_recordings(folder)
    target = model if machine is None else scaled(model, machine, extrapolate)
    config = HELD_OUT[0].config()
    rows = what_if(rates_per_s, config, target, num_requests=num_requests, seed=seed)
    return "\n".join([prices_table(target), errors_table(model, recordings), what_if_table(rows, target)])


def prices_table(model: CostModel) -> str:
    """What each count costs and over which range that was measured."""
    facts = model.provenance
    lines = [
        f"Prices, {label_of(model)}; model {facts['model']}, {facts['clock']} clock, {model.num_steps} steps, "
        f"mean error of a step {model.mean_error:.1%}",
        f"{'count':<14}{'us for each':>14}{'measured from':>16}{'to':>10}  bound",
    ]
    lines += [f"{t.name:<14}{t.ms * 1e3:>14.4f}{t.low:>16}{t.high:>10}  {BOUND[t.name]}" for t in model.terms]
    return "\n".join(lines) + "\n"


def errors_table(model: CostModel, recordings: Sequence[Recording]) -> str:
    """Simulated and recorded figures of the held-out runs, beside the error that the model states."""
    lines = [f"Held-out runs: simulated / recorded - 1{'':<18}" + "".join(f"{name:>10}" for name in MEASURES)]
    for recording in recordings:
        if recording.is_held_out:
            spec, errors = recording.spec, run_errors(model, recording)
            what = f"{spec.name}, {spec.rate_per_s:g}/s, {spec.least}..{spec.most} tokens"
            lines.append(f"{what:<57}" + "".join(f"{errors[name]:>+10.1%}" for name in MEASURES))
    stated = "".join(f"{model.run_errors[name]:>10.1%}" for name in MEASURES)
    lines.append(f"{'stated: 3 sigma of the training runs, each left out':<57}" + stated)
    first, again = (next(r.played for r in recordings if r.spec.name == spec.name) for spec in HELD_OUT[1:])
    noise = "".join(f"{measure(again) / measure(first) - 1:>+10.1%}" for measure in MEASURES.values())
    return "\n".join([*lines, f"{'recorded twice: the second / the first - 1':<57}{noise}"]) + "\n"


def what_if_table(rows: Sequence[WhatIf], model: CostModel) -> str:
    """What was played, then a line for each rate: times in milliseconds, of the percentiles whose error is stated.

    A * marks rates where the queue was still growing; `WhatIf.is_beyond_capacity` has the rule.
    """
    facts = model.provenance
    names = [f"{name} {share} ms" for name in ("TTFT", "TPOT") for share in ("p50", "p90")]
    lines = [
        f"What if, {label_of(model)}",
        f"measured at commit {facts.get('commit')} on {facts.get('machine')} by: {facts.get('command')}",
        *dict.fromkeys(map(_asked, rows)),
        f"{'req/s':>8}{'refused':>9}{'tokens/s':>10}" + "".join(f"{name:>13}" for name in names),
    ]
    for row in rows:
        lines.append(f"{row.rate_per_s:>7g}{'*' if row.is_beyond_capacity else ' '}" + _figures(row))
    if any(row.is_beyond_capacity for row in rows):
        lines.append(
            f"* beyond capacity: the median TTFT of the last quarter of arrivals is over {GROWTH:g} times that of the "
            "first; the queue was still growing, and more requests would have waited longer"
        )
    return "\n".join(lines) + "\n"


def _asked(row: WhatIf) -> str:
    """What was played, the rate apart."""
    c, load = row.config, row.workload
    return (
        f"played: {len(load.arrivals)} requests, lengths {row.lengths.name}, Poisson arrivals, seed {load.seed}\n"
        f"engine: {c.num_blocks} blocks of {c.block_size}, {c.max_num_seqs} seqs, {c.max_num_batched_tokens} batched "
        f"tokens, max_model_len {c.max_model_len}, {c.batching}, {c.scheduling_policy}, {c.preemption_mode}"
    )


def _figures(row: WhatIf) -> str:
    if row.played is None:
        return f"  refused: {row.reason}"
    num_refused = len(row.played.refusals)
    if num_refused and not row.played.outcomes:
        return f"{num_refused:>9}  all refused, the first: {row.played.refusals[0].reason}"
    found = (row.played.ttft, row.played.tpot)
    shares = [share for p in found for share in ((p.p50, p.p90) if p else (None, None))]
    times = "".join(f"{'-' if t is None else format(t * 1e3, '.1f'):>13}" for t in shares)
    return f"{num_refused:>9}{row.played.throughput:>10.1f}{times}"


def _known(percentiles: Percentiles | None) -> Percentiles:
    if percentiles is None:
        raise ConfigError("no request was served, or each had one token only: there is nothing to compare")
    return percentiles


if __name__ == "__main__":
    print(study(record="record" in sys.argv[1:]))
