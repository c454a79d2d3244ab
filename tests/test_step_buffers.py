"""Step buffers hold what build_batches makes of the same plan, step after step, whoever comes, goes and grows."""

from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.attention import ForwardBatch
from minivllm.engine.plan import StepPlan
from minivllm.request import BlockTable, Request, SamplingParams
from minivllm.runner.batch import build_batches
from minivllm.runner.batch_rows import BatchRows, signed
from minivllm.runner.decode_graphs import batch_sizes
from minivllm.runner.step_buffers import StepBuffers, StepLimits, aligned

SIZES = st.integers(0, 2**32).map(Random)


def some_request(random: Random, number: int, limits: StepLimits) -> Request:
    length = random.randint(1, limits.max_model_len)
    params = SamplingParams(temperature=random.choice((0, 0.5, 1)))
    seed = random.choice((0, -1, 2**63 - 1, 2**64 + 5))
    return Request(str(number), [random.randrange(1000) for _ in range(length)], length, params, 1, seed=seed)


def advance(random: Random, request: Request, limits: StepLimits, most_new: int) -> int:
    """Let a request grow its table for its next tokens; now and then a block is exchanged."""
    if request.num_computed == request.num_tokens:
        request.token_ids.append(random.randrange(1000))
    num_new = random.randint(1, min(most_new, request.num_tokens - request.num_computed))
    table = request.tables[0].block_ids
    while len(table) * limits.block_size < request.num_computed + num_new:
        table.append(random.randrange(1, 5000))
    if random.random() < 0.2:
        table[random.randrange(len(table))] = random.randrange(5000)
    return num_new


def assert_same(found: ForwardBatch, expected: ForwardBatch, num_requests: int) -> None:
    for name in ("token_ids", "positions", "slots"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert found.num_tokens.tolist()[:num_requests] == expected.num_tokens.tolist()
    assert found.num_tokens.tolist()[num_requests:] == [0] * (len(found.num_tokens) - num_requests)
    starts = expected.query_starts.tolist()
    assert found.query_starts.tolist() == starts + starts[-1:] * (len(found.query_starts) - len(starts))
    assert found.logit_rows.tolist() == [start - 1 for start in starts[1:]]
    for row, table in enumerate(expected.block_table.tolist()):
        num_blocks = sum(block > 0 for block in table)
        assert found.block_table[row, :num_blocks].tolist() == table[:num_blocks]


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_buffers_equal_the_tensors_of_the_plain_way(random: Random) -> None:
    limits = StepLimits(random.randint(1, 9), 512, random.randint(3, 50), random.choice((1, 3, 16)))
    buffers, alive = StepBuffers(limits, "cpu"), list[Request]()
    for number in range(12):
        alive = [request for request in alive if random.random() < 0.8 and request.num_tokens < limits.max_model_len]
        alive += [
            some_request(random, number, limits) for _ in range(random.randint(0, limits.max_num_seqs - len(alive)))
        ]
        random.shuffle(alive)
        chosen = [request for request in alive if random.random() < 0.9]
        if not chosen:
            continue
        most_new = random.choice((1, 1, 40))
        plan = StepPlan(number, [(r, advance(random, r, limits, most_new)) for r in chosen], [], [])
        is_single = all(num_new == 1 for _, num_new in plan.scheduled)
        padded = next(s for s in batch_sizes(limits.max_num_seqs) if s >= len(chosen)) if is_single else None
        step = buffers.load(plan, padded)
        num_new_of = dict(plan.scheduled)
        assert set(step.requests) == set(chosen) and len(step.requests) == len(chosen)
        assert step.num_new == [num_new_of[request] for request in step.requests]
        in_rows = StepPlan(number, [(request, num_new_of[request]) for request in step.requests], [], [])
        [expected] = build_batches(in_rows, limits.block_size, "cpu")
        if padded is None:
            assert_same(buffers.ragged(step), expected, len(chosen))
        else:
            check_padding(buffers.singles(padded), expected, len(chosen))
        assert buffers.temperatures.tolist()[: len(chosen)] == [r.params.temperature for r in step.requests]
        assert buffers.seeds.tolist()[: len(chosen)] == [signed(r.seed) for r in step.requests]
        for request, new in plan.scheduled:
            request.num_computed += new


def check_padding(found: ForwardBatch, expected: ForwardBatch, num_requests: int) -> None:
    """The rows behind the batch have no key, and neither a position nor a slot."""
    assert found.positions[num_requests:].tolist() == found.slots[num_requests:].tolist()
    assert set(found.positions[num_requests:].tolist()) <= {-1}
    assert found.token_ids[num_requests:].tolist() == [0] * (len(found.token_ids) - num_requests)
    parts = {name: getattr(found, name)[:num_requests] for name in ("token_ids", "positions", "slots", "logit_rows")}
    starts = found.query_starts
    assert_same(ForwardBatch(**parts, block_table=found.block_table, query_starts=starts, num_tokens=found.num_tokens),
                expected, num_requests)  # fmt: skip


def test_more_changes_than_fit_go_as_a_whole_table() -> None:
    limits = StepLimits(3, 16, 200, 1)
    buffers = StepBuffers(limits, "cpu")
    buffers._most_changes = 5
    requests = [Request(str(i), [7] * 150, 150, SamplingParams(), 1, num_computed=149) for i in range(3)]
    for request in requests:
        request.tables = [BlockTable([int(request.id) + 1] * 150)]
    buffers.load(StepPlan(1, [(request, 1) for request in requests], [], []), 3)
    assert buffers.table[:, :150].tolist() == [[1] * 150, [2] * 150, [3] * 150]


def test_a_request_that_leaves_is_replaced_by_the_last_and_only_that_row_is_rewritten() -> None:
    rows = BatchRows(4, 8)
    requests = [Request(str(i), [7] * 6, 6, SamplingParams(), 1) for i in range(4)]
    for number, request in enumerate(requests):
        request.tables = [BlockTable([10 * number + 1, 10 * number + 2])]
    rows.seat([(request, 1) for request in requests])
    requests[2].tables[0].block_ids.append(23)
    places, block_ids = rows.seat([(requests[i], 1) for i in (0, 2, 3)])
    assert [request.id for request in rows.requests] == ["0", "3", "2"]
    assert sorted(zip(places, block_ids, strict=True)) == [(8, 31), (9, 32), (18, 23)]


def test_integers_are_aligned_as_kernels_are_compiled_for() -> None:
    assert aligned(1) == aligned(64) == 64 and aligned(65) == 128
    buffers = StepBuffers(StepLimits(5, 100, 40, 16), "cpu")
    batch = buffers.singles(3)
    parts = (batch.token_ids, batch.positions, batch.slots, batch.num_tokens, batch.query_starts, buffers.seeds)
    assert {(part.data_ptr() - buffers._words.data_ptr()) % 16 for part in parts} == {0}
    assert all(part.dtype == torch.int32 for part in parts[:-1])
