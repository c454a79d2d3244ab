"""The diagnostic and the unit drill: right answers are the calculators', wrong ones are named, answers are kept."""

import json
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

from minivllm.course import diagnostic as test
from minivllm.course.answer_units import in_unit, parsed, readings
from minivllm.course.diagnostic import ORDER, STARTS, WORDS, Diagnostic, Score, advice, weakest
from minivllm.course.numeric_forms import grade
from minivllm.course.progress import ProgressFile
from minivllm.course.question_facts import PRINTED, evaluate
from minivllm.course.questions import groups, problem_of, questions
from minivllm.course.records import Kept
from minivllm.course.unit_drill import EXCESS, MEMORY, TOPICS, drill, published
from minivllm.errors import MiniVLLMError

SEEDS = ("example", "1", "2", "3", "4", "5")


def diagnostic(seed: str = "example") -> Diagnostic:
    return Diagnostic(Kept(seed))


def letter_of(of: Diagnostic, item_id: str, *, is_right: bool) -> str:
    """The letter of the right answer, or of the first wrong one."""
    question = of.item(item_id).question
    return next(letter for letter, _ in question.lettered() if question.by_letter(letter).is_right is is_right)


def answered(right: str, seed: str = "example") -> Diagnostic:
    """All twenty answered: right in the groups that are named."""
    made = diagnostic(seed)
    for item in made.items:
        made.hand_in(item.id, letter_of(made, item.id, is_right=item.group in right))
    return made


def test_twenty_questions_of_the_bank_cover_all_its_groups_twice() -> None:
    assert len(ORDER) == len(set(ORDER)) == 20
    assert set(ORDER) <= set(questions())
    counts = Counter(item_id[0] for item_id in ORDER)
    assert set(counts) == set(groups()) == set(STARTS) and min(counts.values()) == 2
    assert len({item_id[0] for item_id in ORDER[:10]}) == 10  # the first ten touch every subject


@pytest.mark.parametrize("seed", SEEDS)
def test_every_question_has_four_answers_and_one_is_right(seed: str) -> None:
    for item in diagnostic(seed).items:
        options = item.question.options
        assert len({option.words for option in options}) == len(options) == 4, item.id
        assert sum(option.is_right for option in options) == 1
        assert all(option.diagnosis.endswith((".", "?")) and "\n" not in option.diagnosis
                   for option in options if not option.is_right)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("item_id", [item_id for item_id in ORDER if item_id not in WORDS])
def test_the_graders_of_the_bank_agree_with_every_number(item_id: str, seed: str) -> None:
    problem = problem_of(item_id, f"{seed}/diagnostic/0")
    for option in diagnostic(seed).item(item_id).question.options:
        verdict = grade(problem, option.words)
        assert verdict.is_right is option.is_right
        if verdict.slip:
            assert verdict.slip == option.slip


def test_numbers_in_words_are_the_calculators() -> None:
    for item_id, item in WORDS.items():
        texts = " ".join([item.right, *item.wrong, *item.wrong.values()])
        for entry in item.numbers:
            printed, _, expression = entry.partition(" = ")
            match = PRINTED.fullmatch(printed)
            assert match and match[1] in texts, f"{item_id}: {printed}"
            assert evaluate(expression) == float(match[1].replace(",", ""))


def test_always_taking_the_same_letter_gets_a_quarter() -> None:
    made = [diagnostic(str(seed)) for seed in range(60)]
    letters = Counter(letter_of(one, item.id, is_right=True) for one in made for item in one.items)
    assert set(letters) == set("abcd")
    assert all(0.21 < count / letters.total() < 0.29 for count in letters.values())


def test_other_learners_and_other_rounds_get_other_numbers() -> None:
    one, other = diagnostic("1"), diagnostic("2")
    assert one.item("A2").question.ask != other.item("A2").question.ask
    before = one.item("A2").question.ask
    one.begin_again()
    assert one.item("A2").question.ask != before
    assert diagnostic("1").item("A2").question.ask == before


@pytest.mark.parametrize("letter", sorted(STARTS))
def test_the_weakest_subject_says_where_to_start(letter: str) -> None:
    right = "".join(group for group in STARTS if group != letter)
    found = answered(right).scores()
    weak = weakest(found)
    assert weak is not None and weak.group == letter and weak.num_right == 0
    line = advice(found)
    assert line.startswith(f"Start with notebook {STARTS[letter][0]}") and groups()[letter].title in line


