"""Serving arithmetic with its working shown: bytes, capacity, rooflines, speculation, queues; plain Python only.

    >>> from minivllm.course.calculators import kv_bytes_per_token
    >>> print(kv_bytes_per_token("llama-3-8b"))
    KV bytes per token = 32 layers × 2 (K and V) × 8 KV heads × 128 × 2 bytes = 131,072 bytes/token (131 kB = 128 KiB)

Every calculator returns a Worked: a value, its unit, and the derivation. Numbers, results of other calculators and,
where it helps, lists of them go in; input that makes no sense is a ModelError or ConfigError of one line.
"""

from minivllm.course.calculators.accelerators import Accelerator, accelerator, accelerators
from minivllm.course.calculators.attention_shape import AttentionShape, Layer, attention_shape
from minivllm.course.calculators.batching import (  # fmt: skip
    captured_size,
    chunk_reread_tokens,
    chunk_steps,
    continuous_steps,
    cost_per_million_tokens,
    decode_limit,
    goodput,
    request_latency_ms,
    static_idle_share,
    static_steps,
    tile_padding,
    time_per_output_token_ms,
    token_forwards,
)  # fmt: skip
from minivllm.course.calculators.capacity import (  # fmt: skip
    blocks_in_pool,
    blocks_needed,
    contiguous_requests,
    empty_slots,
    external_fragmentation,
    max_concurrency,
    mean_live_tokens,
    memory_bar,
    next_power_of_two,
    pool_bytes,
    reservation_waste,
    reserved_slots,
    sequences_in_pool,
    shared_blocks_saved,
    sharing_saving,
    slot_of,
    slots_of_request,
    slots_to_bytes,
    tail_waste,
    tokens_in_pool,
)  # fmt: skip
from minivllm.course.calculators.disaggregation import (  # fmt: skip
    crossover_bytes_per_s,
    effective_bytes_per_s,
    gbit_to_bytes_per_s,
    link_bytes_per_s,
    prefill_workers_per_decode_worker,
    recompute_us_per_token,
    required_bandwidth,
    swap_us_per_token,
    tokens_freed_per_step,
    transfer_bytes,
    transfer_ms,
)  # fmt: skip
from minivllm.course.calculators.kv_bytes import (  # fmt: skip
    bits_of,
    expanded_mla_bytes_per_token,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    kv_bytes_per_token_per_gpu,
    mha_bytes_per_token,
    mla_in_gqa_groups,
    mqa_bytes_per_token,
    num_kv_heads_from_bytes,
    ratio,
    saving,
    state_bytes,
)  # fmt: skip
from minivllm.course.calculators.model_fields import PublicModel, public_config, public_models
from minivllm.course.calculators.parameters import (  # fmt: skip
    expected_experts,
    num_active_parameters,
    num_matrix_parameters,
    num_parameters,
    weight_bytes,
)  # fmt: skip
from minivllm.course.calculators.planning import capacity, decode_floor_ms
from minivllm.course.calculators.prefixes import (  # fmt: skip
    hit_rate_with_room_for_one,
    optimal_hit_rate,
    prefix_hit_rate,
    shared_blocks,
    trie_tokens,
)  # fmt: skip
from minivllm.course.calculators.quantization import (  # fmt: skip
    compression,
    effective_bits,
    largest,
    largest_of,
    relative_step,
    rounding_error,
    scale_of,
    smallest_normal,
    smallest_subnormal,
)  # fmt: skip
from minivllm.course.calculators.queueing import (  # fmt: skip
    inter_op_ttft_s,
    intra_op_ttft_s,
    littles_law,
    load,
    max_rate_within,
    md1_ttft_s,
    md1_wait_s,
    mm1_time_s,
    replicas_needed,
    ttft_crossover_rate,
)  # fmt: skip
from minivllm.course.calculators.roofline import (  # fmt: skip
    achieved_share,
    amdahl_speedup,
    attention_flops,
    attention_intensity,
    critical_batch,
    decode_attention_intensity,
    inference_flops_per_token,
    matmul_intensity,
    merge_softmax,
    ridge_point,
    ridge_point_of,
    splits_to_fill,
    tokens_where_kv_passes_weights,
    training_flops_per_token,
)  # fmt: skip
from minivllm.course.calculators.speculation import (  # fmt: skip
    acceptance,
    best_gamma,
    blocks_freed,
    break_even_batch,
    break_even_cost,
    expected_tokens,
    lenient_acceptance,
    operations_factor,
    output_distribution,
    residual,
    speedup,
    speedup_bound,
    speedup_without_bonus,
    tokens_per_round,
    tokens_per_round_from_shares,
    tree_tokens_per_round,
    verified_tokens,
)  # fmt: skip
from minivllm.course.calculators.step_time import (  # fmt: skip
    all_reduce_ms,
    break_even_length,
    compute_ms,
    decode_bytes,
    decode_step_ms,
    itl_slope_us,
    overlapped_step_ms,
    prefill_ms,
    read_ms,
    tokens_per_s,
)  # fmt: skip
from minivllm.course.calculators.units import decimal_and_binary
from minivllm.course.calculators.worked import Worked

