"""Whole sessions without a terminal: rounds, mock interviews, the command, the view; what is answered is kept."""

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest

from minivllm import cli
from minivllm.course import mock_interview, quiz
from minivllm.course.anki import HEADER, anki_text
from minivllm.course.deck import all_cards, chosen_cards, problem_for
from minivllm.course.interview_report import Asked, report
from minivllm.course.mock_interview import Interview, chain
from minivllm.course.numeric_forms import grade, written
from minivllm.course.progress import Progress, ProgressFile
from minivllm.course.questions import FORMS, groups, question, questions
from minivllm.course.quiz import Round, rating_of, ticks_of
from minivllm.course.spacing import AGAIN, GOOD, HARD
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.views.flash_cards import FlashCards, cards_picture

NOW = datetime(2026, 1, 5, 12, tzinfo=UTC)


def started(letters: str = "", num: int = 10, progress: Progress | None = None, now: datetime = NOW) -> Round:
    return quiz.begin(progress or Progress(7), now, letters, num, is_fuzzed=False)[0]


def right_line(round_: Round) -> str:
    """What a learner who knows everything types."""
    if round_.card.is_numeric:
        return written(round_.problem, float(round_.problem.truth))
    return "all" if round_.stage == "ticking" else "because"


def played(round_: Round, now: datetime = NOW) -> Round:
    while round_.stage != "ended":
        round_, _ = quiz.answer(round_, right_line(round_), now)
    return round_


# --- the deck


def test_there_is_a_card_for_each_question_and_each_form_easier_levels_first() -> None:
    cards = all_cards()
    assert len(cards) == len(questions()) + len(FORMS)
    ranks = [card.question.rank for card in cards]
    assert ranks == sorted(ranks)
    assert {card.question.group for card in all_cards("AC")} == {"A", "C"}


def test_due_cards_come_before_new_ones_and_alone_if_asked() -> None:
    progress = played(started("B", 2)).progress
    later = NOW + timedelta(days=400)
    assert [card.id for card in chosen_cards(progress, later, num=3)][:2] == ["B1", "B2"]
    assert [card.id for card in chosen_cards(progress, later, is_due_only=True)] == ["B1", "B2"]
    assert chosen_cards(progress, NOW, is_due_only=True) == ()
    assert "B1" not in [card.id for card in chosen_cards(progress, NOW)]


# --- a round


def test_a_whole_group_can_be_answered_and_comes_back_later() -> None:
    ended = played(started("A", 100))
    assert ended.num_reviewed == ended.num_good == len(all_cards("A"))
    assert set(ended.progress.cards) == {card.id for card in all_cards("A")}
    assert quiz.begin(ended.progress, NOW, "A", is_due_only=True)[1].startswith("Nothing is due; the next card is due")


def test_every_card_can_be_played_in_words_and_numbers() -> None:
    assert played(started(num=1000)).num_good == len(all_cards())


def test_numbers_differ_at_each_review_and_from_learner_to_learner() -> None:
    card = next(card for card in all_cards("A") if card.id == "A2.num")
    progress = Progress(7)
    asked = {problem_for(card, Progress(seed)).ask for seed in range(5)}
    for _ in range(4):
        asked.add(problem_for(card, progress).ask)
        progress = quiz.reviewed(progress, card.id, GOOD, NOW)
    assert len(asked) == 9
    assert problem_for(card, progress, 1).ask != problem_for(card, progress).ask


def numeric() -> Round:
    """A round with A1's numeric card on the table."""
    return quiz.answer(started("A", 2), "s", NOW)[0]


def test_a_slip_is_named_then_a_right_second_try_counts_as_hard() -> None:
    round_ = numeric()
    slip = round_.problem.slips[0]
    round_, text = quiz.answer(round_, written(round_.problem, slip.value), NOW)
    assert slip.name in text and slip.why in text and "once more" in text
    ended, text = quiz.answer(round_, right_line(round_), NOW)
    review = ended.progress.reviews[-1]
    assert (review.rating, review.slip) == (HARD, slip.name) and "Right" in text


def test_two_wrong_tries_show_the_derivation_and_bring_the_card_back_soon() -> None:
    round_ = numeric()
    derivation = round_.problem.truth.derivation[-1]
    first, _ = quiz.answer(round_, "1", NOW)
    second, text = quiz.answer(first, "1", NOW)
    assert derivation in text and second.progress.reviews[-1].rating == AGAIN


def test_what_is_no_number_costs_no_try_and_giving_up_shows_the_answer() -> None:
    round_ = numeric()
    same, text = quiz.answer(round_, "what?", NOW)
    assert same == round_ and "Write one number" in text
    gave_up, text = quiz.answer(round_, "?", NOW)
    assert gave_up.progress.reviews[-1].rating == AGAIN and round_.problem.truth.derivation[-1] in text


