"""The default model, real weights: logits and greedy tokens are transformers'."""

import copy
import pydoc_data.topics
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.weights import fetch_default_model
from tests.test_parity import all_logits

pytestmark = pytest.mark.weights
NUM_NEW = 12


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(fetch_default_model(show_progress=False), dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def real_prompts(llm: LLM, num_prompts: int) -> list[list[int]]:
    """Openings of Python's help topics, cut to mixed lengths of 1 to 90 tokens."""
    random, topics = Random(0), sorted(pydoc_data.topics.topics.values())
    return [llm.get_tokenizer().encode(topics[i])[: random.randint(1, 90)] for i in range(num_prompts)]


def test_logits_equal_transformers_in_fp32(reference: PreTrainedModel) -> None:
    """Within 1e-4 of the logits' size (about 40), and no further from the float64 truth than transformers is."""
    llm = LLM("smollm2-135m", dtype="float32", num_blocks=20)
    prompt = real_prompts(llm, 3)[1] + llm.get_tokenizer().encode("The capital of France is Paris, and 12 + 30 = 42.")
    token_ids, ours = torch.tensor([prompt]), all_logits(llm, prompt)
    with torch.inference_mode():
        theirs = reference(token_ids).logits[0]
        exact = copy.deepcopy(reference).double()(token_ids).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_64_prompts_together_are_greedy_token_by_token(is_chunked: bool, reference: PreTrainedModel) -> None:
    """Each token is transformers' argmax after the tokens before it: so the whole text is its greedy text."""
    llm = LLM(
        "smollm2-135m", dtype="float32", num_blocks=600, max_model_len=128,
        enable_chunked_prefill=is_chunked, max_num_batched_tokens=64 if is_chunked else 2048,
    )  # fmt: skip
    prompts = real_prompts(llm, 64)
    params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    num_near_ties = 0
    for output in llm.generate(prompts, params, use_tqdm=False):
        prompt, new = output.prompt_token_ids, output.outputs[0].token_ids
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        gap = logits.max(dim=1).values - logits[torch.arange(NUM_NEW), new]
        assert gap.max() < 1e-3, f"token {int(gap.argmax())} is not the greedy one"
        num_near_ties += int((gap > 0).sum())
    assert num_near_ties <= 1
