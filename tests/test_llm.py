"""The front door: vLLM's example, every form of prompt, every error in one line, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from minivllm import LLM, MiniVLLMError, RequestOutput, SamplingParams
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.errors import ConfigError, ModelError, RequestError
from minivllm.events import Admitted
from minivllm.text_engine import Prompt
from minivllm.trace import Trace
from minivllm.weights import builtin_configs

Build = Callable[[str], tuple[Path, PreTrainedModel]]
GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8] * 9]


def tiny(folder: Path, **options: object) -> LLM:
    settings: dict[str, object] = {"dtype": "float32", "num_blocks": 100, "block_size": 4, "max_model_len": 128}
    return LLM(folder, **(settings | options))  # type: ignore[arg-type]


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def is_clean(llm: LLM) -> bool:
    pool = llm.engine.kv.pool
    return not llm.engine.has_work and not llm.text_engine._generations and pool.num_free == pool.num_usable


@pytest.fixture
def llm(reference_model: Build) -> Iterator[LLM]:
    """A small engine that every test must leave clean and working."""
    llm = tiny(reference_model("llama-gqa")[0])
    expected = tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    yield llm
    assert is_clean(llm)
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def one_line(error: BaseException) -> str:
    text = str(error)
    assert isinstance(error, MiniVLLMError) and "\n" not in text and 10 < len(text) < 400, text
    return text


# --- The real model


@pytest.fixture(scope="module")
def smollm() -> LLM:
    return LLM("smollm2-135m", dtype="float32", num_blocks=200, show_progress=False)


@pytest.mark.weights
def test_basic_offline_example_of_vllm_runs_after_changing_the_import(capsys: pytest.CaptureFixture[str]) -> None:
    # vLLM's examples/offline_inference/basic, but for the first line and the name of the model
    from minivllm import LLM, SamplingParams

    prompts = [
        "Hello, my name is",
        "The president of the United States is",
        "The capital of France is",
        "The future of AI is",
    ]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    llm = LLM(model="smollm2-135m")
    outputs = llm.generate(prompts, sampling_params)
    print("\nGenerated Outputs:\n" + "-" * 60)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")
        print("-" * 60)
    printed = capsys.readouterr().out
    assert [output.prompt for output in outputs] == prompts
    assert all(f"Prompt:    {prompt!r}" in printed for prompt in prompts)
    assert all(output.outputs[0].text and len(output.outputs[0].token_ids) <= 16 for output in outputs)


@pytest.mark.weights
def test_chat_answers_one_conversation_or_many(smollm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=8)
    [single] = smollm.chat(conversation, params, use_tqdm=False)
    many = smollm.chat([conversation, [{"role": "user", "content": "Say hi."}]], params, use_tqdm=False)
    assert "Paris" in single.outputs[0].text
    assert tokens(many)[0] == single.outputs[0].token_ids and len(many) == 2
    assert single.prompt and "<|im_start|>user\nWhat is the capital" in single.prompt
    assert single.prompt.endswith("<|im_start|>assistant\n")
    assert [output.outputs[0].text for output in smollm.stream_chat(conversation, params)][-1] == single.outputs[0].text


@pytest.mark.weights
def test_text_and_its_token_ids_are_the_same_prompt(smollm: LLM) -> None:
    text = "Once upon a time"
    token_ids = smollm.get_tokenizer().encode(text)
    forms: list[Prompt] = [text, token_ids, tuple(token_ids), {"prompt": text}, {"prompt_token_ids": token_ids}]
    found = tokens(smollm.generate(forms, GREEDY, use_tqdm=False))
    assert len(found) == 5 and all(answer == found[0] for answer in found)


@pytest.mark.weights
@pytest.mark.parametrize(
    "messages",
    [
        "hi", None, 5, [[]], [5], [{"role": "user"}], [{"role": 1, "content": "x"}], {"role": "user", "content": "x"},
        [[{"role": "user", "content": None}]], [[{"role": "user", "content": 5}]],
    ],
    ids=str,
)  # fmt: skip
def test_chat_refuses_what_is_no_conversation(smollm: LLM, messages: object) -> None:
    with pytest.raises(RequestError, match="list of dicts") as caught:
        smollm.chat(messages, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    one_line(caught.value)


@pytest.mark.weights
@pytest.mark.parametrize("prompt", ["", "half \ud83d", {"prompt": "x", "cache_salt": "\ud83d"}])
def test_text_that_is_none_is_refused(smollm: LLM, prompt: str) -> None:
    with pytest.raises(RequestError) as caught:
        smollm.generate(prompt, GREEDY, use_tqdm=False)
    one_line(caught.value)
    assert is_clean(smollm)


# --- Prompts, params, order


def test_prompts_come_one_or_many_in_every_form(llm: LLM) -> None:
    expected = tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)) == expected[:1]
    assert tokens(llm.generate({"prompt_token_ids": PROMPTS[0]}, GREEDY, use_tqdm=False)) == expected[:1]
    dicts = [{"prompt_token_ids": prompt, "cache_salt": "s"} for prompt in PROMPTS]
    assert tokens(llm.generate(dicts, GREEDY, use_tqdm=False)) == expected
    assert tokens(llm.generate(range(1, 4), GREEDY, use_tqdm=False)) == expected[:1]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_each_prompt_may_have_params_of_its_own(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (5, 1, 9)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [len(found) for found in tokens(outputs)] == [5, 1, 9]  # in the order of the prompts, not of finishing
    assert [output.prompt_token_ids for output in outputs] == PROMPTS
    assert len(llm.generate(PROMPTS[0], use_tqdm=False)[0].outputs[0].token_ids) == 16


def test_priority_decides_who_is_admitted_first(reference_model: Build) -> None:
    llm = tiny(reference_model("llama-gqa")[0], scheduling_policy="priority", max_num_seqs=1)
    trace = Trace()
    llm.events.listen(trace)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False, priority=[2, 0, 1])
    order = [event.request_id for event in trace if isinstance(event, Admitted)]
    assert order == [outputs[1].request_id, outputs[2].request_id, outputs[0].request_id]


def test_stream_yields_each_token_once_and_ends_as_generate(llm: LLM) -> None:
    outputs = list(llm.stream(PROMPTS[0], GREEDY))
    assert [len(found) for found in tokens(outputs)] == [1, 2, 3, 4, 5, 6]
    assert tokens(outputs[-1:]) == tokens(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False))


def test_two_streams_advance_together(llm: LLM) -> None:
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    next(first), next(second)
    last_of_first, last_of_second = list(first)[-1], list(second)[-1]
    assert tokens([last_of_first, last_of_second]) == tokens(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False))


def test_leaving_a_stream_gives_its_blocks_back(llm: LLM) -> None:
    for output in llm.stream(PROMPTS[0], SamplingParams(temperature=0, max_tokens=50)):
        if len(output.outputs[0].token_ids) == 3:
            break
    assert is_clean(llm)


def test_a_stream_that_is_never_read_holds_nothing(llm: LLM) -> None:
    outputs = llm.stream(PROMPTS[0], GREEDY)
    assert is_clean(llm)
    outputs.close()  # type: ignore[attr-defined]  # a generator


def test_reset_prefix_cache_forgets_when_nothing_runs(llm: LLM) -> None:
    llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)
    assert llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0].num_cached_tokens == 8
    stream = llm.stream(PROMPTS[2], GREEDY)
    next(stream)
    assert not llm.reset_prefix_cache()
    list(stream)
    assert llm.reset_prefix_cache()
    assert llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


# --- Requests that are refused: before anything runs, in one line

BAD_PROMPTS: dict[str, object] = {
    "empty": [[]], "empty dict": {"prompt_token_ids": []},
    "empty among others": [[1], []], "too long": [1] * 128, "none": None, "number": 5, "float ids": [1.0],
    "bool id": [1, True], "none id": [1, None], "mixed": [1, "a"], "bytes": b"ab", "negative id": [-1],
    "id past the vocabulary": [1, 320], "huge id": [10**30], "text without tokenizer": "hello",
    "dict without prompt": {"text": "x"}, "salt of the wrong type": {"prompt_token_ids": [1], "cache_salt": 5},
    "dict in dict": {"prompt_token_ids": {"a": 1}}, "tensor": torch.ones(3, 3), "array": np.ones((40, 2)),
    "set": {1, 2}, "second of two": [[1, 2], [320]],
}  # fmt: skip


@pytest.mark.parametrize("prompt", BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_a_bad_prompt_gets_one_line(llm: LLM, prompt: object) -> None:
    steps = llm.engine.scheduler.step
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, GREEDY, use_tqdm=False)  # type: ignore[arg-type]
    one_line(caught.value)
    assert llm.engine.scheduler.step == steps


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_params": [GREEDY]},
        {"sampling_params": [GREEDY] * 4},
        {"sampling_params": {"temperature": 0}},
        {"sampling_params": [GREEDY, GREEDY, None]},
        {"sampling_params": "greedy"},
        {"sampling_params": 0},
        {"sampling_params": GREEDY, "priority": [1]},
        {"sampling_params": GREEDY, "priority": []},
        {"sampling_params": GREEDY, "priority": 3},
        {"sampling_params": GREEDY, "priority": [1, 2, "x"]},
        {"sampling_params": GREEDY, "priority": [1, 2, float("nan")]},
    ],
    ids=str,
)
def test_bad_params_get_one_line(llm: LLM, options: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.generate(PROMPTS, use_tqdm=False, **options)  # type: ignore[arg-type]
    one_line(caught.value)


def test_stream_refuses_at_the_call_not_at_the_first_token(llm: LLM) -> None:
    for prompt, params in (([], GREEDY), ([1], {"temperature": 0}), ([1], [GREEDY, GREEDY])):
        with pytest.raises(RequestError) as caught:
            llm.stream(prompt, params)  # type: ignore[arg-type]
        one_line(caught.value)


def test_a_model_without_tokenizer_says_so(llm: LLM) -> None:
    with pytest.raises(ModelError, match="has no tokenizer") as caught:
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    one_line(caught.value)


def test_a_request_that_can_never_fit_is_refused_with_a_reason(reference_model: Build) -> None:
    with pytest.raises(ConfigError, match="KV pool holds 16 tokens") as caught:
        tiny(reference_model("llama-gqa")[0], num_blocks=5)
    one_line(caught.value)
    llm = tiny(reference_model("llama-gqa")[0], num_blocks=5, max_model_len=None)
    with pytest.raises(RequestError, match="max_model_len is 16"):
        llm.generate([1] * 16, GREEDY, use_tqdm=False)
    [output] = llm.generate([1] * 15, GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1 and is_clean(llm)


# --- Engines and models that are refused


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"block_size": 0}, "block_size"), ({"block_size": 257}, "block_size"), ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 1}, "num_blocks"), ({"max_model_len": 0}, "max_model_len"),
        ({"max_model_len": 1}, "at least 2"),
        ({"max_model_len": 10_000, "num_blocks": 5000}, "512 positions"), ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"), ({"watermark": 1.0}, "watermark"),
        ({"watermark": float("nan")}, "watermark"), ({"scheduling_policy": "lifo"}, "scheduling_policy"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 8}, "max_num_batched_tokens"),
        ({"dtype": "int8"}, "dtype"), ({"device": "tpu"}, "device"), ({"load_format": "gguf"}, "load_format"),
        ({"num_blocks": None, "kv_cache_memory": 100}, "kv_cache_memory"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_engine_option_gets_one_line(reference_model: Build, options: dict[str, object], word: str) -> None:
    with pytest.raises(MiniVLLMError) as caught:
        tiny(reference_model("llama-gqa")[0], **options)
    assert word in one_line(caught.value)


def with_config(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "not supported"),
        ({"num_attention_heads": 7, "head_dim": 16}, "7 query heads do not divide over 2 KV heads"),
        ({"head_dim": 12}, "head size 12"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"intermediate_size": 100}, "has shape [64, 96], config.json asks for [64, 100]"),
        ({"num_hidden_layers": 3}, "lacks weights for 6 parameters"),
        ({"num_hidden_layers": 1}, "has no place for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_inconsistent_config_gets_one_line(
    reference_model: Build, tmp_path: Path, changes: Mapping[str, object], words: str
) -> None:
    folder = with_config(reference_model("llama-gqa")[0], tmp_path / "m", **changes)
    with pytest.raises(ModelError) as caught:
        tiny(folder)
    assert words in one_line(caught.value)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/folder", "", "qwen3-0.6b"])
def test_an_unknown_model_gets_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        LLM(name, show_progress=False)
    one_line(caught.value)


def test_tensors_that_lack_misfit_or_exceed_are_named(reference_model: Build, tmp_path: Path) -> None:
    weights = load_file(reference_model("llama-gqa")[0] / "model.safetensors")
    k_proj = "model.layers.1.self_attn.k_proj.weight"
    without = {name: tensor for name, tensor in weights.items() if name != k_proj}
    cases = {
        "lacks weights for 1 parameters, 'layers.1.attention.qkv_proj.weight'": without,
        f"'{k_proj}' has shape [32, 63], config.json asks for [32, 64]": weights | {k_proj: torch.zeros(32, 63)},
        "'model.layers.0.extra' that llama has no place for": weights | {"model.layers.0.extra": torch.zeros(2)},
        "'odd' that llama": weights | {"odd": torch.zeros(2)},
    }
    for number, (words, tensors) in enumerate(cases.items()):
        folder = with_config(reference_model("llama-gqa")[0], tmp_path / str(number))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        with pytest.raises(ModelError) as caught:
            tiny(folder)
        assert words in one_line(caught.value)


# --- Weights: shards, noise, dtypes


def sharded(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_sharded_checkpoint_loads_as_the_whole_one(reference_model: Build, tmp_path: Path) -> None:
    folder, model = reference_model("llama-gqa")
    split = tiny(sharded(model, tmp_path / "split"))
    assert tokens(split.generate(PROMPTS, GREEDY, use_tqdm=False)) == tokens(
        tiny(folder).generate(PROMPTS, GREEDY, use_tqdm=False)
    )


def test_a_shard_with_a_wrong_shape_or_none_at_all_is_named(reference_model: Build, tmp_path: Path) -> None:
    folder = sharded(reference_model("llama-gqa")[1], tmp_path / "split")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.zeros(3, 3)}, shard)
    with pytest.raises(ModelError, match=r"has shape \[3, 3\]") as caught:
        tiny(folder)
    one_line(caught.value)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name) as caught:
        tiny(folder)
    one_line(caught.value)


def state(llm: LLM) -> dict[str, torch.Tensor]:
    return dict(llm.runner.model.named_parameters())


def test_dummy_weights_are_a_function_of_the_seed(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    same, twin, other = (tiny(folder, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, state(twin)[name]) for name, tensor in state(same).items())
    assert not torch.equal(state(same)["embed.weight"], state(other)["embed.weight"])
    first, second = (tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) for llm in (same, twin))
    assert first == second != tokens(other.generate(PROMPTS, GREEDY, use_tqdm=False))


@pytest.mark.parametrize("name", builtin_configs())
def test_every_builtin_config_runs_shrunken_to_one_layer(name: str, tmp_path: Path) -> None:
    config = {**builtin_configs()[name], "num_hidden_layers": 1, "vocab_size": 500, "intermediate_size": 64}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    head_size = config.get("head_dim") or config["hidden_size"] // heads  # type: ignore[operator]
    config |= {"head_dim": head_size, "hidden_size": 128, "layer_types": None, "eos_token_id": None}
    config |= {"num_attention_heads": heads // kv_heads * 2, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(tmp_path, load_format="dummy", num_blocks=50, dtype="float32")
    assert all(len(found) == 6 for found in tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)))
    assert is_clean(llm)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.25), ("float16", 0.03)])
def test_each_dtype_runs_and_stays_near_transformers(reference_model: Build, dtype: str, tolerance: float) -> None:
    folder, model = reference_model("llama-gqa")
    llm = tiny(folder, dtype=dtype)
    assert llm.storage.data.dtype == getattr(torch, dtype)
    [output] = llm.generate(list(range(20)), SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.arange(20)[None]).logits[0].float(), dim=-1)
    judged = [found[i].logprob for i, found in enumerate(output.prompt_logprobs or []) if found]
    error = torch.tensor(judged) - expected[torch.arange(19), torch.arange(1, 20)]
    assert error.abs().mean() < tolerance


def test_a_folder_of_transformers_own_making_is_read_back_by_it(reference_model: Build) -> None:
    folder, model = reference_model("qwen3")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


# --- Ctrl-C and failing devices

ENDLESS = SamplingParams(temperature=0, max_tokens=120)


def press_in_step(llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch, num_times: int = 1) -> None:
    """A real SIGINT while the model computes."""
    run, num_runs = llm.runner.run, 0

    def pressed_run(plan: StepPlan) -> StepResult:
        nonlocal num_runs
        num_runs += 1
        if num_runs == step:
            for _ in range(num_times):
                signal.raise_signal(signal.SIGINT)
        return run(plan)

    monkeypatch.setattr(llm.runner, "run", pressed_run)


@pytest.mark.parametrize("num_times", [1, 2])  # the second one does not wait for the end of the step
@pytest.mark.parametrize("step", [1, 2, 30])
def test_interrupted_generate_leaves_nothing(
    llm: LLM, step: int, num_times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    press_in_step(llm, step, monkeypatch, num_times)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    assert is_clean(llm) and signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("step", [1, 5])
def test_interrupted_stream_leaves_nothing(llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    press_in_step(llm, step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        for _ in llm.stream(PROMPTS[0], ENDLESS):
            pass
    assert is_clean(llm)


@pytest.mark.parametrize("delay_s", [0.001, 0.01, 0.03])
def test_a_signal_at_any_moment_leaves_nothing(llm: LLM, delay_s: float) -> None:
    num_threads = threading.active_count()
    for run in (lambda: llm.generate(PROMPTS, ENDLESS, use_tqdm=False), lambda: list(llm.stream(PROMPTS[0], ENDLESS))):
        timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            run()
            time.sleep(5)  # for a machine that was faster
        timer.join()
        assert is_clean(llm) and threading.active_count() == num_threads


CELL = """
import sys, threading
from minivllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", num_blocks=200, block_size=16)
params = SamplingParams(temperature=0, max_tokens=400)
expected = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
print("ready", flush=True)
try:
    while True:
        llm.generate([[1, 2, 3]] * 8, params, use_tqdm=False)
