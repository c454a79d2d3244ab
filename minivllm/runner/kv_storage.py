"""The bytes of the KV cache: one tensor, [rows, planes, num_blocks, block_size, heads, size].

A row is a layer, or where layers form groups (layer_groups.py) one layer of each group: their blocks differ.

K and V are two planes of all KV heads. Latent attention (DeepSeek) has one plane with one row per token, which is the
key; its first kv_lora_rank numbers are the value too.
"""

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.config import ModelConfig
from minivllm.engine.plan import Move, Transfer
from minivllm.errors import ConfigError
from minivllm.layer_groups import LayerGroups, one_group


@dataclass(frozen=True)
class LayerStorage:
    """K and V of one layer, each [num_blocks, block_size, heads, size]; a latent's v is a view of its k."""

    k: torch.Tensor
    v: torch.Tensor


class KVStorage:
    """Allocated once; slot = block_id * block_size + offset."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        device: str,
        num_host_blocks: int = 0,
        groups: LayerGroups | None = None,
    ) -> None:
        dtype = getattr(torch, config.dtype)
        planes, heads, size = config.cache_entry
        self.groups = groups or one_group(config.num_layers, config.windows)
        shape = (self.groups.num_rows, planes, num_blocks, block_size, heads, size)
        host_shape = (*shape[:2], num_host_blocks + 1, *shape[3:])  # its ids count from 1, too
        self.block_size = block_size
        self.data = zeros(shape, dtype, device)
        self.host = zeros(host_shape, dtype, "cpu") if num_host_blocks else self.data[:, :, :0]
        if num_host_blocks and device == "cuda":
            self.host = self.host.pin_memory()  # the device copies from and to it without a detour
        value_size = config.mla.kv_lora_rank if config.mla else size
        self.rows = [LayerStorage(k=row[0], v=row[-1, ..., :value_size]) for row in self.data]
        self.layers = [self.rows[row] for _, row in self.groups.places]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def clear(self, block_ids: list[int]) -> None:
        """Zero fresh blocks: what their last owner left may be infinite, and masked slots are multiplied by 0."""
        for block_id in block_ids:  # few, and faster one by one than index_fill_
            self.data[:, :, block_id].zero_()

    def move(self, transfers: list[Transfer]) -> None:
        """Copy whole blocks, over all layers, one after the other: a later one may overwrite what an earlier read."""
        move_blocks(self.data, self.host, transfers)

    def save_block(self, block_id: int, *, on_host: bool = False) -> bytes:
        """A block's contents over all its layers, bit by bit."""
        block = (self.host if on_host else self.data)[:, :, block_id]  # [rows, planes, block_size, heads, size]
        return block.contiguous().cpu().view(torch.uint8).numpy().tobytes()

    def load_block(self, block_id: int, contents: bytes, *, on_host: bool = False) -> None:
        """Put back what `save_block` gave, into a storage of the same shape of blocks."""
        block = (self.host if on_host else self.data)[:, :, block_id]
        block.copy_(torch.frombuffer(bytearray(contents), dtype=block.dtype).view(block.shape))

    def slot(self, row: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V stored at a slot, [heads, size] each: views of the cache itself.

        A row is a layer; of layers in groups, that one of the group whose block it is (`groups.layers[group][row]`).
        """
        block, offset = divmod(slot, self.block_size)
        return self.rows[row].k[block, offset], self.rows[row].v[block, offset]


def move_blocks(data: torch.Tensor, host: torch.Tensor, transfers: list[Transfer]) -> None:
    """Copy whole blocks between and within [rows, planes, blocks, ...] of a device and of its host."""
    ends = {Move.COPY: (data, data), Move.SWAP_OUT: (data, host), Move.SWAP_IN: (host, data)}
    for transfer in transfers:
        source, target = ends[transfer.move]
        target[:, :, transfer.target_id].copy_(source[:, :, transfer.source_id])


def block_bytes(config: ModelConfig, block_size: int, groups: LayerGroups) -> int:
    """Bytes of one block over the layers it serves: 16 tokens of SmolLM2 in bf16, all 30 layers -> 368,640."""
    return config.kv_bytes_per_token // config.num_layers * groups.num_rows * block_size


def blocks_in(
    memory_bytes: int, config: ModelConfig, block_size: int, groups: LayerGroups, drafter_bytes: int = 0
) -> int:
    """Blocks that a byte budget buys, the null block included, where drafters keep some bytes of a token, too.

    Raises ConfigError when that is not even one token.
    """
    own_bytes = block_bytes(config, block_size, groups) + drafter_bytes * block_size
    num_blocks = memory_bytes // own_bytes
    if num_blocks < 2:
        needed = 2 * own_bytes
        raise ConfigError(
            f"kv_cache_memory of {memory_bytes:,} bytes is less than two blocks of {block_size} tokens "
            f"({needed:,} bytes): raise kv_cache_memory or lower block_size"
        )
    return num_blocks


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros; on a CPU they cost no memory until they are used."""
    if device != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zero pages; torch.zeros would write them all.
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