__all__ = [
    "Accelerator", "AttentionShape", "Layer", "PublicModel", "Worked", "accelerator", "accelerators", "acceptance",
    "achieved_share", "all_reduce_ms", "amdahl_speedup", "attention_flops", "attention_intensity",
    "attention_shape", "best_gamma", "bits_of", "blocks_freed", "blocks_in_pool", "blocks_needed",
    "break_even_batch", "break_even_cost", "break_even_length", "capacity", "captured_size", "chunk_reread_tokens",
    "chunk_steps", "compression", "compute_ms", "contiguous_requests", "continuous_steps",
    "cost_per_million_tokens", "critical_batch", "crossover_bytes_per_s", "decimal_and_binary",
    "decode_attention_intensity", "decode_bytes", "decode_floor_ms", "decode_limit", "decode_step_ms",
    "effective_bits", "effective_bytes_per_s", "empty_slots", "expanded_mla_bytes_per_token", "expected_experts",
    "expected_tokens", "external_fragmentation", "gbit_to_bytes_per_s", "goodput", "hit_rate_with_room_for_one",
    "inference_flops_per_token", "inter_op_ttft_s", "intra_op_ttft_s", "itl_slope_us", "kv_bytes_of_sequence",
    "kv_bytes_per_token", "kv_bytes_per_token_per_gpu", "largest", "largest_of", "lenient_acceptance",
    "link_bytes_per_s", "littles_law", "load", "matmul_intensity", "max_concurrency", "max_rate_within",
    "md1_ttft_s", "md1_wait_s", "mean_live_tokens", "memory_bar", "merge_softmax", "mha_bytes_per_token",
    "mla_in_gqa_groups", "mm1_time_s", "mqa_bytes_per_token", "next_power_of_two", "num_active_parameters",
    "num_kv_heads_from_bytes", "num_matrix_parameters", "num_parameters", "operations_factor", "optimal_hit_rate",
    "output_distribution", "overlapped_step_ms", "pool_bytes", "prefill_ms", "prefill_workers_per_decode_worker",
    "prefix_hit_rate", "public_config", "public_models", "ratio", "read_ms", "recompute_us_per_token",
    "relative_step", "replicas_needed", "request_latency_ms", "required_bandwidth", "reservation_waste",
    "reserved_slots", "residual", "ridge_point", "ridge_point_of", "rounding_error", "saving", "scale_of",
    "sequences_in_pool", "shared_blocks", "shared_blocks_saved", "sharing_saving", "slot_of", "slots_of_request",
    "slots_to_bytes", "smallest_normal", "smallest_subnormal", "speedup", "speedup_bound", "speedup_without_bonus",
    "splits_to_fill", "state_bytes", "static_idle_share", "static_steps", "swap_us_per_token", "tail_waste",
    "tile_padding", "time_per_output_token_ms", "token_forwards", "tokens_freed_per_step", "tokens_in_pool",
    "tokens_per_round", "tokens_per_round_from_shares", "tokens_per_s", "tokens_where_kv_passes_weights",
    "training_flops_per_token", "transfer_bytes", "transfer_ms", "tree_tokens_per_round", "trie_tokens",
    "ttft_crossover_rate", "verified_tokens", "weight_bytes",
]  # fmt: skip
