"""Exercises: the intended answer passes, typical wrong ones get the right diagnosis, twins agree with the engine."""

import cmath
import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from minivllm_kernels.reference import paged_attention_twin

from minivllm.course.calculators import merge_softmax
from minivllm.course.exercises import exercises, find
from minivllm.course.exercises.claims import CLAIMS
from minivllm.course.exercises.exercise import CodeProblem, Part, Problem, Slip, draw, next_draw
from minivllm.course.exercises.nb01 import WORKLOADS
from minivllm.course.exercises.nb03 import BUGS, LINES, generate, toy_forward
from minivllm.course.exercises.nb05_code import append_slot, slot_mapping
from minivllm.course.exercises.nb06_code import gather, kv_head_of, masked_scores, merge, online_update
from minivllm.course.judge import diagnosis, judge
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.tables import slot_of
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError
from minivllm.events import EventBus
from minivllm.request import Request, SamplingParams

IDS = list(exercises())
SEEDS = [f"seed{i}" for i in range(6)]


def test_the_curriculum_s_exercises_are_there() -> None:
    per_notebook = {
        n: sum(id_.startswith(n) for id_ in IDS) for n in ("00", "01", "02", "03", "04", "05", "06", "09", "12")
    }
    assert per_notebook == {"00": 4, "01": 5, "02": 5, "03": 4, "04": 5, "05": 6, "06": 6, "09": 3, "12": 6}


@pytest.mark.parametrize("id_", IDS)
def test_the_intended_answer_passes(id_: str) -> None:
    for seed in SEEDS:
        problem = draw(find(id_), seed, {})
        intended = problem.reference if isinstance(problem, CodeProblem) else answers(problem)
        assert judge(problem, intended).state == "right", seed


@pytest.mark.parametrize("id_", IDS)
def test_five_typical_wrong_answers_get_their_diagnosis(id_: str) -> None:
    for seed in SEEDS:
        problem = draw(find(id_), seed, {})
        if isinstance(problem, CodeProblem):
            assert len(problem.slips) >= 5
            for slip in problem.slips:
                found = judge(problem, slip.answer)
                assert (found.state, found.slips) == ("wrong", (slip.name,)), seed
            continue
        for i, part in enumerate(problem.parts):
            assert len(part.slips) >= 5
            for slip in part.slips:
                given = [slip.answer if i == j else p.answer for j, p in enumerate(problem.parts)]
                found = judge(problem, given if len(given) > 1 else given[0])
                assert (found.state, found.slips) == ("wrong", (slip.name,)), (seed, part.answer, slip.answer)


@pytest.mark.parametrize("id_", IDS)
def test_every_slip_says_why_and_every_place_exists(id_: str) -> None:
    exercise, problem = find(id_), draw(find(id_), "s", {})
    slips = problem.slips if isinstance(problem, CodeProblem) else [s for part in problem.parts for s in part.slips]
    assert [slip.name for slip in slips if not slip.why] == []
    assert exercise.place.path.exists() and exercise.place.line > 0
    assert exercise.place.name.split(".")[-1] in exercise.place.source
    assert len(set(exercise.hints)) == 3


@pytest.mark.parametrize("id_", [id_ for id_ in IDS if not isinstance(draw(find(id_), "s", {}), CodeProblem)])
def test_learners_get_different_numbers_and_the_same_ones_again(id_: str) -> None:
    drawn = [draw(find(id_), str(seed), {}) for seed in range(12)]
    again = [draw(find(id_), str(seed), {}) for seed in range(12)]
    assert [questions(p) for p in drawn] == [questions(p) for p in again]
    assert len({questions(p) for p in drawn}) > 3 or id_ in ("02.2", "03.3")  # those have one question or three


@pytest.mark.parametrize("id_", IDS)
def test_no_two_slips_of_a_drawn_problem_give_the_same_answer(id_: str) -> None:
    problems = [draw(find(id_), str(seed), {}) for seed in range(40)]
    assert all(part.is_clear for problem in problems if isinstance(problem, Problem) for part in problem.parts)


def test_an_unknown_id_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"05\.1"):
        find("5.1")


def test_published_figures_come_out() -> None:
    """DeepSeek-V2's three savings: against MHA of its own shape, against 67B in bf16, and with a cache of 6 bits."""
    six_bits = next(p for p in drawn_problems("02.2") if "in 6 bits" in p.question)
    assert [round(float(str(part.answer)), 1) for part in six_bits.parts] == [98.2, 82.2, 93.3]


