"""One set of keys and values in many layouts, and the decode kernels that read them: the inputs of `paging_cost`.

Every layout holds the same numbers, so all outputs can be compared with one another, and bit for bit within a kernel.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from minivllm_kernels.configs import num_multiprocessors
from minivllm_kernels.fastest import fastest_attention, fastest_decode
from minivllm_kernels.paged_decode import paged_decode, stream_kernel
from minivllm_kernels.paged_decode_hopper import decode_obstacle
from minivllm_kernels.split_kv import decode_arguments
from minivllm_kernels.workspace import SplitWorkspace
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton import next_power_of_2

Run = Callable[[], object]
ONE_BLOCK = 1 << 20  # tokens: longer than any request here, so every token lies in its request's block 0
TABLE_ALIGNMENT = 16  # entries of a row: with strides of one kind, a kernel is compiled once a block size
BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Keys:
    """What a layer attends to: `copies` steps of `batch` requests, all of one length, contiguous."""

    q: torch.Tensor  # [copies * batch, H, D]
    k: torch.Tensor  # [copies * batch, Hkv, L, D]
    v: torch.Tensor
    batch: int

    @classmethod
    def random(
        cls, batch: int, context: int, copies: int, heads: tuple[int, int, int], device: torch.device,
        dtype: torch.dtype, seed: int,
    ) -> "Keys":  # fmt: skip
        """Normal random numbers; heads is (query heads, KV heads, head size)."""
        num_heads, kv_heads, head_size = heads
        normal = partial(torch.randn, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))
        q = normal(copies * batch, num_heads, head_size)
        k, v = (normal(copies * batch, kv_heads, context, head_size) for _ in "kv")
        return cls(q, k, v, batch)

    @property
    def context(self) -> int:
        return self.k.shape[2]

    @property
    def num_bytes(self) -> int:
        """K and V once, q and out, of one step; the block table comes on top."""
        return 2 * (self.k.nbytes + self.q.nbytes) * self.batch // len(self.q)

    def steps(self) -> Iterator[slice]:
        """The rows of each copy."""
        return (slice(first, first + self.batch) for first in range(0, len(self.q), self.batch))


@dataclass(frozen=True)
class Paged:
    """The same keys in blocks, head-major in memory as the engine stores them."""

    k_cache: torch.Tensor  # [num_blocks, block_size, Hkv, D]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [copies * batch, M] int32
    num_tokens: torch.Tensor  # [copies * batch] int32


def paged(keys: Keys, block_size: int, is_scattered: bool, seed: int = 0) -> Paged:
    """Blocks in the order of the tokens, or at random places of a pool that is a quarter larger."""
    requests, kv_heads, context, head_size = keys.k.shape
    columns = -(-context // block_size)
    used, device = requests * columns, keys.k.device
    pool = used * 5 // 4 + 1 if is_scattered else used
    order = torch.arange(used, device=device)
    if is_scattered:
        order = torch.randperm(pool, generator=torch.Generator(device).manual_seed(seed), device=device)[:used]
    caches = []
    for tensor in (keys.k, keys.v):
        stored = torch.zeros(pool, kv_heads, block_size, head_size, dtype=tensor.dtype, device=device)
        if columns * block_size > context:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, columns * block_size - context))
        blocks = tensor.unflatten(2, (columns, block_size)).transpose(1, 2)  # [requests, columns, Hkv, bs, D]
        stored[order] = blocks.flatten(0, 1)
        caches.append(stored.transpose(1, 2))
    table = torch.zeros(requests, -(-columns // TABLE_ALIGNMENT) * TABLE_ALIGNMENT, dtype=torch.int32, device=device)
    table[:, :columns] = order.view(requests, columns).int()
    num_tokens = torch.full((requests,), context, dtype=torch.int32, device=device)
    return Paged(caches[0], caches[1], table, num_tokens)


def paged_runs(keys: Keys, layout: Paged, kernel: str, out: torch.Tensor) -> list[Run]:
    """A launch for each copy: 'plain', the portable decode kernel; 'engine', what the engine's decode step calls;
    'ragged', what it calls where some request brings more than one query."""
    workspace = workspace_of(keys)
    starts = torch.arange(keys.batch + 1, dtype=torch.int32, device=keys.q.device)
    runs: list[Run] = []
    for rows in keys.steps():
        caches = (layout.k_cache, layout.v_cache)
        inputs = (keys.q[rows], *caches, layout.block_table[rows], layout.num_tokens[rows])
        if kernel == "ragged":
            attend = fastest_attention(keys.q[rows], *caches, keys.batch, 1)
            runs.append(partial(attend, *inputs, starts, out[rows], max_query_len=1))
        else:
            decode = paged_decode if kernel == "plain" else fastest_decode(keys.q[rows], *caches)
            runs.append(partial(decode, *inputs, out[rows], workspace))
    return runs


def has_engine_kernel(keys: Keys, layout: Paged) -> bool:
    """Whether the engine would take another kernel than the portable one here."""
    return decode_obstacle(keys.q, layout.k_cache, layout.v_cache) is None


def contiguous_runs(keys: Keys, out: torch.Tensor) -> list[Run]:
    """The portable kernel where each request is one block: a start address per request, no second look-up."""
    workspace, device = workspace_of(keys), keys.q.device
    num_tokens = torch.full((len(keys.q),), keys.context, dtype=torch.int32, device=device)
    table = torch.arange(len(keys.q), dtype=torch.int32, device=device)[:, None]
    table = table.repeat(1, TABLE_ALIGNMENT)  # only column 0 is read
    k, v = (tensor.transpose(1, 2) for tensor in (keys.k, keys.v))  # [requests, L, Hkv, D]
    return [partial(_contiguous, keys.q[r], k, v, table[r], num_tokens[r], out[r], workspace) for r in keys.steps()]


def _contiguous(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    num_tokens: torch.Tensor,
    out: torch.Tensor,
    workspace: SplitWorkspace,
) -> None:
    """One launch; the checks see each request's first token as a block of one, which has the strides of the whole."""
    inputs = (q, k[:, :1], v[:, :1], table, num_tokens)
    arguments = decode_arguments(*inputs, out, None, None, None, None)
    arguments = replace(arguments, reading=arguments.reading | {"BLOCK_SIZE": ONE_BLOCK})
    programs = arguments.config.programs_per_sm * num_multiprocessors(q.device)
    stream_kernel[(programs,)](
        *inputs, out, workspace.parts, workspace.lse, workspace.arrivals, len(q),
        *arguments.numbers, *arguments.strides, out.stride(0), out.stride(1),
        NUM_KV_HEADS=k.shape[2], LEAST_TILES=arguments.config.least_tiles,
        BATCH=next_power_of_2(len(q)), **arguments.shape, **arguments.merging, **arguments.reading,
    )  # fmt: skip


