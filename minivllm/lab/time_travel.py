"""Record a run, put the engine back to any step of it, and go on from there: as it was, or under another policy.

    machine = TimeMachine(llm)              # or an Engine; then let it run
    engine = machine.restore(12)            # a new engine as this one was after step 12, with K and V of its own
    again = machine.resume(12)              # ... fed with the same inputs up to the end of the record
    machine.first_departure(again)          # None: every later state hash equals the recorded one
    print(machine.fork(12, batching="prefill_first"))      # two futures and where they part

Kept after every `every`-th step: a copy of all that decides (lab/engine_copy.py) and the contents of the blocks that
were written since. Steps between are derived again from the last one kept. The engine that is recorded goes on
unharmed; what it costs is stated at `num_bytes` and at `copy_engine`. There is no random state: see lab/recording.py.
"""

from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

from tqdm.auto import tqdm

from minivllm.engine.engine import Engine
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.engine_copy import Place, changed_config, copy_engine, places_in_use, places_written
from minivllm.lab.fake_runner import FakeRunner, fake_request
from minivllm.lab.futures import Future, Futures
from minivllm.lab.inputs import Noted
from minivllm.lab.recording import Recording, text_of
from minivllm.lab.replay import Replay
from minivllm.outputs import Tokenizer
from minivllm.trace import Trace


@runtime_checkable
class Rewindable(Protocol):
    """A runner whose blocks can be read and written as bytes, and that can be built again, empty."""

    def run(self, plan: StepPlan) -> StepResult: ...
    def save_block(self, block_id: int, *, on_host: bool = False) -> bytes: ...
    def load_block(self, block_id: int, contents: bytes, *, on_host: bool = False) -> None: ...
    def twin(self, num_host_blocks: int) -> "Rewindable": ...


@runtime_checkable
class HasEngine(Protocol):
    """An LLM, that is, without importing one."""

    engine: Engine

    def trace_header(self) -> dict[str, object]: ...
    def get_tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True)
class Moment:
    """What is kept of a step: the engine after it, which never runs, and what was written since the last one kept."""

    engine: Engine
    contents: dict[Place, bytes]


