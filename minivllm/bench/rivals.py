"""transformers on the same weights, dtype and threads: `generate` with padded batches, and continuous batching."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

Prompts = Sequence[Sequence[int]]


def load_rival(folder: Path, dtype: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval()


@torch.inference_mode()
def run_generate(model: PreTrainedModel, prompts: Prompts, num_new: Sequence[int], batch_size: int) -> float:
    """Seconds for static batches in order of arrival: left-padded, each as long as its longest output.

    Padding makes the batch ragged, and transformers then keeps its mask: without one it takes a slow bf16 path.
    """
    started_s = time.perf_counter()
    for first in range(0, len(prompts), batch_size):
        batch, wanted = prompts[first : first + batch_size], max(num_new[first : first + batch_size])
        width = max(map(len, batch))
        token_ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(token_ids)
        for row, prompt in enumerate(batch):
            token_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = model.generate(
            token_ids, attention_mask=mask, max_new_tokens=wanted, min_new_tokens=wanted, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == width + wanted
    return time.perf_counter() - started_s


def run_continuous(model: PreTrainedModel, prompts: Prompts, num_new: Sequence[int], budget: int) -> float:
    """Seconds for transformers' continuous batching, with a pool of the size the work needs."""
    num_blocks = sum(-(-(len(p) + n) // 32) for p, n in zip(prompts, num_new, strict=True)) + 16
    config = ContinuousBatchingConfig(32, num_blocks=num_blocks, max_batch_tokens=budget)  # 32 tokens a page
    generation = GenerationConfig(max_new_tokens=max(num_new), do_sample=False, eos_token_id=-1)
    started_s = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    ) as manager:
        for prompt, wanted in zip(prompts, num_new, strict=True):
            manager.add_request(list(prompt), max_new_tokens=wanted)
        num_tokens, num_done = 0, 0
        while num_done < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_tokens, num_done = num_tokens + len(result.generated_tokens), num_done + 1
    assert num_tokens == sum(num_new), (num_tokens, sum(num_new))
    return time.perf_counter() - started_s
