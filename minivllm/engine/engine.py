"""The loop: schedule, run, update. Decides with plain ints; the runner that computes is handed in."""

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import xxhash

from minivllm.engine.drafting import SpeculationStats
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.pins import Pins
from minivllm.engine.plan import Done, Launched, Launcher, Runner, StepPlan, StepResult, with_accepted
from minivllm.engine.scheduler import Scheduler
from minivllm.engine_config import EngineConfig
from minivllm.errors import RequestError
from minivllm.events import Added, EventBus, Refused, StepRan
from minivllm.request import Request, Status
from minivllm.speculative_config import OFF


@dataclass(frozen=True)
class InFlight:
    """A step that was launched and whose tokens nobody has read."""

    plan: StepPlan
    launched: Launched
    allows_next: bool  # before its tokens are read
    stored: tuple[tuple[str, int, int], ...]  # of each request: new tokens, tokens stored after it
    is_heard: bool
    started_s: float
    planned_s: float


class Engine:
    """Requests in, tokens out. One thread at a time may call it; LLM guards it with a lock."""

    def __init__(self, config: EngineConfig, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = self.built_config = config
        self.runner = runner
        self.clock = clock  # seconds; a simulation passes its own
        self.events = EventBus()
        self.kv = KVManager(config, self.events)
        self.pins = Pins(self.kv)
        self.scheduler = Scheduler(config, self.kv, self.events, clock)
        self.requests: dict[str, Request] = {}
        self.last_result = StepResult({})
        self._num_arrived = 0
        self._is_in_step = False
        self._in_flight: InFlight | None = None
        self._last_end_s = 0.0  # when the tokens of the last step were there

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def speculation(self) -> SpeculationStats:
        """Counts of all drafts so far; by method in `scheduler.drafting.stats_of`."""
        return self.scheduler.drafting.stats

    @property
    def plan_in_flight(self) -> StepPlan | None:
        """The step that was launched and is not booked yet."""
        return self._in_flight.plan if self._in_flight else None

    def add(self, request: Request) -> None:
        """Queue a request and the samples that are to fork off it, max_tokens cut to the room they have.

        Raises RequestError when it could never run.
        """
        assert not (request.is_steered and request.pending_forks), "steered requests are forked by their owner"
        samples = [request, *request.pending_forks]
        if reason := self._reason_to_refuse(request, [sample.id for sample in samples]):
            self.events.emit(Refused(self.scheduler.step, request.id, reason))
            raise RequestError(f"request {request.id}: {reason}")
        for sample in samples:
            sample.max_tokens = min(sample.max_tokens, self.config.max_model_len - sample.num_prompt)
            self._register(sample)
            added = Added(self.scheduler.step, sample.id, sample.num_prompt, sample.max_tokens, sample.priority)
            self.events.emit(added)
        self.scheduler.add(request)

    def fork(
        self,
        request_id: str,
        new_id: str,
        seed: int | None = None,
        *,
        token_ids: Sequence[int] = (),
        max_tokens: int | None = None,
    ) -> Request:
        """Split a request in two, in any state: the new one has the same tokens and shares every block.

        With `token_ids` it goes on from those, and all that stands before its own output is its prompt. Raises
        RequestError for an unknown request, an id in use, a prompt that is too long, and in the middle of a step.
        """
        parent = self._parent(request_id, new_id, len(token_ids))
        num_prompt = parent.num_tokens + len(token_ids) if token_ids else parent.num_prompt
        room = self.config.max_model_len - num_prompt
        child = Request(
            id=new_id,
            token_ids=[*parent.token_ids, *token_ids],
            num_prompt=num_prompt,
            params=parent.params,
            max_tokens=min(parent.max_tokens if max_tokens is None else max_tokens, room),
            seed=parent.seed if seed is None else seed,
            priority=parent.priority,
            salt=parent.salt,
            is_steered=parent.is_steered,
        )
        self._register(child)
        self.events.emit(Added(self.scheduler.step, child.id, child.num_prompt, child.max_tokens, child.priority))
        self.scheduler.fork(parent, child)
        return child

    def append(self, request_id: str, token_id: int) -> None:
        """Give a steered request, whose logits were delivered, its next token; it may end the request.

        Raises RequestError for a request that is not here, that chooses its own tokens, or whose logits are to come.
        """
        request = self.requests.get(request_id)
        is_computing = request is not None and request.status is Status.RUNNING and not request.is_held
        if request is None or not request.is_steered or is_computing:
            raise RequestError(f"append: request {request_id!r} does not wait for a token from outside")
        self.scheduler.append(request, [token_id])
        if request.is_finished:
            del self.requests[request_id]

    def limit(self, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        """Other limits from the next step on, as `EngineConfig.limited` takes them; who runs beyond them goes on."""
        self.config = self.scheduler.config = self.built_config.limited(max_num_seqs, max_num_batched_tokens)

    def step(self) -> list[Request]:
        """Advance every scheduled request; return those that got a token.

        A runner that need not wait is given the next step before the tokens of the last one are read: those are what
        is returned then, and a request that they end has a token too many under way, which nobody will see. When the
        runner fails, the requests it ran are dropped (they would fail again), all others stay.
        """
        self.last_result = StepResult({})
        before, is_async = self._in_flight, getattr(self.runner, "is_async", False)
        if before and not (is_async and before.allows_next):
            return self.catch_up()
        started_s = time.perf_counter()
        plan = self.scheduler.schedule(is_under_way=before is not None)
        if before and not plan.scheduled:
            return self.catch_up()  # all who run are about to end, or the pool is short
        is_stuck = not plan.scheduled and not plan.preempted and not all(r.is_held for r in self.requests.values())
        assert not is_stuck, "I15: requests wait and nothing can run"
        self._in_flight = self._launch(plan, started_s, is_async=is_async)
        if before:
            return self._collect(before)
        return [] if self._in_flight.allows_next else self.catch_up()

    def catch_up(self) -> list[Request]:
        """Wait for the step that is under way, if one is; return the requests that got a token."""
        step, self._in_flight, self.last_result = self._in_flight, None, StepResult({})
        return self._collect(step) if step else []

    def finish(self, request_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        """End a request in any state; False when it is not here (any more)."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return False
        self.scheduler.finish(request, reason, stop_reason)
        return True

    def abort(self, request_id: str) -> bool:
        """Drop a request and give its blocks back; False when it is not here (any more)."""
        return self.finish(request_id, "abort")

    def state_hash(self) -> str:
        """One short string for what steps change: queues, tables, owners, cache, order of the free list.

        What a request asked for (params, seed, max_tokens) never changes and is not in it.
        """
        pool, digest = self.kv.pool, xxhash.xxh3_64()
        for queue in (self.scheduler.running, self.scheduler.waiting):
            for r in queue:
                tables = [(table.block_ids, table.num_dropped) for table in r.tables]
                drafts = (r.draft_length, r.num_losses, r.drafts_again_at) if self.config.speculative else ()
                held = (tables, r.reserved_ids, r.host_ids, *drafts)
                forks = [fork.id for fork in r.pending_forks]
                digest.update(
                    repr((r.id, r.num_computed, r.num_promised, r.num_preemptions, held, forks, r.is_held)).encode()
                )
                digest.update(array("q", r.token_ids).tobytes())
            digest.update(b"|")
        lingering = [(r.id, [t.block_ids for t in r.tables]) for r in self.scheduler.lingering]
        digest.update(repr((self.pins.blocks_of_ids(), self.scheduler.swap.free_ids, lingering)).encode())
        digest.update(array("q", [block.ref_count for block in pool.blocks]).tobytes())
        digest.update(array("Q", [block.entry.block_hash if block.entry else 0 for block in pool.blocks]).tobytes())
        digest.update(array("q", pool.free_ids()).tobytes())
        digest.update(array("q", [use for b in pool.blocks for use in (b.num_hits, b.last_used, b.priority)]).tobytes())
        return digest.hexdigest()

    def _launch(self, plan: StepPlan, started_s: float, *, is_async: bool) -> InFlight:
        """Have the plan computed, and book it as if it were."""
        planned_s = time.perf_counter()
        is_heard = bool(self.events)  # who begins to listen in the middle of a step hears of the next one
        stored = [(r.id, num_new, r.num_computed + num_new) for r, num_new in plan.scheduled] if is_heard else []
        try:
            launched = self._run(plan, is_async=is_async)
        except Exception:
            self._drop(plan)
            if self._in_flight:  # whose tokens the runner may no longer have
                self._in_flight = replace(self._in_flight, allows_next=False)
            raise
        self.scheduler.promise(plan)
        allows_next = launched.allows_next and not plan.is_short
        return InFlight(plan, launched, allows_next, tuple(stored), is_heard, started_s, planned_s)

    def _run(self, plan: StepPlan, *, is_async: bool) -> Launched:
        """Hand the plan to the runner; nobody may fork meanwhile, for nobody knows what is stored."""
        self._is_in_step = True
        try:
            return cast(Launcher, self.runner).launch(plan) if is_async else Done(self.runner.run(plan))
        finally:
            self._is_in_step = False

    def _collect(self, step: InFlight) -> list[Request]:
        """Wait for a launched step and book its tokens."""
        begun_s = max(step.planned_s, self._last_end_s)
        try:
            self.last_result = step.launched.result()
        except Exception:
            self._drop(step.plan)
            raise
        self._last_end_s = time.perf_counter()
        advanced = self.scheduler.update(step.plan, self.last_result)
        self.scheduler.drafting.end_step(self.last_result, step.plan.step)
        for request in advanced:
            if request.is_finished:
                self.requests.pop(request.id, None)
        if step.is_heard:
            self._report(step, begun_s)
        return advanced

    def _drop(self, plan: StepPlan) -> None:
        for request, _ in plan.scheduled:
            self.finish(request.id, "abort")

    def _parent(self, request_id: str, new_id: str, num_own: int) -> Request:
        """The request to fork; see `fork` for what is refused."""
        parent = self.requests.get(request_id)
        if parent is None:
            raise RequestError(f"fork: no request {request_id!r} is here (any more); fork before it finishes")
        if new_id in self.requests:
            raise RequestError(f"fork: the id {new_id!r} is in use; give each request an id of its own")
        if self._is_in_step or parent.num_promised:
            raise RequestError(f"fork: a step is computing {request_id!r}; fork between two steps, after catch_up()")
        if num_own and parent.num_tokens + num_own >= self.config.max_model_len:
            raise RequestError(
                f"fork: {parent.num_tokens} tokens and {num_own} of its own leave no room for one new token in "
                f"max_model_len {self.config.max_model_len}; give fewer"
            )
        return parent

    def _register(self, request: Request) -> None:
        self._num_arrived += 1
        request.arrival = self._num_arrived
        request.arrival_s = request.arrival_s or self.clock()
        self.requests[request.id] = request

    def _reason_to_refuse(self, request: Request, ids: list[str]) -> str | None:
        if len(set(ids)) < len(ids) or any(id_ in self.requests for id_ in ids):
            return "its id is in use; give each request an id of its own"
        if request.num_prompt == 0:
            return "the prompt is empty; give at least one token"
        if request.num_prompt >= self.config.max_model_len:
            return (
                f"the prompt has {request.num_prompt} tokens and max_model_len is {self.config.max_model_len}, "
                "which must leave room for one new token; shorten the prompt or raise max_model_len"
            )
        wished, methods = request.params.speculative_method, self.scheduler.drafting.configs
        if wished not in (None, OFF, *methods):
            known = f"drafts by {', '.join(methods)}" if methods else "was built without drafts"
            return f"speculative_method is {wished!r} and this engine {known}; see speculative_config"
        # Whatever passes here fits: the pool holds max_model_len tokens (EngineConfig), and max_tokens is cut to it.
        return None

    def _report(self, step: InFlight, begun_s: float) -> None:
        updated_s = time.perf_counter()
        new_tokens = tuple((id_, tuple(tokens)) for id_, tokens in self.last_result.new_token_ids.items())
        self.events.emit(
            StepRan(
                step=step.plan.step,
                scheduled=tuple(with_accepted(step.stored, self.last_result)),
                new_tokens=new_tokens,
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free=self.kv.pool.num_free,
                schedule_ms=(step.planned_s - step.started_s) * 1e3,
                run_ms=(self._last_end_s - begun_s) * 1e3,
                update_ms=(updated_s - self._last_end_s) * 1e3,
                state_hash=self.state_hash() if self.events.hash_readers else "",
            )
        )
