"""One small call of every launcher for each way it can be compiled: what tests/compile_kernels.py compiles.

A new kernel, head size or variant is one more line in EXAMPLES. Values do not matter and nothing is computed; types,
alignment and constants do, so sizes are those of models where they reach the kernel as constants.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from minivllm_kernels import attention_configs, configs
from minivllm_kernels.activations import silu_and_mul
from minivllm_kernels.checks import HEAD_SIZES
from minivllm_kernels.embedding import embed
from minivllm_kernels.mla_decode import mla_decode
from minivllm_kernels.mla_decode_hopper import mla_decode_hopper
from minivllm_kernels.norms import add_rms_norm, rms_norm
from minivllm_kernels.paged_attention import paged_attention
from minivllm_kernels.paged_attention_hopper import paged_attention_hopper
from minivllm_kernels.paged_decode import paged_decode
from minivllm_kernels.paged_decode_hopper import paged_decode_hopper
from minivllm_kernels.read import TILE, TILES, read_sums
from minivllm_kernels.row_attention import row_attention
from minivllm_kernels.row_gate import row_gate
from minivllm_kernels.row_product import row_product
from minivllm_kernels.sampling import MAX_TILES, sample
from minivllm_kernels.shared_prefix_decode import shared_prefix_decode
from minivllm_kernels.store_kv import qk_norm_rope_store, store_kv
from minivllm_kernels.workspace import SplitWorkspace

LITTLE = 32  # bytes of stack: eight registers, spilled outside the loops
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Example:
    """A call, and what its kernels may cost."""

    name: str
    call: Callable[[], None]
    kernel: str = ""  # the kernel whose configuration says how many programs share an SM ...
    config: Callable[[], object] = object  # ... and that configuration, once we pretend to have a GPU

    @property
    def allowed_stack_bytes(self) -> int:
        return SPILLS.get(self.name, LITTLE)

    @property
    def is_for_every_gpu(self) -> bool:
        return not self.name.startswith("Gluon")


@dataclass(frozen=True)
class Paged:
    """Attention inputs: 16 requests of one new token (or 4 of 64) over blocks stored head-major."""

    heads: tuple[int, int] = (32, 8)
    head_size: int = 128
    block_size: int = 64
    dtype: torch.dtype = BF16

    def q(self, num_tokens: int) -> torch.Tensor:
        return torch.empty(num_tokens, self.heads[0], self.head_size, dtype=self.dtype)

    def cache(self) -> torch.Tensor:
        return torch.empty(4, self.heads[1], self.block_size, self.head_size, dtype=self.dtype).transpose(1, 2)


CPU = torch.device("cpu")  # where examples live; what configurations they get is up to compile_kernels.pretend


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def decode(
    paged: Paged, split_tokens: int | None = None, window: int | None = None, soft_cap: float | None = None
) -> None:
    workspace = SplitWorkspace.allocate(CPU, 16 * 32 * 16, paged.heads[0], paged.head_size)
    paged_decode(
        paged.q(16), paged.cache(), paged.cache(), ints(16, 32), ints(16), paged.q(16), workspace,
        split_tokens=split_tokens, window=window, soft_cap=soft_cap,
    )  # fmt: skip


def decode_hopper(
    paged: Paged, num_requests: int = 16, window: int | None = None, soft_cap: float | None = None
) -> None:
    workspace = SplitWorkspace.allocate(CPU, 0, paged.heads[0], paged.head_size)
    n = num_requests
    inputs = (paged.q(n), paged.cache(), paged.cache(), ints(n, 32), ints(n), paged.q(n), workspace)
    paged_decode_hopper(*inputs, window=window, soft_cap=soft_cap)


def attend(
    launch: Callable[..., None],
    paged: Paged,
    max_query_len: int = 64,
    **options: float | attention_configs.AttentionConfig,
) -> None:
    launch(
        paged.q(256), paged.cache(), paged.cache(), ints(4, 32), ints(4), ints(5), paged.q(256),
        max_query_len=max_query_len, **options,
    )  # fmt: skip


def prefix(paged: Paged) -> None:
    workspace = SplitWorkspace.allocate(CPU, 16 * 32 * 16, paged.heads[0], paged.head_size)
    groups = (ints(16), ints(3), ints(16))
    inputs = (paged.q(16), paged.cache(), paged.cache(), ints(16, 32), ints(16), *groups, paged.q(16))
    shared_prefix_decode(*inputs, workspace, max_own_tokens=1024)


def mla(heads: int, dtype: torch.dtype = BF16, split_tokens: int | None = None) -> None:
    latent, rope = empty(16, heads, 512, dtype=dtype), empty(16, heads, 64, dtype=dtype)
    workspace = SplitWorkspace.allocate(CPU, 16 * heads * 16, 16, 512)
    mla_decode(
        latent, rope, empty(4, 64, 576, dtype=dtype), ints(16, 32), ints(16), latent, workspace, scale=0.1,
        split_tokens=split_tokens, config=attention_configs.MLA_FLOAT32 if dtype == FP32 else None,
    )  # fmt: skip


def mla_hopper(heads: int, dtype: torch.dtype = BF16, block_size: int = 64) -> None:
    latent, rope = empty(16, heads, 512, dtype=dtype), empty(16, heads, 64, dtype=dtype)
    workspace = SplitWorkspace.allocate(CPU, 16 * heads * 16, 16, 512)
    cache = empty(4, block_size, 576, dtype=dtype)
    mla_decode_hopper(latent, rope, cache, ints(16, 32), ints(16), latent, workspace, scale=0.1)


def fused(paged: Paged, has_norm: bool) -> None:
    weight = empty(paged.head_size, dtype=paged.dtype) if has_norm else None
    qkv = empty(16, (paged.heads[0] + 2 * paged.heads[1]) * paged.head_size, dtype=paged.dtype)
    angles = empty(64, paged.head_size, dtype=FP32)
    qk_norm_rope_store(
        qkv, weight, weight, angles, ints(16), ints(16), paged.q(16), paged.cache(), paged.cache(),
        num_heads=paged.heads[0], num_kv_heads=paged.heads[1], eps=1e-6,
    )  # fmt: skip


def store(paged: Paged) -> None:
    new = empty(16, paged.heads[1], paged.head_size, dtype=paged.dtype)
    store_kv(new, new, paged.cache(), paged.cache(), ints(16))


def norms(width: int, dtype: torch.dtype) -> None:
    rows, weight = empty(16, width, dtype=dtype), empty(width, dtype=dtype)
    rms_norm(rows, weight, rows, eps=1e-6)
    add_rms_norm(rows, empty(16, width, dtype=dtype), weight, rows, eps=1e-6)


def first_rows(dtype: torch.dtype) -> None:
    embed(ints(16), ints(16), empty(300, 1024, dtype=dtype), empty(16, 1024, dtype=dtype))


def gate(dtype: torch.dtype) -> None:
    silu_and_mul(empty(16, 2 * 3072, dtype=dtype), empty(16, 3072, dtype=dtype))


def single_row(width: int, dtype: torch.dtype, early: bool = True) -> None:
    x, norm, out = empty(1, width, dtype=dtype), empty(width, dtype=dtype), empty(1, 3072, dtype=dtype)
    weight, bias = empty(3072, width, dtype=dtype), empty(3072, dtype=dtype)
    row_product(x, weight, None, out, norm=norm, eps=1e-6, early=early)
    row_product(x, weight, None, out, plus=empty(1, width, dtype=dtype), norm=norm, eps=1e-6, early=early)
    row_product(x, weight, bias, out, add_to=out, early=early)
    row_gate(x, norm, weight, bias, empty(1, 1536, dtype=dtype), eps=1e-6, early=early)


def attend_row(paged: Paged, has_norm: bool = True, window: int | None = None) -> None:
    weight = empty(paged.head_size, dtype=paged.dtype) if has_norm else None
    qkv = empty(1, (paged.heads[0] + 2 * paged.heads[1]) * paged.head_size, dtype=paged.dtype)
    workspace = SplitWorkspace.allocate(CPU, 0, paged.heads[0] // paged.heads[1], paged.head_size)
    row_attention(
        qkv, weight, weight, empty(64, paged.head_size, dtype=FP32), ints(1), ints(1), paged.cache(), paged.cache(),
        ints(1, 32), ints(1), paged.q(1), workspace, eps=1e-6, window=window, early=True,
    )  # fmt: skip


def draw(dtype: torch.dtype, *filters: str) -> None:
    rows = {"top_k": ints(16), "top_p": empty(16, dtype=FP32), "min_p": empty(16, dtype=FP32)}
    top_k, top_p, min_p = (rows[name] if name in filters else None for name in rows)
    seeds = torch.empty(16, dtype=torch.int64)
    sample(
        empty(16, 151_936, dtype=dtype), empty(16, dtype=FP32), seeds, seeds, seeds,
        empty(16, MAX_TILES, dtype=torch.int64), ints(16), empty(16, dtype=FP32),
        top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip


DECODES = {
    **{f"d {size}": partial(decode, Paged(head_size=size)) for size in HEAD_SIZES},
    "block 16": partial(decode, Paged(block_size=16)),
    "16/8": partial(decode, Paged(heads=(16, 8))),
    "9/3 d 64": partial(decode, Paged(heads=(9, 3), head_size=64)),
    "MQA": partial(decode, Paged(heads=(32, 1))),
    "fp16": partial(decode, Paged(dtype=FP16)),
    "fp32": partial(decode, Paged(dtype=FP32)),
    "window": partial(decode, Paged(), window=100),
    "soft cap": partial(decode, Paged(), soft_cap=50.0),
}
ROW_ATTENTIONS = {
    **{f"d {size}": partial(attend_row, Paged(head_size=size)) for size in HEAD_SIZES},
    "16/8 block 16": partial(attend_row, Paged(heads=(16, 8), block_size=16)),
    "9/3 d 64": partial(attend_row, Paged(heads=(9, 3), head_size=64), has_norm=False),
    "MQA": partial(attend_row, Paged(heads=(32, 1))),
    "fp16": partial(attend_row, Paged(dtype=FP16)),
    "fp32": partial(attend_row, Paged(dtype=FP32)),
    "window": partial(attend_row, Paged(), window=100),
}
PLAIN = partial(attend, paged_attention)
PREFILLS = {
    **{f"d {size}": partial(PLAIN, Paged(head_size=size)) for size in HEAD_SIZES},
    **{f"d {size} block 16": partial(PLAIN, Paged(head_size=size, block_size=16)) for size in HEAD_SIZES},
    "window, soft cap": partial(PLAIN, Paged(), window=100, soft_cap=50.0),
    "9/3 d 64": partial(PLAIN, Paged(heads=(9, 3), head_size=64)),
    "of 16": partial(PLAIN, Paged(), 16),
    "of 16 block 16": partial(PLAIN, Paged(block_size=16), 16),
    "of 4 block 16": partial(PLAIN, Paged(block_size=16), 4),
    "fp16": partial(PLAIN, Paged(dtype=FP16)),
    "fp32": partial(PLAIN, Paged(dtype=FP32), config=attention_configs.ATTENTION_FLOAT32),
}
GLUON = partial(attend, paged_attention_hopper)
GLUONS = {
    **{f"d {size}": partial(GLUON, Paged(head_size=size)) for size in attention_configs.HOPPER_ATTENTION},
    **{f"block {size}": partial(GLUON, Paged(block_size=size)) for size in (16, 128, 256)},
    "window, soft cap": partial(GLUON, Paged(), window=100, soft_cap=50.0),
    "fp16": partial(GLUON, Paged(dtype=FP16)),
}
GLUON_DECODES = {
    **{
        f"d {size}": partial(decode_hopper, Paged(head_size=size))
        for size in attention_configs.HOPPER_DECODE_HEAD_SIZES
    },
    "many pairs": partial(decode_hopper, Paged(), 512),
    **{f"block {size}": partial(decode_hopper, Paged(block_size=size)) for size in (8, 16, 256)},
    "9/3 d 64": partial(decode_hopper, Paged(heads=(9, 3), head_size=64)),
    **{f"{heads}/1": partial(decode_hopper, Paged(heads=(heads, 1))) for heads in (32, 64)},
    "window, soft cap": partial(decode_hopper, Paged(), window=100, soft_cap=50.0),
    "fp16": partial(decode_hopper, Paged(dtype=FP16)),
}
FILTERS = ("top_k", "top_p", "min_p")
SPILLS = {  # bytes of stack that we know of and accept: shrink them, never let them grow
    "prefill d 80": 112, "prefill d 96": 112, "prefill d 128": 120, "prefill fp16": 120,
    "prefill window, soft cap": 248, "MLA 128 heads": 128, "decode MQA": 64,
    "shared prefix d 64": 192, "shared prefix d 256": 48, "Gluon decode 64/1": 448,
}  # fmt: skip

EXAMPLES = [
    *(
        Example(f"decode {k}", v, "stream_kernel", partial(attention_configs.decode_config, CPU))
        for k, v in DECODES.items()
    ),
    Example("decode, fixed split", partial(decode, Paged(), split_tokens=512)),
    *(Example(f"shared prefix d {size}", partial(prefix, Paged(head_size=size))) for size in HEAD_SIZES),
    *(Example(f"prefill {k}", v) for k, v in PREFILLS.items()),
    *(Example(f"Gluon {k}", v) for k, v in GLUONS.items()),
    *(Example(f"Gluon decode {k}", v) for k, v in GLUON_DECODES.items()),
    Example(
        "Gluon decode, three programs",
        partial(decode_hopper, Paged(heads=(16, 8), head_size=64)),
        "_hopper_decode_kernel",
        partial(attention_configs.hopper_decode_config, 2, 64, 1.0),
    ),
    *(
        Example(
            f"MLA {n} heads", partial(mla, n), "_stream_kernel", partial(attention_configs.mla_config, CPU, n, BF16)
        )
        for n in (16, 32, 128)
    ),
    *(Example(f"Gluon MLA {n} heads", partial(mla_hopper, n)) for n in (16, 32, 128)),
    Example("Gluon MLA block 16", partial(mla_hopper, 16, block_size=16)),
    Example("Gluon MLA fp16", partial(mla_hopper, 16, FP16)),
    Example("MLA, fixed split", partial(mla, 16, split_tokens=512)),
    Example("MLA fp32", partial(mla, 16, FP32)),
    *(Example(f"norm RoPE store d {size}", partial(fused, Paged(head_size=size), True)) for size in HEAD_SIZES),
    Example("RoPE store", partial(fused, Paged(), False)),
    *(Example(f"store_kv d {size}", partial(store, Paged(head_size=size))) for size in HEAD_SIZES),
    *(Example(f"add norm {width}", partial(norms, width, BF16)) for width in (576, 1024, 4096, 16384)),
    *(Example(f"add norm {dtype}", partial(norms, 4096, dtype)) for dtype in (FP16, FP32)),
    *(Example(f"embed {dtype}", partial(first_rows, dtype)) for dtype in (BF16, FP32)),
    Example("silu_and_mul bf16", partial(gate, BF16)),
    Example("read", lambda: read_sums(empty(4, TILE * TILES), empty(4, dtype=FP32))),
    Example("silu_and_mul fp32", partial(gate, FP32)),
    *(Example(f"row products of {width}", partial(single_row, width, BF16)) for width in (576, 1024, 3072, 12288)),
    Example("row products, not early", partial(single_row, 1024, BF16, early=False)),
    Example("row products fp32", partial(single_row, 1024, FP32)),
    *(Example(f"row attention {k}", v) for k, v in ROW_ATTENTIONS.items()),
    Example("sample bf16", partial(draw, BF16), "_sample_kernel", partial(configs.sampler_config, CPU)),
    *(Example(f"sample {dtype}", partial(draw, dtype)) for dtype in (FP16, FP32)),
    *(Example(f"sample {name}", partial(draw, BF16, name)) for name in FILTERS),
    Example("sample filtered", partial(draw, BF16, *FILTERS)),
]
