"""The prefix cache gives nobody another's K and V, and with a salt not even away that there are any."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from minivllm import LLM
from minivllm.engine.prefix_cache import chain_hash, root_hash
from minivllm.errors import ConfigError
from minivllm.lab.security import WEAK_BITS, Attack, attack, collide, find_collision
from minivllm.outputs import RequestOutput

Build = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="module")
def llm(reference_model: Build) -> LLM:
    folder, _ = reference_model("llama-gqa")
    return LLM(folder, dtype="float32", block_size=8, num_blocks=60, max_model_len=200)


def num_computed(output: RequestOutput) -> float:
    """A clock that no busy machine disturbs: prompt tokens that had to be computed."""
    return len(output.prompt_token_ids) - output.num_cached_tokens


def test_the_two_blocks_differ_and_their_hashes_do_not() -> None:
    one, other, num_tried = find_collision(block_size=8, vocab_size=320)
    hashes = {chain_hash(root_hash(""), tokens) % 2**WEAK_BITS for tokens in (one, other)}
    assert one != other and len(hashes) == 1
    assert 10 < num_tried < 1000  # about sqrt(pi / 2 * 4096) = 80: a birthday, not a scan


@pytest.mark.parametrize("seed", range(3))
def test_token_check_stops_a_collision_that_works_without_it(llm: LLM, seed: int) -> None:
    collision = collide(llm, seed)
    assert (collision.cached_with_check, collision.cached_without_check) == (0, 8)
    assert collision.answer_with_check == collision.answer
    assert collision.answer_without_check != collision.answer


def test_nothing_stays_switched_on(llm: LLM) -> None:
    collide(llm)
    tokens = list(range(17))
    llm.generate([tokens], use_tqdm=False)
    assert llm.generate([tokens], use_tqdm=False)[0].num_cached_tokens == 16


def test_timing_attack_succeeds_without_a_salt_and_fails_with_it(llm: LLM) -> None:
    plain, salted = (attack(llm, is_salted, 6, num_tokens=60, measure=num_computed) for is_salted in (False, True))
    assert (plain.auc, salted.auc) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"prefix_cache": "radix"}, "a radix tree"), ({"enable_prefix_caching": False}, "no prefix cache")],
)
def test_collision_needs_a_cache_of_hashes(reference_model: Build, options: dict[str, Any], kind: str) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = LLM(folder, dtype="float32", block_size=8, num_blocks=60, max_model_len=200, **options)
    with pytest.raises(ConfigError, match=f"collide attacks a cache of hashes, not {kind}; build"):
        collide(llm)


def test_attack_without_a_trial_or_a_prompt_is_refused(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="num_trials must be at least 1, not 0"):
        attack(llm, False, 0)
    with pytest.raises(ConfigError, match="num_tokens must be at least 1, not 0"):
        attack(llm, False, 1, num_tokens=0)


def test_auc_counts_pairs() -> None:
    assert Attack((1, 2), (2, 3)).auc == (1 + 1 + 0.5 + 1) / 4