def test_append_slot_agrees_with_the_engine_s_block_manager() -> None:
    config = EngineConfig(num_blocks=30, block_size=4, max_model_len=64, enable_prefix_caching=False)
    kv = KVManager(config, EventBus())
    request = Request("a", list(range(40)), 40, SamplingParams(max_tokens=4), 4)
    table: list[int] = []
    free = list(kv.pool.free_ids())
    for num_tokens in range(40):
        slot = append_slot(table, num_tokens, 4, free)
        assert kv.grow(request, 1)
        assert table == request.block_ids and free == list(kv.pool.free_ids())
        assert slot == slot_of(num_tokens, request.block_ids, 4)
        request.num_computed += 1


def test_slot_mapping_is_where_the_runner_stores() -> None:
    assert slot_mapping([7, 1, 3], 30, 4, 16) == [1 * 16 + 14, 1 * 16 + 15, 3 * 16, 3 * 16 + 1]


def test_the_cached_loop_gives_the_tokens_of_the_loop_without_cache() -> None:
    prompt, num_new = [5, 7, 11], 6
    token_ids = list(prompt)
    for _ in range(num_new):
        token_ids.append(toy_forward(token_ids, [], 0))
    assert generate(toy_forward, prompt, num_new) == token_ids[3:]


def test_every_bug_changes_its_line() -> None:
    assert all(LINES[number - 1] != bug for number, bug in BUGS)


@pytest.mark.parametrize(("number", "bug"), BUGS)
def test_every_bug_changes_what_the_step_gives(number: int, bug: str) -> None:
    """RoPE is relative: a shift of all positions alike would change nothing, and be no bug."""
    right = decode_steps(LINES)
    assert decode_steps([bug if i == number else line for i, line in enumerate(LINES, 1)]) != pytest.approx(right)
    shifted = ["position = len(cache) + 1" if i == 2 else line for i, line in enumerate(LINES, 1)]
    assert decode_steps(shifted) == pytest.approx(right)


def decode_steps(lines: Sequence[str], num_steps: int = 6) -> list[float]:
    """Outputs of the six lines, run as they stand, on one head of two numbers, which RoPE turns by the position."""
    random = Random(0)
    rows = [[complex(random.gauss(0, 1), random.gauss(0, 1)) for _ in "qkv"] for _ in range(num_steps)]
    names: dict[str, object] = {
        "project": lambda hidden: rows[hidden],
        "rope": lambda x, position: x * cmath.exp(1j * position),
        "dot": lambda one, other: (one * other.conjugate()).real,
        "softmax": lambda scores: [math.exp(x) / sum(map(math.exp, scores)) for x in scores],
        "weighted_sum": lambda weights, values: sum(w * v for w, v in zip(weights, values, strict=True)),
        "scale": 2**-0.5, "cache": [],
    }  # fmt: skip
    outputs: list[float] = []
    for hidden in range(num_steps):
        names["hidden"] = hidden
        exec("\n".join(lines), names)
        out = names["out"]
        assert isinstance(out, complex)
        outputs += [out.real, out.imag]
    return outputs


def test_gib_is_no_answer_where_gb_are_asked_for() -> None:
    problem = draw(find("00.1"), "s", {})
    assert isinstance(problem, Problem)
    [part], gib = problem.parts, float(str(problem.given["gib"]))
    for given in (f"{gib} GiB", f"{gib * 1024} MiB", f"{gib} gib", f"{gib * 2**20} KiB."):
        found = judge(problem, given)
        unit = {"g": "GiB", "G": "GiB", "M": "MiB", "K": "KiB"}[given.split()[1][0]]
        assert (found.state, found.lines) == ("malformed", (f"That is still {unit}; convert it to GB.",))
    answer = float(str(part.answer))
    for right in (f"{answer:.3g}", f"{answer:.4g} GB", f"{answer * 1000} MB", f"{answer * 1e9:.0f} bytes"):
        assert judge(problem, right).state == "right", right


def test_1000_for_1024_and_dropped_digits_have_names() -> None:
    part = Part(592 * 1024, (), "bytes")
    problem = Problem("", (part,), ())
    assert judge(problem, "592 KiB").state == "right"
    assert judge(problem, "592 kB").slips == ("kB for KiB",)
    assert judge(problem, 592 * 1.024 * 1.024 * 1e3).slips == ("KiB for kB",)
    gb = Problem("", (Part(19.4, (), "GB"),), ())
    assert judge(gb, 19).slips == ("rounded too far",) and judge(gb, "19.4 GB").state == "right"
    assert judge(gb, 19.05).slips == ()


