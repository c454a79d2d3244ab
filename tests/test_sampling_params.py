"""SamplingParams refuses what it cannot mean, in one line that names the field."""

import math

import numpy as np
import pytest

from minivllm import SamplingParams
from minivllm.errors import ConfigError, MiniVLLMError

REALS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
WHOLES = ("n", "top_k", "min_tokens", "seed", "max_tokens", "logprobs", "prompt_logprobs")
FLAGS = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")


def refusal(**fields: object) -> str:
    """The one line that these fields are refused with."""
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**fields)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text and len(text) < 200
    return text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1", None, True, [1], 1j, np.ones((2, 2))])
@pytest.mark.parametrize("name", REALS)
def test_a_real_field_takes_finite_numbers_only(name: str, value: object) -> None:
    assert name in refusal(**{name: value})


@pytest.mark.parametrize("value", [1.0, math.nan, "1", True, [1], np.ones((2, 2))])
@pytest.mark.parametrize("name", WHOLES)
def test_a_whole_field_takes_integers_only(name: str, value: object) -> None:
    assert name in refusal(**{name: value})


@pytest.mark.parametrize("name", [name for name in WHOLES if name not in OPTIONAL])
def test_only_optional_fields_take_none(name: str) -> None:
    assert name in refusal(**{name: None})


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_true_or_false(name: str, value: object) -> None:
    assert name in refusal(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", -1), ("presence_penalty", -2.01), ("presence_penalty", 2.01), ("frequency_penalty", -2.01),
        ("frequency_penalty", 2.01), ("repetition_penalty", 0.0), ("repetition_penalty", -1), ("temperature", -0.01),
        ("top_p", 0), ("top_p", 1.01), ("top_p", -0.1), ("top_k", -2), ("min_p", -0.01), ("min_p", 1.01),
        ("seed", -(2**63) - 1), ("max_tokens", 0), ("min_tokens", -1), ("logprobs", -1), ("prompt_logprobs", -1),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(name: str, value: float) -> None:
    assert name in refusal(**{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0}, {"temperature": 1000.0}, {"top_p": 1}, {"top_p": 1e-9}, {"top_k": -1}, {"top_k": 0},
        {"top_k": 10**9}, {"min_p": 0}, {"min_p": 1.0}, {"seed": 0}, {"seed": -(2**63)}, {"max_tokens": None},
        {"logprobs": 0}, {"prompt_logprobs": 0}, {"presence_penalty": -2}, {"frequency_penalty": 2},
        {"repetition_penalty": 0.01}, {"min_tokens": 16}, {"n": 5}, {"stop": "x"}, {"stop": ["x", "yy"]}, {"stop": []},
        {"stop": ("x",)}, {"stop_token_ids": []}, {"stop_token_ids": (0, 7)},
    ],
)  # fmt: skip
def test_the_ends_of_each_range_are_accepted(fields: dict[str, object]) -> None:
    SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [1], b"x", 5, {"a"}, [None], [["a"]], True])
def test_stop_is_a_string_or_a_list_of_them(stop: object) -> None:
    assert "stop must be" in refusal(stop=stop)


@pytest.mark.parametrize("token_ids", [5, "ab", [True], [-1], [1.0], [None], ["a"], {1: 2}])
def test_stop_token_ids_is_a_list_of_token_ids(token_ids: object) -> None:
    assert "stop_token_ids" in refusal(stop_token_ids=token_ids)


def test_fields_that_contradict_each_other_are_refused() -> None:
    assert "max_tokens (3)" in refusal(min_tokens=4, max_tokens=3)
    assert "n must be 1" in refusal(n=2, temperature=0)
    assert "detokenize" in refusal(stop="x", detokenize=False)


def test_a_refusal_is_a_value_error_and_of_our_family() -> None:
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, MiniVLLMError)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert (params.min_p, params.repetition_penalty, params.logprobs, params.detokenize) == (0.0, 1.0, None, True)


def test_a_billion_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="n must be at most 16384"):
        SamplingParams(n=10**9)
