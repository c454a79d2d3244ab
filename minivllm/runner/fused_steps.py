"""Runs plans with few launches: decode steps as graphs, prompts and chunks by the same kernels one after another.

    plan --StepBuffers--> one copy --> graph, or kernels --> logits [rows, vocab] --> tokens --> one copy back

Every request of a step has a row, and every row gets logits and a token, wanted or not. Requests that want more than
a token of the plain sampler are looked at again: their logits are still there.
"""

import torch

from minivllm.config import ModelConfig
from minivllm.engine.plan import StepPlan, StepResult, TokenLogprobs
from minivllm.models.decoder import Decoder
from minivllm.models.fused_llama import FusedLlama
from minivllm.request import Request
from minivllm.runner.batch import logit_range
from minivllm.runner.batch_rows import changes_logits
from minivllm.runner.decode_graphs import DecodeSteps
from minivllm.runner.kernel_sampler import KernelSampler, sample_changed
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.sampler import judge_prompt, token_logprobs
from minivllm.runner.step_buffers import LoadedStep, StepBuffers, StepLimits

PromptLogprobs = dict[str, tuple[int, list[TokenLogprobs]]]


class FusedSteps:
    """A model, its KV and the fixed memory of a step."""

    def __init__(
        self, model: Decoder, config: ModelConfig, storage: KVStorage, limits: StepLimits, device: str
    ) -> None:
        self.config = config
        self.model = FusedLlama(model, config, list(storage.layers), limits.max_model_len)
        self.buffers = StepBuffers(limits, device)
        self.sampler = KernelSampler(limits.max_num_seqs, device)
        dtype = model.embed.weight.dtype
        self.logits = torch.zeros(limits.max_num_seqs, config.vocab_size, dtype=dtype, device=device)
        self.decode = DecodeSteps(self.model, self.buffers, self.sampler, self.logits)
        self._token_ids = torch.zeros(limits.max_num_seqs, dtype=torch.int32, pin_memory=device != "cpu")
        self._is_read = torch.cuda.Event() if device != "cpu" else None

    def run(self, plan: StepPlan) -> StepResult:
        """Compute every scheduled token, and choose where a request is up to date."""
        requests = self.buffers.rows.seat(plan.scheduled)
        is_single = plan.num_tokens == len(requests)
        if is_single and not any(judges_prompt(requests[row]) for row in self.buffers.rows.special):
            step, prompt_logprobs = self._decode(requests), PromptLogprobs()
        else:
            step, prompt_logprobs = self._compute(plan)
        if not any(end == len(request.token_ids) for request, end in zip(requests, step.ends, strict=True)):
            return StepResult({}, prompt_logprobs=prompt_logprobs)  # nothing to wait for
        ready = zip(requests, self._read_tokens(len(requests)), step.ends, strict=True)
        new_token_ids = {request.id: [token] for request, token, end in ready if end == len(request.token_ids)}
        special = [row for row in sorted(self.buffers.rows.special) if requests[row].id in new_token_ids]
        logprobs = self._choose_again(special, requests, new_token_ids) if special else {}
        return StepResult(new_token_ids, logprobs, prompt_logprobs)

    def wanted_logits(self, plan: StepPlan) -> torch.Tensor:
        """The logits that the plain path gives of a plan: the rows of each logit_range, in the plan's order."""
        self.buffers.rows.seat(plan.scheduled)
        step = self.buffers.load(plan)
        x, residual = self.model.body(self.buffers.ragged(step))
        starts = dict(zip(step.requests, step.starts, strict=True))
        rows = [
            starts[request] + position - request.num_computed
            for request, num_new in plan.scheduled
            for position in range(*logit_range(request, num_new))
        ]
        return self.model.head(x[rows], residual[rows], x.new_empty(len(rows), self.config.vocab_size))

    def _decode(self, requests: list[Request]) -> LoadedStep:
        """Logits and tokens of every row, each with one new token."""
        step = self.buffers.load_singles(requests, self.decode.padded(len(requests)))
        self.decode.run(len(requests))
        return step

    def _compute(self, plan: StepPlan) -> tuple[LoadedStep, PromptLogprobs]:
        """Logits and tokens of every row, and of prompts what their owners want to know."""
        step = self.buffers.load(plan)
        x, residual = self.model.body(self.buffers.ragged(step))
        last = self.buffers.last_tokens(step)
        logits = self.model.head(x[last], residual[last], self.logits[: len(last)])
        self.sampler(logits, self.buffers.temperatures, self.buffers.seeds, self.buffers.num_tokens)
        prompt_logprobs: PromptLogprobs = {}
        for request, num_new, start in zip(step.requests, step.num_new, step.starts, strict=True):
            if request.params.prompt_logprobs is not None:
                first, end = logit_range(request, num_new)
                rows = slice(start + first - request.num_computed, start + end - request.num_computed)
                seen = self._logits_of(x[rows], residual[rows])
                prompt_logprobs[request.id] = (first, judge_prompt(request, first, end, seen))
        return step, prompt_logprobs

    def _logits_of(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.model.head(x.clone(), residual.clone(), x.new_empty(len(x), self.config.vocab_size))

    def _read_tokens(self, num_requests: int) -> list[int]:
        """The one wait of a step."""
        self._token_ids.copy_(self.sampler.token_ids, non_blocking=True)
        if self._is_read is not None:
            self._is_read.record()
            self._is_read.synchronize()
        return self._token_ids[:num_requests].tolist()

    def _choose_again(
        self, rows: list[int], requests: list[Request], new_token_ids: dict[str, list[int]]
    ) -> dict[str, list[TokenLogprobs]]:
        """Tokens by all parameters, for samples that fork off a prompt too; and the logprobs that are asked for.

        The samples that fork off a prompt all draw their first token from its last row.
        """
        samples = [(row, each) for row in rows for each in (requests[row], *requests[row].pending_forks)]
        changed = [(row, each) for row, each in samples if changes_logits(each.params) or each.id not in new_token_ids]
        if changed:
            logits = self.logits[[row for row, _ in changed]]
            chosen = sample_changed(logits, [each for _, each in changed], self.config.eos_token_ids)
            new_token_ids |= {each.id: [token] for (_, each), token in zip(changed, chosen, strict=True)}
        return {
            each.id: token_logprobs(
                self.logits[row : row + 1],
                torch.tensor(new_token_ids[each.id], device=self.logits.device),
                each.params.logprobs,
            )
            for row, each in samples
            if each.params.logprobs is not None
        }


def judges_prompt(request: Request) -> bool:
    """Whether a request's next chunk has logits to deliver beside those of the next token."""
    return request.params.prompt_logprobs is not None and request.num_computed < request.num_prompt
