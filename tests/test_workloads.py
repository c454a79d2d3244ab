"""Workloads: stated means and spreads, the same bytes for the same seed, sound dependencies, JSON there and back."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import exp, sqrt
from pathlib import Path
from random import Random
from statistics import fmean, pstdev

import pytest

from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.workloads import (
    Arrival,
    Lengths,
    Times,
    Workload,
    agents,
    all_at_once,
    alpaca_like,
    bursts,
    chats,
    closed_loop,
    few_shot,
    fixed,
    nano,
    open_loop,
    poisson,
    shared_prefix,
    sharegpt_like,
    uniform,
)

NUM = 20_000
SHORT = uniform(3, 9)
KINDS: dict[str, Callable[[int], Workload]] = {
    "open loop": lambda seed: open_loop(20, sharegpt_like(), poisson(2.0), seed=seed),
    "bursts": lambda seed: open_loop(20, alpaca_like(), bursts(2.0), seed=seed),
    "closed loop": lambda seed: closed_loop(3, 4, SHORT, 0.5, seed=seed),
    "chats": lambda seed: chats(3, 4, 16, SHORT, 0.25, poisson(1.0), seed=seed),
    "shared prefix": lambda seed: shared_prefix(6, 16, SHORT, num_prefixes=2, seed=seed),
    "few-shot": lambda seed: few_shot(6, (1, 5), 8, SHORT, seed=seed),
    "agents": lambda seed: agents(2, 3, 4, fixed(16, 8), SHORT, poisson(1.0), seed=seed),
    "nano": lambda seed: nano(4, seed=seed),
}


def gaps_s(times: Times, seed: int = 0) -> list[float]:
    arrivals = [0.0, *times.draw(Random(seed), NUM)]
    return [later - earlier for earlier, later in pairwise(arrivals)]


def drawn(lengths: Lengths) -> tuple[list[int], list[int]]:
    random = Random(1)
    pairs = [lengths.draw(random) for _ in range(NUM)]
    return [prompt for prompt, _ in pairs], [output for _, output in pairs]


def assert_mean(sample: list[int], mean: float) -> None:
    """Within 4 standard errors: an honest mean fails once in 16,000 seeds, and the seed is fixed."""
    assert abs(fmean(sample) - mean) < 4 * pstdev(sample) / sqrt(len(sample))


@pytest.mark.parametrize(
    ("lengths", "prompt_mean", "output_mean"),
    [
        (sharegpt_like(), 161.31, 337.99),
        (alpaca_like(), 19.31, 58.45),
        (sharegpt_like(max_total=640), 161.31, 337.99),  # much is clipped: without calibration it fails
        (sharegpt_like(max_total=256, scale=1 / 8), 161.31 / 8, 337.99 / 8),
        (uniform(100, 1024), 562, 562),
        (fixed(128, 64), 128, 64),
    ],
    ids=lambda value: value.name if isinstance(value, Lengths) else "",
)
def test_lengths_have_the_stated_means(lengths: Lengths, prompt_mean: float, output_mean: float) -> None:
    prompts, outputs = drawn(lengths)
    if lengths.name.startswith("fixed"):
        assert set(prompts) == {128} and set(outputs) == {64}
        return
    assert_mean(prompts, prompt_mean)
    assert_mean(outputs, output_mean)


@pytest.mark.parametrize("lengths", [sharegpt_like(), alpaca_like(), sharegpt_like(1024)], ids=lambda x: x.name)
def test_heavy_tails_stay_within_the_model_and_have_medians_below_their_means(lengths: Lengths) -> None:
    prompts, outputs = drawn(lengths)
    most = 1024 if "1024" in lengths.name else 2048
    assert min(prompts) >= 1 and min(outputs) >= 1
    assert max(p + o for p, o in zip(prompts, outputs, strict=True)) <= most
    for sample in (prompts, outputs):
        assert sorted(sample)[NUM // 2] < 0.9 * fmean(sample)


def test_sharegpt_outputs_have_the_spread_that_figure_2_of_the_paper_implies() -> None:
    """A request is resident in proportion to its output, so Orca (Max)'s reserved slots are E[o^2] / 2 E[o]."""
    _, outputs = drawn(sharegpt_like())
    reserved = fmean(output**2 for output in outputs) / fmean(outputs) / 2
    assert reserved == pytest.approx(0.133 / 0.911 * 2048, rel=0.03)


