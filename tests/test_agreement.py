"""The calculators and the engine agree on bytes, exactly, for every model that the engine can build."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedModel

from minivllm import LLM
from minivllm.config import ARCHITECTURES, DTYPES, ModelConfig
from minivllm.course.calculators import (
    Accelerator,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    num_active_parameters,
    num_parameters,
    public_config,
    public_models,
)
from minivllm.events import StepRan
from minivllm.lab.bytes_study import NUM_HELD, compare_bytes, study, time_steps
from minivllm.lab.step_floor import ModelWork, measured_roofs
from minivllm.layer_groups import group_layers
from minivllm.runner.kv_storage import KVStorage, block_bytes
from minivllm.runner.loader import build_model
from minivllm.weights import builtin_configs
from tests.conftest import FAMILIES

Build = Callable[[str], tuple[Path, PreTrainedModel]]
MACHINE = Accelerator("a made-up machine", 2**34, 1e10, {"float32": 1e11, "bf16": 2e11}, "this test")


def buildable() -> Mapping[str, Mapping[str, object]]:
    """Built-in configs, and the public ones of families that the engine has."""
    families = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}
    found: dict[str, Mapping[str, object]] = dict(builtin_configs())
    for name in public_models():
        config = public_config(name)
        family = str(config.get("model_type", "")).replace("_", "")
        if family in families and config.get("rope_scaling") is None:
            found[f"public {name}"] = {"hidden_act": "silu", **config, "architectures": [families[family]]}
    return found


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", buildable())
def test_calculated_bytes_are_those_of_the_tensors(name: str, dtype: str, block_size: int) -> None:
    config = {**buildable()[name], "dtype": dtype}
    model = ModelConfig.from_json(config)
    groups = group_layers(model.num_layers, model.windows)
    storage = KVStorage(model, 3, block_size, "cpu", groups=groups)
    per_token = int(kv_bytes_per_token(config, dtype))
    assert model.kv_bytes_per_token == per_token
    assert storage.data.nbytes == 3 * block_bytes(model, block_size, groups)
    assert storage.data.nbytes * model.num_layers == 3 * block_size * per_token * groups.num_rows
    if len(groups.windows) == 1:
        assert storage.data.nbytes == 3 * block_size * per_token


def test_there_are_models_of_every_attention_among_them() -> None:
    assert len(buildable()) > 25
    assert any("deepseek" in name for name in buildable())


@pytest.mark.parametrize("name", buildable())
def test_calculated_parameters_are_those_of_the_engine(name: str) -> None:
    config = buildable()[name]
    assert ModelConfig.from_json(config).num_parameters == int(num_parameters(config))


@pytest.mark.parametrize("name", ["smollm2-135m", "tiny-mla", "tiny-hybrid"])
def test_calculated_parameters_are_those_of_the_built_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.runner.loader.can_prepack", lambda dtype: False)  # packed weights are no parameters
    config = builtin_configs()[name]
    model = build_model(ModelConfig.from_json({**config, "dtype": "float32"}), [], 0, "cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == int(num_parameters(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_holds_the_bytes_that_are_calculated(reference_model: Build, family: str) -> None:
    folder, _ = reference_model(family)
    config = json.loads((folder / "config.json").read_text())
    llm = LLM(folder, dtype="float32", block_size=1, num_blocks=4000, enable_prefix_caching=False)
    agreement = compare_bytes(llm, config)
    assert agreement.is_exact, agreement
    assert agreement.held <= agreement.per_token * NUM_HELD
    assert (agreement.held < agreement.per_token * NUM_HELD) == bool(config.get("sliding_window"))


def test_random_configs_agree() -> None:
    random = Random(0)
    for _ in range(200):
        kv_heads, num_layers = random.choice((1, 2, 3, 5)), random.randint(1, 9)
        config: dict[str, Any] = {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": random.randint(5, 99),
            "hidden_size": 8 * random.randint(1, 9), "intermediate_size": random.randint(1, 99),
            "num_hidden_layers": num_layers, "num_attention_heads": kv_heads * random.randint(1, 4),
            "num_key_value_heads": kv_heads, "head_dim": 8 * random.randint(1, 20),
            "tie_word_embeddings": random.random() < 0.5,
        }  # fmt: skip
        if random.random() < 0.5:
            kinds = ["sliding_attention", "full_attention"]
            config |= {"use_sliding_window": True, "sliding_window": random.randint(1, 50)}
            config |= {"layer_types": [random.choice(kinds) for _ in range(num_layers)]}
        model = ModelConfig.from_json(config)
        assert model.kv_bytes_per_token == int(kv_bytes_per_token(config))
        assert model.num_parameters == int(num_parameters(config))
        num_tokens = random.randint(0, 200)
        seen = sum(num_tokens if window is None else min(num_tokens, window) for window in model.windows or [None] * 0)
        layer_bytes = model.kv_bytes_per_token // num_layers
        if model.windows:
            assert int(kv_bytes_of_sequence(config, num_tokens)) == seen * layer_bytes


def test_floor_of_a_step_is_what_a_hand_counts() -> None:
    config = {
        "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    work = ModelWork(config, "float32")
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 6 + 2 * 8  # q, k and v, o, MLP, norms
    floor = work.floor([(3, 5), (1, 7)], 2, MACHINE)
    assert floor.weight_bytes == 4 * (2 * layer + 8 + 80)
    assert floor.kv_bytes == 4 * 2 * 2 * 4 * (5 + 7)
    pairs = (3 + 4 + 5) + 7
    assert floor.flops == 2 * (2 * layer + 8) * 4 + 2 * 80 * 2 + 2 * 4 * 2 * 4 * pairs
    assert floor.stored_bytes == 4 * 2 * 2 * 4 * (3 + 1) and floor.logit_bytes == 2 * 4 * 10 * 2
    moved = floor.weight_bytes + floor.kv_bytes + floor.stored_bytes + floor.logit_bytes
    assert floor.ms == pytest.approx(max(moved / 1e7, floor.flops / 1e8))
    assert work.floor([(3, 5), (1, 7)], 2, MACHINE, shared_bytes=96).kv_bytes == floor.kv_bytes - 96
    assert work.floor([(3, 5)], 0, MACHINE).weight_bytes == 4 * (2 * layer + 8)  # no logits, no head


def test_ideal_engine_reads_a_shared_prefix_once_and_writes_it_once() -> None:
    work, slow = (
        ModelWork("qwen3-0.6b", "bfloat16"),
        Accelerator("slow memory", 2**34, 1.0, {"bf16": 1e30}, "this test"),
    )
    kv = int(kv_bytes_per_token("qwen3-0.6b"))
    alone, shared = (work.ideal_seconds([100, 110], [2, 2], slow, num_shared) for num_shared in (0, 90))
    assert alone - shared == pytest.approx(kv * 90 * 3)  # in both steps one reading less, in the first a writing less


def test_floor_of_experts_counts_those_that_tokens_touch() -> None:
    work = ModelWork(builtin_configs()["deepseek-v2-lite"], "bfloat16")
    one, many = (work.floor([(num, num)], 1, MACHINE).weight_bytes for num in (1, 4096))
    table = 102_400 * 2048  # of embeddings: rows are picked from it, and no product reads it
    assert one == pytest.approx(2 * (int(num_active_parameters("deepseek-v2-lite")) - table), rel=1e-6)
    assert many == pytest.approx(2 * (int(num_parameters("deepseek-v2-lite")) - table), rel=1e-3)


def test_every_kind_of_step_is_timed_beside_its_floor() -> None:
    llm = LLM("tiny-mla", load_format="dummy", num_blocks=60)
    work = ModelWork(builtin_configs()["tiny-mla"], llm.model_config.dtype)
    prefill, decode = time_steps(llm, work, MACHINE, 2, 40)
    assert (prefill.num_steps, prefill.what) == (1, "prefill 2 x 40")
    assert (decode.num_steps, decode.what) == (15, "decode 2 x 40")
    assert prefill.compute_ms > decode.compute_ms > 0
    assert 0 < decode.share < 1
    with llm.record() as trace:
        llm.generate([[1, 2, 3]], use_tqdm=False)
    assert all(event.run_ms > 0 for event in trace if isinstance(event, StepRan))


def test_roofs_are_measured_here() -> None:
    machine = measured_roofs("cpu", "float32")
    assert machine.bandwidth > 1e8
    assert machine.flops_of("float32") > 1e8


def test_study_says_that_bytes_are_equal() -> None:
    text = study("tiny-mla")
    assert text.count("exactly equal") == 1
    assert "decode 32 x 128" in text
