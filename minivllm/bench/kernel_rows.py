"""The row-wise cases of `minivllm bench kernels`: norms, gates, rotation with the KV write, sampling."""

from functools import partial

import torch
from minivllm_kernels.activations import silu_and_mul
from minivllm_kernels.norms import add_rms_norm
from minivllm_kernels.reference import rms_norm_twin, rope_twin, sample_twin, silu_and_mul_twin
from minivllm_kernels.sampling import MAX_TILES, sample
from minivllm_kernels.store_kv import qk_norm_rope_store
from torch.nn.functional import rms_norm, silu

from minivllm.bench.kernel_inputs import relative_error
from minivllm.bench.kernel_shapes import Call, Case, Target

EPS = 1e-6
BYTES = 2  # of a bfloat16
CHECKED_ROWS, SAMPLED_ROWS = 512, 32  # that a check compares
ROPE_POSITIONS, ROPE_BLOCK = 4096, 64


def row_cases() -> list[Case]:
    """At 16,384 tokens as in a prefill, where bytes count; at 256 as in a decode step, where launches do."""
    cases = [fused_case(16384, 16, 8, 128, Target(at_most_us=80)), fused_case(256, 16, 8, 128, Target())]
    cases += [sample_case(256, 151_936, None, Target(at_most_us=35)), sample_case(256, 151_936, 0.9, Target())]
    for num_tokens in (16384, 256):
        cases += [norm_case(num_tokens, 1024), norm_case(num_tokens, 4096), gate_case(num_tokens, 3072)]
    return cases


def fused_case(num_tokens: int, heads: int, kv_heads: int, head_size: int, target: Target) -> Case:
    name = f"qk-norm + RoPE + store, {num_tokens} tokens, {heads}/{kv_heads}, d {head_size}"
    num_bytes = 2 * num_tokens * (heads + 2 * kv_heads) * head_size * BYTES
    return Case("rows", name, partial(build_fused, num_tokens, heads, kv_heads, head_size), num_bytes, target)