def sdpa_runs(keys: Keys, backend: SDPBackend) -> list[Run]:
    """torch's own attention on the contiguous keys; a run returns its output, [batch, H, 1, D]."""

    def attend(rows: slice) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(keys.q[rows, :, None], keys.k[rows], keys.v[rows], enable_gqa=True)

    return [partial(attend, rows) for rows in keys.steps()]


def gather_runs(keys: Keys, layout: Paged, backend: SDPBackend) -> list[Run]:
    """The way without a paged kernel: copy the request's blocks together, then torch's own attention."""
    columns = -(-keys.context // layout.k_cache.shape[1])

    def attend(rows: slice) -> torch.Tensor:
        table = layout.block_table[rows, :columns].long()
        k, v = (
            cache.transpose(1, 2)[table].transpose(1, 2).flatten(2, 3)[:, :, : keys.context]
            for cache in (layout.k_cache, layout.v_cache)
        )  # [batch, Hkv, L, D]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(keys.q[rows, :, None], k, v, enable_gqa=True)

    return [partial(attend, rows) for rows in keys.steps()]


def workspace_of(keys: Keys) -> SplitWorkspace:
    group = keys.q.shape[1] // keys.k.shape[1]
    return SplitWorkspace.allocate(keys.q.device, 0, group, keys.q.shape[2])
