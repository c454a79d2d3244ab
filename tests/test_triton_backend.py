"""The engine over the Triton kernels gives the tokens it gives over torch's operators, which are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from minivllm import LLM, SamplingParams
from minivllm.attention import choose_backend
from minivllm.attention.torch_backend import TorchAttention
from minivllm.attention.triton_backend import TritonBackend
from minivllm.config import ModelConfig
from minivllm.weights import builtin_configs
from tests.conftest import SHAPE
from tests.kernel_cases import HAS_GPU

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
DEVICE = "cuda" if HAS_GPU else "cpu"
PROMPTS = [list(range(3, 40)), [7], list(range(50, 66)), list(range(100, 117))]  # around the block size of 16
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
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
    monkeypatch.setattr(chosen, lambda device, config: TorchAttention)
    expected = tokens(folder, max_num_batched_tokens=budget)
    monkeypatch.setattr(chosen, lambda device, config: TritonBackend(config, device))
    assert tokens(folder, max_num_batched_tokens=budget) == expected


def test_a_gpu_gets_the_kernels_where_they_have_the_head_size() -> None:
    config = ModelConfig.from_json(builtin_configs()["smollm2-135m"])
    assert choose_backend("cpu", config) is TorchAttention
    if HAS_GPU:
        assert isinstance(choose_backend("cuda", config), TritonBackend)
