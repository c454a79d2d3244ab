"""The seed's helpers: its printed values, its faults gone, and every request served exactly its tokens."""

import inspect
from collections import Counter
from collections.abc import Callable
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivllm.course import seed63
from minivllm.course.seed63 import (
    Request,
    blocks_needed,
    contiguous_reservation_waste,
    continuous_batch_schedule,
    kv_bytes,
    paged_reserved_tokens,
)

REQUESTS = st.lists(st.integers(0, 12), max_size=12)


def named(prefix: str, lengths: list[int]) -> list[Request]:
    return [Request(f"{prefix}{i}", length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("kv_bytes", ["num_layers", "num_kv_heads", "head_dim", "seq_len", "bytes_per_value"]),
        ("contiguous_reservation_waste", ["reserved_tokens", "used_tokens"]),
        ("blocks_needed", ["seq_len", "block_size"]),
        ("paged_reserved_tokens", ["seq_len", "block_size"]),
        ("Request", ["request_id", "remaining_tokens"]),
        ("continuous_batch_schedule", ["initial_requests", "arriving_requests", "max_batch_size"]),
        ("demo", []),
    ],
)
def test_names_and_arguments_are_those_of_the_seed(name: str, arguments: list[str]) -> None:
    assert list(inspect.signature(getattr(seed63, name)).parameters) == arguments


def test_kv_bytes_of_the_seeds_example() -> None:
    assert kv_bytes(num_layers=32, num_kv_heads=8, head_dim=128, seq_len=4096) == 536_870_912
    assert seed63.BYTES_FP16 == 2


@pytest.mark.parametrize(
    ("layers", "kv_heads", "head_dim", "bytes_per_token"),
    [
        (80, 8, 128, 327_680),
        (80, 64, 128, 2_621_440),
        (40, 40, 128, 819_200),
        (32, 8, 128, 131_072),
        (22, 4, 64, 22_528),
    ],
    ids=["Llama-2-70B", "Llama-2-70B if it were MHA", "OPT-13B", "Llama-3-8B", "TinyLlama-1.1B"],
)
def test_kv_bytes_counts_kv_heads(layers: int, kv_heads: int, head_dim: int, bytes_per_token: int) -> None:
    assert kv_bytes(layers, kv_heads, head_dim, seq_len=1) == bytes_per_token
    assert kv_bytes(layers, kv_heads, head_dim, seq_len=1, bytes_per_value=1) == bytes_per_token // 2


def test_reserving_8192_and_using_3000_wastes_5192() -> None:
    assert contiguous_reservation_waste(reserved_tokens=8192, used_tokens=3000) == 5192
    assert contiguous_reservation_waste(reserved_tokens=10, used_tokens=11) == 0


@pytest.mark.parametrize(
    ("tokens", "blocks", "empty"), [(3001, 24, 71), (3000, 24, 72), (3072, 24, 0), (3073, 25, 127), (0, 0, 0)]
)
def test_blocks_of_128_and_their_empty_slots(tokens: int, blocks: int, empty: int) -> None:
    assert blocks_needed(seq_len=tokens, block_size=128) == blocks
    assert paged_reserved_tokens(seq_len=tokens, block_size=128) - tokens == empty


@given(st.integers(0, 10**6), st.integers(1, 4096))
def test_paging_wastes_less_than_one_block(tokens: int, block_size: int) -> None:
    assert 0 <= paged_reserved_tokens(tokens, block_size) - tokens < block_size


def test_schedule_of_the_seeds_example() -> None:
    initial, arriving = [Request("a", 3), Request("b", 1)], [Request("c", 2), Request("d", 1)]
    expected = [["a", "b"], ["a", "c"], ["a", "c"], ["d"]]
    assert continuous_batch_schedule(initial, arriving, max_batch_size=2) == expected


def test_every_initial_request_is_served_though_the_batch_is_smaller() -> None:
    """The original cut the list to max_batch_size: the third of three vanished without a word."""
    initial = [Request("a", 1), Request("b", 1), Request("c", 1)]
    assert continuous_batch_schedule(initial, [], max_batch_size=2) == [["a", "b"], ["c"]]


