"""What runs next. One rule serves prefill, chunks and decode: `num_computed` catches up with `num_tokens`.

A step has one token budget. Requests that run come first, in the policy's order, each with the tokens it lacks or
what is left of the budget. When the pool is short, the last in order loses its blocks and waits again (preemption
by recompute). Then waiting requests are admitted, unless something was preempted: the pool is too full for guests.
"""

import time

from minivllm.config import EngineConfig
from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.engine.policies import POLICIES, RequestQueue
from minivllm.events import Admitted, EventBus, Finished, Preempted, Waited
from minivllm.request import Request, Status


class Scheduler:
    """Decides each step and digests its result; the only place where requests change state."""

    def __init__(self, config: EngineConfig, kv: KVManager, events: EventBus) -> None:
        self.config = config
        self.kv = kv
        self.events = events
        self.running = RequestQueue(POLICIES[config.scheduling_policy])
        self.waiting = RequestQueue(POLICIES[config.scheduling_policy])
        self.step = 0

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def schedule(self) -> StepPlan:
        """Plan one step: advance those that run, then admit as many as seats, budget and pool allow."""
        self.step += 1
        self.kv.step = self.step
        self.kv.taken_ids = []
        scheduled, preempted, budget = self._advance_running(self.config.max_num_batched_tokens)
        if preempted and self.waiting:
            self.events.emit(Waited(self.step, self.waiting.first.id, "just_preempted"))
        else:
            scheduled += self._admit_waiting(budget)
        return StepPlan(self.step, scheduled, self.kv.taken_ids, preempted)

    def update(self, plan: StepPlan, result: StepResult) -> list[Request]:
        """Book what was computed, append the new tokens; return the requests that got one."""
        advanced = []
        for request, num_new in plan.scheduled:
            if request.status is not Status.RUNNING:
                continue  # aborted while the step ran: its blocks are gone already
            request.num_computed += num_new
            self.kv.publish(request)
            new_token_ids = result.new_token_ids.get(request.id)
            if new_token_ids:
                self._append(request, new_token_ids)
                advanced.append(request)
        return advanced

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Take a request out, wherever it is, and give its blocks back."""
        queue = self.running if request.status is Status.RUNNING else self.waiting
        queue.remove(request)
        self.kv.release(request)
        request.status = Status.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.finished_s = time.monotonic()
        self.events.emit(Finished(self.step, request.id, reason, request.num_output))

    def _advance_running(self, budget: int) -> tuple[list[tuple[Request, int]], list[Request], int]:
        scheduled: list[tuple[Request, int]] = []
        preempted: list[Request] = []
        for request in list(self.running):
            num_new = min(request.num_tokens - request.num_computed, budget)
            if request.status is not Status.RUNNING or num_new == 0:
                continue  # preempted by one before it, or no budget left
            if self._make_room(request, num_new, preempted):
                scheduled.append((request, num_new))
                budget -= num_new
        return scheduled, preempted, budget

    def _make_room(self, request: Request, num_new: int, preempted: list[Request]) -> bool:
        """Grow the request's table, preempting from the end of the order; False when it fell itself."""
        while not self.kv.grow(request, num_new):
            victim = self.running.last  # never one already scheduled: those stand before `request` in the order
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request) -> None:
        self.events.emit(Preempted(self.step, victim.id, victim.num_computed))
        self.running.remove(victim)
        self.kv.release(victim)
        victim.status = Status.WAITING
        victim.num_preemptions += 1
        self.waiting.add(victim)

    def _admit_waiting(self, budget: int) -> list[tuple[Request, int]]:
        scheduled: list[tuple[Request, int]] = []
        while self.waiting:
            request = self.waiting.first
            matched = self.kv.match(request)
            num_missing = request.num_tokens - len(matched) * self.config.block_size
            num_new = min(num_missing, budget)
            if reason := self._reason_to_wait(num_new, num_missing):
                self.events.emit(Waited(self.step, request.id, reason))
                break
            # A lone request may use the last block; beside others, the watermark leaves them room to grow.
            if not self.kv.can_admit(request, matched, num_new, keep_watermark=len(self.running) > 0):
                self.events.emit(Waited(self.step, request.id, "no_blocks"))
                break
            self._admit(request)
            self.kv.adopt(request, matched)
            grown = self.kv.grow(request, num_new)
            assert grown, "can_admit counted the blocks"
            self.events.emit(Admitted(self.step, request.id, request.num_computed, request.num_preemptions))
            if request.num_preemptions == 0:
                request.num_cached = request.num_computed  # what a recompute finds again is not a hit
            scheduled.append((request, num_new))
            budget -= num_new
        return scheduled

    def _reason_to_wait(self, num_new: int, num_missing: int) -> str | None:
        if len(self.running) >= self.config.max_num_seqs:
            return "no_seat"
        if num_new == 0 or (num_new < num_missing and not self.config.enable_chunked_prefill):
            return "no_budget"
        return None

    def _admit(self, request: Request) -> None:
        self.waiting.remove(request)
        request.status = Status.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = time.monotonic()
        self.running.add(request)

    def _append(self, request: Request, new_token_ids: list[int]) -> None:
        """Append tokens up to the one that ends the request."""
        if request.first_token_s is None:
            request.first_token_s = time.monotonic()
        for token_id in new_token_ids:
            request.token_ids.append(token_id)
            reason = self._end_reason(request, token_id)
            if reason:
                is_eos = token_id in self.config.eos_token_ids and not request.params.ignore_eos
                self.finish(request, reason, token_id if reason == "stop" and not is_eos else None)
                return

    def _end_reason(self, request: Request, token_id: int) -> str | None:
        params = request.params
        if request.num_output >= params.min_tokens:
            if not params.ignore_eos and token_id in self.config.eos_token_ids:
                return "stop"
            if params.stop_token_ids and token_id in params.stop_token_ids:
                return "stop"
        return "length" if request.num_output >= request.max_tokens else None
