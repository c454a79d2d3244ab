"""Who of those that wait begins in a step: the scheduler's door.

in line --> a seat? --> its prefix not under way? --> some budget? --> blocks, and some to spare? --> runs
"""

from collections.abc import Callable

from minivllm.engine.kv_manager import KVManager
from minivllm.engine.plan import Scheduled
from minivllm.engine.policies import RequestQueue, at_the_door
from minivllm.engine.prefix_cache import Hit
from minivllm.engine.swap import SwapSpace
from minivllm.engine.under_way import Computing, is_under_way
from minivllm.engine_config import EngineConfig
from minivllm.events import Admitted, EventBus, Waited
from minivllm.request import Request, Status


class Admission:
    """The part of the Scheduler that lets requests in."""

    config: EngineConfig
    kv: KVManager
    swap: SwapSpace
    events: EventBus
    running: RequestQueue
    waiting: RequestQueue
    lingering: list[Request]
    step: int
    _clock: Callable[[], float]

    @property
    def waits_for_prefixes(self) -> bool:
        """Whether a step's wait can save work: not where it costs the whole batch."""
        return self.kv.caches_prefixes and not self.config.fills_batches

    def _admit_waiting(self, budget: int, others: Computing) -> Scheduled:
        """Admit in order until one does not fit: whoever comes after it waits behind it.

        Who waits for a prefix that one of the `others` computes is passed over.
        """
        scheduled: Scheduled = []
        is_new_batch = self.config.fills_batches and not self.running and not self.lingering
        for request in at_the_door(self.config, list(self.waiting), self.kv, self.step):
            if request.is_held:
                continue
            if self.config.fills_batches and not is_new_batch:
                self.events.emit(Waited(self.step, request.id, "batch_runs"))
                break
            num_new, reason = self._try_to_admit(request, budget, others)
            if not num_new:
                self.events.emit(Waited(self.step, request.id, reason))
                if reason == "prefix_under_way":
                    continue
                break
            reason = "new_batch" if is_new_batch else reason
            self.events.emit(Admitted(self.step, request.id, request.num_computed, request.num_preemptions, reason))
            scheduled.append((request, num_new))
            others.append((request, request.num_computed + num_new))
            budget -= num_new
        return scheduled

    def _try_to_admit(self, request: Request, budget: int, others: Computing) -> tuple[int, str]:
        """Admit with what is stored of the request already; see `_admit_after`."""
        if len(self.running) >= self.config.max_num_seqs:
            return 0, "no_seat"
        if request.host_ids:
            return self._admit_after(request, Hit([], request.num_computed), budget)
        hit = self.kv.match(request)
        if budget and self.waits_for_prefixes and is_under_way(request, hit, others, self.config.block_size):
            return 0, "prefix_under_way"
        num_new, reason = self._admit_after(request, hit, budget)
        if reason == "no_blocks" and hit.num_tokens % self.config.block_size:
            # A block known in part is held beside its copy: one more than the request itself needs.
            return self._admit_after(request, hit.without_part(self.config.block_size), budget)
        return num_new, reason

    def _admit_after(self, request: Request, hit: Hit, budget: int) -> tuple[int, str]:
        """How many tokens the request computes in this step and why it may; 0 and why it must wait."""
        num_missing = request.num_tokens - hit.num_tokens
        num_new = min(num_missing, budget)
        if num_new == 0 or (num_new < num_missing and not self.config.chunks_prompts):
            return 0, "no_budget"
        is_alone = len(self.running) == 0  # it may use the last block; beside others, the watermark leaves room to grow
        is_swapped = bool(request.host_ids)
        can_begin = (
            self.swap.can_swap_in(request, num_new, not is_alone)
            if is_swapped
            else self.kv.can_admit(request, hit, num_new, not is_alone)
        )
        if not can_begin:
            return 0, "no_blocks"
        self._begin(request, hit, num_new)
        return num_new, "swapped_in" if is_swapped else "alone" if is_alone else "fits"

    def _begin(self, request: Request, hit: Hit, num_new: int) -> None:
        self.waiting.remove(request)
        request.status = Status.RUNNING
        if request.first_scheduled_s is None:
            request.first_scheduled_s = self._clock()
        self.running.add(request)
        if request.host_ids:
            self.swap.swap_in(request)
        else:
            self.kv.adopt(request, hit)
        if request.num_preemptions == 0:
            # Neither what a recompute finds again is a hit, nor what a fork finds of its parent's output.
            request.num_cached = min(request.num_computed, request.num_prompt)
        has_grown = self.kv.grow(request, num_new)
        assert has_grown, "the blocks were counted"
