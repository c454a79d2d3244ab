"""The room: one deck for all allocators, the published bars from a short run, edge case 3, and the same answers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev

import pytest

from minivllm import LLM, SamplingParams
from minivllm.course.calculators import contiguous_requests, tail_waste
from minivllm.course.memory_use import average, memory_over_time, saturated
from minivllm.engine.engine import Engine
from minivllm.errors import ConfigError
from minivllm.events import Added, Preempted, StepRan
from minivllm.lab import allocator_room
from minivllm.lab.allocator_room import ALL, FOUR, NUM_TOKENS, answer, deal, play_room, serve, short_waits
from minivllm.lab.allocator_study import COUNT_TOLERANCE, FIGURE_2, FIGURE_13, NUM_SLOTS, PARTS, TOLERANCE
from minivllm.trace import Trace
from minivllm.workload_shapes import ALPACA, SHAREGPT

Reference = Callable[[str], tuple[Path, object]]
SIZES = {"max_model_len": 512, "block_size": 16, "num_slots": NUM_SLOTS}


@pytest.fixture(scope="module")
def room() -> dict[str, Trace]:
    return play_room(allocators=ALL)


def at_once(trace: Trace) -> float:
    return average(saturated(memory_over_time(trace))).num_requests


@pytest.mark.parametrize(("lengths", "shape"), [("sharegpt", SHAREGPT), ("alpaca", ALPACA)])
def test_a_deck_has_the_published_means_and_a_long_tail(
    lengths: str, shape: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    prompts, outputs = zip(*deal(lengths), strict=True)
    assert mean(prompts) == pytest.approx(shape[0][0], rel=0.02)
    assert mean(outputs) == pytest.approx(shape[1][0], rel=0.02)
    assert max(outputs) > 4 * mean(outputs) and min(prompts) >= 1
    assert max(map(sum, deal(lengths))) <= 2048


def test_outputs_last_as_long_as_figure_2_implies() -> None:
    # Reserved slots of Orca (Max), 2 * 13.3 / 91.1 * 2048: the mean of output**2 over the mean of output.
    outputs = [output for _, output in deal("sharegpt")]
    assert sum(n * n for n in outputs) / sum(outputs) == pytest.approx(2 * 13.3 / 91.1 * 2048, rel=0.03)


def test_spread_shrinks_every_length_towards_the_mean() -> None:
    whole, half, none = (deal("sharegpt", spread) for spread in (1.0, 0.5, 0.0))
    assert len(set(none)) == 1 and none[0] == (162, 335)
    for side in (0, 1):
        lengths, halved = ([pair[side] for pair in deck] for deck in (whole, half))
        assert mean(halved) == pytest.approx(mean(lengths), abs=0.5)
        assert pstdev(halved) == pytest.approx(pstdev(lengths) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("chats",), "lengths must be one of sharegpt, alpaca"), (("sharegpt", 1.5), "spread must be from 0"),
     (("sharegpt", 0.0, 256), "requests of 497 tokens do not fit max_model_len 256; raise it")],
)  # fmt: skip
def test_what_cannot_be_dealt_gets_one_line(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        deal(*arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_everybody_gets_the_same_requests_in_the_same_order(room: dict[str, Trace]) -> None:
    asked = [[(e.num_prompt, e.max_tokens) for e in trace.events if isinstance(e, Added)] for trace in room.values()]
    shared = min(map(len, asked))
    assert shared > 80 and all(row[:shared] == asked[0][:shared] for row in asked)
    assert not Counter(asked[0][:128]) - Counter(deal("sharegpt")), "a card comes once in each round"


def test_runs_end_when_as_many_tokens_are_written(room: dict[str, Trace]) -> None:
    for trace in room.values():
        ran = [event for event in trace.events if isinstance(event, StepRan)]
        written = sum(len(tokens) for event in ran for _, tokens in event.new_tokens)
        assert NUM_TOKENS <= written < NUM_TOKENS + ran[-1].num_running + 16


@pytest.mark.parametrize("allocator", FOUR)
def test_the_published_bars_come_out_of_a_short_run(room: dict[str, Trace], allocator: str) -> None:
    shares = average(saturated(memory_over_time(room[allocator])))
    for part, published in zip(PARTS, FIGURE_2[allocator], strict=True):
        assert published is None or abs(getattr(shares, part) - published) <= TOLERANCE, part
    assert allocator == "paged" or shares.num_requests == pytest.approx(
        FIGURE_13["ShareGPT"][allocator], rel=COUNT_TOLERANCE / 100
    )


def test_contiguous_systems_waste_most_of_the_pool_and_paging_next_to_nothing(room: dict[str, Trace]) -> None:
    held_empty = {}
    for allocator, trace in room.items():
        shares = average(saturated(memory_over_time(trace)))
        assert (shares.live < 55) == (allocator != "paged")
        held_empty[allocator] = 100 * (shares.reserved + shares.internal) / (100 - shares.external)
    assert held_empty["paged"] < 4 < 39 < min(held_empty[name] for name in ALL[:-1])
    assert at_once(room["contiguous"]) == int(contiguous_requests(NUM_SLOTS, 2048)) == 7


@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_paged_tails_stay_below_a_block_at_every_step_and_at_the_formula_on_average(block_size: int) -> None:
    trace = play_room(block_size=block_size, allocators=("paged",))["paged"]
    uses = memory_over_time(trace)
    assert all(use.reserved + use.internal <= use.num_requests * (block_size - 1) for use in uses)
    shares = average(saturated(uses))
    empty = 100 * (1 - shares.live / (100 - shares.external))
    assert empty == pytest.approx(float(tail_waste(shares.live_slots_per_request, block_size)), abs=0.8)


def test_a_full_pool_preempts_only_where_nothing_was_reserved(room: dict[str, Trace]) -> None:
    preempts = {name for name, trace in room.items() if trace.of(Preempted)}
    assert preempts == {"paged"}


def test_free_blocks_of_a_paged_run_are_external_where_they_are_too_few_for_the_next_request() -> None:
    deck = [(4 + i % 9, 4 + 7 * i % 29) for i in range(40)]
    trace = serve("paged", deck, max_model_len=48, block_size=4, num_slots=192, num_tokens=300)
    waits = short_waits(trace)
    idle = {use.step: use.external for use in memory_over_time(trace) if use.external}
    assert {wait.step: wait.free for wait in waits} == idle and len(idle) == 14
    assert all(wait.need > wait.free == wait.largest_hole for wait in waits)
    prompts = {event.request_id: event.num_prompt for event in trace if isinstance(event, Added)}
    assert all(wait.need % 4 == 0 and wait.need >= prompts[wait.request_id] for wait in waits)
    assert any(wait.need > prompts[wait.request_id] + 4 for wait in waits)  # it had written before it was preempted
    assert short_waits(serve("paged", ((4, 4),), max_model_len=8, block_size=4, num_slots=192, num_tokens=4)) == []


def test_gap_closes_as_the_lengths_become_equal() -> None:
    gaps = []
    for spread in (1.0, 0.5, 0.0):
        deck = deal("sharegpt", spread)
        sizes = {**SIZES, "max_model_len": max(map(sum, deck))}
        fit, paged = (at_once(serve(name, deck, num_tokens=NUM_TOKENS, **sizes)) for name in ("contiguous", "paged"))
        gaps.append(paged / fit)
    assert gaps[0] > 4 and gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1.6


@pytest.mark.parametrize(("prompt", "output"), [(162, 335), (480, 20), (300, 200)])
def test_equal_lengths_leave_only_the_early_reservation(prompt: int, output: int) -> None:
    # Contiguous holds 512 from the first step; paged holds the prompt, half of the output on average, and a tail.
    fit, paged = (
        at_once(serve(name, ((prompt, output),), num_tokens=NUM_TOKENS, **SIZES)) for name in ("contiguous", "paged")
    )
    assert fit == NUM_SLOTS // 512 == 30
    assert paged / fit == pytest.approx(512 / (prompt + output / 2 + 7.5), rel=0.08)


def test_internal_waste_of_equal_requests_is_the_broken_promise_and_nothing_else() -> None:
    trace = serve("contiguous", ((100, 29),), max_model_len=256, block_size=16, num_slots=1600, num_tokens=200)
    assert {use.internal for use in memory_over_time(trace)} == {6 * (256 - 128)}  # 6 fit; 128 are ever stored


def test_quiet_engine_plays_what_the_engine_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = play_room(num_tokens=600, allocators=("buddy", "paged"))
    monkeypatch.setattr(allocator_room, "QuietEngine", Engine)
    for name, trace in play_room(num_tokens=600, allocators=("buddy", "paged")).items():
        told, said = ([e for e in t.events if not isinstance(e, StepRan)] for t in (trace, quiet[name]))
        assert told == said and trace.last_step == quiet[name].last_step
        assert trace.state_hashes()[0] and not quiet[name].state_hashes()[0]


def test_greedy_tokens_are_the_same_under_every_allocator_and_the_blocks_are_not(reference_model: Reference) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = LLM(str(folder), dtype="float32", block_size=4, num_blocks=25, max_model_len=32, show_progress=False)
    llm.tokenizer = Letters()  # type: ignore[assignment]  # the small random models have none
    prompts = ["abcde", "a longer prompt", "xyz", "pqrstuv"]
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    own = llm.generate([Letters().encode(prompt) for prompt in prompts], greedy, use_tqdm=False)
    told = {name: answer(llm, name, prompts, max_tokens=9) for name in ALL}
    assert {answers.tokens for answers in told.values()} == {tuple(tuple(o.outputs[0].token_ids) for o in own)}
    assert told["contiguous"].most_at_once == 3 and told["paged"].most_at_once == 4
    assert told["contiguous"].num_steps > told["paged"].num_steps == 9
    for name in ALL[:-1]:
        assert all(table == tuple(range(table[0], table[0] + len(table))) for table in told[name].tables)
    assert any(table != tuple(range(table[0], table[0] + len(table))) for table in told["paged"].tables)
    assert llm.engine.kv.pool.num_free == llm.engine.kv.pool.num_usable


def test_a_busy_llm_is_left_alone(reference_model: Reference) -> None:
    folder, _ = reference_model("llama-gqa")
    llm = LLM(str(folder), dtype="float32", block_size=4, num_blocks=25, max_model_len=32, show_progress=False)
    llm.text_engine.add(llm.text_engine.check([1, 2, 3]), SamplingParams(max_tokens=4))
    with pytest.raises(ConfigError, match="still serves requests or holds pins; wait until it is idle"):
        answer(llm, "paged", ["abc"], max_tokens=2)


class Letters:
    """A token for each letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]
