"""Requests from any thread while the engine runs; when all is done no thread, block or request is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty

import pytest
from transformers import PreTrainedModel

from minivllm import LLM, AsyncEngine, RequestOutput, SamplingParams
from minivllm.engine.plan import StepPlan, StepResult
from minivllm.errors import ConfigError, RequestError

Build = Callable[[str], tuple[Path, PreTrainedModel]]
LONG = SamplingParams(temperature=0, max_tokens=400)
SHORT = SamplingParams(temperature=0, max_tokens=8)


def is_clean(llm: LLM) -> bool:
    """No request, no block, and soon no thread."""
    deadline_s = time.monotonic() + 5
    while any(t.name == "minivllm-engine" for t in threading.enumerate()) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    pool = llm.engine.kv.pool
    no_thread = all(t.name != "minivllm-engine" for t in threading.enumerate())
    return no_thread and not llm.engine.has_work and pool.num_free == pool.num_usable


@pytest.fixture
def llm(reference_model: Build) -> Iterator[LLM]:
    """A small engine that every test must leave as clean as it found it."""
    folder, _ = reference_model("llama-gqa")
    llm = LLM(folder, dtype="float32", num_blocks=400, block_size=4, max_model_len=500)
    yield llm
    assert is_clean(llm)


def alone(llm: LLM, prompt: list[int], params: SamplingParams = SHORT) -> list[int]:
    return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_a_request_added_while_another_runs_gets_its_own_tokens(llm: LLM) -> None:
    expected = alone(llm, [9, 9, 2])
    with AsyncEngine(llm) as engine:
        long = engine.add([1, 2, 3], LONG)
        next(iter_once := iter(long))
        late = engine.add([9, 9, 2], SHORT)
        assert tokens(late.result(timeout_s=30)) == expected
        assert not long.is_finished  # it joined the batch, it did not queue behind
        iter_once.close()  # type: ignore[attr-defined]  # a generator
    assert is_clean(llm)


def test_results_grow_and_end_finished(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        outputs = list(engine.add([4, 5, 6], SHORT))
    assert [len(tokens(output)) for output in outputs] == list(range(1, 9))
    assert [output.finished for output in outputs] == [False] * 7 + [True]
    assert tokens(outputs[-1]) == alone(llm, [4, 5, 6])


def test_many_threads_add_at_once(llm: LLM) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(24)]
    expected = [alone(llm, prompt) for prompt in prompts]
    found: dict[int, list[int]] = {}
    with AsyncEngine(llm) as engine:

        def serve(first: int) -> None:
            streams = {i: engine.add(prompts[i], SHORT) for i in range(first, 24, 4)}
            found.update({i: tokens(stream.result(timeout_s=30)) for i, stream in streams.items()})

        threads = [threading.Thread(target=serve, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(24)] == expected


def test_abort_from_another_thread_frees_the_blocks_at_once(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        stream = engine.add([1, 2, 3], LONG, request_id="mine")
        outputs = iter(stream)  # kept: a loop that is dropped aborts
        assert not next(outputs).finished
        aborter = threading.Thread(target=engine.abort, args=("mine",))
        aborter.start()
        aborter.join()
        assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable
        assert stream.result(timeout_s=5).outputs[0].finish_reason == "abort"
        assert not engine.abort("mine") and not engine.abort("unknown")


def test_nobody_waits_for_more_than_a_few_steps(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        long, waits = engine.add([1, 2, 3], LONG), []
        for call in (lambda: engine.add([4], SHORT), lambda: next(llm.stream([5], SHORT)), lambda: long.abort()):
            time.sleep(0.01)
            first = llm.engine.scheduler.step
            call()
            waits.append(llm.engine.scheduler.step - first)
    assert max(waits) < 40  # an unfair lock lets the worker run to its end, 400 steps later


def test_leaving_the_loop_aborts(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        stream = engine.add([1, 2, 3], LONG)
        for output in stream:
            if len(tokens(output)) >= 3:
                break
        assert stream.is_finished
        assert is_clean(llm)


def test_an_interrupted_cell_leaves_nothing(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        stream = engine.add([1, 2, 3], LONG)
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                raise KeyboardInterrupt
        assert stream.is_finished
        assert is_clean(llm)


def test_a_real_signal_in_the_loop_leaves_nothing(llm: LLM) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without one
    with AsyncEngine(llm) as engine:
        stream = engine.add([1, 2, 3], LONG)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in stream:
                pass
            time.sleep(5)
        timer.join()
        assert is_clean(llm)
        assert tokens(engine.add([4, 5], SHORT).result(timeout_s=30)) == alone(llm, [4, 5])


def test_a_signal_while_adding_leaves_no_request_without_an_owner(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add = llm.text_engine.add

    def interrupted_add(*args: object, **options: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return add(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.text_engine, "add", interrupted_add)
    with AsyncEngine(llm) as engine, pytest.raises(KeyboardInterrupt):
        engine.add([1, 2, 3], LONG)
    assert is_clean(llm)
    outputs = llm.stream([1, 2, 3], LONG)
    with pytest.raises(KeyboardInterrupt):
        next(outputs)


def test_no_thread_while_idle_and_a_new_one_on_demand(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        for _ in range(3):
            engine.add([4, 5, 6], SHORT).result(timeout_s=30)
            assert is_clean(llm) and not engine.is_running


def test_close_aborts_waits_and_may_be_called_twice(llm: LLM) -> None:
    engine = AsyncEngine(llm)
    streams = [engine.add([i, 2, 3], LONG) for i in range(5)]
    engine.close()
    assert not engine.is_running and all(stream.is_finished for stream in streams)
    assert {stream.result(timeout_s=5).outputs[0].finish_reason for stream in streams} == {"abort"}
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.add([1])


def test_asyncio_serves_several_and_keeps_the_loop_free(llm: LLM) -> None:
    expected = [alone(llm, [i, 7]) for i in range(4)]

    async def collect(engine: AsyncEngine, i: int) -> list[int]:
        return [tokens(output) async for output in engine.add([i, 7], SHORT)][-1]

    async def serve() -> tuple[list[list[int]], int]:
        num_ticks, engine = 0, AsyncEngine(llm)

        async def tick() -> None:
            nonlocal num_ticks
            while True:
                num_ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        found = await asyncio.gather(*(collect(engine, i) for i in range(4)))
        ticker.cancel()
        engine.close()
        return found, num_ticks

    found, num_ticks = asyncio.run(serve())
    assert found == expected and num_ticks > 4


def test_a_cancelled_task_aborts_its_request(llm: LLM) -> None:
    async def serve() -> None:
        with AsyncEngine(llm) as engine:
            stream = engine.add([1, 2, 3], LONG)

            async def read() -> None:
                async for _ in stream:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.03)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert stream.is_finished

    asyncio.run(serve())


def test_generate_works_while_the_background_runs(llm: LLM) -> None:
    expected = alone(llm, [8, 8, 8])
    with AsyncEngine(llm) as engine:
        background = engine.add([1, 2, 3], LONG)
        assert alone(llm, [8, 8, 8]) == expected
        assert [tokens(output) for output in llm.stream([8, 8, 8], SHORT)][-1] == expected
        background.abort()


def test_stream_gets_its_last_result_whoever_stepped_it(llm: LLM) -> None:
    expected = alone(llm, [8, 8, 8])
    outputs = llm.stream([8, 8, 8], SHORT)
    next(outputs)
    with AsyncEngine(llm) as engine:
        engine.add([1, 2], SamplingParams(temperature=0, max_tokens=20)).result(timeout_s=30)  # finishes the other too
    last = list(outputs)[-1]
    assert last.finished and tokens(last) == expected


def break_once(llm: LLM, request_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first step that holds this request fail."""
    run, is_broken = llm.runner.run, True

    def failing_run(plan: StepPlan) -> StepResult:
        nonlocal is_broken
        if is_broken and any(request.id == request_id for request, _ in plan.scheduled):
            is_broken = False
            raise RuntimeError("the device is on fire")
        return run(plan)

    monkeypatch.setattr(llm.runner, "run", failing_run)


