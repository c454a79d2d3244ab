"""A round in plain Python, the lab's test, records and floors of speculation: each against something else."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.course.calculators import break_even_batch, critical_batch, expected_tokens, output_distribution, speedup
from minivllm.course.exercises.nb12_code import judge
from minivllm.course.speculation import Verification, drafts_of, judge_round, last_gain, normalised, token_at
from minivllm.course.speculation_records import (
    RECORDING,
    Positions,
    SpeedRow,
    SpeedRuns,
    Trial,
    chi_square,
    chi_square_p,
    positions_of,
)
from minivllm.course.speculation_rounds import RealRound
from minivllm.draft_events import DraftJudged
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.losslessness import DRAFTER, RULES, TARGET, Rule, trial, trials
from minivllm.lab.speculation_rounds import real_rounds
from minivllm.speculative.proposer import Draft
from minivllm.speculative.verify import accept_or_resample, uniform, verify

P, Q = (0.4, 0.3, 0.2, 0.1), (0.5, 0.1, 0.1, 0.3)


class Fixed:
    """A target with the same row everywhere, for the engine's verify."""

    def __init__(self, seed: int) -> None:
        self.seed, self.num_tokens = seed, 7

    def probs(self, accepted: object) -> torch.Tensor:
        return torch.tensor(P, dtype=torch.float64)

    def choose(self, accepted: object) -> int:
        return 0


def test_the_engines_verify_accepts_the_same_head() -> None:
    """With the engine's own u at each place, for many seeds; what comes after differs only in how it is drawn."""
    q = torch.tensor([Q] * 3, dtype=torch.float64)
    lengths = set()
    for seed in range(300):
        random = Random(seed)
        drafts = drafts_of([Q] * 3, [random.random() for _ in range(3)])
        ours = judge_round([P] * 4, [Q] * 3, drafts, [uniform(seed, 7 + i) for i in range(3)], 0.5)
        theirs = verify(Draft(list(drafts), q), Fixed(seed))
        assert len(theirs) == len(ours.token_ids) and theirs[:-1] == list(ours.token_ids[:-1])
        if not ours.is_complete:
            assert ours.last_row[theirs[-1]] > 0  # drawn from the same residual
        lengths.add(len(theirs))
    assert lengths == {1, 2, 3, 4}


def test_the_engines_rule_and_the_lab_s_give_the_closed_form() -> None:
    p, q = torch.tensor(P, dtype=torch.float64), torch.tensor(Q, dtype=torch.float64)
    counts = Counter(accept_or_resample(p, q, token_at(Q, uniform(seed, 1)), seed, 2) for seed in range(4000))
    wanted = output_distribution(P, Q).value
    assert isinstance(wanted, tuple) and wanted == pytest.approx(P)
    assert chi_square_p(chi_square([counts[i] for i in range(4)], P), 3) > 0.01


def test_a_round_stops_at_the_first_rejected_draft_and_gains_one() -> None:
    one = judge_round([P] * 4, [Q] * 3, [1, 3, 0], [0.99, 0.5, 0.0], 0.9)
    assert [judged.chance for judged in one.judged] == [1.0, pytest.approx(1 / 3)]
    assert (one.num_accepted, one.is_complete) == (1, False)
    assert one.last_row == pytest.approx((0, 2 / 3, 1 / 3, 0)) and one.token_ids == (1, 2)
    whole = judge_round([P] * 3, [Q] * 2, [1, 2], [0.5, 0.5], 0.95)
    assert whole.is_complete and whole.last_row == P and whole.token_ids == (1, 2, 3)


def test_mean_tokens_of_many_rounds_are_the_closed_form() -> None:
    random, num, gamma = Random(3), 20_000, 4
    total = 0
    for _ in range(num):
        drafts = drafts_of([Q] * gamma, [random.random() for _ in range(gamma)])
        numbers = [random.random() for _ in range(gamma)]
        total += len(judge_round([P] * (gamma + 1), [Q] * gamma, drafts, numbers, 0.1).token_ids)
    assert total / num == pytest.approx(float(expected_tokens(0.7, gamma)), rel=0.01)


@pytest.mark.parametrize(
    ("targets", "drafters", "drafts", "numbers"),
    [([P], [Q], [0], [0.1]), ([P, P], [Q], [0], []), ([P, P], [(0, 0.5, 0.5, 0)], [0], [0.1]),
     ([P, (1, 1)], [Q], [0], [0.1])],
)  # fmt: skip
def test_a_round_that_cannot_be_is_one_line(targets: list, drafters: list, drafts: list, numbers: list) -> None:
    with pytest.raises(ConfigError) as error:
        judge_round(targets, drafters, drafts, numbers, 0.5)
    assert "\n" not in str(error.value)


