"""From a plan of requests to flat tensors: which tokens, at which positions, into which slots."""

import torch

from minivllm.attention import ForwardBatch
from minivllm.engine.kv_manager import slot_of
from minivllm.engine.plan import StepPlan, needs_token
from minivllm.request import Request


def build_batch(plan: StepPlan, block_size: int, device: str) -> ForwardBatch:
    """Flatten the scheduled requests, in the plan's order."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    query_starts, num_tokens = [0], []
    for request, num_new in plan.scheduled:
        first, end = request.num_computed, request.num_computed + num_new
        wanted = range(*logit_range(request, num_new))
        logit_rows.extend(len(positions) + position - first for position in wanted)
        token_ids.extend(request.token_ids[first:end])
        positions.extend(range(first, end))
        slots.extend(slot_of(position, request.block_ids, block_size) for position in range(first, end))
        query_starts.append(len(positions))
        num_tokens.append(end)
    width = max(len(request.block_ids) for request, _ in plan.scheduled)
    table = [request.block_ids + [0] * (width - len(request.block_ids)) for request, _ in plan.scheduled]
    tensors = (token_ids, positions, slots, table, query_starts, num_tokens, logit_rows)
    return ForwardBatch(*(torch.tensor(values, dtype=torch.int64, device=device) for values in tensors))


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
