"""Runs plans with few launches: steps of single tokens as graphs, chunks too, large ones kernel after kernel.

    plan --StepBuffers--> one copy --> graph, or kernels --> logits [rows, vocab] --> tokens --> one copy back

Every request of a step has a row, and every row gets logits and a token, wanted or not. Requests that want more than
a token of the plain sampler are looked at again: their logits are still there. Where nobody does, nobody waits: the
next step is launched while this one runs, and takes this one's tokens where the sampler left them.

A draft is one more row (draft_rows.py): what the row in front of it chose says whether it stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from minivllm.attention import ForwardBatch
from minivllm.attention.kernel_batch import KernelBatch
from minivllm.config import ModelConfig
from minivllm.engine.plan import Done, Launched, StepPlan, StepResult, TokenLogprobs
from minivllm.models.decoder import Decoder
from minivllm.models.fused_llama import FusedLlama
from minivllm.request import Request
from minivllm.runner.batch import build_batches, logit_range
from minivllm.runner.batch_rows import changes_logits
from minivllm.runner.decode_graphs import DecodeSteps
from minivllm.runner.draft_chain import DraftChain, can_chain
from minivllm.runner.draft_rows import DraftRows, shortened
from minivllm.runner.kernel_sampler import KernelSampler, sample_changed
from minivllm.runner.kv_storage import KVStorage
from minivllm.runner.mixed_graphs import MixedSteps
from minivllm.runner.sampler import judge_prompt, token_logprobs
from minivllm.runner.shared_prefix import SharedPrefixes
from minivllm.runner.speculation import Chosen, RequestTarget, Speculation, Verified
from minivllm.runner.step_buffers import LoadedStep, StepBuffers, StepLimits
from minivllm.runner.token_reader import TokenReader
from minivllm.speculative.eagle import EagleProposer
from minivllm.speculative.proposer import Draft, Proposer

PromptLogprobs = dict[str, tuple[int, list[TokenLogprobs]]]


class KernelTarget(RequestTarget):
    """Draws with the kernel's noise, as a request whose logits are changed does without drafts."""

    def choose(self, accepted: Sequence[int]) -> int:
        row = len(accepted)
        [token] = sample_changed(self.logits[row : row + 1], [self._after(accepted)], self.eos_token_ids)
        return token


