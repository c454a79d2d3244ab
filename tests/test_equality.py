"""Cold equals warm: every way through the engine gives the same bits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from minivllm import LLM
from minivllm.engine.plan import Transfer
from minivllm.errors import ConfigError
from minivllm.lab import equality
from minivllm.lab.equality import WAYS, equality_matrix

Build = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama-gqa", "float32"), ("qwen3", "float32"), ("llama-gqa", "bfloat16")]
)
def test_every_pair_of_ways_agrees_in_every_bit(reference_model: Build, family: str, dtype: str) -> None:
    build = partial(LLM, reference_model(family)[0], dtype=dtype, batch_invariant=True)
    matrix = equality_matrix(build)
    assert len(matrix) == len(WAYS) ** 2 == 64
    assert {pair: found for pair, found in matrix.items() if found} == {}


def test_one_bit_of_kv_is_a_difference(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    build = partial(LLM, reference_model("llama-gqa")[0], dtype="float32", batch_invariant=True)

    def disturbed(**options: object) -> LLM:
        """An engine whose host memory is not quite exact."""
        llm = build(**options)  # type: ignore[arg-type]
        if options.get("preemption_mode") == "swap":
            move = llm.storage.move

            def move_badly(transfers: list[Transfer]) -> None:
                move(transfers)
                llm.storage.host[0, 0, 1:] += 1e-6

            monkeypatch.setattr(llm.storage, "move", move_badly)
        return llm

    matrix = equality_matrix(disturbed, ["cold", "swapped"])
    assert "KV" in matrix["cold", "swapped"]


def test_table_says_how_many_pairs_agree(reference_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "WAYS", {name: WAYS[name] for name in ("cold", "hit")})
    monkeypatch.setattr(equality, "equality_matrix", lambda build: equality_matrix(build, ("cold", "hit")))
    text = equality.study(str(reference_model("llama-gqa")[0]))
    assert text.splitlines()[0].split() == ["cold", "hit"]
    assert "4 of 4 pairs agree in every bit" in text


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_batch_invariant_is_a_switch(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^batch_invariant must be True or False, not [^\n]+$"):
        LLM("smollm2-135m", load_format="dummy", num_blocks=20, batch_invariant=value)  # type: ignore[arg-type]