def test_numbers_can_be_drawn_again() -> None:
    round_ = numeric()
    again, text = quiz.answer(round_, "r", NOW)
    assert again.problem.ask in text and again.problem.ask != round_.problem.ask
    assert grade(again.problem, right_line(again)).is_right


@pytest.mark.parametrize("line", ["5", "0 1", "1 x", "", "-1", "1 2 3 4 5 6 7", "²", "9" * 50])
def test_ticks_that_fit_no_point_are_asked_for_again(line: str) -> None:
    round_, _ = quiz.answer(started("A"), "an answer", NOW)
    same, text = quiz.answer(round_, line, NOW)
    assert same == round_ and "1 to 4" in text


def test_ticks_become_ratings() -> None:
    assert [ticks_of(text, 3) for text in ("all", "none", "1, 3", "2")] == [{1, 2, 3}, set(), {1, 3}, {2}]
    assert [rating_of(ticked, 3) for ticked in range(4)] == [1, 2, 3, 4]


def test_skipping_and_ending_review_nothing() -> None:
    round_, text = quiz.answer(started("A", 3), "q", NOW)
    assert round_.stage == "ended" and round_.progress.reviews == () and "0 of 0" in text
    assert quiz.answer(round_, "more", NOW) == (round_, "The round is over.")


def test_an_unknown_group_is_one_line() -> None:
    with pytest.raises(ConfigError, match="there is no group 'Z'; groups are A, B"):
        started("Z")


# --- the mock interview


def test_chains_climb_from_recall_to_design_in_every_group() -> None:
    for letter in groups():
        for seed in range(20):
            climbed = [question(question_id) for question_id in chain(letter, Random(seed))]
            assert [q.rank for q in climbed] == sorted({q.rank for q in climbed})
            assert climbed[-1].level == "design" and all(q.group == letter for q in climbed[:-1])


@pytest.mark.parametrize(("minutes", "num_chains"), [(15, 1), (30, 2), (45, 3)])
def test_an_interview_asks_no_question_twice(minutes: int, num_chains: int) -> None:
    for seed in range(30):
        interview, text = mock_interview.begin(minutes, str(seed), NOW)
        assert len(set(interview.queue)) == len(interview.queue)
        assert 3 * num_chains - 1 <= len(interview.queue) <= 4 * num_chains
        assert f"({minutes}:00 left)" in text


def interview_line(interview: Interview) -> str:
    match interview.stage:
        case "number":
            return written(interview.problem, float(interview.problem.truth))
        case "ticking":
            return "all"
    return "an answer"


def test_a_perfect_interview_is_reported_as_one() -> None:
    interview, _ = mock_interview.begin(30, "1", NOW)
    at, text = NOW, ""
    while interview.stage != "ended":
        at += timedelta(seconds=20)
        interview, text = mock_interview.answer(interview, interview_line(interview), at)
    num = len(interview.done)
    assert f"Report: {num} questions answered, 0 left" in text
    assert f"Follow-ups answered: {num} of {num}." in text and "Slip" not in text
    num_numeric = sum(asked.has_number for asked in interview.done)
    assert f"Numbers right: {num_numeric} of {num_numeric}." in text
    assert "Time to the first number: median 40 s; aim for 60 s." in text  # one line in words, then the number
    assert all(asked.num_ticked == asked.num_points for asked in interview.done)


def test_time_runs_out_and_the_rest_is_counted_as_left() -> None:
    interview, _ = mock_interview.begin(15, "1", NOW)
    ended, text = mock_interview.answer(interview, "too late", NOW + timedelta(minutes=15))
    assert ended.stage == "ended" and text.startswith("Time is up.")
    assert mock_interview.answer(ended, "more", NOW)[1] == "The interview is over."


def test_an_empty_follow_up_is_not_let_pass_as_answered() -> None:
    interview, _ = mock_interview.begin(15, "1", NOW)
    while interview.stage != "follow-up":
        interview, _ = mock_interview.answer(interview, interview_line(interview), NOW)
    after, text = mock_interview.answer(interview, "", NOW)
    assert not after.done[0].has_followed_up and question(after.done[0].id).answer in text


def test_slips_of_an_interview_are_named_and_kept() -> None:
    seed = next(str(s) for s in range(50) if mock_interview.begin(15, str(s), NOW)[0].queue[0] in FORMS)
    interview, _ = mock_interview.begin(15, seed, NOW)
    interview, _ = mock_interview.answer(interview, "in words", NOW)
    slip = interview.problem.slips[0]
    interview, text = mock_interview.answer(interview, written(interview.problem, slip.value), NOW)
    assert slip.name in text and interview.now_asked.slip == slip.name
    for line in ("none", "no idea"):
        interview, _ = mock_interview.answer(interview, line, NOW)
    kept = Progress(1).with_interview(interview.to_json())
    assert kept.slips == {slip.name: 1} and f"Slip: {slip.name}" in mock_interview.closing(interview)