except KeyboardInterrupt:
    pool = llm.engine.kv.pool
    again = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    same = again[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
    threads = [t.name for t in threading.enumerate() if t.name == "minivllm-engine"]
    print("after", pool.num_free == pool.num_usable, same, threads, flush=True)
"""


def test_ctrl_c_in_a_process_of_its_own(reference_model: Build) -> None:
    folder, _ = reference_model("llama-gqa")
    command = [sys.executable, "-c", CELL, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out == "after True True []\n", err
    assert process.returncode == 0


def fail_in_step(llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, num_runs = llm.runner.run, 0

    def failing_run(plan: StepPlan) -> StepResult:
        nonlocal num_runs
        num_runs += 1
        if num_runs == step:
            raise RuntimeError("out of device memory")
        return run(plan)

    monkeypatch.setattr(llm.runner, "run", failing_run)


@pytest.mark.parametrize("step", [1, 4])
def test_a_failing_runner_is_reported_and_the_next_call_works(
    llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_step(llm, step, monkeypatch)
    with pytest.raises(RuntimeError, match="out of device memory"):
        llm.generate(PROMPTS, ENDLESS, use_tqdm=False)
    assert is_clean(llm)


def test_a_failing_runner_ends_a_stream_with_the_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_step(llm, 3, monkeypatch)
    seen = []
    with pytest.raises(RuntimeError, match="out of device memory"):
        for output in llm.stream(PROMPTS[0], ENDLESS):
            seen.append(output.finished)
    assert seen == [False, False] and is_clean(llm)


def test_n_samples_that_end_at_different_times_survive_a_failure_of_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_step(llm, 8, monkeypatch)
    params = [SamplingParams(n=3, seed=1, max_tokens=5), SamplingParams(n=2, seed=1, max_tokens=20)]
    generations = [llm.text_engine.add(llm.text_engine.check([1, 2]), chosen) for chosen in params]
    while llm.text_engine.has_work:
        llm.text_engine.step()
    assert [generation.error is None for generation in generations] == [True, False]
    assert {sample.finish_reason for sample in generations[0].output().outputs} == {"length"}


@pytest.mark.parametrize("option", ["block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "seed"])
@pytest.mark.parametrize("value", ["16", 1.5, True])
def test_engine_options_of_a_wrong_type_get_one_line(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{option} must be an integer, not [^\n]+$"):
        LLM("smollm2-135m", load_format="dummy", **{option: value})  # type: ignore[arg-type]


def test_options_of_vllm_that_we_lack_get_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^LLM has no option 'tensor_parallel_size': leave it out; [^\n]+$"):
        LLM("smollm2-135m", load_format="dummy", tensor_parallel_size=1)  # type: ignore[call-arg]


def test_a_switch_that_is_no_boolean_is_refused() -> None:
    with pytest.raises(ConfigError, match="enable_prefix_caching must be True or False, not 'no'"):
        LLM("smollm2-135m", load_format="dummy", enable_prefix_caching="no")  # type: ignore[arg-type]


def test_a_pool_larger_than_memory_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^the KV pool would take [\d.]+ GiB, and [\d.]+ GiB are free: lower"):
        LLM("smollm2-135m", load_format="dummy", num_blocks=10**9)


def test_without_chunks_the_longest_prompt_fits_in_one_step_by_default() -> None:
    llm = LLM("smollm2-135m", load_format="dummy", enable_chunked_prefill=False, num_blocks=600)
    assert llm.config.max_model_len == llm.config.max_num_batched_tokens == 8192
    with pytest.raises(ConfigError, match="raise max_num_batched_tokens"):
        LLM("smollm2-135m", load_format="dummy", enable_chunked_prefill=False, max_num_batched_tokens=10)


def test_a_torch_dtype_is_a_dtype(reference_model: Build) -> None:
    assert LLM(reference_model("llama-gqa")[0], dtype=torch.float16, num_blocks=9).model_config.dtype == "float16"


@pytest.mark.weights
def test_half_a_character_in_a_chat_gets_one_line() -> None:
    llm = LLM("smollm2-135m", num_blocks=20)
    with pytest.raises(RequestError, match="half a surrogate pair"):
        llm.chat([{"role": "user", "content": "\ud800"}], use_tqdm=False)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_generation_config_is_one_line(reference_model: Build, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text((reference_model("llama-gqa")[0] / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config.json' .*: download it again, or remove it$") as caught:
        tiny(tmp_path, load_format="dummy")
    assert "\n" not in str(caught.value)


WITHOUT_TRITON = """
import importlib.util, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}")

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
sys.meta_path.insert(0, Missing())
from minivllm import LLM, SamplingParams
llm = LLM("tiny-hybrid", load_format="dummy", num_blocks=60, show_progress=False, device="cpu")
[output] = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
print(len(output.outputs[0].token_ids))
"""


def test_a_machine_without_triton_runs_the_engine() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert (run.stdout.strip(), run.returncode) == ("4", 0), run.stderr[-2000:]
