"""A recorded run's ledger in words and numbers: which kinds of steps took the time, and what their floors were."""

from collections.abc import Iterable, Sequence

from minivllm.course.calculators import Accelerator
from minivllm.course.step_ledger import PART_WORDS, LedgerRow, LedgerSum, by_group, row_of, summed
from minivllm.events import Event, StepRan
from minivllm.lab.ledger import Ledger
from minivllm.lab.step_floor import ModelWork

Steps = tuple[LedgerRow, ...]
HEAD = ("steps of a kind", "steps", "run ms", "floor ms", "share", "remainder ms", "host ms", "floor is mostly")


def steps_of(events: Iterable[Event], work: ModelWork, machine: Accelerator, block_bytes: Sequence[int]) -> Steps:
    """Cost a run after it ended, so that nothing is counted while it is timed; see `Ledger` for the arguments."""
    ledger, rows = Ledger(work, machine, block_bytes), []
    for event in events:
        cost = ledger.apply(event)
        if cost and isinstance(event, StepRan) and event.scheduled:
            rows.append(row_of(event, cost))
    return tuple(rows)


def ledger_lines(name: str, steps: Steps, wall_s: float) -> list[str]:
    """A table by kind of step, and where the remainder is the largest; `wall_s` is what the whole run took."""
    whole, groups = summed(steps), by_group(steps)
    rows = [HEAD, *(_cells(each) for each in (*groups, whole))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    worst = max(groups, key=lambda each: each.remainder_ms, default=whole)
    return [
        f"{name}: the floor is {whole.share:.0%} of {whole.run_ms / 1e3:.3f} s in {whole.num_steps:,} steps",
        *(f"   {line}" for line in table),
        f"   remainder {whole.remainder_ms:,.1f} ms, the most of it in {worst.name}: {worst.remainder_ms:,.1f} ms;"
        f" not in steps: {1e3 * wall_s - whole.run_ms:,.1f} ms of {1e3 * wall_s:,.1f} ms, host work of steps in it"
        " where it is not hidden",
    ]


def ledger_facts(steps: Steps, wall_s: float) -> dict[str, object]:
    """The same for a result file, compact."""
    return {"recorded_s": round(wall_s, 4), "kinds": [_facts(each) for each in (*by_group(steps), summed(steps))]}


def _cells(each: LedgerSum) -> tuple[str, ...]:
    times = (f"{ms:,.1f}" for ms in (each.run_ms, each.floor_ms))
    rest = (f"{ms:,.1f}" for ms in (each.remainder_ms, each.host_ms))
    return (each.name, f"{each.num_steps:,}", *times, f"{each.share:.0%}", *rest, each.most_of_floor)


def _facts(each: LedgerSum) -> dict[str, object]:
    parts = {f"{words}_ms": round(getattr(each.parts, name), 2) for name, words in PART_WORDS.items()}
    return {
        "kind": each.name, "steps": each.num_steps, "run_ms": round(each.run_ms, 2),
        "floor_ms": round(each.floor_ms, 2), "host_ms": round(each.host_ms, 2),
        **{name.replace(" ", "_").lower(): value for name, value in parts.items()},
        "weights_GB": round(each.weight_bytes / 1e9, 3), "kv_GB": round(each.kv_bytes / 1e9, 3),
        "logits_GB": round(each.logit_bytes / 1e9, 3), "TFLOP": round(each.flops / 1e12, 3),
    }  # fmt: skip
