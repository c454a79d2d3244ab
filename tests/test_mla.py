"""Latent attention and experts: twins, bytes, routing, and DeepSeek models under every pressure of the engine.

That logits and tokens are transformers', family by family, is in test_parity.py (v2-..., v3-...).
"""

import copy
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.attention import ForwardBatch, latent_torch, torch_backend
from minivllm.attention.latent_torch import TorchLatentAttention, prefers_absorbed
from minivllm.attention.reference import latent_attention_reference
from minivllm.config import MlaConfig, ModelConfig
from minivllm.engine.tables import slot_of
from minivllm.errors import ConfigError, ModelError
from minivllm.events import BlockCopied, Preempted, PrefixHit, SwappedIn
from minivllm.models.deepseek import deepseek
from minivllm.models.moe import MixtureOfExperts
from minivllm.runner.kv_storage import KVStorage
from minivllm.weights import builtin_configs
from tests.conftest import FAMILIES, MLA, SHAPE
from tests.test_parity import all_logits, greedy, mixed_prompts

Build = Callable[[str], tuple[Path, PreTrainedModel]]
DEEPSEEK = [family for family in FAMILIES if family[:2] in ("v2", "v3")]
V2_LITE = MlaConfig(kv_lora_rank=512, nope_head_size=128, rope_head_size=64, v_head_size=128)

# --- The attention and its twin


def latent_config(mla: MlaConfig, num_heads: int = 3) -> ModelConfig:
    return ModelConfig(
        "deepseek_v2", 10, 64, 64, 1, num_heads, num_heads, mla.qk_head_size, 512, mla=mla, dtype="float32"
    )


