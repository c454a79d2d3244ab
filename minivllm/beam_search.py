"""Beam search: the likeliest continuations of a prompt side by side, their tokens chosen here, outside the engine.

Each beam is a steered request. When a step has delivered the logits of all of a prompt's beams, the best continuations
over all of them are chosen: a beam with several of them is forked, a beam with none is aborted.

    beam                    its best next tokens, summed        afterwards, beam_width 2
    a  the cat  -0.9        sat -1.2    is -1.5    was -3.0     a  the cat sat,  and its fork  c  the cat is
    b  the dog  -1.1        ran -2.9                            aborted

So all beams share the blocks of the prompt and of every common beginning, and a partial tail is copied on write.
Choice, scores and the rule for stopping are those of transformers' `generate(num_beams=w)`; the names are vLLM's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tqdm.auto import tqdm

from minivllm.config import require_integers
from minivllm.engine.plan import TokenLogprobs
from minivllm.errors import ConfigError, RequestError
from minivllm.interrupts import held_interrupts
from minivllm.outputs import Logprob, as_logprobs
from minivllm.request import Request, SamplingParams
from minivllm.text_engine import Checked, TextEngine

STEEPEST_PENALTY = 10.0  # beyond it length ** penalty leaves the range of floats


@dataclass(frozen=True)
class BeamSearchParams:
    """vLLM's names; a sequence's score is its summed logprob / length ** length_penalty, its EOS token counted.

    `early_stopping` as in transformers, where w finished sequences are kept: True stops as soon as there are w; False
    when the best running beam, scored at the length it has, is no better than the worst of them; "never" scores it at
    max_tokens instead when length_penalty is positive, so that no better sequence can be missed. One beam is greedy.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        require_integers(beam_width=self.beam_width, max_tokens=self.max_tokens)
        for name in ("beam_width", "max_tokens"):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ConfigError(f"early_stopping must be False, True or 'never', not {self.early_stopping!r}")
        if self.temperature != 0:
            raise ConfigError(
                f"beam search does not sample: temperature must be 0, not {self.temperature!r}; "
                "for random samples use generate with SamplingParams(n=...)"
            )
        if not isinstance(self.length_penalty, int | float) or not abs(self.length_penalty) <= STEEPEST_PENALTY:
            raise ConfigError(f"length_penalty must be a number from -10 to 10, not {self.length_penalty!r}")