def test_advice_before_the_first_answer_and_after_only_right_ones() -> None:
    assert advice(diagnostic().scores()).startswith("Answer a question")
    some = diagnostic()
    some.hand_in("A1", letter_of(some, "A1", is_right=True))
    assert advice(some.scores()) == "All right so far: go on."
    assert advice(answered("".join(STARTS)).scores()).startswith("All right: start with the exercises")


def test_among_equals_what_is_taught_first_comes_first() -> None:
    found = [Score("C", 0, 2, 2), Score("D", 0, 2, 2), Score("L", 0, 2, 2), Score("J", 1, 2, 2)]
    weak = weakest(found)
    assert weak is not None and weak.group == "C"


def test_an_answer_counts_once_and_only_letters_are_answers() -> None:
    made = diagnostic()
    made.hand_in("A1", "a")
    with pytest.raises(MiniVLLMError, match="answered already"):
        made.hand_in("A1", "b")
    for letter in ("e", "", "ab"):
        with pytest.raises(MiniVLLMError, match="from a to d"):
            made.hand_in("B6", letter)
    assert set(made.answers) == {"A1"}


def test_answers_are_kept_in_the_learners_file_and_can_be_forgotten(tmp_path: Path) -> None:
    store = ProgressFile(tmp_path / "progress.json")
    made = Diagnostic(store)
    made.hand_in("A1", "a")
    made.hand_in("A2", letter_of(made, "A2", is_right=False))
    again = Diagnostic(store)
    assert again.answers == made.answers and again.items == made.items
    kept = json.loads(store.path.read_text())["records"][test.KIND]
    assert kept["A2"]["is_right"] is False and kept["A2"]["slip"]
    again.begin_again()
    assert Diagnostic(store).answers == {} and Diagnostic(store).items == again.items != made.items


def test_an_answer_to_a_question_that_has_changed_is_not_counted() -> None:
    kept = Kept()
    kept.write(test.KIND, "A1", {"round": 0, "words": "No longer there.", "is_right": True})
    assert Diagnostic(kept).answers == {}


@pytest.mark.parametrize("topic", TOPICS)
def test_drills_have_one_right_answer_and_repeat(topic: str) -> None:
    for number in range(60):
        question = drill(topic, "seed", number).question
        assert len({option.words for option in question.options}) == 4
        assert sum(option.is_right for option in question.options) == 1
        assert question == drill(topic, "seed", number).question
    assert len({drill(topic, "seed", number).question.ask for number in range(60)}) > 5


@pytest.mark.parametrize("topic", [*MEMORY, "bits and bytes"])
def test_right_numbers_hold_the_same_bytes_as_the_question(topic: str) -> None:
    """Judged by the units of the answers' reader, not by the drill's own factors."""
    for number in range(60):
        question = drill(topic, "seed", number).question
        words = question.ask.replace("A link of ", "").replace("Caches of ", "").split()
        asked = parsed(" ".join(words[:2]))
        told = parsed(question.right.words)
        assert asked is not None and told is not None
        given, got = (readings(one, one.unit)[0].value for one in (asked, told))
        assert got == pytest.approx(given, rel=1e-3)


def test_unchanged_digits_are_the_slip_of_the_unit() -> None:
    for number in range(40):
        found = drill("GB and GiB", "seed", number)
        asked = parsed(" ".join(found.question.ask.split()[:2]))
        same = next(o for o in found.question.options if asked and parsed(o.words).number == pytest.approx(  # type: ignore[union-attr]
            asked.number, rel=1e-3))  # fmt: skip
        assert same.slip in ("GB for GiB", "GiB for GB") and found.prefix == "G"


def test_a_printed_figure_fits_one_unit_only() -> None:
    for figure in published():
        printed = Decimal(figure.printed.split()[0])
        num_bytes = float(figure.find())
        units = ("Gbit/s", "Gibit/s", "GB/s", "GiB/s") if figure.unit.endswith("/s") else ("kB", "KiB", "MB", "MiB",
                 "GB", "GiB")  # fmt: skip
        fitting = [
            unit for unit in units if Decimal(in_unit(num_bytes, unit)).quantize(printed, ROUND_HALF_UP) == printed
        ]  # fmt: skip
        assert fitting == [figure.unit], figure


def test_gaps_are_the_known_percentages() -> None:
    assert [round(100 * more - 100, 1) for more in EXCESS.values()] == [2.4, 4.9, 7.4, 10.0]


def test_a_topic_that_there_is_not_is_refused() -> None:
    with pytest.raises(MiniVLLMError, match="topic must be one of"):
        drill("miles", "seed", 1)
