"""What `minivllm bench kernels` measures: a case is a kernel at one shape, the least work it can do, and its target."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import torch
from minivllm_kernels.mla_decode import mla_decode
from minivllm_kernels.mla_decode_hopper import mla_decode_hopper
from minivllm_kernels.paged_attention import paged_attention
from minivllm_kernels.paged_attention_hopper import paged_attention_hopper
from minivllm_kernels.paged_decode import paged_decode
from minivllm_kernels.paged_decode_hopper import paged_decode_hopper
from minivllm_kernels.reference import mla_decode_twin
from minivllm_kernels.shared_prefix_decode import shared_prefix_decode, workspace_rows
from minivllm_kernels.workspace import SplitWorkspace

from minivllm.bench.kernel_inputs import AttentionShape, attention_inputs, relative_error
from minivllm.bench.kernel_rivals import attention_rivals

Run = Callable[[], object]
Launch = Callable[..., None]


@dataclass(frozen=True)
class Call:
    """A launch on inputs of its own, how far its output is from a float64 twin, and what others take for the same."""

    run: Run
    check: Callable[[], float]  # after run: relative error, norm-wise
    rivals: Callable[[], Mapping[str, Run]] = dict  # after run


@dataclass(frozen=True)
class Target:
    """What is asked of an H200; the strictest of what is set counts."""

    at_most_us: float | None = None
    least_tflops: float | None = None
    least_share: float | None = None  # of the roof measured in the same process
    twin: tuple[str, float] | None = None  # at most so many times the microseconds of another case

    @property
    def text(self) -> str:
        """As a table shows it: '<= 260 us'."""
        parts = [
            self.at_most_us is not None and f"<= {self.at_most_us:g} us",
            self.least_tflops is not None and f">= {self.least_tflops:g} TFLOP/s",
            self.least_share is not None and f">= {self.least_share:.2f}",
            self.twin is not None and f"<= {self.twin[1]:g} x {self.twin[0]}",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Case:
    part: str
    name: str
    build: Callable[[torch.device, torch.dtype, int], Call]  # the int seeds the inputs
    num_bytes: int  # the least that must move, in bf16
    target: Target
    flops: int = 0  # set where arithmetic is the bound: then the share is one of the GEMM roof


def decode_case(
    name: str, lengths: Sequence[int], heads: tuple[int, int], head_size: int, target: Target, launch: Launch
) -> Case:
    shape = AttentionShape(tuple((1, length) for length in lengths), *heads, head_size)
    return Case("decode", name, partial(build_decode, shape, launch), shape.num_bytes, target)


def build_decode(shape: AttentionShape, launch: Launch, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    step = attention_inputs(shape, device, dtype, seed)
    workspace = SplitWorkspace.allocate(device, 0, shape.heads // shape.kv_heads, shape.head_size)
    inputs = (step.q, step.k_cache, step.v_cache, step.block_table, step.num_tokens, step.out, workspace)
    return Call(partial(launch, *inputs), step.error, partial(attention_rivals, step))


def prefix_case(batch_size: int, num_shared: int, num_own: int, heads: tuple[int, int], target: Target) -> Case:
    """One prefix for all requests: its bytes count once."""
    own = AttentionShape(((1, num_own),) * batch_size, *heads)
    num_bytes = own.num_bytes + 4 * num_shared * own.kv_heads * own.head_size
    name = f"{batch_size} x ({num_shared} shared + {num_own}), {heads[0]}/{heads[1]}"
    build = partial(build_prefix, replace(own, requests=((1, num_shared + num_own),) * batch_size), num_shared)
    return Case("prefix", name, build, num_bytes, target)


def build_prefix(shape: AttentionShape, num_shared: int, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    step = attention_inputs(shape, device, dtype, seed, num_shared)
    batch_size, num_own = len(shape.requests), step.max_tokens - num_shared
    group = shape.heads // shape.kv_heads
    num_rows = workspace_rows(device, batch_size, shape.heads, group, num_own)
    workspace = SplitWorkspace.allocate(device, num_rows, group, shape.head_size)
    prefix = torch.full_like(step.num_tokens, num_shared)
    members = torch.arange(batch_size, dtype=torch.int32, device=device)
    groups = (prefix, torch.tensor([0, batch_size], dtype=torch.int32, device=device), members)
    inputs = (step.q, step.k_cache, step.v_cache, step.block_table, step.num_tokens, *groups, step.out)
    side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    run = partial(shared_prefix_decode, *inputs, workspace, max_own_tokens=num_own, side_stream=side_stream)
    return Call(run, step.error)


def prefill_case(
    name: str, num_requests: int, new: int, total: int, block_size: int, target: Target, launch: Launch
) -> Case:
    shape = AttentionShape(((new, total),) * num_requests, 32, 8, 128, block_size)
    return Case("prefill", name, partial(build_prefill, shape, launch), shape.num_bytes, target, shape.flops)


def build_prefill(shape: AttentionShape, launch: Launch, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    step = attention_inputs(shape, device, dtype, seed)
    inputs = (step.q, step.k_cache, step.v_cache, step.block_table, step.num_tokens, step.query_starts, step.out)
    run = partial(launch, *inputs, max_query_len=step.max_query_len)
    return Call(run, step.error, partial(attention_rivals, step))


@dataclass(frozen=True)
class MlaShape:
    """Requests of one new token over DeepSeek's latent cache: one row of 512 + 64 for all heads."""

    batch_size: int
    num_tokens: int
    heads: int
    latent: int = 512
    rope: int = 64

    @property
    def num_bytes(self) -> int:
        row = self.latent + self.rope
        return 2 * self.batch_size * (self.num_tokens * row + self.heads * (row + self.latent))

    @property
    def flops(self) -> int:
        return 2 * self.batch_size * self.heads * self.num_tokens * (2 * self.latent + self.rope)


