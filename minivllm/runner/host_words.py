"""The host's side of a step's integers: one pinned buffer, its parts by name, and how values are laid out in them."""

import numpy as np
import torch

from minivllm.runner.batch_rows import WISHES, BatchRows
from minivllm.runner.draft_rows import DraftRows

ROW_PARTS = 11
ALIGNMENT = 64  # words: pointers to every part are multiples of 16 bytes, which kernels are compiled for


class HostWords:
    """A buffer in the host's memory, and its parts by name."""

    def __init__(self, num_words: int, num_rows: int, *, is_pinned: bool) -> None:
        self.memory = torch.zeros(num_words, dtype=torch.int32, pin_memory=is_pinned)
        self.words = self.memory.numpy()
        parts = [self.words[part * num_rows : (part + 1) * num_rows] for part in range(ROW_PARTS)]
        self.seeds = self.words[: 2 * num_rows].view(np.int64)
        self.temperatures = parts[2].view(np.float32)
        self.num_tokens, self.top_k = parts[3:5]
        self.top_p, self.min_p = (part.view(np.float32) for part in parts[5:7])
        self.last_tokens, self.order, self.keys = parts[7:10]
        self.query_starts = self.words[10 * num_rows : ROW_PARTS * num_rows + 1]
        self._first_token = ROW_PARTS * num_rows + ALIGNMENT
        self.singles = self._token_parts(num_rows, num_rows)

    def take_wishes(self, held: BatchRows, rows: DraftRows) -> None:
        """How the tokens of the rows are to be chosen: as their requests wish."""
        for name in WISHES:
            getattr(self, name)[: rows.count] = rows.spread(getattr(held, name))

    def tokens(self, num_tokens: int) -> tuple[np.ndarray, ...]:
        """Token ids, positions and slots of a step of any kind."""
        return self._token_parts(num_tokens, aligned(num_tokens))

    def _token_parts(self, num_tokens: int, capacity: int) -> tuple[np.ndarray, ...]:
        return tuple(self.words[self._first_token + part * capacity :][:num_tokens] for part in range(3))


def fill(part: np.ndarray, values: np.ndarray, num_chunk: int, room_chunk: int, room: int, nothing: int = 0) -> None:
    """Lay values out: those of chunks from 0, those of single tokens from `room_chunk`, padding up to `room`."""
    end = room_chunk + len(values) - num_chunk
    part[:num_chunk], part[num_chunk:room_chunk] = values[:num_chunk], nothing
    part[room_chunk:end], part[end:room] = values[num_chunk:], nothing


def aligned(count: int) -> int:
    """The next multiple of 64: aligned(65) == 128."""
    return -(-count // ALIGNMENT) * ALIGNMENT