def build_fused(
    num_tokens: int, heads: int, kv_heads: int, head_size: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Call:
    random = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, dtype=dtype, device=device, generator=random)
    qkv, weights = normal(num_tokens, (heads + 2 * kv_heads) * head_size), normal(2, head_size)
    angles = torch.arange(ROPE_POSITIONS, device=device)[:, None] / 10_000 ** torch.linspace(
        0, 1, head_size // 2, device=device
    )
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(ROPE_POSITIONS, (num_tokens,), dtype=torch.int32, device=device, generator=random)
    pool = -(-num_tokens // ROPE_BLOCK) * 5 // 4 + 1
    slots = torch.randperm(pool * ROPE_BLOCK, device=device, generator=random)[:num_tokens].int()
    cache_size = (pool, kv_heads, ROPE_BLOCK, head_size)
    k_cache, v_cache = (torch.full(cache_size, torch.nan, dtype=dtype, device=device).transpose(1, 2) for _ in "kv")
    q_out = torch.full((num_tokens, heads, head_size), torch.nan, dtype=dtype, device=device)

    def check() -> float:
        rows = slice(0, CHECKED_ROWS)
        q, k, v = qkv[rows].unflatten(1, (-1, head_size)).double().split([heads, kv_heads, kv_heads], dim=1)
        blocks, offsets = slots[rows].long() // ROPE_BLOCK, slots[rows].long() % ROPE_BLOCK
        found = torch.cat([q_out[rows], k_cache[blocks, offsets], v_cache[blocks, offsets]], dim=1)
        turned = [
            rope_twin(rms_norm_twin(x, weight, EPS), cos_sin, positions[rows])
            for x, weight in ((q, weights[0]), (k, weights[1]))
        ]
        return relative_error(found, torch.cat([*turned, v], dim=1))

    run = partial(
        qk_norm_rope_store, qkv, weights[0], weights[1], cos_sin, positions, slots, q_out, k_cache, v_cache,
        num_heads=heads, num_kv_heads=kv_heads, eps=EPS,
    )  # fmt: skip
    return Call(run, check)


def norm_case(num_tokens: int, width: int) -> Case:
    name = f"add + RMSNorm, {num_tokens} tokens, width {width}"
    return Case("rows", name, partial(build_norm, num_tokens, width), 4 * num_tokens * width * BYTES, Target())


def build_norm(num_tokens: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    random = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, dtype=dtype, device=device, generator=random)
    x, residual, weight = normal(num_tokens, width), normal(num_tokens, width), normal(width)
    out = torch.full_like(x, torch.nan)
    return Call(
        partial(add_rms_norm, x, residual, weight, out, eps=EPS),
        lambda: relative_error(
            out[:CHECKED_ROWS], rms_norm_twin(residual[:CHECKED_ROWS], weight, EPS)
        ),  # of the sum so far
        lambda: {"torch": lambda: rms_norm(residual.add_(x), (width,), weight, EPS)},
    )


def gate_case(num_tokens: int, width: int) -> Case:
    name = f"SiLU * up, {num_tokens} tokens, width {width}"
    return Case("rows", name, partial(build_gate, num_tokens, width), 3 * num_tokens * width * BYTES, Target())


def build_gate(num_tokens: int, width: int, device: torch.device, dtype: torch.dtype, seed: int) -> Call:
    random = torch.Generator(device).manual_seed(seed)
    gate_up = torch.randn(num_tokens, 2 * width, dtype=dtype, device=device, generator=random)
    out = torch.full((num_tokens, width), torch.nan, dtype=dtype, device=device)
    gate, up = gate_up.chunk(2, dim=1)

    return Call(
        partial(silu_and_mul, gate_up, out),
        lambda: relative_error(out[:CHECKED_ROWS], silu_and_mul_twin(gate_up[:CHECKED_ROWS])),
        lambda: {"torch": lambda: silu(gate) * up},
    )


def sample_case(num_rows: int, vocab: int, top_p: float | None, target: Target) -> Case:
    name = f"sample, {num_rows} x {vocab}" + (f", top-p {top_p}" if top_p else "")
    return Case("sampling", name, partial(build_sample, num_rows, vocab, top_p), num_rows * vocab * BYTES, target)


def build_sample(
    num_rows: int, vocab: int, top_p: float | None, device: torch.device, dtype: torch.dtype, seed: int
) -> Call:
    random = torch.Generator(device).manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab, dtype=dtype, device=device, generator=random)
    seeds = torch.randint(2**62, (num_rows,), device=device, generator=random)
    positions = torch.randint(4096, (num_rows,), device=device, generator=random)
    temperatures = torch.rand(num_rows, device=device, generator=random) * 0.4 + 0.6
    out = torch.full_like(seeds, -1)
    limits = None if top_p is None else torch.full_like(temperatures, top_p)
    workspace = (
        torch.empty(num_rows, MAX_TILES, dtype=torch.int64, device=device),
        torch.zeros(num_rows, dtype=torch.int32, device=device), torch.empty_like(temperatures),
    )  # fmt: skip

    def check() -> float:
        """Share of rows that drew another token than the twin: 0, or one in a while at a near tie."""
        rows = slice(0, SAMPLED_ROWS)
        drawn = sample_twin(
            logits[rows],
            temperatures[rows],
            seeds[rows],
            positions[rows],
            top_p=limits if limits is None else limits[rows],
        )
        return float((out[rows] != drawn.to(device)).double().mean())

    def torch_chain() -> torch.Tensor:
        probs = torch.softmax(logits.float() / temperatures[:, None], dim=1)
        return probs.div_(torch.empty_like(probs).exponential_()).argmax(dim=1)

    run = partial(sample, logits, temperatures, seeds, positions, out, *workspace, top_p=limits)
    return Call(run, check, lambda: {} if top_p else {"torch": torch_chain})
