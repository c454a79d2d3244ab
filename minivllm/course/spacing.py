"""When a card comes back: FSRS, which fits a memory's half-life to the ratings (open-spaced-repetition, `fsrs`)."""

import json
from datetime import UTC, datetime

from fsrs import Card, Rating, Scheduler

from minivllm.course.progress import Json, Progress, Review
from minivllm.errors import ConfigError

AGAIN, HARD, GOOD, EASY = 1, 2, 3, 4


def reviewed(
    progress: Progress, card_id: str, rating: int, now: datetime, slip: str = "", is_fuzzed: bool = True
) -> Progress:
    """Progress with one more review and the card's next date; fuzz spreads dates, so that cards do not clump."""
    card = _card(progress.cards.get(card_id), card_id, now)
    after, _ = Scheduler(enable_fuzzing=is_fuzzed).review_card(card, Rating(rating), now)
    state: Json = dict(after.to_dict())
    return progress.with_review(Review(card_id, now.isoformat(), rating, slip), state)


def due_at(progress: Progress, card_id: str) -> datetime | None:
    """When the card is due; None if it was never reviewed."""
    state = progress.cards.get(card_id)
    if state is None:
        return None
    try:
        due = datetime.fromisoformat(str(state["due"]))
    except ValueError as error:
        raise ConfigError(f"card {card_id} has no date but {state['due']!r}; see `minivllm quiz --delete`") from error
    return due if due.tzinfo else due.replace(tzinfo=UTC)


def _card(state: Json | None, card_id: str, now: datetime) -> Card:
    if state is None:
        return Card(card_id=0, due=now)
    try:
        return Card.from_json(json.dumps(state))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the memory of card {card_id} is damaged; see `minivllm quiz --delete`") from error
