"""Gives an engine that was restored what came from outside when its like was recorded.

While the engine is in the recorded states, everything comes as it came: after the same steps, during the same steps,
and where the runner failed it fails again. Once it is in another state, because a policy was changed, the steps of the
record alone do not fit: a request may be faster or slower now. Then an arrival, an abort, a pin still come after the
same step (the engine idles until then if it must), but what belongs to a place in a request's text comes when the
request gets there: a stop string, a fork, the choice for a beam. Failures are over then.
"""

from contextlib import suppress

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan
from minivllm.errors import RequestError
from minivllm.lab.inputs import End, Noted
from minivllm.lab.recording import Recording


class ReplayedError(Exception):
    """The runner failed in this step when it was recorded."""


class Replay:
    """An engine on its way through the inputs of a record; `run` is a recording of what it does."""

    def __init__(self, engine: Engine, record: Recording) -> None:
        self.record = record
        self.run = Recording(engine, after_run=self._intervene, header=record.trace.header)
        self.dropped: list[Noted] = []  # inputs that came to nothing: an abort of one who has ended
        self._pending = [noted for noted in record.inputs if noted.is_after(self.run.first_step)]
        self._is_as_recorded = True

    def run_to(self, step: int) -> Recording:
        """Advance to the end of a step; what came after it has not come yet."""
        while self.run.last_step < step:
            self._give_what_is_due()
            self._step()
        return self.run

    def run_to_end_of_record(self) -> Recording:
        """Advance to the last recorded step, and give what came after it."""
        self.run_to(self.record.last_step)
        self._give_what_is_due()
        return self.run

    def run_to_end(self) -> Recording:
        """Advance until nothing is left to do or to come; what then still waits for its place is dropped."""
        while True:
            self._give_what_is_due()
            can_run = any(not request.is_held for request in self.run.engine.requests.values())
            is_more_to_come = any(noted.step > self.run.last_step for noted in self._pending if not noted.input.anchor)
            is_behind = self._is_as_recorded and self.run.last_step < self.record.last_step
            if not (can_run or is_more_to_come or is_behind):
                self.dropped += self._pending
                return self.run
            self._step()

    def _step(self) -> None:
        with suppress(ReplayedError):
            self.run.engine.step()

    def _give_what_is_due(self) -> None:
        now = self.run.last_step
        self._is_as_recorded &= self.run.state_hashes[now] == self.record.state_hashes.get(now)
        for noted in [*self._pending]:
            if noted.step == now if self._is_as_recorded else self._is_due(noted):
                self._give(noted)

    def _is_due(self, noted: Noted) -> bool:
        if noted.input.anchor is not None:
            return noted.input.anchor.is_reached(self.run.engine)
        if isinstance(noted.input, End) and noted.input.request_id not in self.run.requests:
            return False  # a fork that has not begun
        return noted.step <= self.run.last_step

    def _give(self, noted: Noted) -> None:
        self._pending.remove(noted)
        try:
            is_used = noted.input.apply(self.run.engine)
        except RequestError:  # a pin of what is not cached, a fork of one who has left
            is_used = False
        if not is_used:
            self.dropped.append(noted)

    def _intervene(self, plan: StepPlan) -> None:
        """Be what happened while the runner computed a step."""
        if not self._is_as_recorded:
            return
        for noted in [noted for noted in self._pending if noted.in_run and noted.step == plan.step]:
            if noted.input.anchor is None or noted.input.anchor.is_reached(self.run.engine):
                self._give(noted)
        if plan.step in self.record.failed_steps:
            raise ReplayedError
