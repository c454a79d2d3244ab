"""The time of the engine room: what passed while the engine was driven, or so many seconds for each step."""

import time
from math import inf

from minivllm.errors import ConfigError, short

LONGEST_NAP_S = 0.02  # between two looks at what was asked


def step_seconds(step_s: float | None) -> float | None:
    """What a step may count. Raises ConfigError for anything but a number above 0, or None."""
    if step_s is None or (isinstance(step_s, int | float) and not isinstance(step_s, bool) and 0 < step_s < inf):
        return step_s
    raise ConfigError(f"a step counts seconds, a number above 0, or None for those of the clock, not {short(step_s)}")


class RoomClock:
    """Stands still until `run`, and again after `halt`. With `step_s` a step takes that long, whatever it took."""

    def __init__(self, step_s: float | None = None) -> None:
        self.step_s = step_s
        self._past_s = 0.0
        self._since_s: float | None = None

    def __call__(self) -> float:
        running_s = time.monotonic() - self._since_s if self._since_s is not None else 0.0
        return self._past_s + running_s

    def run(self) -> None:
        if self._since_s is None and self.step_s is None:
            self._since_s = time.monotonic()

    def halt(self) -> None:
        self._past_s, self._since_s = self(), None

    def count_step(self) -> None:
        """A step begins; on a counted clock its tokens are there at once, at its end."""
        self._past_s += self.step_s or 0.0

    def skip_to(self, due_s: float) -> None:
        """Nothing happens until then: leave the time out."""
        if self() < due_s < inf:
            self._past_s += due_s - self()

    def rest(self, due_s: float) -> None:
        """Wait for what is due, for a moment at most; a counted clock is there at once."""
        if self.step_s is None or due_s == inf:
            time.sleep(max(0.0, min(due_s - self(), LONGEST_NAP_S)))
        else:
            self.skip_to(due_s)