def mla_case(shape: MlaShape, is_compute_bound: bool, target: Target, launch: Launch, label: str = "") -> Case:
    name = f"MLA {shape.batch_size} x {shape.num_tokens}, {shape.heads} heads{label}"
    flops = shape.flops if is_compute_bound else 0
    return Case("mla", name, partial(build_mla, shape, launch), shape.num_bytes, target, flops)


def build_mla(shape: MlaShape, launch: Launch, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    width, scale = shape.latent + shape.rope, 1 / math.sqrt(192)  # 128 + 64: the head size before absorption
    one = AttentionShape(((1, shape.num_tokens),) * shape.batch_size, shape.heads, 1, width)
    step = attention_inputs(one, device, dtype, seed)
    cache = step.k_cache[:, :, 0]  # [num_blocks, block_size, 576]: keys, and values in their first 512 columns
    q_latent, q_rope = step.q.split([shape.latent, shape.rope], dim=-1)
    out = torch.full(q_latent.shape, torch.nan, dtype=dtype, device=device)
    workspace = SplitWorkspace.allocate(device, 0, 16, shape.latent)

    def check() -> float:
        rows = sorted({0, shape.batch_size - 1})
        tables = (step.block_table[rows], step.num_tokens[rows])
        return relative_error(out[rows], mla_decode_twin(q_latent[rows], q_rope[rows], cache, *tables, scale))

    inputs = (q_latent, q_rope, cache, step.block_table, step.num_tokens, out, workspace)
    return Call(partial(launch, *inputs, scale=scale), check)


def launchers(plain: Launch, hopper: Launch) -> list[tuple[str, Launch, bool]]:
    """Name suffix, kernel, and whether the targets are for it: on Hopper the plain one is shown beside."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        return [(", plain", plain, False), ("", hopper, True)]
    return [("", plain, True)]


def attention_cases() -> list[Case]:
    shared = prefix_case(256, 2048, 128, (16, 8), Target(least_share=1 / 1.3))
    latent = [
        mla_case(MlaShape(128, 4096, heads), heads > 16, target if is_judged else Target(), launch, label)
        for label, launch, is_judged in launchers(mla_decode, mla_decode_hopper)
        for heads, target in ((16, Target(least_share=0.80)), (128, Target()))  # 128 heads: bound by arithmetic
    ]
    return [*decode_cases(), shared, *prefill_cases(), *latent]


def decode_cases() -> list[Case]:
    random = Random(0)
    ragged = [random.randint(100, 2048) for _ in range(256)]
    mean = sum(ragged) // 256
    shapes = [
        ("64 x 4096, 32/8", [4096] * 64, (32, 8), 128, Target(at_most_us=260)),
        ("256 x 1024, 16/8", [1024] * 256, (16, 8), 128, Target(at_most_us=257)),
        ("512 x 512, 16/8", [512] * 512, (16, 8), 128, Target(at_most_us=258)),
        ("8 x 16384, 32/8", [16384] * 8, (32, 8), 128, Target(at_most_us=134)),
        ("1 x 65536, 32/8", [65536], (32, 8), 128, Target(at_most_us=72)),
        ("64 x 16384, 32/1", [16384] * 64, (32, 1), 128, Target(at_most_us=136)),
        ("128 x 2048, 9/3, d 64", [2048] * 128, (9, 3), 64, Target(at_most_us=56)),
        (f"256 x {mean}, 16/8", [mean] * 256, (16, 8), 128, Target()),
        ("256 ragged, 100 to 2048, 16/8", ragged, (16, 8), 128, Target(twin=(f"256 x {mean}, 16/8", 1.05))),
    ]
    return [
        decode_case(name + label, lengths, heads, head_size, target if is_judged else Target(), launch)
        for label, launch, is_judged in launchers(paged_decode, paged_decode_hopper)
        for name, lengths, heads, head_size, target in shapes
    ]


def prefill_cases() -> list[Case]:
    work = {"1 x 16384": (1, 16384, 16384), "4 x 4096": (4, 4096, 4096), "2048 on 14336": (1, 2048, 16384)}
    goals = {64: (510, 490, 490), 16: (440, 400, 420)}
    return [
        prefill_case(
            f"{name}, 32/8, block {block}{label}", *sizes, block,
            Target(least_tflops=goal) if is_judged else Target(), launch,
        )
        for label, launch, is_judged in launchers(paged_attention, paged_attention_hopper)
        for block, row in goals.items()
        for (name, sizes), goal in zip(work.items(), row, strict=True)
    ]  # fmt: skip
