"""Each decision of the engine as one sentence, for titles, logs and screen readers."""

from minivllm.draft_events import BlocksTrimmed, DraftJudged, StepSpeculated
from minivllm.events import (
    Added,
    Admitted,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksReserved,
    BlocksTaken,
    Event,
    Evicted,
    Finished,
    Forked,
    Pinned,
    Preempted,
    PrefixHit,
    Refused,
    StepCosted,
    StepRan,
    SwappedIn,
    SwappedOut,
    Unpinned,
    Waited,
)
from minivllm.views.theme import clipped, counted

WAIT_REASONS = {
    "no_seat": "all seats are taken",
    "no_budget": "the token budget of this step is spent",
    "no_blocks": "there are too few free blocks",
    "just_preempted": "a request was just preempted",
    "batch_runs": "the batch that runs has not ended",
    "prefix_under_way": "another computes the tokens that it begins with",
}
PREEMPTION_REASONS = {
    "no_blocks": "one before it had to grow",
    "itself": "it had to grow and is the last in the order",
    "held": "it waits for a choice and others could run",
}
NUM_LISTED = 6  # ids named one by one, then a count


def sentence(event: Event) -> str:
    """What happened, in words; empty for BlockCached, which comes in runs."""
    words = _words(event)
    return f"Step {event.step}: {words}." if words else ""


def published_sentence(step: int, request_id: str, block_ids: tuple[int, ...]) -> str:
    """Blocks that became full and findable, several events as one sentence."""
    return f"Step {step}: {_name(request_id)} filled {blocks(block_ids)}, which others may now find."


def blocks(block_ids: tuple[int, ...]) -> str:
    """blocks((3,)) == "block 3"; blocks((3, 4)) == "blocks 3, 4"."""
    listed = ", ".join(map(str, block_ids[:NUM_LISTED]))
    more = f" and {len(block_ids) - NUM_LISTED} more" if len(block_ids) > NUM_LISTED else ""
    return f"block{'' if len(block_ids) == 1 else 's'} {listed}{more}"


def _words(event: Event) -> str:
    match event:
        case Added(request_id=request_id, num_prompt=num_prompt):
            return f"{_name(request_id)} arrived with {counted(num_prompt, 'prompt token')}"
        case Waited(request_id=request_id, reason=reason):
            return f"{_name(request_id)} waits because {WAIT_REASONS.get(reason, reason)}"
        case PrefixHit(request_id=request_id, block_ids=ids, num_tokens=num_tokens, group=group):
            held = f"{blocks(tuple(filter(None, ids)))}{_layers(group)}"
            return f"{_name(request_id)} found {counted(num_tokens, 'token')} already computed in {held}"
        case Admitted(request_id=request_id, num_preemptions=num_preemptions, reason=reason):
            how = " from the host's memory" if reason == "swapped_in" else " again" if num_preemptions else ""
            return f"{_name(request_id)} began{how}{' with a new batch' if reason == 'new_batch' else ''}"
        case Evicted(block_id=block_id):
            return f"block {block_id} lost its cached contents"
        case BlocksTaken(request_id=request_id, block_ids=ids, group=group):
            return f"{_name(request_id)} took {blocks(ids)}{_layers(group)}"
        case BlocksReleased(request_id=request_id, block_ids=ids):
            return f"{_name(request_id)} let go of {blocks(ids)}"
        case Preempted(request_id=request_id, num_computed=num_computed, reason=reason, how=how):
            because = PREEMPTION_REASONS.get(reason, reason)
            stored = counted(num_computed, "token")
            rest = f"and its {stored} wait on the host" if how == "swap" else f"and must compute {stored} again"
            return f"{_name(request_id)} was preempted, because {because}, {rest}"
        case Forked(request_id=request_id, parent_id=parent_id, block_ids=ids):
            shared = f"shares {blocks(ids)}" if ids else "waits for a seat"
            return f"{_name(request_id)} forked off {_name(parent_id)} and {shared}"
        case BlockCopied(request_id=request_id, source_id=source_id, block_id=block_id):
            return f"{_name(request_id)} copied block {source_id} to block {block_id} before writing"
        case BlockExchanged(request_id=request_id, block_id=block_id, cached_id=cached_id):
            return f"{_name(request_id)} gave up block {block_id} for its cached twin, block {cached_id}"
        case BlocksReserved(request_id=request_id, block_ids=ids):
            return f"{_name(request_id)} reserved {counted(len(ids), 'block')} in a row"
        case BlocksDropped(request_id=request_id, block_ids=ids, group=group):
            return f"{_name(request_id)} dropped {blocks(ids)}{_layers(group)}, which no window reaches any more"
        case SwappedOut(request_id=request_id, block_ids=ids):
            return f"{_name(request_id)} went to the host with {counted(len(ids), 'block')}"
        case SwappedIn(request_id=request_id, block_ids=ids):
            return f"{_name(request_id)} came back from the host into {blocks(ids)}"
        case Pinned(name=name, block_ids=ids):
            return f"{blocks(ids)} were pinned as {clipped(name, 24)}"
        case Unpinned(name=name):
            return f"{clipped(name, 24)} was unpinned"
        case Finished(request_id=request_id, reason=reason, num_output=num_output):
            return f"{_name(request_id)} finished ({clipped(reason, 24)}) with {counted(num_output, 'output token')}"
        case Refused(request_id=request_id, reason=reason):
            return f"{_name(request_id)} was refused: {clipped(reason, 80)}"
        case StepRan() | StepCosted():
            return _words_of_step(event)
    return _words_of_drafts(event)


def _words_of_drafts(event: Event) -> str:
    match event:
        case BlocksTrimmed(request_id=request_id, block_ids=ids, group=group):
            return f"{_name(request_id)} gave back {blocks(ids)}{_layers(group)}, which drafts had"
        case DraftJudged(request_id=request_id, method=method, draft_token_ids=ids, num_accepted=num_accepted):
            drafts = f"{counted(len(ids), 'draft')} by {clipped(method, 24)}"
            return f"of {drafts} for {_name(request_id)}, {num_accepted} stood"
        case StepSpeculated(num_drafted=num_drafted, num_accepted=num_accepted):
            return f"verified {counted(num_drafted, 'draft')}, of which {num_accepted} stood"
    return ""


def _words_of_step(event: StepRan | StepCosted) -> str:
    if isinstance(event, StepCosted):
        share = f"{min(1, event.floor_ms / event.run_ms):.0%}" if event.run_ms else "nothing"
        return f"took {event.run_ms:.3g} ms, of which {share} is the floor"
    num_new = sum(new for _, new, _ in event.scheduled)
    return f"ran {counted(num_new, 'token')} of {counted(len(event.scheduled), 'request')}"


def _layers(group: int) -> str:
    """Which layers' blocks are meant, where there is more than one group of them."""
    return f" for layer group {group}" if group else ""


def _name(request_id: str) -> str:
    return f"request {clipped(request_id, 24)}"
