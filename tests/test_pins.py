"""Pinned prefixes: no pressure evicts them, and they cannot take the whole pool."""

import pytest

from minivllm.engine.engine import Engine
from minivllm.errors import RequestError
from minivllm.lab.fake_runner import fake_engine, fake_request
from minivllm.lab.invariants import check_drained, check_invariants


def run(engine: Engine, prompt: range | list[int]) -> int:
    """Run one prompt to its end; how many of its tokens were cached."""
    request = fake_request("probe", prompt, max_tokens=1)
    engine.add(request)
    while engine.has_work:
        engine.step()
        check_invariants(engine)
    return request.num_cached


@pytest.mark.parametrize("prefix_cache", ["hash", "radix"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "priority"])
def test_pinned_prefix_survives_what_evicts_all_else(prefix_cache: str, policy: str) -> None:
    found = []
    for is_pinned in (True, False):
        engine, _ = fake_engine(num_blocks=9, max_model_len=20, prefix_cache=prefix_cache, eviction_policy=policy)
        run(engine, range(9))
        if is_pinned:
            assert engine.pins.pin("system", range(9)) == 8
        for number in range(10):
            run(engine, [50 + number] * 17)
        found.append(run(engine, range(9)) == 8)
        if is_pinned:
            engine.pins.unpin("system")
        check_drained(engine)
    assert found[0] and (not found[1] or policy in ("lfu", "slru"))  # what was hit often survives by itself


def test_pin_takes_no_block_that_holds_other_tokens() -> None:
    engine, _ = fake_engine(num_blocks=21, prefix_cache="radix")
    run(engine, range(12))
    assert engine.pins.pin("a", [0, 1, 2, 3, 4, 5, 99, 99, 99]) == 4  # two tokens of the second block are known


def test_pinned_blocks_count_an_owner() -> None:
    engine, _ = fake_engine(num_blocks=21)
    run(engine, range(9))
    engine.pins.pin("a", range(9))
    engine.pins.pin("b", range(9))
    assert sorted(block.ref_count for block in engine.kv.pool.blocks)[-2:] == [2, 2]
    engine.pins.unpin("a")
    check_invariants(engine)


def test_wrong_pins_get_one_line_and_change_nothing() -> None:
    engine, _ = fake_engine(num_blocks=7, max_model_len=20)
    run(engine, range(18))
    before = engine.state_hash()
    for name, tokens, word in (("a", [1, 2, 3], "no full block"), ("a", range(18), "would never fit")):
        with pytest.raises(RequestError, match=rf"^pin 'a'[^\n]*{word}[^\n]*$"):
            engine.pins.pin(name, list(tokens))
    with pytest.raises(RequestError, match=r"^unpin 'b'[^\n]*nothing is pinned[^\n]*$"):
        engine.pins.unpin("b")
    assert engine.state_hash() == before


def test_pins_keep_to_their_namespace() -> None:
    engine, _ = fake_engine(num_blocks=21)
    run(engine, range(9))
    with pytest.raises(RequestError, match="no full block"):
        engine.pins.pin("a", range(9), salt="other")
