"""A hand-made run with everything a block map can show, and what a reader of slots would find."""

from minivllm.events import (
    Added,
    Admitted,
    BlockCached,
    BlocksReleased,
    BlocksTaken,
    Evicted,
    Finished,
    Preempted,
    PrefixHit,
    StepRan,
    Waited,
)
from minivllm.trace import Trace
from minivllm.views.block_table import SlotBytes

HOSTILE = "<img src=x onerror=window.hacked=1>"
HEADER: dict[str, object] = {
    "num_blocks": 12, "block_size": 4, "num_layers": 2, "num_kv_heads": 3, "head_size": 8, "model": "hand-made",
    "dtype": "float32", "kv_bytes_per_token": 384, "live": "recorded", "machine": "none", "seed": 0,
}  # fmt: skip


def ran(step: int, *scheduled: tuple[str, int, int]) -> StepRan:
    return StepRan(step, scheduled, (), len(scheduled), 0, 0, 0.1, 1.0, 0.1, f"hash {step}")


def small_trace(num_blocks: int = 12) -> Trace:
    """Step 1 fills a prefix; 2 shares it; 3 finishes its first owner; 4 preempts; 5 evicts what was cached."""
    return Trace({**HEADER, "num_blocks": num_blocks}, [
        Added(0, "a", 9, 8, 0), Added(0, HOSTILE, 10, 6, 0),
        BlocksTaken(1, "a", (1, 2, 3)), Admitted(1, "a", 0, 0), Waited(1, HOSTILE, "no_budget"),
        BlockCached(1, "a", 1, 11), BlockCached(1, "a", 2, 12), ran(1, ("a", 9, 9)),
        PrefixHit(2, HOSTILE, (1, 2), 8), BlocksTaken(2, HOSTILE, (4,)), Admitted(2, HOSTILE, 8, 0),
        ran(2, ("a", 1, 10), (HOSTILE, 2, 10)),
        BlocksReleased(3, "a", (1, 2, 3)), Finished(3, "a", "stop", 2), ran(3, ("a", 1, 11), (HOSTILE, 1, 11)),
        Preempted(4, HOSTILE, 11), BlocksReleased(4, HOSTILE, (1, 2, 4)), Waited(4, HOSTILE, "just_preempted"), ran(4),
        Evicted(5, 2), BlocksTaken(5, HOSTILE, (2, 3, 5)), Admitted(5, HOSTILE, 0, 1), ran(5, (HOSTILE, 11, 11)),
    ])  # fmt: skip


def token_texts(request_id: str) -> list[str]:
    return [f"{request_id[:1]}{i}" for i in range(9)] + [" end\n", HOSTILE]


def read_slot(layer: int, slot: int) -> SlotBytes:
    """K of head h is 100 * layer + slot + h / 10; V its negative."""
    k = tuple((100.0 * layer + slot + head / 10,) * 8 for head in range(3))
    return SlotBytes(slot * 96, 0x10000 + slot * 96, 32, 32, k, tuple((-row[0],) * 8 for row in k))
