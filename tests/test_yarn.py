"""YaRN: frequencies and temperatures are transformers', and those that DeepSeek publishes."""

import math
from random import Random
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minivllm.config import ModelConfig, RopeConfig
from minivllm.errors import ModelError
from minivllm.models.layers import inverse_frequencies
from minivllm.weights import builtin_configs

DEEPSEEK_V3 = {  # rope_scaling of its config.json
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def judged(head_size: int, longest: int, rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """What transformers makes of it."""
    config = LlamaConfig(head_dim=head_size, max_position_embeddings=longest, rope_parameters=dict(rope))
    frequencies, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
    return frequencies, magnitude


def random_rope(random: Random) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "yarn", "rope_theta": random.choice([500.0, 10000.0, 1e6])}
    rope |= {
        "factor": random.choice([1.0, 1.5, 4.0, 40.0]),
        "original_max_position_embeddings": random.choice([32, 4096]),
    }
    options = {"beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.707, "mscale_all_dim": 0.9, "attention_factor": 1.3}
    rope |= {name: value for name, value in options.items() if random.random() < 0.4}
    return rope | ({"truncate": False} if random.random() < 0.3 else {})


@pytest.mark.parametrize("seed", range(40))
def test_frequencies_and_magnitude_are_those_of_transformers(seed: int) -> None:
    random = Random(seed)
    rope, head_size = random_rope(random), random.choice([8, 10, 64, 128])
    expected, magnitude = judged(head_size, 8192, rope)
    config = RopeConfig.from_json({"max_position_embeddings": 8192, "rope_parameters": rope})
    torch.testing.assert_close(inverse_frequencies(config, head_size), expected, rtol=1e-6, atol=0)
    assert math.isclose(config.magnitude, magnitude, rel_tol=1e-12)


def test_original_length_left_out_is_the_longest_position() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    expected, _ = judged(64, 2048, rope)
    config = RopeConfig.from_json({"max_position_embeddings": 2048, "rope_parameters": rope})
    torch.testing.assert_close(inverse_frequencies(config, 64), expected, rtol=1e-6, atol=0)


def test_factor_left_out_is_longest_over_original_length() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}
    assert RopeConfig.from_json({"max_position_embeddings": 163840, "rope_parameters": rope}).factor == 40


def test_pairs_that_turn_fast_stay_and_those_that_turn_slowly_are_slowed_by_the_factor() -> None:
    plain, yarn = RopeConfig(), RopeConfig(kind="yarn", factor=40, original_max_position=4096)
    ratio = inverse_frequencies(plain, 64) / inverse_frequencies(yarn, 64)
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 40.0))
    assert ratio[11:23].diff().gt(0).all()


def test_temperature_of_deepseek_v2_lite_is_in_the_softmax_and_not_in_the_angles() -> None:
    config = ModelConfig.from_json(builtin_configs()["deepseek-v2-lite"])
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert config.rope.magnitude == 1
    assert math.isclose(config.softmax_scale, mscale**2 / math.sqrt(192), rel_tol=1e-12)


def test_only_deepseek_scales_its_softmax() -> None:
    llama = builtin_configs()["llama-2-7b"] | {"rope_scaling": DEEPSEEK_V3}
    assert ModelConfig.from_json(llama).softmax_scale == 128**-0.5


def test_old_and_new_spelling_are_the_same() -> None:
    old = {"rope_theta": 50000.0, "max_position_embeddings": 163840, "rope_scaling": DEEPSEEK_V3}
    new = DeepseekV3Config(max_position_embeddings=163840, rope_theta=50000.0, rope_scaling=dict(DEEPSEEK_V3)).to_dict()
    assert RopeConfig.from_json(old) == RopeConfig.from_json(new)


@pytest.mark.parametrize(
    ("rope", "line"),
    [
        ({"rope_type": "dynamic"}, "rope type 'dynamic' is not supported; use default, linear, llama3, yarn"),
        ({"rope_type": "yarn", "factor": 0}, "rope factor must be above 0"),
        ({"rope_type": "yarn", "factor": "many"}, "factor must be a number, not 'many'"),
        ({"rope_type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 32}, "beta_fast 1.0 must not be below"),
        ({"rope_type": "yarn", "factor": 4, "rope_theta": 1.0}, "theta must be above 1"),
        ({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": -1}, "original_max_position must be"),
        ({"rope_type": "yarn", "factor": float("inf")}, "factor must be a finite number, not inf"),
        ({"rope_type": "yarn", "original_max_position_embeddings": float("nan")}, "embeddings must be a finite number"),
        ({"full_attention": {"rope_type": "default"}}, "rope_parameters that differ between kinds of layers"),
        ({"rope_type": "yarn", "factor": 4, "attention_factor": 0}, "attention_factor must be above 0"),
        ("yarn", "rope_parameters must be an object"),
        ({"rope_type": "yarn", "factor": 4, "partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1.0"),
    ],
)
def test_rope_that_cannot_be_is_one_line(rope: object, line: str) -> None:
    with pytest.raises(ModelError, match=line) as error:
        RopeConfig.from_json({"rope_parameters": rope})
    assert "\n" not in str(error.value)
