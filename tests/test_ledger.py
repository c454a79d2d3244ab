"""The step ledger: bytes are those of the tensors that the model touched, FLOPs those that torch counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.course.calculators import Accelerator, attention_shape, num_parameters
from minivllm.course.step_ledger import LedgerFold, by_group, cost_line, ledger_rows, row_of, summed
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.errors import ConfigError
from minivllm.events import (
    Added,
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksTaken,
    Event,
    Forked,
    PrefixHit,
    StepCosted,
    StepRan,
    SwappedIn,
)
from minivllm.lab.counted_steps import flop_counter
from minivllm.lab.ledger import Ledger, SharedBlocks, keep_ledger
from minivllm.lab.step_floor import ModelWork
from minivllm.trace import Trace
from minivllm.weights import builtin_configs, find_model

Build = Callable[[str], tuple[Path, PreTrainedModel]]
MACHINE = Accelerator("a made-up machine", 2**34, 1e10, {"float32": 1e11, "bf16": 2e11}, "this test")
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
# tied and not, GQA, MHA, MQA with biases, windows in all layers and in some, MLA, experts with MLA
SHAPES = ["llama-gqa", "llama-mha-tied", "llama-mqa-bias", "qwen3", "mistral", "ministral-1to1", "v2-dense"]
MIXTURES = ["v2-moe", "v3-moe-yarn"]


class Touched(TorchDispatchMode):
    """Adds up what torch's operators read of the weights and of the KV storage, and what they write to it."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        modules = [m for m in llm.runner.model.modules() if not isinstance(m, torch.nn.Embedding)]
        weights = [weight for module in modules for weight in module.parameters(recurse=False)]
        self._weights = {weight.untyped_storage().data_ptr(): weight for weight in weights}
        self._kv = llm.storage.data.untyped_storage().data_ptr()
        self._planes = 1 if llm.model_config.mla else 2
        self.seen: set[int] = set()
        self.read = self.written = self.logits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self.seen.add(tensor.untyped_storage().data_ptr())
        name = str(func)
        if name.startswith("aten.index_select") and args[0].untyped_storage().data_ptr() == self._kv:
            self.read += out.numel() * out.element_size()
        if name.startswith("aten.index_copy_") and args[0].untyped_storage().data_ptr() == self._kv:
            self.written += args[3].numel() * args[3].element_size()
        return out

    @property
    def weight_bytes(self) -> int:
        return sum(w.numel() * w.element_size() for pointer, w in self._weights.items() if pointer in self.seen)


class Counted:
    """One step as torch saw it."""

    def __init__(self, touched: Touched, flops: dict[str, int], plan: StepPlan) -> None:
        self.weight_bytes, self.kv_bytes = touched.weight_bytes, touched.read + touched.written
        self.logit_bytes = touched.logits
        self.attention = sum(n for name, n in flops.items() if "attention" in name or "bmm" in name)
        self.products = sum(flops.values()) - self.attention
        self.shape = [(new, request.num_computed + new) for request, new in plan.scheduled]


@contextmanager
def counted(llm: LLM) -> Iterator[list[Counted]]:
    """Put torch's counters round the runner; logits are the tensor that the model gives."""
    runner, steps = llm.engine.runner, list[Counted]()
    model = llm.runner.model

    class Runner:
        def run(self, plan: StepPlan) -> StepResult:
            touched = Touched(llm)
            hook = model.register_forward_hook(lambda module, args, out: logits.append(out.numel() * out.element_size()))
            logits: list[int] = []
            shape = Counted(touched, {}, plan).shape
            with flop_counter() as counter, touched:
                result = runner.run(plan)
            hook.remove()
            touched.logits = 2 * sum(logits)
            flops = {str(name): n for name, n in counter.get_flop_counts().get("Global", {}).items()}
            steps.append(Counted(touched, flops, plan))
            steps[-1].shape = shape
            return result

    llm.engine.runner = Runner()
    try:
        yield steps
    finally:
        llm.engine.runner = runner


