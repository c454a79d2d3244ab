"""Which tile sizes each kernel runs with: static tables by device class, chosen by measurement (kernels/NOTES.md).

Nothing is tuned while a program runs: a choice that depends on timing would make outputs depend on timing too.
"""

from functools import cache

import torch

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
