"""PTX in which `warp_specialize` may overwrite shared memory that some warps have still to read.

Triton 3.6 passes scalars to the worker warps through shared memory, in the place where a sum across warps lay just
before, and puts no barrier between: a warp that is quick writes over what a slow one is about to read. One launch in
some hundreds then had two ideas of its share, and hung. Looked at: from each `barrier.sync` back to the last barrier.
"""

BARRIERS = ("bar.sync", "barrier.sync")


def overtaken_loads(ptx: str) -> list[str]:
    """Loads of shared memory with a store behind them and no barrier between, where the workers are started."""
    lines = [line.strip() for line in ptx.splitlines()]
    starts = [place for place, line in enumerate(lines) if line.startswith("barrier.sync")]
    return [load for place in starts for load in _loads_before_stores(lines[:place])]


def _loads_before_stores(lines: list[str]) -> list[str]:
    loads, has_store = [], False
    for line in reversed(lines):
        if line.startswith((*BARRIERS, "$L__BB")):
            break
        has_store |= "st.shared" in line
        if has_store and "ld.shared" in line:
            loads.append(line)
    return loads