def test_the_report_counts_by_category_and_level() -> None:
    done = [Asked("A1", "recall", 4, True, 3, True, 10.0), Asked("B7", "analyse", 3, False, 0, has_followed_up=True)]
    text = report(done, 2, 15)
    assert "   3 of  4  A KV-cache fundamentals and maths" in text and "   0 of  3  analyse" in text
    assert report([], 4, 15) == "Report: no question was answered to the end."


def test_other_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="15, 30, 45 minutes, not 20"):
        mock_interview.begin(20, "1", NOW)


# --- the command


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProgressFile:
    monkeypatch.setenv("MINIVLLM_DATA", str(tmp_path / "data"))
    return ProgressFile()


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str, end: type[BaseException] = EOFError) -> None:
    """Answer input() with these lines, then as Ctrl-D or Ctrl-C does."""

    left = iter(lines)

    def read(_prompt: str) -> str:
        for line in left:
            return line
        raise end

    monkeypatch.setattr("builtins.input", read)


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_an_interrupted_round_keeps_what_was_answered(
    store: ProgressFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: type[BaseException]
) -> None:
    typed(monkeypatch, "words", "all", "1", end=end)
    assert cli.main(["quiz", "--group", "a", "--num", "3"]) == 0
    assert [review.card for review in store.load().reviews] == ["A1"]
    text = capsys.readouterr().out
    assert "Saved: 1 card done, 2 to come." in text and "\033" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_an_interrupted_interview_keeps_what_was_answered(
    store: ProgressFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, *["words", "", "all", "all", "reason"] * 2, end=KeyboardInterrupt)
    assert cli.main(["quiz", "--mock", "15"]) == 0
    assert len(store.load().interviews) == 1 and "Report:" in capsys.readouterr().out


def test_progress_travels_by_export_and_import_and_can_be_deleted(
    store: ProgressFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typed(monkeypatch, "words", "all", "q")
    cli.main(["quiz"])
    copy = str(tmp_path / "copy.json")
    for arguments in (["--export", copy], ["--delete"], ["--import", copy], ["--stats"]):
        assert cli.main(["quiz", *arguments]) == 0
    text = capsys.readouterr().out
    assert "1 review of 1 of 170 cards." in text and "1 review imported" in text
    assert len(store.load().reviews) == 1


def test_statistics_name_the_slips_that_recur(store: ProgressFile, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quiz", "--stats"]) == 0
    assert capsys.readouterr().out == "Nothing reviewed yet: run `minivllm quiz`.\n"
    store.update(lambda p: quiz.reviewed(p, "A2.num", AGAIN, NOW, "query heads"))
    cli.main(["quiz", "--stats"])
    text = capsys.readouterr().out
    assert "  A: 0 of 1 went well" in text and "Due now: 1 card." in text and "Slip: query heads, 1 time" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--group", "Z"], "there is no group 'Z'"),
        (["--num", "0"], "--num must be at least 1, not 0"),
        (["--mock", "20"], "a mock interview lasts 15, 30, 45 minutes, not 20"),
        (["--import", "absent.json"], "cannot read absent.json"),
        (["--anki", "absent/deck.txt"], "cannot write absent/deck.txt"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    store: ProgressFile, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quiz", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"minivllm: {line}") and error.count("\n") == 1


def test_a_damaged_file_says_how_to_go_on(store: ProgressFile, capsys: pytest.CaptureFixture[str]) -> None:
    store.path.parent.mkdir()
    store.path.write_text("{")
    assert cli.main(["quiz"]) == 2 and "--delete" in capsys.readouterr().err
    assert cli.main(["quiz", "--delete"]) == 0


def test_without_fsrs_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["quiz"]) == 2
    assert capsys.readouterr().err == "minivllm: fsrs is not installed: run `pip install 'minivllm[lab]'`\n"


# --- Anki, read with Python's own csv


def test_the_deck_for_anki_has_every_card_once_and_escapes_its_text(store: ProgressFile, tmp_path: Path) -> None:
    assert cli.main(["quiz", "--anki", str(tmp_path / "deck.txt")]) == 0
    text = (tmp_path / "deck.txt").read_text()
    assert text == anki_text(store.load())
    rows = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))[len(HEADER) :]
    assert {len(row) for row in rows} == {4}
    assert sorted(row[0] for row in rows) == sorted(f"minivllm-{card.id}" for card in all_cards())
    assert not any("<" in row[1] for row in rows)


# --- the notebook


@pytest.fixture
def cards(store: ProgressFile) -> Iterator[FlashCards]:
    view = FlashCards("A", 3)
    yield view
    view.close()


