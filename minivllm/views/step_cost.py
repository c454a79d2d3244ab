"""W6 by measurement: where the milliseconds of a run's steps went, each step held against its floor.

    floor    = max(weight read, products) + max(K, V read, attention), at the machine's rates
    overhead = what the step took (run_ms) beyond that: launches, small kernels, bandwidth not reached
Only the last steps of a long run are kept.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from minivllm.course.calculators import Accelerator, accelerator, compute_ms, read_ms
from minivllm.course.calculators.model_fields import Config
from minivllm.course.step_work import CountedModel, counted_model
from minivllm.errors import MiniVLLMError
from minivllm.events import Event, EventBus, StepRan
from minivllm.trace import Trace
from minivllm.views.block_map_picture import provenance
from minivllm.views.sketch import WIDTH_PX, SketchPicture, seek
from minivllm.views.sketch import table as text_table
from minivllm.views.sketch_view import SketchView
from minivllm.views.sources import LiveSource, Source, TraceSource
from minivllm.views.stacked_bars import HEIGHT, PARTS, Bar, StepParts, stacked_bars
from minivllm.views.step_work import compute_dtype, ms
from minivllm.views.theme import counted

NUM_KEPT = 240  # steps of a long run
NUM_SHOWN = 60  # bars
NUM_LISTED = 16  # rows of the text twin


@dataclass(frozen=True)
class Machine:
    """What the steps are held against: a model in a type on a chip, as named or as measured (lab/step_floor.py)."""

    model: Config
    chip: str | Accelerator
    dtype: str = "bf16"  # of weights, K, V and arithmetic

    @cached_property
    def counted(self) -> CountedModel:
        return counted_model(self.model)


class Cost(NamedTuple):
    """One step, measured and explained."""

    step: int
    num_tokens: int
    num_requests: int
    run_ms: float
    parts: StepParts

    @property
    def is_too_fast(self) -> bool:
        """It took less than its floor: the machine is not the one it ran on."""
        return self.run_ms < self.parts.floor


class CostPicture(SketchPicture):
    costs: list[Cost]
    step: int


class CostFold:
    """Keeps the last steps."""

    def __init__(self, machine: Machine, num_kept: int | None = NUM_KEPT) -> None:
        self.step = 0
        self._machine = machine
        self._costs: deque[Cost] = deque(maxlen=num_kept)

    def apply(self, event: Event) -> None:
        self.step = max(self.step, event.step)
        if isinstance(event, StepRan) and event.scheduled:
            self._costs.append(cost(event, self._machine))

    def state(self) -> tuple[Cost, ...]:
        return tuple(self._costs)


class StepCost(SketchView):
    """`StepCost.replay(trace, Machine("llama-3-8b", "h200-sxm"))`; control: step."""

    def __init__(self, make_source: Callable[[Callable[[], None]], Source[tuple[Cost, ...]]]) -> None:
        self._step: int | None = None  # None: the newest
        self.source = make_source(self.refresh)
        super().__init__()

    @staticmethod
    def replay(trace: Trace, machine: Machine) -> "StepCost":
        """Explain a recorded run."""
        if not isinstance(trace, Trace):
            raise MiniVLLMError(f"StepCost.replay draws a Trace (Trace.load(path)), not {type(trace).__name__}")
        source = TraceSource(lambda header: CostFold(machine, None), trace)
        return StepCost(lambda wake: source)

    @staticmethod
    def follow(bus: EventBus, header: Mapping[str, object], machine: Machine, past: Iterable[Event] = ()) -> "StepCost":
        """Explain steps while they run."""
        return StepCost(lambda wake: LiveSource(lambda header: CostFold(machine), bus, header, past, wake))

    def drawn(self) -> CostPicture:
        return draw(self.source.state(), self._step, provenance(self.source.header))

    def stop(self) -> None:
        self.source.stop()
        super().stop()

    def _moved(self, control: str, value: object) -> None:
        if control != "step":
            raise MiniVLLMError(f"step cost has no control {control!r}; it has step")
        self._step = seek(self.drawn()["steps"], value)


def cost(event: StepRan, machine: Machine) -> Cost:
    """The floor of a step that ran, and what it took beyond."""
    chip, scheduled = accelerator(machine.chip), [(new, stored) for _, new, stored in event.scheduled]
    num_tokens = sum(new for new, _ in scheduled)
    rate = compute_dtype(chip, machine.dtype)
    matrices = machine.counted.products(num_tokens, machine.dtype)
    attention = machine.counted.attention_of(scheduled, machine.dtype)
    reads = [float(read_ms(work.num_bytes, chip)) for work in (matrices, attention)]
    computes = [float(compute_ms(work.flops, chip, dtype=rate)) for work in (matrices, attention)]
    unhidden = sum(max(compute - read, 0.0) for compute, read in zip(computes, reads, strict=True))
    parts = StepParts(reads[0], reads[1], unhidden)
    parts = parts._replace(overhead=max(event.run_ms - parts.floor, 0.0))
    return Cost(event.step, num_tokens, len(scheduled), event.run_ms, parts)


def draw(costs: tuple[Cost, ...], step: int | None = None, origin: str = "") -> CostPicture:
    """The steps round the chosen one, which is the last one kept unless told otherwise."""
    index = _index(costs, step)
    start = max(0, min(index - NUM_SHOWN // 2, len(costs) - NUM_SHOWN))
    shown = costs[start : start + NUM_SHOWN]
    listed = shown[max(index - start - NUM_LISTED // 2, 0) :][:NUM_LISTED]
    title = _title(costs[index]) if costs else "No step has run yet."
    bars = [Bar(str(c.step), c.parts, _title(c), ("step", c.step)) for c in shown]
    return {
        "view": "step-cost", "title": title, "aria": f"Step cost. {title}", "text": _text(title, listed),
        "status": "",
        "width": WIDTH_PX, "height": HEIGHT, "marks": stacked_bars(bars, index - start, "step"), "controls": [],
        "steps": (costs[0].step, costs[-1].step, costs[index].step) if costs else None,
        "legend": list(PARTS.values()), "lines": _lines(costs), "lines_name": "over all steps kept",
        "provenance": origin, "costs": list(shown), "step": costs[index].step if costs else 0,
    }  # fmt: skip


def _index(costs: tuple[Cost, ...], step: int | None) -> int:
    """The kept step that is nearest before the wanted one; steps that scheduled nothing have no cost."""
    if step is None:
        return max(len(costs) - 1, 0)
    return max(sum(c.step <= step for c in costs) - 1, 0)


def _title(cost: Cost) -> str:
    """One step in words."""
    p, share = cost.parts, 100 * cost.parts.floor / cost.run_ms if cost.run_ms else 0.0
    start = f"Step {cost.step}, {counted(cost.num_tokens, 'token')} of {counted(cost.num_requests, 'request')}, took"
    if cost.is_too_fast:
        return f"{start} {ms(cost.run_ms)}, less than its floor of {ms(p.floor)}: it ran on a faster machine."
    return (
        f"{start} {ms(cost.run_ms)}, of which {ms(p.weights)} for weights, {ms(p.kv)} for K and V, {ms(p.arithmetic)}"
        f" for arithmetic: the floor is {share:.0f}%."
    )


def _lines(costs: tuple[Cost, ...]) -> list[str]:
    """Where the time of all kept steps went; steps below their floor would only blur that."""
    explained = [c for c in costs if not c.is_too_fast]
    total = sum(c.run_ms for c in explained)
    lines = []
    if total:
        sums = {name: sum(getattr(c.parts, name) for c in explained) for name in StepParts._fields}
        shares = [f"{PARTS[name].words.split(':')[0]} {100 * value / total:.1f}%" for name, value in sums.items()]
        lines.append(f"{counted(len(explained), 'step')}, {ms(total)}: {', '.join(shares)}")
    too_fast = len(costs) - len(explained)
    if too_fast:
        lines.append(f"{counted(too_fast, 'step')} took less than the floor: name the machine of the run")
    return lines


def _text(title: str, costs: tuple[Cost, ...]) -> str:
    rows = [["step", "tokens", "requests", *(name + " ms" for name in StepParts._fields), "took ms"]]
    for c in costs:
        facts = [str(c.step), str(c.num_tokens), str(c.num_requests)]
        rows.append([*facts, *(f"{value:.3g}" for value in c.parts), f"{c.run_ms:.3g}"])
    return "\n".join([title, *text_table(rows)])
