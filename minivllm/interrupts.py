"""Ctrl-C between steps, never inside one: the tables of the engine are whole when KeyboardInterrupt is raised."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Hold back SIGINT; the function given to the body raises KeyboardInterrupt when one is waiting.

    A second Ctrl-C is not held back. Outside the main thread there is nothing to hold: signals never arrive there.
    """
    pressed = False

    def hold(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(signum, frame)
        pressed = True

    def let_through() -> None:
        if pressed:
            raise KeyboardInterrupt

    is_ending = sys.is_finalizing() or signal.getsignal is None  # a generator left open is closed at the very end
    if is_ending or threading.current_thread() is not threading.main_thread():
        yield let_through
        return
    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, previous)
    let_through()
