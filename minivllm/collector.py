"""Keeps Python's garbage collector off what was there before a run: a pass over it takes longer than many steps.

    objects | modules, weights, a pool of 70,000 blocks | what the run makes |
              frozen: no pass looks at them                looked at as ever

Libraries alone bring half a million objects, and a pass over all of them falls into some step, for 50 to 300 ms. They
are thawed when the run ends, so what was garbage among them is found then.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

OWN_OF_PYTHON = 1000  # Python 3.12 begins with 375 frozen objects; who freezes on purpose freezes all there are
_guard = Lock()
_num_runs = 0  # that are under way, in all threads


@contextmanager
def older_objects_frozen() -> Iterator[None]:
    """Run the block under `with` so; where somebody else has frozen objects, theirs stay as they are."""
    global _num_runs
    with _guard:
        is_ours = _num_runs > 0 or gc.get_freeze_count() < OWN_OF_PYTHON
        if is_ours and _num_runs == 0:
            gc.freeze()
        _num_runs += is_ours
    try:
        yield
    finally:
        with _guard:
            _num_runs -= is_ours
            if is_ours and _num_runs == 0:
                gc.unfreeze()
