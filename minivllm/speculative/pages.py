"""What a drafter keeps of a token beside K and V, in pages of the same blocks: shared, copied and swapped alike."""

import torch

from minivllm.engine.plan import Transfer
from minivllm.runner.kv_storage import KVStorage, move_blocks, zeros


class Pages:
    """`size` numbers for every slot of a storage, first 0."""

    def __init__(self, storage: KVStorage, size: int, dtype: torch.dtype) -> None:
        num_blocks, num_host_blocks = storage.data.shape[2], storage.host.shape[2]
        self.data = zeros((1, 1, num_blocks, storage.block_size, size), dtype, storage.data.device.type)
        self.host = self.data[:, :, :0]
        if num_host_blocks:
            self.host = zeros((1, 1, num_host_blocks, storage.block_size, size), dtype, "cpu")
        self.rows = self.data.view(-1, size)  # [slots, size]

    def move(self, transfers: list[Transfer]) -> None:
        move_blocks(self.data, self.host, transfers)


def slots_before(first: torch.Tensor, block_table: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots [B] of the positions before `first` [B] in the tables [B, M]; where there is none, some slot."""
    before = (first - 1).clamp(min=0)
    blocks = block_table.gather(1, (before // block_size)[:, None])[:, 0]
    return blocks * block_size + before % block_size
