"""Published claims that are wrong, each recomputed beside the right figure, and further figures that come out right."""

import pytest

from minivllm.course import calculators as c
from minivllm.course.calculators import Worked, kv_bytes_per_token

GIB = 2**30


def digits(value: Worked | float, num_digits: int) -> float:
    return round(float(value), num_digits)


# Wrong in print


def test_half_a_megabyte_per_token_is_llama_2_7b_and_not_70b() -> None:
    assert kv_bytes_per_token("llama-2-70b") == 327_680
    assert kv_bytes_per_token("llama-2-7b") == 524_288


def test_query_heads_in_place_of_kv_heads_give_8_times_too_much_for_a_70b_and_4_times_for_an_8b() -> None:
    names = ("llama-2-70b", "llama-3-8b")
    assert [c.ratio(c.mha_bytes_per_token(n), kv_bytes_per_token(n)).value for n in names] == [8, 4]


def test_mla_keeps_more_than_mqa_and_less_than_gqa_8() -> None:
    mla, mqa = kv_bytes_per_token("deepseek-v3"), c.mqa_bytes_per_token("deepseek-v3")
    assert (mla.value, mqa.value, c.ratio(mla, mqa).value) == (70_272, 31_232, 2.25)
    assert digits(c.ratio(mqa * 8, mla), 2) == 3.56


def test_mla_is_56_9_times_and_not_10_times_below_mha_of_its_shape() -> None:
    assert digits(c.ratio(c.mha_bytes_per_token("deepseek-v3"), kv_bytes_per_token("deepseek-v3")), 1) == 56.9


def test_335_gb_for_70b_at_128k_is_mha_and_312_tflops_is_an_a100() -> None:
    assert digits(c.mha_bytes_per_token("llama-3-70b") * 128_000 / 1e9, 1) == 335.5
    assert digits(c.kv_bytes_of_sequence("llama-3-70b", 128_000) / 1e9, 1) == 41.9
    assert (c.accelerator("a100").flops_of(), c.accelerator("h100").flops_of()) == (312e12, 989e12)


def test_a_speedup_of_1_687_forgets_the_bonus_token() -> None:
    assert digits(c.speedup_without_bonus(0.8, 4, 0.1), 3) == 1.687
    assert digits(c.speedup(0.8, 4, 0.1), 3) == 2.401


def test_smaller_types_on_fewer_chips_serve_the_same_43_sequences() -> None:
    served = []
    for dtype, num_chips in (("bf16", 16), ("int8", 8), ("int4", 4)):
        pool = c.pool_bytes(16e9, c.weight_bytes(70e9, dtype), utilisation=1, num_gpus=num_chips)
        tokens = c.tokens_in_pool(pool, kv_bytes_per_token("llama-3-70b", dtype))
        served.append(int(c.sequences_in_pool(tokens, 8192)))
    assert served == [43, 43, 43]  # printed: 43, 52, 67
    assert c.weight_bytes(70e9, "int4") == 35e9  # printed: 45 GB


def test_llama_405b_keeps_7_34_and_not_7_28_times_what_deepseek_v3_keeps() -> None:
    assert digits(c.ratio(kv_bytes_per_token("llama-3.1-405b"), kv_bytes_per_token("deepseek-v3")), 2) == 7.34


def test_e4m3_ends_at_448_on_nvidia_and_at_240_in_the_variant_without_negative_zero() -> None:
    assert [c.largest(name).value for name in ("float8_e4m3fn", "float8_e4m3fnuz")] == [448, 240]


def test_a_llama_13b_keeps_819_200_bytes_and_not_1_5_mb_per_token() -> None:
    assert kv_bytes_per_token("llama-13b") == 819_200
    assert c.decimal_and_binary(int(c.kv_bytes_of_sequence("llama-13b", 2048))) == "1.68 GB = 1.56 GiB"


def test_a_hundred_mla_layers_at_128k_keep_15_1_gb_and_not_55() -> None:
    layers = {"num_hidden_layers": 100, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
              "qk_nope_head_dim": 128, "v_head_dim": 128}  # fmt: skip
    assert digits(c.kv_bytes_of_sequence(layers, 131_072) / 1e9, 1) == 15.1


def test_contiguous_allocation_wastes_61_8_to_79_6_percent_and_not_up_to_30() -> None:
    worst, best = c.memory_bar(20.4, 13.3, 57.3, 8.9), c.memory_bar(38.2, 25.2, 0, 36.6)
    assert (digits(best, 1), digits(worst, 1)) == (61.8, 79.6)


def test_llama_3_1_has_no_sliding_window() -> None:
    assert all(layer.window is None for layer in c.attention_shape("llama-3.1-8b").layers)


def test_lenience_at_temperature_1_reaches_at_best_4_79_and_not_5() -> None:
    alphas = (0.62, 0.71, 0.76, 0.84)  # printed beside 2.5, 3.1, 3.6 and 5
    best = [digits(c.best_gamma(alpha, 0.015).parts["speedup"], 2) for alpha in alphas]
    assert best == [2.33, 2.94, 3.45, 4.79]


