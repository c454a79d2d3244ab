"""Preemption by swap: blocks wait on the host, come back anywhere, and nobody computes them twice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.errors import ConfigError
from minivllm.events import Admitted, Preempted, StepRan, SwappedIn, SwappedOut
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants
from minivllm.trace import Trace

Build = Callable[[str], tuple[Path, PreTrainedModel]]
PROMPTS = [[(7 * i + 13 * j + 3) % 320 for j in range(3 + 5 * i % 23)] for i in range(20)]
PARAMS = [SamplingParams(temperature=1.1 * (i % 2), seed=i, max_tokens=12 + i % 9) for i in range(20)]


def pressed(num_host_blocks: int, mode: str = "swap") -> Trace:
    """Two requests that grow until one must go."""
    engine, runner = fake_engine(
        num_blocks=7, max_model_len=24, preemption_mode=mode, num_host_blocks=num_host_blocks,
        enable_prefix_caching=False,
    )  # fmt: skip
    trace = Trace()
    engine.events.listen(trace)
    for request in (fake_request("a", range(8), max_tokens=12), fake_request("b", range(20, 28), max_tokens=12)):
        engine.add(request)
    while engine.has_work:
        engine.step()
        check_invariants(engine, runner)
    check_drained(engine)
    return trace


def num_computed(trace: Trace) -> int:
    return sum(new for event in trace if isinstance(event, StepRan) for _, new, _ in event.scheduled)


def test_swapped_request_computes_nothing_twice() -> None:
    swapped, recomputed = pressed(num_host_blocks=6), pressed(num_host_blocks=0, mode="recompute")
    assert num_computed(swapped) == 2 * (8 + 12 - 1)
    lost = sum(event.num_computed for event in recomputed if isinstance(event, Preempted))
    assert num_computed(recomputed) == num_computed(swapped) + lost > num_computed(swapped)


def test_table_goes_to_the_host_and_comes_back_whole() -> None:
    trace = pressed(num_host_blocks=6)
    [out], [back] = trace.of(SwappedOut), trace.of(SwappedIn)
    assert isinstance(out, SwappedOut) and isinstance(back, SwappedIn)
    assert out.host_ids == back.host_ids and len(out.block_ids) == len(back.block_ids)
    reasons = [(e.reason, e.how) for e in trace if isinstance(e, Preempted)]
    assert reasons == [("no_blocks", "swap")] or reasons == [("itself", "swap")]
    assert [e.reason for e in trace if isinstance(e, Admitted)][-1] in ("swapped_in", "alone")


def test_full_host_falls_back_to_recompute() -> None:
    assert {e.how for e in pressed(num_host_blocks=1) if isinstance(e, Preempted)} == {"recompute"}


def test_aborting_a_swapped_request_frees_the_host() -> None:
    engine, _ = fake_engine(num_blocks=7, max_model_len=24, preemption_mode="swap", num_host_blocks=6)
    for request in (fake_request("a", range(8), max_tokens=12), fake_request("b", range(20, 28), max_tokens=12)):
        engine.add(request)
    while not engine.requests["b"].host_ids:
        engine.step()
    assert engine.abort("b") and engine.scheduler.swap.num_free == 6


@pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
@pytest.mark.parametrize("options", [{}, {"prefix_cache": "radix"}], ids=str)
def test_real_model_gives_the_same_tokens(reference_model: Build, family: str, options: dict[str, str]) -> None:
    if family == "mistral" and options.get("prefix_cache") == "radix":
        pytest.skip("refused: its windows free the starts of prefixes")
    folder, _ = reference_model(family)
    sizes = {"dtype": "float32", "block_size": 3, "max_model_len": 64, "max_num_seqs": 9}
    calm = LLM(folder, num_blocks=400, enable_prefix_caching=False, **sizes)  # type: ignore[arg-type]
    tight = LLM(folder, num_blocks=26, preemption_mode="swap", num_host_blocks=40, **sizes, **options)  # type: ignore[arg-type]
    with tight.record() as trace:
        outputs = tight.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert trace.of(SwappedIn)
    expected = calm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


def test_contents_come_back_bit_for_bit(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = LLM(
        folder, dtype="float32", num_blocks=8, block_size=4, max_model_len=28, preemption_mode="swap",
        num_host_blocks=8, enable_prefix_caching=False,
    )  # fmt: skip
    before: dict[str, torch.Tensor] = {}

    def look(event: object) -> None:
        if isinstance(event, SwappedOut):
            before[event.request_id] = llm.storage.data[:, :, list(event.block_ids)].clone()
        elif isinstance(event, StepRan):
            for back in [e for e in seen if isinstance(e, SwappedIn)]:
                num_stored = llm.engine.requests[back.request_id].num_computed - 1
                now = llm.storage.data[:, :, list(back.block_ids)].flatten(2, 3)[:, :, :num_stored]
                assert torch.equal(now, before[back.request_id].flatten(2, 3)[:, :, :num_stored])
                checked.append(back)
            seen.clear()
        seen.append(event)

    seen: list[object] = []
    checked: list[object] = []
    llm.events.listen(look)
    llm.generate(
        [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], SamplingParams(max_tokens=16, seed=1), use_tqdm=False
    )
    assert checked


def test_swap_space_is_in_gib_and_wrong_ones_get_one_line() -> None:
    llm = LLM("smollm2-135m", load_format="dummy", num_blocks=20, preemption_mode="swap", swap_space=0.01)
    assert llm.config.num_host_blocks == int(0.01 * 2**30) // 368_640
    for swap_space in (-1, True, "4", 10**6):
        with pytest.raises(ConfigError, match=r"^swap_space[^\n]*$"):
            LLM("smollm2-135m", load_format="dummy", num_blocks=20, swap_space=swap_space)  # type: ignore[arg-type]


def test_host_blocks_that_no_machine_has_and_two_wishes_get_one_line() -> None:
    for options, word in (
        ({"num_host_blocks": 10**9}, "num_host_blocks=1000000000 would take"),
        ({"num_host_blocks": 4, "swap_space": 0.1}, "give one of them"),
        ({"allocator": "contiguous", "prefix_cache": "radix"}, "enable_prefix_caching=False"),
    ):
        with pytest.raises(ConfigError, match=rf"^[^\n]*{word}[^\n]*$"):
            LLM("smollm2-135m", load_format="dummy", num_blocks=20, **options)
