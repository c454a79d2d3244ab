"""`minivllm quiz`: the thin loop round the pure rounds; each review is saved before the next card is shown.

Ctrl-C and the end of input both end a session with everything saved.
"""

import argparse
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TypeVar

from minivllm.course import mock_interview, quiz
from minivllm.course.anki import write_anki
from minivllm.course.calculators.units import counted
from minivllm.course.deck import NEVER, all_cards, next_due
from minivllm.course.progress import Progress, ProgressFile
from minivllm.course.spacing import GOOD, due_at
from minivllm.errors import ConfigError

Session = TypeVar("Session")
Step = Callable[[Session, str, datetime], tuple[Session, str]]


def run(options: argparse.Namespace, store: ProgressFile | None = None) -> int:
    """Do what the options ask for; returns the exit status. Raises ConfigError for what cannot be."""
    store = store or ProgressFile()
    if options.num < 1:
        raise ConfigError(f"--num must be at least 1, not {options.num}")
    if options.delete:
        print(f"deleted {store.path}" if store.delete() else "there was no progress to delete")
    elif options.import_from:
        num_reviews = len(store.import_from(options.import_from).reviews)
        print(f"{counted(num_reviews, 'reviews')} imported into {store.path}")
    elif options.export:
        store.export(options.export)
        print(f"progress written to {options.export}")
    elif options.anki:
        print(f"{write_anki(store.load(), options.anki)} cards written to {options.anki}")
    elif options.stats:
        print(stats(store.load(), now()))
    elif options.mock is not None:
        hold_interview(options.mock, store)
    else:
        hold_round(options, store)
    return 0


def hold_round(options: argparse.Namespace, store: ProgressFile) -> None:
    """A round of flash cards at the terminal."""
    letters = options.group.upper().replace(",", "")
    round_, text = quiz.begin(store.load(), now(), letters, options.num, options.due)
    print(_wrapped(text))
    if round_.stage == "ended":
        return
    for after in _lines(round_, quiz.answer):
        store.save_reviews(round_.progress, after.progress)
        round_ = after
        if round_.stage == "ended":
            return
    print(f"Saved: {counted(round_.num_reviewed, 'cards')} done, {len(round_.queue)} to come.")


def hold_interview(minutes: int, store: ProgressFile) -> None:
    """A mock interview at the terminal; what was answered is kept, however it ends."""
    progress = store.load()
    seed = f"{progress.learner_seed}/{len(progress.interviews)}"
    interview, text = mock_interview.begin(minutes, seed, now())
    print(_wrapped(text))
    try:
        for after in _lines(interview, mock_interview.answer):
            interview = after
            if interview.stage == "ended":
                return
        print(_wrapped(mock_interview.closing(interview)))
    finally:
        if interview.done:
            store.update(lambda kept: kept.with_interview(interview.to_json()))


def stats(progress: Progress, at: datetime) -> str:
    """What was reviewed, how well, what is due, and the slips that recur."""
    if not progress.reviews and not progress.interviews:
        return "Nothing reviewed yet: run `minivllm quiz`."
    lines = [f"{counted(len(progress.reviews), 'reviews')} of {len(progress.cards)} of {len(all_cards())} cards."]
    by_group: dict[str, Counter[bool]] = {}
    for review in progress.reviews:
        by_group.setdefault(review.card[:1], Counter())[review.rating >= GOOD] += 1
    lines += [f"  {group}: {c[True]} of {c.total()} went well" for group, c in sorted(by_group.items())]
    num_due = sum((due_at(progress, card_id) or NEVER) <= at for card_id in progress.cards)
    due = next_due(progress)
    later = f"; the next at {due:%Y-%m-%d %H:%M} UTC" if due and due > at else ""
    lines.append(f"Due now: {counted(num_due, 'cards')}{later}.")
    if progress.interviews:
        lines.append(f"{counted(len(progress.interviews), 'mock interviews')}.")
    lines += [f"Slip: {name}, {counted(count, 'times')}" for name, count in progress.slips.most_common(5)]
    return "\n".join(lines)


def now() -> datetime:
    return datetime.now(UTC)


def _lines(session: Session, step: Step[Session]) -> Iterator[Session]:
    """Read a line, take a step, show its text, again and again; ends where input does, or at Ctrl-C."""
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        session, text = step(session, line, now())
        print(_wrapped(text))
        yield session


def _wrapped(text: str) -> str:
    """The text in lines that fit the terminal, at most 100 wide; what was indented stays so."""
    width = min(shutil.get_terminal_size().columns, 100)
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * (len(line) - len(line.lstrip())))
        for line in text.split("\n")
    )