@dataclass(frozen=True)
class BeamSearchSequence:
    """One finished sequence: `tokens` and `text` begin with the prompt; `score` is transformers' sequences_scores.

    The EOS token that ended it is among the tokens only with include_stop_str_in_output; logprobs and score have it.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]  # for each token after the prompt
    cum_logprob: float
    score: float
    text: str | None
    finish_reason: str  # stop or length
    stop_reason: int | None  # the EOS token that ended it


@dataclass(frozen=True)
class BeamSearchOutput:
    """The beam_width best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A beam, by its place, and one more token."""

    beam: int
    token: TokenLogprobs
    cum_logprob: float


def best_candidates(beams: Sequence[tuple[float, TokenLogprobs]], num_kept: int) -> list[Candidate]:
    """The likeliest continuations of all beams, best first; a beam is its summed logprob and what its logits say."""
    found = [
        Candidate(index, TokenLogprobs(token_id, logprob, rank, judged.top), cum_logprob + logprob)
        for index, (cum_logprob, judged) in enumerate(beams)
        for rank, (token_id, logprob) in enumerate(judged.top, start=1)
    ]
    return sorted(found, key=lambda candidate: -candidate.cum_logprob)[:num_kept]


@dataclass(frozen=True, slots=True)
class Path:
    """Tokens after the prompt, the best others beside each, and their summed logprob."""

    tokens: tuple[TokenLogprobs, ...] = ()
    cum_logprob: float = 0.0

    def score(self, length_penalty: float, length: int | None = None) -> float:
        """What sequences are ranked by: three tokens that sum to -6.0 score -2.0 with length_penalty 1."""
        return self.cum_logprob / (length or len(self.tokens)) ** length_penalty

    def extended(self, candidate: Candidate) -> "Path":
        return Path((*self.tokens, candidate.token), candidate.cum_logprob)


@dataclass(eq=False)
class Beam:
    """A running sequence; `judged` is there while its request is held and waits for the choice."""

    request: Request
    path: Path
    judged: TokenLogprobs | None = None


class BeamSearch:
    """The search for one prompt; it moves on inside the engine's steps, whoever makes them."""

    def __init__(self, text_engine: TextEngine, prompt: Checked, params: BeamSearchParams, where: str) -> None:
        config, num_prompt = text_engine.engine.config, len(prompt.token_ids)
        if num_prompt >= config.max_model_len:
            size = f"{num_prompt} tokens, and max_model_len is {config.max_model_len}"
            raise RequestError(f"{where}: the prompt has {size}: no room for one new token; shorten the prompt")
        self.params = params
        self.max_tokens = min(params.max_tokens, config.max_model_len - num_prompt)
        self.eos_token_ids = () if params.ignore_eos else config.eos_token_ids
        self.error: Exception | None = None
        self.has_begun = self.is_done = False
        # Enough to go on with beam_width beams even if every beam's best tokens are the EOS tokens.
        self._num_candidates = max(2, 1 + len(self.eos_token_ids)) * params.beam_width
        self._prompt = prompt
        self._text_engine, self._engine = text_engine, text_engine.engine
        self._name, self._numbers = text_engine.new_id(), count()
        self._beams: list[Beam] = []
        self._finished: list[Path] = []  # best first, at most beam_width
        if self._num_candidates > text_engine.vocab_size:
            raise RequestError(
                f"beam_width {params.beam_width} looks at {self._num_candidates} tokens in each step, more than the "
                f"{text_engine.vocab_size} of {text_engine.model}; lower it"
            )

    def begin(self) -> None:
        """Queue the prompt: the first beam, from which all others fork."""
        params = SamplingParams(
            temperature=0, max_tokens=self.max_tokens, logprobs=self._num_candidates, ignore_eos=True, detokenize=False
        )
        token_ids, salt = list(self._prompt.token_ids), self._prompt.salt
        with self._text_engine.lock:
            size = len(token_ids)
            request = Request(self._new_id(), token_ids, size, params, self.max_tokens, salt=salt, is_steered=True)
            self._own(Beam(request, Path()))
            self._engine.add(request)
            self.has_begun = True

    def take(self, request: Request, judged: TokenLogprobs) -> None:
        """Note what a beam's logits say; the last of the beams to be told makes the choice."""
        next(beam for beam in self._beams if beam.request is request).judged = judged
        told = [(beam.path.cum_logprob, beam.judged) for beam in self._beams if beam.judged is not None]
        if len(told) == len(self._beams):
            self._choose(best_candidates(told, self._num_candidates))

    def fail(self, error: Exception) -> None:
        """A step failed and dropped a beam: the search ends with the error."""
        self.error = error
        self._end()

    def drop(self) -> None:
        """Leave no beam behind; their blocks are free when this returns."""
        with held_interrupts(), self._text_engine.lock:
            self._end()

    def output(self) -> BeamSearchOutput:
        """The sequences that were found. Raises the error that ended the search, if one did."""
        if self.error is not None:
            raise self.error
        return BeamSearchOutput([self._sequence(path) for path in self._finished])

    def _choose(self, candidates: list[Candidate]) -> None:
        """One round. Only the best beam_width candidates may finish; the best that do not end go on."""
        width, length = self.params.beam_width, len(self._beams[0].path.tokens) + 1
        is_last = length == self.max_tokens
        ended = [c for c in candidates[:width] if is_last or c.token.token_id in self.eos_token_ids]
        going = [c for c in candidates if c.token.token_id not in self.eos_token_ids][:width]
        self._finished.extend(self._beams[c.beam].path.extended(c) for c in ended)
        self._finished = sorted(self._finished, key=lambda path: -path.score(self.params.length_penalty))[:width]
        if is_last or not self._can_improve(self._beams[going[0].beam].path.extended(going[0])):
            self._end()
        else:
            self._go_on(going)

    def _can_improve(self, best: Path) -> bool:
        """Whether the best running beam may yet finish before one that has finished."""
        early_stopping, penalty = self.params.early_stopping, self.params.length_penalty
        if len(self._finished) < self.params.beam_width:
            return True
        if early_stopping is True or self.params.beam_width == 1:  # one beam is greedy search: its EOS is the end
            return False
        length = self.max_tokens if early_stopping == "never" and penalty > 0 else None
        return best.score(penalty, length) > self._finished[-1].score(penalty)

    def _go_on(self, going: list[Candidate]) -> None:
        """Abort the beams without a continuation first: their seats and blocks are for the forks."""
        parents, self._beams = self._beams, []
        continued = {candidate.beam for candidate in going}
        for index, parent in enumerate(parents):
            if index not in continued:
                self._disown(parent.request.id)
        in_place: dict[int, Candidate] = {}
        for candidate in going:
            parent = parents[candidate.beam]
            if in_place.setdefault(candidate.beam, candidate) is not candidate:
                child = self._engine.fork(parent.request.id, self._new_id())
                self._own(self._grown(parent, child, candidate))
        for index, candidate in in_place.items():  # last: a fork has the tokens of its parent
            self._own(self._grown(parents[index], parents[index].request, candidate))

    def _grown(self, parent: Beam, request: Request, candidate: Candidate) -> Beam:
        self._engine.append(request.id, candidate.token.token_id)
        return Beam(request, parent.path.extended(candidate))

    def _own(self, beam: Beam) -> None:
        self._beams.append(beam)
        self._text_engine.steerers[beam.request.id] = self

    def _disown(self, request_id: str) -> None:
        self._engine.abort(request_id)
        del self._text_engine.steerers[request_id]

    def _end(self) -> None:
        for request_id in [id_ for id_, steerer in self._text_engine.steerers.items() if steerer is self]:
            self._disown(request_id)
        self._beams, self.is_done = [], True

    def _new_id(self) -> str:
        names = (f"{self._name}.{number}" for number in self._numbers)
        return next(name for name in names if name not in self._engine.requests)

    def _sequence(self, path: Path) -> BeamSearchSequence:
        tokenizer, new_token_ids = self._text_engine.tokenizer, [token.token_id for token in path.tokens]
        stop_reason = new_token_ids[-1] if new_token_ids[-1] in self.eos_token_ids else None
        if stop_reason is not None and not self.params.include_stop_str_in_output:
            new_token_ids.pop()
        tokens = [*self._prompt.token_ids, *new_token_ids]
        return BeamSearchSequence(
            tokens=tokens,
            logprobs=[as_logprobs(token, tokenizer) for token in path.tokens],
            cum_logprob=path.cum_logprob,
            score=path.score(self.params.length_penalty),
            text=tokenizer.decode(tokens) if tokenizer else None,
            finish_reason="length" if stop_reason is None else "stop",
            stop_reason=stop_reason,
        )


