"""From a plan of requests to flat tensors: which tokens, at which positions, into which slots."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.engine.plan import StepPlan, needs_token
from minivllm.engine.tables import slot_of
from minivllm.request import Request

Drafts = Mapping[str, Sequence[int]]  # by request id: tokens to verify behind the known ones


def build_batches(plan: StepPlan, block_size: int, device: str, drafts: Drafts | None = None) -> list[ForwardBatch]:
    """Flatten the scheduled requests, in the plan's order, for each group of layers: only the tables differ."""
    drafts = drafts or {}
    first = _first_batch(plan, block_size, device, drafts)
    others = range(1, len(plan.scheduled[0][0].tables))
    return [first, *(replace(first, **_tables(plan, group, block_size, device, drafts)) for group in others)]


def _first_batch(plan: StepPlan, block_size: int, device: str, drafts: Drafts) -> ForwardBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    query_starts, num_tokens = [0], []
    for request, num_new in plan.scheduled:
        first, end = request.num_computed, request.num_computed + num_new
        guessed = drafts.get(request.id, ())
        from_, to = logit_range(request, num_new)
        logit_rows.extend(len(positions) + position - first for position in range(from_, to + len(guessed)))
        token_ids.extend(request.token_ids[first:end])
        token_ids.extend(guessed)
        end += len(guessed)
        positions.extend(range(first, end))
        query_starts.append(len(positions))
        num_tokens.append(end)
    columns = {
        "token_ids": token_ids,
        "positions": positions,
        "query_starts": query_starts,
        "num_tokens": num_tokens,
        "logit_rows": logit_rows,
    }
    tensors = {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in columns.items()}
    return ForwardBatch(**tensors, **_tables(plan, 0, block_size, device, drafts))


def _tables(plan: StepPlan, group: int, block_size: int, device: str, drafts: Drafts) -> dict[str, torch.Tensor]:
    """A group's block table, and the slots of the new tokens in it."""
    slots: list[int] = []
    width = max(len(request.block_ids) for request, _ in plan.scheduled)
    rows = []
    for request, num_new in plan.scheduled:
        block_ids, first = request.tables[group].block_ids, request.num_computed
        end = first + num_new + len(drafts.get(request.id, ()))
        slots.extend(slot_of(position, block_ids, block_size) for position in range(first, end))
        rows.append(block_ids + [NULL_BLOCK] * (width - len(block_ids)))
    columns = {"slots": slots, "block_table": rows}
    return {name: torch.tensor(values, dtype=torch.int64, device=device) for name, values in columns.items()}


def logit_range(request: Request, num_new: int) -> tuple[int, int]:
    """Positions [first, end) of this chunk whose logits are wanted.

    The last known token gives the next one. With prompt_logprobs, each prompt token but the first is judged by the
    logits of the token before it.
    """
    first, end = request.num_computed, request.num_computed + num_new
    last_needed = end if needs_token(request, num_new) else first
    if request.params.prompt_logprobs is not None and first < request.num_prompt - 1:
        return first, max(last_needed, min(end, request.num_prompt - 1))
    return (end - 1, end) if last_needed == end else (end, end)
