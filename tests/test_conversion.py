"""Converted attentions: exact where they claim to be, the best of their rank elsewhere, and loadable on both sides."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from minivllm import LLM, cli
from minivllm.config import RopeConfig
from minivllm.errors import MiniVLLMError
from minivllm.lab import conversion_study
from minivllm.lab.conversion import convert, pool_heads
from minivllm.lab.corpus import calibration_rows, help_topics, is_held_out, runs_of, without_shared
from minivllm.lab.latent_weights import CONSTANT, latent_weights, most_rank
from minivllm.lab.low_rank import Heads, Moments, as_complex, factorise, root, share_key
from minivllm.lab.tune_conversions import Corpus, Settings, main, tune
from minivllm.models.layers import inverse_frequencies

ROWS = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(1))  # more tokens than hidden numbers
Build = Callable[..., Path]


@pytest.fixture
def llama(tmp_path: Path) -> Build:
    """Save a small random Llama and give its folder."""

    def build(**changes: object) -> Path:
        torch.manual_seed(3)
        shape: dict[str, object] = {
            "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 2048,
            "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        model.save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return build


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    return loaded(folder)(ROWS[:2]).logits


def loss(folder: Path) -> float:
    return float(torch.nn.functional.cross_entropy(logits(folder)[:, :-1].flatten(0, 1), ROWS[:2, 1:].flatten()))


def moments_of(inputs: torch.Tensor) -> Moments:
    return Moments(inputs.mean(0), inputs.T @ inputs / len(inputs))


def random_problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Moments]:
    """target [12, 20], a weight [12, 12], and moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixed = normal(500, 20) @ (normal(20, 20) * torch.logspace(0, -2, 20, dtype=torch.float64)) + normal(20)
    square = normal(12, 12)
    return normal(12, 20), root(square @ square.T), moments_of(mixed)


# --- heads


def test_mha_computes_the_same_function(llama: Build, tmp_path: Path) -> None:
    source = llama()
    folder = convert(source, "mha", tmp_path / "mha")
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 6
    torch.testing.assert_close(logits(folder), logits(source), atol=1e-5, rtol=0)


def test_gqa_of_mha_gives_every_bf16_weight_back(llama: Build, tmp_path: Path) -> None:
    source = llama(num_attention_heads=9, hidden_size=72)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, "mha", tmp_path / "mha")
    back = load_file(convert(tmp_path / "mha", "gqa-3", tmp_path / "back") / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_pooled_heads_are_the_means_of_neighbours() -> None:
    heads = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])  # 4 KV heads of size 1
    assert pool_heads(heads, 4, 4, 2).tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert pool_heads(heads, 4, 8, 1).tolist() == [[4.0, 5.0]]
    assert pool_heads(heads[:2], 2, 6, 3).tolist() == [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]]  # repeated, then pooled


# --- latents


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ],
)
def test_one_kv_head_becomes_a_full_latent_without_any_loss(
    llama: Build, tmp_path: Path, rope: dict[str, object]
) -> None:
    source = llama(num_key_value_heads=1, rope_parameters=rope)
    folder = convert(source, "mla-18", tmp_path / "mla", calibration=ROWS)
    assert type(loaded(folder)).__name__ == "DeepseekV2ForCausalLM"
    torch.testing.assert_close(logits(folder), logits(source), atol=1e-4, rtol=0)


def test_at_full_rank_only_the_turning_of_part_of_k_is_lost(llama: Build, tmp_path: Path) -> None:
    """Without turning (one huge rope base, one token of difference at most) nothing is lost at all."""
    source = llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1e7})
    folder = convert(source, "mla-82", tmp_path / "mla", calibration=ROWS)
    torch.testing.assert_close(logits(folder), logits(source), atol=2e-3, rtol=0)


