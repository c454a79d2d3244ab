"""Kernels that move rows: KV store, fused norm, RoPE and store, norms, gate. Against float64 and transformers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from minivllm_kernels.activations import silu_and_mul
from minivllm_kernels.norms import add_rms_norm, rms_norm
from minivllm_kernels.reference import rms_norm_twin, rope_twin, silu_and_mul_twin, store_kv_twin
from minivllm_kernels.store_kv import qk_norm_rope_store, store_kv
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
EPS = 1e-6
SLOTS = (37, -1, 0, 18, 17)  # the second token is padding
# transformers rounds where the kernels do: what is left is the order of a sum, which flips a few roundings
# Rare last-bit differences: a GPU fuses multiply and add where transformers rounds between them.
SAME_TURNED = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 4e-3}  # a sum's order changes an rms
SAME = {torch.float32: 1e-6, torch.float16: 4e-4 if HAS_GPU else 1e-5, torch.bfloat16: 4e-3}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


def integers(values: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def empty_caches(
    num_kv_heads: int, head_size: int, dtype: torch.dtype, block_size: int = 16, is_head_major: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V caches of 48 slots, all NaN."""
    shape = (48 // block_size, num_kv_heads, block_size, head_size)
    k_cache, v_cache = nan(*shape, dtype=dtype).transpose(1, 2), nan(*shape, dtype=dtype).transpose(1, 2)
    return (k_cache, v_cache) if is_head_major else (k_cache.contiguous(), v_cache.contiguous())


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=9e3), b.nan_to_num(nan=9e3))


@dataclass(frozen=True)
class Fused:
    """Inputs of qk_norm_rope_store, its outputs all NaN."""

    qkv: torch.Tensor
    weights: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    q_out: torch.Tensor
    caches: tuple[torch.Tensor, torch.Tensor]
    num_heads: int
    num_kv_heads: int
    head_size: int

    def run(self, eps: float = EPS) -> None:
        q_weight, k_weight = self.weights
        k_cache, v_cache = self.caches
        qk_norm_rope_store(
            self.qkv, q_weight, k_weight, self.cos_sin, self.positions, self.slots, self.q_out, k_cache, v_cache,
            num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, eps=eps,
        )  # fmt: skip

    def heads(self) -> tuple[torch.Tensor, ...]:
        """q, k, v [T, heads, D] of the projection."""
        rows = self.qkv.unflatten(1, (-1, self.head_size))
        return rows.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)


