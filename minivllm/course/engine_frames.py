"""A running engine ten times a second: frames of plain numbers, the load that made them, and their file.

Counts of a frame are totals since the start, so what happened between two frames is a difference.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import ClassVar

from minivllm.errors import MiniVLLMError, short
from minivllm.text_files import read_text, write_text

MOST_DECISIONS = 8  # that a frame keeps, the newest: as many as are shown


@dataclass(frozen=True, slots=True)
class Load:
    """Who comes, and the limits of a step. Lengths are means: each is drawn evenly from a half to one and a half."""

    rate: float = 2.0  # requests a second
    prompt_tokens: int = 64  # of a request alone
    output_tokens: int = 32
    shared_tokens: int = 0  # in front of every prompt, the same
    token_budget: int = 2048
    batch_limit: int = 256

    def __post_init__(self) -> None:
        """Raises MiniVLLMError for what is no number."""
        for name in LOADS:
            if not _is_number(value := getattr(self, name)):
                raise MiniVLLMError(f"Load: {name} must be a number, not {short(value)}")

    def changed(self, setting: str, value: float) -> "Load":
        """The same with one setting changed."""
        return replace(self, **{setting: value})  # type: ignore[arg-type]  # whole numbers where they must be


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing that the engine decided, or that was asked of it: what, and the reason in its own word."""

    step: int
    request_id: str
    what: str  # began, waits, preempted, swapped out, finished, refused, slider
    reason: str


@dataclass(frozen=True, slots=True)
class Frame:
    """The engine at one moment. Milliseconds; percentiles over the ten seconds before, None when there was nothing."""

    time_s: float  # that the engine was driven: pauses do not count
    step: int
    num_running: int
    num_waiting: int  # those preempted among them
    num_preempted: int  # that have not begun again
    num_live: int  # blocks that somebody holds
    num_cached: int  # free blocks whose contents can be found
    num_free: int  # free blocks without contents
    arrived: int
    finished: int
    refused: int
    preemptions: int
    output_tokens: int
    computed_tokens: int  # of prompts and outputs
    prompt_tokens: int  # of the requests that began
    hit_tokens: int  # of those, found in the prefix cache
    steps: int
    step_ms: float
    costed_steps: int  # that a ledger explained
    costed_ms: float  # what those took
    floor_ms: float  # the least that they could take
    weight_bytes: int
    kv_bytes: int
    logit_bytes: int
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    gap_p50_ms: float | None  # between two tokens of a request
    gap_p95_ms: float | None
    load: Load
    decisions: tuple[Decision, ...] = ()


NUMBERS = [field.name for field in fields(Frame)][:-2]
LOADS = [field.name for field in fields(Load)]
MAY_BE_NONE = {name for name in NUMBERS if name.endswith(("_p50_ms", "_p95_ms"))}


@dataclass(frozen=True)
class EngineRun:
    """A saved run: plain facts of the engine and of where it ran, and the frames in order."""

    header: Mapping[str, object]
    frames: tuple[Frame, ...]

    VERSION: ClassVar[int] = 1

    def save(self, path: str | Path) -> Path:
        """Write compact JSON: names once, then a short list for each frame. Raises MiniVLLMError where it cannot."""
        loads = list(dict.fromkeys(frame.load for frame in self.frames))
        document = {
            "minivllm_engine_run": self.VERSION,
            "header": dict(self.header),
            "numbers": NUMBERS,
            "load": LOADS,
            "loads": [astuple(load) for load in loads],
            "frames": [[*_numbers(frame), loads.index(frame.load)] for frame in self.frames],
            "decisions": [[astuple(decision) for decision in frame.decisions] for frame in self.frames],
        }
        return write_text(path, json.dumps(document, separators=(",", ":")) + "\n", "run")

    @staticmethod
    def load(path: str | Path) -> "EngineRun":
        """Read what `save` wrote. Raises MiniVLLMError for anything else."""
        return read_text(path, _parsed, "run")


def _numbers(frame: Frame) -> list[object]:
    """In the order of NUMBERS; times to the microsecond."""
    values = [getattr(frame, name) for name in NUMBERS]
    return [round(value, 3) if isinstance(value, float) else value for value in values]


def _parsed(text: str) -> EngineRun:
    try:
        document = json.loads(text)
        if document["minivllm_engine_run"] != EngineRun.VERSION:
            raise ValueError(f"version {document['minivllm_engine_run']}, not {EngineRun.VERSION}")
        if document["numbers"] != NUMBERS or document["load"] != LOADS:
            raise ValueError("other numbers")
        loads = [Load(*row) for row in document["loads"]]
        rows = zip(document["frames"], document["decisions"], strict=True)
        frames = tuple(_frame(row, decisions, loads) for row, decisions in rows)
        return EngineRun({**document["header"]}, frames)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, MiniVLLMError) as error:
        words = " ".join(str(error).split())[:200]
        raise MiniVLLMError(f"not a run of the engine room ({words}); record it again") from error


def _frame(row: Sequence[object], decisions: Sequence[Sequence[object]], loads: Sequence[Load]) -> Frame:
    *numbers, load = row
    for name, number in zip(NUMBERS, numbers, strict=True):
        if not _is_number(number) and not (number is None and name in MAY_BE_NONE):
            raise ValueError(f"a frame in which {name} is {short(number)}")
    if not isinstance(load, int) or not 0 <= load < len(loads):
        raise ValueError(f"a frame under load {short(load)} of {len(loads)}")
    made = tuple(Decision(*decision) for decision in decisions)  # type: ignore[arg-type]  # as many, or a TypeError
    if not all(isinstance(each.step, int) and {type(word) for word in astuple(each)[1:]} == {str} for each in made):
        raise ValueError("a decision that is not a step and three words")
    return Frame(**dict(zip(NUMBERS, numbers, strict=True)), load=loads[load], decisions=made)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -inf < value < inf
