"""What happened to drafts: events of speculative decoding, told beside those of events.py."""

from dataclasses import dataclass

from minivllm.events import Event


@dataclass(frozen=True, slots=True)
class DraftJudged(Event):
    """A request's drafts were verified: the first `num_accepted` stand, and one more token came after them.

    Where the request ended at a draft that stands, that is the one more, and what was drafted behind it fell.
    """

    request_id: str
    method: str
    draft_token_ids: tuple[int, ...]
    num_accepted: int


@dataclass(frozen=True, slots=True)
class BlocksTrimmed(Event):
    """Blocks at the end of a request's table went back: they held rejected drafts, or were set aside for drafts."""

    request_id: str
    block_ids: tuple[int, ...]
    group: int = 0


@dataclass(frozen=True, slots=True)
class StepSpeculated(Event):
    """The drafts of a whole step: how many, how many stood, and the milliseconds of drafting and of verifying."""

    num_drafted: int
    num_accepted: int
    draft_ms: float
    verify_ms: float
