"""What went through a running engine's model, step by step: FLOPs by torch's own counter, bytes by the tensors' sizes.

    with counted_steps(llm) as steps:
        llm.generate(...)
The calculators (step_floor.py) say what a step must do; this counts what it did, without asking them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minivllm.engine.plan import StepPlan, StepResult, needs_token
from minivllm.llm import LLM
from minivllm.transforms.prepack import PackedLinear


@dataclass(frozen=True)
class Counted:
    """One step of a running engine, counted on the tensors that went through it."""

    scheduled: tuple[tuple[int, int], ...]  # new and stored tokens of each request
    num_logits: int
    products: int  # FLOPs
    attention: int  # FLOPs, masked pairs among them; 0 where our own kernels ran: torch cannot look into them
    weight_bytes: int
    kv_bytes: int

    @property
    def flops(self) -> int:
        return self.products + self.attention

    @property
    def num_tokens(self) -> int:
        return sum(num_new for num_new, _ in self.scheduled)


@contextmanager
def counted_steps(llm: LLM) -> Iterator[list[Counted]]:
    """Count every step that the engine runs under `with`."""
    counter = _CountingRunner(llm)
    before, llm.engine.runner = llm.engine.runner, counter
    try:
        with llm.runner.by_modules():  # torch counts its own operators, not our kernels
            yield counter.steps
    finally:
        llm.engine.runner = before


class _CountingRunner:
    """Passes plans on to the engine's runner, under torch's FLOP counter."""

    def __init__(self, llm: LLM) -> None:
        self.runner = llm.engine.runner
        self.steps: list[Counted] = []
        modules = [m for m in llm.runner.model.modules() if not isinstance(m, nn.Embedding)]  # rows of it, not all
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        weights += [module.packed for module in modules if isinstance(module, PackedLinear)]
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        self.slot_bytes = llm.storage.num_bytes // (llm.config.num_blocks * llm.config.block_size)

    def run(self, plan: StepPlan) -> StepResult:
        scheduled = tuple((num_new, request.num_computed + num_new) for request, num_new in plan.scheduled)
        num_logits = sum(needs_token(request, num_new) for request, num_new in plan.scheduled)
        with flop_counter() as counter:
            result = self.runner.run(plan)
        flops = {str(name): count for name, count in counter.get_flop_counts().get("Global", {}).items()}
        attention = sum(count for name, count in flops.items() if "attention" in name or "bmm" in name)
        kv_bytes = self.slot_bytes * sum(stored for _, stored in scheduled)
        products = sum(flops.values()) - attention
        self.steps.append(Counted(scheduled, num_logits, products, attention, self.weight_bytes, kv_bytes))
        return result


def flop_counter() -> FlopCounterMode:
    """torch's counter, told about the operators of the CPU that it does not know."""
    aten = torch.ops.aten
    known: dict[object, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    if torch.backends.mkldnn.is_available():
        known[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    return FlopCounterMode(display=False, custom_mapping=known)


def _linear_flops(x: torch.Tensor, weight: torch.Tensor, *rest: object, **options: object) -> int:
    """Of x [rows, in] and a weight [out, in]; a lone row that the CPU computes twice (prepack.py) counts once."""
    num_rows = 1 if x.stride(0) == 0 else len(x)
    return 2 * num_rows * weight.shape[0] * weight.shape[1]


_linear_flops._get_raw = True  # type: ignore[attr-defined]  # torch's word for: give it tensors, not their shapes


def _attention_flops(q: Sequence[int], k: Sequence[int], *rest: object, **options: object) -> int:
    """Of q [batch, heads, queries, size] and all keys in k: masked pairs are computed, too."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def _attention_backward_flops(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], *rest: object, **options: object
) -> int:
    """Five products where forward has two: the scores again, and the gradients of v, the scores, q and k."""
    return _attention_flops(q, k) * 5 // 2
