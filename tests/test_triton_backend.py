"""The engine over the Triton kernels gives the tokens it gives over torch's operators, which are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from minivllm import LLM, SamplingParams
from minivllm.attention import Backend, ForwardBatch, LayerKV, choose_backend
from minivllm.attention.latent_torch import TorchLatentAttention
from minivllm.attention.latent_triton import TritonLatentBackend, TritonLatentDecode, fits_kernel
from minivllm.attention.torch_backend import TorchAttention
from minivllm.attention.triton_backend import TritonBackend
from minivllm.config import ModelConfig
from minivllm.runner.kv_storage import KVStorage
from minivllm.weights import builtin_configs
from tests.conftest import MLA, SHAPE, YARN
from tests.kernel_cases import HAS_GPU

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DEVICE = "cuda" if HAS_GPU else "cpu"
PROMPTS = [list(range(3, 40)), [7], list(range(50, 66)), list(range(100, 117))]  # around the block size of 16
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
    "latent": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        MLA
        | {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "first_k_dense_replace": 1}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random model of head size 64, which the kernels have; conftest's are smaller."""
    config, model, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    model(config(**SHAPE | {"head_dim": 64} | changes)).save_pretrained(tmp_path)
    return tmp_path


def tokens(folder: Path, **options: Any) -> list[list[int]]:
    """Greedy tokens of all prompts together."""
    llm = LLM(str(folder), dtype="float32", device=DEVICE, kv_cache_memory=2**22, show_progress=False, **options)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("budget", [512, 24], ids=["whole prompts", "chunks beside decodes"])
def test_tokens_are_those_of_the_torch_backend(folder: Path, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.runner.model_runner.make_fused", lambda *_: None)
    chosen = "minivllm.runner.model_runner.choose_backend"
    monkeypatch.setattr(chosen, in_torch)
    expected = tokens(folder, max_num_batched_tokens=budget)
    monkeypatch.setattr(chosen, with_kernels)
    assert tokens(folder, max_num_batched_tokens=budget) == expected


def in_torch(device: str, config: ModelConfig) -> Backend:
    return TorchLatentAttention if config.mla else TorchAttention


def with_kernels(device: str, config: ModelConfig) -> Backend:
    return TritonLatentBackend(config, device) if config.mla else TritonBackend(config, device)


def test_single_queries_of_a_latent_step_go_through_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model, changes = FAMILIES["latent"]
    torch.manual_seed(0)
    model(config(**SHAPE | changes)).save_pretrained(tmp_path)
    monkeypatch.setattr("minivllm.runner.model_runner.choose_backend", with_kernels)
    num_queries: list[int] = []
    decode = TritonLatentDecode.__call__

    def counted(self: TritonLatentDecode, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        num_queries.append(len(q))
        return decode(self, q, cache)

    monkeypatch.setattr(TritonLatentDecode, "__call__", counted)
    tokens(tmp_path, max_num_batched_tokens=24)
    assert max(num_queries) == len(PROMPTS) and 1 in num_queries  # all decodes together, and one beside a chunk
    num_queries.clear()
    tokens(tmp_path, block_size=3)  # the kernel has no such block
    assert num_queries == []


def test_kernel_takes_latents_that_are_powers_of_two() -> None:
    lite = ModelConfig.from_json(builtin_configs()["deepseek-v2-lite"])
    assert fits_kernel(lite)
    odd = ModelConfig.from_json(builtin_configs()["deepseek-v2-lite"] | {"kv_lora_rank": 384})
    assert not fits_kernel(odd) and not fits_kernel(ModelConfig.from_json(builtin_configs()["smollm2-135m"]))
    assert choose_backend("cpu", lite) is choose_backend("cuda", odd) is TorchLatentAttention


@pytest.mark.parametrize(("rank", "rope"), [(64, 64), (128, 64), (256, 64), (512, 64), (64, 16)])
def test_any_latent_finds_a_kernel_that_takes_it(rank: int, rope: int) -> None:
    dtype = "bfloat16" if HAS_GPU else "float16"  # what Hopper's kernel takes, and the interpreter, which has no bf16
    tiny = builtin_configs()["tiny-mla"] | {"kv_lora_rank": rank, "qk_rope_head_dim": rope, "dtype": dtype}
    config = ModelConfig.from_json(tiny)
    starts, lengths = torch.arange(3, device=DEVICE), torch.tensor([20, 33], device=DEVICE)
    table = torch.tensor([[5, 2, 0], [7, 1, 4]], device=DEVICE)
    slots = torch.tensor([2 * 16 + 3, 4 * 16], device=DEVICE)
    batch = ForwardBatch(starts[:2], lengths - 1, slots, table, starts, lengths, starts[:2])
    torch.manual_seed(rank)
    storage = KVStorage(config, 8, 16, DEVICE)
    storage.data.normal_()
    sizes = ((2, 8, 32), (2, 8, rope), (2, rank + rope), (8, 32, rank), (8, 32, rank))
    scales = (1, 1, 1, rank**-0.5, rank**-0.5)  # so that no one key takes all: rounding would choose another
    parts = zip(sizes, scales, strict=True)
    inputs = [(torch.randn(size, device=DEVICE) * scale).to(storage.data.dtype) for size, scale in parts]
    layers: list[LayerKV] = list(storage.layers)
    backends = (TorchLatentAttention, TritonLatentBackend(config, DEVICE))
    expected, found = (backend(config, batch, layers).attend_latent(0, *inputs) for backend in backends)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.02 * float(expected.abs().max()))


def test_a_gpu_gets_the_kernels_where_they_have_the_head_size() -> None:
    config = ModelConfig.from_json(builtin_configs()["smollm2-135m"])
    assert choose_backend("cpu", config) is TorchAttention
    if HAS_GPU:
        assert isinstance(choose_backend("cuda", config), TritonBackend)