def test_a_larger_rank_loses_less(llama: Build, tmp_path: Path) -> None:
    source = llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1e7}, initializer_range=0.05)
    exact = logits(source)
    errors = [
        float((logits(convert(source, f"mla-{rank}", tmp_path / str(rank), calibration=ROWS)) - exact).norm())
        for rank in (4, 12, 24, 40)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_norm_of_the_latent_is_a_constant(llama: Build) -> None:
    """The last number is CONSTANT, and what the norm does to the others its weight undoes to one in a million."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 48, generator=generator, dtype=torch.float64)

    def heads(count: int) -> torch.Tensor:
        return torch.randn(count, 16, 48, generator=generator, dtype=torch.float64)

    made = latent_weights(Heads(heads(6), heads(3), heads(3), heads(6).movedim(2, 0)), moments_of(inputs), 32,
                          RopeConfig(), 0)  # fmt: skip
    weight, bias, norm = (
        made[f"model.layers.0.self_attn.{name}"]
        for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias", "kv_a_layernorm.weight")
    )
    latent = (inputs @ weight.T + bias)[:, :32]
    normed = latent * torch.rsqrt(latent.square().mean(1, keepdim=True)) * norm
    assert set(latent[:, -1].tolist()) == {CONSTANT}
    torch.testing.assert_close(normed[:, :-1], latent[:, :-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(normed[:, -1], torch.ones(4000, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(latent[:, :-1].var(0), torch.ones(31, dtype=torch.float64), rtol=1e-3, atol=0)


# --- the algebra


def test_shared_key_and_rest_make_up_k_and_the_mix_commutes_with_rope() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 16, 24, generator=generator, dtype=torch.float64) for n in (6, 3))
    moments = moments_of(torch.randn(99, 24, generator=generator, dtype=torch.float64))
    shared = share_key(Heads(q, k, k, q.movedim(2, 0)), moments)
    turn = torch.exp(7j * inverse_frequencies(RopeConfig(), 16).double())[:, None]
    rebuilt = shared.coefficients.conj().T[:, :, None] * (shared.key * turn) + shared.rest * turn
    torch.testing.assert_close(rebuilt, as_complex(k) * turn)


def test_shared_key_of_one_component_leaves_no_rest() -> None:
    """K heads that are complex multiples of each other have one component."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 16, 24, generator=generator, dtype=torch.float64)
    q = torch.randn(4, 16, 24, generator=generator, dtype=torch.float64)
    moments = moments_of(torch.randn(99, 24, generator=generator, dtype=torch.float64))
    rest = share_key(Heads(q, torch.cat((one, -2 * one)), one, q.movedim(2, 0)), moments).rest
    assert float(rest.abs().max()) < 1e-12


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_factors_reach_the_bound_of_eckart_and_young(rank: int) -> None:
    target, weight, moments = random_problem()
    singular = torch.linalg.svdvals(weight @ target @ root(moments.covariance)).square()
    assert factorise(target, weight, moments, rank).error == pytest.approx(
        float(singular[rank:].sum() / singular.sum())
    )


def test_the_error_reported_is_the_error_made_and_plain_svd_makes_more() -> None:
    target, weight, moments = random_problem()
    made = factorise(target, weight, moments, 4)

    def error(approximation: torch.Tensor) -> float:
        lost, whole = weight @ (target - approximation), weight @ target
        return float(
            torch.trace(lost @ moments.covariance @ lost.T) / torch.trace(whole @ moments.covariance @ whole.T)
        )

    u, s, v = torch.linalg.svd(target, full_matrices=False)
    assert error(made.up @ made.down) == pytest.approx(made.error)
    assert error(u[:, :4] * s[:4] @ v[:4]) > 1.2 * made.error


def test_full_rank_factors_are_the_target_with_its_mean() -> None:
    target, weight, moments = random_problem()
    made = factorise(target, weight, moments, 12)
    torch.testing.assert_close(made.up @ made.down, target, atol=1e-8, rtol=0)
    torch.testing.assert_close(made.offset, target @ moments.mean)


# --- the engine


@pytest.mark.parametrize("to", ["mha", "gqa-2", "mqa", "mla-16"])
def test_engine_and_transformers_find_the_same_loss(llama: Build, tmp_path: Path, to: str) -> None:
    folder = convert(llama(), to, tmp_path / "out", calibration=ROWS)
    llm = LLM(folder, dtype="float32", num_blocks=40, show_progress=False)
    assert conversion_study.held_out_loss(llm, ROWS[:2].tolist()) == pytest.approx(loss(folder), abs=1e-5)


def test_study_reports_the_bytes_of_the_engines_tensors(
    llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = llama()
    add_tokenizer(source)
    monkeypatch.setattr(conversion_study, "CONTEXT", 16)
    rows = {to: conversion_study.measure(source, to) for to in ("gqa-3", "mqa", "mla-16")}
    numbers = {to: row.numbers_per_layer for to, row in rows.items()}
    assert numbers == {"gqa-3": 2 * 3 * 16, "mqa": 2 * 16, "mla-16": 16 + 16}
    assert rows["mla-16"].bytes_per_token == rows["mqa"].bytes_per_token
    assert cli.main(["convert", str(source), "--to", "mla-16", "--out", str(tmp_path / "cli")]) == 0
    assert capsys.readouterr().out == f"mla-16: {tmp_path / 'cli'}\n"
    assert (tmp_path / "cli" / "tokenizer.json").exists()


def add_tokenizer(folder: Path) -> None:
    """A byte is a token."""
    alphabet = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(alphabet, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


# --- tuning and its text


def test_tuning_heals_a_converted_model_and_the_seed_decides_how(llama: Build, tmp_path: Path) -> None:
    folder = convert(llama(), "mqa", tmp_path / "mqa")
    settings = Settings(num_tokens=20 * 8 * 128, rows_per_step=8, learning_rate=5e-3)
    first, second = (tune(loaded(folder), ROWS, settings, show_progress=False) for _ in range(2))
    longer = tune(loaded(folder), ROWS, replace(settings, num_tokens=100 * 8 * 128), show_progress=False)
    assert first == second
    assert longer[-1] < first[-1]


def test_the_command_writes_losses_before_and_after(llama: Build, tmp_path: Path) -> None:
    source = llama()
    rows = ROWS.numpy().astype(np.uint16)
    held_out = {"held out a": rows, "held out b": rows}
    np.savez(tmp_path / "corpus.npz", allow_pickle=False, training=rows, calibration=rows, **held_out)
    wanted = ["--corpus", str(tmp_path), "--output", str(tmp_path / "tuned.json"), "--model", str(source)]
    assert main([*wanted, "--variants", "gqa-3,mla-16", "--tokens", "20000", "--rows", "4"]) == 0
    result = json.loads((tmp_path / "tuned.json").read_text())
    assert [row["variant"] for row in result["rows"]] == ["gqa-3", "mla-16"]
    assert all(row["after"]["all"] < row["before"]["all"] for row in result["rows"])
    assert result["rows"][0]["before"].keys() == {"a", "b", "all"}
    shown = conversion_study.recorded_table(tmp_path / "tuned.json")
    assert f"{result['rows'][1]['after']['all']:.3f}" in shown


def test_learning_rate_warms_up_and_falls_to_nothing() -> None:
    settings = Settings(learning_rate=1.0)
    rates = [settings.rate_at(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


def test_training_text_shares_no_eight_words_with_held_out_text() -> None:
    judged = runs_of("The quick brown fox jumps over the lazy dog today")
    text = "A clean paragraph.\n\nSee: the *quick* brown fox jumps OVER the ``lazy`` dog!\n\nAnother."
    assert without_shared(text, judged) == "A clean paragraph.\n\nAnother."


def test_held_out_documents_are_one_of_twenty_and_topics_are_split() -> None:
    assert sum(is_held_out(f"page {i}") for i in range(10_000)) == pytest.approx(500, abs=70)
    judged, rest = (dict(help_topics(held_out=held_out)) for held_out in (True, False))
    assert judged and rest and judged.keys().isdisjoint(rest)


def test_calibration_text_comes_from_all_over_the_topics(llama: Build) -> None:
    source = llama()
    add_tokenizer(source)
    rows = calibration_rows(PreTrainedTokenizerFast.from_pretrained(source))
    assert rows.shape == (16, 512)


# --- bad input


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ("gqa-4", "gqa-4: 6 query heads do not divide into 4 groups; give another"),
        ("gqa-0", "unknown target 'gqa-0': use mha, mqa, gqa-G"),
        ("mla", "unknown target 'mla': use mha, mqa, gqa-G"),
        ("mla-84", "mla-84: the rank must be even and from 2 to 82"),
        ("mla-7", "mla-7: the rank must be even and from 2 to 82"),
    ],
)
def test_a_target_that_cannot_be_is_one_line(llama: Build, tmp_path: Path, to: str, line: str) -> None:
    with pytest.raises(MiniVLLMError, match=f"^{line}[^\n]*$"):
        convert(llama(), to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seven_heads_do_not_divide_into_two_groups(llama: Build, tmp_path: Path) -> None:
    with pytest.raises(MiniVLLMError, match=r"^gqa-2: 7 query heads do not divide into 2 groups"):
        convert(llama(num_attention_heads=7, num_key_value_heads=1, hidden_size=56), "gqa-2", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention_bias": True}, "mla: this model has biases"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "mla: yarn scales keys"),
        ({"hidden_size": 40}, "mla: transformers' DeepseekV2 wants hidden_size 40 to be a multiple of 6 heads"),
    ],
)
def test_models_that_deepseek_has_no_place_for_are_one_line(
    llama: Build, tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    source = llama()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(MiniVLLMError, match=f"^{line}[^\n]*$"):
        convert(source, "mla-16", tmp_path / "out", calibration=ROWS)


def test_other_families_existing_folders_and_missing_texts_are_one_line(
    llama: Build, tmp_path: Path, reference_model: Callable[[str], tuple[Path, PreTrainedModel]]
) -> None:
    with pytest.raises(MiniVLLMError, match="only Llama models are converted, this is qwen3"):
        convert(reference_model("qwen3")[0], "mqa", tmp_path / "out")
    source = llama()
    with pytest.raises(MiniVLLMError, match="exists already; give a new folder"):
        convert(source, "mqa", source)
    with pytest.raises(MiniVLLMError, match="has no tokenizer: give `calibration`"):
        convert(source, "mla-16", tmp_path / "out")
    with pytest.raises(MiniVLLMError, match=r"no corpus .*; make one: python -m minivllm.lab.corpus"):
        Corpus.load(tmp_path)


def test_most_rank_of_smollm2_is_322() -> None:
    from minivllm.config import ModelConfig
    from minivllm.weights import builtin_configs

    assert most_rank(ModelConfig.from_json(builtin_configs()["smollm2-135m"])) == 322
