"""Everything that a run decided and everything that came to it from outside, noted while it runs.

A Recording stands between an engine and its runner and listens to its events; it passes all on and changes nothing.
What came from outside is read off the events: those that are emitted between two steps, or while the runner computes,
are nobody's but a caller's. Tokens given to steered requests emit no event, so before anything else is noted, and
before each step, those requests are looked at. There is no random state to note: noise is a function of a request's
seed and the position (runner/sampler.py), and both stand in the requests.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.events import Added, Event, Evicted, Finished, Forked, Pinned, StepRan, Unpinned
from minivllm.lab.inputs import Add, Anchor, Append, End, Fork, Input, Noted, Pin, ResetCache, Unpin
from minivllm.outputs import Detokenizer, Tokenizer
from minivllm.request import Request
from minivllm.trace import Trace


class Recording:
    """Begins at the engine's present state, of which `first_step` is the last step; ends with `close`.

    `after_run` counts as part of the run: what it does to the engine came from outside in this step.
    """

    def __init__(
        self,
        engine: Engine,
        before_run: Callable[[StepPlan], None] = lambda plan: None,
        after_run: Callable[[StepPlan], None] = lambda plan: None,
        after_step: Callable[[int], None] = lambda step: None,
        header: Mapping[str, object] | None = None,  # facts for the trace; the engine's config comes on top
    ) -> None:
        self.engine = engine
        self.first_step = self.last_step = engine.scheduler.step
        self.state_hashes = {self.first_step: engine.state_hash()}  # after each step, failed ones included
        self.failed_steps: set[int] = set()
        self._inputs: list[Noted] = []
        self.trace = Trace({**(header or {}), **asdict(engine.config)})
        self.num_events = {self.first_step: 0}  # of the trace when a step had ended
        self.requests = dict(engine.requests)  # by id, those that have left included
        self.num_output_before = {r.id: r.num_output for r in engine.requests.values()}  # when recorded first
        self._steered = {r.id: r for r in engine.requests.values() if r.is_steered}
        self._lengths = {r.id: r.num_tokens for r in self._steered.values()}  # when last looked at
        self._last_appends: dict[str, int] = {}  # after which step steered requests were given a token
        self._is_running = False
        self._failing: set[str] | None = None  # whom the engine will drop because the runner failed
        self._before_run, self._after_run, self._after_step = before_run, after_run, after_step
        self._runner = engine.runner
        engine.runner = self
        self._stop_listening = engine.events.listen(self._hear)

    def close(self) -> None:
        """Leave the engine as it was found; what was recorded stays."""
        if self.engine.runner is self:
            self.engine.runner = self._runner
        self._stop_listening()

    def run(self, plan: StepPlan) -> StepResult:
        """Be the engine's runner: pass the plan on."""
        self._look_at_owners_work()
        self._before_run(plan)
        self._is_running = True
        try:
            result = self._runner.run(plan)
            self._after_run(plan)
            return result
        except Exception:
            self._failing = {r.id for r, _ in plan.scheduled if self.engine.requests.get(r.id) is r}
            self.failed_steps.add(plan.step)
            self._end_failed_step(plan.step)
            raise
        finally:
            self._is_running = False

    @property
    def inputs(self) -> list[Noted]:
        """What came from outside so far, in order."""
        if not self._is_running:
            self._look_at_owners_work()
        return list(self._inputs)

    def _hear(self, event: Event) -> None:
        self.trace(event)
        if isinstance(event, StepRan):
            self._end_step(event.step, event.state_hash)
        elif isinstance(event, Finished) and self._failing and event.request_id in self._failing:
            self._failing.remove(event.request_id)
            self._end_failed_step(event.step)
        elif self._is_running or event.step == self.last_step:
            self._note(event)
        match event:
            case Added(request_id=request_id):
                request = self.requests[request_id] = self.engine.requests[request_id]
                self.num_output_before[request_id] = request.num_output
                if request.is_steered:
                    self._steered[request_id], self._lengths[request_id] = request, request.num_tokens
            case Finished(request_id=request_id):
                self._steered.pop(request_id, None)

    def _note(self, event: Event) -> None:
        """Translate an event that a caller brought about into what the caller did."""
        self._look_at_owners_work()
        last = self._inputs[-1].input if self._inputs and self._inputs[-1].step == self._now else None
        match event:
            case Added(request_id=request_id):
                is_sample = isinstance(last, Add) and request_id in [fork.id for fork in last.request.pending_forks]
                if not is_sample:  # else it came with its leader
                    self._write_down(Add(deepcopy(self.engine.requests[request_id])))
            case Forked(request_id=request_id, parent_id=parent_id):
                self._inputs.pop()  # its Added
                self._write_down(Fork.of(_anchor(self.requests[parent_id]), self.requests[request_id]))
            case Finished(request_id=request_id, reason=reason):
                request = self.requests[request_id]
                is_outside = reason == "abort" or isinstance(request.stop_reason, str)
                if is_outside or self._last_appends.get(request_id) != self._now:  # else its last token ended it
                    is_anchored = reason != "abort" or request.is_steered
                    anchor = _anchor(request) if is_anchored else None
                    self._write_down(End(request_id, reason, request.stop_reason, anchor))
            case Pinned(name=name, block_ids=block_ids):
                entries = [self.engine.kv.pool.blocks[block_id].entry for block_id in block_ids]
                token_ids = tuple(token_id for entry in entries if entry for token_id in entry.token_ids)
                self._write_down(Pin(name, token_ids, str(entries[0].parent) if entries[0] else ""))
            case Unpinned(name=name):
                self._write_down(Unpin(name))
            case Evicted() if not isinstance(last, ResetCache):  # one for each block that was cached
                self._write_down(ResetCache())

    def _look_at_owners_work(self) -> None:
        """Note the tokens that steered requests were given, and what a fork's owner made of it."""
        last = self._inputs[-1] if self._inputs else None
        if last is not None and isinstance(last.input, Fork) and last.step == self.last_step:
            child = self.engine.requests.get(last.input.child_id)
            if child is not None and not child.is_steered:
                self._inputs[-1] = replace(last, input=Fork.of(last.input.anchor, child))
        for request in self._steered.values():
            known = self._lengths[request.id]
            for place, token_id in enumerate(request.token_ids[known:], known):
                self._write_down(Append(request.id, token_id, Anchor(request.id, place, is_held=True)))
            if request.num_tokens > known:
                self._lengths[request.id], self._last_appends[request.id] = request.num_tokens, self._now

    def _write_down(self, given: Input) -> None:
        self._inputs.append(Noted(self._now, self._is_running, given))

    @property
    def _now(self) -> int:
        """The step that runs, or the last that ran."""
        return self.last_step + self._is_running

    def _end_failed_step(self, step: int) -> None:
        """The step is over when the engine has dropped everybody whom the runner ran."""
        if not self._failing:
            self._failing = None
            self._end_step(step, self.engine.state_hash())

    def _end_step(self, step: int, state_hash: str) -> None:
        self.last_step = step
        self.state_hashes[step] = state_hash
        self.num_events[step] = len(self.trace)
        self._after_step(step)


def text_of(request: Request, tokenizer: Tokenizer) -> str:
    """What a request has said so far, cut where LLM.generate cuts it: at its stop string or before its stop token.

    It goes token by token, as when they came: only so a stop string counts from min_tokens on.
    """
    params, token_ids = request.params, request.output_token_ids
    at_token = request.finish_reason == "stop" and not isinstance(request.stop_reason, str)
    if at_token and not params.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    detokenizer = Detokenizer(tokenizer, request.token_ids[: request.num_prompt], params)
    for place, token_id in enumerate(token_ids, 1):
        if detokenizer.feed([token_id], is_last=request.is_finished and place == len(token_ids)) is not None:
            break
    return detokenizer.text if request.is_finished else detokenizer.shown_text


def _anchor(request: Request) -> Anchor:
    return Anchor(request.id, request.num_tokens, request.is_held)