def fused_case(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    has_norm: bool = True,
    index_dtype: torch.dtype = torch.int32,
    block_size: int = 16,
    is_head_major: bool = True,
) -> Fused:
    """Five tokens whose rows lie wider apart than they are long, NaN between them."""
    width = (num_heads + 2 * num_kv_heads) * head_size
    padded = nan(5, width + 32, dtype=dtype)
    padded[:, :width] = randn(5, width, dtype=dtype)
    angles = torch.arange(40)[:, None] / 10000 ** (torch.arange(head_size // 2) / (head_size // 2))
    return Fused(
        qkv=padded[:, :width],
        weights=(randn(head_size, dtype=dtype, seed=1), randn(head_size, dtype=dtype, seed=2))
        if has_norm
        else (None, None),
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE),
        positions=integers((39, 0, 3, 17, 8), index_dtype),
        slots=integers(SLOTS, index_dtype),
        q_out=nan(5, num_heads, head_size, dtype=dtype),
        caches=empty_caches(num_kv_heads, head_size, dtype, block_size, is_head_major),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("is_head_major", [True, False])
def test_stored_rows_lie_in_their_slots_and_no_other_slot_changes(
    dtype: torch.dtype, block_size: int, is_head_major: bool
) -> None:
    qkv = randn(5, 3 * 4 * 80, dtype=dtype).unflatten(1, (12, 80))
    k, v = qkv[:, 4:7], qkv[:, 7:10].clone()  # of different strides
    caches = empty_caches(3, 80, dtype, block_size, is_head_major)
    expected = [store_kv_twin(rows, cache, integers(SLOTS)) for rows, cache in zip((k, v), caches, strict=True)]
    store_kv(k, v, *caches, integers(SLOTS))
    assert all(is_same(cache, twin) for cache, twin in zip(caches, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size"), [(4, 2, 64), (9, 3, 64), (8, 1, 80), (2, 2, 96), (16, 8, 128)]
)
def test_fused_kernel_norms_rotates_and_stores(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_size: int
) -> None:
    case = fused_case(num_heads, num_kv_heads, head_size, dtype)
    q, k, v = case.heads()
    q, k = (
        rope_twin(rms_norm_twin(x, weight, EPS), case.cos_sin, case.positions)
        for x, weight in zip((q, k), case.weights, strict=True)
        if weight is not None
    )
    wide_cache = case.caches[0].double()
    expected_k = store_kv_twin(k, wide_cache, case.slots)
    expected_v = store_kv_twin(v, case.caches[1], case.slots)
    case.run()
    is_written = ~expected_k.isnan()
    assert relative_error(case.q_out, q) < TOLERANCE[dtype]
    assert torch.equal(case.caches[0].isnan(), ~is_written)
    assert relative_error(case.caches[0][is_written], expected_k[is_written]) < TOLERANCE[dtype]
    assert is_same(case.caches[1], expected_v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [True, False])
def test_fused_kernel_rounds_as_transformers_does(dtype: torch.dtype, has_norm: bool) -> None:
    case = fused_case(dtype=dtype, has_norm=has_norm, index_dtype=torch.int64, block_size=8, is_head_major=False)
    q, k, _ = case.heads()
    if has_norm:
        q, k = (norm_of(weight)(x) for x, weight in zip((q, k), case.weights, strict=True) if weight is not None)
    angles = case.cos_sin[case.positions].to(dtype)
    cos, sin = (torch.cat((half, half), dim=-1)[None] for half in angles.chunk(2, dim=-1))  # [1, T, D]
    q, k = (
        x[0].transpose(0, 1) for x in apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    )
    case.run()
    assert relative_error(case.q_out, q) < SAME_TURNED[dtype]
    stored = case.caches[0].flatten(0, 1)[case.slots[case.slots >= 0]]
    assert relative_error(stored, k[case.slots >= 0]) < SAME_TURNED[dtype]


def norm_of(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """transformers' norm with this weight."""
    norm = Qwen3RMSNorm(len(weight), eps=EPS)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def test_q_may_be_written_over_the_projection_it_came_from() -> None:
    apart, in_place = fused_case(), fused_case()
    apart.run()
    q = in_place.heads()[0]
    replace(in_place, q_out=q).run()
    assert torch.equal(q, apart.q_out)


def test_token_of_many_heads_is_split_among_programs() -> None:
    case = fused_case(num_heads=40, num_kv_heads=5)
    q, _, v = case.heads()
    weight = case.weights[0]
    assert weight is not None
    case.run()
    assert relative_error(case.q_out, rope_twin(rms_norm_twin(q, weight, EPS), case.cos_sin, case.positions)) < 2e-5
    assert torch.equal(case.caches[1].flatten(0, 1)[37], v[0])


def test_row_with_a_negative_position_is_left_alone() -> None:
    case = fused_case()
    replace(case, positions=integers((39, 0, -1, 17, 8))).run()
    assert case.q_out[2].isnan().all()
    assert case.caches[0][0].isnan().all()  # slot 0 was that row's
    assert not case.q_out[[0, 1, 3, 4]].isnan().any()


def test_angles_in_the_models_type_give_the_same_bits() -> None:
    wide, narrow = fused_case(dtype=torch.float16), fused_case(dtype=torch.float16)
    wide.run()
    replace(narrow, cos_sin=narrow.cos_sin.half()).run()
    assert torch.equal(wide.q_out, narrow.q_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 576, 1024, 16384])
def test_norm_is_the_twins_and_rounds_as_transformers_does(dtype: torch.dtype, width: int) -> None:
    x, weight = randn(3, width, dtype=dtype), randn(width, dtype=dtype, seed=1)
    out = nan(3, width + 16, dtype=dtype)[:, :width]
    rms_norm(x, weight, out, eps=EPS)
    assert relative_error(out, rms_norm_twin(x, weight, EPS)) < TOLERANCE[dtype]
    assert relative_error(out, norm_of(weight)(x)) < SAME[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 576, 1024])
def test_add_and_norm_updates_the_residual_in_place(dtype: torch.dtype, width: int) -> None:
    x = nan(3, width + 8, dtype=dtype)[:, :width].copy_(randn(3, width, dtype=dtype))
    residual, weight = randn(3, width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    total = residual + x
    out = nan(3, width, dtype=dtype)
    add_rms_norm(x, residual, weight, out, eps=EPS)
    assert torch.equal(residual, total)
    assert relative_error(out, rms_norm_twin(total, weight, EPS)) < TOLERANCE[dtype]
    assert relative_error(out, norm_of(weight)(total)) < SAME[dtype]


def test_norms_may_write_over_their_input() -> None:
    x, residual, weight = randn(2, 64), randn(2, 64, seed=1), randn(64, seed=2)
    plain, added = x.clone(), x.clone()
    rms_norm(plain, weight, plain, eps=EPS)
    assert relative_error(plain, rms_norm_twin(x, weight, EPS)) < 1e-6
    expected = rms_norm_twin(x + residual, weight, EPS)
    add_rms_norm(added, residual, weight, added, eps=EPS)
    assert relative_error(added, expected) < 1e-6


def test_small_rows_are_lifted_by_eps_alone() -> None:
    x, weight = 1e-6 * randn(1, 64), torch.ones(64, device=DEVICE)
    out = nan(1, 64)
    rms_norm(x, weight, out, eps=1e-2)
    assert relative_error(out, 10 * x) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 1024, 1544])
def test_silu_and_mul_is_the_twins_and_rounds_as_torch_does(dtype: torch.dtype, size: int) -> None:
    gate_up = nan(3, 2 * size + 8, dtype=dtype)[:, : 2 * size].copy_(20 * randn(3, 2 * size, dtype=dtype))
    out = nan(3, size + 8, dtype=dtype)[:, :size]
    silu_and_mul(gate_up, out)
    gate, up = gate_up.chunk(2, dim=-1)
    assert relative_error(out, silu_and_mul_twin(gate_up)) < TOLERANCE[dtype]
    assert relative_error(out, F.silu(gate) * up) < SAME[dtype]


def test_extreme_gates_give_no_nan() -> None:
    gate_up = torch.tensor([[-300.0, -88, -1, 0, 1, 88, 300, 3e38] + [1.0] * 8], device=DEVICE)
    out = nan(1, 8)
    silu_and_mul(gate_up, out)
    assert relative_error(out, F.silu(gate_up[:, :8])) < 1e-6
    assert not out.isnan().any()


def test_nothing_to_do_launches_nothing() -> None:
    case = fused_case()
    none = integers(())
    replace(case, qkv=case.qkv[:0], positions=none, slots=none, q_out=case.q_out[:0]).run()
    store_kv(randn(0, 2, 64), randn(0, 2, 64), *case.caches, none)
    rms_norm(randn(2, 8)[:0], randn(8), randn(2, 8)[:0], eps=EPS)
    add_rms_norm(randn(2, 8)[:0], randn(2, 8)[:0], randn(8), randn(2, 8)[:0], eps=EPS)
    silu_and_mul(randn(2, 16)[:0], randn(2, 8)[:0])
    assert case.caches[0].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": integers(SLOTS[:4])}, "slots has shape"),
        ({"positions": torch.zeros(5, device=DEVICE)}, "pass int32 or int64"),
        ({"weights": (randn(64), None)}, "both norm weights or neither"),
        ({"weights": (randn(32), randn(32))}, "norm weights must be"),
        ({"cos_sin": randn(40, 32)}, "cos_sin has shape"),
        ({"cos_sin": randn(40, 64, dtype=torch.float16)}, "cos_sin is torch.float16"),
        ({"num_kv_heads": 1}, "qkv has 512 columns, expected 384"),
        ({"q_out": nan(5, 4, 64, dtype=torch.float16)}, "cast one"),
    ],
)
def test_fused_kernel_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(fused_case(), **change).run()


def test_others_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        rms_norm(randn(2, 12), randn(12), randn(2, 12), eps=EPS)
    with pytest.raises(ValueError, match="same shape"):
        rms_norm(randn(2, 16), randn(16), randn(3, 16), eps=EPS)
    residual = randn(2, 16)
    with pytest.raises(ValueError, match="must not be the residual"):
        add_rms_norm(randn(2, 16), residual, randn(16), residual, eps=EPS)
    with pytest.raises(ValueError, match="gate_up has shape"):
        silu_and_mul(randn(2, 16), randn(2, 16))
    with pytest.raises(ValueError, match="k has 1 heads of 64, the cache has shape"):
        store_kv(randn(5, 1, 64), randn(5, 1, 64), *empty_caches(2, 64, torch.float32), integers(SLOTS))
