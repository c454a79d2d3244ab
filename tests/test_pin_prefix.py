"""LLM.pin_prefix: a prefix is computed once and stays cached whatever comes, until it is let go."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.errors import RequestError
from minivllm.events import Pinned, StepRan, Unpinned
from minivllm.lab.invariants import check_drained

Build = Callable[[str], tuple[Path, PreTrainedModel]]
ONE = SamplingParams(temperature=0, max_tokens=1)
SYSTEM = [(7 * i + 3) % 320 for i in range(14)]  # three full blocks of four and two tokens


def tiny(folder: Path, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 15, "block_size": 4, "max_model_len": 40}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


def num_cached(llm: LLM, prompt: list[int]) -> int:
    return llm.generate([*prompt, 1, 2], ONE, use_tqdm=False)[0].num_cached_tokens


def crowd(llm: LLM) -> None:
    """More prompts than the pool has blocks for."""
    llm.generate([[i] * 20 for i in range(12)], ONE, use_tqdm=False)


@pytest.mark.parametrize("prefix_cache", ["hash", "radix"])
@pytest.mark.parametrize("is_pinned", [True, False])
def test_pinned_prefix_is_there_after_a_crowd(reference_model: Build, prefix_cache: str, is_pinned: bool) -> None:
    llm = tiny(reference_model("llama-gqa")[0], prefix_cache=prefix_cache)
    name = llm.pin_prefix(SYSTEM)
    if not is_pinned:
        llm.unpin_prefix(name)
    crowd(llm)
    assert num_cached(llm, SYSTEM) == (12 if is_pinned else 0)
    if is_pinned:
        llm.unpin_prefix(name)
    check_drained(llm.engine)


def test_pinning_computes_only_what_is_not_cached(reference_model: Build) -> None:
    llm = tiny(reference_model("llama-gqa")[0])
    llm.generate(SYSTEM[:9], ONE, use_tqdm=False)
    with llm.record() as trace:
        assert llm.pin_prefix(SYSTEM, "system") == "system"
        llm.unpin_prefix("system")
    assert [[num_new for _, num_new, _ in event.scheduled] for event in trace if isinstance(event, StepRan)] == [[6]]
    assert [len(event.block_ids) for event in trace if isinstance(event, Pinned | Unpinned)] == [3, 3]


def test_pins_have_names_and_namespaces(reference_model: Build) -> None:
    llm = tiny(reference_model("llama-gqa")[0])
    salted = {"prompt_token_ids": SYSTEM[:8], "cache_salt": "tenant"}
    names = [llm.pin_prefix(SYSTEM[:4]), llm.pin_prefix(salted), llm.pin_prefix(SYSTEM[:4], "mine")]
    assert len(set(names)) == 3
    crowd(llm)
    assert num_cached(llm, SYSTEM[:8]) == 4
    assert llm.generate({**salted, "prompt_token_ids": SYSTEM[:9]}, ONE, use_tqdm=False)[0].num_cached_tokens == 8
    assert not llm.reset_prefix_cache()
    for name in names:
        llm.unpin_prefix(name)
    assert llm.reset_prefix_cache()


def test_what_cannot_be_pinned_gets_one_line(reference_model: Build) -> None:
    llm = tiny(reference_model("llama-gqa")[0])
    llm.pin_prefix(SYSTEM, "system")
    with pytest.raises(RequestError, match=r"^pin 'system': the name is in use[^\n]+$"):
        llm.pin_prefix(SYSTEM[:4], "system")
    with pytest.raises(RequestError, match=r"^pin_prefix: 3 tokens do not fill a block of 4; pin more$"):
        llm.pin_prefix(SYSTEM[:3])
    too_long = r"^pin .prefix \d+.: with 10 blocks pinned a request of max_model_len 40 would never fit[^\n]+$"
    with pytest.raises(RequestError, match=too_long):
        llm.pin_prefix([5] * 40)
    with pytest.raises(RequestError, match=r"^pin 'more': with 5 blocks pinned a request of max_model_len[^\n]+$"):
        llm.pin_prefix([5] * 8, "more")
    with pytest.raises(RequestError, match=r"^unpin 'more': nothing is pinned under this name[^\n]+$"):
        llm.unpin_prefix("more")
    with pytest.raises(RequestError, match=r"^pin_prefix: nothing is cached here[^\n]+$"):
        tiny(reference_model("llama-gqa")[0], enable_prefix_caching=False).pin_prefix(SYSTEM)
