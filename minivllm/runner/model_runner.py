"""Runs a step's plan on one device: build the batch, run the model, choose the tokens.

On a GPU, models of the Llama family that our kernels fit run fused (fused_steps.py); this file's way is for all others.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from minivllm.attention import LayerKV, choose_backend
from minivllm.attention.grouped import GroupedAttention, group_configs
from minivllm.config import ModelConfig
from minivllm.engine.plan import Done, Launched, StepPlan, StepResult, needs_token
from minivllm.models.decoder import Decoder
from minivllm.request import Request
from minivllm.runner.batch import build_batches, logit_range
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.sampler import judge_prompt, sample, token_logprobs
from minivllm.runner.speculation import Speculation
from minivllm.runner.step_buffers import StepLimits
from minivllm.speculative.proposer import Draft

if TYPE_CHECKING:
    from minivllm.runner.fused_steps import FusedSteps


class ModelRunner:
    """The model, the bytes of its KV cache, and the way from a plan to new tokens."""

    def __init__(
        self, model: Decoder, config: ModelConfig, storage: KVStorage, device: str, limits: StepLimits
    ) -> None:
        self.model = model
        self.config = config
        self.storage = storage
        self.device = device
        self.limits = limits
        self.fused = make_fused(model, config, storage, limits, device)
        self.schedules_ahead = False
        self.speculation: Speculation | None = None
        self._backend = choose_backend(device, config)
        self._configs = group_configs(config, storage.groups)
        self._layers: list[LayerKV] = list(storage.layers)

    @property
    def is_async(self) -> bool:
        """Whether steps are launched and not waited for."""
        return self.schedules_ahead and self.fused is not None and self.speculation is None

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every scheduled token, store its K and V, and sample where a request is up to date."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """The same without waiting for the tokens, where steps run fused."""
        self.storage.move(plan.transfers)
        if self.fused is None:
            self.storage.clear(plan.fresh_block_ids)  # our kernels never look at what is not stored
        if self.speculation:
            self.speculation.move(plan.transfers, plan.fresh_block_ids, self._chained)
        if not plan.scheduled:
            return Done(StepResult({}), allows_next=True)
        if self.speculation:
            return Done(self._speculate(plan, self.speculation))
        return Done(self._choose_tokens(plan, self.logits(plan))) if self.fused is None else self.fused.launch(plan)

    @torch.inference_mode()
    def logits(self, plan: StepPlan, drafts: Mapping[str, Draft] | None = None) -> torch.Tensor:
        """Compute every scheduled token and store its K and V; the logits that are wanted, [R, vocab]."""
        if self.fused is not None:
            return self.fused.wanted_logits(plan, drafts or {})
        guessed = {request_id: draft.token_ids for request_id, draft in (drafts or {}).items()}
        batches = build_batches(plan, self.storage.block_size, self.device, guessed)
        parts = zip(self._configs, batches, strict=True)
        attentions = [self._backend(config, batch, self._layers) for config, batch in parts]
        attention = attentions[0] if len(attentions) == 1 else GroupedAttention(attentions, self.storage.groups)
        hidden = self.model.hidden(batches[0].token_ids, batches[0].positions, attention)
        if self.speculation:
            self.speculation.follow(batches[0], hidden)
        return self.model.logits(hidden[batches[0].logit_rows])

    @torch.inference_mode()
    def capture_graphs(self, *, show_progress: bool) -> None:
        """Where steps run fused, make them CUDA graphs: before the first plan, when all rows are padding."""
        if self.fused is not None:
            self.fused.capture(show_progress=show_progress)

    @property
    def num_graphs(self) -> int:
        return self.fused.num_graphs if self.fused else 0

    @contextmanager
    def by_modules(self) -> Iterator[None]:
        """Run the model's own modules, as a CPU does, for whoever hooks into them under `with`."""
        fused, self.fused = self.fused, None
        try:
            yield
        finally:
            self.fused = fused

    def twin(self, num_host_blocks: int) -> "ModelRunner":
        """The same model, not a copy of it, on storage of its own that holds zeros; without graphs.

        Raises ConfigError where drafters have storage of their own.
        """
        speculation = self.speculation.twin() if self.speculation else None
        num_blocks, block_size = self.storage.data.shape[2:4]
        storage = KVStorage(self.config, num_blocks, block_size, self.device, num_host_blocks, self.storage.groups)
        runner = ModelRunner(self.model, self.config, storage, self.device, self.limits)
        runner.speculation = speculation
        return runner

    def save_block(self, block_id: int, *, on_host: bool = False) -> bytes:
        return self.storage.save_block(block_id, on_host=on_host)

    def load_block(self, block_id: int, contents: bytes, *, on_host: bool = False) -> None:
        self.storage.load_block(block_id, contents, on_host=on_host)

    @property
    def _chained(self) -> Collection[str]:
        """Methods whose drafts are computed on the device, right before they are judged."""
        return self.fused.chains if self.fused else ()

    def _speculate(self, plan: StepPlan, speculation: Speculation) -> StepResult:
        """Ask for drafts, compute them beside the known tokens, keep what stands."""
        started_s = time.perf_counter()
        drafts = speculation.propose(plan, self._chained)
        if self.fused is None:
            result = self._choose_tokens(plan, self.logits(plan, drafts), drafts)
        else:
            result = self.fused.verify(plan, drafts, speculation)
        seconds = time.perf_counter() - started_s
        return replace(result, draft_s=speculation.draft_s, verify_s=seconds - speculation.draft_s)

    def speculate_with(self, speculation: Speculation) -> None:
        """From now on, before graphs are captured: steps have drafts."""
        self.speculation = speculation
        if self.fused is not None:
            self.fused.draft_by(speculation.proposers)

    def _choose_tokens(
        self, plan: StepPlan, logits: torch.Tensor, drafts: Mapping[str, Draft] | None = None
    ) -> StepResult:
        """Sample for up-to-date requests; `logits` has the rows of each request's logit_range, in plan order.

        The samples that fork off a prompt all draw their first token from its last row. Behind a request's own rows
        stand those of its drafts.
        """
        sampled, last_rows, row = list[Request](), list[int](), 0
        result = StepResult({})
        for request, num_new in plan.scheduled:
            first, end = logit_range(request, num_new)
            if request.params.prompt_logprobs is not None:
                result.prompt_logprobs[request.id] = (first, judge_prompt(request, first, end, logits[row:]))
            row += end - first
            if drafts and request.id in drafts:
                self._verify(request, drafts[request.id], logits[row - 1 :], result)
                row += len(drafts[request.id].token_ids)
            elif needs_token(request, num_new):
                samples = (request, *request.pending_forks)
                sampled.extend(samples)
                last_rows.extend(row - 1 for _ in samples)
        if not sampled:
            return result
        logits = logits if last_rows == list(range(len(logits))) else logits[last_rows]
        token_ids = sample(logits, sampled, self.config.eos_token_ids)
        for r, (request, token_id) in enumerate(zip(sampled, token_ids.tolist(), strict=True)):
            result.new_token_ids[request.id] = [token_id]
            if request.params.logprobs is not None:
                own = token_logprobs(logits[r : r + 1], token_ids[r : r + 1], request.params.logprobs)
                result.logprobs[request.id] = own
        return result

    def _verify(self, request: Request, draft: Draft, logits: torch.Tensor, result: StepResult) -> None:
        assert self.speculation is not None
        verified = self.speculation.verify(request, draft, logits[: 1 + len(draft.token_ids)])
        verified.enter(result, request.id)


def make_fused(
    model: Decoder, config: ModelConfig, storage: KVStorage, limits: StepLimits, device: str
) -> "FusedSteps | None":
    """The fast way for this model on this device; None where there is none."""
    is_plain = config.mla is None and not config.batch_invariant and len(storage.groups.windows) == 1
    if not (device.startswith("cuda") and is_plain and find_spec("triton")):
        return None
    return fused_where_it_fits(model, config, storage, limits, device)


def fused_where_it_fits(
    model: Decoder, config: ModelConfig, storage: KVStorage, limits: StepLimits, device: str
) -> "FusedSteps | None":
    """The fused steps of a Llama, if its sizes are the kernels'; under Triton's interpreter on a CPU, too."""
    from minivllm.models.fused_llama import kernel_obstacle  # lazily: a CPU needs no triton
    from minivllm.runner.fused_steps import FusedSteps
    from minivllm.runner.kernel_sampler import fits_sampler

    if kernel_obstacle(config, storage.block_size) or not fits_sampler(config.vocab_size):
        return None
    return FusedSteps(model, config, storage, limits, device)
