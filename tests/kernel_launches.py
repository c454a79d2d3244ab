"""Every attention kernel behind one signature; as a script, all kernels once on small odd shapes, for a sanitizer."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from minivllm_kernels.activations import silu_and_mul
from minivllm_kernels.attention_configs import PrefixConfig, prefix_config
from minivllm_kernels.mla_decode import mla_decode
from minivllm_kernels.mla_decode_hopper import mla_decode_hopper
from minivllm_kernels.norms import add_rms_norm
from minivllm_kernels.paged_attention import paged_attention
from minivllm_kernels.paged_attention_hopper import paged_attention_hopper
from minivllm_kernels.paged_decode import paged_decode
from minivllm_kernels.paged_decode_hopper import paged_decode_hopper
from minivllm_kernels.row_attention import row_attention
from minivllm_kernels.row_gate import row_gate
from minivllm_kernels.row_product import row_product
from minivllm_kernels.sampling import MAX_TILES, sample
from minivllm_kernels.shared_prefix_decode import shared_prefix_decode
from minivllm_kernels.store_kv import qk_norm_rope_store, store_kv
from minivllm_kernels.workspace import SplitWorkspace

from tests.kernel_cases import DEVICE, PagedCase, paged_case

Launch = Callable[[PagedCase, torch.Tensor], None]


def decode(case: PagedCase, out: torch.Tensor, workspace: SplitWorkspace, split_tokens: int | None = None) -> None:
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, out)
    paged_decode(*inputs, workspace, split_tokens=split_tokens)


def decode_hopper(case: PagedCase, out: torch.Tensor, workspace: SplitWorkspace) -> None:
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, out)
    paged_decode_hopper(*inputs, workspace)


def share_nothing(workspace: SplitWorkspace, num_requests: int, config: PrefixConfig | None = None) -> Launch:
    """Groups of one request, and no prefix."""
    alone = torch.arange(num_requests + 1, dtype=torch.int32, device=DEVICE)
    groups = (torch.zeros_like(alone[1:]), alone, alone[:-1])

    def run(case: PagedCase, out: torch.Tensor) -> None:
        inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, *groups, out)
        shared_prefix_decode(*inputs, workspace, max_own_tokens=512, config=config)

    return run


def attend(kernel: Callable[..., None], case: PagedCase, out: torch.Tensor) -> None:
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.num_tokens, case.query_starts, out)
    kernel(*inputs, max_query_len=1024)


LAUNCHES = (
    "paged_decode", "paged_decode_hopper", "paged_decode, fixed split", "shared_prefix_decode",
    "shared_prefix_decode_hopper", "paged_attention", "paged_attention_hopper",
)  # fmt: skip


def launch(name: str, case: PagedCase) -> Callable[[], torch.Tensor]:
    """A call without arguments that fills and returns the same output each time."""
    num_heads, head_size = case.q.shape[1:]
    num_requests = len(case.num_tokens)
    out = torch.full_like(case.q, math.nan)
    num_rows = 100_000 + len(case.q) * num_heads * 64
    workspace = SplitWorkspace.allocate(DEVICE, num_rows, num_heads // case.k_cache.shape[2], head_size)
    kernels: dict[str, Launch] = {
        "paged_decode": partial(decode, workspace=workspace),
        "paged_decode_hopper": partial(decode_hopper, workspace=workspace),
        "paged_decode, fixed split": partial(decode, workspace=workspace, split_tokens=256),
        "shared_prefix_decode": share_nothing(workspace, num_requests, replace(prefix_config(DEVICE), stream=None)),
        "shared_prefix_decode_hopper": share_nothing(workspace, num_requests),
        "paged_attention": partial(attend, paged_attention),
        "paged_attention_hopper": partial(attend, paged_attention_hopper),
    }

    def run() -> torch.Tensor:
        kernels[name](case, out)
        return out

    return run


def run_row_kernels() -> None:
    """Norms, gate, store and sampler, on sizes that fit no tile."""
    normal = partial(torch.randn, dtype=torch.bfloat16, device=DEVICE)
    add_rms_norm(normal(3, 1032), normal(3, 1032), normal(1032), normal(3, 1032), eps=1e-6)
    silu_and_mul(normal(3, 2 * 1032), normal(3, 1032))
    x, out = normal(1, 1032), normal(1, 41)
    row_product(x, normal(41, 1032), normal(41), out, plus=x, norm=x[0], eps=1e-6, add_to=out, early=True)
    row_gate(x, x[0], normal(82, 1032), normal(82), out, eps=1e-6, early=True)
    row = paged_case([1], [200], heads=(3, 3), dtype=torch.bfloat16)
    place, workspace = torch.tensor([199], dtype=torch.int32, device=DEVICE), SplitWorkspace.allocate(DEVICE, 0, 1, 64)
    row_attention(
        normal(1, 9 * 64), normal(64), normal(64), torch.randn(200, 64, device=DEVICE), place, place % 16,
        row.k_cache, row.v_cache, row.block_table, row.num_tokens, row.q, workspace, eps=1e-6, early=True,
    )  # fmt: skip
    case = paged_case([1] * 5, [9] * 5, heads=(3, 3), dtype=torch.bfloat16)
    slots = torch.tensor([17, 3, -1, 40, 8], dtype=torch.int32, device=DEVICE)
    store_kv(case.q, case.q, case.k_cache, case.v_cache, slots)
    qk_norm_rope_store(
        normal(5, 9 * 64), normal(64), normal(64), torch.randn(50, 64, device=DEVICE), slots.abs(), slots,
        normal(5, 3, 64), case.k_cache, case.v_cache, num_heads=3, num_kv_heads=3, eps=1e-6,
    )  # fmt: skip
    for top_p in (None, torch.full((3,), 0.9, device=DEVICE)):
        rows = torch.arange(3, device=DEVICE)
        partial_draws = torch.empty(3, MAX_TILES, dtype=torch.int64, device=DEVICE)
        arrivals, floors = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.empty(3, device=DEVICE)
        temperatures = torch.tensor([0.0, 0.7, 1.0], device=DEVICE)
        sample(normal(3, 5003), temperatures, rows, rows, rows, partial_draws, arrivals, floors, top_p=top_p)


def run_mla(*kernels: Callable[..., None]) -> None:
    """Two requests over a latent cache."""
    normal = partial(torch.randn, dtype=torch.bfloat16, device=DEVICE)
    table = torch.tensor([[3, 1, 0], [2, 5, 4]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([70, 131], dtype=torch.int32, device=DEVICE)
    workspace = SplitWorkspace.allocate(DEVICE, 0, 16, 512)
    queries, out = (normal(2, 16, 512), normal(2, 16, 64)), normal(2, 16, 512)
    for kernel in kernels:
        kernel(*queries, normal(6, 64, 576), table, lengths, out, workspace, scale=0.07)


def main() -> None:
    """The first argument is a word: kernels with it in their name are left out."""
    decodes = paged_case([1] * 3, [200, 1, 65], heads=(6, 2), dtype=torch.bfloat16)
    prompts = paged_case([5, 1, 70], [205, 1, 70], heads=(6, 2), dtype=torch.bfloat16)
    left_out = sys.argv[1] if torch.cuda.get_device_capability()[0] == 9 else "hopper"
    names = [name for name in LAUNCHES if left_out not in name]
    for name in names:
        launch(name, decodes if "decode" in name else prompts)()
    run_row_kernels()
    run_mla(*(kernel for kernel in (mla_decode, mla_decode_hopper) if left_out not in kernel.__name__))
    torch.cuda.synchronize()
    print(f"{len(names)} attention kernels ran, and the others")


if __name__ == "__main__":
    main()
