"""The environment card: each way of computing in the words of exercise 00.4, the pool, and what a live engine says."""

import json

import pytest

from minivllm import LLM
from minivllm.course.exercises import find
from minivllm.course.exercises.exercise import Problem, draw
from minivllm.course.exercises.nb00 import DESCRIBED, MODES
from minivllm.errors import ConfigError, MiniVLLMError
from minivllm.lab import environment as lab
from minivllm.views.environment_card import EnvironmentCard, mode_of, pool_of, words_of
from minivllm.views.sketch import Box

SPECIMEN = {
    "model": "smollm2-135m", "dtype": "float32", "device": "cpu", "attention": "torch", "num_blocks": 91,
    "block_size": 16, "kv_bytes_per_token": 46_080, "max_model_len": 512, "group_windows": (None,), "live": "live",
    "gpu": "", "triton": False, "interpreter": False, "machine": "a laptop", "commit": "abc",
}  # fmt: skip
RECORDED = {**SPECIMEN, "live": "recorded", "device": "cuda"}
WAYS = {
    "live on a GPU": {**SPECIMEN, "device": "cuda", "attention": lab.COMPILED, "gpu": "a GPU", "triton": True},
    "torch on the CPU": SPECIMEN,
    "Triton kernel, interpreted on the CPU": {**SPECIMEN, "attention": lab.INTERPRETED, "interpreter": True},
    "replay of a recorded run": RECORDED,
}


def boxes(view: EnvironmentCard) -> list[Box]:
    return [mark for mark in view.drawn()["marks"] if isinstance(mark, Box)]


@pytest.mark.parametrize("mode", WAYS)
def test_card_shows_the_mode_in_the_words_of_the_exercise(mode: str) -> None:
    view = EnvironmentCard({"one": WAYS[mode]})
    picture = view.drawn()
    assert picture["mode"] == mode and view.facts == {"mode": mode, "card": words_of(WAYS[mode])}
    assert words_of(WAYS[mode]) == DESCRIBED[mode] and mode in MODES
    filled = [box for box in boxes(view) if box.words == mode]
    assert len(filled) == 1 and filled[0].pattern == "solid"
    assert sum(box.pattern == "outline" for box in boxes(view) if box.words in MODES) == 3
    problem = draw(find("00.4"), "seed", view.facts)
    assert isinstance(problem, Problem) and problem.parts[0].answer == mode


def test_card_control_switches_between_live_and_recorded() -> None:
    view = EnvironmentCard({"this engine": SPECIMEN, "a recorded run": RECORDED})
    assert view.drawn()["title"].startswith("The CPU computes here, with torch; 67.1 MB of K and V hold 1,440 tokens")
    view.move("card", "a recorded run")
    assert view.drawn()["title"].startswith("Nothing is computed here: this run was recorded on cuda")
    assert "no tensors behind them" in view.drawn()["text"]
    view.move("unit", "binary")
    assert "64 MiB" in view.drawn()["title"]
    view.move("unit", "decimal")
    assert "67.1 MB" in view.drawn()["title"]


def test_a_recording_of_another_machine_is_a_replay_that_says_nothing_of_this_one() -> None:
    facts = lab.recorded_environment()
    assert facts["gpu"] == "NVIDIA H200" and facts["model"] == "qwen3-0.6b" and facts["live"] == "recorded"
    view = EnvironmentCard({"an H200": facts})
    picture = view.drawn()
    assert picture["title"] == "Nothing is computed here: this run was recorded on cuda, NVIDIA H200."
    assert view.facts == {"mode": "replay of a recorded run", "card": DESCRIBED["replay of a recorded run"]}
    assert "not here" not in picture["text"] and "not chosen" not in picture["text"] and picture["pool"] is None
    assert "torch: 2.11.0+cu130" in picture["text"] and view.image().width > 100
    cpu = lab.recorded_environment("forward_h200.json") | {"device": "cpu"}
    assert EnvironmentCard({"a CPU": cpu}).drawn()["title"].endswith("was recorded on cpu.")


