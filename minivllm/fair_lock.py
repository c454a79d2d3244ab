"""A lock that is fair: a thread that steps the engine in a loop cannot starve those that add or abort."""

import threading


class FairLock:
    """A reentrant lock: who lets go and comes straight back, as a thread that steps does, queues behind who waits."""

    def __init__(self) -> None:
        self._turnstile, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None  # ident of the thread inside
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner != threading.get_ident():
            with self._turnstile:
                self._lock.acquire()
            self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()
