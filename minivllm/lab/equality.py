"""Cold equals warm: the same prompts on seven ways through the engine, compared bit by bit.

A way is how a prompt came to its answer: alone and uncached (cold), after another had left its prefix (hit), in chunks,
beside others, after a preemption by recompute or by swap, or by a fork halfway. With `batch_invariant=True` all must
agree in every bit: tokens, the logprobs of the best tokens at each position, and K and V of every layer in every slot.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tqdm.auto import tqdm

from minivllm.events import BlocksReleased, Event, Forked, Preempted, PrefixHit, StepRan, SwappedIn
from minivllm.llm import LLM
from minivllm.outputs import Logprob
from minivllm.request import SamplingParams
from minivllm.trace import Trace

NUM_BEST = 10  # logprobs compared at each position
NUM_PROMPTS, NUM_OUTPUT = 6, 24
BLOCK_SIZE = 4
Build = Callable[..., LLM]
Found = tuple[str, list[int], list[tuple[tuple[int, float], ...]]]  # request id, tokens, best logprobs at each


@dataclass(frozen=True)
class Answer:
    """All that one way produced for one prompt."""

    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]  # at each position, the best tokens
    kv: bytes  # K and V of all layers, of every token but the last

    def differences(self, other: "Answer") -> list[str]:
        """What is not equal, in bits."""
        parts = {
            "tokens": self.token_ids == other.token_ids,
            "logprobs": self.logprobs == other.logprobs,
            "KV": self.kv == other.kv,
        }
        return [name for name, is_equal in parts.items() if not is_equal]


@dataclass(frozen=True)
class Way:
    """How to bring the prompts through the engine, and the event that proves that it was so."""

    options: Mapping[str, object]
    proof: Callable[[Trace], bool]
    is_batched: bool = True
    is_warm: bool = False  # the prompts have been run once before
    is_forked: bool = False


def _has(kind: type[Event]) -> Callable[[Trace], bool]:
    return lambda trace: bool(trace.of(kind))


def _is_batched(trace: Trace) -> bool:
    return max(len(event.scheduled) for event in trace if isinstance(event, StepRan)) == NUM_PROMPTS


def _is_chunked(trace: Trace) -> bool:
    prompts = [new for event in trace if isinstance(event, StepRan) for _, new, _ in event.scheduled if new > 1]
    return max(prompts) <= 5


TIGHT = {"num_blocks": 24, "enable_prefix_caching": False}  # too few for all: somebody has to go
WAYS: dict[str, Way] = {
    "cold": Way({"enable_prefix_caching": False}, lambda trace: not trace.of(PrefixHit), is_batched=False),
    "hit": Way({}, _has(PrefixHit), is_batched=False, is_warm=True),
    "radix hit": Way({"prefix_cache": "radix"}, _has(PrefixHit), is_batched=False, is_warm=True),
    "chunked": Way({"max_num_batched_tokens": 5, "enable_prefix_caching": False}, _is_chunked, is_batched=False),
    "batched": Way({"enable_prefix_caching": False}, _is_batched),
    "preempted": Way(TIGHT, _has(Preempted)),
    "swapped": Way({**TIGHT, "preemption_mode": "swap", "num_host_blocks": 64}, _has(SwappedIn)),
    "forked": Way({}, _has(Forked), is_forked=True),
}


def prompts(vocab_size: int) -> list[list[int]]:
    """Six prompts of odd lengths; two begin alike."""
    shared = [(11 * i + 5) % vocab_size for i in range(14)]
    own = [[(7 * i + 13 * j + 3) % vocab_size for j in range(3 + 7 * i)] for i in range(NUM_PROMPTS - 2)]
    return [*own, [*shared, 1, 2, 3], [*shared, 4]]


def equality_matrix(build: Build, ways: Sequence[str] = tuple(WAYS)) -> dict[tuple[str, str], list[str]]:
    """For each pair of ways what differs in any prompt: an empty list is bitwise equality.

    `build(**options)` makes an LLM of one and the same model. Raises AssertionError when a way was not taken.
    """
    answers = {name: take(WAYS[name], build) for name in tqdm(ways, desc="ways through the engine")}
    return {
        (one, two): sorted({d for a, b in zip(answers[one], answers[two], strict=True) for d in a.differences(b)})
        for one in ways
        for two in ways
    }


def take(way: Way, build: Build) -> list[Answer]:
    """Bring all prompts through the engine on one way."""
    llm = build(block_size=BLOCK_SIZE, max_model_len=64, **{"num_blocks": 200, **way.options})
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, logprobs=NUM_BEST)
    all_prompts = prompts(llm.model_config.vocab_size)
    if way.is_warm:
        llm.generate(all_prompts, params, use_tqdm=False)
    kept: dict[str, bytes] = {}
    trace = Trace()
    stops = [llm.events.listen(lambda event: _keep(llm, event, kept)), llm.events.listen(trace)]
    if way.is_forked:
        found = [_forked(llm, prompt, params) for prompt in all_prompts]
    else:
        batches = [all_prompts] if way.is_batched else [[prompt] for prompt in all_prompts]
        found = [
            (output.request_id, output.outputs[0].token_ids, [_best(at) for at in output.outputs[0].logprobs or ()])
            for batch in batches
            for output in llm.generate(batch, params, use_tqdm=False)
        ]
    for stop in stops:
        stop()
    assert way.proof(trace), f"this way was not taken: {way.options}"
    return [Answer(tuple(token_ids), tuple(logprobs), kept[id_]) for id_, token_ids, logprobs in found]


def _best(at: Mapping[int, Logprob]) -> tuple[tuple[int, float], ...]:
    return tuple((token_id, judged.logprob) for token_id, judged in at.items())


def _keep(llm: LLM, event: Event, kept: dict[str, bytes]) -> None:
    """K and V of a request at the moment it lets go of its blocks, in the order of its tokens."""
    if isinstance(event, BlocksReleased) and event.request_id in llm.engine.requests:
        num_computed = llm.engine.requests[event.request_id].num_computed
        tokens = llm.storage.data[:, :, list(event.block_ids)].flatten(2, 3)[:, :, :num_computed].contiguous()
        kept[event.request_id] = tokens.cpu().view(torch.uint8).numpy().tobytes()


def _forked(llm: LLM, prompt: list[int], params: SamplingParams) -> Found:
    """Split a request halfway and take the answer of the one that was split off."""
    engine = llm.text_engine
    parent = engine.add(engine.check(prompt), params)
    while parent.samples[0].request.num_output < NUM_OUTPUT // 2:
        engine.step()
    child = engine.fork(parent)
    while not (parent.is_finished and child.is_finished):
        engine.step()
    output = engine.result(child).outputs[0]
    return child.request_id, output.token_ids, [_best(at) for at in output.logprobs or ()]


def study(model: str = "smollm2-135m", dtype: str = "float32", batch_invariant: bool = True) -> str:
    """The matrix as a table: `=` where all bits agree, else what differs."""
    build = partial(LLM, model, dtype=dtype, batch_invariant=batch_invariant)
    matrix, width = equality_matrix(build), max(map(len, WAYS)) + 2
    lines = ["".join(name.ljust(width) for name in ("", *WAYS))]
    for one in WAYS:
        cells = ["=" if not matrix[one, two] else "+".join(matrix[one, two]) for two in WAYS]
        lines.append("".join(cell.ljust(width) for cell in (one, *cells)))
    num_equal = sum(not differences for differences in matrix.values())
    mode = "batch-invariant" if batch_invariant else "default"
    lines.append(f"\n{num_equal} of {len(matrix)} pairs agree in every bit: {model}, {dtype}, {mode} arithmetic")
    return "\n".join(lines)
