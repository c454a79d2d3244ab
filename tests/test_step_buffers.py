"""Step buffers hold what build_batches makes of the same plan, step after step, whoever comes, goes and grows."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.attention import ForwardBatch
from minivllm.attention.kernel_batch import KernelBatch, Keys
from minivllm.engine.plan import StepPlan
from minivllm.request import BlockTable, Request, SamplingParams
from minivllm.runner.batch import build_batches
from minivllm.runner.batch_rows import BatchRows, signed
from minivllm.runner.decode_graphs import batch_sizes
from minivllm.runner.host_words import aligned
from minivllm.runner.step_buffers import LoadedStep, StepBuffers, StepLimits, StepShape

SIZES = st.integers(0, 2**32).map(Random)


def some_request(random: Random, number: int, limits: StepLimits) -> Request:
    length = random.randint(1, limits.max_model_len)
    params = SamplingParams(temperature=random.choice((0, 0.5, 1)))
    seed = random.choice((0, -1, 2**63 - 1, 2**64 + 5))
    return Request(str(number), [random.randrange(1000) for _ in range(length)], length, params, 99, seed=seed)


def advance(random: Random, request: Request, limits: StepLimits, most_new: int) -> int:
    """Let a request grow its table for its next tokens; now and then a block is exchanged."""
    if request.num_computed == request.num_expected:
        request.token_ids.append(random.randrange(1000))
    num_new = random.randint(1, min(most_new, request.num_missing))
    table = request.tables[0].block_ids
    while len(table) * limits.block_size < request.num_computed + num_new:
        table.append(random.randrange(1, 5000))
    if random.random() < 0.2:
        table[random.randrange(len(table))] = random.randrange(5000)
    return num_new


def assert_same(found: KernelBatch, expected: ForwardBatch) -> None:
    token_ids = [token if token >= 0 else found.chosen.tolist()[-1 - token] for token in found.token_ids.tolist()]
    assert token_ids == expected.token_ids.tolist()
    for name in ("positions", "slots"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    parts = [found.singles] if found.chunks is None else [found.chunks, found.singles]
    num_chunks = len(expected.num_tokens) - len(found.singles)
    assert [keys for part in parts for keys in part.num_tokens.tolist()] == expected.num_tokens.tolist()
    starts = expected.query_starts.tolist()
    assert found.query_starts.tolist() == starts[: num_chunks + 1]
    assert all(end - start > 1 for start, end in pairwise(starts[: num_chunks + 1]))
    assert all(end - start == 1 for start, end in pairwise(starts[num_chunks:]))
    tables = [row for part in parts for row in part.block_table.tolist()]
    for table, row in zip(tables, expected.block_table.tolist(), strict=True):
        num_blocks = sum(block > 0 for block in row)
        assert table[:num_blocks] == row[:num_blocks]


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_buffers_equal_the_tensors_of_the_plain_way_once_promised_tokens_are_in(random: Random) -> None:
    limits = StepLimits(random.randint(1, 9), 512, random.randint(3, 50), random.choice((1, 3, 16)))
    chosen_ids = torch.zeros(limits.max_num_seqs, dtype=torch.int32)
    buffers, alive, before = StepBuffers(limits, "cpu", chosen_ids), list[Request](), list[Request]()
    for number in range(12):
        alive = [request for request in alive if random.random() < 0.8 and request.num_tokens < limits.max_model_len]
        alive += [
            some_request(random, number, limits) for _ in range(random.randint(0, limits.max_num_seqs - len(alive)))
        ]
        random.shuffle(alive)
        chosen = [request for request in alive if random.random() < 0.9]
        if not chosen:
            continue
        chosen_ids.random_(1000)
        for request in before:
            request.num_promised = int(request.num_computed == request.num_tokens and random.random() < 0.7)
        promised = [(request, chosen_ids[row].item()) for row, request in enumerate(before) if request.num_promised]
        most_new = random.choice((1, 1, 40))
        plan = StepPlan(number, [(r, advance(random, r, limits, most_new)) for r in chosen], [], [])
        is_single = all(num_new == 1 for _, num_new in plan.scheduled)
        padded = next(s for s in batch_sizes(limits.max_num_seqs) if s >= len(chosen)) if is_single else None
        requests = buffers.rows.seat(plan.scheduled)
        room = StepShape(*(random.choice((0, 0, random.randint(1, 20))) for _ in StepShape._fields))
        shape_of = partial(widened, room) if random.random() < 0.7 else None
        step = buffers.load(plan, None, shape_of) if padded is None else buffers.load_singles(requests, padded)
        num_new_of = dict(plan.scheduled)
        assert set(step.requests) == set(chosen) and len(step.requests) == len(chosen)
        assert step.num_new == [num_new_of[request] for request in step.requests]
        order = list(range(len(chosen)))
        if padded is None:
            order.sort(key=lambda row: step.num_new[row] == 1)
        before = list(requests)
        for request, token_id in promised:
            request.token_ids.append(int(token_id))
            request.num_promised = 0
        in_order = [(step.requests[row], step.num_new[row]) for row in order]
        [expected] = build_batches(StepPlan(number, in_order, [], []), limits.block_size, "cpu")
        if padded is None:
            found = without_room(buffers.ragged(step.shape, 40), step)
        else:
            found = without_padding(buffers.singles(padded), len(chosen))
        assert_same(found, expected)
        assert buffers.num_tokens.tolist()[: len(chosen)] == step.ends
        if padded is None:
            last = [buffers.last_tokens(step).tolist()[row] for row in order]
            moved = [own_places(step).index(place) for place in last]  # as if there were no padding
            assert moved == [start - 1 for start in expected.query_starts.tolist()[1:]]
            starts = [own_places(step).index(step.starts[row]) for row in order]
            assert starts == expected.query_starts.tolist()[:-1]
        assert buffers.temperatures.tolist()[: len(chosen)] == [r.params.temperature for r in step.requests]
        assert buffers.seeds.tolist()[: len(chosen)] == [signed(r.seed) for r in step.requests]
        for request, new in plan.scheduled:
            request.num_computed += new


def without_padding(batch: KernelBatch, num_requests: int) -> KernelBatch:
    """The batch itself; the rows behind it have no key, and neither a position nor a slot."""
    num_padded = len(batch.token_ids) - num_requests
    assert batch.positions[num_requests:].tolist() == batch.slots[num_requests:].tolist() == [-1] * num_padded
    assert (
        batch.token_ids[num_requests:].tolist() == batch.singles.num_tokens[num_requests:].tolist() == [0] * num_padded
    )
    parts = {name: getattr(batch, name)[:num_requests] for name in ("token_ids", "positions", "slots")}
    table, num_tokens = batch.singles.block_table, batch.singles.num_tokens
    return replace(batch, **parts, singles=Keys(table[:num_requests], num_tokens[:num_requests]))


def widened(room: StepShape, own: StepShape) -> StepShape:
    """A shape with padding behind the chunks, behind their tokens and behind the single ones."""
    return StepShape(*(size + more for size, more in zip(own, room, strict=True)))


def own_places(step: LoadedStep) -> list[int]:
    """Where the tokens of a padded step lie that are no padding."""
    chunk_tokens = sum(count for count in step.num_new if count > 1)
    first, num_singles = step.shape.chunk_tokens, step.num_new.count(1)
    return [*range(chunk_tokens), *range(first, first + num_singles)]


def without_room(batch: KernelBatch, step: LoadedStep) -> KernelBatch:
    """The batch itself; what pads it has no token, position, slot, query or key."""
    places, num_singles = own_places(step), step.num_new.count(1)
    num_chunks = len(step.num_new) - num_singles
    padding = [place for place in range(len(batch.token_ids)) if place not in places]
    assert [batch.token_ids[place].item() for place in padding] == [0] * len(padding)
    assert {batch.positions[place].item() for place in padding} | {batch.slots[p].item() for p in padding} <= {-1}
    parts = {name: getattr(batch, name)[places] for name in ("token_ids", "positions", "slots")}
    assert not batch.singles.num_tokens[num_singles:].any()
    singles = Keys(batch.singles.block_table[:num_singles], batch.singles.num_tokens[:num_singles])
    assert set(batch.query_starts[num_chunks:].tolist()) == {len(places) - num_singles}
    chunks = batch.chunks
    if chunks is not None:
        assert not chunks.num_tokens[num_chunks:].any()
        chunks = Keys(chunks.block_table[:num_chunks], chunks.num_tokens[:num_chunks]) if num_chunks else None
    return replace(batch, **parts, singles=singles, chunks=chunks, query_starts=batch.query_starts[: num_chunks + 1])


def test_more_changes_than_fit_go_as_a_whole_table() -> None:
    limits = StepLimits(3, 16, 200, 1)
    buffers = StepBuffers(limits, "cpu", torch.zeros(3, dtype=torch.int32))
    buffers._most_changes = 5
    requests = [Request(str(i), [7] * 150, 150, SamplingParams(), 1, num_computed=149) for i in range(3)]
    for request in requests:
        request.tables = [BlockTable([int(request.id) + 1] * 150)]
    buffers.load_singles(buffers.rows.seat([(request, 1) for request in requests]), 3)
    assert buffers.table[:, :150].tolist() == [[1] * 150, [2] * 150, [3] * 150]


def test_a_request_that_leaves_is_replaced_by_the_last_and_only_that_row_is_rewritten() -> None:
    rows = BatchRows(4, 8)
    requests = [Request(str(i), [7] * 6, 6, SamplingParams(), 1) for i in range(4)]
    for number, request in enumerate(requests):
        request.tables = [BlockTable([10 * number + 1, 10 * number + 2])]
    rows.seat([(request, 1) for request in requests])
    requests[2].tables[0].block_ids.append(23)
    rows.take_changes()
    rows.seat([(requests[i], 1) for i in (0, 2, 3)])
    assert [request.id for request in rows.requests] == ["0", "3", "2"]
    assert sorted(zip(*rows.take_changes(), strict=True)) == [(8, 31), (9, 32), (18, 23)]


def test_integers_are_aligned_as_kernels_are_compiled_for() -> None:
    assert aligned(1) == aligned(64) == 64 and aligned(65) == 128
    buffers = StepBuffers(StepLimits(5, 100, 40, 16), "cpu", torch.zeros(5, dtype=torch.int32))
    batch = buffers.singles(3)
    parts = (batch.token_ids, batch.positions, batch.slots, batch.singles.num_tokens, buffers.seeds)
    assert {(part.data_ptr() - buffers._words.data_ptr()) % 16 for part in parts} == {0}
    assert all(part.dtype == torch.int32 for part in parts[:-1])
