"""What a step costs: milliseconds as a sum of non-negative prices times counts that a plan shows before it runs.

    step        launching, Python, reading the weights            singles         requests with one new token
    chunks      requests with more, computed one by one           chunk_tokens    their new tokens
    logits      rows that the vocabulary matrix multiplies        products        query x key pairs within chunks
    single_kv   tokens whose K and V singles read                 chunk_kv        the same for chunks
    cleared     tokens of fresh blocks, set to zero               moved           tokens copied or swapped

The prices are fitted to measured steps, so they hold for one model, machine, number of threads and EngineShape, and
only where all counts were seen: `require_shape`, `require_within_range`. Counts that grow together (singles, logits)
share one price in any proportion, so the sum is to be believed and a single price is not. What was never seen has no
price: to predict swaps, record some.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from math import inf
from typing import ClassVar

import numpy as np

from minivllm.engine.plan import StepPlan, needs_token
from minivllm.engine_config import EngineConfig
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.events import (
    BlockCopied,
    BlocksTaken,
    Event,
    StepRan,
    SwappedIn,
    SwappedOut,
)
from minivllm.lab.nnls import nnls

MARGIN = 0.1  # how far beyond the counts that were measured a prediction is still given
FEWEST_STEPS = 50  # to fit ten prices on
NUM_ROUNDS = 5  # of weighing by the last round's prediction


@dataclass(frozen=True, slots=True)
class Features:
    """The counts of one step; see the file's docstring."""

    singles: int
    chunks: int
    chunk_tokens: int
    logits: int
    products: int
    single_kv: int
    chunk_kv: int
    cleared: int
    moved: int


