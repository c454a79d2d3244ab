"""Calculated and counted: KV bytes by formula beside those of the engine's tensors, floors beside measured steps."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tqdm.auto import tqdm

from minivllm.course.calculators import Accelerator, attention_shape, kv_bytes_of_sequence, kv_bytes_per_token
from minivllm.course.calculators.model_fields import Config
from minivllm.draft_events import BlocksTrimmed
from minivllm.events import BlocksDropped, BlocksTaken, StepRan
from minivllm.lab.step_floor import ModelWork, measured_roofs
from minivllm.llm import LLM
from minivllm.request import SamplingParams
from minivllm.weights import find_model

MODELS = ("smollm2-135m", "qwen3-0.6b", "tiny-mla", "tiny-hybrid")
RUNS = ((1, 512), (8, 512), (32, 128))  # requests, and prompt tokens of each
NUM_OUTPUT = 16
NUM_HELD = 300  # tokens of the request whose blocks are counted


@dataclass(frozen=True)
class Agreement:
    """Bytes that K and V take, by formula and in the engine."""

    per_token: int
    tensors_per_token: int  # of all layers, in the storage's tensor
    held: int  # by one request of NUM_HELD tokens, windows cut off
    blocks_held: int  # what its blocks have for the layers, while its last token is computed

    @property
    def is_exact(self) -> bool:
        return (self.per_token, self.held) == (self.tensors_per_token, self.blocks_held)


def compare_bytes(llm: LLM, config: Config) -> Agreement:
    """Ask the calculators, and count; for whole blocks not to count as tokens, they must hold one token each."""
    places, storage, dtype = llm.storage.groups.places, llm.storage, llm.model_config.dtype
    num_slots = llm.config.num_blocks * llm.config.block_size
    row_bytes = storage.data.nbytes // num_slots // storage.groups.num_rows  # of one layer and token
    num_layers = Counter(group for group, _ in places)
    held, num_held = Counter[int](), 0
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    with llm.record() as trace:
        llm.generate([list(range(1, NUM_HELD - 2))], params, use_tqdm=False)
    for event in trace:
        match event:
            case BlocksTaken(group=group, block_ids=block_ids):
                held[group] += len(block_ids) * llm.config.block_size * num_layers[group]
                num_held = held.total()
            case BlocksDropped(group=group, block_ids=block_ids) | BlocksTrimmed(group=group, block_ids=block_ids):
                held[group] -= len(block_ids) * llm.config.block_size * num_layers[group]
    return Agreement(
        per_token=int(kv_bytes_per_token(config, dtype)),
        tensors_per_token=row_bytes * len(places),
        held=int(kv_bytes_of_sequence(config, NUM_HELD, dtype)),
        blocks_held=num_held * row_bytes,
    )


@dataclass(frozen=True)
class Timed:
    """Steps of one kind: medians, in milliseconds."""

    what: str
    num_steps: int
    read_ms: float
    compute_ms: float
    measured_ms: float

    @property
    def share(self) -> float:
        """How much of the measured time the floor is."""
        return max(self.read_ms, self.compute_ms) / self.measured_ms


def time_steps(llm: LLM, work: ModelWork, machine: Accelerator, num_requests: int, num_prompt: int) -> list[Timed]:
    """Run requests side by side; the floor of each of their steps beside the time that the engine's events tell."""
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT, ignore_eos=True, detokenize=False)
    prompts = [[1 + (i * 31 + j) % 200 for j in range(num_prompt)] for i in range(num_requests)]
    llm.generate(prompts[:1], params, use_tqdm=False)  # the first steps of a process are slow
    with llm.record() as trace:
        llm.generate(prompts, params, use_tqdm=False)
    steps = [event for event in trace if isinstance(event, StepRan) and event.scheduled]
    decodes = [s for s in steps if len(s.scheduled) == num_requests and all(new == 1 for _, new, _ in s.scheduled)]
    prefills = [s for s in steps if all(new > 1 for _, new, _ in s.scheduled)]
    kinds = ((f"prefill {num_requests} x {num_prompt}", prefills), (f"decode {num_requests} x {num_prompt}", decodes))
    return [_timed(what, chosen, work, machine) for what, chosen in kinds if chosen]


def _timed(what: str, steps: Sequence[StepRan], work: ModelWork, machine: Accelerator) -> Timed:
    floors = [
        work.floor([(new, end) for _, new, end in step.scheduled], len(step.new_tokens), machine) for step in steps
    ]
    return Timed(
        what,
        len(steps),
        median(floor.read_ms for floor in floors),
        median(floor.compute_ms for floor in floors),
        median(step.run_ms for step in steps),
    )


def study(model: str | None = None) -> str:
    """One line for each model and kind of step; `model` names one, else some of every attention."""
    names = [model] if model else list(MODELS)
    lines, machine = list[str](), None
    for name in tqdm(names, desc="models"):
        llm, config = _build(name, block_size=1)
        agreement, shape = compare_bytes(llm, config), attention_shape(config)
        verdict = "exactly equal" if agreement.is_exact else "NOT EQUAL"
        lines += [
            f"{name}: {shape.kind}, {llm.model_config.num_layers} layers, {llm.model_config.dtype}",
            f"  bytes per token              {agreement.per_token:>12,} calculated {agreement.tensors_per_token:>12,} "
            f"in the tensors  {verdict}",
            f"  a request of {NUM_HELD} tokens      {agreement.held:>12,} calculated {agreement.blocks_held:>12,} "
            "in its blocks",
        ]
        llm, _ = _build(name, block_size=16)
        machine = machine or measured_roofs(llm.device, llm.model_config.dtype)
        work = ModelWork(config, llm.model_config.dtype)
        for run in tqdm(RUNS, desc=name, leave=False):
            for timed in time_steps(llm, work, machine, *run):
                lines.append(
                    f"  {timed.what:22}{timed.num_steps:>4} steps: floor {timed.read_ms:9.3f} ms to read, "
                    f"{timed.compute_ms:9.3f} to compute; measured {timed.measured_ms:9.3f} ms, {timed.share:.0%} of it"
                )
    assert machine is not None
    [(dtype, rate)] = machine.flops.items()
    head = f"{machine.name}: {machine.bandwidth / 1e9:.1f} GB/s read or copied, {rate / 1e12:.3f} TFLOP/s in {dtype}"
    return "\n".join([head, *lines])


def _build(name: str, block_size: int) -> tuple[LLM, Config]:
    """The model, with random weights unless it is the default one, and its config.json."""
    load_format = "auto" if name.startswith("smollm2") else "dummy"
    num_blocks = 1 + 12_000 // block_size
    llm = LLM(name, load_format=load_format, num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=False)
    return llm, find_model(name, load_format).config
