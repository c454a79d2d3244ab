"""Runs a step's plan on one device: build the batch, run the model, choose the tokens."""

import torch

from minivllm.attention import LayerKV, choose_backend
from minivllm.attention.grouped import GroupedAttention, group_configs
from minivllm.config import ModelConfig
from minivllm.engine.plan import StepPlan, StepResult, TokenLogprobs, needs_token
from minivllm.models.decoder import Decoder
from minivllm.request import Request
from minivllm.runner.batch import build_batches, logit_range
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.sampler import sample, token_logprobs


class ModelRunner:
    """The model, the bytes of its KV cache, and the way from a plan to new tokens."""

    def __init__(self, model: Decoder, config: ModelConfig, storage: KVStorage, device: str) -> None:
        self.model = model
        self.config = config
        self.storage = storage
        self.device = device
        self._backend = choose_backend(device, config)
        self._configs = group_configs(config, storage.groups)
        self._layers: list[LayerKV] = list(storage.layers)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute every scheduled token, store its K and V, and sample where a request is up to date."""
        self.storage.move(plan.transfers)
        self.storage.clear(plan.fresh_block_ids)
        if not plan.scheduled:
            return StepResult({})
        return self._choose_tokens(plan, self.logits(plan))

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """Compute every scheduled token and store its K and V; the logits that are wanted, [R, vocab]."""
        batches = build_batches(plan, self.storage.block_size, self.device)
        parts = zip(self._configs, batches, strict=True)
        attentions = [self._backend(config, batch, self._layers) for config, batch in parts]
        attention = attentions[0] if len(attentions) == 1 else GroupedAttention(attentions, self.storage.groups)
        return self.model(batches[0].token_ids, batches[0].positions, batches[0].logit_rows, attention)

    def twin(self, num_host_blocks: int) -> "ModelRunner":
        """The same model, not a copy of it, on storage of its own that holds zeros."""
        num_blocks, block_size = self.storage.data.shape[2:4]
        storage = KVStorage(self.config, num_blocks, block_size, self.device, num_host_blocks, self.storage.groups)
        return ModelRunner(self.model, self.config, storage, self.device)

    def save_block(self, block_id: int, *, on_host: bool = False) -> bytes:
        return self.storage.save_block(block_id, on_host=on_host)

    def load_block(self, block_id: int, contents: bytes, *, on_host: bool = False) -> None:
        self.storage.load_block(block_id, contents, on_host=on_host)

    def _choose_tokens(self, plan: StepPlan, logits: torch.Tensor) -> StepResult:
        """Sample for up-to-date requests; `logits` has the rows of each request's logit_range, in plan order.

        The samples that fork off a prompt all draw their first token from its last row.
        """
        sampled, last_rows, prompt_logprobs, row = list[Request](), list[int](), {}, 0
        for request, num_new in plan.scheduled:
            first, end = logit_range(request, num_new)
            if request.params.prompt_logprobs is not None:
                prompt_logprobs[request.id] = (first, self._judge_prompt(request, first, end, logits[row:]))
            row += end - first
            if needs_token(request, num_new):
                samples = (request, *request.pending_forks)
                sampled.extend(samples)
                last_rows.extend(row - 1 for _ in samples)
        if not sampled:
            return StepResult({}, prompt_logprobs=prompt_logprobs)
        logits = logits if last_rows == list(range(len(logits))) else logits[last_rows]
        token_ids = sample(logits, sampled, self.config.eos_token_ids)
        logprobs = {
            request.id: token_logprobs(logits[r : r + 1], token_ids[r : r + 1], request.params.logprobs)
            for r, request in enumerate(sampled)
            if request.params.logprobs is not None
        }
        chosen = token_ids.tolist()
        return StepResult({r.id: [t] for r, t in zip(sampled, chosen, strict=True)}, logprobs, prompt_logprobs)

    def _judge_prompt(self, request: Request, first: int, end: int, logits: torch.Tensor) -> list[TokenLogprobs]:
        """Logprobs of the prompt tokens at first+1 .. that the logits at first .. predict."""
        assert request.params.prompt_logprobs is not None
        judged = request.token_ids[first + 1 : min(end + 1, request.num_prompt)]
        if not judged:
            return []
        token_ids = torch.tensor(judged, device=logits.device)
        return token_logprobs(logits[: len(judged)], token_ids, request.params.prompt_logprobs)