def attend(num_new: list[int], num_tokens: list[int], block_size: int, mla: MlaConfig) -> tuple[torch.Tensor, ...]:
    """What TorchLatentAttention and its twin give for a step written by hand, over a shuffled pool."""
    config = latent_config(mla)
    counts = [-(-total // block_size) for total in num_tokens]
    pool = list(range(1, sum(counts) + 4))
    Random(0).shuffle(pool)
    tables = [pool[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]
    storage = KVStorage(config, len(pool) + 1, block_size, "cpu")
    generator = torch.Generator().manual_seed(1)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    storage.data.copy_(noise(*storage.data.shape))  # what is older than the step, and garbage where nobody looks
    slots, positions = list[int](), list[int]()
    for table, new, total in zip(tables, num_new, num_tokens, strict=True):
        positions += range(total - new, total)
        slots += [slot_of(position, table, block_size) for position in range(total - new, total)]
    width = max(counts)
    batch = ForwardBatch(
        token_ids=torch.zeros(len(slots), dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
        query_starts=torch.tensor([0, *accumulate(num_new)]),
        num_tokens=torch.tensor(num_tokens),
        logit_rows=torch.zeros(0, dtype=torch.int64),
    )
    q_nope, q_rope = noise(len(slots), 3, mla.nope_head_size), noise(len(slots), 3, mla.rope_head_size)
    rows = noise(len(slots), mla.row_size)
    w_uk = noise(3, mla.nope_head_size, mla.kv_lora_rank) / mla.kv_lora_rank**0.5
    w_uv = noise(3, mla.v_head_size, mla.kv_lora_rank) / mla.kv_lora_rank**0.5
    attention = TorchLatentAttention(config, batch, list(storage.layers))
    found = attention.attend_latent(0, q_nope, q_rope, rows, w_uk, w_uv)
    expected = latent_attention_reference(
        q_nope, q_rope, storage.layers[0].k, w_uk, w_uv, tables, num_new, num_tokens, config.softmax_scale
    )
    return found, expected


def always(absorbed: bool) -> Callable[[MlaConfig, int, int], bool]:
    return lambda mla, num_new, num_tokens: absorbed


@pytest.mark.parametrize("mla", [MlaConfig(16, 12, 8, 20), MlaConfig(7, 5, 2, 3), MlaConfig(32, 1, 16, 1)], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("absorbed", [True, False])
def test_both_forms_equal_the_twin_at_the_borders_of_blocks(
    absorbed: bool, block_size: int, mla: MlaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_torch, "prefers_absorbed", always(absorbed))
    lengths = sorted({1, max(block_size - 1, 1), block_size, block_size + 1, 2 * block_size + 1, 40})
    chunks, mixed = [(n + 1) // 2 for n in lengths], [n if index % 2 else 1 for index, n in enumerate(lengths)]
    for num_new in ([1] * len(lengths), lengths, chunks, mixed):
        found, expected = attend(num_new, lengths, block_size, mla)
        torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=1e-5)


def test_groups_of_unlike_lengths_equal_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "GROUP_COST_TOKENS", 0)
    found, expected = attend([1, 1, 4, 1, 1], [40, 3, 9, 38, 2], 3, MlaConfig(16, 12, 8, 20))
    torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=1e-5)


def test_deepseek_expands_prompts_and_absorbs_decodes_and_small_chunks_on_long_contexts() -> None:
    assert not prefers_absorbed(V2_LITE, 1000, 1000)
    assert prefers_absorbed(V2_LITE, 1, 1000)
    assert [prefers_absorbed(V2_LITE, new, 100_000) for new in (170, 171)] == [True, False]


def test_choice_counts_the_multiplications_of_the_matrices() -> None:
    r, dn, dr, dv = 512, 128, 64, 128
    for new, total in ((1, 2), (16, 300), (145, 1024), (147, 1024), (700, 9000)):
        expanded = total * r * (dn + dv) + new * total * (dn + dr) + new * total * dv
        absorbed = new * r * dn + new * total * (r + dr) + new * total * r + new * r * dv
        assert prefers_absorbed(V2_LITE, new, total) == (absorbed <= expanded)


# --- Bytes and sizes


@pytest.mark.parametrize("family", [*DEEPSEEK, "llama-9to3", "qwen3"])
def test_bytes_of_the_cache_are_the_bytes_per_token_of_the_config(family: str, reference_model: Build) -> None:
    for dtype in ("float32", "bfloat16"):
        llm = LLM(reference_model(family)[0], dtype=dtype, num_blocks=11, block_size=8)
        assert llm.storage.data.nbytes == llm.storage.num_bytes == llm.model_config.kv_bytes_per_token * 11 * 8
        assert llm.trace_header()["kv_bytes_per_token"] == llm.model_config.kv_bytes_per_token


def test_a_token_of_deepseek_v2_lite_takes_31104_bytes_where_mha_would_take_276480() -> None:
    config = ModelConfig.from_json(builtin_configs()["deepseek-v2-lite"])
    assert config.kv_bytes_per_token == 27 * (512 + 64) * 2 == 31_104
    assert 27 * 16 * (192 + 128) * 2 == 276_480  # its own keys and values, were they cached


def test_values_are_a_view_of_the_keys() -> None:
    storage = KVStorage(latent_config(MlaConfig(16, 12, 8, 20)), 5, 4, "cpu")
    k, v = storage.layers[0].k, storage.layers[0].v
    assert (k.shape, v.shape) == ((5, 4, 1, 24), (5, 4, 1, 16))
    assert k.data_ptr() == v.data_ptr() and storage.data.shape == (1, 1, 5, 4, 1, 24)


@pytest.mark.parametrize("family", DEEPSEEK)
def test_parameters_are_counted_as_they_are(family: str, reference_model: Build) -> None:
    folder, model = reference_model(family)
    config = LLM(folder, dtype="float32", num_blocks=3).model_config
    biases = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in deepseek(config).parameters())
    assert config.num_parameters == ours == model.num_parameters() + biases


# --- Under the engine's pressures

PROMPTS = [*mixed_prompts(9, 40, seed=5), list(range(30)), [*range(30), 7, 8, 9]]
NUM_NEW = 10
PRESSURES: dict[str, tuple[dict[str, Any], type | None]] = {
    "blocks of one token": ({"num_blocks": 600, "block_size": 1}, None),
    "blocks of eight": ({"num_blocks": 100, "block_size": 8}, None),
    "chunks of five": ({"num_blocks": 100, "block_size": 16, "max_num_batched_tokens": 5, "max_num_seqs": 4}, None),
    "few seats and a prefix cache": ({"num_blocks": 40, "block_size": 4, "max_num_seqs": 2}, PrefixHit),
    "recompute": ({"num_blocks": 26, "block_size": 3, "max_model_len": 64}, Preempted),
    "swap": (
        {"num_blocks": 26, "block_size": 3, "max_model_len": 64, "preemption_mode": "swap", "num_host_blocks": 60},
        SwappedIn,
    ),
    "no prefix cache": ({"num_blocks": 40, "enable_prefix_caching": False}, None),
}


@pytest.fixture(scope="module")
def expected_tokens(reference_model: Build) -> Callable[[str], list[list[int] | None]]:
    """transformers' own greedy tokens of all PROMPTS; None where fp32 does not decide between the best two."""
    known: dict[str, list[list[int] | None]] = {}

    def ask(family: str) -> list[list[int] | None]:
        if family not in known:
            answers = [greedy(reference_model(family)[1], prompt, NUM_NEW) for prompt in PROMPTS]
            known[family] = [tokens if gap > 1e-3 else None for tokens, gap in answers]
        return known[family]

    return ask


def assert_same(outputs: list[Any], expected: list[list[int] | None]) -> None:
    sure = [(o.outputs[0].token_ids, tokens) for o, tokens in zip(outputs, expected, strict=True) if tokens is not None]
    assert len(sure) >= 8
    for found, tokens in sure:
        assert found == tokens


@pytest.mark.parametrize("pressure", PRESSURES)
@pytest.mark.parametrize("family", ["v2-dense-tied-bias-q-latent", "v3-moe-yarn", "v2-yarn-odd-sizes"])
def test_tokens_are_transformers_under_every_pressure(
    family: str, pressure: str, reference_model: Build, expected_tokens: Callable[[str], list[list[int] | None]]
) -> None:
    options, event = PRESSURES[pressure]
    llm = LLM(reference_model(family)[0], dtype="float32", **options)
    with llm.record() as trace:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NUM_NEW), use_tqdm=False)
    assert event is None or trace.of(event)
    assert_same(outputs, expected_tokens(family))


