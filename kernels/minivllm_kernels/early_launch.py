"""Launching a kernel before the one in front of it has ended: its weights are on their way when its input comes.

    kernel 1   weights ==== | wait | input, product, output |
    kernel 2       weights ======== | wait                   | input, product, output |
    kernel 3           weights ========= | wait                                        | ...

A kernel launched early (`launch_pdl`) may read before `wait_for_input` only what nobody writes in the same step:
weights, and what was there before the chain's first kernel, which is launched in the plain way. The wait is for all
kernels in front to have ended, for each of them waits too.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minivllm_kernels.configs import device_class


def can_launch_early(device: torch.device) -> bool:
    """Whether this GPU lets a kernel begin beside the one in front: data centre GPUs since Hopper."""
    return device_class(device) in ("hopper", "blackwell")


@triton.jit
def let_next_begin(IS_EARLY: tl.constexpr):
    """The next kernel may begin as soon as all programs of this one have come here."""
    if IS_EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_input(IS_EARLY: tl.constexpr):
    """Wait until the kernels in front have ended and what they wrote can be read."""
    if IS_EARLY:
        gdc_wait()
