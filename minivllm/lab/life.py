"""One life of an engine: everything that may happen to it, and a look at all of it after each step.

The runner is the fake one, so a life needs no model, and each answer can be compared with that of the request alone.
"""

from collections import Counter
from dataclasses import replace

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.engine_config import EngineConfig
from minivllm.errors import RequestError
from minivllm.events import Event
from minivllm.lab.fake_runner import FakeRunner, fake_drafts
from minivllm.lab.free_list_twin import FreeListTwin
from minivllm.lab.invariants import check_drained, check_invariants, check_plan, most_steps_to_drain
from minivllm.lab.witness import Witness
from minivllm.request import Request, Status

VOCAB_SIZE = 12


class RunnerError(Exception):
    """What a runner may raise."""


class Life:
    """An engine with a fake runner, its witnesses, and what each request was born with and given since."""

    def __init__(
        self,
        config: EngineConfig,
        seen: Counter[str],
        is_patient: bool = False,
        is_async: bool = False,
        alpha: float = 0.7,
    ) -> None:
        drafts = fake_drafts(config, alpha)
        self.runner = FakeRunner(config.block_size, VOCAB_SIZE, config.group_windows, drafts)
        self.runner.is_async = is_async
        self.engine = Engine(config, self.runner)
        is_lru = config.eviction_policy == "lru" and config.prefix_cache == "hash"
        self.twin = FreeListTwin(config.num_blocks, is_lru)
        self.witness = Witness(self.engine, seen)
        self.engine.events.listen(self._hear)
        self._objection: AssertionError | None = None
        self.seen = seen
        self.requests: dict[str, Request] = {}  # all that were ever taken in
        self.births: dict[str, list[int]] = {}  # the tokens that each began with: a prompt, or its parent's so far
        self.given: dict[str, list[int]] = {}  # the tokens that were chosen for a steered one since
        self.is_patient = is_patient  # who steers waits until all that are steered are held, as a beam search does
        self.fails_next = False
        self.abort_next: str | None = None
        self.runner.before = self._look_at
        self.runner.after = self._disturb

    @property
    def alive(self) -> list[str]:
        return list(self.engine.requests)

    @property
    def held(self) -> list[str]:
        """Those who wait for a choice that can be made now."""
        steered = [request for request in self.engine.requests.values() if request.is_steered]
        held = [request.id for request in steered if request.is_held]
        return held if not self.is_patient or len(held) == len(steered) else []

    def add(self, leader: Request) -> None:
        """Add a request and the samples that are to fork off it, or see it refused with nothing changed."""
        longest = self.engine.config.max_model_len - 1
        before = self.engine.state_hash()
        try:
            self.engine.add(leader)
        except RequestError:
            assert not 0 < leader.num_prompt <= longest, "I15: refused without need"
            assert self.engine.state_hash() == before, "I15: a refusal left a trace"
            return
        assert 0 < leader.num_prompt <= longest, "I15: taken though it cannot run"
        for request in (leader, *leader.pending_forks):
            self._register(request)
        self.seen["prompt logprobs"] += leader.params.prompt_logprobs is not None
        self.seen["samples"] += len(leader.pending_forks)
        self.check()

    def fork(self, parent_id: str, new_id: str, seed: int | None) -> None:
        """Split a request in two, in whatever state it is; not if the step that is under way ends it."""
        parent = self.engine.requests[parent_id]
        self._judge(self.engine.catch_up())
        self.check()
        if parent.is_finished:
            return
        self.seen[f"fork {self.state_of(parent)}"] += 1
        has_table = bool(parent.block_ids)
        child = self.engine.fork(parent_id, new_id, seed)
        self._register(child)
        self.seen["fork without a seat"] += has_table and not child.block_ids
        self.seen["fork outside a window"] += any(table.num_dropped for table in child.tables)
        self.check()

    def choose(self, request_id: str, token_id: int) -> None:
        """Give a held request its next token."""
        self.given[request_id].append(token_id)
        self.engine.append(request_id, token_id)
        self.check()

    def step(self) -> None:
        """One step of the engine, which may be told to fail."""
        self.seen["steps"] += 1
        num_lingering = len(self.engine.scheduler.lingering)
        try:
            advanced = self.engine.step()
        except RunnerError:
            self.seen["failed step"] += 1
        except AssertionError as error:
            if isinstance(error.__context__, AssertionError):  # the clean-up after the failure failed as well
                raise error.__context__ from None
            raise
        else:
            self._judge(advanced)
            self.seen["lingering"] += len(self.engine.scheduler.lingering) > 0
            is_cleared = num_lingering > 0 == len(self.engine.scheduler.lingering)
            self.seen["lingering cleared under pressure"] += is_cleared and len(self.engine.scheduler.running) > 0
        self.fails_next, self.abort_next = False, None
        self.check()

    def abort(self, request_id: str) -> None:
        self.seen[f"abort {self.state_of(self.engine.requests[request_id])}"] += 1
        assert self.engine.abort(request_id) and not self.engine.abort(request_id)
        self.check()

    def finish_at_stop_string(self, request_id: str) -> None:
        self.seen["stop string"] += 1
        assert self.engine.finish(request_id, "stop", "\n")
        assert self.requests[request_id].stop_reason == "\n"
        self.check()

    def pin(self, name: str, token_ids: list[int], salt: str) -> None:
        """Pin a prefix if it is cached and leaves room, or see the wish refused with nothing changed."""
        before = self.engine.state_hash()
        try:
            self.engine.pins.pin(name, token_ids, salt)
        except RequestError:
            assert self.engine.state_hash() == before, "I15: a refused pin left a trace"
            self.seen["pin refused"] += 1
        self.check()

    def unpin(self, name: str) -> None:
        self.engine.pins.unpin(name)
        self.check()

    def reset_cache(self) -> None:
        holders = [*self.engine.requests.values(), *self.engine.scheduler.lingering]
        is_held = any(table.live_ids for request in holders for table in request.tables)
        is_idle = not is_held and not self.engine.pins.blocks_of
        self.twin.is_resetting = self.witness.is_resetting = True
        assert self.engine.kv.reset_cache() == is_idle, "I2: a reset of the cache misjudged who holds blocks"
        self.twin.is_resetting = self.witness.is_resetting = False
        self.seen["reset" if is_idle else "reset refused"] += 1
        if is_idle:
            assert all(block.entry is None for block in self.engine.kv.pool.blocks), "I6: a reset left an entry"
        self.check()

    def drain(self) -> None:
        """I15: all that is there ends in time; I13: nothing stays; each answer is that of the request alone."""
        num_steps, most_steps = 0, self._most_steps()
        while self.engine.has_work:
            assert num_steps < most_steps, f"I15: {self.alive} still here after {num_steps} steps"
            held = self.held
            if held and self.is_patient:  # so many steps until all that are steered are held, and again for each token
                num_steps, most_steps = 0, self._most_steps()
            for request_id in held:
                self.choose(request_id, len(self.given[request_id]) % VOCAB_SIZE)
            if self.engine.has_work:
                self.step()
                num_steps += 1
        for name in list(self.engine.pins.blocks_of):
            self.unpin(name)
        check_drained(self.engine)
        for request in self.requests.values():
            self._compare_with_alone(request)

    def check(self) -> None:
        check_invariants(self.engine, self.runner)
        self._object()
        self.twin.check(self.engine.kv.pool)
        self.witness.check()

    def state_of(self, request: Request) -> str:
        """In which of the states that matter a request is: each must have met an abort and a fork."""
        if request not in self.engine.scheduler.running and request not in self.engine.scheduler.waiting:
            return "pending"
        if request.status is Status.WAITING:
            kind = "swapped" if request.host_ids else "preempted" if request.num_preemptions else "waiting"
            return f"{kind} held" if request.is_held else kind
        if request.is_held:
            return "held"
        if request.num_computed < request.num_prompt:
            return "leader in prefill" if request.pending_forks else "in prefill"
        return "in decode" if request.num_computed % self.engine.config.block_size else "at a block edge"

    def _judge(self, advanced: list[Request]) -> None:
        for request in advanced:
            assert request.num_output > 0 or request.is_held, f"I15: {request.id} is said to have got a token"
            if request.is_finished:
                self.seen[f"end {request.finish_reason}"] += 1
                self.seen["end stop token"] += request.stop_reason is not None
                under_way = self.engine.plan_in_flight
                self.seen["a token too many"] += under_way is not None and request in dict(under_way.scheduled)

    def _hear(self, event: Event) -> None:
        """Note the first false event; it is held against the engine when the plan or the state was looked at.

        So a state that contradicts itself is told by its own invariant, and no listener stops the engine half-way.
        """
        if self._objection is None:
            try:
                self.twin(event)
                self.witness(event)
            except AssertionError as error:
                self._objection = error

    def _object(self) -> None:
        if self._objection is not None:
            raise self._objection

    def _most_steps(self) -> int:
        """Steps that are enough, and one for each that is held: it may have to make room first."""
        num_steps = most_steps_to_drain(self.engine) + sum(r.is_held for r in self.engine.requests.values())
        return num_steps * (1 + self.runner.is_async) + 1  # one that plans, one that reads, where they are apart

    def _register(self, request: Request) -> None:
        self.requests[request.id] = request
        self.births[request.id] = list(request.token_ids)
        self.given[request.id] = []

    def _compare_with_alone(self, request: Request) -> None:
        birth = self.births[request.id]
        expected, reason = alone(request, birth, self.given[request.id], self.engine.config.eos_token_ids)
        if request.finish_reason == "abort" or isinstance(request.stop_reason, str):
            expected = expected[: request.num_tokens]
        else:
            assert request.finish_reason == reason, f"I16: {request.id} ended by {request.finish_reason}, not {reason}"
        assert request.token_ids == expected, f"I16: {request.id} has other tokens than alone"

    def _look_at(self, plan: StepPlan) -> None:
        check_plan(self.engine, plan)
        self._object()
        self.witness.check_plan(plan)
        self.seen["short with a step under way"] += plan.is_short
        chunks = [r.num_computed + n < r.num_expected for r, n in plan.scheduled]
        self.seen["chunk"] += any(chunks)
        self.seen["chunk beside decode"] += any(chunks) and any(r.num_output for r, _ in plan.scheduled)
        self.seen["drafts beside a prompt"] += bool(plan.num_drafts) and any(n > 1 for _, n in plan.scheduled)
        self.seen["drafts in a window"] += bool(plan.num_drafts) and any(
            t.num_dropped for r, _ in plan.scheduled for t in r.tables
        )
        first_waiting = min((r.arrival for r in self.engine.scheduler.waiting), default=0)
        self.seen["overtaken"] += any(r.arrival > first_waiting > 0 for r, _ in plan.scheduled)

    def _disturb(self, plan: StepPlan) -> None:
        if self.abort_next in self.engine.requests:
            self.seen["abort in a step"] += self.engine.abort(self.abort_next)
            self.seen["abort in a step with drafts"] += self.abort_next in plan.num_drafts
        if self.fails_next:
            self.fails_next = False
            others = [r for r in self.engine.requests.values() if r not in [s for s, _ in plan.scheduled]]
            self.seen["others unharmed"] += bool(others)
            raise RunnerError


def alone(request: Request, birth: list[int], given: list[int], eos: tuple[int, ...]) -> tuple[list[int], str | None]:
    """All tokens of a request, and why it ends, on an engine that has room for everything and shares nothing."""
    config = EngineConfig(
        num_blocks=9, block_size=16, max_model_len=128, enable_prefix_caching=False, eos_token_ids=eos
    )
    engine = Engine(config, FakeRunner(config.block_size, VOCAB_SIZE))
    params = replace(request.params, speculative_method=None)  # nobody drafts here
    twin = Request(
        request.id, list(birth), request.num_prompt, params, request.max_tokens, seed=request.seed,
        is_steered=request.is_steered,
    )  # fmt: skip
    engine.add(twin)
    choices = iter(given)
    while engine.has_work:
        engine.step()
        if twin.is_held:
            token_id = next(choices, None)
            if token_id is None:
                break
            engine.append(twin.id, token_id)
    return twin.token_ids, twin.finish_reason
