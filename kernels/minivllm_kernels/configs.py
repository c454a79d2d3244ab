"""Which tile sizes each kernel runs with: static tables by device class, chosen by measurement (kernels/NOTES.md).

Nothing is tuned while a program runs: a choice that depends on timing would make outputs depend on timing too.
"""

from dataclasses import dataclass
from functools import cache

import torch
from triton import next_power_of_2

DEVICE_CLASSES = ("ampere", "consumer", "hopper", "blackwell", "interpreter")
MULTIPROCESSORS_WITHOUT_GPU = 4  # under the interpreter programs run one after another: few, but more than one


@cache
def device_class(device: torch.device) -> str:
    """`ampere` (A100), `consumer` (99 kB of shared memory), `hopper`, `blackwell`; `interpreter` on a CPU."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)) or major >= 12:
        return "consumer"
    return {8: "ampere", 9: "hopper"}.get(major, "blackwell")


@cache
def num_multiprocessors(device: torch.device) -> int:
    """SMs of a GPU: a persistent kernel launches a multiple of these."""
    if device.type != "cuda":
        return MULTIPROCESSORS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class StoreConfig:
    rows: int  # (token, head) pairs a program copies
    num_warps: int


@dataclass(frozen=True)
class RowConfig:
    elements_per_thread: int  # of one tensor: few make threads wait for each other, many fill the registers


@dataclass(frozen=True)
class RopeConfig:
    elements_per_thread: int  # of the first halves of the q heads; as many of the second
    max_q_heads: int = 32  # of one program: a token with more is split among several


@dataclass(frozen=True)
class SiluConfig:
    columns: int  # of one row, a program's share
    num_warps: int


# Bound by memory: what counts is that enough 16-byte loads are under way, so one choice suits every GPU until measured.
STORE_KV = dict.fromkeys(DEVICE_CLASSES, StoreConfig(rows=16, num_warps=4))
ROPE = dict.fromkeys(DEVICE_CLASSES, RopeConfig(elements_per_thread=8))
NORM = dict.fromkeys(DEVICE_CLASSES, RowConfig(elements_per_thread=16))
SILU = dict.fromkeys(DEVICE_CLASSES, SiluConfig(columns=1024, num_warps=4))


@dataclass(frozen=True)
class RopeShape:
    q_tile: int
    kv_tile: int
    splits: int  # programs per token
    num_warps: int


def rope_shape(device: torch.device, num_heads: int, num_kv_heads: int, head_size: int) -> RopeShape:
    """How a token's heads fall to programs: 16 q and 8 kv heads of 128 -> one program of tiles 16 and 8, 4 warps."""
    config = ROPE[device_class(device)]
    q_tile = min(next_power_of_2(num_heads), config.max_q_heads)
    splits = -(-num_heads // q_tile)
    kv_tile = next_power_of_2(-(-num_kv_heads // splits))
    threads = q_tile * next_power_of_2(head_size // 2) // config.elements_per_thread
    return RopeShape(q_tile, kv_tile, splits, num_warps=min(max(threads // 32, 1), 16))


def norm_warps(device: torch.device, padded_width: int) -> int:
    """Warps for a row: never more threads than elements, or two of them would hold the same one."""
    return min(max(padded_width // NORM[device_class(device)].elements_per_thread // 32, 1), 16)


@dataclass(frozen=True)
class RowProductConfig:
    product_bytes: int  # of a matrix, a program's share: all of it is under way at once
    gate_bytes: int  # of gate and up together
    least_rows: int  # else x and norm, which each program loads, are as many bytes as the weight
    most_bytes: int  # that registers hold
    columns: int  # of a stretch: 8 a thread are a load of 16 bytes
    num_warps: int


ROW_PRODUCT = dict.fromkeys(
    DEVICE_CLASSES,
    RowProductConfig(product_bytes=16384, gate_bytes=8192, least_rows=2, most_bytes=65536, columns=1024, num_warps=4),
)


@dataclass(frozen=True)
class RowShape:
    rows: int
    columns: int
    num_warps: int


def row_shape(device: torch.device, row_bytes: int, *, is_gate: bool = False) -> RowShape:
    """How many rows of a matrix a program takes: rows of 2 kB -> 8, of 24 kB -> 2; of a gate, how many pairs."""
    config = ROW_PRODUCT[device_class(device)]
    unit, wanted = (2 * row_bytes, config.gate_bytes) if is_gate else (row_bytes, config.product_bytes)
    rows = min(max(wanted // unit, config.least_rows), max(config.most_bytes // unit, 1))
    return RowShape(1 << rows.bit_length() - 1, config.columns, config.num_warps)


@dataclass(frozen=True)
class RowAttentionConfig:
    """How `row_attention` runs: one wave of programs shares the keys of one request."""

    tile_bytes: int  # of K, and as many of V: two tiles of both are in registers at once
    num_warps: int = 4
    programs_per_sm: int = 1

    def tile_tokens(self, row_bytes: int) -> int:
        """Keys per tile; a tensor core wants at least 16."""
        return max(16, self.tile_bytes // row_bytes)


ROW_ATTENTION = dict.fromkeys(DEVICE_CLASSES, RowAttentionConfig(tile_bytes=16384))
ROW_ATTENTION_FLOAT32 = RowAttentionConfig(tile_bytes=8192, num_warps=8)  # no tensor cores: more registers a key


def row_attention_config(device: torch.device, dtype: torch.dtype) -> RowAttentionConfig:
    """The measured choice for this device."""
    return ROW_ATTENTION_FLOAT32 if dtype == torch.float32 else ROW_ATTENTION[device_class(device)]


@dataclass(frozen=True)
class SamplerConfig:
    """How `sample` runs: as many warps as registers allow, each with a tile of 1,024 logits under way."""

    tiles: int  # per program and round
    num_warps: int  # as many as tiles, or half as many: a warp that shares a tile waits for others
    programs_per_sm: int  # one wave of them shares all rows
    stages: int  # of the loop over tiles: 1 leaves it to other warps to fill the wait, more copies tiles ahead
    filter_tile: int  # logits per round of the filters, which are one program per row
    filter_warps: int

    def programs(self, device: torch.device) -> int:
        """Programs to share among the rows."""
        return self.programs_per_sm * num_multiprocessors(device)


# Bound by memory on every GPU.
SAMPLER = {
    "hopper": SamplerConfig(tiles=4, num_warps=4, programs_per_sm=10, stages=1, filter_tile=4096, filter_warps=16),
    "blackwell": SamplerConfig(tiles=4, num_warps=4, programs_per_sm=10, stages=1, filter_tile=4096, filter_warps=8),
    "ampere": SamplerConfig(tiles=4, num_warps=4, programs_per_sm=10, stages=1, filter_tile=4096, filter_warps=16),
    "consumer": SamplerConfig(tiles=4, num_warps=4, programs_per_sm=8, stages=1, filter_tile=4096, filter_warps=16),
    "interpreter": SamplerConfig(tiles=2, num_warps=4, programs_per_sm=1, stages=1, filter_tile=1024, filter_warps=4),
}


def sampler_config(device: torch.device) -> SamplerConfig:
    """The measured choice for this device."""
    return SAMPLER[device_class(device)]