@pytest.fixture
def small(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """An engine on a family's small model: a token a block, so that blocks read are tokens read, and plain weights."""
    monkeypatch.setattr("minivllm.runner.loader.can_prepack", lambda dtype: False)

    def build(family: str, **options: Any) -> LLM:
        chosen = {"block_size": 1, "num_blocks": 600, "enable_prefix_caching": False, **options}
        return LLM(reference_model(family)[0], dtype="float32", device="cpu", show_progress=False, **chosen)

    return build


def run(llm: LLM, *prompts: list[int], params: SamplingParams = GREEDY) -> tuple[Trace, list[Counted]]:
    with keep_ledger(llm, MACHINE), llm.record() as trace, counted(llm) as steps:
        llm.generate([*prompts], params, use_tqdm=False)
    return trace, steps


def costs(trace: Trace) -> list[StepCosted]:
    return [event for event in trace if isinstance(event, StepCosted)]


def steps_of_every_kind(llm: LLM) -> tuple[list[StepCosted], list[Counted]]:
    """A prompt alone, chunks of one, decode, and a step that has both: the second request comes while one decodes."""
    first = list(range(7, 27))
    with keep_ledger(llm, MACHINE), llm.record() as trace, counted(llm) as steps:
        one = llm.text_engine.add(llm.text_engine.check(first), GREEDY)
        llm.text_engine.step()
        llm.text_engine.step()
        other = llm.text_engine.add(llm.text_engine.check(list(range(30, 70))), GREEDY)
        while not (one.is_finished and other.is_finished):
            llm.text_engine.step()
    return costs(trace), steps


@pytest.mark.parametrize("family", SHAPES)
def test_bytes_are_those_of_the_tensors_that_every_kind_of_step_touched(small: Callable[..., LLM], family: str) -> None:
    llm = small(family, max_num_batched_tokens=24)
    told, steps = steps_of_every_kind(llm)
    kinds = {tuple(new > 1 for new, _ in step.shape) for step in steps}
    assert kinds == {(True,), (False,), (False, True), (False, False)}
    assert any(stored < 40 for new, stored in steps[2].shape if new > 1)  # a chunk that wants no logits of its own
    for cost, step in zip(told, steps, strict=True):
        padding = kv_padding(llm, step)
        assert (cost.weight_bytes, cost.logit_bytes) == (step.weight_bytes, step.logit_bytes)
        assert cost.kv_bytes == step.kv_bytes - padding
        assert cost.floor_ms >= 1e3 * (cost.weight_bytes + cost.kv_bytes + cost.logit_bytes) / MACHINE.bandwidth


def kv_padding(llm: LLM, step: Counted) -> int:
    """Bytes that torch's attention reads beyond: single queries are read together, each as far as the longest.

    Written from torch_backend's rule, a layer at a time, not from the ledger's.
    """
    singles = [stored for new, stored in step.shape if new == 1]
    row = llm.model_config.kv_bytes_per_token // llm.model_config.num_layers
    extra = 0
    for layer in range(llm.model_config.num_layers):
        window = llm.model_config.window_of(layer)
        first = min((max(0, stored - window) for stored in singles), default=0) if window else 0
        read = len(singles) * (max(singles, default=0) - first)
        extra += row * (read - sum(min(stored, window or stored) for stored in singles))
    return extra


@pytest.mark.parametrize("family", SHAPES)
def test_flops_are_those_that_torch_counts(small: Callable[..., LLM], family: str) -> None:
    """Products to the FLOP, norms and biases apart; attention where no pair is masked, in decode, and above it else."""
    llm = small(family, max_num_batched_tokens=24)
    config = find_model(str(llm.model), "dummy").config
    parts = num_parameters(config).parts
    told, steps = steps_of_every_kind(llm)
    for cost, step in zip(told, steps, strict=True):
        num_tokens = sum(new for new, _ in step.shape)
        vectors = 2 * (int(parts["norms"]) + int(parts["biases"])) * num_tokens
        work = ModelWork(config, "float32").model
        attention = work.attention_of(step.shape, "float32").flops
        products = cost.flops - attention - vectors
        if llm.model_config.mla:  # torch counts the absorbed products of W_UK, W_UV as products of batches
            up = 2 * num_tokens * latent_weights(config)
            is_expanded = [new > 1 for new, _ in step.shape]
            assert step.products == products - up
            if not any(is_expanded):
                assert step.attention == up + attention + padded_pairs(llm, step) * pair_flops(config)
            assert attention + up <= step.attention
        else:
            assert step.products == products
            if all(new == 1 for new, _ in step.shape) and not llm.model_config.windows:
                assert step.attention == attention + padded_pairs(llm, step) * pair_flops(config)
            assert attention <= step.attention


def latent_weights(config: Any) -> int:
    layer = attention_shape(config).first
    up = layer.num_heads * layer.latent_size * (layer.key_size - layer.rope_size + layer.value_size)
    return len(attention_shape(config).layers) * up


def pair_flops(config: Any) -> int:
    """Of a query and a key in all heads and layers; latents are keys of r + dr and values of r numbers."""
    shape = attention_shape(config)
    layer = shape.first
    width = 2 * layer.latent_size + layer.rope_size if layer.latent_size else layer.key_size + layer.value_size
    return len(shape.layers) * 2 * layer.num_heads * width


def padded_pairs(llm: LLM, step: Counted) -> int:
    longest = max(stored for _, stored in step.shape)
    return sum(longest - stored for _, stored in step.shape)
