"""A model driven step by step by hand: which tokens of which sequence form a batch, without engine or scheduler."""

from itertools import accumulate
from random import Random

import torch

from minivllm.attention import Backend, ForwardBatch
from minivllm.config import ModelConfig
from minivllm.engine.tables import slot_of
from minivllm.models.decoder import Decoder
from minivllm.runner.kv_storage import KVStorage

Chunk = tuple[int, int]  # which sequence, how many new tokens of it


class Machine:
    """A model and a pool of shuffled blocks, driven step by step: sequences with token ids, a table and a length."""

    def __init__(self, model: Decoder, config: ModelConfig, backend: Backend, block_size: int, seed: int) -> None:
        self.model, self.config, self.backend, self.block_size = model, config, backend, block_size
        num_blocks = 10 + -(-1800 // block_size)
        self.storage = KVStorage(config, num_blocks, block_size, "cpu")
        self.storage.data[:, :, 1:] = 3.0  # what former owners left; the null block stays clean
        self.free = list(range(1, num_blocks))
        Random(seed).shuffle(self.free)
        self.token_ids: list[list[int]] = []
        self.tables: list[list[int]] = []
        self.num_computed: list[int] = []

    def add(self, token_ids: list[int], table: list[int] | None = None, num_computed: int = 0) -> int:
        """A new sequence, with the blocks of its first tokens where these are computed; returns its index."""
        self.token_ids.append(token_ids)
        self.tables.append(list(table or []))
        self.num_computed.append(num_computed)
        return len(self.tables) - 1

    @torch.inference_mode()
    def step(self, *chunks: Chunk) -> list[torch.Tensor]:
        """Run one batch; the logits of every new token, [num_new, vocab] for each chunk."""
        token_ids, positions, slots, num_tokens = list[int](), list[int](), list[int](), list[int]()
        for sequence, num_new in chunks:
            first, table = self.num_computed[sequence], self.tables[sequence]
            end = self.num_computed[sequence] = first + num_new
            assert end <= len(self.token_ids[sequence])
            while len(table) * self.block_size < end:
                table.append(self.free.pop())
            token_ids += self.token_ids[sequence][first:end]
            positions += range(first, end)
            slots += [slot_of(position, table, self.block_size) for position in range(first, end)]
            num_tokens.append(end)
        width, sizes = max(len(self.tables[s]) for s, _ in chunks), [num_new for _, num_new in chunks]
        table_rows = [self.tables[s] + [0] * (width - len(self.tables[s])) for s, _ in chunks]
        columns = (token_ids, positions, slots, table_rows, [0, *accumulate(sizes)], num_tokens, range(len(slots)))
        batch = ForwardBatch(*(torch.tensor(column) for column in columns))
        attention = self.backend(self.config, batch, list(self.storage.layers))
        return list(self.model(batch.token_ids, batch.positions, batch.logit_rows, attention).split(sizes))

    def copy_block(self, source: int) -> int:
        """The same bytes in another block."""
        target = self.free.pop()
        self.storage.data[:, :, target] = self.storage.data[:, :, source]
        return target
