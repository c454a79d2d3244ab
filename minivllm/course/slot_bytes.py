"""What a block table's last link shows: the numbers of one slot, and where they stand."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotBytes:
    """What one slot of one layer holds: `k` and `v` are [num_kv_heads, head_size].

    `byte_offset` is where KV head 0 begins, counted from the start of the layer's K tensor, and `address` is the
    same place in the process's memory; the next head lies `head_stride_bytes` further; `num_bytes` is one head's K.
    """

    byte_offset: int
    address: int
    head_stride_bytes: int
    num_bytes: int
    k: tuple[tuple[float, ...], ...]
    v: tuple[tuple[float, ...], ...]
