"""The step ledger of a running engine: after each step, what it had to move and do, and the floor that gives.

    with keep_ledger(llm), llm.record() as trace:
        llm.generate(...)
    ledger_rows(trace)                               # course/step_ledger.py

Counted from the events alone, never from a clock: weights once, of experts those that the step's tokens are expected to
touch; K and V of the tokens that its requests see, of blocks that several share once; K and V written; the logits that
gave a token, written and read. Logits of prompts whose logprobs are wanted are not told by events, nor counted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakSet

import torch

from minivllm.course.calculators import Accelerator, accelerator
from minivllm.draft_events import BlocksTrimmed, DraftJudged
from minivllm.errors import ConfigError
from minivllm.events import (
    BlockCopied,
    BlockExchanged,
    BlocksDropped,
    BlocksReleased,
    BlocksTaken,
    Event,
    Forked,
    PrefixHit,
    StepCosted,
    StepRan,
    SwappedIn,
)
from minivllm.lab.step_floor import ModelWork, measured_roofs
from minivllm.llm import LLM
from minivllm.weights import find_model

NULL_BLOCK = 0
Table = dict[int, int]  # block id -> group of layers
_KEPT = WeakSet[LLM]()


class Ledger:
    """Follows the events of an engine from before its first request, and costs every step that ran."""

    def __init__(self, work: ModelWork, machine: Accelerator | str, block_bytes: Sequence[int]) -> None:
        """`block_bytes` has, by group of layers, the bytes of a block that these layers fill."""
        self.work, self.machine, self.block_bytes = work, accelerator(machine), block_bytes
        self.machine.flops_of(work.dtype)  # a machine without a figure for the type is refused now
        self.sharing = SharedBlocks(len(block_bytes))
        self._num_drafted: dict[str, int] = {}  # by request, in the step that runs

    @classmethod
    def of(cls, llm: LLM, machine: Accelerator | str | None = None) -> "Ledger":
        """For this engine, whatever it is doing now; without a `machine` its rates are measured, once in a process."""
        if not isinstance(llm, LLM):
            raise ConfigError(f"the ledger follows an LLM: keep_ledger(LLM(...)), not {type(llm).__name__}")
        dtype = llm.model_config.dtype
        work = ModelWork(find_model(str(llm.model), "dummy").config, dtype)
        ledger = cls(work, machine or _roofs(llm.device, dtype), block_bytes_by_group(llm))
        for request in llm.engine.requests.values():
            for group, table in enumerate(request.tables):
                ledger.sharing.extend(request.id, table.block_ids, group)
        return ledger

    def apply(self, event: Event) -> StepCosted | None:
        """Take in one event; of a step that ran, its cost."""
        if isinstance(event, DraftJudged):
            self._num_drafted[event.request_id] = len(event.draft_token_ids)
        if not isinstance(event, StepRan):
            self.sharing.apply(event)
            return None
        drafted, self._num_drafted = self._num_drafted, {}
        computed = [self._with_rejected(*each, drafted) for each in event.scheduled]
        ids, new, stored = zip(*computed, strict=True) if computed else ((), (), ())
        self.sharing.begin_step(event.step, ids)
        got_token, _ = zip(*event.new_tokens, strict=True) if event.new_tokens else ((), ())
        # of samples that fork off a prompt all draw from its row
        num_logits = len(ids) if got_token == ids else len({*ids}.intersection(got_token))
        num_logits += sum(drafted.values())
        shared = sum(n * size for n, size in zip(self.sharing.num_spared, self.block_bytes, strict=True))
        floor = self.work.floor_of(new, stored, num_logits, self.machine, shared)
        self.sharing.end_step(event.step)
        return StepCosted(
            event.step, floor.weight_bytes, floor.kv_bytes + floor.stored_bytes, floor.logit_bytes, floor.flops,
            floor.ms, event.run_ms, max(floor.compute_ms - floor.read_ms, 0.0),
        )  # fmt: skip

    @staticmethod
    def _with_rejected(id_: str, num_new: int, stored: int, drafted: Mapping[str, int]) -> tuple[str, int, int]:
        """A request's tokens of the step, and stored after it, with the drafts that fell."""
        num_computed = 1 + drafted[id_] if id_ in drafted else num_new
        return id_, num_computed, stored + num_computed - num_new


def block_bytes_by_group(llm: LLM) -> list[int]:
    """Bytes of a block that the layers of each group fill."""
    model, groups = llm.model_config, llm.storage.groups
    layer_bytes = llm.config.block_size * model.kv_bytes_per_token // model.num_layers
    return [layer_bytes * len(layers) for layers in groups.layers]