class TimeMachine:
    """Records from now on until `close`.

    Raises ConfigError for what is no engine, is recorded already, or has a runner whose blocks cannot be saved.
    """

    def __init__(self, source: Engine | HasEngine, every: int = 1) -> None:
        engine, self._runner = _recordable(source)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(
                f"time travel: every (steps from one kept moment to the next) must be 1, 2, ..., not {every!r}"
            )
        self.every = every
        self._llm = None if isinstance(source, Engine) else source
        header = {} if self._llm is None else self._llm.trace_header()
        self._moments: dict[int, Moment] = {}  # by step, in order
        self._written = places_in_use(engine)
        self.record = Recording(engine, self._note_writes, after_step=self._keep_some, header=header)
        self._keep(self.first_step)

    @property
    def first_step(self) -> int:
        """The step after which recording began: 0 for a new engine."""
        return self.record.first_step

    @property
    def last_step(self) -> int:
        return self.record.last_step

    @property
    def state_hashes(self) -> dict[int, str]:
        """The engine's state hash after each step."""
        return self.record.state_hashes

    @property
    def inputs(self) -> list[Noted]:
        """What came from outside."""
        return self.record.inputs

    @property
    def trace(self) -> Trace:
        """Every event of the record, under the LLM's trace_header: to draw, or to save."""
        return self.record.trace

    @property
    def num_bytes(self) -> int:
        """Bytes of K and V kept, one block for each that was written between two moments.

        A request that decodes writes to one block in each step: SmolLM2 in bf16 with blocks of 16 tokens keeps 368,640
        bytes for each of its tokens, and 1/16 of that with every=16.
        """
        return sum(len(contents) for moment in self._moments.values() for contents in moment.contents.values())

    def close(self) -> None:
        """Stop recording and leave the engine as it was found; the record stays."""
        self.record.close()

    def restore(self, step: int) -> Engine:
        """A new engine as the recorded one was after `step`, with a runner and with K and V of its own.

        Inputs that came after the step's end are not in it yet. Raises ConfigError for a step that was not recorded and
        MiniVLLMError when the engine derived from the record is not what was recorded.
        """
        return self._restore(step, self.record.engine.config.num_host_blocks)

    def check(self, engine: Engine, step: int) -> list[str]:
        """What of an engine is not as it was after `step`, in words; of K and V, if that step was kept."""
        faults = []
        if engine.state_hash() != self._hash_after(step):
            faults.append(f"the state hash is {engine.state_hash()}, recorded was {self.state_hashes[step]}")
        if not isinstance(engine.runner, Rewindable):
            faults.append(f"the runner {type(engine.runner).__name__} does not show its blocks")
        elif step in self._moments:
            for place, contents in self._contents(step).items():
                if engine.runner.save_block(place.block_id, on_host=place.on_host) != contents:
                    faults.append(f"{'host ' if place.on_host else ''}block {place.block_id} holds other bytes")
        return faults

    def resume(self, step: int) -> Recording:
        """Restore, then run on with the recorded inputs to the end of the record; what the new engine did."""
        again = Replay(self.restore(step), self.record).run_to_end_of_record()
        again.close()
        return again

    def texts(self, of: Engine | Recording) -> dict[str, str]:
        """What each request of a restored engine or a resumed recording has said, by its id, in the LLM's tokenizer.

        Raises ConfigError when the machine was built from a bare engine.
        """
        if self._llm is None:
            raise ConfigError("time travel: a bare engine knows no text; build TimeMachine(llm), or read the token ids")
        tokenizer = self._llm.get_tokenizer()
        return {request.id: text_of(request, tokenizer) for request in of.requests.values()}

    def first_departure(self, again: Recording) -> int | None:
        """The first step after which a resumed engine's state hash is not the recorded one; None: all are equal."""
        steps = range(again.first_step, self.last_step + 1)
        return next((step for step in steps if again.state_hashes.get(step) != self.state_hashes[step]), None)

    def fork(self, step: int, **changes: object) -> Futures:
        """Run two futures of `step` to their ends, one as recorded and one with policies changed, and compare them.

        Both get the same inputs; lab/replay.py says when. Raises ConfigError for what cannot change in mid-run.
        """
        config = changed_config(self.record.engine.config, changes)
        original = Replay(self.restore(step), self.record).run_to_end()
        engine = self._restore(step, config.num_host_blocks)
        replay = Replay(copy_engine(engine, engine.runner, config), self.record)
        changed = replay.run_to_end()
        past = self.trace.events[: self.record.num_events[step]]
        return Futures(step, changes, Future.of(original, past), Future.of(changed, past), tuple(replay.dropped))

    def _restore(self, step: int, num_host_blocks: int) -> Engine:
        recorded = self._hash_after(step)
        kept = max(kept for kept in self._moments if kept <= step)
        runner = self._runner.twin(num_host_blocks)
        for place, contents in self._contents(kept).items():
            runner.load_block(place.block_id, contents, on_host=place.on_host)
        engine = copy_engine(self._moments[kept].engine, runner)
        Replay(engine, self.record).run_to(step).close()
        if engine.state_hash() != recorded:
            raise MiniVLLMError(
                f"time travel: step {step}, derived from step {kept}, is not what was recorded; the run is not "
                "reproducible (its runner is not, or a step was interrupted): record with every=1"
            )
        return engine

    def _hash_after(self, step: int) -> str:
        if not isinstance(step, int) or isinstance(step, bool):
            raise ConfigError(f"time travel: a step is an integer, not {step!r}")
        if step not in self.state_hashes:
            raise ConfigError(
                f"time travel: step {step} was not recorded; give one from {self.first_step} to {self.last_step}"
            )
        return self.state_hashes[step]

    def _contents(self, step: int) -> dict[Place, bytes]:
        """What every block that was ever written held after a step that was kept."""
        contents: dict[Place, bytes] = {}
        for kept, moment in self._moments.items():
            if kept <= step:
                contents |= moment.contents
        return contents

    def _note_writes(self, plan: StepPlan) -> None:
        self._written |= places_written(plan, self.record.engine.config.block_size)

    def _keep_some(self, step: int) -> None:
        if (step - self.first_step) % self.every == 0:
            self._keep(step)

    def _keep(self, step: int) -> None:
        contents = {
            place: self._runner.save_block(place.block_id, on_host=place.on_host)
            for place in sorted(self._written, key=lambda place: (place.on_host, place.block_id))
        }
        self._moments[step] = Moment(copy_engine(self.record.engine, self._runner), contents)
        self._written = set()


