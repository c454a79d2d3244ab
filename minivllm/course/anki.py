"""The deck for Anki: a text file that its File > Import takes, with ids, so that a later export updates the cards.

Anki's own import headers say what the columns are; no package is needed to write them.
"""

import html
from pathlib import Path

from minivllm.course.deck import Card, all_cards, problem_for
from minivllm.course.progress import Progress
from minivllm.errors import ConfigError

HEADER = (
    "#separator:tab", "#html:true", "#notetype:Basic", "#deck:minivllm", "#columns:Guid\tFront\tBack\tTags",
    "#guid column:1", "#tags column:4",
)  # fmt: skip


def anki_text(progress: Progress) -> str:
    """Every card on a line; numeric ones with this learner's numbers of the moment and the derivation."""
    return "\n".join([*HEADER, *("\t".join(_columns(card, progress)) for card in all_cards())]) + "\n"


def write_anki(progress: Progress, path: Path) -> int:
    """Write the file; returns the number of cards. Raises ConfigError where it cannot be written."""
    try:
        path.write_text(anki_text(progress), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); choose another place") from error
    return len(all_cards())


def _columns(card: Card, progress: Progress) -> tuple[str, str, str, str]:
    question = card.question
    tags = f"minivllm::{question.group} minivllm::{question.level}"
    if card.is_numeric:
        problem = problem_for(card, progress)
        back = "".join(f"<div>{html.escape(line)}</div>" for line in problem.truth.derivation)
        slips = "".join(f"<li>{html.escape(f'{slip.name}: {slip.why}')}</li>" for slip in problem.slips)
        return f"minivllm-{card.id}", html.escape(problem.ask), f"{back}<ul>{slips}</ul>", f"{tags} minivllm::numeric"
    points = "".join(f"<li>{html.escape(point)}</li>" for point in question.points)
    follow_up = f"<p><b>{html.escape(question.follow_up)}</b> {html.escape(question.answer)}</p>"
    return f"minivllm-{card.id}", html.escape(question.stem), f"<ul>{points}</ul>{follow_up}", tags