class SharedBlocks:
    """How many block reads a step is spared because several of its requests have the same block.

    A step may be scheduled before the one before it has ended, so events wait for the step whose number they bear:
    before it is counted, tables grow as it was scheduled; what was let go or exchanged since, it still read.
    """

    def __init__(self, num_groups: int) -> None:
        self.num_spared = [0] * num_groups
        self._tables: dict[str, Table] = {}
        self._scheduled: tuple[str, ...] = ()
        self._active: set[str] = set()  # the same, of the last step: their blocks are in _users
        self._users: dict[int, int] = {}  # block id -> how many
        self._growing: list[Event] = []
        self._ending: list[Event] = []

    def apply(self, event: Event) -> None:
        if isinstance(event, BlocksTaken | PrefixHit | Forked | SwappedIn | BlockCopied):
            self._growing.append(event)
        elif isinstance(event, BlocksReleased | BlocksDropped | BlocksTrimmed | BlockExchanged):
            self._ending.append(event)

    def begin_step(self, step: int, request_ids: tuple[str, ...]) -> None:
        """These requests read their blocks in the step, and no others."""
        self.end_step(step - 1)
        growing, self._growing = _until(step, self._growing)
        for event in growing:
            self._grow(event)
        if request_ids == self._scheduled:
            return
        self._scheduled, now = request_ids, set(request_ids)
        for id_ in self._active - now:
            self._leave(self._tables.get(id_, {}))
        for id_ in now - self._active:
            self._join(self._tables.get(id_, {}))
        self._active = now

    def end_step(self, step: int) -> None:
        ending, self._ending = _until(step, self._ending)
        for event in ending:
            match event:
                case BlocksReleased(request_id=id_):
                    table = self._tables.pop(id_, {})
                    if id_ in self._active:
                        self._leave(table)
                case BlocksDropped(request_id=id_) | BlocksTrimmed(request_id=id_):
                    self._drop(id_, event.block_ids)
                case BlockExchanged(request_id=id_):
                    self._replace(id_, event.block_id, event.cached_id)

    def _grow(self, event: Event) -> None:
        match event:
            case BlocksTaken() | PrefixHit():
                self.extend(event.request_id, event.block_ids, event.group)
            case Forked() if event.block_ids:
                for group, block_ids in enumerate((event.block_ids, *event.other_tables)):
                    self.extend(event.request_id, block_ids, group)
            case SwappedIn():
                for group, table in enumerate(event.tables):
                    self.extend(event.request_id, table, group)
            case BlockCopied():
                self._replace(event.request_id, event.source_id, event.block_id)

    def extend(self, id_: str, block_ids: Iterable[int], group: int) -> None:
        """Blocks were appended to a request's table for a group of layers."""
        table = self._tables.setdefault(id_, {})
        more = {block_id: group for block_id in block_ids if block_id != NULL_BLOCK and block_id not in table}
        table.update(more)
        if id_ in self._active:
            self._join(more)

    def _drop(self, id_: str, block_ids: Iterable[int]) -> None:
        table = self._tables.get(id_, {})
        gone = {block_id: table.pop(block_id) for block_id in block_ids if block_id in table}
        if id_ in self._active:
            self._leave(gone)

    def _replace(self, id_: str, old_id: int, new_id: int) -> None:
        group = self._tables.get(id_, {}).get(old_id, 0)
        self._drop(id_, (old_id,))
        self.extend(id_, (new_id,), group)

    def _join(self, table: Table) -> None:
        for block_id, group in table.items():
            num_users = self._users.get(block_id, 0)
            self._users[block_id] = num_users + 1
            self.num_spared[group] += num_users > 0

    def _leave(self, table: Table) -> None:
        for block_id, group in table.items():
            num_users = self._users.pop(block_id) - 1
            if num_users:
                self._users[block_id] = num_users
                self.num_spared[group] -= 1


def _until(step: int, events: list[Event]) -> tuple[list[Event], list[Event]]:
    """Those of this step or before, and those of later ones."""
    if not events or events[-1].step <= step:  # they come in order
        return events, []
    return [event for event in events if event.step <= step], [event for event in events if event.step > step]


@contextmanager
def keep_ledger(llm: LLM, machine: Accelerator | str | None = None) -> Iterator[Ledger]:
    """Under `with`, each StepRan of `llm.events` is followed by a StepCosted, for whoever listens or records.

    The machine's rates are measured in the process, once, unless an Accelerator is given, or its name. Raises
    ConfigError where that has no figure for the model's type, and for an engine whose ledger is kept already.
    """
    if llm in _KEPT:
        raise ConfigError("keep_ledger: a ledger of this LLM is kept already; each step would be told twice")
    ledger = Ledger.of(llm, machine)
    _KEPT.add(llm)

    def follow(event: Event) -> None:
        if cost := ledger.apply(event):
            llm.events.emit(cost)

    stop = llm.events.listen(follow, is_last=True, wants_hash=False)
    try:
        yield ledger
    finally:
        _KEPT.discard(llm)
        stop()


@lru_cache
def _roofs(device: str, dtype: str) -> Accelerator:
    machine = measured_roofs(device, dtype)
    torch.cuda.empty_cache()  # does nothing without a GPU
    return machine