def test_poisson_gaps_are_exponential() -> None:
    """Mean and std within 4 standard errors (of an exponential's std: sqrt(2 / n)); Kolmogorov-Smirnov at 1 %."""
    gaps = sorted(gaps_s(poisson(4.0)))
    assert fmean(gaps) == pytest.approx(0.25, rel=4 / sqrt(NUM))
    assert pstdev(gaps) == pytest.approx(0.25, rel=4 * sqrt(2 / NUM))
    cdf = [1 - exp(-4.0 * gap) for gap in gaps]
    distance = max(max((i + 1) / NUM - c, c - i / NUM) for i, c in enumerate(cdf))
    assert distance < 1.63 / sqrt(NUM)


@pytest.mark.parametrize("burstiness", [0.1, 0.25, 1.0, 4.0])
def test_bursts_keep_the_rate_and_have_the_stated_burstiness(burstiness: float) -> None:
    """Gamma gaps: std / mean is 1 / sqrt(shape); its kurtosis 3 + 6 / shape sets the error of the std."""
    gaps = gaps_s(bursts(4.0, burstiness))
    spread = 1 / sqrt(burstiness)
    assert fmean(gaps) == pytest.approx(0.25, rel=4 * spread / sqrt(NUM))
    assert pstdev(gaps) == pytest.approx(0.25 * spread, rel=4 * sqrt((2 + 6 / burstiness) / NUM) / 2)


def test_all_at_once_is_all_at_time_0() -> None:
    assert {arrival.arrival_s for arrival in open_loop(5, SHORT, all_at_once()).arrivals} == {0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_and_another_differs(kind: str) -> None:
    assert KINDS[kind](7) == KINDS[kind](7)
    assert KINDS[kind](7).arrivals != KINDS[kind](8).arrivals


def test_a_seed_gives_the_same_bytes_in_another_process() -> None:
    """Seeds are strings inside: hash randomisation must not reach them."""
    code = "from minivllm.workloads import *; print(end=chats(2, 2, 8, sharegpt_like(), 0.1, poisson(3.0)).to_json())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == chats(2, 2, 8, sharegpt_like(), 0.1, poisson(3.0)).to_json()


def test_another_rate_leaves_lengths_and_tokens_alone() -> None:
    slow, fast = (open_loop(50, sharegpt_like(), poisson(rate)).arrivals for rate in (1.0, 10.0))
    assert [replace(arrival, arrival_s=0.0) for arrival in slow] == [
        replace(arrival, arrival_s=0.0) for arrival in fast
    ]
    assert slow[-1].arrival_s == pytest.approx(10 * fast[-1].arrival_s, rel=1e-4)


def test_times_lengths_and_tokens_are_drawn_apart() -> None:
    """From one stream, the first token would sit where the first gap sits: exponential and even by the same number."""
    (arrival,) = open_loop(1, fixed(1, 1), poisson(1.0)).arrivals
    assert abs(arrival.token_ids[0] - 10_000 * (1 - exp(-arrival.arrival_s))) > 2


def test_nano_equals_the_reference_workload_token_for_token() -> None:
    """The digest is that of the project's reference_workloads.nano(), which every engine is measured on."""
    arrivals = nano().arrivals
    plain = [[list(arrival.token_ids) for arrival in arrivals], [arrival.num_output for arrival in arrivals]]
    assert hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16] == "199c6f016a1bff73"


def test_tokens_come_from_the_whole_given_range_and_no_other() -> None:
    workload = open_loop(50, fixed(40, 1), vocab=range(100, 110))
    assert {token for arrival in workload.arrivals for token in arrival.token_ids} == set(range(100, 110))


def test_chat_turns_carry_their_own_words_and_count_the_history() -> None:
    workload = chats(2, 3, 100, fixed(10, 20), think_s=1.5)
    first, second, third, other = workload.arrivals[:4]
    assert len(first.token_ids) == 110 and first.after is None and not first.continues
    assert len(second.token_ids) == 10 and second.after == first.id and second.continues and second.think_s == 1.5
    assert third.after == second.id
    assert other.token_ids[:100] == first.token_ids[:100] and other.token_ids[100:] != first.token_ids[100:]
    assert list(workload.prompt_lengths().values()) == [110, 140, 170] * 2


def test_agents_fork_from_the_middle_of_the_roots_output() -> None:
    workload = agents(2, 3, 4, root=fixed(100, 8), branch=fixed(5, 30))
    root, *branches = workload.arrivals[:4]
    assert root.num_output == 8 and root.fork_of is None
    assert {(branch.fork_of, branch.fork_at, len(branch.token_ids)) for branch in branches} == {(root.id, 4, 5)}
    assert len({branch.token_ids for branch in branches}) == 3
    assert workload.prompt_lengths()[branches[0].id] == 100 + 4 + 5


