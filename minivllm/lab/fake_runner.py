"""A runner without a model: the next token is a pure function of the prefix, read back through the block table.

Every slot remembers its token, its position and a digest of the whole prefix up to it, as real K and V do. So a wrong
share, a stale block or a missed recompute is an assertion (invariant I16), or it changes the tokens that come out.
Drafts are written behind the known tokens and read back; slots of those that fall are written again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from minivllm.engine.block_pool import NULL_BLOCK, CacheEntry
from minivllm.engine.engine import Engine
from minivllm.engine.plan import Done, Judged, Move, StepPlan, StepResult, Transfer, needs_token
from minivllm.engine.tables import slot_of
from minivllm.engine_config import EngineConfig
from minivllm.lab.fake_drafts import FakeDrafts
from minivllm.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a slot holds; `digest` covers every token up to this one."""

    token_id: int
    position: int
    digest: int


class FakeRunner:
    """Tokens 0 .. vocab_size-1; make 0 the engine's EOS to see requests end early.

    Each group of layers has slots of its own. With a window a token sees itself and the window - 1 before it: only
    those slots are read and verified. The digest still covers the whole prefix, as the K and V of a deep model nearly
    do, so the answers are those without a window.
    """

    def __init__(
        self,
        block_size: int,
        vocab_size: int = 12,
        windows: tuple[int | None, ...] = (None,),
        drafts: FakeDrafts | None = None,
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.windows = windows  # by group of layers
        self.drafts = drafts
        self.contents: dict[int, Fingerprint] = {}  # by slot
        self.host: dict[int, list[Fingerprint | None]] = {}  # by host block
        self.entries: dict[
            tuple[int, int], tuple[CacheEntry, list[Fingerprint]]
        ] = {}  # by serial and group, as first seen
        self.before: Callable[[StepPlan], None] = lambda plan: None  # looks at the plan
        self.after: Callable[[StepPlan], None] = lambda plan: None  # may raise or abort: the slots are written
        self.is_async = False  # whether the engine may launch a step before it knows the tokens of the last one
        self._written: dict[Request, tuple[int, int]] = {}  # preemptions so far, end of what was written since
        self._latest: dict[Request, int] = {}  # what the last step chose
        self._guessed: dict[Request, list[int]] = {}  # drafts, while a step runs

    def run(self, plan: StepPlan) -> StepResult:
        """Write the scheduled tokens, check all that stands before them, answer where a request is up to date."""
        self.before(plan)
        for transfer in plan.transfers:
            self._move(transfer)
        for block_id in plan.fresh_block_ids:
            self._store(block_id, [None] * self.block_size)
        self._guessed = {request: self._propose(request, plan) for request, _ in plan.scheduled}
        for request, num_new in plan.scheduled:
            self._write(request, num_new)
        up_to_date = [request for request, num_new in plan.scheduled if needs_token(request, num_new)]
        samples = [(request, sample) for request in up_to_date for sample in (request, *request.pending_forks)]
        answers = {sample.id: self._answer(request, sample.seed) for request, sample in samples}
        judged = {
            request.id: self._judge(request, answers[request.id]) for request in up_to_date if self._guessed[request]
        }
        self._guessed = {}
        self._latest = {request: answers[request.id][-1] for request in up_to_date}
        self.after(plan)
        return StepResult(answers, judged=judged)

    def launch(self, plan: StepPlan) -> Done:
        """As a GPU does: the engine learns later what was chosen, the next step reads it here."""
        allows_next = self.drafts is None and not any(r.is_steered or r.pending_forks for r, _ in plan.scheduled)
        return Done(self.run(plan), allows_next)

    def twin(self, num_host_blocks: int) -> "FakeRunner":
        """The same answers from slots of its own, all empty; it has as many host blocks as it is asked for."""
        return FakeRunner(self.block_size, self.vocab_size, self.windows, self.drafts)

    def save_block(self, block_id: int, *, on_host: bool = False) -> bytes:
        """What the block's slots hold, for another runner to load."""
        slots = range(block_id * self.block_size, (block_id + 1) * self.block_size)
        nothing = [None] * self.block_size
        block = self.host.get(block_id, nothing) if on_host else [self.contents.get(slot) for slot in slots]
        return json.dumps([held and (held.token_id, held.position, held.digest) for held in block]).encode()

    def load_block(self, block_id: int, contents: bytes, *, on_host: bool = False) -> None:
        """Put back what `save_block` gave."""
        block = [held and Fingerprint(*held) for held in json.loads(contents)]
        if on_host:
            self.host[block_id] = block
        else:
            self._store(block_id, block)

    def _move(self, transfer: Transfer) -> None:
        """What KVStorage does with bytes."""
        if transfer.move is Move.SWAP_IN:
            assert transfer.source_id in self.host, f"I16: host block {transfer.source_id} was never written"
            self._store(transfer.target_id, self.host[transfer.source_id])
            return
        block = [self.contents.get(transfer.source_id * self.block_size + i) for i in range(self.block_size)]
        if transfer.move is Move.SWAP_OUT:
            self.host[transfer.target_id] = block
        else:
            self._store(transfer.target_id, block)

    def _store(self, block_id: int, block: list[Fingerprint | None]) -> None:
        for offset, fingerprint in enumerate(block):
            slot = block_id * self.block_size + offset
            if fingerprint is None:
                self.contents.pop(slot, None)
            else:
                self.contents[slot] = fingerprint

    def _write(self, request: Request, num_new: int) -> None:
        start, end = request.num_computed, request.num_computed + num_new + len(self._guessed[request])
        num_preemptions, written = self._written.get(request, (0, start))
        assert start == written or num_preemptions < request.num_preemptions, (
            f"I9: {request.id} writes from {start}, wrote up to {written}"
        )
        digest = self._read(request, start, query=start)
        token_ids = self._tokens_of(request)
        for position in range(start, end):
            token_id = token_ids[position]
            digest = hash((digest, token_id))  # ints only: the same in every process
            for table in request.tables:
                slot = slot_of(position, table.block_ids, self.block_size)
                self.contents[slot] = Fingerprint(token_id, position, digest)
        self._written[request] = request.num_preemptions, end

    def _read(self, request: Request, end: int, query: int) -> int:
        """The digest of the first `end` tokens; every one that the token at `query` sees is verified in its slot."""
        digest, firsts_seen = 0, [0 if window is None else query - window + 1 for window in self.windows]
        for position, token_id in enumerate(self._tokens_of(request)[:end]):
            digest = hash((digest, token_id))
            for table, first_seen in zip(request.tables, firsts_seen, strict=True):
                if position < first_seen:
                    continue
                block_id = table.block_ids[position // self.block_size]
                assert block_id != NULL_BLOCK, f"I16: {request.id} at {position} is read by {query} and was dropped"
                slot = slot_of(position, table.block_ids, self.block_size)
                found, expected = self.contents.get(slot), Fingerprint(token_id, position, digest)
                assert found == expected, f"I16: {request.id} at {position}, slot {slot}: {found}, not {expected}"
        return digest

    def _propose(self, request: Request, plan: StepPlan) -> list[int]:
        num_drafts = plan.num_drafts.get(request.id, 0)
        if not num_drafts:
            return []
        assert self.drafts is not None, f"I11: {request.id} is to have drafts, and nobody drafts"
        digest = 0
        for token_id in request.token_ids:
            digest = hash((digest, token_id))
        truth = partial(self._choose, seed=request.seed)
        return self.drafts.propose(digest, num_drafts, truth, self.vocab_size)

    def _answer(self, request: Request, seed: int) -> list[int]:
        """The drafts that are what comes next, and one token more."""
        answer: list[int] = []
        for drafted in (*self._guessed[request], None):
            num_known = request.num_expected + len(answer)
            answer.append(self._choose(self._read(request, num_known, query=num_known - 1), seed))
            if answer[-1] != drafted:
                break
        return answer

    def _judge(self, request: Request, answer: list[int]) -> Judged:
        """What became of the drafts; the slots of those that fell may be written again."""
        assert self.drafts is not None
        drafts, num_preemptions = self._guessed[request], request.num_preemptions
        self._written[request] = num_preemptions, request.num_tokens + len(answer) - 1
        return Judged(self.drafts.method_of(request.params.speculative_method), tuple(drafts), len(answer) - 1)

    def _choose(self, digest: int, seed: int) -> int:
        return hash((digest, seed)) % self.vocab_size

    def _tokens_of(self, request: Request) -> list[int]:
        """Those that the engine knows, the one that it was promised, and while a step runs its drafts."""
        promised = [self._latest[request]] if request.num_promised else []
        guessed = self._guessed.get(request, [])
        return [*request.token_ids, *promised, *guessed] if promised or guessed else request.token_ids


class SilentRunner:
    """Answers token 0 at once, whatever the K and V."""

    def run(self, plan: StepPlan) -> StepResult:
        return StepResult({request.id: [0] for request, num_new in plan.scheduled if needs_token(request, num_new)})


def fake_engine(**options: Any) -> tuple[Engine, FakeRunner]:
    """Ten blocks of four tokens and room for all, unless told otherwise."""
    defaults: dict[str, Any] = {"num_blocks": 11, "block_size": 4, "max_model_len": 40, "watermark": 0.0}
    config = EngineConfig(**{**defaults, **options})
    runner = FakeRunner(config.block_size, windows=config.group_windows, drafts=fake_drafts(config))
    return Engine(config, runner), runner


def fake_drafts(config: EngineConfig, alpha: float = 0.7) -> FakeDrafts | None:
    """Drafts by the methods of the config, if it has any."""
    methods = tuple(each.method for each in config.speculative)
    return FakeDrafts(methods, alpha) if methods else None


def fake_request(
    id_: str, prompt: list[int] | range, max_tokens: int = 4, priority: int = 0, salt: str = "", **params: Any
) -> Request:
    """A request as the front would make it."""
    wish = SamplingParams(max_tokens=max_tokens, **params)
    return Request(id_, list(prompt), len(prompt), wish, max_tokens, priority=priority, salt=salt)
