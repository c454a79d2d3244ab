"""Whoever begins as one does who is being computed waits for these blocks, instead of computing them again.

    step 1     A computes blocks 0 1 2 3 4 5      B, with the same blocks 0 1 2 3, would compute them too: it waits
    step 2     A goes on                          B finds 0 1 2 3 in the prefix cache, and computes what is its own

A block can be found when the step that filled it has ended: so one waits a step, or two where the next is launched
before that. It must be worth it: at least half of what the request would have to compute is under way or still to come
with the one before it. A short beginning that all have, as a system prompt, holds nobody up.
"""

from collections.abc import Iterable

from minivllm.engine.prefix_cache import Hit
from minivllm.request import Request, Status

Computing = list[tuple[Request, int]]  # requests, and how many of their tokens are computed when a step has ended


def computing(scheduled: Iterable[tuple[Request, int]], launched: Iterable[tuple[Request, int]]) -> Computing:
    """Of the step that is planned, and of the one that is under way, whose tokens are booked as computed."""
    planned = [(request, request.num_computed + num_new) for request, num_new in scheduled]
    return planned + [(r, r.num_computed) for r, _ in launched if r.status is Status.RUNNING]


def is_under_way(request: Request, hit: Hit, others: Computing, size: int) -> bool:
    """Whether one of the others computes the block behind `hit`, and with it half of what `request` lacks."""
    if request.params.prompt_logprobs is not None:  # it computes all of its prompt, whatever is stored
        return False
    first = hit.num_tokens // size
    least = max(1, -(-(request.num_tokens - hit.num_tokens) // (2 * size)))  # blocks that are worth a step
    end = (first + least) * size
    if end >= request.num_tokens:  # one token is computed in any case
        return False
    return any(
        other.num_published <= first < num_computed // size
        and other.salt == request.salt
        and other.token_ids[first * size : end] == request.token_ids[first * size : end]
        and other.token_ids[: first * size] == request.token_ids[: first * size]
        for other, num_computed in others
    )