def test_a_notebook_names_its_cards_and_asks_them_in_that_order(store: ProgressFile) -> None:
    view = FlashCards(cards=("B2", "A2.num"))
    assert view.drawn()["head"].startswith("B2 ") and view.drawn()["kind"] == "words"
    view.move("skip", None)
    assert view.drawn()["head"].startswith("A2 ") and view.drawn()["kind"] == "number"
    view.move("skip", None)
    assert view.drawn()["kind"] == "ended"
    view.move("another round", None)
    assert view.drawn()["head"].startswith("B2 ")
    wordy = next(id_ for id_ in questions() if id_ not in FORMS)
    for ids in (("Z9",), ("A1", "B99"), (f"{wordy}.num",)):
        with pytest.raises(ConfigError):
            FlashCards(cards=ids)
    view.close()


def test_a_round_in_the_notebook_is_saved_to_the_same_file(cards: FlashCards, store: ProgressFile) -> None:
    assert cards.drawn()["kind"] == "words" and cards.drawn()["points"] == []
    cards.move("show points", None)
    assert cards.drawn()["points"] == list(question("A1").points)
    cards.move("ticks", [1, 2, 3, 4])
    assert cards.drawn()["kind"] == "number" and "Follow-up" in cards.drawn()["said"]
    cards.move("answer", "3")
    assert "Not yet" in cards.drawn()["said"] and cards.drawn()["ask"] not in cards.drawn()["said"]
    assert [review.card for review in store.load().reviews] == ["A1"]


def test_every_control_moves_the_picture(cards: FlashCards) -> None:
    cards.move("skip", None)
    asked = cards.drawn()["ask"]
    cards.move("other numbers", None)
    assert cards.drawn()["ask"] != asked
    cards.move("give up", None)
    assert "Worked out" in cards.drawn()["said"] and cards.drawn()["left"].startswith("1 card to come")
    cards.move("end", None)
    assert cards.drawn()["kind"] == "ended"
    cards.move("another round", None)
    assert cards.drawn()["kind"] == "words"


@pytest.mark.parametrize(
    ("control", "value"), [("answer", 3), ("answer", None), ("ticks", "1"), ("ticks", None), ("x", 1)]
)
def test_what_a_control_cannot_take_is_refused_and_shown(cards: FlashCards, control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError, match="there is no control"):
        cards.move(control, value)
    cards._receive(cards, {"control": control, "value": value}, None)
    cards.flush()
    assert "there is no control" in cards.picture["status"]


def test_commands_of_the_terminal_work_in_the_field_too(cards: FlashCards) -> None:
    cards.move("skip", None)
    cards.move("answer", "?")
    assert "Worked out" in cards.drawn()["said"]


def test_building_a_notebook_leaves_the_learners_file_alone(
    store: ProgressFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIVLLM_LEARNER", "example")
    view = FlashCards("A", 3)
    view.move("show points", None)
    view.move("ticks", [1])
    view.close()
    assert not store.path.exists()


def test_the_form_is_renewed_only_when_the_question_changes(cards: FlashCards) -> None:
    cards.move("skip", None)
    key = cards.drawn()["key"]
    cards.move("answer", "not a number")
    assert cards.drawn()["key"] == key
    cards.move("answer", "1")
    assert cards.drawn()["key"] != key


def test_text_and_pixels_say_what_the_live_view_says(cards: FlashCards) -> None:
    cards.move("show points", None)
    data, _ = cards._repr_mimebundle_()
    text = str(data["text/plain"])
    assert question("A1").stem in text and all(f"[ ] {i}. {p}" in text for i, p in enumerate(question("A1").points, 1))
    assert isinstance(data["image/png"], bytes) and data["image/png"].startswith(b"\x89PNG")
    assert repr(cards) == "FlashCards(Flash cards: A1 · recall)"


def test_the_script_never_parses_html() -> None:
    assert not any(name in FlashCards._esm for name in ("innerHTML", "insertAdjacentHTML", "outerHTML", "fetch("))


def test_a_picture_is_a_function_of_the_round() -> None:
    round_ = started("A", 2)
    assert cards_picture(round_, "") == cards_picture(round_, "")
    assert cards_picture(quiz.answer(round_, "q", NOW)[0], "bye")["kind"] == "ended"


@pytest.mark.parametrize("learner_seed", range(40))
def test_other_numbers_are_other_numbers(learner_seed: int) -> None:
    round_, _ = quiz.begin(Progress(learner_seed=learner_seed), datetime.now(UTC), ids=("A2.num",))
    for _ in range(5):
        before = round_.problem.ask
        round_, _ = quiz.answer(round_, "r", datetime.now(UTC))
        assert round_.problem.ask != before
