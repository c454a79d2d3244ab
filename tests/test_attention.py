"""Paged attention equals its slow twin, wherever the blocks lie and whatever else is in them; so do packed linears."""

from dataclasses import dataclass
from itertools import accumulate
from random import Random

import pytest
import torch
from torch import nn

from minivllm.attention import ForwardBatch, torch_backend
from minivllm.attention.reference import paged_attention_reference
from minivllm.attention.torch_backend import TorchAttention
from minivllm.config import ModelConfig
from minivllm.engine.tables import slot_of
from minivllm.runner.kv_storage import KVStorage
from minivllm.transforms.prepack import PackedLinear, can_prepack, prepack_linears


@dataclass(frozen=True)
class Case:
    """A step written by hand: for each request, how many tokens are new and how many there are."""

    num_new: list[int]
    num_tokens: list[int]
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    window: int | None = None
    dtype: str = "float32"

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            "llama", 10, 64, 64, 1, self.num_heads, self.num_kv_heads, self.head_size, 512,
            windows=(self.window,) if self.window else (), dtype=self.dtype,
        )  # fmt: skip

    def tables(self, seed: int) -> list[list[int]]:
        """Block tables over a shuffled pool; block 0 is the null block."""
        counts = [-(-total // self.block_size) for total in self.num_tokens]
        pool = list(range(1, sum(counts) + 4))
        Random(seed).shuffle(pool)
        ends = list(accumulate(counts))
        return [pool[end - count : end] for end, count in zip(ends, counts, strict=True)]


def run(case: Case, seed: int = 0, garbage: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What TorchAttention gives and what its twin gives; `garbage` fills every slot that no token owns."""
    config, tables = case.config, case.tables(seed)
    num_blocks = 5 + sum(map(len, tables))
    storage = KVStorage(config, num_blocks, case.block_size, "cpu")
    generator = torch.Generator().manual_seed(1)

    def noise(num_tokens: int, num_heads: int) -> torch.Tensor:
        return torch.randn(num_tokens, num_heads, case.head_size, generator=generator).to(storage.data.dtype)

    storage.data.fill_(garbage)
    q, new_k, new_v, slots = [], [], [], []
    for table, new, total in zip(tables, case.num_new, case.num_tokens, strict=True):
        places = [slot_of(position, table, case.block_size) for position in range(total)]
        q.append(noise(new, case.num_heads))
        k, v = noise(total, case.num_kv_heads), noise(total, case.num_kv_heads)
        storage.layers[0].k.flatten(0, 1)[places[: total - new]] = k[: total - new]
        storage.layers[0].v.flatten(0, 1)[places[: total - new]] = v[: total - new]
        new_k.append(k[total - new :])
        new_v.append(v[total - new :])
        slots += places[total - new :]
    width = max(map(len, tables))
    batch = ForwardBatch(
        token_ids=torch.zeros(len(slots), dtype=torch.int64),
        positions=torch.cat([torch.arange(t - n, t) for n, t in zip(case.num_new, case.num_tokens, strict=True)]),
        slots=torch.tensor(slots),
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
        query_starts=torch.tensor([0, *accumulate(case.num_new)]),
        num_tokens=torch.tensor(case.num_tokens),
        logit_rows=torch.zeros(0, dtype=torch.int64),
    )
    attention = TorchAttention(config, batch, list(storage.layers))
    found = attention.attend(0, torch.cat(q), torch.cat(new_k), torch.cat(new_v))
    k_cache, v_cache = storage.layers[0].k, storage.layers[0].v
    expected = paged_attention_reference(
        torch.cat(q), k_cache, v_cache, tables, case.num_new, case.num_tokens, case.window
    )
    return found, expected


def border_lengths(block_size: int) -> list[int]:
    return sorted({1, max(block_size - 1, 1), block_size, block_size + 1, 2 * block_size + 1})


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["decode", "prefill", "chunk", "mixed"])
def test_attention_equals_its_twin_at_the_borders_of_blocks(kind: str, block_size: int, window: int | None) -> None:
    lengths = border_lengths(block_size)
    num_new = {
        "decode": [1] * len(lengths),
        "prefill": lengths,
        "chunk": [(length + 1) // 2 for length in lengths],
        "mixed": [1 if index % 2 else length for index, length in enumerate(lengths)],
    }[kind]
    found, expected = run(Case(num_new, lengths, block_size, window=window))
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 1), (9, 3), (6, 2), (1, 1)])
@pytest.mark.parametrize("head_size", [8, 40, 256])
def test_attention_equals_its_twin_for_every_shape_of_heads(num_heads: int, num_kv_heads: int, head_size: int) -> None:
    case = Case([1, 4, 1, 7], [6, 9, 20, 7], 3, num_heads, num_kv_heads, head_size)
    found, expected = run(case)
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_one_long_request_among_many_short_ones(window: int | None) -> None:
    lengths = [3, 1, 90, 2, 5, 4, 17, 1]
    found, expected = run(Case([1] * 8, lengths, 3, window=window))
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("smallest_matmul", [0, 10**9])
def test_both_ways_to_decode_in_bf16_equal_their_twin(
    smallest_matmul: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "MATMUL_TOKENS", smallest_matmul)
    lengths = [33, 1, 70, 2, 16, 64, 17, 51]
    found, expected = run(Case([1] * 8, lengths, 16, num_heads=6, window=window, dtype="bfloat16"))
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 6e-3  # bf16 keeps 8 bits: 2**-9 for the result alone


def test_groups_are_cut_where_padding_costs_more_than_a_group() -> None:
    cut = torch_backend.similar_lengths
    assert cut([], []) == []
    assert cut([0, 1, 2], [10, 2000, 20]) == [[0, 2], [1]]
    assert cut([3, 5], [0, 0, 0, 90, 0, 100]) == [[3, 5]]
    lengths = [5000, 10, 2500, 12, 5001, 2400]
    groups = cut(list(range(6)), lengths)
    assert groups == [[1, 3], [2, 5], [0, 4]]


MIXED = Case([1, 6, 1, 1, 3], [40, 6, 5, 17, 12], block_size=4)


@pytest.mark.parametrize("seed", range(1, 5))
def test_where_the_blocks_lie_changes_no_bit(seed: int) -> None:
    assert torch.equal(run(MIXED, seed)[0], run(MIXED, seed=0)[0])


@pytest.mark.parametrize("garbage", [1.0, -7.5, 1e30])
def test_finite_garbage_in_slots_that_nobody_owns_changes_no_bit(garbage: float) -> None:
    assert torch.equal(run(MIXED, garbage=garbage)[0], run(MIXED)[0])


def test_order_of_the_requests_only_permutes_the_rows() -> None:
    found, expected = run(Case([1, 1, 5, 1], [30, 4, 9, 8], 4))
    swapped, expected_swapped = run(Case([1, 5, 1, 1], [8, 9, 4, 30], 4))
    for rows, twin in ((found, expected), (swapped, expected_swapped)):
        torch.testing.assert_close(rows.double(), twin, atol=2e-6, rtol=1e-5)


# --- Packed linears: same numbers, other layout

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_packed_linear_equals_the_plain_one(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    if not can_prepack(dtype):
        pytest.skip(f"this machine has no packed linear in {dtype}")
    torch.manual_seed(0)
    plain = nn.Linear(72, 40, bias=has_bias).to(dtype).requires_grad_(False)
    x = torch.randn(num_rows, 72).to(dtype)
    with torch.inference_mode():
        found, expected = PackedLinear(plain)(x), plain(x)
        exact = x.double() @ plain.weight.double().T + (plain.bias.double() if has_bias else 0)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])
    torch.testing.assert_close(found.double(), exact, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


def test_prepack_swaps_every_linear_and_nothing_else() -> None:
    if not can_prepack(torch.float32):
        pytest.skip("this machine has no packed linear")
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.SiLU(), nn.Linear(16, 8, bias=False)), nn.LayerNorm(8))
    x = torch.randn(3, 16)
    with torch.inference_mode():
        expected = model(x)
        prepack_linears(model)
        torch.testing.assert_close(model(x), expected)
    assert [type(m).__name__ for m in model.modules() if not list(m.children())] == [
        "PackedLinear", "SiLU", "PackedLinear", "LayerNorm",
    ]  # fmt: skip


def test_a_dtype_without_a_packed_linear_is_told_apart() -> None:
    assert not can_prepack(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 33])
def test_a_packed_linear_gives_a_row_the_same_bits_in_every_batch(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        packed = PackedLinear(torch.nn.Linear(1536, 576, bias=False, dtype=dtype))
        x = torch.randn(64, 1536, dtype=dtype)
        with torch.inference_mode():
            assert torch.equal(packed(x[:num_rows]), packed(x)[:num_rows])
