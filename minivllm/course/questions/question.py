"""A question as data: its stem, the key points that an answer should name, a follow-up, and where the engine does it.

One TOML file holds a group. Adding a question is adding a [[question]] table; the linter says what it lacks:
    python -m minivllm.course.question_bank
"""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from minivllm.errors import ConfigError, short

LEVELS = ("recall", "apply", "analyse", "design")
ID = re.compile(r"[A-Z][0-9]{1,2}")


@dataclass(frozen=True)
class Link:
    """A function or class of the engine: Link("minivllm/engine/tables.py", "slot_of")."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path} · {self.name}"


@dataclass(frozen=True)
class Question:
    """One stem of the bank. `numbers` says where each figure of the texts comes from: see question_facts.py."""

    id: str
    level: str
    stem: str
    points: tuple[str, ...]
    follow_up: str
    answer: str  # to the follow-up
    source: str
    links: tuple[Link, ...]
    seed: tuple[int, ...] = ()  # numbers in the list of 60 questions that this course grew from
    numbers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not ID.fullmatch(self.id):
            raise ConfigError(f"question id {short(self.id)} must be a letter and a number, such as A2")
        if self.level not in LEVELS:
            raise ConfigError(f"{self.id}: level must be one of {', '.join(LEVELS)}, not {short(self.level)}")
        if not 2 <= len(self.points) <= 6:
            raise ConfigError(f"{self.id}: give two to six key points, not {len(self.points)}; each is a tick box")
        for field in ("stem", "follow_up", "answer", "source"):
            if not getattr(self, field).strip():
                raise ConfigError(f"{self.id}: {field} is empty; write it")

    @property
    def group(self) -> str:
        return self.id[0]

    @property
    def rank(self) -> int:
        """From 1, recall, to 4, design."""
        return LEVELS.index(self.level) + 1

    @property
    def texts(self) -> tuple[str, ...]:
        """Everything that is said to the learner."""
        return (self.stem, *self.points, self.follow_up, self.answer)


@dataclass(frozen=True)
class Group:
    """The questions of one letter."""

    letter: str
    title: str
    questions: tuple[Question, ...]


def read_group(path: Path) -> Group:
    """A group's TOML file. Raises ConfigError, with the file's name, where it is not one."""
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: {error}") from error
    questions = tuple(_question(path, table) for table in raw.get("question", []))
    group = Group(str(raw.get("letter")), str(raw.get("title")), questions)
    strangers = [question.id for question in questions if question.group != group.letter]
    if strangers:
        raise ConfigError(f"{path.name}: {', '.join(strangers)} belong to another group; move them to its file")
    return group


def _question(path: Path, table: dict[str, object]) -> Question:
    known = {field.name for field in fields(Question)}
    wrong = sorted(set(table) - known) or sorted(known - {"seed", "numbers"} - set(table))
    if wrong:
        raise ConfigError(f"{path.name}, question {table.get('id')}: field {wrong[0]} is unknown or missing")
    text = {name: str(table[name]) for name in ("id", "level", "stem", "follow_up", "answer", "source")}
    links = [str(link).partition(":") for link in _entries(table["links"])]
    return Question(
        **text,
        points=tuple(map(str, _entries(table["points"]))),
        links=tuple(Link(place, name) for place, _, name in links),
        seed=tuple(number for number in _entries(table.get("seed", [])) if isinstance(number, int)),
        numbers=tuple(map(str, _entries(table.get("numbers", [])))),
    )


def _entries(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{short(value)} must be a list, in square brackets")
    return value
