"""The question bank: every stem is there, every number is worked out again, every slip is told by its name."""

import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from minivllm.course import question_bank
from minivllm.course.answer_units import parsed
from minivllm.course.calculators import Worked, accelerators, kv_bytes_per_token, public_models
from minivllm.course.exercises.exercise import CodeProblem, Exercise, draw
from minivllm.course.numeric_forms import Problem, Slip, all_slips, clashes, drawn, grade, written
from minivllm.course.question_facts import LONE, UNIT, evaluate, problems_with_numbers
from minivllm.course.questions import FORMS, LEVELS, Question, groups, problem_of, question, questions
from minivllm.course.questions.question import Link, read_group
from minivllm.course.slips import EXPLANATIONS
from minivllm.errors import ConfigError, MiniVLLMError

SEEDS = [str(seed) for seed in range(40)]


def test_the_linter_finds_nothing() -> None:
    assert question_bank.lint() == []


def test_every_level_but_design_has_questions_in_most_groups() -> None:
    for level in LEVELS[1:3]:
        assert sum(any(q.level == level for q in group.questions) for group in groups().values()) >= 8
    assert [q.id for q in questions().values() if q.level == "design"] == ["C13"]


def test_numbers_of_the_seed_questions_are_placed_once() -> None:
    numbers = [number for q in questions().values() for number in q.seed]
    assert len(numbers) == len(set(numbers)) and set(numbers) <= set(range(1, 61))


# --- numeric forms


@pytest.mark.parametrize("question_id", FORMS)
def test_the_intended_answer_passes_and_each_slip_is_named(question_id: str) -> None:
    for seed in SEEDS:
        problem = problem_of(question_id, seed)
        assert grade(problem, written(problem, float(problem.truth))).is_right
        for slip in problem.slips:
            verdict = grade(problem, written(problem, slip.value))
            assert (verdict.is_right, verdict.slip) == (False, slip.name), (problem.ask, slip)
            assert slip.why in verdict.says


@pytest.mark.parametrize("question_id", FORMS)
def test_answers_of_four_digits_are_told_apart_as_well(question_id: str) -> None:
    for seed in SEEDS:
        problem = problem_of(question_id, seed)
        if problem.tolerance:
            assert grade(problem, _rounded(problem, float(problem.truth))).is_right
        for slip in problem.slips:
            assert grade(problem, _rounded(problem, slip.value)).slip == slip.name


def _rounded(problem: Problem, value: float) -> str:
    """As people write it: four digits, then the unit."""
    number, _, unit = written(problem, value).partition(" ")
    return f"{float(f'{float(number):.4g}'):.10f} {unit}"


@pytest.mark.parametrize("question_id", FORMS)
def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(question_id: str) -> None:
    asked = [problem_of(question_id, seed).ask for seed in SEEDS]
    assert asked == [problem_of(question_id, seed).ask for seed in SEEDS]
    assert len(set(asked)) >= 5


def test_every_explained_slip_is_one_line() -> None:
    assert [name for name, why in EXPLANATIONS.items() if "\n" in why or len(why) > 110 or not why.endswith(".")] == []