@pytest.mark.parametrize("absorbed", [True, False])
def test_form_of_attention_changes_no_token(
    absorbed: bool,
    reference_model: Build,
    expected_tokens: Callable[[str], list[list[int] | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latent_torch, "prefers_absorbed", always(absorbed))
    llm = LLM(
        reference_model("v3-moe-yarn")[0], dtype="float32", num_blocks=60, block_size=8, max_num_batched_tokens=24
    )
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NUM_NEW), use_tqdm=False)
    assert_same(outputs, expected_tokens("v3-moe-yarn"))


def test_samples_that_share_a_prompt_have_the_logprobs_of_transformers(reference_model: Build) -> None:
    folder, model = reference_model("v3-moe-yarn")
    llm = LLM(folder, dtype="float32", num_blocks=60, block_size=8)
    prompt = list(range(13))
    with llm.record() as trace:
        samples = llm.generate(prompt, SamplingParams(n=4, seed=3, max_tokens=9, logprobs=0), use_tqdm=False)[0].outputs
    assert trace.of(BlockCopied)
    assert len({tuple(sample.token_ids) for sample in samples}) > 1
    for sample in samples:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        assert sample.logprobs is not None
        found = [entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)


def test_bf16_stays_near_fp32(reference_model: Build) -> None:
    folder, model = reference_model("v2-moe")
    prompt = list(range(0, 200, 3))
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0]
        theirs = copy.deepcopy(model).to(torch.bfloat16)(torch.tensor([prompt])).logits[0].float()
    ours = all_logits(LLM(folder, dtype="bfloat16", num_blocks=40), prompt).float()
    error, their_error = ((x - exact).norm() / exact.norm() for x in (ours, theirs))
    assert error < 1.5 * their_error


# --- Random shapes


