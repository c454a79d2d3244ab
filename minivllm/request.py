"""What is asked (SamplingParams) and the engine's own record of it (Request); results are in outputs.py."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from minivllm.errors import ConfigError, short

MAX_SAMPLES = 16384  # of one request; vLLM's own limit


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop; vLLM's names, defaults and meanings.

    Order of work on the logits: min_tokens, penalties, temperature, min_p, top_k, top_p. Logprobs are those of the
    raw logits. temperature 0 is greedy. top_k 0 or -1 keeps all. Equal seed and prompt give equal noise whatever
    else is in the batch, and so equal tokens, as far as the dtype's rounding is the same: in fp32 but for ties; in bf16
    large batches are computed by another formula (attention/torch_backend.py) and may part.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    num_speculative_tokens: int | None = None  # None: as the engine's speculative_config says; 0: no drafts
    speculative_method: str | None = None  # one of the engine's methods, or "off"; None: the first

    def __post_init__(self) -> None:
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _real("repetition_penalty", self.repetition_penalty, 0, math.inf, "above 0")
        _real("temperature", self.temperature, 0, math.inf, "at least 0 (0 is greedy)", closed=True)
        _real("top_p", self.top_p, 0, 1, "above 0 and at most 1")
        _real("min_p", self.min_p, 0, 1, closed=True)
        _whole("n", self.n, 1)
        if self.n > MAX_SAMPLES:
            raise ConfigError(f"n must be at most {MAX_SAMPLES}, not {self.n}")
        _whole("top_k", self.top_k, -1)
        _whole("min_tokens", self.min_tokens, 0)
        for name, least in (
            ("seed", -(2**63)),
            ("max_tokens", 1),
            ("logprobs", 0),
            ("prompt_logprobs", 0),
            ("num_speculative_tokens", 0),
        ):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), least)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {short(getattr(self, name))}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        if self.temperature == 0 and self.n > 1:
            raise ConfigError("n must be 1 with temperature 0: greedy samples would all be equal")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop is not None and not (isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop)):
            raise ConfigError(f"stop must be a non-empty string or a list of them, not {short(self.stop)}")
        if self.stop_strings and not self.detokenize:
            raise ConfigError("stop strings need detokenize=True; use stop_token_ids without it")
        if not isinstance(self.stop_token_ids, list | tuple | None):
            raise ConfigError(f"stop_token_ids must be a list of token ids, not {short(self.stop_token_ids)}")
        if not isinstance(self.speculative_method, str | None):
            raise ConfigError(f"speculative_method must be a name or None, not {short(self.speculative_method)}")
        for token in self.stop_token_ids or ():
            _whole("stop_token_ids", token, 0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


def _real(
    name: str, value: object, least: float, most: float, rule: str | None = None, closed: bool | None = None
) -> None:
    """Check a number; the lower end belongs to the range when `closed` (default: unless it is 0)."""
    rule = rule or f"from {least:g} to {most:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{name} must be a finite number {rule}, not {short(value)}")
    is_low = value < least or (value == least == 0 and not closed)
    if is_low or value > most:
        raise ConfigError(f"{name} must be {rule}, not {short(value)}")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, not {short(value)}")


@dataclass(eq=False, slots=True)
class BlockTable:
    """Which physical block holds which positions, for one group of layers: entry i those from i * block_size on."""

    block_ids: list[int] = field(default_factory=list)
    num_dropped: int = 0  # leading blocks that fell out of the group's window: null blocks in the table

    @property
    def live_ids(self) -> list[int]:
        return self.block_ids[self.num_dropped :]


@dataclass(eq=False, slots=True)
class Request:
    """One sequence in the engine. `num_computed` catches up with `num_tokens`; there are no phases."""

    id: str
    token_ids: list[int]  # prompt, then output
    num_prompt: int
    params: SamplingParams
    max_tokens: int  # output tokens allowed; the engine cuts it to the room that max_model_len leaves
    seed: int = 0
    priority: int = 0  # lower runs first
    salt: str = ""  # namespace of the prefix cache
    arrival: int = 0  # order of arrival; breaks ties
    arrival_step: int = 0  # how many steps had run
    arrival_s: float = 0.0  # monotonic clock
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_computed: int = 0  # tokens whose K and V are stored, or will be by the steps that are launched
    num_promised: int = 0  # tokens that launched steps will choose: nobody knows them yet
    num_cached: int = 0  # prompt tokens found in the prefix cache when first admitted
    num_preemptions: int = 0
    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    tables: list[BlockTable] = field(default_factory=lambda: [BlockTable()])  # one for each group of layers
    block_hashes: list[int] = field(default_factory=list)  # chained, one for each full block of token_ids
    reserved_ids: list[int] = field(default_factory=list)  # set aside by a contiguous allocator, not yet in the table
    host_ids: list[int] = field(default_factory=list)  # where swapped-out tables wait, entry for entry
    pending_forks: list["Request"] = field(default_factory=list)  # samples that begin when the prompt is computed
    is_steered: bool = False  # its owner chooses its tokens: beam search
    is_held: bool = False  # steered, its logits are delivered, and it waits for the choice
    num_published: int = 0  # leading blocks that were offered to the prefix cache
    num_drafted: int = 0  # tokens that were proposed to it
    num_accepted_drafts: int = 0
    draft_length: int | None = None  # of an adaptive drafter; None: the longest
    num_losses: int = 0  # rounds in a row of which nothing was accepted
    drafts_again_at: int = 0  # tokens; until then an adaptive drafter keeps silent
    cache_parent: int | str | None = None  # the cache entry that the next published block continues; None: cannot

    @property
    def block_ids(self) -> list[int]:
        """The first group's table: the only one, unless some layers have a sliding window and others have none."""
        return self.tables[0].block_ids

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_expected(self) -> int:
        """Known and promised tokens."""
        return len(self.token_ids) + self.num_promised

    @property
    def num_booked(self) -> int:
        """Computed tokens that are known: a launched step may compute a promised one."""
        return min(self.num_computed, len(self.token_ids))

    @property
    def num_missing(self) -> int:
        """Tokens that the next step has to compute; 0 where the promised token will be the last."""
        is_last = self.num_promised and self.num_output + self.num_promised >= self.max_tokens
        return 0 if is_last else len(self.token_ids) + self.num_promised - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    def end_reason(self, token_id: int, eos_token_ids: Sequence[int]) -> str | None:
        """Why its last token ends the request; None if it does not."""
        params, num_output = self.params, self.num_output
        if num_output >= params.min_tokens:
            if not params.ignore_eos and token_id in eos_token_ids:
                return "stop"
            if params.stop_token_ids and token_id in params.stop_token_ids:
                return "stop"
        return "length" if num_output >= self.max_tokens else None

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED
