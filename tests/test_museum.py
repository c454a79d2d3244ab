"""The bug museum: each fault is caught by its own invariant in time; the engine as it is survives the same lives."""

import re
from collections.abc import Callable
from random import Random

import pytest

from minivllm.errors import ConfigError
from minivllm.lab.museum import MUSEUM, Fault, hunt, study, switched_on
from minivllm.lab.random_life import live_at_random


def originals(fault: Fault) -> list[object]:
    return [getattr(owner, attribute) for owner, attribute, _ in fault.patches]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MUSEUM)
def test_fault_is_caught_by_its_invariant_in_time(name: str, seed: int) -> None:
    caught = hunt(name, seed)
    assert caught is not None
    assert (caught.invariant, caught.message[: len(caught.invariant)]) == (MUSEUM[name].invariant,) * 2
    assert caught.step <= MUSEUM[name].within_steps


@pytest.mark.parametrize("name", MUSEUM)
def test_engine_as_it_is_survives_the_same_lives(name: str) -> None:
    seen = live_at_random(Random(0), min(MUSEUM[name].within_steps, 400), **MUSEUM[name].options)
    assert seen["steps"] >= min(MUSEUM[name].within_steps, 400)


def test_hunt_in_the_engine_as_it_is_finds_nothing() -> None:
    assert hunt(None, seed=3, most_steps=2_000) is None


@pytest.mark.parametrize("name", MUSEUM)
def test_switch_holds_for_the_block_and_leaves_nothing_behind(name: str) -> None:
    fault = MUSEUM[name]
    before = originals(fault)
    with pytest.raises(RuntimeError), switched_on(name) as switched:
        assert switched is fault
        assert originals(fault) == [mutant for _, _, mutant in fault.patches]
        raise RuntimeError
    assert originals(fault) == before


def test_hunt_leaves_nothing_behind() -> None:
    before = originals(MUSEUM["copy-on-write skipped"])
    assert hunt("copy-on-write skipped") is not None
    assert originals(MUSEUM["copy-on-write skipped"]) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hunt("xx"), "no fault is called 'xx'; there are: .*copy-on-write skipped"),
        (lambda: switched_on("xx").__enter__(), "no fault is called 'xx'; there are: .*copy-on-write skipped"),
        (lambda: hunt("salt forgotten", 0, 0), "most_steps must be at least 1, not 0"),
        (lambda: hunt(None, 0, -5), "most_steps must be at least 1, not -5"),
        (lambda: study(0), "num_seeds must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_hunted_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_museum_holds_faults_of_others_and_nearly_every_invariant() -> None:
    historical = [fault for fault in MUSEUM.values() if fault.source != "planted"]
    assert len(historical) >= 12 and len({fault.story for fault in MUSEUM.values()}) == len(MUSEUM)
    # What I13 finds when all is over, I1 finds in the step itself.
    expected = {f"I{number}" for number in range(1, 17)} - {"I13"}
    assert {fault.invariant for fault in MUSEUM.values()} == expected


def test_study_has_a_row_for_each_fault_and_one_for_the_engine_as_it_is() -> None:
    lines = study(num_seeds=1, most_steps=150).splitlines()
    assert len(lines) == 2 + len(MUSEUM) + 1
    for fault, line in zip(MUSEUM.values(), lines[2:], strict=False):
        assert line.startswith(fault.name) and fault.source in line
    assert re.search(r"as it is +nothing +150 lived through", lines[-1])
