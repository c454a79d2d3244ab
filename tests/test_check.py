"""Checking in a notebook: red before work, green after, the slip by its name, three hints, and nothing ever raises."""

import re
from pathlib import Path

import numpy as np
import pytest

from minivllm.course.calculators import kv_bytes_per_token
from minivllm.course.check import Asked, Check
from minivllm.course.exercises import exercises, find
from minivllm.course.exercises.compare import agrees
from minivllm.course.exercises.exercise import CodeProblem, Problem
from minivllm.course.exercises.nb05_code import append_slot
from minivllm.course.judge import split
from minivllm.course.progress import ProgressFile
from minivllm.course.records import Kept
from minivllm.views.answer_box import ExerciseBox, entries


def checker(seed: str = "s") -> Check:
    kept = Kept(seed)
    return Check(lambda: kept)


def right_answer(check: Check, id_: str) -> object:
    problem = check.problem(find(id_), {})
    if isinstance(problem, CodeProblem):
        return problem.reference
    return [p.answer for p in problem.parts] if len(problem.parts) > 1 else problem.parts[0].answer


@pytest.mark.parametrize("id_", exercises())
@pytest.mark.parametrize("answer", [None, ..., "", [None, ...]], ids=str)
def test_an_unfilled_exercise_is_red_and_costs_no_try(id_: str, answer: object) -> None:
    check = checker()
    card = check(id_, answer)
    assert card.tone == "open" and "not answered yet" in card.title
    assert check.record(find(id_)) == {}


@pytest.mark.parametrize("id_", exercises())
@pytest.mark.parametrize(
    "answer",
    [object(), {}, {1, 2}, lambda: 1, "§", b"x", True, float("nan"), 10**400, np.zeros(3), -1, [[], {}]],
    ids=lambda answer: type(answer).__name__,  # no addresses: two workers must collect the same names
)
def test_no_object_makes_check_raise_or_pass(id_: str, answer: object) -> None:
    card = checker()(id_, answer)
    assert card.tone == "wrong" and repr(card) and card._repr_html_()


@pytest.mark.parametrize("id_", exercises())
def test_red_becomes_green(id_: str) -> None:
    check = checker()
    assert check(id_).tone == "open"
    card = check(id_, right_answer(check, id_))
    assert card.tone == "right" and card.link is not None
    assert check.record(find(id_))["is_solved"] is True


def test_each_wrong_try_gives_the_next_hint_and_then_points_to_the_solution() -> None:
    check, hints = checker(), find("02.3").hints
    shown = [check("02.3", 10_007).lines[-1] for _ in range(4)]
    assert [hint in line for hint, line in zip(hints, shown, strict=False)] == [True] * 3
    assert 'solution("02.3")' in shown[3]


def test_an_answer_of_the_wrong_form_costs_no_hint() -> None:
    check = checker()
    assert "Give one number" in check("02.3", [1, 2]).lines[0]
    assert check.record(find("02.3")) == {}


def test_slips_are_counted_by_name() -> None:
    check = checker()
    value = right_answer(check, "02.1")
    assert isinstance(value, int)
    check("02.1", value * 8)
    check("02.1", value * 8)
    assert check.record(find("02.1"))["slips"] == {"bits for bytes": 2}


def test_general_slips_are_recognised_where_the_exercise_names_none() -> None:
    check = checker()
    value = right_answer(check, "02.1")
    assert isinstance(value, int)
    assert "MiB for bytes" in check("02.1", value / 2**20).lines[0]
    heads = right_answer(check, "02.3")
    assert isinstance(heads, int)
    assert "off by one" in check("02.3", heads + 1).lines[0]
    assert "floor forgotten" in check("02.3", heads + 0.4).lines[0]


def test_an_answer_may_be_text_with_a_unit_or_the_result_of_a_calculator() -> None:
    check = checker()
    value = right_answer(check, "02.1")
    assert isinstance(value, int)
    assert check("02.1", f"{value / 1024!r} KiB").tone == "right"
    problem = check.problem(find("02.1"), {})
    assert isinstance(problem, Problem)
    dtype = re.search(r"kept in (\w+)", problem.question)
    config = problem.given["config"]
    assert dtype is not None and isinstance(config, dict)
    assert check("02.1", kv_bytes_per_token(config, dtype[1])).tone == "right"


def test_redrawing_gives_other_numbers_and_starts_the_hints_again() -> None:
    check = checker()
    before = check.ask("02.1")
    check("02.1", 1)
    after = check.redraw("02.1")
    assert after.lines != before.lines
    assert "Hint 1" in check("02.1", 1).lines[-1]


def test_two_learners_are_asked_different_numbers() -> None:
    assert checker("one").ask("02.1").lines != checker("two").ask("02.1").lines


def test_ask_hands_the_numbers_to_code() -> None:
    asked = checker().ask("05.1")
    assert isinstance(asked, Asked) and isinstance(asked.given["positions"], list)


def test_progress_lasts_in_the_learner_s_file(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "progress.json")
    check = Check(lambda: file)
    question = check.ask("02.1").lines
    check("02.1", 1)
    again = Check(lambda: ProgressFile(tmp_path / "progress.json"))
    assert again.ask("02.1").lines == question
    assert "Hint 2" in again("02.1", 1).lines[-1]


