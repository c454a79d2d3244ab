"""What reviewers tried on the calculators: odd configs and inputs, wrong units, and derivations read as learners do."""

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from math import inf, nan

import numpy as np
import pytest
import torch

from minivllm.course import calculators as c
from minivllm.course.calculators import Accelerator, Worked, kv_bytes_per_token, public_models
from minivllm.errors import MiniVLLMError, ModelError

GQA = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "linear_conv_kernel_dim": 4}  # fmt: skip


# Configs as they are published


@pytest.mark.parametrize(
    "fields, per_token",
    [
        pytest.param({"model_type": "bloom", "n_embed": 14_336, "n_layer": 70, "num_attention_heads": 112},
                     2 * 70 * 14_336 * 2, id="bloom writes n_embed"),
        pytest.param({"text_config": {**GQA, "head_dim": 256, "num_key_value_heads": None, "num_attention_groups": 1}},
                     4 * 2 * 256 * 2, id="step3 writes num_attention_groups"),
        pytest.param({"thinker_config": {"text_config": GQA}}, 4 * 2 * 2 * 64 * 2, id="omni nests twice"),
        pytest.param({**GQA, "head_dim": 192, "v_head_dim": 128}, 4 * 2 * (192 + 128) * 2, id="narrow values"),
        pytest.param({**GQA, "attn_type_list": [1] * 4}, 4 * 2 * 2 * 64 * 2, id="minimax-m2 is softmax throughout"),
        pytest.param({**GQA, "use_cla": False}, 4 * 2 * 2 * 64 * 2, id="a feature that is off"),
    ],
)  # fmt: skip
def test_fields_under_the_names_their_makers_gave_them(fields: Mapping[str, object], per_token: int) -> None:
    assert kv_bytes_per_token(fields) == per_token


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block_configs": [{}]}, "block_configs means layers of different shapes"),
        ({"num_key_value_heads_per_layer": [4] * 4}, "num_key_value_heads_per_layer means layers of different"),
        ({"use_cla": True}, "use_cla means layers that share K and V"),
        ({"attn_type_list": [0, 0, 0, 1]}, "attn_type_list names linear layers"),
        ({"attention_types": [["global", "x"]]}, "attention_types must be like"),
        ({"attention_types": [[["global"], 10**9]]}, "attention_types names more than 10000 layers"),
        ({"hidden_size": 512 * 10**400}, "hidden_size must be an integer of at most 10.12"),
    ],
)
def test_configs_that_would_be_counted_wrong_are_refused(fields: Mapping[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        kv_bytes_per_token({**GQA, **fields})


def test_one_layer_in_four_of_ministral_sees_everything() -> None:
    shape = c.attention_shape("ministral-8b")
    assert [layer.window for layer in shape.layers[:5]] == [None, 32_768, 32_768, 32_768, None]
    assert c.kv_bytes_of_sequence("ministral-8b", 131_072) == 4096 * (9 * 131_072 + 27 * 32_768)


def test_no_config_of_qwen2_5_names_a_window_that_its_source_does_not() -> None:
    qwens = [model.config for name, model in public_models().items() if name.startswith("qwen2.5")]
    assert len(qwens) == 7 and not any("sliding_window" in config for config in qwens)


def test_a_model_with_no_experts_written_as_zero_is_dense() -> None:
    config = {**GQA, "vocab_size": 96, "intermediate_size": 64, "num_experts": 0}
    assert c.num_active_parameters(config) == c.num_parameters(config)


def test_states_of_linear_layers_take_room_too() -> None:
    config = {**GQA, **LINEAR, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    each = c.kv_bytes_of_sequence(config, 4096) + c.state_bytes(config)
    assert c.capacity(config, "h100", 4096, parameters=8e9) == 56 * 10**9 // int(each)
    with pytest.raises(ModelError, match="no layer keeps K or V"):
        c.capacity({**config, "layer_types": ["linear_attention"] * 4}, "h100", 4096, parameters=8e9)


# Inputs


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: c.kv_bytes_of_sequence(GQA, 10**400), "num_tokens must be at most 1e.30; check its unit"),
        (lambda: c.kv_bytes_of_sequence(GQA, {1: 2}), "a number is needed, or a list of them in order"),
        (lambda: c.blocks_needed(np.array(17)), "a number is needed, or a list of them in order"),
        (lambda: c.tokens_in_pool(1e9, 1e-300), "bytes_per_token must be at least 1e-30"),
        (lambda: c.expected_tokens(1, 10**400), "gamma must be at most"),
        (lambda: kv_bytes_per_token(GQA, 1e308), "must be a number above 0, not 1e.308"),
        (lambda: c.largest_of(12, 2, "ieee"), "exponent_bits must be at most 10, not 12"),
        (lambda: c.merge_softmax((1, 2)), "must be three numbers, .max, sum, output."),  # type: ignore[arg-type]
        (lambda: c.merge_softmax([(1, 2, 3), (2, 1, 4)]), "must be three numbers"),  # type: ignore[arg-type]
        (lambda: c.merge_softmax(("a", 1, 1)), "a number is needed, not 'a'"),  # type: ignore[arg-type]
        (lambda: c.hit_rate_with_room_for_one([]), "prompts must have at least 1 entry"),
        (lambda: c.memory_bar(100.5, 0, 0, 0), "the four shares must sum to 100%"),
        (lambda: c.saving(100, 50), "nothing is saved; are they swapped"),
        (lambda: c.best_gamma(0.9999999, 1e-15), "drafts are too few; give a higher cost"),
        (lambda: c.decode_step_ms(0, 0, "h100"), "give weight_bytes above 0"),
        (lambda: Accelerator("x", 80, 3e12, [1]), "flops is empty; give FLOP/s by type"),  # type: ignore[arg-type]
        (lambda: c.decimal_and_binary("x"), "num_bytes must be a number of bytes, not 'x'"),  # type: ignore[arg-type]
        (lambda: c.decimal_and_binary(nan), "num_bytes must be a number of bytes, not nan"),
        (lambda: c.pool_bytes(80, 16), "card_bytes is 80: give bytes, such as 80e9"),
        (lambda: c.pool_bytes(80e9, c.num_parameters("gpt2")), "weight_bytes is asked for in bytes, not in parameters"),
        (lambda: c.tokens_in_pool(c.blocks_needed(17), 1024), "pool is asked for in bytes, not in blocks"),
        (lambda: c.sequences_in_pool(c.pool_bytes(80e9, 1e9), 4096), "num_tokens is a number of tokens, not of bytes"),
        (lambda: kv_bytes_per_token(GQA) * inf, "is no finite number"),
        (lambda: c.kv_bytes_of_sequence(GQA, [1, 2])[5], "holds 2 values, counted from 0; there is no number 5"),
        (lambda: range(c.read_ms(1e9, "h100")), "is no whole number; round it first"),
        (lambda: c.slots_of_request(100, 20, 50, 100), "do not fit the 100 slots reserved"),
        (lambda: c.request_latency_ms(0, [200, 100]), "token_times_ms must not fall"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_refusal_is_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(MiniVLLMError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_types_of_torch_and_numpy_serve_as_they_are() -> None:
    names = (torch.bfloat16, "BF16", "half", "float8_e4m3fn", "fp4")
    assert [c.bits_of(name) for name in names] == [16, 16, 16, 8, 4]  # type: ignore[arg-type]
    assert c.ridge_point("h100", "torch.bfloat16") == c.ridge_point("h100")
    assert (c.weight_bytes(np.int64(5)), c.bits_of(np.int64(8))) == (10, 8)  # type: ignore[arg-type]
    assert c.acceptance(np.array([0.5, 0.5]), np.array([0.25, 0.75])) == 0.75  # type: ignore[arg-type]
    assert c.hit_rate_with_room_for_one(p for p in ([1, 2], [1, 3])) == 25  # type: ignore[arg-type]


def test_a_best_gamma_beyond_a_hundred_is_found() -> None:
    best = c.best_gamma(0.999, 1e-4)
    gains = [float(c.speedup(0.999, int(best) + step, 1e-4)) for step in (-1, 0, 1)]
    assert best > 100 and gains[1] == max(gains)


# Results as Python values


def test_a_result_counts_indexes_rounds_and_sums() -> None:
    blocks = c.blocks_needed(33)
    assert (len(range(blocks)), [7, 1, 3, 9][blocks], 7 // blocks, blocks % 2) == (3, 9, 2, 1)
    assert (round(blocks), type(round(blocks)), round(c.read_ms(16.06e9, "h100"), 2)) == (3, int, 4.79)
    assert sum([blocks, blocks]).derivation[-1] == "3 blocks + 3 blocks = 6 blocks"  # type: ignore[union-attr]
    assert not any("+ 0" in line for line in sum([blocks, blocks]).derivation)  # type: ignore[union-attr]


def test_results_and_chips_can_be_kept() -> None:
    best = c.best_gamma(0.75, 0.03)
    assert pickle.loads(pickle.dumps(best)) == copy.deepcopy(best) == 8
    assert pickle.loads(pickle.dumps(best)).parts["speedup"].derivation == best.parts["speedup"].derivation
    assert json.dumps({"gamma": int(best)}) == '{"gamma": 8}'
    assert len({c.accelerator("h100"), c.accelerator("h200"), c.accelerator("h100-sxm")}) == 2


# Derivations


def test_halves_round_up_as_in_print() -> None:
    assert c.decimal_and_binary(1e30).endswith("PiB")
    assert c.decimal_and_binary(1_207_959_552) == "1.21 GB = 1.13 GiB"  # 1.125: DistServe prints 1.13


def last_line(result: Worked) -> str:
    return result.derivation[-1]


def test_a_step_shows_nothing_that_was_not_asked_for() -> None:
    step = c.decode_step_ms(140e9, 1e9, "h100", num_chips=2)
    assert "products" not in str(step) and step.parts["matmul"] == 0
    assert last_line(step) == "step of batch 1 = KV 0.1493 + weights 20.9 = 21.04 ms"
    assert last_line(c.state_bytes(GQA)) == "constant state of a sequence = no linear layers = 0 bytes"
    assert last_line(c.tokens_per_round_from_shares([])) == "tokens per round = 1 = 1 token"


def test_units_are_those_a_learner_would_choose() -> None:
    assert last_line(c.prefill_ms(70e9, 8192, "v5e", 16, 0.4)).startswith("time to compute = 1.147 PFLOP / (16 ×")
    assert last_line(c.all_reduce_ms(1, 8192, 8, 450e9)).endswith("= 0.06372 µs")
    assert "× 1 byte / 2 FLOPs" in last_line(c.critical_batch("v5e", "int8"))
    assert last_line(c.goodput([(200, 30)], 500, 50, 10)).startswith("goodput = 1 request within")
    assert last_line(c.rounding_error(0.3, 0.1)).endswith("= 0")


def test_kinds_of_layers_are_named_in_their_sum() -> None:
    lines = kv_bytes_per_token("gemma-3-1b").derivation
    assert lines[0].startswith("full layers, per token = 4 layers × 2 (K and V) × 1 KV head × 256")
    assert lines[1].startswith("windowed layers, per token = 22 layers of window 512")


def test_a_whole_vocabulary_fills_no_line() -> None:
    flat = [1 / 50_000] * 50_000
    lines = [last_line(make(flat, flat)) for make in (c.acceptance, c.output_distribution)]
    assert all("[50,000 in all]" in line and len(line) < 400 for line in lines)


# Questions of the bank that had no function


def test_slots_of_a_request_are_live_reserved_or_never_used() -> None:
    live = c.slots_of_request(100, 20, 50, 2048)
    assert (live.value, live.parts["reserved"].value, live.parts["internal"].value) == (120, 30, 1898)


def test_splits_that_fill_a_chip() -> None:
    splits = c.splits_to_fill([1, 64], 8, 132)
    assert list(splits) == [17, 1]
    assert c.splits_to_fill(1, 8, 132).parts["programs"] == 136


def test_latencies_of_one_request_of_a_trace() -> None:
    times = c.request_latency_ms(0, [200, 240, 330])
    assert (times.value, [int(times.parts[name]) for name in ("e2e", "tpot", "longest_gap")]) == (200, [330, 65, 90])
    assert times.parts["tpot"] == c.time_per_output_token_ms(330, 200, 3)
