"""Calls a function at most ten times a second, from a thread of its own that comes when needed and goes when idle.

Invariant: after the last `request` there is one more call, so the final state is always delivered.
"""

import logging
import threading
from collections.abc import Callable

INTERVAL_S = 0.1  # between two calls: at most 10 a second
IDLE_S = 2.0  # a thread without work this long ends


class Publisher:
    """`request` is cheap and comes from any thread; many requests between two calls count as one."""

    def __init__(self, call: Callable[[], None], interval_s: float = INTERVAL_S, idle_s: float = IDLE_S) -> None:
        self._call = call
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._num_requested = 0
        self._num_served = 0
        self._is_stopped = False

    def request(self) -> None:
        """Ask for a call soon; does nothing once stopped."""
        with self._changed:
            if self._is_stopped:
                return
            self._num_requested += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="minivllm-view", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every request made so far is served; False when that took too long."""
        with self._changed:
            target = self._num_requested
            return self._changed.wait_for(lambda: self._num_served >= target or self._is_stopped, timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Serve what is outstanding, then end the thread; safe to call twice, also from the thread itself."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    @property
    def is_running(self) -> bool:
        with self._changed:
            return self._thread is not None

    def _run(self) -> None:
        while (num_requested := self._next()) is not None:
            try:
                self._call()
            except Exception:  # the page is gone, or a bug: a view must not end what it watches
                logging.getLogger(__name__).exception("a view could not be published")
            self._served(num_requested)

    def _next(self) -> int | None:
        """Wait for work; None, and the thread is no longer ours, when there is none for long."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._has_work, self._idle_s)
            if self._has_work:
                return self._num_requested
            self._thread = None
            return None

    def _served(self, num_requested: int) -> None:
        """Book the call, then keep the distance to the next one, unless stopped meanwhile."""
        with self._changed:
            self._num_served = num_requested
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_stopped, self._interval_s)

    @property
    def _has_work(self) -> bool:
        return self._num_requested > self._num_served