NAMES = ("step", *(count.name for count in fields(Features)))
# What bounds a term on another machine: its bandwidth, its arithmetic, or neither.
BOUND = {
    "step": "fixed", "chunks": "fixed", "singles": "compute", "chunk_tokens": "compute", "logits": "compute",
    "products": "compute", "single_kv": "memory", "chunk_kv": "memory", "cleared": "memory", "moved": "memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured step."""

    features: Features
    ms: float


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What changes the work of a step beyond what its counts tell."""

    block_size: int
    window: int | None
    allocator: str

    @staticmethod
    def of(config: EngineConfig) -> "EngineShape":
        if len(config.group_windows) > 1:
            raise ConfigError("the cost model knows one block table a request: take a model whose layers are alike")
        return EngineShape(config.block_size, config.group_windows[0], config.allocator)


@dataclass(frozen=True, slots=True)
class Machine:
    """The two roofs of a machine."""

    name: str
    gb_per_s: float
    tflops: float

    def __post_init__(self) -> None:
        for name in ("gb_per_s", "tflops"):
            roof = getattr(self, name)
            if isinstance(roof, bool) or not isinstance(roof, int | float) or not 0 < roof < inf:
                raise ConfigError(f"machine {self.name}: {name} must be a finite number above 0, not {roof!r}")


@dataclass(frozen=True, slots=True)
class Term:
    """The price of one count, and the counts it was fitted on."""

    name: str
    ms: float  # for each
    low: int
    high: int


@dataclass(frozen=True)
class CostModel:
    """A fitted sum, the steps it comes from, and how far its simulations were off."""

    terms: tuple[Term, ...]
    num_steps: int
    mean_error: float  # |predicted / measured - 1| of a step, over those it was fitted to
    machine: Machine
    shape: EngineShape  # of the engine that was measured
    provenance: dict[str, object]
    run_errors: dict[str, float] = field(default_factory=dict)  # of whole runs that the fit did not see, by measure
    extrapolated_from: str | None = None  # the machine that was measured, when this is not it

    VERSION: ClassVar[int] = 2

    def predict_ms(self, features: Features) -> float:
        """Milliseconds of a step; see `require_within_range` for whether to believe it."""
        return sum(term.ms * count for term, count in zip(self.terms, (1, *astuple(features)), strict=True))

    def require_within_range(self, features: Features, margin: float = MARGIN) -> None:
        """Raise ConfigError for the first count that lies outside the measured ones by more than `margin`."""
        for term, count in zip(self.terms, (1, *astuple(features)), strict=True):
            if not term.low * (1 - margin) <= count <= term.high * (1 + margin):
                raise ConfigError(
                    f"the cost model was fitted on {term.name} from {term.low} to {term.high} and a step has {count}: "
                    + _advice(term.name, features)
                )

    def require_shape(self, config: EngineConfig) -> None:
        """Raise ConfigError for an engine of another shape than the one that was measured."""
        wanted, fitted = asdict(EngineShape.of(config)), asdict(self.shape)
        for name, value in fitted.items():
            if wanted[name] != value:
                raise ConfigError(
                    f"the cost model was fitted on {name}={value!r}, not {wanted[name]!r}: "
                    f"set {name}={value!r}, or record runs with the other"
                )

    def to_json(self) -> str:
        return json.dumps({"minivllm_cost_model": self.VERSION, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "CostModel":
        """Read what `to_json` wrote. Raises MiniVLLMError for anything else."""
        try:
            document = json.loads(text)
            if document.pop("minivllm_cost_model") != CostModel.VERSION:
                raise ValueError("another version")
            terms = tuple(Term(**term) for term in document.pop("terms"))
            if tuple(term.name for term in terms) != NAMES:
                raise ValueError("other terms")
            machine, shape = Machine(**document.pop("machine")), EngineShape(**document.pop("shape"))
            return CostModel(terms=terms, machine=machine, shape=shape, **document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MiniVLLMError(f"not a cost model ({' '.join(str(error).split())[:200]}); fit it again") from error


def _advice(name: str, features: Features) -> str:
    """What brings a count back into the range: no rate lowers what a single request brings along."""
    if name in ("chunk_tokens", "products") and features.chunks == 1:
        return "one prompt makes it at any rate: lower max_num_batched_tokens, or record runs with longer prompts"
    if (name, 1) in (("chunk_kv", features.chunks), ("single_kv", features.singles)):
        return "one request makes it at any rate: shorten the requests, or record runs with longer ones"
    return "lower the rate, max_num_seqs or max_num_batched_tokens, or record runs that reach this"


def features_of(plan: StepPlan, block_size: int) -> Features:
    """Count before the step runs."""
    ends = [(num_new, request.num_computed + num_new) for request, num_new in plan.scheduled]
    logits = sum(needs_token(request, num_new) for request, num_new in plan.scheduled)
    return _count(ends, logits, len(plan.fresh_block_ids) * block_size, len(plan.transfers) * block_size)


def samples_of(events: Sequence[Event], block_size: int) -> list[Sample]:
    """The same counts from the events of a recorded run, a Trace from anywhere, with what its steps took.

    The trace must begin with the engine. What a contiguous allocator copies at a fork is in no event.
    """
    samples: list[Sample] = []
    num_cleared = num_moved = 0
    for event in events:
        match event:
            case BlocksTaken(block_ids=block_ids):
                num_cleared += len(block_ids)
            case BlockCopied():
                num_moved += 1
            case SwappedOut(block_ids=block_ids) | SwappedIn(block_ids=block_ids):
                num_moved += len(block_ids)
            case StepRan(scheduled=scheduled, new_tokens=new_tokens):
                ran = {id_ for id_, _, _ in scheduled}
                ends = [(num_new, num_stored) for _, num_new, num_stored in scheduled]
                logits = sum(id_ in ran for id_, _ in new_tokens)
                features = _count(ends, logits, num_cleared * block_size, num_moved * block_size)
                samples.append(Sample(features, event.schedule_ms + event.run_ms + event.update_ms))
                num_cleared = num_moved = 0
    return samples


def _count(ends: Sequence[tuple[int, int]], logits: int, cleared: int, moved: int) -> Features:
    """`ends`: for each request its new tokens, and its stored tokens after them."""
    singles = [end for num_new, end in ends if num_new == 1]
    chunks = [(num_new, end) for num_new, end in ends if num_new > 1]
    return Features(
        singles=len(singles),
        chunks=len(chunks),
        chunk_tokens=sum(num_new for num_new, _ in chunks),
        logits=logits,
        products=sum(num_new * end for num_new, end in chunks),
        single_kv=sum(singles),
        chunk_kv=sum(end for _, end in chunks),
        cleared=cleared,
        moved=moved,
    )


def fit(samples: Sequence[Sample], machine: Machine, shape: EngineShape, provenance: dict[str, object]) -> CostModel:
    """Least squares of the relative error, prices not negative. Raises ConfigError for too few steps.

    Relative to the prediction, in a few rounds: relative to the measurement, a step that some other process delayed
    would count for less than one that ran free, and every price would come out too low.
    """
    if len(samples) < FEWEST_STEPS:
        raise ConfigError(f"fit: {len(samples)} steps are too few for {len(NAMES)} prices; record {FEWEST_STEPS}")
    counts = np.array([(1, *astuple(sample.features)) for sample in samples], dtype=np.float64)  # [steps, terms]
    measured = np.array([sample.ms for sample in samples])
    if not measured.min() > 0:
        raise ConfigError("fit: a step took no time; record with a clock that advances")
    weights = 1 / measured
    for _ in range(NUM_ROUNDS):
        prices = nnls(counts * weights[:, None], measured * weights)
        weights = 1 / np.maximum(counts @ prices, measured.min())
    terms = tuple(
        Term(name, float(price), int(column.min()), int(column.max()))
        for name, price, column in zip(NAMES, prices, counts.T, strict=True)
    )
    mean_error = float(np.abs(counts @ prices / measured - 1).mean())
    return CostModel(terms, len(samples), mean_error, machine, shape, provenance)


def scaled(model: CostModel, target: Machine, extrapolate: bool = False) -> CostModel:
    """The model for a machine one does not have: a guess by its roofs, marked as such and fitted to nothing.

    What reads memory is scaled by the bandwidths, what multiplies by the FLOP/s, and the fixed terms are kept: the
    launching and the Python are the same, the reading of weights that is in them is not. Raises ConfigError unless
    the caller says `extrapolate=True`.
    """
    if not extrapolate:
        raise ConfigError(
            f"the cost model was measured on {model.machine.name}; for {target.name} it is a guess from two roofs: "
            "say extrapolate=True to have it, or record runs there"
        )
    ratios = {
        "fixed": 1.0,
        "memory": model.machine.gb_per_s / target.gb_per_s,
        "compute": model.machine.tflops / target.tflops,
    }
    terms = tuple(Term(t.name, t.ms * ratios[BOUND[t.name]], t.low, t.high) for t in model.terms)
    measured_on = model.extrapolated_from or model.machine.name
    return replace(model, terms=terms, machine=target, run_errors={}, extrapolated_from=measured_on)