def test_initial_requests_that_do_not_fit_go_before_those_that_arrive() -> None:
    steps = continuous_batch_schedule(named("i", [1, 1]), named("a", [1]), max_batch_size=1)
    assert steps == [["i0"], ["i1"], ["a0"]]


def test_inputs_are_not_mutated_so_a_second_call_gives_the_same() -> None:
    """The original counted the caller's own requests down to 0."""
    initial, arriving = named("i", [3, 1, 2]), named("a", [2, 0])
    before = deepcopy((initial, arriving))
    first = continuous_batch_schedule(initial, arriving, max_batch_size=2)
    assert (initial, arriving) == before
    assert continuous_batch_schedule(initial, arriving, max_batch_size=2) == first


def test_a_request_without_tokens_takes_no_seat() -> None:
    """The original decoded one token for it."""
    assert continuous_batch_schedule([Request("a", 0), Request("b", 1)], [], max_batch_size=1) == [["b"]]


def test_one_object_given_twice_is_two_requests() -> None:
    """The original counted the shared object down twice a step."""
    request = Request("a", 2)
    assert continuous_batch_schedule([request, request], [], max_batch_size=2) == [["a", "a"], ["a", "a"]]


def test_a_batch_of_no_seats_is_refused() -> None:
    """The original never returned: it appended empty steps for ever."""
    with pytest.raises(ValueError, match="max_batch_size must be an integer of at least 1, not 0"):
        continuous_batch_schedule([], [Request("a", 1)], max_batch_size=0)


def test_continuous_batching_of_eight_requests_takes_500_steps_where_static_takes_750() -> None:
    lengths = [5, 500, 20, 300, 8, 40, 250, 10]
    num_static = max(lengths[:4]) + max(lengths[4:])
    steps = continuous_batch_schedule(named("r", lengths), [], max_batch_size=4)
    assert (num_static, len(steps)) == (750, 500)
    num_served = sum(map(len, steps))
    assert num_served == sum(lengths) == 1133
    assert num_served / (4 * num_static) == pytest.approx(0.378, abs=0.0005)  # of all seats, taken
    assert num_served / (4 * len(steps)) == pytest.approx(0.567, abs=0.000501)  # 0.5665 exactly, printed 56.7 %


@given(REQUESTS, REQUESTS, st.integers(1, 5))
def test_every_request_gets_exactly_its_tokens_in_order_and_no_seat_stays_empty(
    initial: list[int], arriving: list[int], max_batch_size: int
) -> None:
    requests = named("i", initial) + named("a", arriving)
    steps = continuous_batch_schedule(requests[: len(initial)], requests[len(initial) :], max_batch_size)
    served = Counter(name for step in steps for name in step)
    assert served == Counter({r.request_id: r.remaining_tokens for r in requests if r.remaining_tokens})
    assert all(0 < len(step) <= max_batch_size and len(set(step)) == len(step) for step in steps)
    firsts = list(dict.fromkeys(name for step in steps for name in step))
    assert firsts == [r.request_id for r in requests if r.remaining_tokens]  # first come, first served
    for k, step in enumerate(steps):  # a free seat means that nobody waits
        assert len(step) == max_batch_size or {name for later in steps[k:] for name in later} == set(step)
    for name in served:  # once in, a request runs without a gap
        at = [k for k, step in enumerate(steps) if name in step]
        assert at == list(range(at[0], at[-1] + 1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: blocks_needed(1, 0), "block_size must be an integer of at least 1, not 0"),
        (lambda: blocks_needed(-1, 16), "seq_len must be an integer of at least 0, not -1"),
        (lambda: paged_reserved_tokens(1, -16), "block_size must be"),
        (lambda: contiguous_reservation_waste(-1, 0), "reserved_tokens must be"),
        (lambda: kv_bytes(0, 8, 128, 1), "num_layers must be"),
        (lambda: kv_bytes(32, 8, 128, 1, bytes_per_value=0), "bytes_per_value must be"),
        (lambda: continuous_batch_schedule([Request("a", -1)], [], 1), "remaining_tokens must be"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_demo_prints_the_seeds_values(capsys: pytest.CaptureFixture[str]) -> None:
    seed63.demo()
    text = capsys.readouterr().out
    for value in ("536870912", "5192", "24 blocks", "3072 slots", "[['a', 'b'], ['a', 'c'], ['a', 'c'], ['d']]"):
        assert value in text
