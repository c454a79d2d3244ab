"""What a user gets back, under vLLM's names; and how tokens become text while they are still coming."""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol

from minivllm.engine.plan import TokenLogprobs
from minivllm.request import Request, SamplingParams

CONTEXT_TOKENS = 5  # prompt tokens decoded along with the first output token, so that a leading space is right
INCOMPLETE = "\ufffd"  # what a decoder prints for the first bytes of a character


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


@dataclass(frozen=True)
class Logprob:
    """A token's raw log probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds on the monotonic clock; None for what has not happened yet."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    num_preemptions: int
    num_drafted: int = 0  # tokens proposed to its samples
    num_accepted_drafts: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


def sum_counts(requests: Iterable[Request]) -> tuple[int, int, int]:
    """Preemptions, drafts and accepted drafts of a request's samples."""
    counts = [(r.num_preemptions, r.num_drafted, r.num_accepted_drafts) for r in requests]
    preempted, drafted, accepted = (sum(column) for column in zip(*counts, strict=True))
    return preempted, drafted, accepted


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a request; text and tokens are cumulative."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop, length or abort; None while it runs
    stop_reason: int | str | None = None  # the stop string or stop token id that ended it; None for EOS

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A request as it stands: finished, or on its way when streamed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int


class Detokenizer:
    """Text of a growing list of tokens: only what is new is decoded, and half a character is held back."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = params.skip_special_tokens
        self.stop_strings = params.stop_strings
        self.includes_stop = params.include_stop_str_in_output
        self.num_unsearched = params.min_tokens  # output tokens in which a stop string does not count
        self.text = ""
        self._token_ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._prefix, self._read = 0, len(self._token_ids)  # decoded context, and what of it is in `text` already

    def feed(self, token_ids: Sequence[int], is_last: bool) -> str | None:
        """Take in new tokens; return the stop string they complete, at which `text` is then cut."""
        self._token_ids.extend(token_ids)
        self.num_unsearched -= len(token_ids)
        known = self._decode(self._token_ids[self._prefix : self._read])
        grown = self._decode(self._token_ids[self._prefix :])
        if len(grown) <= len(known) or (grown.endswith(INCOMPLETE) and not is_last):
            return None
        searched = len(self.text)
        self.text += grown[len(known) :]
        self._prefix, self._read = self._read, len(self._token_ids)
        return self._cut_at_stop(searched) if self.num_unsearched < 0 else None

    def fork(self) -> "Detokenizer":
        """The same text so far, and a way of its own from here."""
        twin = copy(self)
        twin._token_ids = list(self._token_ids)
        return twin

    @property
    def shown_text(self) -> str:
        """Text without a tail that may yet turn out to be the start of a stop string."""
        for num_held in range(min(len(self.text), max(map(len, self.stop_strings), default=1) - 1), 0, -1):
            if any(stop.startswith(self.text[-num_held:]) for stop in self.stop_strings):
                return self.text[:-num_held]
        return self.text

    def _cut_at_stop(self, searched: int) -> str | None:
        found = []
        for stop in self.stop_strings:
            at = self.text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + len(stop)] if self.includes_stop else self.text[:at]
        return stop

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=self.skip_special_tokens) if token_ids else ""


@dataclass
class Sample:
    """One of a request's n samples: the engine's record, its text so far, its logprobs."""

    request: Request
    detokenizer: Detokenizer | None
    num_seen: int = 0  # output tokens that went to the detokenizer
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def fork(self, request: Request) -> "Sample":
        """What is known of this sample goes for `request` too, which was forked off its request."""
        return Sample(request, self.detokenizer and self.detokenizer.fork(), self.num_seen, list(self.logprobs))

    def find_stop(self) -> str | None:
        """The stop string that the tokens since the last call completed, if any; tokens behind it are dropped."""
        request = self.request
        if not request.params.stop_strings:
            return self._decode_new() if request.is_finished else None
        while self.num_seen < request.num_output:  # one by one: accepted drafts may go on behind it
            if stop := self._decode_new(1):
                del request.token_ids[request.num_prompt + self.num_seen :]
                return stop
        return None

    def judge(self, logprobs: list[TokenLogprobs]) -> None:
        """Take in the logprobs of new tokens; drafts behind the one that ended the request have some, too."""
        self.logprobs.extend(logprobs)
        del self.logprobs[self.request.num_output :]

    def _decode_new(self, most: int | None = None) -> str | None:
        first = self.request.num_prompt + self.num_seen
        new_token_ids = self.request.token_ids[first : None if most is None else first + most]
        self.num_seen += len(new_token_ids)
        is_last = self.request.is_finished and self.num_seen == self.request.num_output
        if is_last and self.request.finish_reason == "stop" and not self.request.params.include_stop_str_in_output:
            new_token_ids = new_token_ids[:-1]  # the token that ends a request is no part of its text, as in vLLM
        if self.detokenizer is None:
            return None
        return self.detokenizer.feed(new_token_ids, is_last=is_last)

    def output(self, index: int, tokenizer: Tokenizer | None) -> CompletionOutput:
        """The sample as it stands; without stop strings this is when its new tokens are decoded."""
        request, text = self.request, ""
        self._decode_new()
        if self.detokenizer:
            text = self.detokenizer.text if request.is_finished else self.detokenizer.shown_text
        wants_logprobs = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=request.output_token_ids[: self.num_seen],
            cumulative_logprob=sum(judged.logprob for judged in self.logprobs) if wants_logprobs else None,
            logprobs=[as_logprobs(judged, tokenizer) for judged in self.logprobs] if wants_logprobs else None,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


def as_logprobs(judged: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The chosen token first, then the most likely ones."""

    def text(token_id: int) -> str | None:
        return tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else None

    found = {judged.token_id: Logprob(judged.logprob, judged.rank, text(judged.token_id))}
    for rank, (token_id, logprob) in enumerate(judged.top, start=1):
        found.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
    return found