def test_the_linter_finds_a_slip_that_equals_the_truth() -> None:
    def form(random: Random) -> Problem:
        tokens = random.choice([16, 32, 48, 50])  # three of four divide by the block size
        return Problem("?", "blocks", Worked(-(-tokens // 16), "blocks", ("",)), (Slip("rounded down", tokens // 16),))

    found = question_bank.problems_with_form("X1", form)
    assert len(found) == 1 and "X1: the truth = rounded down" in found[0]
    assert drawn(form, "1").slips[0].value == 3  # 50 tokens: the only draw that tells them apart


def test_the_linter_finds_a_slip_without_explanation_and_a_form_that_never_works() -> None:
    def form(random: Random) -> Problem:
        return Problem("?", "blocks", Worked(2, "blocks", ("",)), (Slip("no such slip", 3), Slip("rounded down", 2)))

    assert "'no such slip' has no explanation" in question_bank.problems_with_form("X1", form)[0]
    with pytest.raises(AssertionError, match="cannot be told apart"):
        drawn(form, "1")


# --- units: 1.25 GB, asked for in GB

GB = Problem("?", "GB", Worked(1_250_000_000, "bytes", ("= 1.25 GB",)), (Slip("query heads", 5_000_000_000),))
KIB = Problem("?", "bytes", Worked(131_072, "bytes/token", ("= 131,072 bytes",)), ())


@pytest.mark.parametrize(
    "text", ["1.25", "1.25 GB", "1250 MB", "1,250,000,000 B", "1.164 GiB", "10 Gbit", "1.25e9 bytes"]
)
def test_the_truth_passes_in_any_unit_of_its_kind(text: str) -> None:
    assert grade(GB, text).is_right


@pytest.mark.parametrize("text", ["131072", "131,072 bytes", "128 KiB", "131.1 kB", "128 KB", "131 KB", "0.125 MiB"])
def test_kb_means_either_and_the_verdict_says_which(text: str) -> None:
    verdict = grade(KIB, text)
    assert verdict.is_right
    assert ("1024 bytes" in verdict.says) == (text == "128 KB")


@pytest.mark.parametrize(
    ("problem", "text", "slip"),
    [
        (GB, "1.164", "GiB for GB"),
        (GB, "1.164 GB", "GiB for GB"),
        (GB, "1.25 GiB", "GB for GiB"),
        (GB, "10 GB", "bits for bytes"),
        (GB, "1250", "unit left out"),
        (GB, "5 GB", "query heads"),
        (KIB, "1048576", "bits for bytes"),
        (KIB, "128", "unit left out"),
        (KIB, "131 KiB", "kB for KiB"),
        (KIB, "128 kB", "KiB for kB"),
    ],
)
def test_mistakes_of_units_are_named(problem: Problem, text: str, slip: str) -> None:
    assert grade(problem, text).slip == slip


@pytest.mark.parametrize(
    "text", ["", "many", "1,25", "1.2.3", "5 ms", "5 apples", "nan", "1e999", "1 2", "9" * 100, "--1"]
)
def test_what_is_no_answer_costs_no_try(text: str) -> None:
    verdict = grade(GB, text)
    assert not verdict.is_right and (not verdict.is_answer or text == "1e999")


def test_a_wrong_answer_without_a_known_slip_is_told_its_factor() -> None:
    assert grade(GB, "3.75 GB").says.startswith("Not yet: too large by a factor of 3")
    assert grade(GB, "-3 GB").says.startswith("Not yet")


def test_unit_slips_give_way_to_a_forms_own() -> None:
    both = Problem("?", "bytes", Worked(1000, "bytes", ("",)), (Slip("query heads", 8000),))
    assert [s.name for s in all_slips(both) if s.value == 8000] == ["query heads"]
    assert clashes(both) == []


def test_numbers_are_read_as_people_write_them() -> None:
    given = parsed(" ~1,234.5 MiB ")
    assert given is not None and (given.number, given.unit) == (1234.5, "MiB")


# --- the bank as data


def test_the_linter_finds_a_wrong_number_a_stray_one_and_one_that_nobody_vouches_for() -> None:
    asked = Question(
        "A2", "apply", "Is it 327,681 bytes?", ("It is 4,097.", "No."), "Why?", "So.", "us", (),
        numbers=("327,681 = kv_bytes_per_token('llama-2-70b')", "55 = 54 + 1"),
    )  # fmt: skip
    found = "\n".join(problems_with_numbers(asked))
    assert "says 327,681" in found and "gives 327680" in found
    assert "'55' stands in numbers, but not in the text" in found and "4,097" in found


def with_texts(answer: str, *numbers: str) -> Question:
    return Question("A2", "apply", "?", ("Yes.", "No."), "Why?", answer, "us", (), numbers=numbers)


@pytest.mark.parametrize(
    "told",
    ["16 MiB", "13 empty slots", "which is 9 blocks", "5%", "5 %", "3x as fast", "3× as fast", "8 times", "4 ms",
     "2 GB/s", "10 requests/s", "7 kB", "1 token", "8 KV heads", "table[2] = 3"],
)  # fmt: skip
def test_a_small_number_with_a_unit_or_after_equals_needs_an_entry(told: str) -> None:
    [found] = problems_with_numbers(with_texts(f"It is so: {told}."))
    assert "nobody says where" in found


def test_a_repeated_number_is_complained_of_once() -> None:
    assert len(list(problems_with_numbers(with_texts("9 GiB here, 9 GiB there, 4,097 and 4,097.")))) == 2


@pytest.mark.parametrize(
    "told", ["Group 12 of 16.", "2 × layers × heads", "2 B D F FLOPs", "n (n + 1) / 2 token-forwards"]
)
def test_small_numbers_of_formulas_and_lists_need_none(told: str) -> None:
    assert list(problems_with_numbers(with_texts(told))) == []


def test_an_entry_with_a_unit_speaks_for_that_unit_only() -> None:
    assert list(problems_with_numbers(with_texts("16 tokens take 16 MiB.", "16 tokens: a block"))) == [
        "A2: nobody says where 16 MiB comes from; add it to numbers"
    ]
    assert list(problems_with_numbers(with_texts("It holds 109 blocks.", "109: us", "9 blocks: us"))) == [
        "A2: '9 blocks' stands in numbers, but not in the text"
    ]


@pytest.mark.parametrize("id_", questions())
def test_each_number_with_a_unit_that_is_changed_in_the_bank_is_noticed(id_: str) -> None:
    """A digit is changed in one place of one text at a time."""
    asked = questions()[id_]
    for i, text in enumerate(asked.texts):
        for match in LONE.finditer(text):
            if UNIT.match(text, match.end()):
                wrong = f"{text[: match.end() - 1]}{(int(text[match.end() - 1]) + 3) % 10}{text[match.end() :]}"
                stem, *points, follow_up, answer = (wrong if i == j else told for j, told in enumerate(asked.texts))
                mutant = replace(asked, stem=stem, points=tuple(points), follow_up=follow_up, answer=answer)
                assert list(problems_with_numbers(mutant)), wrong


@pytest.mark.parametrize("expression", ["__import__('os')", "open('x')", "1 if 1 else 2", "(1).real", "2 +"])
def test_facts_reach_nothing_but_calculators(expression: str) -> None:
    with pytest.raises(MiniVLLMError):
        evaluate(expression)


def test_facts_may_combine_calculators() -> None:
    assert evaluate("kv_bytes_per_token('llama-3-8b') * 2 ** 3") == float(kv_bytes_per_token("llama-3-8b")) * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "2A"}, "must be a letter and a number"),
        ({"level": "hard"}, "level must be one of recall"),
        ({"points": ("one",)}, "two to six key points"),
        ({"answer": " "}, "answer is empty"),
    ],
)
def test_a_question_that_lacks_something_is_refused(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "id": "A2", "level": "apply", "stem": "?", "points": ("a", "b"), "follow_up": "?", "answer": "a", "source": "s",
        "links": (Link("a", "b"),),
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        Question(**{**fields, **change})  # type: ignore[arg-type]


def test_the_examples_of_contributing_are_a_good_question_and_a_good_exercise(tmp_path: Path) -> None:
    text = (question_bank.ROOT / "CONTRIBUTING.md").read_text()
    examples = dict(re.findall(r"```(toml|python)\n((?:\[\[question|from random).*?)```", text, re.DOTALL))
    path = tmp_path / "c.toml"
    path.write_text(f'letter = "C"\ntitle = ""\n{examples["toml"]}')
    [asked] = read_group(path).questions
    assert [*problems_with_numbers(asked), *question_bank._broken_links(asked)] == []
    names: dict[str, Any] = {}
    exec(examples["python"], names)
    exercise: Exercise = names["EXERCISES"][0]
    problem = draw(exercise, "s", {})
    assert not isinstance(problem, CodeProblem)
    [part] = problem.parts
    assert part.is_clear and len(part.slips) == 5 and all(slip.why for slip in part.slips)
    assert exercise.place.line > 0


def test_a_file_that_is_no_group_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    for text, message in (("= 1", "x.toml"), ('letter = "A"\n[[question]]\nid = "A1"', "unknown or missing")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_group(path)


def test_unknown_ids_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="no question is called 'Z9'"):
        question("Z9")
    with pytest.raises(ConfigError, match="has no numeric form"):
        problem_of("A8", "1")


def test_forms_draw_from_models_and_chips_that_there_are() -> None:
    asked = " ".join(problem_of(question_id, seed).ask for question_id in FORMS for seed in SEEDS)
    assert sum(name in asked for name in public_models()) >= 20
    assert sum(name in asked for name in accelerators()) >= 5
