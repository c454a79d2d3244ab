"""Timed and counted forward passes: they run the engine's own model, and their work is the calculators'."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from minivllm import LLM, SamplingParams
from minivllm.course.calculators import Accelerator, num_parameters
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab.counted_steps import counted_steps
from minivllm.lab.forward_sweep import (
    Shape,
    load_sweeps,
    main,
    plan_of,
    save_sweeps,
    shapes_of,
    sweep,
)
from minivllm.lab.gpu_steps import captured, nvidia_busy
from minivllm.lab.step_floor import ModelWork
from minivllm.weights import find_model

Build = Callable[[str], tuple[Path, PreTrainedModel]]
MACHINE = Accelerator("a made-up machine", 2**34, 1e10, {"float32": 1e11}, "this test")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)


def small(path: Path, **options: object) -> LLM:
    return LLM(path, dtype="float32", device="cpu", num_blocks=40, show_progress=False, **options)  # type: ignore[arg-type]


def test_shapes_are_prefills_and_then_decodes_at_each_context() -> None:
    shapes = shapes_of(4, 2, [8, 32])
    assert shapes == [
        Shape(1, 1, 1),
        Shape(1, 2, 2),
        Shape(1, 4, 4),
        *(Shape(b, 1, c) for c in (8, 32) for b in (1, 2)),
    ]
    assert [shape.kind for shape in shapes] == ["prefill"] * 3 + ["decode"] * 4


def test_a_planned_prefill_is_the_one_that_transformers_computes(reference_model: Build) -> None:
    path, oracle = reference_model("llama-gqa")
    llm = small(path)
    plan = plan_of(llm, Shape(2, 21, 21))
    llm.storage.data[:, :, 1:5].zero_()
    logits = llm.runner.logits(plan)
    for row, (request, _) in zip(logits, plan.scheduled, strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([request.token_ids])).logits[0, -1]
        torch.testing.assert_close(row, expected.float(), rtol=1e-4, atol=1e-4)


def test_decodes_compute_one_token_each_at_the_end_of_what_is_stored(reference_model: Build) -> None:
    llm = small(reference_model("llama-gqa")[0])
    plan = plan_of(llm, Shape(3, 1, 33))
    tables = [request.block_ids for request, _ in plan.scheduled]
    assert [request.num_computed for request, _ in plan.scheduled] == [32, 32, 32] and plan.num_tokens == 3
    assert len({block for table in tables for block in table}) == 9 and 0 not in tables[0]


def test_a_sweep_holds_the_calculators_work_and_leaves_the_engine_as_it_was(reference_model: Build) -> None:
    llm = small(reference_model("qwen3")[0])
    prompt = list(range(1, 40))
    before = llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    swept = sweep(llm, MACHINE, shapes_of(8, 4, [16, 32]), budget_s=0)
    work = ModelWork(find_model(str(llm.model), "dummy").config, "float32")
    for step in swept.steps:
        one = (step.shape.num_new, step.shape.num_stored)
        floor = work.floor([one] * step.shape.num_requests, step.shape.num_requests, MACHINE)
        assert (step.flops, step.weight_bytes, step.kv_bytes) == (floor.flops, floor.weight_bytes, floor.kv_bytes)
        assert step.intensity == floor.flops / (floor.weight_bytes + floor.kv_bytes)
        assert step.ms > 0 and step.graph_ms is None and step.busy is not None and step.busy >= 0
        assert swept.share_of_flops(step) == pytest.approx(100 * step.flops / step.ms * 1e3 / swept.flops_per_s)
    assert [s.shape.num_requests for s in swept.series("decode", 32)] == [1, 2, 4]
    assert [s.shape.num_new for s in swept.series("prefill")] == [1, 2, 4, 8]
    assert llm.generate([prompt], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == before


def test_a_roof_that_a_step_goes_beyond_is_raised_to_it(reference_model: Build) -> None:
    slow = Accelerator("a very slow machine", 2**34, 1.0, {"float32": 1.0}, "this test")
    swept = sweep(small(reference_model("llama-gqa")[0]), slow, shapes_of(8, 4, [16]), budget_s=0)
    assert max(swept.share_of_flops(step) for step in swept.steps) == pytest.approx(100)
    assert max(step.num_bytes / step.best_s for step in swept.steps) == swept.bandwidth
    assert all(step.floor_ms <= step.ms * (1 + 1e-9) for step in swept.steps)
    fast = Accelerator("a very fast machine", 2**34, 1e18, {"float32": 1e18}, "this test")
    swept = sweep(small(reference_model("llama-gqa")[0]), fast, [Shape(1, 1, 8)], budget_s=0)
    assert (swept.bandwidth, swept.flops_per_s) == (1e18, 1e18)


def test_a_sweep_refuses_what_it_would_spoil_or_cannot_hold(reference_model: Build) -> None:
    llm = small(reference_model("llama-gqa")[0])
    with pytest.raises(ConfigError, match="num_blocks=65 or more"):
        sweep(llm, MACHINE, [Shape(32, 1, 32)])
    generation = llm.text_engine.add(llm.text_engine.check([1, 2, 3]), GREEDY)
    llm.text_engine.step()
    with pytest.raises(ConfigError, match="finish or abort"):
        sweep(llm, MACHINE, [Shape(1, 1, 8)])
    llm.text_engine.abort(generation)
    mixed = small(reference_model("ministral-1to1")[0])
    with pytest.raises(ConfigError, match="group of layers"):
        sweep(mixed, MACHINE, [Shape(1, 1, 8)])


@pytest.mark.parametrize("num_requests", [1, 2])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha-tied", "qwen2", "qwen3"])
def test_counted_flops_and_bytes_of_the_running_engine_are_the_calculators(
    family: str, num_requests: int, reference_model: Build
) -> None:
    """Products: to the FLOP, norms and biases aside. Attention: torch counts all pairs of a rectangle, we the seen."""
    llm = small(reference_model(family)[0], enable_prefix_caching=False)
    config = find_model(str(llm.model), "dummy").config
    with counted_steps(llm) as steps:
        llm.generate([list(range(1 + i, 33 + i)) for i in range(num_requests)], GREEDY, use_tqdm=False)
    work, parts = ModelWork(config, "float32"), num_parameters(config).parts
    assert [step.num_tokens for step in steps] == [32 * num_requests, *[num_requests] * 5]
    for step in steps:
        floor = work.floor(step.scheduled, step.num_logits, MACHINE)
        assert (step.weight_bytes, step.kv_bytes) == (floor.weight_bytes, floor.kv_bytes)
        head = llm.model_config.hidden_size * llm.model_config.vocab_size
        body = int(parts["attention"]) + int(parts["mlp"])
        assert step.products == 2 * (body * step.num_tokens + head * step.num_logits)
        width = 4 * llm.model_config.num_heads * llm.model_config.head_size * llm.model_config.num_layers
        rectangle = sum(new * -(-stored // 16) * 16 for new, stored in step.scheduled)
        assert step.attention == width * rectangle
        assert floor.flops <= step.flops * 1.001
    assert llm.engine.runner is llm.runner


def test_a_recording_comes_back_as_it_was_saved(reference_model: Build, tmp_path: Path) -> None:
    swept = sweep(small(reference_model("llama-gqa")[0]), MACHINE, shapes_of(4, 2, [16]), budget_s=0)
    path = save_sweeps(tmp_path / "sweep.json", [swept, replace(swept, model="other")])
    assert load_sweeps(path) == [swept, replace(swept, model="other")]
    for text in ("", "[]", "{}", '{"minivllm_forward_sweep": 9, "sweeps": []}', path.read_text().replace("flops", "x")):
        path.write_text(text)
        with pytest.raises(MiniVLLMError, match="not a sweep"):
            load_sweeps(path)


def test_the_command_writes_a_recording_with_its_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minivllm.lab.forward_sweep.measured_roofs", lambda device, dtype: MACHINE)
    path = tmp_path / "sweep.json"
    sizes = ["--tokens", "4", "--requests", "2", "--contexts", "16", "--budget", "0", "--dtype", "float32"]
    assert main(["--model", "tiny-mla", "--load-format", "dummy", *sizes, "--output", str(path)]) == 0
    [swept] = load_sweeps(path)
    assert (swept.model, swept.machine, len(swept.steps)) == ("tiny-mla", MACHINE.name, 5)
    assert {"machine", "commit", "seed", "command"} <= swept.provenance.keys()
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="above 0"):
        main(["--tokens", "0", "--output", str(path)])


@pytest.mark.gpu
def test_a_captured_step_runs_and_nvidia_smi_answers_while_it_does() -> None:
    llm = LLM("tinyllama-1.1b", load_format="dummy", num_blocks=64, show_progress=False)
    replay = captured(llm, plan_of(llm, Shape(2, 1, 64)))
    replay()
    torch.cuda.synchronize()
    assert 0 <= (nvidia_busy(replay) or 0) <= 100