def test_a_diagnosis_is_two_sentences() -> None:
    assert diagnosis(Slip("null block counted", 1, "block 0 pads")) == "null block counted. Block 0 pads."
    assert diagnosis(Slip("twice", 1, "is it counted twice?")) == "twice. Is it counted twice?"
    assert diagnosis(Slip("n forgotten", 1, "n + 1 of them.")) == "n forgotten. n + 1 of them."
    assert diagnosis(Slip("alone", 1)) == "alone."


@pytest.mark.parametrize("id_", [id_ for id_ in IDS if id_ not in ("02.2", "03.3")])
def test_redrawing_gives_another_problem(id_: str) -> None:
    number, exercise = 0, find(id_)
    for _ in range(6):
        before, number = draw(exercise, f"example:{number}", {}), next_draw(exercise, "example", number)
        after = draw(exercise, f"example:{number}", {})
        if isinstance(before, CodeProblem) or isinstance(after, CodeProblem):
            continue
        told = [(p.question, [part.answer for part in p.parts]) for p in (before, after)]
        assert told[0] != told[1]
    assert next_draw(find("03.3"), "example", 4) == 5  # there is no other: its choices change places


def test_the_puzzles_together_are_the_kernel_s_attention() -> None:
    """Gather, mask, update, group and merge over two splits, against the twin that the Triton kernels are held to."""
    random, (heads, kv_heads, size, length, block_size, tile) = Random(0), (6, 2, 4, 21, 4, 5)
    table = random.sample(range(9), 6)
    torch.manual_seed(0)
    q = torch.randn(1, heads, size, dtype=torch.float64)
    k, v = (torch.randn(9, block_size, kv_heads, size, dtype=torch.float64) for _ in range(2))
    lengths, starts = torch.tensor([length]), torch.tensor([0, 1])
    wanted = paged_attention_twin(q, k, v, torch.tensor([table]), lengths, starts)
    for head in range(heads):
        kv_head = kv_head_of(head, heads, kv_heads)
        keys, values = (cache[:, :, kv_head].flatten(0, 1).tolist() for cache in (k, v))
        scaled = [x / math.sqrt(size) for x in q[0, head].tolist()]
        parts = []
        for begin, end in ((0, 10), (10, 24)):
            state: tuple[float, float, list[float]] = (-math.inf, 0.0, [0.0] * size)
            for start in range(begin, end, tile):
                rows = min(tile, end - start)
                k_tile, v_tile = (gather(cache, table, block_size, start, rows) for cache in (keys, values))
                scores = masked_scores(scaled, [list(row) for row in k_tile], start, length)
                state = online_update(*state, scores, v_tile)
            parts.append(state)
        assert merge(parts) == pytest.approx(wanted[0, head].tolist())


def test_only_decodes_that_are_launched_at_once_wait_for_bandwidth() -> None:
    """On an H200 a step of an 8B model took 22 ms as run and 5 ms as a graph: without one it is the host's."""
    for words, bound in WORKLOADS:
        if "decod" in words:
            assert bound == ("bandwidth" if "CUDA graph" in words and "no CUDA graph" not in words else "overhead")
    problem = drawn_problems("01.5")[0]
    answer = problem.parts[0].answer
    assert isinstance(answer, tuple)
    found = judge(problem, ["memory" if word == "bandwidth" else word for word in answer])
    assert found.slips == ("memory for bandwidth",)


def test_every_claim_names_its_source_and_is_clearly_wrong() -> None:
    for claim in CLAIMS:
        assert claim.source and claim.source in claim.conclusion
        assert max(claim.truth / claim.claimed, claim.claimed / claim.truth) > 1.4
    assert all(any(claim.source in problem.question for claim in CLAIMS) for problem in drawn_problems("02.5"))


def test_merging_agrees_with_the_calculator() -> None:
    parts = [(1.0, 2.0, 3.0), (-0.5, 1.5, -2.0), (2.5, 1.1, 0.4)]
    assert merge([(m, part, [o]) for m, part, o in parts]) == pytest.approx([float(merge_softmax(*parts))])


def test_facts_of_a_live_engine_replace_drawn_numbers() -> None:
    facts = {"num_blocks": 24, "block_size": 8, "kv_bytes_per_token": 46_080}
    problem = draw(find("00.2"), "s", facts)
    assert isinstance(problem, Problem) and problem.parts[0].answer == 23 * 8


def answers(problem: Problem) -> object:
    given = [part.answer for part in problem.parts]
    return given if len(given) > 1 else given[0]


def questions(problem: Problem | CodeProblem) -> str:
    assert isinstance(problem, Problem)
    return f"{problem.question} {[part.choices for part in problem.parts]}"


def drawn_problems(id_: str) -> list[Problem]:
    problems = [draw(find(id_), str(seed), {}) for seed in range(20)]
    return [problem for problem in problems if isinstance(problem, Problem)]
