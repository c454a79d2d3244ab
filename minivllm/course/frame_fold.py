"""From the events of a running engine to frames, ten a second: the engine's thread pays some 50 µs a step for it."""

from collections import Counter, deque
from collections.abc import Callable
from operator import itemgetter

from minivllm.course.block_counts import BlockCounts
from minivllm.course.engine_frames import MOST_DECISIONS, Decision, Frame, Load
from minivllm.course.latencies import Latencies
from minivllm.events import (
    Added,
    Admitted,
    BlockCached,
    BlocksTaken,
    Event,
    Finished,
    Preempted,
    Refused,
    StepCosted,
    StepRan,
    Waited,
)

INTERVAL_S = 0.1
WINDOW_S = 10.0  # of the percentiles


class FrameFold:
    """A listener that makes frames. Start with an empty engine: `engine.events.listen(fold.apply, wants_hash=False)`.

    `clock` tells the seconds that the engine was driven. The step that ended may be told of after the next one's
    first decisions, as an engine does that plans ahead.
    """

    def __init__(self, num_blocks: int, load: Load, clock: Callable[[], float]) -> None:
        self.frames: list[Frame] = []
        self.load = load
        self.followers: list[Callable[[], None]] = []  # told of each frame
        self._num_usable = num_blocks - 1
        self._clock = clock
        self._blocks = BlockCounts()
        self._ttft, self._gaps = Latencies(WINDOW_S), Latencies(WINDOW_S)
        self._due_s: dict[str, float] = {}  # by request: when its first token was asked for
        self._last_s: dict[str, float] = {}  # when its last token came
        self._num_prompt: dict[str, int] = {}
        self._preempted: set[str] = set()
        self._gone: deque[tuple[int, str]] = deque()
        self._decided: deque[Event | Decision] = deque(maxlen=MOST_DECISIONS)
        self._waited = ("", "")
        self._step = self._num_running = self._num_waiting = 0
        self._totals: Counter[str] = Counter()
        self._sums_ms: dict[str, float] = {"step_ms": 0.0, "costed_ms": 0.0, "floor_ms": 0.0}
        self._next_s = INTERVAL_S
        self._is_stale = False

    @property
    def num_steps(self) -> int:
        """That have ended so far."""
        return self._totals["steps"]

    def apply(self, event: Event) -> None:
        """Take in one event; called by the engine's thread."""
        self._is_stale = True
        match event:
            case StepRan():
                self._end_step(event)
            case BlocksTaken() | BlockCached():  # the most frequent ones
                self._blocks.apply(event)
            case Added(request_id=id_, num_prompt=num_prompt):
                self._due_s.setdefault(id_, self._clock())
                self._num_prompt[id_] = num_prompt
                self._totals["arrived"] += 1
            case Admitted() | Waited() | Preempted() | Finished() | Refused():
                self._decide(event)
            case StepCosted():
                self._cost(event)
            case _:
                self._blocks.apply(event)

    def expect(self, request_id: str, due_s: float) -> None:
        """A request should have come at `due_s`, while a step ran: its first token is late from then on."""
        self._due_s[request_id] = due_s

    def note(self, what: str, reason: str, request_id: str = "") -> None:
        """Show something that no event tells: what was asked of the room."""
        self._is_stale = True
        self._decided.append(Decision(self._step, request_id, what, reason))

    def turn_away(self) -> None:
        """Somebody came and was not let in."""
        self._totals["refused"] += 1

    def tick(self) -> None:
        """Make a frame if it is time; while nothing runs, no step does it."""
        now_s = self._clock()
        if now_s >= self._next_s:
            self.make_frame(now_s)

    def catch_up(self) -> None:
        """Make a frame if anything happened since the last one: nothing more will, for now."""
        if self._is_stale:
            self.make_frame(self._clock())

    def make_frame(self, now_s: float) -> None:
        """One frame more, of what is known at `now_s`."""
        self._next_s, self._is_stale = now_s + INTERVAL_S, False
        self._ttft.roll(now_s)
        self._gaps.roll(now_s)
        (ttft_50, ttft_95), (gap_50, gap_95) = (each.percentiles_ms(0.5, 0.95) for each in (self._ttft, self._gaps))
        live, cached = self._blocks.num_live, self._blocks.num_cached
        count = self._totals
        self.frames.append(Frame(
            now_s, self._step, self._num_running, self._num_waiting, len(self._preempted),
            live, cached, self._num_usable - live - cached,
            arrived=count["arrived"], finished=count["finished"], refused=count["refused"],
            preemptions=count["preemptions"], output_tokens=count["output"], computed_tokens=count["computed"],
            prompt_tokens=count["prompt"], hit_tokens=count["hit"], steps=count["steps"],
            costed_steps=count["costed"], **self._sums_ms,
            weight_bytes=count["weights"], kv_bytes=count["kv"], logit_bytes=count["logits"],
            ttft_p50_ms=ttft_50, ttft_p95_ms=ttft_95, gap_p50_ms=gap_50, gap_p95_ms=gap_95,
            load=self.load, decisions=tuple(map(_told, self._decided)),
        ))  # fmt: skip
        self._decided.clear()
        for follower in self.followers:
            follower()

    def _end_step(self, event: StepRan) -> None:
        now_s, last_s = self._clock(), self._last_s
        ids, tokens = zip(*event.new_tokens, strict=True) if event.new_tokens else ((), ())
        before = Counter(map(last_s.get, ids))  # most tokens of a step came after those of one other step
        if before.pop(None, 0):
            self._take_first([id_ for id_ in ids if id_ not in last_s], now_s)
        for seconds, count in before.items():
            assert seconds is not None
            self._gaps.add(now_s - seconds, count)
        last_s.update(dict.fromkeys(ids, now_s))
        while self._gone and self._gone[0][0] < event.step:  # a step that plans ahead may still name who ended
            self._forget(self._gone.popleft()[1])
        totals = self._totals
        totals["steps"] += 1
        totals["output"] += sum(map(len, tokens))
        totals["computed"] += sum(map(itemgetter(1), event.scheduled))
        self._sums_ms["step_ms"] += event.run_ms
        self._step, self._num_running, self._num_waiting = event.step, event.num_running, event.num_waiting
        if now_s >= self._next_s:
            self.make_frame(now_s)

    def _take_first(self, ids: list[str], now_s: float) -> None:
        for id_ in ids:
            if (due_s := self._due_s.pop(id_, None)) is not None:
                self._ttft.add(now_s - due_s)

    def _cost(self, event: StepCosted) -> None:
        self._totals.update(
            {"costed": 1, "weights": event.weight_bytes, "kv": event.kv_bytes, "logits": event.logit_bytes}
        )
        self._sums_ms["costed_ms"] += event.run_ms
        self._sums_ms["floor_ms"] += event.floor_ms

    def _decide(self, event: Event) -> None:
        match event:
            case Waited(request_id=id_, reason=reason):
                if self._waited == (id_, reason):
                    return  # the head of the queue waits on, for the same reason
                self._waited = (id_, reason)
            case Admitted(request_id=id_, num_preemptions=0):
                self._waited = ("", "")
                self._totals["prompt"] += self._num_prompt.get(id_, 0)
                self._totals["hit"] += event.num_computed
            case Admitted(request_id=id_):
                self._waited = ("", "")
                self._preempted.discard(id_)
            case Preempted(request_id=id_):
                self._preempted.add(id_)
                self._totals["preemptions"] += 1
            case Finished(request_id=id_):
                self._totals["finished"] += 1
                self._preempted.discard(id_)
                self._gone.append((event.step, id_))
            case Refused(request_id=id_):
                self._totals["refused"] += 1
                self._forget(id_)
        self._decided.append(event)

    def _forget(self, id_: str) -> None:
        for known in (self._due_s, self._last_s, self._num_prompt):
            known.pop(id_, None)


def _told(event: Event | Decision) -> Decision:
    match event:
        case Admitted(step, id_, _, _, reason):
            return Decision(step, id_, "began", reason)
        case Waited(step, id_, reason):
            return Decision(step, id_, "waits", reason)
        case Preempted(step, id_, _, reason, how):
            return Decision(step, id_, "swapped out" if how == "swap" else "preempted", reason)
        case Finished(step, id_, reason, _):
            return Decision(step, id_, "finished", reason)
        case Refused(step, id_, reason):
            return Decision(step, id_, "refused", reason)
    assert isinstance(event, Decision)
    return event