def test_card_draws_the_longest_requests_that_fit() -> None:
    pool = EnvironmentCard({"one": SPECIMEN}).drawn()["pool"]
    assert pool is not None and pool.num_bytes == 91 * 16 * 46_080 and pool.concurrency == 1440 / 512
    requests = [box for box in boxes(EnvironmentCard({"one": SPECIMEN})) if box.words.startswith("request ")]
    assert len(requests) == 2
    many = {**SPECIMEN, "num_blocks": 9001, "max_model_len": 16}
    assert len([box for box in boxes(EnvironmentCard({"one": many})) if box.words.startswith("request ")]) == 64


def test_card_without_a_pool_or_with_groups_of_tables_says_so() -> None:
    assert pool_of({**SPECIMEN, "group_windows": (None, 512)}) is None
    kernel = EnvironmentCard({"kernel": {"live": "live", "device": "cpu", "attention": lab.INTERPRETED}}).drawn()
    assert kernel["pool"] is None and kernel["title"] == "Triton's interpreter computes here, on the CPU."


def test_card_says_what_the_other_ways_would_take() -> None:
    text = EnvironmentCard({"one": SPECIMEN}).drawn()["text"]
    assert "not here: no CUDA GPU" in text and "not here: no triton" in text and "Trace.load(path)" in text
    assert "needs TRITON_INTERPRET=1" in EnvironmentCard({"one": {**SPECIMEN, "triton": True}}).drawn()["text"]
    assert "LLM(device='cpu')" in EnvironmentCard({"one": WAYS["live on a GPU"]}).drawn()["text"]


def test_card_of_a_live_engine_is_that_engines() -> None:
    llm = LLM("smollm2-135m", load_format="dummy", device="cpu", num_blocks=41, max_model_len=256, show_progress=False)
    facts = lab.environment(llm)
    pool = pool_of(facts)
    assert pool is not None and pool.num_bytes == llm.storage.num_bytes == facts["pool_bytes"]
    assert pool.usable_tokens == llm.config.capacity_tokens == facts["usable_tokens"] == 640
    assert pool.concurrency == facts["max_concurrency"] == 2.5
    assert mode_of(facts) == "torch on the CPU" and mode_of(llm.trace_header()) == "replay of a recorded run"


def test_kernel_card_follows_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "machine", lambda: {"gpu": "", "triton": True, "interpreter": True})
    assert mode_of(lab.kernel_environment("cpu")) == "Triton kernel, interpreted on the CPU"
    monkeypatch.setattr(lab, "machine", lambda: {"gpu": "", "triton": True, "interpreter": False})
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        lab.kernel_environment("cpu")
    assert mode_of(lab.kernel_environment("cuda")) == "live on a GPU"
    monkeypatch.setattr(lab, "machine", lambda: {"gpu": "", "triton": False, "interpreter": False})
    with pytest.raises(ConfigError, match="need triton"):
        lab.kernel_environment("cuda")


def test_a_card_needs_facts() -> None:
    with pytest.raises(MiniVLLMError, match="at least one"):
        EnvironmentCard({})


@pytest.mark.parametrize(("control", "value"), [("card", "two"), ("unit", "bits"), ("x", 1)])
def test_controls_refuse_what_they_cannot_take(control: str, value: object) -> None:
    with pytest.raises(MiniVLLMError) as caught:
        EnvironmentCard({"one": SPECIMEN}).move(control, value)
    assert "\n" not in str(caught.value)


def test_twins_repeat_and_the_picture_is_plain_data() -> None:
    bundles = [EnvironmentCard({"one": SPECIMEN})._repr_mimebundle_()[0] for _ in range(2)]
    assert bundles[0]["image/png"] == bundles[1]["image/png"] and "1,440 tokens" in str(bundles[0]["text/plain"])
    assert json.loads(json.dumps(EnvironmentCard({"one": SPECIMEN}).drawn()))["marks"]