def test_shared_prefixes_come_in_turn_and_few_shot_prefixes_nest() -> None:
    rows = shared_prefix(4, 50, fixed(10, 1), num_prefixes=2).arrivals
    assert rows[0].token_ids[:50] == rows[2].token_ids[:50] != rows[1].token_ids[:50] == rows[3].token_ids[:50]
    assert rows[0].token_ids[50:] != rows[2].token_ids[50:]
    one, five = few_shot(2, (1, 5), 68, fixed(9, 1)).arrivals
    assert len(one.token_ids) == 77 and len(five.token_ids) == 349
    assert one.token_ids[:68] == five.token_ids[:68]


@pytest.mark.parametrize("kind", KINDS)
def test_every_dependency_stands_above_and_ends_at_a_request_that_waits_for_nobody(kind: str) -> None:
    above: set[str] = set()
    for arrival in KINDS[kind](0).arrivals:
        assert {arrival.after, arrival.fork_of} - {None} <= above  # so there is no cycle
        above.add(arrival.id)


def test_a_closed_loop_is_one_chain_for_each_user() -> None:
    rows = closed_loop(3, 4, fixed(8, 8), think_s=2.0).arrivals
    assert [row.after for row in rows[:4]] == [None, "u0.0", "u0.1", "u0.2"]
    assert sum(row.after is None for row in rows) == 3
    assert {row.think_s for row in rows if row.after} == {2.0} and not any(row.continues for row in rows)


