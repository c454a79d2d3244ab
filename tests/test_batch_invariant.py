"""With the batch-invariant parts, a token's logits depend on the tokens before it alone: every bit, however it is run.

The steps are written by hand, tensors in and logits out, so that what is claimed is the arithmetic and not a scheduler.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from minivllm import LLM, RequestOutput, SamplingParams
from minivllm.attention.invariant_backend import InvariantAttention
from minivllm.attention.torch_backend import TorchAttention
from minivllm.config import ModelConfig
from minivllm.models.decoder import Decoder
from minivllm.request import Request
from minivllm.runner.loader import build_model
from minivllm.runner.sampler import sample, token_logprobs
from minivllm.transforms.batch_invariant import RowTiles, make_batch_invariant
from tests.step_machine import Machine

Build = Callable[[str], tuple[Path, PreTrainedModel]]
RANDOM = Random(3)
PROMPT = [RANDOM.randrange(320) for _ in range(275)]  # three key tiles of 128, the last one nearly empty
OTHERS = [[RANDOM.randrange(320) for _ in range(length)] for length in (1, 2, 17, 40, 128, 129, 200, 260, 300)]


# --- Ways to compute the logits of PROMPT: the last rows of what cold() gives, each in another situation

Make = Callable[..., Machine]


def cold(make: Make, block_size: int = 16, seed: int = 0) -> torch.Tensor:
    machine = make(block_size, seed)
    return machine.step((machine.add(PROMPT), len(PROMPT)))[0]


def chunked(make: Make, size: int) -> torch.Tensor:
    machine = make()
    sequence = machine.add(PROMPT)
    sizes = [size] * (len(PROMPT) // size) + [len(PROMPT) % size or 0]
    return torch.cat([machine.step((sequence, new))[0] for new in sizes if new])


def batched(make: Make) -> torch.Tensor:
    """Among nine others, which are decoded and prefilled in other rhythms while PROMPT comes in pieces."""
    machine, rows = make(), []
    others, sequence = [machine.add(other) for other in OTHERS], machine.add(PROMPT)
    for step, new in enumerate([1, 60, 3, 1, 100, 1, 1, 16, 92]):
        left = {other: len(OTHERS[other]) - machine.num_computed[other] for other in others}
        chunks = [(other, min(1 + (step + other) % 3 * 30, left[other])) for other in others if left[other]]
        rows.append(machine.step(*chunks[:4], (sequence, new), *chunks[4:])[min(4, len(chunks))])
    return torch.cat(rows)


def hit(make: Make) -> torch.Tensor:
    """The first blocks were computed for another prompt, in a batch."""
    machine = make()
    owner, other = machine.add([*PROMPT[:192], 5, 6, 7]), machine.add(OTHERS[8])
    machine.step((owner, 90), (other, 11))
    machine.step((other, 200), (owner, 105))
    sequence = machine.add(PROMPT, machine.tables[owner][:12], 192)
    return machine.step((other, 1), (sequence, len(PROMPT) - 192))[1]


def preempted(make: Make) -> torch.Tensor:
    """Half done, its blocks taken by another, computed again in other places and in other pieces."""
    machine = make()
    sequence, other = machine.add(PROMPT), machine.add(OTHERS[8])
    machine.step((sequence, 150))
    machine.free += machine.tables[sequence]
    machine.step((other, 300))
    again = machine.add(PROMPT)
    return torch.cat([machine.step((again, 40))[0], machine.step((again, len(PROMPT) - 40))[0]])


def swapped(make: Make) -> torch.Tensor:
    """Its blocks went away and came back elsewhere, byte by byte."""
    machine = make()
    sequence = machine.add(PROMPT)
    machine.step((sequence, 150))
    machine.tables[sequence] = [machine.copy_block(block) for block in machine.tables[sequence]]
    return machine.step((sequence, len(PROMPT) - 150))[0]


def forked(make: Make) -> torch.Tensor:
    """Shares its full blocks with a fork, has a copy of the tail, and runs on beside it."""
    machine = make()
    parent = machine.add(PROMPT[:150] + OTHERS[6])
    machine.step((parent, 150))
    *shared, tail = machine.tables[parent]
    child = machine.add(PROMPT, [*shared, machine.copy_block(tail)], 150)
    rows = [machine.step((parent, 1), (child, 1))[1] for _ in range(5)]
    return torch.cat([*rows, machine.step((child, len(PROMPT) - 155), (parent, 30))[0]])


WAYS: dict[str, Callable[[Make], torch.Tensor]] = {
    **{f"chunks of {size}": partial(chunked, size=size) for size in (1, 3, 7, 128)},
    **{f"blocks of {size}": partial(cold, block_size=size) for size in (1, 4, 64)},
    "shuffled blocks": partial(cold, seed=5),
    "batched": batched, "hit": hit, "preempted": preempted, "swapped": swapped, "forked": forked,
}  # fmt: skip
CASES = [("llama-gqa", "float32"), ("qwen3", "float32"), ("mistral", "float32"), ("llama-9to3", "float32")]
CASES += [("llama-gqa", "bfloat16"), ("mistral", "bfloat16")]


@cache
def built(folder: Path, dtype: str, is_invariant: bool) -> tuple[Decoder, ModelConfig, torch.Tensor]:
    """A model, its config, and the logits of PROMPT alone in one piece."""
    config = replace(ModelConfig.from_json(json.loads((folder / "config.json").read_text())), dtype=dtype)
    model = build_model(config, [folder / "model.safetensors"], 0, "cpu")
    if is_invariant:
        make_batch_invariant(model)
    backend = InvariantAttention if is_invariant else TorchAttention
    return model, config, cold(lambda size=16, seed=0: Machine(model, config, backend, size, seed))


def machines(folder: Path, dtype: str, is_invariant: bool = True) -> tuple[Make, torch.Tensor]:
    model, config, expected = built(folder, dtype, is_invariant)
    backend = InvariantAttention if is_invariant else TorchAttention
    return lambda size=16, seed=0: Machine(model, config, backend, size, seed), expected


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the last bit, the sign of zero included."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[expected.dtype]
    return torch.equal(found.contiguous().view(integers), expected.contiguous().view(integers))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_every_way_to_compute_a_prompt_gives_the_same_bits(
    reference_model: Build, family: str, dtype: str, way: str
) -> None:
    make, expected = machines(reference_model(family)[0], dtype)
    found = WAYS[way](make)
    assert len(found) >= 83 and same_bits(found, expected[-len(found) :])


@pytest.mark.parametrize("way", ["chunks of 7", "batched", "forked"])
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_threads_change_no_bit(reference_model: Build, family: str, dtype: str, way: str, num_threads: int) -> None:
    make, expected = machines(reference_model(family)[0], dtype)
    found = WAYS[way](make)
    assert same_bits(found, expected[-len(found) :]) and same_bits(cold(make), expected)


@pytest.mark.parametrize("way", ["chunks of 1", "batched", "hit"])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
def test_the_default_parts_promise_closeness_and_no_more(reference_model: Build, family: str, way: str) -> None:
    make, expected = machines(reference_model(family)[0], "float32", is_invariant=False)
    found = WAYS[way](make)  # bits may differ or not: that depends on the processor and on the library's mood
    torch.testing.assert_close(found, expected[-len(found) :], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "mistral", "llama-9to3", "llama-mqa-bias", "qwen2-window"])
def test_invariant_logits_are_those_of_transformers_and_of_the_default_parts(
    reference_model: Build, family: str
) -> None:
    folder, reference = reference_model(family)
    invariant, default = machines(folder, "float32")[1], machines(folder, "float32", is_invariant=False)[1]
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(invariant, default, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(invariant, expected, atol=2e-4, rtol=1e-4)


# --- Why: one shape


class Fickle(nn.Module):
    """A part that answers by the number of its rows, as a library that picks kernels by shape may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(x)


