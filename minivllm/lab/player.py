"""Plays a workload on an engine, on the wall clock or a virtual one, and tells what each request met with.

Invariant: every arrival ends as an Outcome with exactly its tokens, or as a Refusal with the reason.
"""

import time
from collections import defaultdict
from dataclasses import replace
from heapq import heappop, heappush
from typing import Protocol

from tqdm.auto import tqdm

from minivllm.engine.engine import Engine
from minivllm.errors import ConfigError, RequestError
from minivllm.interrupts import held_interrupts
from minivllm.lab.played import Outcome, Played, Refusal, hash_of
from minivllm.request import Request, SamplingParams
from minivllm.workloads import Arrival, Workload

LONGEST_NAP_S = 0.02  # between looks at Ctrl-C while nobody is there
GREEDY = SamplingParams(temperature=0, ignore_eos=True, detokenize=False)


class Clock(Protocol):
    """What an engine takes as its clock, and the player rests by while nobody is there."""

    def __call__(self) -> float: ...
    def rest(self, until_s: float) -> None:
        """Let time pass, all of it or a part; not beyond `until_s`."""


class WallClock:
    """The clock of engines that were given none; at rest the process sleeps."""

    def __call__(self) -> float:
        return time.monotonic()

    def rest(self, until_s: float) -> None:
        time.sleep(max(0.0, min(until_s - time.monotonic(), LONGEST_NAP_S)))


class CpuClock:
    """Seconds that this process has computed, the turns of other processes left out; idle time is skipped.

    With one thread it is the wall clock of a machine that nobody shares, but for caches and memory that others use.
    """

    def __init__(self) -> None:
        self._skipped_s = 0.0

    def __call__(self) -> float:
        return time.process_time() + self._skipped_s

    def rest(self, until_s: float) -> None:
        self._skipped_s += max(0.0, until_s - self())