def random_shape(random: Random) -> tuple[type, dict[str, Any]]:
    """A config of V2 or V3 that transformers takes: every size and switch drawn."""
    is_v3, heads = random.random() < 0.5, random.choice([1, 2, 3, 5])
    groups, group_size = random.choice([1, 2, 4]), random.choice([2, 3])
    kept = random.randint(1, groups)
    even = 1 if is_v3 else 2  # transformers' V2 views pairs as complex numbers: all strides must be even
    shape = MLA | {
        "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_size": heads * random.choice([8, 24]),
        "intermediate_size": random.choice([16, 50]), "num_hidden_layers": random.randint(1, 4), "vocab_size": 97,
        "kv_lora_rank": even * random.randint(4, 20), "q_lora_rank": random.choice([None, 9, 24]),
        "qk_nope_head_dim": even * random.randint(1, 9), "qk_rope_head_dim": 2 * random.randint(1, 8),
        "v_head_dim": random.randint(1, 20), "attention_bias": random.random() < 0.3,
        "tie_word_embeddings": random.random() < 0.3, "first_k_dense_replace": random.randint(0, 3),
        "n_routed_experts": groups * group_size, "n_group": groups, "topk_group": kept,
        "num_experts_per_tok": random.randint(1, kept * group_size), "moe_intermediate_size": random.randint(3, 20),
        "n_shared_experts": random.randint(0, 2), "routed_scaling_factor": random.choice([1.0, 2.5]),
    }  # fmt: skip
    if is_v3:
        return DeepseekV3Config, shape | {
            "norm_topk_prob": random.random() < 0.5, "rope_interleave": random.random() < 0.5
        }  # fmt: skip
    return DeepseekV2Config, shape | {"topk_method": random.choice(["greedy", "group_limited_greedy"])}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of no shared experts
