"""Whole answers from a model and a chip: how many sequences fit, and how long their step takes at least."""

from minivllm.course.calculators.accelerators import accelerator
from minivllm.course.calculators.capacity import pool_bytes
from minivllm.course.calculators.checks import whole
from minivllm.course.calculators.kv_bytes import (
    Dtype,
    kv_bytes_of_sequence,
    kv_bytes_per_token,
    kv_bytes_per_token_per_gpu,
    state_bytes,
)
from minivllm.course.calculators.model_fields import Config
from minivllm.course.calculators.parameters import num_active_parameters, num_parameters, weight_bytes
from minivllm.course.calculators.roofline import Chip
from minivllm.course.calculators.step_time import decode_step_ms
from minivllm.course.calculators.worked import Amount, Amounts, Worked, for_each, work
from minivllm.errors import ModelError


def capacity(
    config: Config, chip: Chip, sequence_length: Amounts, *, tensor_parallel: Amount = 1, utilisation: Amount = 0.9,
    workspace_bytes: Amount = 0, weight_dtype: Dtype = "bf16", kv_dtype: Dtype = "bf16",
    parameters: Amount | None = None,
) -> Worked:  # fmt: skip
    """Sequences of a length that one server holds, windows and linear layers' states respected.

    Parts: `weights`, `pool`, `tokens` of one GPU.

    `parameters` overrides what the config says, for exercises that round: capacity("llama-3-8b", "h100", 4096) == 104.
    """
    weights = weight_bytes(config if parameters is None else parameters, weight_dtype, tensor_parallel)
    pool = pool_bytes(accelerator(chip).memory_bytes, weights, utilisation, workspace_bytes)
    per_token = kv_bytes_per_token_per_gpu(config, tensor_parallel, kv_dtype)
    if not int(per_token):
        raise ModelError("no layer keeps K or V: any length takes the same; divide pool_bytes by state_bytes")
    ways = int(kv_bytes_per_token(config, kv_dtype)) // int(per_token)
    state = state_bytes(config, kv_dtype)
    tokens = work("tokens", f"⌊{int(pool):,} / {int(per_token):,}⌋", int(pool) // int(per_token), "tokens", per_token)

    def of_length(length: Amount) -> Worked:
        size = whole("sequence_length", length)
        held = kv_bytes_of_sequence(config, size, kv_dtype)
        each = held + state if int(state) else held
        share = f"({int(each):,} / {ways})" if ways > 1 else f"{int(each):,}"
        fit = int(pool) // max(int(each) // ways, 1)
        return work(f"sequences of {size:,}", f"⌊{int(pool):,} / {share}⌋", fit, "sequences", pool, each,
                    weights=weights, pool=pool, tokens=tokens)  # fmt: skip

    return for_each(sequence_length, of_length)


def decode_floor_ms(
    config: Config, chip: Chip, context: Amounts, *, batch_size: Amount = 1, num_chips: Amount = 1,
    weight_dtype: Dtype = "bf16", kv_dtype: Dtype = "bf16", compute_dtype: str = "bf16",
) -> Worked:  # fmt: skip
    """Floor of a decode step of a model at a context; weights and KV are spread over the chips without copies.

    A sparse model reads all its weights, as it does from a moderate batch on (expected_experts says from where).
    """
    batch = whole("batch_size", batch_size)
    weights, active = weight_bytes(num_parameters(config), weight_dtype), num_active_parameters(config)

    def at_context(length: Amount) -> Worked:
        held = kv_bytes_of_sequence(config, whole("context", length, 0), kv_dtype)
        return decode_step_ms(weights, held, chip, batch_size=batch, num_parameters=active, num_chips=num_chips,
                              compute_dtype=compute_dtype)  # fmt: skip

    return for_each(context, at_context)