def search_all(
    text_engine: TextEngine,
    prompts: Sequence[Checked],
    params: BeamSearchParams,
    use_tqdm: bool,
    concurrency_limit: int | None,
) -> list[BeamSearchOutput]:
    """Search for each prompt, as many at a time as the limit says; without one, as have a seat for every beam."""
    if not isinstance(params, BeamSearchParams):
        raise RequestError(f"params must be BeamSearchParams, not {type(params).__name__}")
    require_integers(concurrency_limit=concurrency_limit)
    if concurrency_limit is not None and concurrency_limit < 1:
        raise ConfigError(f"concurrency_limit must be at least 1, not {concurrency_limit}")
    limit = concurrency_limit or max(1, text_engine.engine.config.max_num_seqs // params.beam_width)
    searches = [BeamSearch(text_engine, prompt, params, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    try:
        bar = tqdm(total=len(searches), desc="Beam search", disable=not use_tqdm)
        with held_interrupts() as let_through, bar:
            while not all(search.is_done for search in searches):
                num_active = sum(search.has_begun and not search.is_done for search in searches)
                for search in [search for search in searches if not search.has_begun][: limit - num_active]:
                    search.begin()
                text_engine.step()
                bar.update(sum(search.is_done for search in searches) - bar.n)
                let_through()
    finally:
        for search in searches:
            search.drop()
    return [search.output() for search in searches]
