"""What other libraries take for the same attention: torch's SDPA always, the rest where it is installed."""

import importlib
import math
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from minivllm.bench.kernel_inputs import Attention, relative_error

Run = Callable[[], torch.Tensor]
WORST_ERROR = 0.02  # against our own output: bf16 differs by 0.003, another mask by far more
WORKSPACE_BYTES = 256 << 20  # what FlashInfer's documentation asks for, twice


def attention_rivals(step: Attention) -> dict[str, Run]:
    """Each rival that computes the same here, once ours has run; one that does not is named on stderr and left out."""
    runs: dict[str, Run] = {}
    for name, adapt in ADAPTERS.items():
        try:
            run = adapt(step)
            error = relative_error(run().reshape(step.out.shape), step.out)
            if not error < WORST_ERROR:
                raise ValueError(f"its output is {error:.2g} from ours")
        except ImportError:
            continue
        except Exception as error:  # other people's code on shapes it may not know: never the end of our benchmark
            print(f"  {name} left out: {str(error).strip().splitlines()[0][:100]}", file=sys.stderr)
            continue
        runs[name] = run
    return runs


def sdpa(backend: SDPBackend, step: Attention) -> Run:
    """On contiguous K and V, gathered beforehand and not timed."""
    new, total = step.shape.requests[0]
    if len(set(step.shape.requests)) > 1:
        raise ValueError("a ragged batch would need padding")
    k, v = (
        cache[step.block_table.long()].flatten(1, 2)[:, :total].transpose(1, 2).contiguous()
        for cache in (step.k_cache, step.v_cache)
    )  # [B, Hkv, total, D]
    q = step.q.unflatten(0, (-1, new)).transpose(1, 2)  # [B, H, new, D]
    mask = causal_lower_right(new, total) if 1 < new < total else None

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, mask, is_causal=new == total > 1, enable_gqa=True)
        return out.transpose(1, 2)

    return run


def flashinfer(step: Attention) -> Run:
    library, shape = importlib.import_module("flashinfer"), step.shape
    totals = [total for _, total in shape.requests]
    blocks = [-(-total // shape.block_size) for total in totals]
    starts = torch.tensor([0, *blocks]).cumsum(0).int().to(step.q.device)
    block_ids = torch.cat([row[:count] for row, count in zip(step.block_table, blocks, strict=True)])
    last = (step.num_tokens - 1) % shape.block_size + 1
    caches = (step.k_cache.transpose(1, 2), step.v_cache.transpose(1, 2))  # as they lie in memory: head-major
    sizes = (shape.heads, shape.kv_heads, shape.head_size, shape.block_size)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=step.q.device)
    if step.max_query_len == 1:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(starts, block_ids, last, *sizes, q_data_type=step.q.dtype, kv_data_type=step.q.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(step.query_starts, starts, block_ids, last, *sizes, causal=True, q_data_type=step.q.dtype)
    return partial(wrapper.run, step.q, caches, out=torch.empty_like(step.q))


def flash_attention(step: Attention) -> Run:
    """FlashAttention 3's own interface, where all requests bring as many queries."""
    library = importlib.import_module("flash_attn_interface")
    q = step.q.unflatten(0, (len(step.num_tokens), -1))  # [B, new, H, D]
    return partial(
        library.flash_attn_with_kvcache, q, step.k_cache, step.v_cache, cache_seqlens=step.num_tokens,
        page_table=step.block_table, causal=True,
    )  # fmt: skip


def vllm_flash_attention(step: Attention) -> Run:
    """FlashAttention 3 as vLLM ships it."""
    library = importlib.import_module("vllm.vllm_flash_attn")
    return partial(
        library.flash_attn_varlen_func, step.q, step.k_cache, step.v_cache, max_seqlen_q=step.max_query_len,
        cu_seqlens_q=step.query_starts, max_seqlen_k=step.max_tokens, seqused_k=step.num_tokens,
        block_table=step.block_table, causal=True, fa_version=3,
    )  # fmt: skip


def vllm_triton(step: Attention) -> Run:
    library = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    out = torch.empty_like(step.q)

    def run() -> torch.Tensor:
        library.unified_attention(
            q=step.q, k=step.k_cache, v=step.v_cache, out=out, cu_seqlens_q=step.query_starts,
            max_seqlen_q=step.max_query_len, seqused_k=step.num_tokens, max_seqlen_k=step.max_tokens,
            softmax_scale=1 / math.sqrt(step.shape.head_size), causal=True, window_size=(-1, -1),
            block_table=step.block_table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip
        return out

    return run


ADAPTERS: dict[str, Callable[[Attention], Run]] = {
    "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "FlashInfer": flashinfer,
    "FA3": flash_attention,
    "FA3 in vLLM": vllm_flash_attention,
    "Triton in vLLM": vllm_triton,
}
LIBRARIES = ("flashinfer-python", "flash-attn-3", "vllm")  # whose versions belong into the result