def test_weights_become_chances() -> None:
    assert normalised((2, 1, 1, 0)) == (0.5, 0.25, 0.25, 0)
    for wrong in ((0, 0), (1, -1)):
        with pytest.raises(ConfigError):
            normalised(wrong)


# --- floors


def test_a_gain_at_small_batch_is_the_closed_form_and_turns_into_a_loss() -> None:
    """N63: the sign must flip; published 1.5 times as fast at low load, 1.4 times slower at high load."""
    load = Verification("llama-3-70b", "h100-sxm", 1, 4, 256)
    assert load.verify_ms == pytest.approx(load.plain_ms, rel=0.001)
    assert (
        load.speedup(0.7, 0.1) == pytest.approx(float(speedup(0.7, 4, 0.1)), rel=0.001) and load.speedup(0.7, 0.1) > 1.5
    )
    busy = Verification("llama-3-70b", "h100-sxm", 512, 4, 256)
    assert busy.speedup(0.7, 0.1) < 1 / 1.4
    limit = last_gain(load, 0.7, 0.1)
    free = int(break_even_batch(4, critical_batch("h100-sxm")))
    assert free == 59 < limit < 512
    ends = [Verification("llama-3-70b", "h100-sxm", batch, 4, 256).speedup(0.7, 0.1) for batch in (limit, limit + 1)]
    assert ends[0] > 1 >= ends[1]


def test_long_contexts_keep_the_gain() -> None:
    assert last_gain(Verification("llama-3-8b", "h100-sxm", 1, 4, 32768), 0.7, 0.05) == 4096
    assert last_gain(Verification("llama-3-8b", "h100-sxm", 1, 4, 64), 0.2, 0.9) == 0


# --- the lab


def test_every_broken_rule_is_detected_and_the_published_one_passes() -> None:
    found = trials()
    assert [t.name for t in found] == list(RULES)
    assert found[0].p_value(100_000) > 0.01 and found[0].total_variation(100_000) < 0.01
    for broken in found[1:]:
        assert broken.p_value(100_000) < 1e-6 and broken.total_variation(100_000) > 0.05, broken.name
    weak = [t.name for t in found[1:] if t.p_value(100) > 0.01]
    assert weak == ["replace from p"]  # a test without power lets it pass


def test_the_published_rule_passes_with_other_seeds() -> None:
    p_values = [trial(Rule(), seed=seed, num_samples=20_000).p_value(20_000) for seed in range(1, 21)]
    assert sum(p < 0.01 for p in p_values) <= 1 and max(p_values) > 0.5 and min(p_values) < 0.5


def test_chances_of_pairs_are_those_of_the_chain() -> None:
    found = trial(Rule(), num_samples=1000)
    assert sum(found.expected) == pytest.approx(1) and len(found.outcomes) == 16
    assert found.expected[found.outcomes.index("BD")] == pytest.approx(TARGET[0][1] * TARGET[1][3])
    assert np.allclose(TARGET.sum(1), 1) and np.allclose(DRAFTER.sum(1), 1)
    assert sum(found.counts[1000]) == 1000 and sum(found.counts[100]) == 100


@pytest.mark.parametrize(
    "rule",
    [Rule(accept=lambda p, q: 1), Rule(residual=lambda p, q: p / 0), Rule(extra=lambda p, q: p[9]),
     Rule(accept=lambda p: p)],
)  # fmt: skip
def test_a_rule_that_is_none_is_one_line(rule: Rule) -> None:
    with pytest.raises(MiniVLLMError, match="yours: "), np.errstate(all="ignore"):
        trial(rule, num_samples=100)


@pytest.mark.parametrize(("statistic", "degrees"), [(6.63, 1), (30.0, 15), (5.0, 15), (100.0, 15), (0.1, 3), (14.0, 7)])
def test_p_values_are_torch_s_incomplete_gamma(statistic: float, degrees: int) -> None:
    a, x = (torch.tensor(v / 2, dtype=torch.float64) for v in (degrees, statistic))
    assert chi_square_p(statistic, degrees) == pytest.approx(float(torch.special.gammaincc(a, x)), rel=1e-9)


def test_edges_of_the_test() -> None:
    assert chi_square_p(0, 3) == 1 and chi_square_p(1e9, 3) == 0
    assert chi_square([50, 50], [0.5, 0.5]) == 0 and chi_square([99, 1], [1.0, 0.0]) == float("inf")
    assert Trial("x", ("A", "B"), (1.0, 0.0), {2: (1, 1)}).total_variation(2) == 0.5


