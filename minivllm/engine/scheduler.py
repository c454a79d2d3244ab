"""What runs next. One rule serves prefill, chunks and decode: `num_computed` catches up with `num_tokens`.

A step has one token budget. Requests that run come first, in the policy's order, each with the tokens it lacks or
what is left of the budget. When the pool is short, the last in order loses its blocks and waits again (preemption).
Then waiting requests are admitted, unless something was preempted: the pool is too full for guests.

    batching        a step holds                                     guests are admitted
    chunked         decodes, then prompts cut to the budget          in every step
    decode_first    decodes, then prompts that fit whole             in every step
    prefill_first   whole prompts if any can be admitted,            before the others advance
                    else decodes
    request_level   as chunked                                       when the whole batch has ended
    static          the same, and who ends keeps its blocks          when the whole batch has ended
                    until the batch is over
"""

from collections.abc import Callable, Iterable

from minivllm.engine.admission import Admission
from minivllm.engine.drafting import Drafting
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import Scheduled, StepPlan, StepResult, needs_token
from minivllm.engine.policies import RequestQueue, order_of
from minivllm.engine.swap import SwapSpace
from minivllm.engine.under_way import Computing, computing
from minivllm.engine_config import EngineConfig
from minivllm.events import EventBus, Finished, Forked, Preempted, Waited
from minivllm.request import Request, Status


