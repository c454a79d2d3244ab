"""The model and the paged engine agree with transformers, family by family."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.engine.plan import StepPlan
from minivllm.request import BlockTable, Request
from tests.conftest import FAMILIES

Build = Callable[[str], tuple[Path, PreTrainedModel]]


def mixed_prompts(num_prompts: int, longest: int, vocab_size: int = 320, seed: int = 0) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(vocab_size) for _ in range(random.randint(1, longest))] for _ in range(num_prompts)]


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
    """transformers' own greedy tokens, and the smallest gap between the best two logits on the way."""
    token_ids = torch.tensor([prompt])
    out = model.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=num_tokens, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def all_logits(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """Logits of every position of a prompt, through the paged cache in one step."""
    num_blocks = -(-len(prompt) // llm.config.block_size)
    request = Request("r", prompt, len(prompt), SamplingParams(prompt_logprobs=0), 1)
    block_ids = list(range(num_blocks * len(llm.config.group_windows), 0, -1))  # any order will do: the tables say
    request.tables = [BlockTable(block_ids[i : i + num_blocks]) for i in range(0, len(block_ids), num_blocks)]
    return llm.runner.logits(StepPlan(1, [(request, len(prompt))], [], []))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, reference_model: Build) -> None:
    folder, model = reference_model(family)
    llm = LLM(folder, dtype="float32", num_blocks=80)
    prompt = mixed_prompts(1, 100, seed=3)[0] + list(range(100))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(all_logits(llm, prompt), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_tokens", [None, 23])
@pytest.mark.parametrize("family", FAMILIES)
def test_64_prompts_together_give_the_tokens_of_each_alone(
    family: str, chunk_tokens: int | None, reference_model: Build
) -> None:
    folder, model = reference_model(family)
    llm = LLM(
        folder, dtype="float32", num_blocks=800, max_model_len=128, max_num_batched_tokens=chunk_tokens or 4096,
        enable_chunked_prefill=chunk_tokens is not None,
    )  # fmt: skip
    prompts = mixed_prompts(64, 60)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert len(outputs) == 64
    num_sure = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, gap = greedy(model, prompt, 12)
        if gap > 1e-3:  # below that fp32 itself does not decide between the best two tokens
            assert output.outputs[0].token_ids == expected
            num_sure += 1
    assert num_sure >= 50


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_the_gpu_equal_those_on_the_cpu(family: str, reference_model: Build) -> None:
    folder, model = reference_model(family)
    llm = LLM(folder, dtype="float32", num_blocks=800, max_num_batched_tokens=50, device="cuda")
    prompts = mixed_prompts(32, 60)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected, gap = greedy(model, prompt, 12)
        assert gap < 1e-3 or output.outputs[0].token_ids == expected
