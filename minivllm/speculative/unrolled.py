"""A draft's forward pass over whole rows of known text, as it will run when it drafts: for training and for judging.

Row b, position t of a batch [B, L] is token b * L + t for the modules, which take flat tokens. Rows are padded at their
end, which causal attention never looks at.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from minivllm.models.decoder import Decoder
from minivllm.speculative.eagle_model import EagleDraft


class RowAttention:
    """Causal attention within each row; the engine's backends are its twins for paged caches."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = [x.unflatten(0, (self.num_rows, -1)).transpose(1, 2) for x in (q, k, v)]  # [B, heads, L, D]
        out = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)


class UnrolledAttention:
    """What a head sees in step j of a chain: keys of true features up to j tokens back, then one key of each step.

    Step j at position s continues the draft that began at s - j. Its cache has the keys of step 0 (from the target's
    features) up to s - j, and after them, at s - j + i, the key that step i made from the head's own feature.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.keys, self.values = list[torch.Tensor](), list[torch.Tensor]()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        rows = [x.unflatten(0, (self.num_rows, -1)).transpose(1, 2) for x in (q, k, v)]
        self.keys.append(rows[1].repeat_interleave(groups, dim=1))
        self.values.append(rows[2].repeat_interleave(groups, dim=1))
        step, length = len(self.keys) - 1, rows[0].shape[2]
        if step == 0:
            out = F.scaled_dot_product_attention(rows[0], self.keys[0], self.values[0], is_causal=True)
        else:
            mask = chain_mask(length, step, q.device)
            keys, values = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
            out = F.scaled_dot_product_attention(rows[0], keys, values, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)


def chain_mask(length: int, step: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Which of the keys of steps 0 .. step, [L, (step + 1) * L], position s sees in step `step`."""
    s = torch.arange(length, device=device)
    known = s[None] <= s[:, None] - step
    drafted = [s[None] == s[:, None] - step + i for i in range(1, step + 1)]
    return torch.cat((known, *drafted), dim=1)


@torch.no_grad()
def target_features(target: Decoder, token_ids: torch.Tensor) -> torch.Tensor:
    """The target's last-layer output before its final norm, [B, L, d], for rows of token ids [B, L]."""
    attention, positions = RowAttention(len(token_ids)), row_positions(token_ids)
    x = target.embed(token_ids.flatten())
    cos, sin = target.rope.angles(positions, x.dtype)
    for layer in target.layers:
        x = layer(x, cos, sin, attention)
    return x.view(*token_ids.shape, -1)


def unroll(draft: EagleDraft, token_ids: torch.Tensor, features: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """The head's features [B, L, d] of step 0, which reads the target's, then of each step, which reads the last's.

    Every position is drafted from at once; the tokens are the true ones, as they are in drafts that were right so far.
    """
    attention, positions = UnrolledAttention(len(token_ids)), row_positions(token_ids)
    with torch.no_grad():
        embeddings = draft.embed(token_ids.flatten())
    for _ in range(steps):
        before = F.pad(features[:, :-1], (0, 0, 1, 0))  # zeros before the first token
        features = draft.head(embeddings, before.flatten(0, 1), positions, attention).view_as(features)
        yield features


def row_positions(token_ids: torch.Tensor) -> torch.Tensor:
    """0 .. L - 1 for each of B rows, [B * L]."""
    return torch.arange(token_ids.shape[1], device=token_ids.device).repeat(len(token_ids))