class Scheduler(Admission):
    """Decides each step and digests its result; the only place where requests change state."""

    def __init__(self, config: EngineConfig, kv: KVManager, events: EventBus, clock: Callable[[], float]) -> None:
        self.config = config
        self.kv = kv
        self.drafting = Drafting(config, kv, events)
        self.swap = SwapSpace(config.num_host_blocks, kv)
        self.events = events
        self.running = RequestQueue(order_of(config))
        self.waiting = RequestQueue(order_of(config))
        self.lingering: list[Request] = []  # static batching: they ended and keep their blocks
        self.step = 0
        self._clock = clock
        self._is_under_way = self._is_short = False  # of the step that is being planned
        self._launched: Scheduled = []  # by the latest step, which may be under way

    def add(self, request: Request) -> None:
        request.arrival_step = self.step
        self.waiting.add(request)

    def schedule(self, *, is_under_way: bool = False) -> StepPlan:
        """Plan one step: advance those that run and admit guests, in the order of the batching policy.

        While another step is under way nobody is preempted, for it may end requests: the plan says that it is short.
        """
        self.step += 1
        self.kv.step = self.step
        self._is_under_way, self._is_short = is_under_way, False
        budget, preempted = self.config.max_num_batched_tokens, list[Request]()
        scheduled: Scheduled = []
        if self.config.batching == "prefill_first":
            scheduled = self._admit_waiting(budget, self._computing())
        if not scheduled:
            scheduled = self._advance_running(budget, preempted)
            if preempted and self.waiting:
                self.events.emit(Waited(self.step, self.waiting.first.id, "just_preempted"))
            elif self.config.batching != "prefill_first" and not self._is_short:  # they would take what others lack
                num_tokens = sum(num_new for _, num_new in scheduled)
                scheduled += self._admit_waiting(budget - num_tokens, self._computing(scheduled))
        if not scheduled and not preempted and not is_under_way:
            self._unblock(preempted)
        num_drafts = {} if preempted or is_under_way else self.drafting.plan(scheduled, self.config)
        fresh_block_ids, transfers = self.kv.drain_work()
        return StepPlan(self.step, scheduled, fresh_block_ids, preempted, transfers, num_drafts, self._is_short)

    def promise(self, plan: StepPlan) -> None:
        """Book what a launched step will have computed and chosen, for whoever plans the next one before it ends."""
        self._launched = plan.scheduled
        for request, num_new in plan.scheduled:
            if request.status is Status.RUNNING:  # else it was aborted while the step ran
                request.num_promised += needs_token(request, num_new) and not request.is_steered
                request.num_computed += num_new

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Append the tokens that a promised step chose, publish full blocks; return the requests that got a token."""
        advanced, size = [], self.config.block_size
        for request, _ in plan.scheduled:
            if request.status is not Status.RUNNING:
                continue  # it ended since the step was planned: its blocks are gone already
            if request.num_computed >= (request.num_published + 1) * size:
                self.kv.publish(request)
            if self.kv.frees_windows:
                self.kv.drop_outside_window(request)
            new_token_ids = result.new_token_ids.get(request.id)
            if not new_token_ids:
                continue
            request.num_promised -= not request.is_steered
            if request.is_steered:
                request.is_held = True
                advanced.append(request)
                continue
            forks = self._start_forks(request) if request.pending_forks else ()
            self.append(request, new_token_ids)
            if request.id in plan.num_drafts:
                self.drafting.book(request, result, self.step)
            advanced.append(request)
            for fork in forks:
                self.append(fork, result.new_token_ids[fork.id])
                advanced.append(fork)
        return advanced

    def append(self, request: Request, new_token_ids: list[int]) -> None:
        """Append tokens up to the one that ends the request; all but the last are accepted drafts."""
        request.is_held = False
        if request.first_token_s is None:
            request.first_token_s = self._clock()
        for index, token_id in enumerate(new_token_ids):
            request.num_computed += index > 0  # the draft before it is stored
            request.token_ids.append(token_id)
            reason = request.end_reason(token_id, self.config.eos_token_ids)
            if reason:
                if index > 0:
                    self.kv.publish(request)
                is_eos = token_id in self.config.eos_token_ids and not request.params.ignore_eos
                self.finish(request, reason, token_id if reason == "stop" and not is_eos else None)
                del new_token_ids[index + 1 :]  # nobody gets what stands behind the end

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Take a request out, wherever it is, and give its blocks back."""
        queue = self.running if request.status is Status.RUNNING else self.waiting
        if request in queue:
            queue.remove(request)
        else:
            for leader in (other for other in (*self.running, *self.waiting) if request in other.pending_forks):
                leader.pending_forks.remove(request)
        for fork in request.pending_forks:  # their leader leaves before they began: each goes its own way
            self.add(fork)
        request.pending_forks, request.num_promised = [], 0
        self._let_go(request, reason)
        request.status, request.finish_reason, request.stop_reason = Status.FINISHED, reason, stop_reason
        request.finished_s = self._clock()
        self.events.emit(Finished(self.step, request.id, reason, request.num_output))

    def fork(self, parent: Request, child: Request) -> None:
        """Let `child` go on from where `parent` stands: with its blocks if there is a seat, else from the queue."""
        has_seat = parent.status is Status.RUNNING and len(self.running) < self.config.max_num_seqs
        child.arrival_step = parent.arrival_step
        if has_seat and self.kv.fork(parent, child):
            child.status, child.first_scheduled_s = Status.RUNNING, self._clock()
            has_own = child.num_tokens > parent.num_tokens  # what it shares is prompt to it, and there is more to do
            child.num_cached = child.num_computed if has_own else parent.num_cached
            child.is_held = parent.is_held and not has_own
            self.running.add(child)
        else:
            child.is_held = False
            self.waiting.add(child)
        first, *others = (tuple(table.block_ids) for table in child.tables)
        self.events.emit(Forked(self.step, child.id, parent.id, first, child.num_computed, tuple(others)))

    def _advance_running(self, budget: int, preempted: list[Request]) -> Scheduled:
        scheduled: Scheduled = []
        for request in list(self.running):
            num_new = min(request.num_missing, budget)
            if request.status is not Status.RUNNING or num_new == 0:
                continue  # preempted by one before it, held by its owner, promised its last token, or no budget left
            if self._make_room(request, num_new, preempted):
                scheduled.append((request, num_new))
                budget -= num_new
            elif self._is_short:
                break
        return scheduled

    def _make_room(self, request: Request, num_new: int, preempted: list[Request]) -> bool:
        """Grow the request's table, preempting from the end of the order; False when it fell itself, or must wait."""
        while not self.kv.grow(request, num_new):
            if self.lingering:
                self._clear_lingering()
                continue
            if self._is_under_way:
                self._is_short = True
                return False
            victim = self.running.last  # never one already scheduled: those stand before `request` in the order
            held = [other for other in self.running if other.is_held] if victim is request else []
            if held:
                victim = held[-1]  # whose owner may wait for `request`: it would be admitted and fall again for ever
            self._preempt(victim, "held" if held else "itself" if victim is request else "no_blocks")
            preempted.append(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, reason: str) -> None:
        num_computed = victim.num_computed
        is_swapped = self.config.preemption_mode == "swap" and self.swap.swap_out(victim)
        how = "swap" if is_swapped else "recompute"
        self.events.emit(Preempted(self.step, victim.id, num_computed, reason, how))
        if not is_swapped:
            self.kv.release(victim)
        self.running.remove(victim)
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self.waiting.add(victim)
        if not self.running:
            self._clear_lingering()

    def _computing(self, scheduled: Iterable[tuple[Request, int]] = ()) -> Computing:
        return computing(scheduled, self._launched if self._is_under_way else ())

    def _unblock(self, preempted: list[Request]) -> None:
        """All who run wait for their owners' choice: the last makes room for one who can be computed."""
        if self.running and any(not request.is_held for request in self.waiting):
            victim = self.running.last
            self._preempt(victim, "held")
            preempted.append(victim)

    def _start_forks(self, request: Request) -> list[Request]:
        """The samples that waited for this prompt begin, with its blocks and, next, tokens of their own."""
        forks, request.pending_forks = request.pending_forks, []
        for fork in forks:
            fork.token_ids = list(request.token_ids)
            self.fork(request, fork)
        return forks

    def _let_go(self, request: Request, reason: str) -> None:
        """Give blocks back; in a static batch who ended keeps them until the last one has."""
        self.swap.forget(request)
        if self.config.batching == "static" and reason != "abort" and self.running:
            self.lingering.append(request)
            return
        self.kv.release(request)
        if not self.running:
            self._clear_lingering()

    def _clear_lingering(self) -> None:
        for request in self.lingering:
            self.kv.release(request)
        self.lingering = []