class FusedSteps:
    """A model, its KV and the fixed memory of a step."""

    def __init__(
        self, model: Decoder, config: ModelConfig, storage: KVStorage, limits: StepLimits, device: str
    ) -> None:
        self.config = config
        most_sharing = 0 if limits.max_num_seqs == 1 or any(config.windows or ()) else limits.max_num_seqs
        self.model = FusedLlama(model, config, list(storage.layers), limits.max_model_len, most_sharing)
        self.sampler = KernelSampler(limits.max_rows, device)
        self.buffers = StepBuffers(limits, device, self.sampler.token_ids)
        dtype = model.embed.weight.dtype
        self.logits = torch.zeros(limits.max_rows, config.vocab_size, dtype=dtype, device=device)
        parts = (self.model, self.buffers, self.sampler, self.logits)
        self.decode = DecodeSteps(*parts)
        token_bytes = 2 * config.num_kv_heads * config.head_size * dtype.itemsize
        prefixes = SharedPrefixes(limits.max_num_seqs, limits.block_size, token_bytes, device)
        self.shared_decode = DecodeSteps(*parts, prefixes) if most_sharing else None
        self.mixed = MixedSteps(self.model, self.buffers)
        self._tokens = TokenReader(self.sampler.token_ids)
        self._hidden: torch.Tensor | None = None  # of the latest step, [T, hidden], in its own order
        self.chains: dict[str, DraftChain] = {}  # by method
        self._shown: Sequence[Proposer] = ()  # who sees a step of single tokens within it

    def draft_by(self, proposers: Mapping[str, Proposer]) -> None:
        """Have chains of drafts computed here, by what can: before graphs are captured."""
        size = self.buffers.limits.block_size
        self.chains = {method: DraftChain(p, self.buffers) for method, p in proposers.items() if can_chain(p, size)}
        heads = [chain.drafter for chain in self.chains.values() if isinstance(chain.drafter, EagleProposer)]
        if any(proposer.needs_hidden for proposer in proposers.values()):
            self.keep_hidden(heads)

    def keep_hidden(self, heads: Sequence[EagleProposer] = ()) -> None:
        """From now on, let proposers have the last layer's output, heads within the step if it is one of rows."""
        rows = self.logits.new_zeros(self.buffers.limits.max_rows, self.config.hidden_size)

        def follow(batch: KernelBatch, hidden: torch.Tensor) -> None:
            table = batch.singles.block_table
            for head in heads:
                head.follow_rows(batch.token_ids, batch.positions, batch.slots, table, hidden)

        for steps in filter(None, (self.decode, self.shared_decode)):
            steps.hidden, steps.follow = rows, follow
        self._shown = heads

    def capture(self, *, show_progress: bool) -> None:
        """Make steps CUDA graphs: before the first plan, when all rows are padding."""
        pool = torch.cuda.graph_pool_handle()
        for steps in self.captured:
            steps.capture(pool, show_progress=show_progress)

    @property
    def captured(self) -> list[MixedSteps | DecodeSteps | DraftChain]:
        """All that have graphs, those of most tokens first: the others fit into their memory."""
        return [steps for steps in (self.mixed, self.decode, self.shared_decode, *self.chains.values()) if steps]

    @property
    def num_graphs(self) -> int:
        return sum(len(steps.graphs) for steps in self.captured)

    def launch(self, plan: StepPlan) -> Launched:
        """Have every scheduled token computed, and one chosen in each row; waits only for who wants more than that."""
        step, prompt_logprobs = self._run(plan, {}, {})
        tokens = self._tokens.send([request.id for request in step.requests], is_ready(step))
        if not self.buffers.rows.special:
            return tokens
        new_token_ids = tokens.result().new_token_ids
        logprobs = self._choose_again(step, new_token_ids)
        return Done(StepResult(new_token_ids, logprobs, prompt_logprobs))

    def verify(self, plan: StepPlan, drafts: Mapping[str, Draft], speculation: Speculation) -> StepResult:
        """Have every scheduled token and all drafts computed; wait, and keep what stands."""
        drafts = shortened(drafts, self.buffers.limits.max_rows - len(plan.scheduled))
        if speculation.needs_hidden and self.decode.hidden is None:
            self.keep_hidden()
        methods = {request.id: speculation.method_of(request) for request, _ in plan.scheduled if request.id in drafts}
        step, prompt_logprobs = self._run(plan, drafts, methods)
        shown = self._shown if not step.starts else ()
        if late := [each for each in speculation.followers(len(plan.scheduled)) if each not in shown]:
            batch, hidden = self._seen(plan, drafts, step)
            for proposer in late:
                proposer.follow(batch, hidden)
        tokens = self._tokens.send([request.id for request in step.requests], is_ready(step))
        chosen, result = tokens.read(step.rows.count), StepResult({}, prompt_logprobs=prompt_logprobs)
        for chain in self.chains.values():
            found, seconds = chain.finish()
            drafts, speculation.draft_s = {**drafts, **found}, speculation.draft_s + seconds
        for request, first, ready in zip(step.requests, step.rows.firsts, tokens.is_ready, strict=True):
            if request.id in drafts:
                draft = drafts[request.id]
                rows = slice(first, first + 1 + len(draft.token_ids))
                verified = self._verify(request, draft, rows, chosen, speculation)
                verified.enter(result, request.id)
            elif ready:
                result.new_token_ids[request.id] = [chosen[first]]
        if self.buffers.rows.special:
            result.logprobs.update(self._choose_again(step, result.new_token_ids))
        return result

    def wanted_logits(self, plan: StepPlan, drafts: Mapping[str, Draft]) -> torch.Tensor:
        """The logits that the plain path gives of a plan: each logit_range and its drafts, in the plan's order."""
        rows = DraftRows.of(self.buffers.rows.seat(plan.scheduled), drafts)
        step = self.buffers.load(plan, rows)
        x, residual = self.mixed.run(step)
        places = dict(zip(step.requests, zip(step.starts, rows.guesses, strict=True), strict=True))
        wanted = list[int]()
        for request, num_new in plan.scheduled:
            start, guess = places[request]
            first, end = (start + position - request.num_computed for position in logit_range(request, num_new))
            wanted.extend(range(first, end + len(guess)))
        return self.model.head(x[wanted], residual[wanted], x.new_empty(len(wanted), self.config.vocab_size))

    def _run(
        self, plan: StepPlan, drafts: Mapping[str, Draft], methods: Mapping[str, str]
    ) -> tuple[LoadedStep, PromptLogprobs]:
        """Logits and tokens of every row, by a graph if there is one for it; and what prompts say of themselves.

        `methods`: who drafts for a request, by its id.
        """
        requests = self.buffers.rows.seat(plan.scheduled)
        rows = DraftRows.of(requests, drafts)
        is_single = all(num_new == 1 for _, num_new in plan.scheduled)
        if is_single and not any(judges_prompt(requests[row]) for row in self.buffers.rows.special):
            step, prompt_logprobs = self._decode(requests, rows, methods), PromptLogprobs()
        else:
            step, prompt_logprobs = self._compute(plan, rows, methods)
        if self.buffers.rows.filtered:
            self.sampler.filtered(self.logits[: rows.count], self.buffers)
        return step, prompt_logprobs

    def _start_chains(self, step: LoadedStep, methods: Mapping[str, str]) -> None:
        """Have the drafts that nobody knows yet computed into their places."""
        for method, chain in self.chains.items():
            if seats := [seat for seat, request in enumerate(step.requests) if methods.get(request.id) == method]:
                chain.start(step, seats)

    def _decode(self, requests: list[Request], rows: DraftRows, methods: Mapping[str, str]) -> LoadedStep:
        """Logits and tokens of every row, each with one new token."""
        decode = self.decode if rows.has_drafts else self._graphs_of_rows()
        step = self.buffers.load_singles(requests, decode.padded(rows.count), rows)
        self._start_chains(step, methods)
        decode.run(rows.count)
        self._hidden = decode.hidden
        return step

    def _graphs_of_rows(self) -> DecodeSteps:
        """Those that read a prefix once for all rows that begin with it, where that pays."""
        shared = self.shared_decode
        return shared if shared and shared.prefixes and shared.prefixes.find(self.buffers.rows) else self.decode

    def _compute(
        self, plan: StepPlan, rows: DraftRows, methods: Mapping[str, str]
    ) -> tuple[LoadedStep, PromptLogprobs]:
        """Logits and tokens of every row, and of prompts what their owners want to know."""
        step = self.buffers.load(plan, rows, self.mixed.padded)
        self._start_chains(step, methods)
        x, residual = self.mixed.run(step)
        self._hidden = x + residual if self.decode.hidden is not None else None
        last = self.buffers.last_tokens(step)
        logits = self.model.head(x[last], residual[last], self.logits[: len(last)])
        self.sampler(logits, self.buffers.temperatures, self.buffers.seeds, self.buffers.num_tokens)
        prompt_logprobs: PromptLogprobs = {}
        for request, num_new, start in zip(step.requests, step.num_new, step.starts, strict=True):
            if request.params.prompt_logprobs is not None:
                first, end = logit_range(request, num_new)
                places = slice(start + first - request.num_computed, start + end - request.num_computed)
                seen = self._logits_of(x[places], residual[places])
                prompt_logprobs[request.id] = (first, judge_prompt(request, first, end, seen))
        return step, prompt_logprobs

    def _logits_of(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.model.head(x.clone(), residual.clone(), x.new_empty(len(x), self.config.vocab_size))

    def _seen(self, plan: StepPlan, drafts: Mapping[str, Draft], step: LoadedStep) -> tuple[ForwardBatch, torch.Tensor]:
        """The latest step as proposers see it: its tokens and the last layer's output, in the plan's order.

        Tokens are those on the device: the host does not know the drafts of a chain yet.
        """
        assert self._hidden is not None
        guesses = {request_id: draft.token_ids for request_id, draft in drafts.items()}
        [batch] = build_batches(plan, self.buffers.limits.block_size, str(self._hidden.device), guesses)
        starts = step.starts or step.rows.firsts
        spans = dict(zip(step.requests, zip(starts, step.num_tokens, strict=True), strict=True))
        places = torch.tensor(
            [start + i for request, _ in plan.scheduled for start, count in [spans[request]] for i in range(count)],
            device=self._hidden.device,
        )
        return replace(batch, token_ids=self.buffers.token_ids[places].long()), self._hidden[places]

    def _verify(
        self, request: Request, draft: Draft, rows: slice, chosen: list[int], speculation: Speculation
    ) -> Verified:
        """What stands of a draft: by the tokens that its rows chose, if nothing else is asked for."""
        if draft.probs is not None or changes_logits(request.params):
            logits = self.logits[rows]
            return speculation.verify(request, draft, logits, KernelTarget(request, logits, self.config.eos_token_ids))
        target = Chosen(request.seed, request.num_tokens, chosen[rows])
        logits = self.logits if request.params.logprobs is None else self.logits[rows]  # a view costs microseconds
        return speculation.verify(request, draft, logits, target)

    def _choose_again(self, step: LoadedStep, new_token_ids: dict[str, list[int]]) -> dict[str, list[TokenLogprobs]]:
        """Tokens by all parameters, for samples that fork off a prompt too; and the logprobs that are asked for.

        The samples that fork off a prompt all draw their first token from its last row. Who has drafts was served.
        """
        special = [seat for seat in sorted(self.buffers.rows.special) if not step.rows.guesses[seat]]
        samples = [
            (step.rows.firsts[seat], each)
            for seat in special
            if step.requests[seat].id in new_token_ids
            for each in (step.requests[seat], *step.requests[seat].pending_forks)
        ]
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


def is_ready(step: LoadedStep) -> list[bool]:
    """Of each request, whether its known tokens are all computed: then its row's token is the next one."""
    return [end == request.num_expected for request, end in zip(step.requests, step.ends, strict=True)]


def judges_prompt(request: Request) -> bool:
    """Whether a request's next chunk has logits to deliver beside those of the next token."""
    return request.params.prompt_logprobs is not None and request.num_computed < request.num_prompt
