"""One step as the kernels of fused_llama.py read it, in 32-bit integers: chunks of prompts, then single tokens."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Keys:
    """What some requests see: their blocks, and how many tokens in them; a row of padding has none."""

    block_table: torch.Tensor  # [B, M]
    num_tokens: torch.Tensor  # [B] the new ones included

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True)
class Prefixes:
    """Which requests see the same first keys: group g is members[group_starts[g] : group_starts[g + 1]]."""

    num_tokens: torch.Tensor  # [B] that a request shares with all of its group; 0 without one
    group_starts: torch.Tensor  # [G + 1]
    members: torch.Tensor  # [B] places among the requests


@dataclass(frozen=True)
class KernelBatch:
    """T new tokens: those of requests that bring several, then of those that bring one, then rows of padding.

    A token id of -1 - r stands for chosen[r]: what row r of the last step chose, which nobody may have read. Padding
    has position and slot -1. Keys of both kinds begin at multiples of 16 bytes: else kernels compile anew.
    """

    token_ids: torch.Tensor  # [T]
    chosen: torch.Tensor  # [R]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T] where each new token's K and V are stored
    singles: Keys  # of requests with one token, padding included
    chunks: Keys | None  # of the others
    query_starts: torch.Tensor  # [num_chunks + 1]
    max_query_len: int  # of a chunk
    prefixes: Prefixes | None = None  # of the singles, to be read once a group