def _recordable(source: Engine | HasEngine) -> tuple[Engine, Rewindable]:
    """The engine and its runner, if they can be recorded."""
    if not isinstance(source, Engine | HasEngine):
        raise ConfigError(f"time travel: give an LLM or an Engine, not {type(source).__name__}")
    engine = source if isinstance(source, Engine) else source.engine
    if isinstance(engine.runner, Recording):
        raise ConfigError("time travel: this engine is already recorded: close() the other first")
    if not isinstance(engine.runner, Rewindable):
        raise ConfigError(
            f"time travel: the runner {type(engine.runner).__name__} cannot save its blocks; use ModelRunner or "
            "FakeRunner"
        )
    return engine, engine.runner


def study(
    num_requests: int = 40, num_blocks: int = 25, step: int = 20, seed: int = 0, show_progress: bool = True
) -> str:
    """One run and its other futures: what each policy, changed after `step`, would have made of the same requests.

    The runner is the fake one, whose next token is a function of the prefix, read back from the slots: the decisions
    are the engine's own, only the model is not there.
    """
    swap = {"preemption_mode": "swap", "num_host_blocks": num_blocks}
    variants: list[dict[str, object]] = [
        {}, {"batching": "prefill_first"}, {"batching": "static"}, {"scheduling_policy": "shortest_first"},
        {"scheduling_policy": "longest_prefix_first"}, swap, {"watermark": 0.2}, {"max_num_batched_tokens": 6},
        {"max_num_seqs": 4}, {"eviction_policy": "lfu"},
    ]  # fmt: skip
    machine = _demo_run(num_requests, num_blocks, seed)
    steps = range(machine.last_step + 1)
    num_equal = sum(machine.first_departure(machine.resume(s)) is None for s in tqdm(steps, disable=not show_progress))
    futures = [machine.fork(step, **changes) for changes in tqdm(variants, disable=not show_progress)]
    lines = [
        f"{num_requests} requests, fake runner: {machine.last_step} steps, {machine.num_bytes:,} bytes of slots kept",
        f"restored after each of {len(steps)} steps and run on: {num_equal} times every state hash was equal",
        f"changed after step {step:<23}{'steps':>6}{'preempted':>11}{'TTFT':>7}{'hits':>7}{'again':>7}"
        "  tokens  first difference",
        *map(_row, futures),
    ]
    return "\n".join([*lines, "", str(futures[1])])


def _row(futures: Futures) -> str:
    changes = ", ".join(f"{name}={value}" for name, value in list(futures.changes.items())[:1]) or "nothing"
    outcome, difference = futures.changed.outcome, futures.first_difference
    ttft = "-" if outcome.mean_ttft_steps is None else f"{outcome.mean_ttft_steps:.1f}"
    kinds = [words.partition(":")[0] for words in (difference.original, difference.changed)] if difference else []
    return (
        f"{changes:<42}{outcome.num_steps:>6}{outcome.num_preemptions:>11}{ttft:>7}{outcome.num_hit_tokens:>7}"
        f"{outcome.num_found_again:>7}  {'equal ' if futures.tokens_equal else 'DIFFER'}  "
        + (f"step {difference.step}: {' / '.join(kinds)}" if difference else "none")
    )


def _demo_run(num_requests: int, num_blocks: int, seed: int) -> TimeMachine:
    """Requests that share a few beginnings and come at random, in a pool that is too small for them."""
    config = EngineConfig(
        num_blocks=num_blocks, block_size=4, max_model_len=80, max_num_seqs=16, max_num_batched_tokens=80,
        num_host_blocks=0, watermark=0.0,
    )  # fmt: skip
    random, engine = Random(seed), Engine(config, FakeRunner(config.block_size))
    machine = TimeMachine(engine)
    prefixes = [[random.randrange(12) for _ in range(16)] for _ in range(3)]
    for number in range(num_requests):
        prompt = random.choice(prefixes) + [random.randrange(12) for _ in range(random.randint(1, 16))]
        engine.add(fake_request(f"r{number}", prompt, random.randint(2, 24), temperature=0, ignore_eos=True))
        for _ in range(random.randrange(4)):
            engine.step()
    while engine.has_work:
        engine.step()
    return machine
