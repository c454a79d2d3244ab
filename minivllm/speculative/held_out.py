"""How long a draft is right on text it has not seen: greedy answers of the target, drafts at every place of them.

Exact, and without running the engine: a greedy draft is accepted as far as it equals the answer, and as long as it does
its inputs are the answer's own tokens. So one unrolled pass over the answer says how many are accepted from each place.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch

from minivllm.models.decoder import Decoder
from minivllm.speculative.eagle_model import EagleDraft, SmallDraft
from minivllm.speculative.train_data import Example, batch_of
from minivllm.speculative.unrolled import RowAttention, row_positions, target_features, unroll


class Figures(TypedDict):
    """Of one draft on held-out answers, at one draft length."""

    draft_length: int
    tokens_per_step: float  # of the target, the extra token included
    tokens_per_step_by_kind: dict[str, float]
    accepted_by_position: list[float]  # share of rounds whose draft was right up to this token
    rounds: int
    examples: int
    vocabulary_covers: float  # share of the answers' tokens that could be drafted


@torch.no_grad()
def measure(draft: EagleDraft | SmallDraft, target: Decoder, examples: Sequence[Example], length: int) -> Figures:
    """Play the rounds of all examples with drafts of `length` tokens."""
    accepted, kinds, covered, tokens = list[int](), dict[str, list[int]](), 0, 0
    allowed = set(draft.vocabulary.tolist())
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        matches = _matches(draft, target, batch_of(part).token_ids.to(target.embed.weight.device), length)
        for row, example in enumerate(part):
            rounds = rounds_of(matches[:, row], example.num_prompt, len(example.token_ids))
            accepted += [kept for kept, _ in rounds]
            kinds.setdefault(example.kind, []).extend(gained for _, gained in rounds)
            answer = example.token_ids[example.num_prompt :].tolist()
            covered, tokens = covered + sum(token in allowed for token in answer), tokens + len(answer)
    every = [gained for gains in kinds.values() for gained in gains]
    return {
        "draft_length": length,
        "tokens_per_step": _mean(every),
        "tokens_per_step_by_kind": {kind: _mean(kinds[kind]) for kind in sorted(kinds)},
        "accepted_by_position": [_mean([kept > i for kept in accepted]) for i in range(length)],
        "rounds": len(every),
        "examples": len(examples),
        "vocabulary_covers": round(covered / max(1, tokens), 4),
    }


def rounds_of(matches: np.ndarray, num_prompt: int, num_tokens: int) -> list[tuple[int, int]]:
    """(accepted, gained) of each round of one answer; the prompt's step gave the first token of it.

    matches [length, L]: whether token j of the draft that begins after position t is right, at [j, t + j].
    """
    rounds, last = list[tuple[int, int]](), num_prompt
    while last < num_tokens - 1:
        left = num_tokens - 1 - last
        kept = 0
        while kept < min(len(matches), left) and matches[kept, last + kept]:
            kept += 1
        gained = min(kept + 1, left)
        rounds.append((kept, gained))
        last += gained
    return rounds


def _matches(
    draft: EagleDraft | SmallDraft, target: Decoder, token_ids: torch.Tensor, length: int
) -> np.ndarray:  # [length, B, L]
    truth = torch.cat((token_ids[:, 1:], token_ids[:, :1]), dim=1)  # the last column is never asked for
    if isinstance(draft, EagleDraft):
        features = unroll(draft, token_ids, target_features(target, token_ids), length)
        guesses = [draft.vocabulary[draft.logits(x).argmax(-1)] for x in features]
    else:
        rows = torch.arange(token_ids.numel(), device=token_ids.device)
        logits = draft.model(token_ids.flatten(), row_positions(token_ids), rows, RowAttention(len(token_ids)))
        guesses = [draft.vocabulary[logits.argmax(-1)].view_as(token_ids)] * length
    return torch.stack([guess == truth for guess in guesses]).cpu().numpy()


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4) if values else 0.0
