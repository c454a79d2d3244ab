"""Calculators: what they return, how configs are read, and what they refuse."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from math import nan

import numpy as np
import pytest
import torch

from minivllm.course import calculators as c
from minivllm.course.calculators import Worked, kv_bytes_of_sequence, kv_bytes_per_token
from minivllm.errors import ConfigError, ModelError

GQA = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
PER_LAYER = 2 * 2 * 64 * 2  # bytes of a token in one layer of it


def without(*names: str) -> dict[str, object]:
    return {key: value for key, value in GQA.items() if key not in names}


# Results


def test_a_derivation_ends_with_its_value_in_decimal_and_binary_units() -> None:
    assert str(kv_bytes_per_token("llama-3-8b")) == (
        "KV bytes per token = 32 layers × 2 (K and V) × 8 KV heads × 128 × 2 bytes"
        " = 131,072 bytes/token (131 kB = 128 KiB)"
    )


def test_a_result_keeps_the_lines_of_what_it_was_made_from_each_once() -> None:
    kv = kv_bytes_per_token("llama-3-8b")
    tokens = c.tokens_in_pool(c.pool_bytes(80e9, c.weight_bytes("llama-3-8b")), kv)
    lines = c.sequences_in_pool(tokens, [4096, 8192]).derivation
    assert [line.split(" = ")[0] for line in lines] == [
        "parameters", "weight bytes", "KV pool", "KV bytes per token", "tokens", "sequences of 4,096",
        "sequences of 8,192",
    ]  # fmt: skip


def test_results_calculate_with_their_units() -> None:
    kv = kv_bytes_per_token("llama-3-8b")
    of_all = kv * c.tokens_in_pool(1e9, kv)
    assert (of_all.unit, of_all.value) == ("bytes", 7629 * 131_072)
    assert (of_all / kv).unit == "tokens"
    assert (1e6 / of_all).unit == "1/byte"
    assert (of_all - 1, of_all + of_all) == (int(of_all) - 1, 2 * int(of_all))


def test_bytes_and_tokens_cannot_be_added() -> None:
    kv = kv_bytes_per_token("llama-3-8b")
    with pytest.raises(ConfigError, match="a number of tokens cannot be added to one of bytes/token"):
        kv + c.tokens_in_pool(1e9, kv)


def test_a_list_gives_as_many_values() -> None:
    sizes = kv_bytes_of_sequence(GQA, [1, 10, 100])
    assert list(sizes) == [4 * PER_LAYER, 40 * PER_LAYER, 400 * PER_LAYER]
    assert len(c.decode_step_ms(1e9, 1e6, "h100", batch_size=range(1, 5))) == 4


def test_numbers_and_arrays_of_numpy_serve_as_well() -> None:
    assert list(kv_bytes_of_sequence(GQA, np.array([1, 10]))) == [4 * PER_LAYER, 40 * PER_LAYER]
    assert c.blocks_needed(np.int64(17)) == 2  # type: ignore[arg-type]


def test_a_result_reads_like_its_value() -> None:
    step = c.read_ms(16.06e9, "h100")
    assert (f"{step:.2f}", int(step), bool(step), step > 4, max(step, c.read_ms(1, "h100")) is step) == (
        "4.79", 4, True, True, True,
    )  # fmt: skip
    assert kv_bytes_of_sequence(GQA, [1, 10])[1] == 40 * PER_LAYER
    with pytest.raises(ConfigError, match="holds 2 values; take one of them"):
        float(kv_bytes_of_sequence(GQA, [1, 10]))


def test_holes_that_no_long_request_can_use() -> None:
    assert c.external_fragmentation([3, 1, 4]) == 50


def test_bytes_are_whole_and_both_units_stand_side_by_side() -> None:
    assert type(kv_bytes_per_token("llama-3-8b", 3).value) is int
    assert [c.decimal_and_binary(n) for n in (500, 819_200, 80e9)] == [
        "500 B = 500 B", "819 kB = 800 KiB", "80 GB = 74.5 GiB",
    ]  # fmt: skip


def test_jupyter_shows_the_result_and_its_lines() -> None:
    shown = c.ridge_point("h100")._repr_markdown_()
    assert shown == "**295.2 FLOP/byte**\n\n- ridge point = 989 TFLOP/s / 3.35 TB/s = 295.2 FLOP/byte"


def test_calculators_load_without_torch_or_numpy() -> None:
    probe = "import sys, minivllm.course.calculators; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# Reading configs


@pytest.mark.parametrize(
    "config",
    [
        {"n_layer": 4, "n_head": 8, "n_embd": 512, "num_kv_heads": 2},
        {"text_config": GQA, "vision_config": {"hidden_size": 64}},
        {"num_layers": 4, "num_attention_heads": 8, "kv_channels": 64, "multi_query_attention": True,
         "multi_query_group_num": 2},
        {"model_type": "falcon", "new_decoder_architecture": True, "n_layer": 4, "n_head": 8, "hidden_size": 512,
         "n_head_kv": 2},
        {"d_model": 512, "n_heads": 8, "n_layers": 4, "attn_config": {"kv_n_heads": 2}, "model_type": "mpt"},
        {**without("hidden_size"), "head_dim": 64},
    ],
    ids=["gpt names", "nested", "chatglm", "falcon", "mpt", "head_dim"],
)  # fmt: skip
def test_older_names_mean_the_same(config: Mapping[str, object]) -> None:
    assert kv_bytes_per_token(config) == kv_bytes_per_token(GQA) == 4 * PER_LAYER


def test_multi_query_flags_leave_one_head_and_missing_kv_heads_mean_all() -> None:
    old_falcon = {"model_type": "falcon", **without("num_key_value_heads"), "multi_query": True}
    assert c.attention_shape(old_falcon).kind == "MQA"
    assert c.attention_shape({**old_falcon, "multi_query": False}).kind == "MHA"
    assert c.attention_shape(without("num_key_value_heads")).kind == "MHA"


@pytest.mark.parametrize(
    "fields, kinds",
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "FWFW"),
        ({"sliding_window_pattern": 4, "model_type": "cohere2"}, "WWWF"),
        ({"sliding_window_pattern": "LLG", "model_type": "exaone4"}, "WWGW".replace("G", "F")),
        ({"model_type": "mistral"}, "WWWW"),
        ({"model_type": "mistral", "sliding_window": None}, "FFFF"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, "FFFW"),
        ({"model_type": "qwen2", "use_sliding_window": False}, "FFFF"),
        ({"model_type": "gemma2"}, "WFWF"),
        ({"model_type": "llama4_text", "attention_chunk_size": 64, "sliding_window": None}, "CCCF"),
        ({"model_type": "gemma3n", "num_kv_shared_layers": 2}, "WWSS"),
        ({"model_type": "gpt_neo", "attention_types": [[["global", "local"], 2]]}, "FWFW"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.get("model_type", "layer_types")),
)
def test_kinds_of_layers(fields: Mapping[str, object], kinds: str) -> None:
    layers = c.attention_shape({**GQA, "sliding_window": 64, **fields}).layers
    assert "".join(layer.kind[0].upper() for layer in layers) == kinds


def test_a_windowed_layer_holds_at_most_its_window() -> None:
    config = {**GQA, "sliding_window": 64, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
    assert list(kv_bytes_of_sequence(config, [50, 1000])) == [200 * PER_LAYER, (3 * 64 + 1000) * PER_LAYER]


def test_linear_layers_keep_a_state_that_does_not_grow() -> None:
    assert kv_bytes_per_token("qwen3-next-80b-a3b") == 12 * 2 * 2 * 256 * 2
    assert c.state_bytes("qwen3-next-80b-a3b") == 36 * (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128)) * 2


def test_kv_heads_are_dealt_out_and_then_copied_and_a_latent_is_on_every_gpu() -> None:
    shares = [c.kv_bytes_per_token_per_gpu("llama-3-70b", n).value for n in (1, 2, 8, 16)]
    assert shares == [327_680, 163_840, 40_960, 40_960]
    assert c.kv_bytes_per_token_per_gpu("deepseek-v3", 8) == 70_272


def test_capacity_of_a_model_on_a_chip() -> None:
    fit = c.capacity("llama-3-8b", "h100", [4096, 8192, 32_768], parameters=8.03e9)
    assert list(fit) == [104, 52, 13]
    assert c.capacity("llama-2-7b", "a100", 4096, parameters=6.74e9) == 27
    assert c.capacity("llama-3-8b", "h100", 4096, kv_dtype="fp8", parameters=8.03e9) == 208
    assert c.capacity("llama-3-8b", "h100", 4096, parameters=8.03e9).parts["tokens"] == 426_788


def test_a_second_gpu_adds_kv_heads_but_no_latents() -> None:
    one_gpu = 72 * 10**9 - 70_553_706_496
    assert c.capacity("llama-3-70b", "h100", 4096, tensor_parallel=2) == one_gpu // (163_840 * 4096)
    with pytest.raises(ConfigError, match="leave no room"):
        c.capacity("llama-3-70b", "h100", 4096)
    lite = [c.capacity("deepseek-v2-lite", "h100", 4096, tensor_parallel=n, parameters=0) for n in (1, 2)]
    assert lite[0] == lite[1]  # each GPU holds the whole latent: only its weights shrink


def test_windows_let_more_sequences_fit() -> None:
    windowed, full = (c.capacity(name, "h100", 32_768) for name in ("mistral-7b-v0.1", "mistral-7b-v0.3"))
    assert windowed // full >= 8


def test_decode_floor_of_a_model_on_a_chip() -> None:
    floor = c.decode_floor_ms("llama-3-8b", "h100", [0, 4096])
    assert floor[0] == pytest.approx(4.794, abs=1e-3)
    assert floor[1] - floor[0] == pytest.approx(1e3 * 536_870_912 / 3.35e12)


def test_every_accelerator_is_whole_and_named() -> None:
    chips = c.accelerators()
    assert len(chips) >= 20
    assert {"t4", "a10g", "l4", "l40s", "rtx-3090", "rtx-4090", "mi300x", "h100-pcie", "h100-nvl"} <= set(chips)
    assert all(len(chip.source) > 10 for chip in chips.values())
    assert all(10 < float(c.ridge_point(chip, next(iter(chip.flops)))) < 600 for chip in chips.values())


def test_heads_are_found_back_from_bytes() -> None:
    assert c.num_kv_heads_from_bytes(131_072, 32, 128) == 8
    with pytest.raises(ConfigError, match="KV heads; check layers, head size and dtype"):
        c.num_kv_heads_from_bytes(128_000, 32, 128)


def test_expanded_mla_caches_every_head() -> None:
    assert c.expanded_mla_bytes_per_token("deepseek-v3") == 61 * 128 * (192 + 128) * 2


# Formats and formulas against others' arithmetic


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"])
def test_limits_of_eight_bits_are_those_of_all_256_numbers_of_torch(name: str) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name)).double()
    numbers = numbers[numbers.isfinite() & (numbers > 0)].sort().values
    assert (c.largest(name), c.smallest_subnormal(name)) == (float(numbers[-1]), float(numbers[0]))
    assert c.relative_step(name) == float(numbers[numbers > 1][0] - 1)  # finfo.eps is wrong for e5m2fnuz


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_limits_of_wider_formats_are_those_of_torch(name: str) -> None:
    limits = torch.finfo(getattr(torch, name))
    assert (c.largest(name), c.smallest_normal(name)) == (limits.max, limits.smallest_normal)
    assert c.relative_step(name) == limits.eps


def test_merged_softmax_parts_are_the_softmax_of_all() -> None:
    scores, values = torch.tensor([1.0, 3.0, 2.0, -1.0]).double(), torch.tensor([5.0, -1.0, 2.0, 7.0]).double()
    parts = []
    for part in (slice(0, 2), slice(2, 4)):
        top = scores[part].max()
        weights = (scores[part] - top).exp()
        parts.append((float(top), float(weights.sum()), float((weights * values[part]).sum())))
    assert float(c.merge_softmax(*parts)) == pytest.approx(float((scores.softmax(0) * values).sum()))


def test_attention_flops_count_every_pair_once_and_windows_fewer() -> None:
    pairs = sum(past + 1 for past in range(10, 15))
    assert c.attention_flops(GQA, 5, 10) == 4 * 4 * 8 * 64 * pairs
    windowed = {**GQA, "model_type": "mistral", "sliding_window": 3}
    assert c.attention_flops(windowed, 5, 10) == 4 * 4 * 8 * 64 * 5 * 3


def test_a_matmul_approaches_its_batch_as_intensity() -> None:
    assert float(c.matmul_intensity(1, 4096, 4096)) == pytest.approx(1, rel=1e-3)
    assert float(c.matmul_intensity(8192, 8192, 8192)) == pytest.approx(8192 / 3)


def test_a_step_is_kv_read_plus_the_longer_of_weights_and_products() -> None:
    step = c.decode_step_ms(16e9, 1e9, "h100", batch_size=1000, num_parameters=8e9)
    times = [float(step.parts[name]) for name in ("kv_read", "weight_read", "matmul")]
    assert times == pytest.approx([1e6 / 3350, 16e3 / 3350, 16e3 / 989])
    assert float(step) == pytest.approx(times[0] + times[2])


def test_continuous_batches_never_take_longer_than_static_ones() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    assert c.continuous_steps(lengths, 3) <= c.static_steps(lengths, 3)
    assert c.continuous_steps(lengths, 100) == c.static_steps(lengths, 100) == 9


def test_distserves_equations() -> None:
    rate, prefill, speedup = 3.0, 0.25, 1.6
    busy = rate * prefill
    assert float(c.md1_ttft_s(rate, prefill)) == pytest.approx(prefill + rate * prefill**2 / (2 * (1 - busy)))
    assert float(c.inter_op_ttft_s(rate, prefill)) == pytest.approx(prefill + rate * prefill**2 / (4 * (2 - busy)))
    expected = prefill / speedup + rate * prefill**2 / (2 * speedup * (speedup - busy))
    assert float(c.intra_op_ttft_s(rate, prefill, speedup)) == pytest.approx(expected)
    crossing = c.ttft_crossover_rate(prefill, speedup)
    assert float(c.inter_op_ttft_s(crossing, prefill)) == pytest.approx(
        float(c.intra_op_ttft_s(crossing, prefill, speedup))
    )


def test_a_rate_found_from_a_limit_keeps_it() -> None:
    rate = c.max_rate_within(0.5, 0.2)
    assert float(c.md1_ttft_s(rate, 0.2)) == pytest.approx(0.5)
    waits = c.md1_wait_s(rate, 0.2), c.mm1_time_s(rate, 0.2).parts["wait"]
    assert float(waits[1]) == pytest.approx(2 * float(waits[0]))


def test_named_links_and_gigabits() -> None:
    assert c.gbit_to_bytes_per_s(400) == c.link_bytes_per_s("infiniband-ndr") == 50e9
    assert float(c.transfer_ms(1.25e9, "ethernet-100g")) == pytest.approx(100)


def test_small_blocks_leave_little_of_a_link() -> None:
    rates = list(c.effective_bytes_per_s([16_384, 2**21], 25e9, overhead_us=10))
    assert [round(rate / 25e9, 2) for rate in rates] == [0.06, 0.89]


def test_where_recomputing_and_swapping_cost_the_same() -> None:
    kv, again = kv_bytes_per_token("llama-3-8b"), c.recompute_us_per_token(8.03e9, "h100")
    assert float(c.swap_us_per_token(kv, c.crossover_bytes_per_s(kv, again), 2)) == pytest.approx(float(again))


def test_verification_is_free_up_to_the_critical_batch() -> None:
    limit = c.critical_batch("h100")
    assert c.break_even_batch(4, limit) == 59
    assert c.verified_tokens(59, 4, limit) < 1 < c.verified_tokens(60, 4, limit)


def test_acceptance_by_position_in_both_of_its_forms() -> None:
    assert float(c.tokens_per_round([0.8, 0.5])) == pytest.approx(1 + 0.8 + 0.4)
    assert float(c.tokens_per_round_from_shares([0.8, 0.4])) == pytest.approx(2.2)
    assert float(c.tree_tokens_per_round([[0.6, 0.2], [0.5]])) == pytest.approx(2.2)


# Refusals: one line that names the trouble


@pytest.mark.parametrize(
    "config, message",
    [
        ({**GQA, "num_attention_heads": 7}, "7 query heads do not divide over 2 KV heads"),
        (without("num_hidden_layers"), "num_hidden_layers is missing"),
        (without("hidden_size"), "hidden_size is missing"),
        ({**GQA, "num_hidden_layers": -4}, "num_hidden_layers must be an integer of at least 1, not -4"),
        ({**GQA, "num_key_value_heads": "2"}, "num_key_value_heads must be an integer of at least 1, not '2'"),
        ({**GQA, "num_key_value_heads": True}, "must be an integer of at least 1, not True"),
        ({**GQA, "hidden_size": 500}, "hidden_size 500 does not divide over 8 heads"),
        ({**GQA, "layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, num_hidden_layers 4"),
        ({**GQA, "layer_types": ["full_attention"] * 3 + ["magic"]}, "layer_types holds 'magic'"),
        ({**GQA, "layer_types": "full_attention"}, "layer_types must be a list"),
        ({**GQA, "kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
        ({**GQA, "sliding_window": 64}, "sliding_window is given but not which layers"),
        ({**GQA, "sliding_window": 0, "model_type": "mistral"}, "sliding_window must be an integer of at least 1"),
        ({**GQA, "attn_config": {"attn_type": "ring"}}, "attn_type 'ring' is unknown"),
        ({**GQA, "mamba_d_state": 128}, "mamba_d_state means Mamba layers"),
        ({**GQA, "is_encoder_decoder": True}, "only decoders keep a KV cache"),
        ("lama-3-8b", r"no public model is called 'lama-3-8b'; close: llama-3-8b"),
        (None, "a config must be a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_does_not_add_up_is_refused(config: Mapping[str, object] | str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        kv_bytes_per_token(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kv_bytes_per_token(GQA, "fp7"), "dtype 'fp7' is unknown; use one of"),
        (lambda: kv_bytes_of_sequence(GQA, -1), "num_tokens must be a whole number of at least 0, not -1"),
        (lambda: kv_bytes_of_sequence(GQA, []), "an empty list was given"),
        (lambda: c.ridge_point_of(1e12, 0), "bytes_per_s must be above 0, not 0"),
        (lambda: c.ridge_point_of(nan, 1), "flops_per_s must be a number above 0, not nan"),
        (lambda: c.ridge_point("h1000"), "no accelerator is called 'h1000'; close: "),
        (lambda: c.ridge_point("t4", "fp8"), "t4 has no figure for 'fp8'; it has fp16, int8"),
        (lambda: c.pool_bytes(80e9, 140e9), "leave no room on 1 card"),
        (lambda: c.pool_bytes(80e9, 1e9, 90), "utilisation must be from above 0 to 1, not 90; write 90% as 0.9"),
        (lambda: c.expected_tokens(1.2, 4), "alpha must be from 0 to 1, not 1.2"),
        (lambda: c.expected_tokens(0.8, 2.5), "gamma must be a whole number of at least 0, not 2.5"),
        (lambda: c.acceptance((0.5, 0.4), (1.0,)), "target must sum to 1, not 0.9"),
        (lambda: c.md1_wait_s(5, 0.2), "load 1 is 1 or more"),
        (lambda: c.chunk_steps(100, 32, 32), "32 decodes fill the budget of 32 tokens"),
        (lambda: c.slot_of(99, [7, 1, 3]), "position 99 lies beyond the 48 slots of 3 blocks"),
        (lambda: c.static_steps([], 4), "lengths must have at least 1 entry, not 0"),
        (lambda: c.kv_bytes_per_token_per_gpu("llama-3-8b", 3), "32 query heads do not divide over 3 GPUs"),
        (lambda: c.blocks_needed("17"), "num_tokens must be a whole number of at least 0, not '17'"),  # type: ignore[arg-type]
        (lambda: c.swap_us_per_token(1, "carrier-pigeon"), "link must be one of pcie3-x16"),
        (lambda: c.largest("float9"), "format_name must be one of"),
        (lambda: c.optimal_hit_rate([]), "prompts must have at least 1 entry, not 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_make_no_sense_are_refused(call: Callable[[], Worked], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)


VALID_CALLS: list[tuple[Callable[..., Worked], tuple[object, ...]]] = [
    (c.kv_bytes_of_sequence, ("llama-3-8b", 4096, "bf16")), (c.kv_bytes_per_token_per_gpu, ("llama-3-8b", 2, "bf16")),
    (c.weight_bytes, (8e9, "int4", 2)), (c.pool_bytes, (80e9, 16e9, 0.9, 0, 1)), (c.slot_of, (37, [7, 1, 3], 16)),
    (c.critical_batch, ("h100", "int8", "bf16")), (c.attention_intensity, (1, 4096, 4)), (c.read_ms, (1e9, "h100", 2)),
    (c.decode_step_ms, (16e9, 1e9, "h100")), (c.best_gamma, (0.75, 0.03)), (c.residual, ((0.6, 0.4), (0.8, 0.2))),
    (c.scale_of, ([1.0, 2.0], 8)), (c.prefix_hit_rate, (16, 256, 16, 16)), (c.optimal_hit_rate, ([[1, 2], [1, 3]],)),
    (c.continuous_steps, ([5, 3], 2)), (c.goodput, ([(200, 30)], 500, 50, 10)), (c.md1_ttft_s, (3, 0.2)),
    (c.ttft_crossover_rate, (0.2, 1.6)), (c.transfer_ms, (1e9, "nvlink4")), (c.capacity, ("llama-3-8b", "h100", 4096)),
]  # fmt: skip
GARBAGE: tuple[object, ...] = ("x", "", None, nan, float("inf"), -1, 0, True, [], {}, [None], [[]], 1.5, -1.5)


@pytest.mark.parametrize("function, arguments", VALID_CALLS, ids=lambda value: getattr(value, "__name__", ""))
def test_whatever_is_put_in_place_of_an_argument_gives_a_result_or_one_line(
    function: Callable[..., Worked], arguments: tuple[object, ...]
) -> None:
    for place in range(len(arguments)):
        for garbage in GARBAGE:
            try:
                assert str(function(*arguments[:place], garbage, *arguments[place + 1 :]))
            except (ConfigError, ModelError) as refusal:
                assert "\n" not in str(refusal)