def test_summary_counts_history_and_own_tokens_apart() -> None:
    summary = chats(2, 3, 100, fixed(10, 20), arrivals=poisson(1.0)).summary()
    assert (summary.num_requests, summary.num_prompt_tokens, summary.num_own_tokens) == (6, 840, 260)
    assert (summary.num_output_tokens, summary.mean_prompt_tokens, summary.mean_output_tokens) == (120, 140, 20)
    assert summary.longest_tokens == 190 and summary.duration_s > 0
    assert Workload("nothing", 0, ()).summary().mean_output_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_json_there_and_back_changes_nothing(kind: str, tmp_path: Path) -> None:
    workload = KINDS[kind](0)
    path = workload.save(tmp_path / "deep" / "workload.json")
    assert Workload.load(path) == workload
    assert Workload.load(path).save(tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_json_keeps_priority_and_salt() -> None:
    workload = Workload("mine", 3, (Arrival("x", 0.5, (1, 2), 3, priority=-1, salt="tenant"),))
    assert Workload.from_json(workload.to_json()) == workload


GOOD = open_loop(2, fixed(2, 2)).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "", "not json", "[]", "3", "null", "{}", "[" * 100_000, '{"minivllm_trace":1}', '{"minivllm_workload":1}',
        GOOD.replace('"minivllm_workload":1', '"minivllm_workload":2'),
        GOOD.replace("token_ids", "tokens"),
        GOOD.replace('"r1"', '"r0"'),
        GOOD.replace('["r0",0.0', '["r0",NaN'),
        GOOD.replace('["r0",0.0', '["r0",9.0'),
        GOOD.replace('["r0",0.0,[', '["r0",0.0,[1.5,'),
        GOOD.replace('["r0",0.0,[', '["r0",0.0,["1",'),
        GOOD.replace('["r0",0.0,[', '["r0",0.0,[-1,'),
        GOOD.replace('["r0",0.0', '["r0",0.0,7'),
        GOOD.replace('["r0"', "[{}"),
        GOOD.replace("null,0.0,false,null,null]", '"r9",0.0,false,null,null]'),
        GOOD[:-20],
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    assert text != GOOD
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(MiniVLLMError) as caught:
        Workload.load(path)
    message = str(caught.value)
    assert "not a minivllm workload" in message and str(path) in message and "\n" not in message
    assert len(message) < 300 + len(str(path))


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(MiniVLLMError, match="cannot read the workload"):
            Workload.load(path)
    with pytest.raises(MiniVLLMError, match="cannot save the workload"):
        open_loop(1, SHORT).save(tmp_path / "binary" / "below_a_file.json")


ROW = Arrival("x", 0.0, (1,), 5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: poisson(0), "rate_per_s must be a number above 0, not 0"),
        (lambda: poisson(float("nan")), "rate_per_s must be"),
        (lambda: bursts(1.0, -1), "burstiness must be"),
        (lambda: fixed(0, 1), "num_prompt must be an integer of at least 1, not 0"),
        (lambda: fixed(1, True), "num_output must be"),
        (lambda: uniform(5, 4), "most must be an integer of at least 5, not 4"),
        (lambda: sharegpt_like(max_total=512), "change scale or max_total"),
        (lambda: alpaca_like(scale=0.01), "change scale or max_total"),
        (lambda: sharegpt_like(max_total=10**7), "max_total must be at most"),
        (lambda: sharegpt_like(scale=0), "scale must be"),
        (lambda: open_loop(0, SHORT), "num_requests must be an integer of at least 1, not 0"),
        (lambda: open_loop(1, sharegpt_like), "lengths must be fixed(128, 64)"),  # type: ignore[arg-type]
        (lambda: open_loop(1, SHORT, poisson), "arrivals must be poisson(2.0)"),  # type: ignore[arg-type]
        (lambda: open_loop(1, SHORT, seed=1.5), "seed must be an integer, not 1.5"),  # type: ignore[arg-type]
        (lambda: open_loop(1, SHORT, vocab=range(0)), "vocab must be a range of token ids"),
        (lambda: open_loop(1, SHORT, vocab=range(-1, 5)), "vocab must be a range of token ids"),
        (lambda: closed_loop(0, 1, SHORT), "num_users must be"),
        (lambda: closed_loop(1, 0, SHORT), "requests_per_user must be"),
        (lambda: closed_loop(1, 1, SHORT, think_s=-1), "think_s must be a number of seconds, 0 or more, not -1"),
        (lambda: chats(0, 1, 0, SHORT), "num_chats must be"),
        (lambda: chats(1, 0, 0, SHORT), "num_turns must be"),
        (lambda: chats(1, 1, -1, SHORT), "system_tokens must be"),
        (lambda: chats(1, 1, 1, SHORT, "slow"), "think_s must be"),  # type: ignore[arg-type]
        (lambda: shared_prefix(1, 0, SHORT), "prefix_tokens must be"),
        (lambda: shared_prefix(1, 1, SHORT, num_prefixes=0), "num_prefixes must be"),
        (lambda: few_shot(1, (), 1, SHORT), "shots must list"),
        (lambda: few_shot(1, (-1,), 1, SHORT), "shots must be"),
        (lambda: few_shot(1, (1,), 0, SHORT), "example_tokens must be"),
        (lambda: agents(0, 1, 1, SHORT, SHORT), "num_agents must be"),
        (lambda: agents(1, 0, 1, SHORT, SHORT), "num_branches must be"),
        (lambda: agents(1, 1, 0, SHORT, SHORT), "fork_at must be"),
        (lambda: agents(1, 1, 8, fixed(4, 8), SHORT), "fork_at must be below num_output of a0"),
        (lambda: nano(0), "num_requests must be"),
        (lambda: nano(1, 9, 8), "most must be"),
        (lambda: replace(ROW, id=""), "id must be"),
        (lambda: replace(ROW, id="two\nlines"), "id must be a non-empty string of one line"),
        (lambda: Workload("w", 0, (replace(ROW, after=""),)), "must stand above it"),
        (lambda: replace(ROW, token_ids=()), "give the prompt at least one token"),
        (lambda: replace(ROW, token_ids=[1]), "token_ids must be a tuple"),  # type: ignore[arg-type]
        (lambda: replace(ROW, num_output=0), "num_output must be"),
        (lambda: replace(ROW, priority=0.5), "priority must be"),  # type: ignore[arg-type]
        (lambda: replace(ROW, after=3), "after and fork_of must be"),  # type: ignore[arg-type]
        (lambda: replace(ROW, after="y", fork_of="y", fork_at=1), "not both"),
        (lambda: replace(ROW, fork_at=1), "go together"),
        (lambda: replace(ROW, continues=True), "need the id of the request before"),
        (lambda: Workload("w", 0, (ROW, ROW)), "two requests have this id"),
        (lambda: Workload("w", 0, (replace(ROW, after="z"),)), "waits for 'z', which must stand above it"),
        (lambda: Workload("w", 0, (replace(ROW, after="x"),)), "waits for 'x', which must stand above it"),
        (lambda: Workload("w", 0, (replace(ROW, arrival_s=1.0), replace(ROW, id="y"))), "sort by arrival_s"),
        (lambda: Workload("w", 0, [ROW]), "must be a tuple of Arrival"),  # type: ignore[arg-type]
        (lambda: Workload("w", "0", ()), "its seed an integer"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_line(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_workloads_need_no_torch() -> None:
    probe = "import sys, minivllm.workloads; print({'torch', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
