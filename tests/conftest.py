"""Small random models, saved as transformers saves them, and engines round them."""

import tests.kernel_cases  # noqa: F401, I001  first: it chooses Triton's interpreter before anything imports triton

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 2, "first_k_dense_replace": 9, "n_group": 4, "topk_group": 2,
}  # fmt: skip
# Every family and every switch of the model file: one line each.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("LlamaConfig", {}),
    "llama-mha-tied": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-bias": ("LlamaConfig", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-9to3": (
        "LlamaConfig",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "num_hidden_layers": 3},
    ),
    "llama-3.1-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 3}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "llama-head-8": ("LlamaConfig", {"head_dim": 8}),
    "llama-head-40": ("LlamaConfig", {"head_dim": 40, "num_hidden_layers": 4}),
    "llama-head-256": ("LlamaConfig", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "num_hidden_layers": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 9, "num_hidden_layers": 3}),
    "ministral-1to1": (
        "MinistralConfig",
        {"sliding_window": 9, "num_hidden_layers": 4, "head_dim": 16}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3-5to1": (  # the pattern of Gemma 3: two rows of the last group's blocks stay unused
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": 6, "num_hidden_layers": 14, "hidden_size": 32, "head_dim": 16}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
        | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2 + ["sliding_attention"] * 2},
    ),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 32, "rope_parameters": YARN | {"truncate": False, "factor": 4.0}}),
    "v2-dense": ("DeepseekV2Config", MLA),
    "v2-dense-tied-bias-q-latent": (
        "DeepseekV2Config",
        MLA | {"q_lora_rank": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "v2-yarn-odd-sizes": (
        "DeepseekV2Config",
        MLA
        | {"kv_lora_rank": 22, "qk_nope_head_dim": 6, "qk_rope_head_dim": 6, "v_head_dim": 3}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "v2-moe": ("DeepseekV2Config", MLA | {"first_k_dense_replace": 1, "num_hidden_layers": 3}),
    "v2-moe-groups": (
        "DeepseekV2Config",
        MLA | {"first_k_dense_replace": 0, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0},
    ),
    "v3-dense-halves-odd-sizes": (
        "DeepseekV3Config",
        MLA
        | {"q_lora_rank": 19, "kv_lora_rank": 21, "qk_nope_head_dim": 5, "qk_rope_head_dim": 6, "v_head_dim": 3}
        | {"rope_interleave": False, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "v3-moe-yarn": (
        "DeepseekV3Config",
        MLA
        | {"first_k_dense_replace": 1, "num_hidden_layers": 3, "q_lora_rank": 24, "n_shared_experts": 1}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
}


@pytest.fixture(autouse=True)
def _cpu_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run on the CPU, on machines with a GPU too, unless they are marked gpu."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def _nobody_in_particular(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` runs the notebooks as the example learner; a test says for itself whose progress it looks at."""
    monkeypatch.delenv("MINIVLLM_LEARNER", raising=False)


@pytest.fixture(scope="session")
def reference_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, PreTrainedModel]]:
    """Build a family's small random model once; give its folder and transformers' own instance in fp32."""
    built: dict[str, tuple[Path, PreTrainedModel]] = {}

    def build(family: str) -> tuple[Path, PreTrainedModel]:
        if family not in built:
            class_name, changes = FAMILIES[family]
            torch.manual_seed(7)
            config = getattr(transformers, class_name)(**{**SHAPE, **changes})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            tensors = [*model.named_parameters(), *model.named_buffers()]
            for name, parameter in tensors:  # zero biases and unit norms would hide a missing one
                if name.endswith("bias") or "norm" in name:
                    torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            built[family] = folder, model
        return built[family]

    return build
