"""The least time a step can take on a machine, from the calculators: bytes it must move, FLOPs it must do.

    bytes   the weights once (of a table of embeddings only where it is the head too), of experts those that the step's
            tokens are expected to touch; K and V of all that its requests see, what several share once; K and V of
            the new tokens, written; logits, written by the head and read by the sampler
    FLOPs   2 x weights per token, the head only where logits are wanted, attention by pairs of a query and a key
    floor   the longer of the two, as if each hid the other completely
The rates are those that the machine reaches in this process (`measured_roofs`), not its data sheet's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from minivllm.config import DTYPE_BYTES
from minivllm.course.calculators import Accelerator, num_parameters
from minivllm.course.calculators.model_fields import Config, Fields
from minivllm.course.step_work import counted_model
from minivllm.provenance import provenance

NUM_TRIES = 8


@dataclass(frozen=True)
class StepFloor:
    """What one step must move and do, and how long that takes at the machine's rates."""

    weight_bytes: int
    kv_bytes: int  # read
    flops: int
    read_ms: float  # for all that moves
    compute_ms: float
    stored_bytes: int = 0  # of K and V, written
    logit_bytes: int = 0  # written and read

    @property
    def ms(self) -> float:
        return max(self.read_ms, self.compute_ms)


class ModelWork:
    """What a model's steps cost; read from its config.json by the calculators alone."""

    def __init__(self, config: Config, dtype: str) -> None:
        self.model = counted_model(config)
        self.dtype = dtype
        parts = num_parameters(config).parts
        self.head = int(parts["head"]) or int(parts["embeddings"])  # tied: the table is read as a matrix
        self.tables = int(parts["embeddings"]) + int(parts["head"])
        self.row_bytes = DTYPE_BYTES[dtype] * Fields(config).whole("vocab_size")  # of one token's logits

    def floor(
        self, scheduled: Sequence[tuple[int, int]], num_logits: int, machine: Accelerator, shared_bytes: int = 0
    ) -> StepFloor:
        """Of a step that computes, for each of its requests, `num_new` tokens and has `num_stored` after it.

        `shared_bytes` of K and V are some request's in blocks that another one reads for it.
        """
        new, stored = zip(*scheduled, strict=True) if scheduled else ((), ())
        return self.floor_of(new, stored, num_logits, machine, shared_bytes)

    def floor_of(
        self, new: Sequence[int], stored: Sequence[int], num_logits: int, machine: Accelerator, shared_bytes: int = 0
    ) -> StepFloor:
        """The same, the new tokens of all requests apart from those that they have stored."""
        num_tokens = sum(new)
        if not num_tokens:
            return StepFloor(0, 0, 0, 0.0, 0.0)
        num_weights = self.model.weights_used(num_tokens) - self.tables + self.head * (num_logits > 0)
        attention = self.model.attention(new, stored, self.dtype)
        moved = {
            "weight_bytes": num_weights * DTYPE_BYTES[self.dtype],
            "kv_bytes": max(attention.num_bytes - shared_bytes, 0),
            "stored_bytes": self.model.stored_bytes(num_tokens, self.dtype),
            "logit_bytes": 2 * num_logits * self.row_bytes,
        }
        flops = 2 * ((self.model.num_active - self.tables) * num_tokens + self.head * num_logits) + attention.flops
        read_s, compute_s = sum(moved.values()) / machine.bandwidth, flops / machine.flops_of(self.dtype)
        return StepFloor(flops=flops, read_ms=1e3 * read_s, compute_ms=1e3 * compute_s, **moved)

    def ideal_seconds(
        self, num_in: Sequence[int], num_out: Sequence[int], machine: Accelerator, num_shared: int = 0
    ) -> float:
        """The floors of all steps of an engine with room for everything: all prompts at once, then a token each.

        The first `num_shared` tokens, which all prompts share, are computed once, and each step reads them once.
        """
        shared = self.model.attention_of([(1, num_shared)], self.dtype).num_bytes if num_shared else 0
        first, *others = num_in
        prompts = [(first, first), *((max(num - num_shared, 1), num) for num in others)]
        total_ms = self.floor(prompts, len(prompts), machine, shared * len(others)).ms
        for step in range(1, max(num_out)):
            alive = [(1, prompt + step) for prompt, num in zip(num_in, num_out, strict=True) if num > step]
            total_ms += self.floor(alive, len(alive), machine, shared * (len(alive) - 1)).ms
        return total_ms / 1e3


def measured_roofs(device: str, dtype: str) -> Accelerator:
    """The best of some reads of one big tensor, and of some products of square matrices, in this process."""
    num_bytes = 4 << 30 if device == "cuda" else 1 << 28
    sides = (8192,) if device == "cuda" else (256, 512, 1024)  # a CPU's caches hold the small ones
    if device == "cuda":  # an engine may have left little
        num_bytes = min(num_bytes, torch.cuda.mem_get_info()[0] // 4) // 4 * 4
    numbers = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(numbers)
    read_s = _best_seconds(lambda: numbers.sum(), device)
    copy_s = _best_seconds(lambda: target.copy_(numbers), device)
    flops = max(_product_flops(side, device, getattr(torch, dtype)) for side in sides)
    facts = provenance(0)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{facts['machine']}, {facts['threads']} threads"
    bandwidth = max(num_bytes / read_s, 2 * num_bytes / copy_s)
    short_name = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)
    return Accelerator(str(name), num_bytes, bandwidth, {short_name: flops}, "measured in this process")


def _product_flops(side: int, device: str, dtype: torch.dtype) -> float:
    square = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _best_seconds(lambda: square @ square, device)


def _best_seconds(run: Callable[[], object], device: str) -> float:
    def once() -> float:
        started_s = perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started_s

    once()
    return min(once() for _ in range(NUM_TRIES))
