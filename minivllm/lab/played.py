"""What a played workload came to: times and counts of every request, and the percentiles that services are judged by.

Times are in seconds from the start of the run.
"""

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from math import ceil, floor
from pathlib import Path
from typing import ClassVar

import xxhash

from minivllm.errors import MiniVLLMError
from minivllm.text_files import read_text, write_text


@dataclass(frozen=True, slots=True)
class Percentiles:
    """In seconds; linear between the two nearest values, as numpy does it."""

    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> "Percentiles | None":
        """None when there are no values."""
        return Percentiles(*(percentile(values, share) for share in (0.5, 0.9, 0.99))) if values else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that was served."""

    id: str
    arrival_s: float  # when it was due, even if a step ran then
    first_token_s: float
    finished_s: float
    num_prompt: int  # history included
    num_output: int
    num_cached: int  # prompt tokens it found computed: in the prefix cache or, for a fork, in its parent's blocks
    num_preemptions: int
    tokens_hash: str  # of prompt and output: equal for equal tokens

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None when there is only one."""
        return (self.finished_s - self.first_token_s) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def end_to_end_s(self) -> float:
        return self.finished_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Refusal:
    """One request that was turned away, and why."""

    id: str
    reason: str


@dataclass(frozen=True)
class Played:
    """A whole run, requests in the order of the workload."""

    workload: str
    seed: int
    clock: str  # whose seconds these are: WallClock, CpuClock, VirtualClock, or what a simulation says of itself
    step_s: tuple[float, ...]  # what each step took, decisions included
    outcomes: tuple[Outcome, ...]
    refusals: tuple[Refusal, ...] = ()

    VERSION: ClassVar[int] = 1

    @property
    def num_steps(self) -> int:
        return len(self.step_s)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last finish."""
        first_s = min((outcome.arrival_s for outcome in self.outcomes), default=0.0)
        return max((outcome.finished_s for outcome in self.outcomes), default=0.0) - first_s

    @property
    def num_output_tokens(self) -> int:
        return sum(outcome.num_output for outcome in self.outcomes)

    @property
    def throughput(self) -> float:
        """Output tokens per second; 0 when no time has passed."""
        return self.num_output_tokens / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def ttft(self) -> Percentiles | None:
        return Percentiles.of([outcome.ttft_s for outcome in self.outcomes])

    @property
    def tpot(self) -> Percentiles | None:
        return Percentiles.of([outcome.tpot_s for outcome in self.outcomes if outcome.tpot_s is not None])

    @property
    def end_to_end(self) -> Percentiles | None:
        return Percentiles.of([outcome.end_to_end_s for outcome in self.outcomes])

    def goodput(self, ttft_s: float, tpot_s: float) -> float:
        """Requests per second that kept both promises (an SLO); refused ones kept none."""
        kept = [o for o in self.outcomes if o.ttft_s <= ttft_s and (o.tpot_s is None or o.tpot_s <= tpot_s)]
        return len(kept) / self.duration_s if self.duration_s > 0 else 0.0

    def to_json(self) -> str:
        """Compact: the names of the fields once, then one list for each request; times to the microsecond."""
        rows = [[round(v, 6) if isinstance(v, float) else v for v in astuple(outcome)] for outcome in self.outcomes]
        document = {
            "minivllm_played": self.VERSION,
            "workload": self.workload,
            "seed": self.seed,
            "clock": self.clock,
            "step_s": [round(seconds, 6) for seconds in self.step_s],
            "fields": [field.name for field in fields(Outcome)],
            "outcomes": rows,
            "refusals": [astuple(refusal) for refusal in self.refusals],
        }
        return json.dumps(document, separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> "Played":
        """Read what `to_json` wrote. Raises MiniVLLMError for anything else."""
        try:
            document = json.loads(text)
            names = [field.name for field in fields(Outcome)]
            if document["minivllm_played"] != Played.VERSION or document["fields"] != names:
                raise ValueError("another version, or other fields")
            outcomes = tuple(Outcome(*row) for row in document["outcomes"])
            refusals = tuple(Refusal(*row) for row in document["refusals"])
            name, seed, clock = (document[key] for key in ("workload", "seed", "clock"))
            return Played(name, seed, clock, tuple(document["step_s"]), outcomes, refusals)
        except (ValueError, KeyError, TypeError) as error:
            raise MiniVLLMError(
                f"not a played workload ({' '.join(str(error).split())[:200]}); play it again"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write JSON. Raises MiniVLLMError when the place cannot be written."""
        return write_text(path, self.to_json(), "run")

    @staticmethod
    def load(path: str | Path) -> "Played":
        """Read what `save` wrote. Raises MiniVLLMError when the file is missing or holds something else."""
        return read_text(path, Played.from_json, "run")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie: percentile([1, 2, 3, 4], 0.5) == 2.5."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[floor(place)], ordered[ceil(place)]
    return low + (high - low) * (place - floor(place))


def hash_of(token_ids: Sequence[int]) -> str:
    """One short string for a list of tokens."""
    return xxhash.xxh3_64_hexdigest(repr(list(token_ids)).encode())
