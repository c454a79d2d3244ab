"""Runs plans with few launches: decode steps as graphs, prompts and chunks by the same kernels one after another.

    plan --StepBuffers--> one copy --> graph, or kernels --> logits [rows, vocab] --> tokens --> one copy back

Every request of a step has a row, and every row gets logits and a token, wanted or not. Requests that want more than
a token of the plain sampler are looked at again: their logits are still there. Where nobody does, nobody waits: the
next step is launched while this one runs, and takes this one's tokens where the sampler left them.
"""

import torch

from minivllm.config import ModelConfig
from minivllm.engine.plan import Done, Launched, StepPlan, StepResult, TokenLogprobs
from minivllm.models.decoder import Decoder
from minivllm.models.fused_llama import FusedLlama
from minivllm.request import Request
from minivllm.runner.batch import logit_range
from minivllm.runner.batch_rows import changes_logits
from minivllm.runner.decode_graphs import DecodeSteps
from minivllm.runner.kernel_sampler import KernelSampler, sample_changed
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.sampler import judge_prompt, token_logprobs
from minivllm.runner.shared_prefix import SharedPrefixes
from minivllm.runner.step_buffers import LoadedStep, StepBuffers, StepLimits
from minivllm.runner.token_reader import TokenReader

PromptLogprobs = dict[str, tuple[int, list[TokenLogprobs]]]


class FusedSteps:
    """A model, its KV and the fixed memory of a step."""

    def __init__(
        self, model: Decoder, config: ModelConfig, storage: KVStorage, limits: StepLimits, device: str
    ) -> None:
        self.config = config
        most_sharing = 0 if limits.max_num_seqs == 1 or any(config.windows or ()) else limits.max_num_seqs
        self.model = FusedLlama(model, config, list(storage.layers), limits.max_model_len, most_sharing)
        self.sampler = KernelSampler(limits.max_num_seqs, device)
        self.buffers = StepBuffers(limits, device, self.sampler.token_ids)
        dtype = model.embed.weight.dtype
        self.logits = torch.zeros(limits.max_num_seqs, config.vocab_size, dtype=dtype, device=device)
        parts = (self.model, self.buffers, self.sampler, self.logits)
        self.decode = DecodeSteps(*parts)
        token_bytes = 2 * config.num_kv_heads * config.head_size * dtype.itemsize
        prefixes = SharedPrefixes(limits.max_num_seqs, limits.block_size, token_bytes, device)
        self.shared_decode = DecodeSteps(*parts, prefixes) if most_sharing else None
        self._tokens = TokenReader(self.sampler.token_ids)

    def capture(self, *, show_progress: bool) -> None:
        """Make decode steps CUDA graphs: before the first plan, when all rows are padding."""
        pool = torch.cuda.graph_pool_handle()
        for steps in (self.decode, self.shared_decode):
            if steps:
                steps.capture(pool, show_progress=show_progress)

    def launch(self, plan: StepPlan) -> Launched:
        """Have every scheduled token computed, and one chosen in each row; waits only for who wants more than that."""
        requests = self.buffers.rows.seat(plan.scheduled)
        is_single = plan.num_tokens == len(requests)
        if is_single and not any(judges_prompt(requests[row]) for row in self.buffers.rows.special):
            step, prompt_logprobs = self._decode(requests), PromptLogprobs()
        else:
            step, prompt_logprobs = self._compute(plan)
        if self.buffers.rows.filtered:
            self.sampler.filtered(self.logits[: len(requests)], self.buffers)
        ready = [end == request.num_expected for request, end in zip(requests, step.ends, strict=True)]
        tokens = self._tokens.send([request.id for request in requests], ready)
        if not self.buffers.rows.special:
            return tokens
        new_token_ids = tokens.result().new_token_ids
        special = [row for row in sorted(self.buffers.rows.special) if requests[row].id in new_token_ids]
        logprobs = self._choose_again(special, requests, new_token_ids) if special else {}
        return Done(StepResult(new_token_ids, logprobs, prompt_logprobs))

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
        decode = self._graphs_of_rows()
        step = self.buffers.load_singles(requests, decode.padded(len(requests)))
        decode.run(len(requests))
        return step

    def _graphs_of_rows(self) -> DecodeSteps:
        """Those that read a prefix once for all rows that begin with it, where that pays."""
        shared = self.shared_decode
        return shared if shared and shared.prefixes and shared.prefixes.find(self.buffers.rows) else self.decode

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
