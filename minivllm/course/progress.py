"""What a learner has done, in one JSON file on this machine: cards, reviews, interviews; nothing leaves it.

`Progress` is a value; `ProgressFile` reads it, changes it under a lock and writes it whole or not at all.
"""

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path

from filelock import FileLock

from minivllm.course.records import Record
from minivllm.errors import ConfigError, short

VERSION = 1
Json = dict[str, object]


@dataclass(frozen=True)
class Review:
    """One answer to one card: rating 1 (again) to 4 (easy), and the slip that was made, if one was recognised."""

    card: str
    at: str  # ISO 8601, UTC
    rating: int
    slip: str = ""


@dataclass(frozen=True)
class Progress:
    """Everything that is remembered. `records` holds what notebooks keep, by kind and key: see records.py."""

    learner_seed: int
    cards: Mapping[str, Json] = field(default_factory=dict)  # card id -> its fsrs state
    reviews: tuple[Review, ...] = ()
    interviews: tuple[Json, ...] = ()
    records: Mapping[str, Mapping[str, Record]] = field(default_factory=dict)

    @property
    def slips(self) -> Counter[str]:
        """How often each slip was made."""
        made = Counter(review.slip for review in self.reviews if review.slip)
        for interview in self.interviews:
            slips = interview.get("slips", [])
            made.update(map(str, slips) if isinstance(slips, list) else [])
        return made

    def num_reviews(self, card: str) -> int:
        return sum(review.card == card for review in self.reviews)

    def with_review(self, review: Review, card_state: Json) -> "Progress":
        cards = {**self.cards, review.card: card_state}
        return replace(self, cards=cards, reviews=(*self.reviews, review))

    def with_interview(self, report: Json) -> "Progress":
        return replace(self, interviews=(*self.interviews, report))

    def with_record(self, kind: str, key: str, record: Record) -> "Progress":
        return replace(self, records={**self.records, kind: {**self.records.get(kind, {}), key: record}})

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


RESTORE = "restore a copy with `minivllm quiz --import FILE`, or begin anew with `minivllm quiz --delete`"


def fresh() -> Progress:
    """Nothing done yet; the seed makes this learner's numbers differ from the neighbour's."""
    return Progress(learner_seed=secrets.randbelow(10**9))


def from_json(text: str, name: str, remedy: str = RESTORE) -> Progress:
    """Progress as it was saved. Raises ConfigError, naming the file, where the text is damaged or too new."""
    try:
        raw = json.loads(text)
        version = raw["version"]
        if isinstance(version, int) and version > VERSION:
            raise ConfigError(f"{name} was written by a newer minivllm (format {version}); update minivllm to read it")
        return _checked(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} is damaged ({short(str(error))}): {remedy}") from error


def default_path() -> Path:
    """MINIVLLM_DATA, else minivllm under XDG_DATA_HOME or ~/.local/share; progress.json in it."""
    if chosen := os.environ.get("MINIVLLM_DATA"):
        return Path(chosen).expanduser() / "progress.json"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "minivllm" / "progress.json"


class ProgressFile:
    """The file of one learner, and the `Records` of the notebooks.

    A terminal and a notebook may use it at the same time: each change is one transaction under a file lock.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()

    def load(self) -> Progress:
        """What was saved, or a fresh start, which is written down so that its seed stays."""
        if not self.path.exists():
            return self.update(lambda progress: progress)
        return from_json(_read(self.path), str(self.path))

    def update(self, change: Callable[[Progress], Progress]) -> Progress:
        """Apply a change to what the file holds now, whoever wrote it last, and save the result."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                before = from_json(_read(self.path), str(self.path)) if self.path.exists() else fresh()
                after = change(before)
                _write(self.path, after.to_json())
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path} ({error.strerror}); set MINIVLLM_DATA to a folder you can write"
            ) from error
        return after

    def save_reviews(self, before: Progress, after: Progress) -> None:
        """Add the reviews that `after` has and `before` lacks, whatever else was written to the file meanwhile."""
        new = after.reviews[len(before.reviews) :]
        if new:
            self.update(lambda kept: reduce(lambda p, r: p.with_review(r, after.cards[r.card]), new, kept))

    @property
    def seed(self) -> str:
        """What a notebook draws this learner's numbers from."""
        return str(self.load().learner_seed)

    def read(self, kind: str, key: str) -> Record | None:
        return self.read_all(kind).get(key)

    def read_all(self, kind: str) -> Mapping[str, Record]:
        return self.load().records.get(kind, {})

    def write(self, kind: str, key: str, record: Record) -> None:
        self.update(lambda progress: progress.with_record(kind, key, record))

    def export(self, target: Path) -> None:
        """Copy everything to a file, which `import_from` takes."""
        progress = self.load()
        try:
            _write(target, progress.to_json())
        except OSError as error:
            raise ConfigError(f"cannot write {target} ({error.strerror}); choose another place") from error

    def import_from(self, source: Path) -> Progress:
        """Replace everything by an exported file, a damaged one of ours too; what was here stays beside it as .bak."""
        remedy = "it is no export of `minivllm quiz --export`; your progress is unchanged"
        progress = from_json(_read(source), str(source), remedy)
        if self.path.exists():
            self.path.replace(self.path.with_suffix(".bak"))
        return self.update(lambda _: progress)

    def delete(self) -> bool:
        """Forget everything; False where there was nothing."""
        existed = self.path.exists()
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(".bak").unlink(missing_ok=True)
        return existed


def _checked(raw: Json) -> Progress:
    """Progress from parsed JSON; any field of the wrong kind raises."""
    seed, cards, records = raw["learner_seed"], raw["cards"], raw["records"]
    reviews, interviews = raw["reviews"], raw["interviews"]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError("learner_seed is no whole number")
    if not isinstance(cards, dict) or not isinstance(records, dict):
        raise ValueError("cards or records is no object")
    if not all(isinstance(kept, dict) for kept in records.values()):
        raise ValueError("records of one kind are no object")
    if not isinstance(reviews, list) or not isinstance(interviews, list):
        raise ValueError("reviews or interviews is no list")
    if not all(isinstance(state, dict) and isinstance(state.get("due"), str) for state in cards.values()):
        raise ValueError("a card has no due date")
    if not all(isinstance(interview, dict) for interview in interviews):
        raise ValueError("an interview is no object")
    kept = tuple(Review(str(r["card"]), str(r["at"]), int(r["rating"]), str(r["slip"])) for r in reviews)
    return Progress(seed, cards, kept, tuple(interviews), records)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); name a file that `--export` wrote") from error


def _write(path: Path, text: str) -> None:
    """Write beside, then rename: readers see the old text or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
