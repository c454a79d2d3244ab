"""What only a GPU shows: captured graphs, fp32 tokens equal to a CPU's, memory measured and given back."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.errors import ConfigError
from tests.test_fused import GREEDY, HOT, PROMPTS, drive, engine, folders, tokens

Build = Callable[[str], tuple[Path, PreTrainedModel]]
pytestmark = pytest.mark.gpu
folders = folders  # the fixture, by its name
SMALL: dict[str, Any] = {"device": "cuda", "load_format": "dummy", "show_progress": False, "max_num_seqs": 8}


def memory_in_use() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("family", ["llama", "qwen3", "window"])
def test_greedy_tokens_in_fp32_are_those_of_a_cpu(family: str, folders: Callable[[str], Path]) -> None:
    on_gpu = engine(folders(family), has_graphs=True)
    assert on_gpu.runner.fused is not None and on_gpu.runner.fused.decode.graphs
    on_cpu = LLM(str(folders(family)), dtype="float32", device="cpu", kv_cache_memory=2**22, show_progress=False)
    expected = tokens(on_cpu.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert tokens(on_gpu.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("budget", [40, 512])
def test_graphs_change_no_token_in_16_bits(dtype: str, budget: int, folders: Callable[[str], Path]) -> None:
    options = {"dtype": dtype, "num_blocks": 10, "kv_cache_memory": None, "max_model_len": 80}
    lives = [
        drive(engine(folders("llama"), has_graphs=has_graphs, max_num_batched_tokens=budget, **options))
        for has_graphs in (True, False)
    ]
    assert lives[0] == lives[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_invariant_tokens_are_the_same_alone_together_in_chunks_and_from_a_warm_cache(
    dtype: str, folders: Callable[[str], Path]
) -> None:
    def build(**options: Any) -> LLM:
        chosen = SMALL | {"load_format": "auto", "kv_cache_memory": 2**24} | options
        return LLM(str(folders("qwen3")), dtype=dtype, batch_invariant=True, **chosen)

    llm = build()
    together = tokens(llm.generate(PROMPTS, HOT, use_tqdm=False))
    assert tokens(llm.generate(PROMPTS, HOT, use_tqdm=False)) == together
    llm.reset_prefix_cache()
    assert [tokens(llm.generate([p], h, use_tqdm=False))[0] for p, h in zip(PROMPTS, HOT, strict=True)] == together
    assert tokens(build(max_num_batched_tokens=24).generate(PROMPTS, HOT, use_tqdm=False)) == together


def test_graphs_change_no_sample_of_a_large_ragged_batch(folders: Callable[[str], Path]) -> None:
    prompts = [[(7 * i + j) % 320 for j in range(1 + 11 * i % 97)] for i in range(70)]
    params = [
        SamplingParams(
            temperature=(i % 3) * 0.5, seed=i, max_tokens=5 + i % 23, ignore_eos=i % 5 > 0, top_p=1 - (i % 7) / 20
        )
        for i in range(70)
    ]
    options = {"dtype": "bfloat16", "max_num_seqs": 40, "max_num_batched_tokens": 128, "kv_cache_memory": 2**24}
    found, expected = (
        tokens(engine(folders("qwen3"), has_graphs=has_graphs, **options).generate(prompts, params, use_tqdm=False))
        for has_graphs in (True, False)
    )
    assert found == expected


def test_memory_comes_back_with_the_engine_and_after_a_failed_step(folders: Callable[[str], Path]) -> None:
    def live(fails: bool) -> None:
        llm = engine(folders("qwen3"), has_graphs=True, dtype="bfloat16", kv_cache_memory=2**28)
        if fails:
            assert llm.runner.fused is not None
            llm.runner.fused._tokens.send = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
            with pytest.raises(ZeroDivisionError):
                llm.generate(PROMPTS, HOT, use_tqdm=False)
        else:
            llm.generate(PROMPTS, HOT, use_tqdm=False)

    live(False)  # what libraries keep for good comes with the first engine
    before = memory_in_use()
    free_before = torch.cuda.mem_get_info()[0]
    for fails in (False, True):
        live(fails)
        assert memory_in_use() == before
        assert torch.cuda.mem_get_info()[0] > free_before - 2**26


def test_pool_is_what_is_left_of_the_memory_and_a_second_engine_gets_as_much(folders: Callable[[str], Path]) -> None:
    sizes = []
    for _ in range(2):
        memory_in_use()
        llm = LLM("qwen3-0.6b", max_model_len=2048, gpu_memory_utilization=0.5, **SMALL)
        free, total = torch.cuda.mem_get_info()
        sizes.append(llm.storage.num_bytes)
        assert 0.38 * total < llm.storage.num_bytes < 0.5 * total
        assert 0.48 * total < total - free < 0.52 * total
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
        del llm
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


def test_a_pool_that_does_not_fit_names_the_figure_to_change() -> None:
    memory_in_use()
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=0.002 .* raise it, or lower max_num_batched_tokens"):
        LLM("qwen3-0.6b", gpu_memory_utilization=0.002, **SMALL)
    with pytest.raises(ConfigError, match="lower kv_cache_memory"):
        LLM("qwen3-0.6b", kv_cache_memory=2**40, **SMALL)
    with pytest.raises(ConfigError, match="max_num_batched_tokens=12000000: lower it"):
        LLM("qwen3-0.6b", max_num_batched_tokens=12_000_000, **SMALL | {"max_num_seqs": 300})
    assert memory_in_use() < 2**30


@pytest.mark.parametrize("family", ["v2-moe", "ministral-1to1", "llama-head-8"])
def test_models_that_are_not_fused_start_and_answer_as_on_a_cpu(family: str, reference_model: Build) -> None:
    folder, _ = reference_model(family)
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "show_progress": False}
    on_cpu = LLM(folder, device="cpu", **options)
    on_gpu = LLM(folder, device="cuda", gpu_memory_utilization=0.3, max_num_seqs=8, **options)
    assert on_gpu.runner.fused is None
    prompts = [[3, 4, 5], list(range(30))]
    found, expected = (tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) for llm in (on_gpu, on_cpu))
    assert found == expected