def test_prefixes_are_shared_and_the_middle_of_a_text_is_not() -> None:
    assert c.optimal_hit_rate([[9, 1, 2, 3, 4], [8, 1, 2, 3, 4]]) == 0


def test_printed_units_are_binary_where_they_say_kb_and_gb() -> None:
    assert kv_bytes_per_token("opt-13b") == 800 * 1024  # "800 KB"
    assert digits(c.transfer_bytes(kv_bytes_per_token("opt-66b"), 512) / GIB, 3) == 1.125  # "1.13 GB"


# Right in print, beyond the table


def test_orca_max_fits_7_requests_of_2048_and_leaves_8_9_percent() -> None:
    slots = c.tokens_in_pool(12 * GIB, kv_bytes_per_token("opt-13b"))
    fit = c.contiguous_requests(slots, 2048)
    assert (slots.value, fit.value, digits(fit.parts["left_over"], 1)) == (15_728, 7, 8.9)


@pytest.mark.parametrize("name, gib, thousands", [("opt-13b", 12, 15.7), ("opt-175b", 264, 60.1)])
def test_slots_of_kwon_table_1(name: str, gib: int, thousands: float) -> None:
    assert digits(c.tokens_in_pool(gib * GIB, kv_bytes_per_token(name)) / 1000, 1) == thousands


def test_weights_of_opt_13b_take_26_gb_and_65_percent_of_a_40_gb_card() -> None:
    weights = c.weight_bytes("opt-13b")
    assert digits(weights / 1e9, 0) == 26
    assert digits(c.ratio(26e9, 40e9) * 100, 0) == 65


def test_a_0_6b_can_keep_twice_what_a_7b_keeps() -> None:
    assert c.ratio(kv_bytes_per_token("qwen3-0.6b"), kv_bytes_per_token("qwen2.5-7b")) == 2


def test_the_three_savings_of_deepseek_v2() -> None:
    ours, dense = kv_bytes_per_token("deepseek-v2"), kv_bytes_per_token("deepseek-llm-67b")
    assert (ours.value, dense.value) == (69_120, 389_120)
    assert digits(c.saving(ours, dense), 1) == 82.2
    assert digits(c.saving(kv_bytes_per_token("deepseek-v2", 6), dense), 1) == 93.3
    assert digits(c.saving(ours, c.mha_bytes_per_token("deepseek-v2")), 1) == 98.2


def test_deepseek_v2_lite_keeps_31_104_bytes() -> None:
    assert kv_bytes_per_token("deepseek-v2-lite") == 31_104


def test_absorbed_mla_decodes_at_242_flops_per_byte() -> None:
    assert digits(c.decode_attention_intensity("deepseek-v3"), 0) == 242
    assert c.decode_attention_intensity("llama-2-70b") == 8


def test_active_parameters_of_sparse_models() -> None:
    billions = [digits(c.num_active_parameters(n) / 1e9, 0) for n in ("deepseek-v3", "qwen3-235b-a22b", "mixtral-8x7b")]
    assert billions == [38, 22, 13]  # 37 in DeepSeek-V3's paper, which leaves the input embedding out


def test_opt_66b_needs_90_gbps_for_ten_prompts_of_512_a_second() -> None:
    needed = c.required_bandwidth(kv_bytes_per_token("opt-66b"), 512, 10)
    assert (digits(needed.parts["gibit_per_s"], 1), digits(needed.parts["gbit_per_s"], 1)) == (90.0, 96.6)


def test_tau_of_a_chain_is_the_geometric_sum_where_acceptance_does_not_fall() -> None:
    assert digits(c.tokens_per_round([0.75] * 4), 9) == digits(c.expected_tokens(0.75, 4), 9)


def test_experts_that_a_batch_of_deepseek_v2_lite_reads() -> None:
    assert [digits(c.expected_experts(64, 6, batch), 0) for batch in (1, 8, 32, 128)] == [6, 35, 61, 64]


def test_floor_table_of_the_kernels_note() -> None:
    ours = c.Accelerator("H200, measured", 141 * 10**9, 4.3e12, {"bf16": 790e12})
    kv = c.kv_bytes_of_sequence("llama-3-8b", 2048)
    steps = [c.overlapped_step_ms(c.decode_bytes(15.01e9, kv, b), c.inference_flops_per_token(7.5e9) * b, ours)
             for b in (1, 32, 128)]  # fmt: skip
    assert [digits(ms, 2) for ms in steps] == [3.55, 5.49, 11.48]
    assert digits(c.critical_batch(ours), 0) == 184


def test_h200_and_h100_differ_in_memory_only() -> None:
    new, old = c.accelerator("h200"), c.accelerator("h100")
    assert (digits(new.bandwidth / old.bandwidth, 2), digits(new.memory_bytes / old.memory_bytes, 2)) == (1.43, 1.76)
    assert new.flops == old.flops
