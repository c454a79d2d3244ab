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
from minivllm.attention import Backend, choose_backend
from minivllm.attention.latent_torch import TorchLatentAttention
from minivllm.attention.latent_triton import TritonLatentBackend, TritonLatentDecode, fits_kernel
from minivllm.attention.torch_backend import TorchAttention
from minivllm.attention.triton_backend import TritonBackend
from minivllm.config import ModelConfig
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


def test_a_gpu_gets_the_kernels_where_they_have_the_head_size() -> None:
    config = ModelConfig.from_json(builtin_configs()["smollm2-135m"])
    assert choose_backend("cpu", config) is TorchAttention
    if HAS_GPU:
        assert isinstance(choose_backend("cuda", config), TritonBackend)