def test_the_learners_rule_of_the_exercise_gives_p() -> None:
    """Its rows, weighted by q and by u, sum to p."""
    steps = 2000
    total = np.zeros(4)
    for draft in range(4):
        rows = [judge(list(P), list(Q), draft, (i + 0.5) / steps) for i in range(steps)]
        total += Q[draft] * np.mean(rows, axis=0)
    assert total == pytest.approx(P, abs=2e-3)


# --- counts by position


def test_positions_count_what_was_judged() -> None:
    judged = [
        DraftJudged(1, "a", "ngram", (1, 2, 3), 3), DraftJudged(2, "a", "ngram", (1, 2, 3), 1),
        DraftJudged(2, "b", "eagle", (1,), 0), DraftJudged(3, "a", "ngram", (1, 2), 0),
        DraftJudged(4, "a", "ngram", (), 0),
    ]  # fmt: skip
    ngram, eagle = positions_of(judged)
    assert (ngram.reached, ngram.accepted, ngram.num_rounds) == ((3, 2, 1), (2, 1, 1), 3)
    assert ngram.alpha == 4 / 6 and ngram.rates == [2 / 3, 1 / 2, 1] and ngram.mean_length == pytest.approx(1 + 4 / 3)
    assert (eagle.method, eagle.alpha, eagle.mean_length) == ("eagle", 0, 1)
    with pytest.raises(MiniVLLMError):
        Positions("x", (2,), (3,), 2)
    with pytest.raises(MiniVLLMError):
        Positions("x", (2, 2), (1, 2), 2)


@pytest.mark.filterwarnings("ignore")
def test_counts_and_rounds_of_a_live_engine_agree_with_its_counters() -> None:
    llm = LLM("smollm2-135m", load_format="dummy", num_blocks=64, max_model_len=256, show_progress=False,
              speculative_config={"method": "ngram", "num_speculative_tokens": 3})  # fmt: skip
    prompt, params = (
        "one two three one two three one two three",
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    )
    rounds = real_rounds(llm, prompt, params, most=100)
    stats = llm.engine.speculation
    assert len(rounds) == stats.num_rounds > 0
    assert sum(one.num_accepted for one in rounds) == stats.num_accepted
    assert sum(len(one.drafts) for one in rounds) == stats.num_drafted
    with llm.record() as trace:
        llm.generate([prompt], params, use_tqdm=False)
    [found] = positions_of(trace.of(DraftJudged))  # type: ignore[arg-type]
    assert [2 * n for n in found.accepted] == stats.accepted_by_position[: len(found.accepted)]
    assert found.mean_length == pytest.approx(stats.mean_accepted_length)
    for one in rounds:
        for text, (place, chosen) in zip(one.drafts, zip(one.tops, one.chosen, strict=True), strict=False):
            if text == place[chosen][0]:
                assert 0 < place[chosen][1] <= 1
    with pytest.raises(ConfigError, match="no round"):
        real_rounds(llm, prompt, SamplingParams(temperature=0, max_tokens=4, speculative_method="off"))


def test_a_round_that_gave_more_than_it_drafted_is_refused() -> None:
    with pytest.raises(MiniVLLMError):
        RealRound("ngram", 1, ("a",), 2, "b", ((),) * 3, (0,) * 3)
    with pytest.raises(MiniVLLMError):
        RealRound("ngram", 1, ("a",), 1, "b", ((),), (0,))


# --- recorded speed-ups


ROW = {"model": "qwen3-8b", "batch": 8, "draft_length": 4, "planted_alpha": 0.8, "method": "planted",
       "tokens_per_s_on": 300.0, "tokens_per_s_off": 150.0, "speedup": 2.0, "formula_speedup": 2.2}  # fmt: skip


def test_speed_ups_are_read_and_a_wrong_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    path.write_text(
        json.dumps({"provenance": {"gpu": "NVIDIA H200", "commit": "c"}, "rows": [ROW | {"batch": 64}, ROW]})
    )
    runs = SpeedRuns.load(path)
    assert [row.batch for row in runs.series()["qwen3-8b, planted, 4 drafts, α 0.8"]] == [8, 64]
    assert "NVIDIA H200, commit c" in runs.origin
    for wrong in ("{", json.dumps({"rows": []}), json.dumps({"provenance": {}, "rows": [{"model": "x"}]}),
                  json.dumps({"provenance": {}, "rows": [ROW | {"speedup": 3.0}]})):  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(MiniVLLMError) as error:
            SpeedRuns.load(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert "no run is recorded" in SpeedRuns(()).origin


def test_what_the_package_holds_is_whole() -> None:
    runs = SpeedRuns.recorded()
    assert bool(runs.rows) == RECORDING.exists()
    for row in runs.rows:
        assert isinstance(row, SpeedRow) and row.batch > 0 and row.formula_speedup > 0
    if runs.rows:
        assert {"gpu", "commit", "command"} <= set(runs.facts)