@pytest.mark.parametrize("seed", range(24))
def test_models_of_any_shape_are_transformers(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    config_class, shape = random_shape(random)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config_class(**SHAPE | shape), dtype=torch.float32, experts_implementation="eager"
    ).eval()  # the default takes sizes that are multiples of 4 only
    model.save_pretrained(tmp_path)
    block_size = random.choice([1, 5, 16])
    llm = LLM(tmp_path, dtype="float32", block_size=block_size, num_blocks=1 + -(-70 // block_size), max_num_seqs=3)
    prompts = mixed_prompts(3, 40, vocab_size=97, seed=seed)
    for prompt in prompts:
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(all_logits(llm, prompt), expected, atol=2e-4, rtol=2e-4)
    llm = LLM(tmp_path, dtype="float32", block_size=block_size, num_blocks=1 + -(-70 // block_size), max_num_seqs=3)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens, gap = greedy(model, prompt, 6)
        assert gap < 1e-3 or output.outputs[0].token_ids == tokens


# --- Experts and checkpoints


def test_experts_of_a_token_do_not_depend_on_its_neighbours(reference_model: Build) -> None:
    llm = LLM(reference_model("v3-moe-yarn")[0], dtype="float32", num_blocks=3)
    experts = next(module for module in llm.runner.model.modules() if isinstance(module, MixtureOfExperts))
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together, alone = experts(x), torch.cat([experts(row[None]) for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_layer_frequency_leaves_plain_mlps_between() -> None:
    config = DeepseekV2Config(**SHAPE | MLA | {"first_k_dense_replace": 1, "num_hidden_layers": 6}).to_dict()
    ours = ModelConfig.from_json({**config, "architectures": ["DeepseekV2ForCausalLM"], "moe_layer_freq": 2})
    assert ours.moe is not None
    assert [ours.moe.has_experts(layer) for layer in range(6)] == [False, False, True, False, True, False]
    with torch.device("meta"):
        model = deepseek(ours)
    assert [isinstance(layer.mlp, MixtureOfExperts) for layer in model.layers] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert ours.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_layers_that_draft_tokens_are_left_out_and_others_are_refused(reference_model: Build, tmp_path: Path) -> None:
    folder, model = reference_model("v3-moe-yarn")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.3.{name}.weight": torch.zeros(2, 2) for name in ("eh_proj", "mlp.gate", "shared_head.head")}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    llm = LLM(tmp_path, dtype="float32", num_blocks=40)
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3]])).logits[0]
    torch.testing.assert_close(all_logits(llm, [1, 2, 3]), expected, atol=1e-4, rtol=1e-4)
    save_file(tensors | {"model.layers.4.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"a tensor 'model.layers.4.eh_proj.weight' that deepseek_v3 has no place for"):
        LLM(tmp_path, dtype="float32", num_blocks=40)


def test_correction_of_the_router_stays_fp32_in_bf16(reference_model: Build) -> None:
    llm = LLM(reference_model("v3-moe-yarn")[0], dtype="bfloat16", num_blocks=3)
    dtypes = {name.rsplit(".", 1)[1]: p.dtype for name, p in llm.runner.model.named_parameters() if ".gate." in name}
    assert dtypes == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}


def test_built_in_tiny_model_runs_with_random_weights() -> None:
    llm = LLM("tiny-mla", load_format="dummy", num_blocks=20)
    output = llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 5


# --- Bad input

V2 = {**builtin_configs()["deepseek-v2-lite"]}
V3 = {**builtin_configs()["tiny-mla"]}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (V2 | {"kv_lora_rank": None}, "kv_lora_rank must be an integer, not None"),
        (V2 | {"kv_lora_rank": 0}, "kv_lora_rank must be at least 1, not 0"),
        (V2 | {"q_lora_rank": 0}, "q_lora_rank must be at least 1, or null for none, not 0"),
        (V2 | {"q_lora_rank": "big"}, "q_lora_rank must be an integer, not 'big'"),
        (V2 | {"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
        (V2 | {"v_head_dim": -8}, "v_head_dim must be at least 1"),
        (V2 | {"num_key_value_heads": 4}, "a key for each of the 16 query heads; num_key_value_heads must say so too"),
        (
            V2 | {"use_sliding_window": True, "sliding_window": 64},
            "latent attention has no sliding window; set use_sliding_window to false",
        ),
        (
            V2 | {"topk_method": "random"},
            "topk_method 'random' is unknown; there are greedy, group_limited_greedy, noaux_tc",
        ),
        (V2 | {"topk_method": "noaux_tc"}, "is not what DeepseekV2ForCausalLM computes; it takes greedy or"),
        (V2 | {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not what DeepseekV2ForCausalLM"),
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob is for topk_method noaux_tc; set it to false"),
        (V2 | {"num_experts_per_tok": 65}, "num_experts_per_tok is 65, a token can reach 64 experts"),
        (V2 | {"num_experts_per_tok": None}, "num_experts_per_tok must be an integer"),
        (V2 | {"n_shared_experts": -1}, "n_shared_experts must be at least 0"),
        (V2 | {"moe_layer_freq": 0}, "moe_layer_freq must be at least 1"),
        (V2 | {"topk_method": "group_limited_greedy", "n_group": 7}, "64 experts do not divide into n_group=7"),
        (V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 9}, "topk_group must be from 1 to 8"),
        (V2 | {"topk_method": "group_limited_greedy", "n_group": None}, "n_group must be an integer"),
        (V3 | {"topk_method": "greedy"}, "is not what DeepseekV3ForCausalLM computes; it takes noaux_tc and sigmoid"),
        (V3 | {"n_group": 16, "topk_group": 8}, "noaux_tc scores a group by its best two experts; lower n_group"),
        (V3 | {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 3}, "a token can reach 2 experts"),
        (V3 | {"routed_scaling_factor": "x"}, "routed_scaling_factor must be a number"),
        (V3 | {"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be a finite number, not nan"),
        (V3 | {"eos_token_id": "x"}, "eos_token_id must be an integer, not 'x'"),
        (V3 | {"eos_token_id": [1, 2.5]}, "eos_token_id must be an integer, not 2.5"),
        (V3 | {"architectures": [["DeepseekV3ForCausalLM"]]}, "is not supported; supported: Llama"),
        (V3 | {"quantization_config": {"quant_method": "fp8"}}, "quantized checkpoints are not supported"),
    ],
)
def test_config_that_cannot_be_is_one_line(config: dict[str, object], line: str) -> None:
    with pytest.raises(ModelError, match=line) as error:
        ModelConfig.from_json(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_batch_invariance_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^batch_invariant is not written for latent attention .*: leave it out$"):
        LLM("tiny-mla", load_format="dummy", num_blocks=5, batch_invariant=True)
