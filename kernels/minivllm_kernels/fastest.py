"""Which kernel answers: the one for Hopper where it fits, else the plain one; same arguments, same result.

What decides is known on the host: device, type, head and block size, and the shape of the batch.
"""

from collections.abc import Callable

import torch

from minivllm_kernels.mla_decode import mla_decode
from minivllm_kernels.mla_decode_hopper import mla_decode_hopper, mla_obstacle
from minivllm_kernels.paged_attention import paged_attention
from minivllm_kernels.paged_attention_hopper import attention_obstacle, paged_attention_hopper
from minivllm_kernels.paged_decode import paged_decode
from minivllm_kernels.paged_decode_hopper import decode_obstacle, paged_decode_hopper

Kernel = Callable[..., None]


def fastest_decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> Kernel:
    """`paged_decode` or `paged_decode_hopper`; only the first has `split_tokens`."""
    return paged_decode if decode_obstacle(q, k_cache, v_cache) else paged_decode_hopper


def fastest_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, num_requests: int, max_query_len: int
) -> Kernel:
    """`paged_attention` or `paged_attention_hopper`.

    The Hopper kernel visits max_query_len queries of every request: a long chunk among decodes is not for it.
    """
    is_sparse = 4 * len(q) < num_requests * max_query_len
    return paged_attention if is_sparse or attention_obstacle(q, k_cache, v_cache) else paged_attention_hopper


def fastest_mla(q_latent: torch.Tensor, q_rope: torch.Tensor, latent_cache: torch.Tensor) -> Kernel:
    """`mla_decode` or `mla_decode_hopper`; only the first has `split_tokens`."""
    return mla_decode if mla_obstacle(q_latent, q_rope, latent_cache) else mla_decode_hopper