def test_a_failing_step_reaches_its_owner_and_nobody_else(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(llm, [4, 5, 6])
    object.__setattr__(llm.config, "max_num_seqs", 1)  # so that the other waits while the first one fails
    break_once(llm, "bad", monkeypatch)
    with AsyncEngine(llm) as engine:
        with llm.text_engine.lock:
            bad, good = engine.add([1, 2], LONG, request_id="bad"), engine.add([4, 5, 6], SHORT)
        with pytest.raises(RuntimeError, match="on fire"):
            bad.result(timeout_s=30)
        assert bad.is_finished
        assert tokens(good.result(timeout_s=30)) == expected


def test_a_failure_in_the_background_does_not_reach_generate(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(llm, [4, 5, 6])
    object.__setattr__(llm.config, "max_num_seqs", 1)
    break_once(llm, "bad", monkeypatch)
    prompt = llm.text_engine.check([1, 2])
    bad = llm.text_engine.add(prompt, LONG, request_id="bad")  # nobody steps it but generate
    assert alone(llm, [4, 5, 6]) == expected
    assert isinstance(bad.error, RuntimeError)


@pytest.mark.parametrize("prompt", [[], [1, 320], "text without a tokenizer", list(range(300)) * 2, None])
def test_a_bad_prompt_costs_the_others_nothing(llm: LLM, prompt: object) -> None:
    expected = alone(llm, [4, 5, 6])
    with AsyncEngine(llm) as engine:
        good = engine.add([4, 5, 6], SHORT)
        with pytest.raises(RequestError):
            engine.add(prompt, SHORT)  # type: ignore[arg-type]
        with pytest.raises(RequestError):
            engine.add([1], {"temperature": 0})  # type: ignore[arg-type]
        assert tokens(good.result(timeout_s=30)) == expected


def test_an_id_in_use_is_refused(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        engine.add([1, 2], LONG, request_id="a")
        with pytest.raises(RequestError, match="in use"):
            engine.add([3, 4], LONG, request_id="a")


def test_waiting_for_news_can_time_out(llm: LLM) -> None:
    with AsyncEngine(llm) as engine, llm.text_engine.lock:  # nothing can step
        stream = engine.add([1, 2], LONG)
        with pytest.raises(Empty):
            stream.result(timeout_s=0.01)
        stream.abort()


def test_id_of_a_request_with_samples_is_in_use(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        engine.add([1, 2], SamplingParams(n=2, max_tokens=100), request_id="q")
        with pytest.raises(RequestError, match=r"^request q: its id is in use[^\n]+$"):
            engine.add([1, 2], LONG, request_id="q")


def test_number_that_a_caller_took_is_skipped(llm: LLM) -> None:
    with AsyncEngine(llm) as engine:
        engine.add([1, 2], LONG, request_id="3")
        outputs = llm.generate([[1, 2]] * 5, SHORT, use_tqdm=False)
    ids = [output.request_id for output in outputs]
    assert len(set(ids)) == 5 and "3" not in ids


@pytest.mark.parametrize("request_id", [7, "", ["a"]])
def test_id_that_is_no_string_gets_one_line(llm: LLM, request_id: str) -> None:
    with AsyncEngine(llm) as engine, pytest.raises(RequestError, match=r"^request_id must be a string[^\n]+$"):
        engine.add([1, 2], SHORT, request_id=request_id)


def test_what_is_no_llm_gets_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^AsyncEngine drives an LLM: [^\n]+$"):
        AsyncEngine("smollm2-135m")  # type: ignore[arg-type]


@pytest.mark.parametrize("left_open", ["AsyncEngine(llm).add(prompt, params)", "llm.stream(prompt, params)"])
def test_script_that_ends_in_the_middle_ends_in_silence(left_open: str) -> None:
    script = f"""
from minivllm import LLM, AsyncEngine, SamplingParams
llm = LLM("smollm2-135m", load_format="dummy", num_blocks=60, max_model_len=256, show_progress=False)
prompt, params = [1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)
results = iter({left_open})
next(results)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