class VirtualClock:
    """Seconds that pass only when told to: the runner adds what a step took, the player skips idle time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Be a clock: `Engine(config, runner, clock=clock)`."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, f"a clock does not run back ({seconds} s)"
        self.now_s += seconds

    def rest(self, until_s: float) -> None:
        self.now_s = max(self.now_s, until_s)


def play(workload: Workload, engine: Engine, clock: Clock | None = None, show_progress: bool = True) -> Played:
    """Serve every arrival in its time; greedy, and each as long as the workload says.

    Without `clock` on the wall clock, as an engine is built. With one, which the engine must have too, on that: with
    a VirtualClock `runner.after = lambda plan: clock.advance(0.01)` makes each step of a fake runner 10 ms.
    Ctrl-C, between two steps, drops all that runs and leaves the engine empty.
    A request that others abort meanwhile counts as refused.
    Raises ConfigError for what is no workload or engine, and for an engine that is not idle or has another clock.
    """
    for given, kind in ((workload, Workload), (engine, Engine)):
        if not isinstance(given, kind):
            raise ConfigError(f"play: needs a Workload and an Engine, and was given a {type(given).__name__}")
    if engine.has_work:
        raise ConfigError(f"play: {len(engine.requests)} requests are in the engine; finish or abort them first")
    if engine.clock is not (time.monotonic if clock is None else clock):
        raise ConfigError("play: the engine has another clock; build it with Engine(..., clock=clock) and give it here")
    clock = clock or WallClock()
    stage = _Stage(workload, engine, clock)
    try:
        with held_interrupts() as let_through, tqdm(total=stage.num_open, disable=not show_progress) as bar:
            bar.set_description(workload.name)
            while stage.num_open:
                stage.admit()
                stage.drop_aborted()
                if engine.has_work:
                    stage.step()
                elif stage.num_open:
                    clock.rest(stage.next_s)
                bar.update(bar.total - stage.num_open - bar.n)
                let_through()
    finally:
        for request_id in list(engine.requests):
            engine.abort(request_id)
    return stage.played()


class _Stage:
    """Who is still to come, who waits for whom, and who has left."""

    def __init__(self, workload: Workload, engine: Engine, clock: Clock) -> None:
        self.workload = workload
        self.engine = engine
        self.clock = clock
        self.start_s = clock()
        self.num_open = len(workload.arrivals)
        self.step_s: list[float] = []
        self._coming: list[tuple[float, int]] = []  # a heap of (due, index of the arrival)
        self._followers: dict[str, list[int]] = defaultdict(list)  # by the id of the request they come after
        self._branches: dict[str, list[int]] = defaultdict(list)  # by the id of the request they fork off
        self._requests: dict[str, Request] = {}
        self._live: dict[str, Arrival] = {}  # in the engine, as far as the player knows
        self._outcomes: dict[str, Outcome] = {}
        self._refusals: list[Refusal] = []
        for index, arrival in enumerate(workload.arrivals):
            if arrival.after is not None:
                self._followers[arrival.after].append(index)
            elif arrival.fork_of is not None:
                self._branches[arrival.fork_of].append(index)
            else:
                heappush(self._coming, (self.start_s + arrival.arrival_s, index))

    @property
    def next_s(self) -> float:
        """When the next one comes."""
        return self._coming[0][0]

    def admit(self) -> None:
        """Hand the engine whoever is due."""
        while self._coming and self.next_s <= self.clock():
            due_s, index = heappop(self._coming)
            arrival = self.workload.arrivals[index]
            parent = self._requests.get(arrival.after or arrival.fork_of or "")
            try:
                self._requests[arrival.id] = self._add(arrival, parent, due_s)
                self._live[arrival.id] = arrival
            except RequestError as error:
                self._refuse(arrival, str(error))

    def drop_aborted(self) -> None:
        """Refuse whoever left the engine by another hand than the player's."""
        for arrival in [each for each in self._live.values() if each.id not in self.engine.requests]:
            del self._live[arrival.id]
            self._refuse(arrival, f"request {arrival.id}: aborted from outside while it was played")

    def step(self) -> None:
        """Advance the engine; forks come off their parents before the next step, followers when those have ended."""
        started_s = self.clock()
        advanced = self.engine.step()
        now_s = self.clock()
        self.step_s.append(now_s - started_s)
        for request in advanced:
            for index in list(self._branches[request.id]):
                if request.num_output >= (self.workload.arrivals[index].fork_at or 0):
                    self._branches[request.id].remove(index)
                    self._expect(index, now_s)
            if request.is_finished and request.finish_reason != "abort":
                self._close(request)

    def played(self) -> Played:
        """The result, in the order of the workload."""
        outcomes = tuple(self._outcomes[a.id] for a in self.workload.arrivals if a.id in self._outcomes)
        assert len(outcomes) + len(self._refusals) == len(self.workload.arrivals), "a request was lost"
        name, seed, step_s = self.workload.name, self.workload.seed, tuple(self.step_s)
        return Played(name, seed, type(self.clock).__name__, step_s, outcomes, tuple(self._refusals))

    def _add(self, arrival: Arrival, parent: Request | None, due_s: float) -> Request:
        """Make the request, or fork it. Raises RequestError when the engine cannot serve it whole."""
        if parent is None or (arrival.after is not None and not arrival.continues):
            token_ids = list(arrival.token_ids)
        elif arrival.after is not None:
            token_ids = [*parent.token_ids, *arrival.token_ids]
        else:
            assert arrival.fork_at is not None
            token_ids = [*parent.token_ids[: parent.num_prompt + arrival.fork_at], *arrival.token_ids]
        most = self.engine.config.max_model_len
        if len(token_ids) + arrival.num_output > most:
            raise RequestError(
                f"request {arrival.id}: {len(token_ids)} prompt and {arrival.num_output} output tokens are more than "
                f"max_model_len {most}; raise it or shorten the workload's lengths"
            )
        if arrival.fork_of is not None and parent is not None and self._can_fork(arrival, parent):
            return self._fork(arrival, parent, due_s)
        request = Request(
            id=arrival.id, token_ids=token_ids, num_prompt=len(token_ids),
            params=replace(GREEDY, max_tokens=arrival.num_output), max_tokens=arrival.num_output,
            priority=arrival.priority, salt=arrival.salt, arrival_s=due_s,
        )  # fmt: skip
        self.engine.add(request)
        return request

    def _can_fork(self, arrival: Arrival, parent: Request) -> bool:
        """Whether the branch may take the parent's blocks; else it is a request of its own that repeats the tokens.

        It may not once the parent has gone on, in another namespace or place in the queue, nor where a contiguous
        allocator has to know the whole length before the blocks are copied, nor without tokens of its own: the engine
        would count the parent's output as the branch's.
        """
        is_there = not parent.is_finished and parent.num_output == arrival.fork_at
        is_alike = (parent.salt, parent.priority) == (arrival.salt, arrival.priority)
        return bool(arrival.token_ids) and is_there and is_alike and self.engine.config.allocator == "paged"

    def _fork(self, arrival: Arrival, parent: Request, due_s: float) -> Request:
        """Split the branch off and let it go on with tokens of its own: what it shares is prompt to it."""
        child = self.engine.fork(parent.id, arrival.id, token_ids=arrival.token_ids, max_tokens=arrival.num_output)
        child.arrival_s = due_s
        return child

    def _expect(self, index: int, soonest_s: float) -> None:
        heappush(self._coming, (max(soonest_s, self.start_s + self.workload.arrivals[index].arrival_s), index))

    def _close(self, request: Request) -> None:
        assert request.first_token_s is not None and request.finished_s is not None
        self.num_open -= 1
        del self._live[request.id]
        self._outcomes[request.id] = Outcome(
            id=request.id,
            arrival_s=request.arrival_s - self.start_s,
            first_token_s=request.first_token_s - self.start_s,
            finished_s=request.finished_s - self.start_s,
            num_prompt=request.num_prompt,
            num_output=request.num_output,
            num_cached=request.num_cached,
            num_preemptions=request.num_preemptions,
            tokens_hash=hash_of(request.token_ids),
        )
        for index in self._followers[request.id]:
            self._expect(index, request.finished_s + self.workload.arrivals[index].think_s)

    def _refuse(self, arrival: Arrival, reason: str) -> None:
        """Count the request, and whoever needed its tokens; who only waited for its end asks all the same."""
        self.num_open -= 1
        self._refusals.append(Refusal(arrival.id, reason))
        for index in [*self._followers[arrival.id], *self._branches[arrival.id]]:
            other = self.workload.arrivals[index]
            if other.continues or other.fork_of is not None:
                self._refuse(other, f"request {other.id}: goes on from {arrival.id}, which was refused")
            else:
                self._expect(index, self.clock() + other.think_s)
