"""The way of chosen tokens to the host: one small copy a step, read when somebody asks.

    device   | step 1 ............... | step 2 ............... | step 3 ............... |
                                   copy 1                   copy 2                   copy 3
    host       | launch 2 | wait for 1 | launch 3 | wait for 2  | launch 4 | wait for 3

Two places on the host, for one step is under way while the tokens of the one before it are read.
"""

from dataclasses import dataclass

import torch

from minivllm.engine.plan import StepResult


@dataclass(frozen=True)
class TokensOnTheirWay:
    """A launched step: `result()` waits until its tokens are on the host."""

    ids: list[str]  # of the requests, by row
    is_ready: list[bool]  # whether a row's token is the next one of its request
    token_ids: torch.Tensor  # [R] on the host
    is_copied: torch.cuda.Event | None
    allows_next: bool = True

    def result(self) -> StepResult:
        """The tokens of requests that are up to date."""
        if not any(self.is_ready):
            return StepResult({})  # chunks of prompts: nothing to wait for
        rows = zip(self.ids, self.is_ready, self.read(len(self.ids)), strict=True)
        return StepResult({id_: [token] for id_, is_ready, token in rows if is_ready})

    def read(self, num_rows: int) -> list[int]:
        """Wait for the tokens; those of the first rows."""
        if self.is_copied is not None:
            self.is_copied.synchronize()
        return self.token_ids[:num_rows].tolist()


class TokenReader:
    """Reads the tokens that lie in `chosen` [R] on a device."""

    def __init__(self, chosen: torch.Tensor) -> None:
        self.chosen = chosen
        self._hosts = [torch.zeros(chosen.shape, dtype=chosen.dtype, pin_memory=chosen.is_cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() if chosen.is_cuda else None for _ in range(2)]
        self._turn = 0

    def send(self, ids: list[str], is_ready: list[bool]) -> TokensOnTheirWay:
        """Have the tokens copied behind all that was launched."""
        self._turn = 1 - self._turn
        host, event = self._hosts[self._turn], self._events[self._turn]
        host.copy_(self.chosen, non_blocking=True)
        if event is not None:
            event.record()
        return TokensOnTheirWay(ids, is_ready, host, event)
