"""Rows whose tables begin with the same blocks: decode steps read such a prefix once for all of them (cascade).

    table of row 0   7 8 9 20      group 0: rows 0 and 2 share blocks 7 8 9      tokens         48 0 48 0
             row 1   4 5 6 21                                                    group_starts   0 2 2 2 ...
             row 2   7 8 9 22                                                    members        0 2
             row 3   30

Two launches more a layer pay where what they save is much. Groups are found again when rows come, go or exchange
blocks, not when a block comes at the end of a table. Requests that came before the first of them was computed hold
copies of its blocks: they join the group by their tokens. What the device knows lies where graphs want it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.attention.kernel_batch import Prefixes
from minivllm.request import Request
from minivllm.runner.batch_rows import BatchRows

MOST_GROUPS = 8  # of a step: those that save most
LEAST_TOKENS = 64  # of a prefix: a tile of the kernel
LEAST_SAVED_BYTES = 192 * 2**20  # of a layer and step: below, launches cost what reading does (kernels/NOTES.md)


@dataclass(frozen=True)
class Group:
    """Rows of a batch whose tables begin with the same `num_blocks` blocks, or copies of them, and go on after them."""

    rows: np.ndarray
    num_blocks: int

    @property
    def num_saved(self) -> int:
        """Blocks that are not read again."""
        return (len(self.rows) - 1) * self.num_blocks


class SharedPrefixes:
    """Which rows read a prefix together, on the device as fused_llama.py takes it."""

    def __init__(self, max_num_seqs: int, block_size: int, token_bytes: int, device: str) -> None:
        self.pays = False
        self._block_size, self._block_bytes = block_size, block_size * token_bytes
        self._arrangement = 0  # of the rows whose groups these are
        room = -(-max_num_seqs // 64) * 64  # pointers to every part are multiples of 16 bytes
        self._room = room
        self._words = torch.zeros(2 * room + MOST_GROUPS + 1, dtype=torch.int32, device=device)

    def find(self, rows: BatchRows) -> bool:
        """Whether to read prefixes once for all rows that are seated; the device then knows the groups."""
        if rows.arrangement != self._arrangement:
            count = len(rows.requests)
            num_blocks = rows.num_blocks[:count]
            groups = best_groups(rows.table[:count], num_blocks, -(-LEAST_TOKENS // self._block_size))
            groups = join_copies(groups, rows.requests, num_blocks, self._block_size)
            self.pays = self._block_bytes * sum(group.num_saved for group in groups) >= LEAST_SAVED_BYTES
            if self.pays:
                self._send(groups)
            self._arrangement = rows.arrangement
        return self.pays

    def of_rows(self, num_rows: int) -> Prefixes:
        """What the kernels read: the same addresses in every step."""
        tokens, members = (self._words[part * self._room :][:num_rows] for part in range(2))
        return Prefixes(tokens, self._words[2 * self._room :], members)

    def _send(self, groups: list[Group]) -> None:
        words = np.zeros(len(self._words), np.int32)
        tokens, members, starts = words[: self._room], words[self._room :], words[2 * self._room :]
        num_members = 0
        for number, group in enumerate(groups):
            tokens[group.rows] = group.num_blocks * self._block_size
            members[num_members : num_members + len(group.rows)] = group.rows
            num_members += len(group.rows)
            starts[number + 1 :] = num_members
        host = torch.from_numpy(words)
        if self._words.is_cuda:
            host = host.pin_memory()  # its memory is not given to others before it was read
        self._words.copy_(host, non_blocking=True)


def best_groups(table: np.ndarray, num_blocks: np.ndarray, least_blocks: int) -> list[Group]:
    """The groups that save most, at most MOST_GROUPS: a short prefix of many rows, or longer ones of fewer.

    table: [B, M] block ids, num_blocks: [B] how many are a row's. The last of them takes its new token: nobody's else.
    """
    best, saved, depth = list[Group](), 0, least_blocks
    while groups := groups_at(table, num_blocks, depth):
        now_saved = sum(group.num_saved for group in groups)
        if now_saved > saved:
            best, saved = groups, now_saved
        depth = max(2 * depth, 1 + min(group.num_blocks for group in groups))  # until there, groups are the same
    return best


def groups_at(table: np.ndarray, num_blocks: np.ndarray, depth: int) -> list[Group]:
    """Groups that share their first `depth` blocks, by what they save."""
    if depth > table.shape[1]:
        return []
    long_enough = np.flatnonzero(num_blocks > depth)
    ids, counts = np.unique(table[long_enough, depth - 1], return_counts=True)
    groups = []
    for block_id in ids[counts > 1]:
        rows = long_enough[table[long_enough, depth - 1] == block_id]
        shared = table[rows, : num_blocks[rows].min() - 1]
        is_same = (shared == shared[0]).all(axis=0)
        length = len(is_same) if is_same.all() else int(is_same.argmin())
        if length >= depth:
            groups.append(Group(rows, length))
    return sorted(groups, key=lambda group: -group.num_saved)[:MOST_GROUPS]


def join_copies(
    groups: list[Group], requests: Sequence[Request], num_blocks: np.ndarray, block_size: int
) -> list[Group]:
    """The groups, and with them the rows that begin with the same tokens in blocks of their own."""
    alone = set(range(len(requests))).difference(*(group.rows.tolist() for group in groups))
    joined = []
    for group in groups:
        length = group.num_blocks * block_size
        first = requests[group.rows[0]]
        prefix = first.token_ids[:length]
        may_join = (row for row in sorted(alone) if requests[row].salt == first.salt)
        long_enough = [row for row in may_join if num_blocks[row] > group.num_blocks]
        copies = [row for row in long_enough if begins_with(requests[row].token_ids, prefix, length)]
        alone.difference_update(copies)
        joined.append(Group(np.array([*group.rows, *copies]), group.num_blocks))
    return joined


def begins_with(token_ids: list[int], prefix: list[int], length: int) -> bool:
    """Whether the first `length` tokens are known on both sides, and the same."""
    if min(len(token_ids), len(prefix)) < length or token_ids[0] != prefix[0]:
        return False  # as most do: nothing is copied
    return token_ids[:length] == prefix
