"""Attentions of one width: tensors hold what the formula says, both forms of MLA agree, conversions are read whole."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig

from minivllm import LLM
from minivllm.config import ModelConfig
from minivllm.course.calculators import (
    attention_shape,
    kv_bytes_per_token,
    mha_bytes_per_token,
    mla_in_gqa_groups,
    public_models,
)
from minivllm.errors import MiniVLLMError
from minivllm.lab import attention_kinds
from minivllm.lab.attention_kinds import (
    HEAD_SIZE,
    KINDS,
    NUM_HEADS,
    build_kind,
    compare_forms,
    converted_loss,
    decode_ms,
    kind_config,
    mqa_as_mla_gap,
    own_study,
    public_tensor_bytes,
    read_kind,
    short_loss,
)
from minivllm.lab.conversion_study import RESULTS


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("mha", 2 * 64 * 64), ("gqa-32", 2 * 32 * 64), ("gqa-8", 2 * 8 * 64), ("mqa", 2 * 64), ("mla", 4 * 64 + 32)],
)
def test_tensors_of_every_kind_hold_what_the_formula_says(kind: str, numbers: int) -> None:
    found = read_kind(kind)
    assert found.is_exact and found.agreement.is_exact
    assert found.numbers_per_layer == numbers


def test_cache_shrinks_by_the_group_factor() -> None:
    by_kind = {kind: read_kind(kind).agreement.tensors_per_token for kind in KINDS}
    assert by_kind["mha"] == 8 * by_kind["gqa-8"] == 64 * by_kind["mqa"]
    assert by_kind["mla"] / by_kind["mqa"] == float(mla_in_gqa_groups("deepseek-v2")) == 2.25


def test_kinds_have_one_width_and_differ_in_what_they_keep_alone() -> None:
    configs = [ModelConfig.from_json(kind_config(kind)) for kind in KINDS]
    assert {(c.num_heads, c.hidden_size, c.num_layers, c.intermediate_size) for c in configs} == {(64, 512, 2, 1024)}
    assert [attention_shape(kind_config(kind)).kind for kind in KINDS] == ["MHA", "GQA", "MQA", "MLA"]
    assert {c.head_size for c in configs[:3]} == {HEAD_SIZE}


@pytest.mark.parametrize("kind", ["gqa-5", "gqa-0", "gqa-", "gqa--8", "GQA", "", "gqa-128", "mla-64"])
def test_unknown_kind_is_one_line(kind: str) -> None:
    with pytest.raises(MiniVLLMError, match="use mha, mqa, mla or gqa-G") as caught:
        kind_config(kind)
    assert "\n" not in str(caught.value) and str(NUM_HEADS) in str(caught.value)


def test_transformers_keeps_as_many_numbers_in_its_own_cache() -> None:
    """Its cache of the same config, counted: the formula is not only ours."""
    for kind in ("mha", "gqa-8", "mqa"):
        config = ModelConfig.from_json(kind_config(kind))
        model = AutoModelForCausalLM.from_config(LlamaConfig(**kind_config(kind)))
        with torch.inference_mode():
            layers = model(torch.arange(1, 8)[None], use_cache=True).past_key_values.layers
        numbers = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
        assert numbers == 7 * config.num_layers * read_kind(kind).numbers_per_layer


def test_latent_model_is_one_that_transformers_builds() -> None:
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**kind_config("mla")))
    own = build_kind("mla").model_config
    assert sum(parameter.numel() for parameter in model.parameters()) == own.num_parameters


def test_both_forms_of_latent_attention_agree() -> None:
    forms = compare_forms(num_tokens=40)
    assert (forms.num_expanded, forms.num_absorbed) == (1, 40)
    assert 0 < forms.largest_gap < 1e-4  # other sums, so not the same bits


def test_mqa_becomes_a_full_latent_without_loss() -> None:
    assert 0 < mqa_as_mla_gap() < 1e-4


def test_narrower_latent_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attention_kinds.convert
    monkeypatch.setattr(
        attention_kinds, "convert", lambda source, to, *rest, **named: whole(source, "mla-8", *rest, **named)
    )
    assert mqa_as_mla_gap() > 1e-2


@pytest.mark.parametrize(
    ("name", "published"),
    [("llama-2-70b", 327_680), ("llama-2-7b", 524_288), ("llama-3.1-405b", 516_096), ("qwen2.5-0.5b", 12_288),
     ("deepseek-v3", 70_272), ("tinyllama-1.1b", 22_528), ("mistral-7b-v0.1", 131_072)],
)  # fmt: skip
def test_tensors_of_public_shapes_hold_the_published_bytes(name: str, published: int) -> None:
    assert public_tensor_bytes(name) == published == int(kv_bytes_per_token(name))


def test_other_kv_heads_are_the_counterfactual() -> None:
    assert public_tensor_bytes("llama-2-70b", num_kv_heads=64) == int(mha_bytes_per_token("llama-2-70b")) == 2_621_440


def test_family_that_the_engine_lacks_is_one_line() -> None:
    assert "opt-13b" in public_models()
    with pytest.raises(MiniVLLMError, match="not supported"):
        public_tensor_bytes("opt-13b")


def test_a_step_of_every_kind_can_be_timed() -> None:
    assert all(decode_ms(kind, num_requests=2) > 0 for kind in ("mqa", "mla"))


def test_own_study_is_what_was_recorded() -> None:
    tuned = json.loads((RESULTS / "tuned_h200.json").read_text())
    study = own_study()
    assert [point.name for point in study.points] == ["mha", "gqa-3", "mqa", "mla-192", "mla-128", "mla-64"]
    for row in tuned["rows"]:
        point = study.point(row["variant"])
        assert point.values == {"loss after tuning": row["after"]["all"], "loss before tuning": row["before"]["all"]}
        assert "tuned on 8M tokens" in point.paid
    assert [round(point.cache_percent, 2) for point in study.points] == [100, 33.33, 11.11, 22.22, 16.67, 11.11]
    assert tuned["provenance"]["device"] in study.source and tuned["provenance"]["commit"] in study.source
    assert study.point("gqa-3").paid.startswith("the model itself") and not study.is_higher_better


def test_missing_recording_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MiniVLLMError, match="cannot read the results"):
        own_study(tmp_path)


@pytest.mark.weights
def test_averaging_the_heads_of_a_trained_model_ruins_it() -> None:
    before, unchanged, after = (converted_loss(variant) for variant in ("gqa-3", "mha", "mqa"))
    assert before == pytest.approx(unchanged, abs=0.01)
    assert before < 3 and after > before + 3
    assert short_loss(LLM("smollm2-135m", num_blocks=40, max_model_len=512)) == pytest.approx(before, abs=1e-6)