@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 32, 50])
def test_tiles_hide_the_number_of_rows_from_a_part(num_rows: int) -> None:
    x = torch.arange(num_rows * 2.0).view(num_rows, 2)
    assert torch.equal(RowTiles(Fickle())(x), x * 16)


def test_attention_multiplies_matrices_of_two_shapes_only(
    reference_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _ = machines(reference_model("llama-gqa")[0], "float32")
    shapes, bmm = set(), torch.bmm

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.add((tuple(a.shape), tuple(b.shape)))
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    batched(make)
    forked(make)
    assert shapes == {((16, 8, 16), (16, 16, 128)), ((16, 8, 128), (16, 128, 16))}


# --- What follows from equal logits, and the engine as a whole

SAMPLED = [
    SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.7),
    SamplingParams(seed=3, top_k=9, temperature=1.4), SamplingParams(seed=4, min_p=0.02), SamplingParams(min_tokens=4),
    SamplingParams(seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [320, 49152])
def test_equal_logits_give_equal_tokens_and_logprobs_in_any_batch(vocab_size: int) -> None:
    logits = torch.randn(len(SAMPLED), vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    requests = [Request(str(i), [3, 1, 4, 1, 5 + i], 2, params, 99, seed=i) for i, params in enumerate(SAMPLED)]
    together = sample(logits, requests, [7])
    judged = token_logprobs(logits, together, 5)
    for row, request in enumerate(requests):
        alone = sample(logits[row : row + 1], [request], [7])
        assert alone[0] == together[row]
        assert token_logprobs(logits[row : row + 1], alone, 5) == [judged[row]]


def invariant_engine(folder: Path, dtype: str, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": dtype, "num_blocks": 600, "block_size": 4, "max_model_len": 400}
    return LLM(folder, device="cpu", batch_invariant=True, **(settings | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_an_engine_under_pressure_gives_every_logprob_to_the_last_bit(
    reference_model: Build, family: str, dtype: str
) -> None:
    folder, _ = reference_model(family)
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=12, logprobs=3, min_tokens=12) for i in range(10)]
    prompts = [PROMPT[:150], *OTHERS[:6], PROMPT[:60], PROMPT[:150], PROMPT[:151]]

    def judged(outputs: list[RequestOutput]) -> list[object]:
        return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]

    calm = invariant_engine(folder, dtype, enable_prefix_caching=False, max_num_seqs=1)
    expected = judged([calm.generate(*pair, use_tqdm=False)[0] for pair in zip(prompts, params, strict=True)])
    pressed = invariant_engine(folder, dtype, num_blocks=60, max_model_len=200, max_num_batched_tokens=37)
    outputs = [pressed.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    assert sum(output.metrics.num_preemptions for output in outputs[0]) > 0
    assert sum(output.num_cached_tokens for output in outputs[1]) > 0
    assert judged(outputs[0]) == judged(outputs[1]) == expected