def test_a_damaged_file_is_one_red_line(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text("{")
    card = Check(lambda: ProgressFile(tmp_path / "progress.json"))("02.1", 1)
    assert card.tone == "wrong" and "damaged" in card.title


def test_an_unknown_exercise_is_one_red_line() -> None:
    assert "no exercise" in checker()("99.9", 1).title


def test_an_error_names_the_learner_s_own_line() -> None:
    def divides(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
        return num_tokens // 0  # here

    card = checker()("05.2", divides)
    assert re.search(r"ZeroDivisionError.*\(line \d+: return num_tokens // 0", card.lines[0])


def test_errors_inside_what_the_learner_calls_name_the_learner_s_line() -> None:
    def calls(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
        return int(np.zeros(1)[7])

    assert "line" in checker()("05.2", calls).lines[0]


@pytest.mark.parametrize("error", [SystemExit, RecursionError, MemoryError, KeyError, StopIteration])
def test_any_error_of_the_learner_s_code_stays_inside(error: type[BaseException]) -> None:
    def raises(*arguments: object) -> int:
        raise error

    assert error.__name__ in checker()("05.2", raises).lines[0]


def test_a_stub_is_unwritten_and_not_wrong() -> None:
    def stub(*arguments: object) -> None: ...

    def raises(*arguments: object) -> None:
        raise NotImplementedError

    for id_ in ("03.1", "05.2", "05.3", "05.4", "06.1", "06.2", "06.3", "06.4", "06.5"):
        assert checker()(id_, stub).tone == checker()(id_, raises).tone == "open", id_


def test_the_class_of_the_stub_is_unwritten() -> None:
    class MyBuddies:
        def __init__(self, num_places: int) -> None:
            self.starts = {num_places: [0]}

        def take(self, size: int) -> range | None: ...

        def free(self, run: range) -> None: ...

    assert checker()("04.3", MyBuddies).tone == "open"


def test_a_loop_without_end_is_stopped() -> None:
    def loops(*arguments: object) -> int:
        while True:
            pass

    def loops_on_one_line(*arguments: object) -> int:
        while True: pass  # fmt: skip  # noqa: E701

    assert "does not end" in checker()("05.2", loops).lines[0]
    assert "does not end" in checker()("05.2", loops_on_one_line).lines[0]


def test_what_a_learner_prints_while_being_checked_stays_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    def prints(*arguments: object) -> int:
        print("here")
        return 1

    checker()("05.2", prints)
    assert capsys.readouterr().out == ""


def test_the_first_failing_call_is_shown() -> None:
    def off_at_borders(block_ids: list[int], num_tokens: int, block_size: int, free_ids: list[int]) -> int:
        slot = append_slot(block_ids, num_tokens, block_size, free_ids)
        return slot + (num_tokens % block_size == 3)

    assert "(5,), 3, 4, (2, 9), 1" in checker()("05.2", off_at_borders).lines[0]


def test_the_solution_of_a_code_exercise_is_the_engine_s_text_with_a_link() -> None:
    card = checker().solution("05.3")
    assert "block_ids[position // block_size] * block_size + position % block_size" in card.listing
    assert card.link is not None and card.link[1].startswith("../minivllm/engine/tables.py#L")
    assert "class Buddies" in checker().solution("04.3").listing


def test_a_right_answer_after_the_solution_says_so() -> None:
    check = checker()
    check.solution("05.2")
    assert "after its solution" in check("05.2", append_slot).title


def test_a_choice_may_be_a_letter_a_number_or_its_words() -> None:
    check = checker()
    problem = check.problem(find("03.3"), {})
    assert isinstance(problem, Problem)
    [part] = problem.parts
    index = part.choices.index(str(part.answer))
    assert [check("03.3", given).tone for given in ("abcdef"[index], index + 1, part.answer)] == ["right"] * 3


def test_what_learners_write_is_escaped() -> None:
    page = checker()("02.3", "<img src=x onerror=alert(1)>")._repr_html_()
    assert "<img" not in page and "&lt;img" in page


def test_answers_are_compared_entry_by_entry() -> None:
    assert agrees((1, 2.0), np.array([1, 2])) and agrees(["A b"], ["a  B"])
    assert not agrees([1, 2], [1]) and not agrees(1, True) and not agrees("1", 1)


def test_the_box_checks_what_was_typed_and_draws_again() -> None:
    check = checker()
    box = ExerciseBox("05.1", check)
    wanted = right_answer(check, "05.1")
    assert isinstance(wanted, tuple)
    box.field.value = ", ".join(map(str, wanted))
    box.buttons["check"].click()
    assert box.card.tone == "right" and "✓" in box.shown.value
    before = check.ask("05.1").lines
    box.buttons["other numbers"].click()
    assert box.card.lines != before
    assert set(box._repr_mimebundle_()[0]) >= {"text/plain", "text/html"}


@pytest.mark.parametrize(
    ("typed", "meant"), [("1,234", "1,234"), ("1, 2.5", [1, 2.5]), ("[1,2]", [1, 2]), ("a, b", ["a", "b"]), ("", "")]
)
def test_a_list_is_typed_with_commas(typed: str, meant: object) -> None:
    assert entries(typed) == meant


def test_a_list_may_be_typed_as_text_with_commas() -> None:
    assert split("a, b, c") == ["a", "b", "c"] == split("a,b,c") == split("[a, b, c]")
    assert split("1,024, 3 GiB, 0.5") == [1024, "3 GiB", 0.5] and split("1,024") == "1,024" and split([1, 2]) == [1, 2]
    check = checker()
    wanted = right_answer(check, "04.1")
    assert isinstance(wanted, list)
    assert check("04.1", ", ".join(map(str, wanted))).tone == "right"
    slots = right_answer(check, "05.1")
    assert isinstance(slots, tuple)
    assert check("05.1", ", ".join(map(str, slots))).tone == "right"
