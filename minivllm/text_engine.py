"""Text in, text out, round the engine: check and tokenize prompts, step, detokenize, hand results to their owners.

Any thread may add, step or abort; a lock lets in one at a time. Every step advances the requests of all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from minivllm.config import require_integers
from minivllm.engine.engine import Engine
from minivllm.engine.plan import TokenLogprobs
from minivllm.errors import RequestError, short
from minivllm.fair_lock import FairLock
from minivllm.interrupts import held_interrupts
from minivllm.outputs import Detokenizer, RequestMetrics, RequestOutput, Sample, Tokenizer, as_logprobs, sum_counts
from minivllm.prompts import Prompt, open_dict, require_unicode
from minivllm.request import Request, SamplingParams


@dataclass(frozen=True)
class Checked:
    """A prompt that passed the door."""

    text: str | None
    token_ids: list[int]
    salt: str = ""


@dataclass(eq=False)
class Generation:
    """A user's request with its n samples; `output()` tells how it stands."""

    request_id: str
    prompt: Checked
    samples: list[Sample]
    tokenizer: Tokenizer | None
    on_update: Callable[["Generation"], None] | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None

    @property
    def is_finished(self) -> bool:
        samples = self.samples
        return samples[0].request.is_finished if len(samples) == 1 else all(s.request.is_finished for s in samples)

    def output(self) -> RequestOutput:
        first = self.samples[0].request
        judged = [None, *(as_logprobs(judged, self.tokenizer) for judged in self.prompt_logprobs)]
        finish_times = [sample.request.finished_s for sample in self.samples]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            prompt_logprobs=judged if first.params.prompt_logprobs is not None else None,
            outputs=[sample.output(index, self.tokenizer) for index, sample in enumerate(self.samples)],
            finished=self.is_finished,
            metrics=RequestMetrics(
                first.arrival_s,
                first.first_scheduled_s,
                first.first_token_s,
                max(t for t in finish_times if t is not None) if self.is_finished else None,
                *sum_counts(sample.request for sample in self.samples),
            ),
            num_cached_tokens=first.num_cached,
        )


class Steerer(Protocol):
    """Chooses the tokens of its requests itself; called inside a step, under the lock."""

    def take(self, request: Request, judged: TokenLogprobs) -> None: ...
    def fail(self, error: Exception) -> None: ...


