"""Hears what became of drafts and holds it against the engine: I8 (none is ever cached), I9 (what counts as computed).

A part of witness.py, which hears the events.
"""

from collections import Counter

from minivllm.draft_events import DraftJudged
from minivllm.engine.block_pool import CacheEntry
from minivllm.engine.engine import Engine
from minivllm.request import Request


class DraftWitness:
    """Follows the blocks that are published and the drafts that are judged."""

    def __init__(self, engine: Engine, seen: Counter[str]) -> None:
        self.engine = engine
        self.seen = seen
        self._published: list[tuple[Request, int, CacheEntry]] = []  # by whom, where in its table; since the last look

    def note(self, request: Request, index: int, entry: CacheEntry) -> None:
        """A block of a request was cached."""
        self._published.append((request, index, entry))

    def check(self) -> None:
        """I8: what was published since the last look are tokens of who wrote it: a draft that fell is none."""
        for request, index, entry in self._published:
            size = len(entry.token_ids)
            known = request.token_ids[index * size : (index + 1) * size]
            assert tuple(known) == entry.token_ids, f"I8: {request.id} knows {known} and has {entry.token_ids} cached"
        self._published = []

    def judge(self, event: DraftJudged) -> None:
        """I9: the accepted head and one token more are there, and all that stands before the last is computed."""
        request, drafts, num_accepted = (
            self.engine.requests[event.request_id],
            event.draft_token_ids,
            event.num_accepted,
        )
        assert drafts, f"I9: {request.id} had no drafts, and they were judged"
        got = tuple(request.token_ids[-num_accepted - 1 :])
        assert got[:-1] == drafts[:num_accepted], f"I9: {request.id} accepted {drafts[:num_accepted]} and got {got}"
        self.seen[f"drafts {'all' if num_accepted == len(drafts) else 'some' if num_accepted else 'none'} stood"] += 1
        self.seen[f"drafts by {event.method}"] += 1
        is_drafted = num_accepted < len(drafts) and got[-1] == drafts[num_accepted]
        if request.is_finished:
            self.seen["end inside drafts"] += is_drafted
            return
        assert not is_drafted, f"I9: {request.id} took {got[-1]} for a draft that fell"
        num_computed = request.num_computed
        assert num_computed == request.num_tokens - 1, (
            f"I9: {request.id} computed {num_computed} of {request.num_tokens}"
        )
