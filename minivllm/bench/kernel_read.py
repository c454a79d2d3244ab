"""Reading alone, measured like the kernels: flushed cache and all.

do_bench flushes the L2 cache by writing to 256 MB, and what it wrote has still to leave the cache while the measured
kernel runs: about 8 us on an H200, in every figure. So the roof of a decode kernel is this, more than the copy.
"""

from functools import partial

import torch
from minivllm_kernels.read import TILE, TILES, read_sums

from minivllm.bench.kernel_shapes import Call, Case, Target


def read_cases() -> list[Case]:
    """The bytes of the decode shapes: shared prefixes, d 64, 1 x 65536, 8 x 16384, 64 x 4096."""
    return [
        Case("read", f"read {megabytes} MB", partial(build_read, megabytes), megabytes * 10**6, Target())
        for megabytes in (143, 201, 268, 537, 1074)
    ]


def build_read(megabytes: int, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    num_programs = -(-megabytes * 10**6 // (2 * TILE * TILES))
    random = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_programs, TILE * TILES, dtype=torch.float32, device=device, generator=random).to(dtype)
    sums = torch.full((num_programs,), torch.nan, device=device)

    def check() -> float:
        """Against float64, in units of what such a sum is likely to be."""
        return float((sums - x.double().sum(dim=1)).abs().max() / (TILE * TILES) ** 0.5)

    return Call(partial(read_sums, x, sums), check)
