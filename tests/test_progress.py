"""Progress lives in one local file that survives two writers, a crash, damage and a change of machine."""

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fsrs import Card, Rating, Scheduler

from minivllm.course import progress as module
from minivllm.course.progress import Progress, ProgressFile, Review, default_path, fresh, from_json
from minivllm.course.spacing import AGAIN, EASY, GOOD, HARD, due_at, reviewed
from minivllm.errors import ConfigError

NOW = datetime(2026, 1, 5, 12, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> ProgressFile:
    return ProgressFile(tmp_path / "deep" / "progress.json")


def full() -> Progress:
    """Something in every field."""
    progress = reviewed(Progress(7), "A1", GOOD, NOW, is_fuzzed=False)
    progress = reviewed(progress, "A2.num", AGAIN, NOW, "query heads", is_fuzzed=False)
    progress = progress.with_interview({"began": NOW.isoformat(), "minutes": 15, "slips": ["query heads"]})
    return progress.with_record("guess", "05.1", {"value": 3.5, "note": "a “guess”"})


# --- the file


def test_a_fresh_start_keeps_its_seed(store: ProgressFile) -> None:
    assert store.load() == store.load() and store.load().reviews == ()


def test_everything_comes_back_as_it_was_saved(store: ProgressFile) -> None:
    store.update(lambda _: full())
    assert ProgressFile(store.path).load() == full()
    assert json.loads(store.path.read_text())["version"] == module.VERSION


def test_export_and_import_carry_everything_to_another_machine(store: ProgressFile, tmp_path: Path) -> None:
    store.update(lambda _: full())
    store.export(tmp_path / "copy.json")
    other = ProgressFile(tmp_path / "other.json")
    assert other.import_from(tmp_path / "copy.json") == full() == other.load()
    other.update(lambda progress: fresh())
    other.import_from(tmp_path / "copy.json")
    assert (tmp_path / "other.bak").exists()  # what was here before
    assert other.delete() and not (tmp_path / "other.bak").exists()


def test_delete_forgets_everything(store: ProgressFile) -> None:
    store.update(lambda _: full())
    assert store.delete() and not store.path.exists() and not store.delete()
    assert store.load().reviews == ()


def test_two_writers_lose_nothing(store: ProgressFile) -> None:
    store.load()

    def write(name: str) -> None:
        mine = ProgressFile(store.path)
        for i in range(10):
            mine.update(lambda p, i=i: p.with_review(Review(f"{name}{i}", "", 3), {"due": ""}))  # type: ignore[misc]

    threads = [threading.Thread(target=write, args=(name,)) for name in "AB"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.load().reviews) == 20


def test_reviews_are_added_to_what_somebody_else_wrote_meanwhile(store: ProgressFile) -> None:
    before = store.load()
    after = reviewed(before, "A1", GOOD, NOW)
    store.write("guess", "05.1", {"value": 1})
    store.save_reviews(before, after)
    assert store.read("guess", "05.1") == {"value": 1} and store.load().num_reviews("A1") == 1


def test_a_crash_while_writing_leaves_the_old_file(store: ProgressFile, monkeypatch: pytest.MonkeyPatch) -> None:
    store.update(lambda _: full())
    before = store.path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(ConfigError, match="No space left on device"):
        store.update(lambda p: p.with_record("guess", "1", {}))
    assert store.path.read_bytes() == before
    assert [p.name for p in store.path.parent.iterdir() if p.name.startswith(".")] == []


DAMAGED = ["", "{", "[]", "null", '{"version": 1}', "\x00\xff", "[" * 100_000, '{"version":1,"learner_seed":"x"}',
           '{"version":1,"learner_seed":1,"cards":{"A1":{}},"reviews":[],"interviews":[],"records":{}}',
           '{"version":1,"learner_seed":1,"cards":{},"reviews":[1],"interviews":[],"records":{}}']  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_one_line_with_a_way_out(text: str, store: ProgressFile) -> None:
    store.path.parent.mkdir()
    store.path.write_text(text)
    for use in (store.load, lambda: store.update(lambda p: p)):
        with pytest.raises(ConfigError, match=r"is damaged.*--import FILE.*--delete") as error:
            use()
        assert "\n" not in str(error.value)
    assert store.path.read_text() == text  # nobody overwrote what may be rescued
    assert store.delete() and store.load().reviews == ()


def test_a_file_of_a_newer_version_is_left_alone() -> None:
    with pytest.raises(ConfigError, match=r"newer minivllm.*update"):
        from_json('{"version": 99}', "progress.json")


def test_what_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="MINIVLLM_DATA"):
        ProgressFile(tmp_path / "file" / "progress.json").load()
    store = ProgressFile(tmp_path / "progress.json")
    with pytest.raises(ConfigError, match="cannot read"):
        store.import_from(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="choose another place"):
        store.export(tmp_path / "absent" / "copy.json")


def test_importing_damage_keeps_what_there_was(store: ProgressFile, tmp_path: Path) -> None:
    store.update(lambda _: full())
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.json is damaged .*your progress is unchanged"):
        store.import_from(tmp_path / "bad.json")
    assert store.load() == full()


def test_the_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("MINIVLLM_DATA", raising=False)
    assert default_path() == tmp_path / "minivllm" / "progress.json"
    monkeypatch.setenv("MINIVLLM_DATA", str(tmp_path / "mine"))
    assert default_path() == tmp_path / "mine" / "progress.json"


def test_slips_are_counted_over_reviews_and_interviews() -> None:
    assert full().slips == {"query heads": 2}


# --- spacing, beside fsrs itself


def test_intervals_grow_after_good_answers() -> None:
    progress, at, intervals = Progress(1), NOW, []
    for _ in range(6):
        progress = reviewed(progress, "A1", GOOD, at, is_fuzzed=False)
        due = due_at(progress, "A1")
        assert due is not None
        intervals.append(due - at)
        at = due
    assert intervals == sorted(intervals) and intervals[-1] > timedelta(days=30)


def test_a_forgotten_card_comes_back_soon_and_an_easy_one_late() -> None:
    due = {rating: due_at(reviewed(Progress(1), "A1", rating, NOW, is_fuzzed=False), "A1")
           for rating in (AGAIN, HARD, GOOD, EASY)}  # fmt: skip
    assert sorted(due, key=lambda rating: due[rating] or NOW) == [AGAIN, HARD, GOOD, EASY]


def test_the_schedule_is_fsrs_own() -> None:
    card, progress, at = Card(card_id=0, due=NOW), Progress(1), NOW
    for rating in (GOOD, GOOD, AGAIN, GOOD, EASY):
        card, _ = Scheduler(enable_fuzzing=False).review_card(card, Rating(rating), at)
        progress = from_json(reviewed(progress, "A1", rating, at, is_fuzzed=False).to_json(), "a file")
        assert due_at(progress, "A1") == card.due
        at = card.due


def test_a_card_whose_memory_is_damaged_is_named() -> None:
    for state in ({"due": "soon"}, {"due": NOW.isoformat()}):
        with pytest.raises(ConfigError, match="A1"):
            progress = Progress(1, {"A1": dict(state)})
            due_at(progress, "A1")
            reviewed(progress, "A1", GOOD, NOW)
