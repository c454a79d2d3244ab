"""A single row's body and head against those for many rows, which the row takes beside a row of padding."""

from collections.abc import Callable

import pytest
import torch

from minivllm.attention.kernel_batch import KernelBatch, Keys
from minivllm.config import ModelConfig
from minivllm.models.fused_llama import FusedLlama
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.loader import build_model
from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
BLOCK_SIZE, MAX_TOKENS = 16, 96
FAMILIES = {  # sizes that fit no tile
    "qwen3": {"num_heads": 6, "num_kv_heads": 2, "qk_norm": True, "tie_word_embeddings": True},
    "biases": {"num_heads": 3, "num_kv_heads": 3, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "window": {"num_heads": 4, "num_kv_heads": 1, "windows": (20, None)},
}


def fused(family: str, dtype: torch.dtype) -> FusedLlama:
    """A small random model over a cache of other tokens."""
    config = ModelConfig(
        family="llama", vocab_size=331, hidden_size=200, intermediate_size=264, num_layers=2, head_size=64,
        max_position=MAX_TOKENS, dtype=str(dtype).removeprefix("torch."), **FAMILIES[family],  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minivllm.runner.loader.can_prepack", lambda _: False)
        model = build_model(config, [], 1, str(DEVICE))
    random = torch.Generator(DEVICE).manual_seed(2)
    for name, parameter in model.named_parameters():
        mean, deviation = (1.0, 0.2) if "norm" in name else (0.0, 0.3 if name.endswith("bias") else 0.08)
        parameter.data.normal_(mean, deviation, generator=random)
    storage = KVStorage(config, MAX_TOKENS // BLOCK_SIZE + 1, BLOCK_SIZE, str(DEVICE))
    storage.data.normal_(generator=random)
    return FusedLlama(model, config, list(storage.layers), MAX_TOKENS)


def batch(length: int, num_rows: int) -> KernelBatch:
    """A request's newest token, then rows of padding."""

    def ints(value: int, padding: int) -> torch.Tensor:
        return torch.tensor([value] + [padding] * (num_rows - 1), dtype=torch.int32, device=DEVICE)

    table = torch.tensor([[4, 2, 6, 1, 5, 3]], dtype=torch.int32, device=DEVICE)
    last = length - 1
    slot = int(table[0, last // BLOCK_SIZE]) * BLOCK_SIZE + last % BLOCK_SIZE
    keys = Keys(table.expand(num_rows, -1).contiguous(), ints(length, 0))
    token_ids, chosen = (ints(17, 0), ints(0, 0)) if length == 1 else (ints(-1, 0), ints(17, 0))  # known, or promised
    return KernelBatch(token_ids, chosen, ints(last, -1), ints(slot, -1), keys, None, ints(0, 0), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_stored_keys_are_those_of_the_way_for_many_rows(family: str, dtype: torch.dtype) -> None:
    model = fused(family, dtype)
    kept = [(kv.k.clone(), kv.v.clone()) for kv in model.layers]
    for length in (1, 70):
        logits, caches = [], []
        for num_rows in (1, 2):
            for kv, (k, v) in zip(model.layers, kept, strict=True):
                kv.k.copy_(k)
                kv.v.copy_(v)
            out = torch.full((num_rows, 331), float("nan"), dtype=dtype, device=DEVICE)
            x, residual = model.body(batch(length, num_rows))
            assert x.shape == residual.shape == (num_rows, 200)
            logits.append(model.head(x, residual, out)[:1])
            caches.append(torch.cat([torch.cat((kv.k, kv.v)) for kv in model.layers]))
        assert relative_error(logits[0], logits[1]) < 4 * TOLERANCE[dtype]  # layers of roundings
        assert relative_error(caches[0], caches[1]) < TOLERANCE[dtype]
        written = (caches[0] != torch.cat([torch.cat(pair) for pair in kept])).flatten(1).any(1)
        assert 0 < written.sum() <= 2 * len(model.layers)  # a block of K and one of V in each layer


def test_a_single_row_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused("qwen3", torch.float32)
    names: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda *_, **__: names.append(name)

    for name in ("row_product", "row_gate", "row_attention"):
        monkeypatch.setattr(f"minivllm.models.one_row.{name}", noting(name))
    model.head(*model.body(batch(5, 1)), torch.empty(1, 331))
    layer = ["row_product", "row_attention", "row_product", "row_gate", "row_product"]
    assert names == [*layer * 2, "row_product"]
