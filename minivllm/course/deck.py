"""The cards of the bank: one for each question, and one more where it has a numeric form; which of them come next."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from minivllm.course.numeric_forms import Problem
from minivllm.course.progress import Progress
from minivllm.course.questions import FORMS, Question, groups, problem_of, question, questions
from minivllm.course.spacing import due_at
from minivllm.errors import ConfigError

NUMERIC = ".num"
NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Card:
    """A question as a card: answered in words and ticked off, or (`is_numeric`) by a number."""

    id: str

    @property
    def question(self) -> Question:
        return question(self.id.removesuffix(NUMERIC))

    @property
    def is_numeric(self) -> bool:
        return self.id.endswith(NUMERIC)


def all_cards(letters: Collection[str] = ()) -> list[Card]:
    """Cards of these groups, or of all: easier levels first. Raises ConfigError for a group that there is not."""
    unknown = sorted(set(letters) - set(groups()))
    if unknown:
        raise ConfigError(f"there is no group {unknown[0]!r}; groups are {', '.join(groups())}")
    asked = sorted((q for q in questions().values() if not letters or q.group in letters), key=lambda q: q.rank)
    ids = [card_id for q in asked for card_id in ([q.id, q.id + NUMERIC] if q.id in FORMS else [q.id])]
    return [Card(card_id) for card_id in ids]


def named_cards(ids: Iterable[str]) -> tuple[Card, ...]:
    """These cards, in this order: "A1", or "A1.num" for its numeric one. Raises ConfigError for one there is not."""
    cards = tuple(Card(card_id) for card_id in ids)
    for card in cards:
        if card not in all_cards([card.question.group]):
            raise ConfigError(f"{card.question.id} has no numeric form; ask for the card {card.question.id!r}")
    return cards


def chosen_cards(
    progress: Progress, now: datetime, letters: Collection[str] = (), num: int = 10, is_due_only: bool = False
) -> tuple[Card, ...]:
    """The next cards: those due, longest overdue first, then (unless due ones only) new ones."""
    cards = all_cards(letters)
    when = {card: due_at(progress, card.id) for card in cards}
    due = sorted((card for card in cards if (when[card] or NEVER) <= now), key=lambda card: when[card] or NEVER)
    new = [] if is_due_only else [card for card in cards if when[card] is None]
    return tuple([*due, *new][:num])


def next_due(progress: Progress, letters: Collection[str] = ()) -> datetime | None:
    """When the next card comes back; None if none was reviewed yet."""
    return min((due for card in all_cards(letters) if (due := due_at(progress, card.id))), default=None)


def problem_for(card: Card, progress: Progress, num_redraws: int = 0) -> Problem:
    """The numbers of this learner's next review of the card: other ones each time, the same until it is answered."""
    seed = f"{progress.learner_seed}/{progress.num_reviews(card.id)}/{num_redraws}"
    return problem_of(card.question.id, seed)
