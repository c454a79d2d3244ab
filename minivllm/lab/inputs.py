"""What came to an engine from outside, between its steps or during one, as records that another engine can be given.

Some belong to a moment of the run: a request arrives, a user hangs up. Others belong to a moment in the life of a
request, whenever that is: a stop string was found in its text, a beam was given its next token. `anchor` tells which.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol

from minivllm.engine.engine import Engine
from minivllm.request import Request


@dataclass(frozen=True, slots=True)
class Anchor:
    """When this request has so many tokens and, if it was so, waits for its owner's choice."""

    request_id: str
    num_tokens: int
    is_held: bool = False

    def is_reached(self, engine: Engine) -> bool:
        request = engine.requests.get(self.request_id)
        return request is not None and request.num_tokens == self.num_tokens and self.is_held <= request.is_held


class Input(Protocol):
    """One call from outside. `apply` makes it again: False when that came to nothing, RequestError when refused."""

    @property
    def anchor(self) -> Anchor | None: ...
    def apply(self, engine: Engine) -> bool: ...


@dataclass(frozen=True, slots=True)
class Noted:
    """An input and when it came: after step `step`, or, `in_run`, while that step ran."""

    step: int
    in_run: bool
    input: Input

    def is_after(self, step: int) -> bool:
        """Whether it came after that step had ended."""
        return self.step > step or (self.step == step and not self.in_run)


@dataclass(frozen=True)
class Add:
    """A request arrived; `request` is as it was then."""

    request: Request
    anchor: None = None

    def apply(self, engine: Engine) -> bool:
        engine.add(deepcopy(self.request))
        return True


@dataclass(frozen=True)
class Fork:
    """A request was split off another; with tokens and a length of its own, if its owner gave any."""

    parent_id: str
    child_id: str
    seed: int
    own_token_ids: tuple[int, ...]
    max_tokens: int
    anchor: Anchor

    @staticmethod
    def of(anchor: Anchor, child: Request) -> "Fork":
        """Record a fork off the request that `anchor` names, as it stood then."""
        own_token_ids = tuple(child.token_ids[anchor.num_tokens :])
        return Fork(anchor.request_id, child.id, child.seed, own_token_ids, child.max_tokens, anchor)

    def apply(self, engine: Engine) -> bool:
        engine.fork(self.parent_id, self.child_id, self.seed, token_ids=self.own_token_ids, max_tokens=self.max_tokens)
        return True


@dataclass(frozen=True)
class Append:
    """A steered request was given its next token."""

    request_id: str
    token_id: int
    anchor: Anchor

    def apply(self, engine: Engine) -> bool:
        engine.append(self.request_id, self.token_id)
        return True


@dataclass(frozen=True)
class End:
    """A request was ended from outside: by a stop string, whose place is in the text, or by an abort."""

    request_id: str
    reason: str
    stop_reason: int | str | None
    anchor: Anchor | None

    def apply(self, engine: Engine) -> bool:
        return engine.finish(self.request_id, self.reason, self.stop_reason)


@dataclass(frozen=True)
class Pin:
    """A cached prefix was pinned."""

    name: str
    token_ids: tuple[int, ...]
    salt: str
    anchor: None = None

    def apply(self, engine: Engine) -> bool:
        engine.pins.pin(self.name, self.token_ids, self.salt)
        return True


@dataclass(frozen=True)
class Unpin:
    """A pinned prefix was let go."""

    name: str
    anchor: None = None

    def apply(self, engine: Engine) -> bool:
        engine.pins.unpin(self.name)
        return True


@dataclass(frozen=True)
class ResetCache:
    """All cached prefixes were forgotten."""

    anchor: None = None

    def apply(self, engine: Engine) -> bool:
        return engine.kv.reset_cache()