class TextEngine:
    """The engine with a tokenizer at its door."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, model: str, vocab_size: int, seed: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model = model
        self.vocab_size = vocab_size
        self.seed = seed
        self.lock = FairLock()
        self.steerers: dict[str, Steerer] = {}  # by the id of each request they steer
        self._generations: dict[str, Generation] = {}  # by the id of each sample's request
        self._numbers = count()

    def check(self, prompt: Prompt, where: str = "prompt") -> Checked:
        """Turn what a user gave into token ids. Raises RequestError, naming `where`, for anything unusable."""
        given, salt = open_dict(prompt, where) if isinstance(prompt, Mapping) else (prompt, "")
        if isinstance(given, str):
            return Checked(given, self._encode(given, where), salt)
        if not isinstance(given, Sequence) or isinstance(given, bytes):
            raise RequestError(f"{where}: must be a string, a list of token ids or a dict, not {short(given)}")
        if not given:
            raise RequestError(f"{where}: the prompt is empty; give at least one token")
        for position, token_id in enumerate(given):
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise RequestError(f"{where}: token id {short(token_id)} at position {position} is not an integer")
            if not 0 <= token_id < self.vocab_size:
                size = self.vocab_size
                raise RequestError(f"{where}: token id {token_id} at position {position} is not in 0..{size - 1}")
        return Checked(None, list(given), salt)

    def add(
        self,
        prompt: Checked,
        params: SamplingParams,
        priority: int = 0,
        request_id: str | None = None,
        on_update: Callable[[Generation], None] | None = None,
    ) -> Generation:
        """Queue a request with its n samples; all or none. Raises RequestError when it could never run."""
        self._check_params(params, priority)
        with self.lock:
            number, request_id = self._named(request_id)
            seed = params.seed if params.seed is not None else self._seed_of(number)
            samples = [self._sample(request_id, index, prompt, params, seed, priority) for index in range(params.n)]
            generation = Generation(request_id, prompt, samples, self.tokenizer, on_update)
            samples[0].request.pending_forks = [sample.request for sample in samples[1:]]  # the prompt is computed once
            self.engine.add(samples[0].request)
            self._generations.update({sample.request.id: generation for sample in samples})
            return generation

    def fork(
        self,
        generation: Generation,
        index: int = 0,
        seed: int | None = None,
        request_id: str | None = None,
        on_update: Callable[[Generation], None] | None = None,
    ) -> Generation:
        """Split off sample `index` as a request of its own, in any state: the same tokens and text so far, all blocks.

        Without a `seed` it gets a fresh one; greedy forks never part. Raises RequestError when the sample has ended.
        """
        require_integers(index=index, seed=seed)
        with self.lock:
            if index is None or not 0 <= index < len(generation.samples):
                raise RequestError(f"fork: sample {index} is not one of the {len(generation.samples)} there are")
            sample = generation.samples[index]
            self.catch_up()
            number, request_id = self._named(request_id)
            request = self.engine.fork(sample.request.id, request_id, self._seed_of(number) if seed is None else seed)
            child = Generation(request_id, generation.prompt, [sample.fork(request)], self.tokenizer, on_update)
            child.prompt_logprobs.extend(generation.prompt_logprobs)
            self._generations[request_id] = child
            return child

    def step(self) -> None:
        """Advance the engine one step and bring every touched generation up to date.

        When the step fails, the generations it ran end with their `error` set; whoever called is not to blame.
        """
        with self.lock:
            if not self.engine.has_work:
                return
            try:
                advanced = self.engine.step()
            except Exception as error:
                self._drop_failed(error)
                return
            self._deliver(advanced)

    def catch_up(self) -> None:
        """Wait for the step that is under way, if one is, and deliver its tokens."""
        with self.lock:
            self._deliver(self.engine.catch_up())

    def abort(self, generation: Generation) -> None:
        """Drop what is left of a request; its blocks are free when this returns."""
        with held_interrupts(), self.lock:
            for sample in generation.samples:
                self.engine.abort(sample.request.id)
            self._settle(generation)

    def end(self, request_id: str) -> bool:
        """Abort by the id of a request; False when none of that id is here."""
        generation = self.find(request_id)
        if generation is not None:
            self.abort(generation)
        return generation is not None

    def find(self, request_id: str) -> Generation | None:
        """The request of that id, while it is here."""
        return next((g for g in list(self._generations.values()) if g.request_id == request_id), None)

    def result(self, generation: Generation) -> RequestOutput:
        """How a request stands. Raises the error that ended it, if one did."""
        with held_interrupts(), self.lock:
            if generation.error:
                raise generation.error
            return generation.output()

    def new_id(self) -> str:
        """A number that no request was given before."""
        return self._named(None)[1]

    def _named(self, request_id: str | None) -> tuple[int, str]:
        """A running number, and the id: the caller's, or that number. Raises RequestError for an id in use."""
        in_use = {generation.request_id for generation in self._generations.values()} | self.engine.requests.keys()
        if request_id is None:
            number = next(number for number in self._numbers if str(number) not in in_use)
            return number, str(number)
        if not isinstance(request_id, str) or not request_id:
            raise RequestError(f"request_id must be a string that is not empty, not {short(request_id)}")
        if request_id in in_use:
            raise RequestError(f"request {request_id}: its id is in use; give each request an id of its own")
        return next(self._numbers), request_id

    @property
    def has_work(self) -> bool:
        return self.engine.has_work

    def _encode(self, text: str, where: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(f"{where}: the model {self.model} has no tokenizer; give a list of token ids")
        require_unicode(text, where)
        token_ids = self.tokenizer.encode(text)
        if not token_ids:
            raise RequestError(f"{where}: the prompt is empty; give at least one token")
        return token_ids

    def _check_params(self, params: SamplingParams, priority: int) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, not {short(params)}")
        if not isinstance(priority, int):
            raise RequestError(f"priority must be an integer (lower runs first), not {short(priority)}")
        for name, num_top in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
            if num_top is not None and num_top > self.vocab_size:
                raise RequestError(f"{name} of {num_top} is more than the {self.vocab_size} tokens of {self.model}")

    def _sample(
        self, request_id: str, index: int, prompt: Checked, params: SamplingParams, seed: int, priority: int
    ) -> Sample:
        request = Request(
            id=request_id if params.n == 1 else f"{request_id}.{index}",
            token_ids=list(prompt.token_ids),
            num_prompt=len(prompt.token_ids),
            params=params,
            max_tokens=params.max_tokens or self.engine.config.max_model_len,
            seed=seed + index,
            priority=priority,
            salt=prompt.salt,
        )
        if self.tokenizer is None or not params.detokenize:
            return Sample(request, None)
        return Sample(request, Detokenizer(self.tokenizer, prompt.token_ids, params))

    def _end_at_stop_string(self, request: Request, stop: str) -> None:
        if not self.engine.finish(request.id, "stop", stop):
            request.finish_reason, request.stop_reason = "stop", stop  # its last token also met another limit

    def _deliver(self, advanced: list[Request]) -> None:
        """Give the last result's tokens to those who own them."""
        result = self.engine.last_result
        for request_id, (first, judged) in result.prompt_logprobs.items():
            if request_id in self._generations:  # else it was dropped meanwhile
                known = self._generations[request_id].prompt_logprobs
                known.extend(judged[max(0, len(known) - first) :])  # a recomputed prompt is judged again
        touched: dict[Generation, None] = {}  # once each, however many of its samples got a token
        for request in advanced:
            if request.is_steered:
                self.steerers[request.id].take(request, result.logprobs[request.id][0])
                continue
            generation = self._generations[request.id]
            touched[generation] = None
            samples = generation.samples
            sample = samples[0] if len(samples) == 1 else next(s for s in samples if s.request is request)
            stop = sample.find_stop()
            if request.id in result.logprobs:
                sample.judge(result.logprobs[request.id])
            if stop is not None:
                self._end_at_stop_string(request, stop)
        for generation in touched:
            self._settle(generation)

    def _settle(self, generation: Generation) -> None:
        for sample in generation.samples:
            if sample.request.is_finished:
                self._generations.pop(sample.request.id, None)
        if generation.on_update:
            generation.on_update(generation)

    def _drop_failed(self, error: Exception) -> None:
        """Tell the owners of what the engine dropped when the step failed; all is lost when it never came to a run."""
        owned = self._generations.keys() | self.steerers.keys()
        dropped = owned - self.engine.requests.keys() or owned
        for generation in {self._generations[id_] for id_ in dropped & self._generations.keys()}:
            generation.error = error
            self.abort(generation)
        for steerer in {self.steerers[id_] for id_ in dropped & self.steerers.keys()}:
            steerer.fail(error)

    def _seed_of(self, number: int) -> int:
        """A seed of its own for each request that was given none."""
        return self.seed * 1_000_003 + number * 1_009
