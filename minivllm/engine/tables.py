"""Arithmetic of block tables: where a position lies, what a sliding window has passed, the order of all blocks held."""

from minivllm.engine.allocators import blocks_needed
from minivllm.engine.block_pool import NULL_BLOCK
from minivllm.request import BlockTable, Request


def slot_of(position: int, block_ids: list[int], block_size: int) -> int:
    """Where a position's K and V live: slot_of(37, [7, 1, 3], 16) == 3 * 16 + 5 == 53."""
    return block_ids[position // block_size] * block_size + position % block_size


def num_unseen(num_computed: int, window: int | None, block_size: int) -> int:
    """Leading blocks of which a query at `num_computed` sees nothing: num_unseen(40, 9, 16) == 2, of 0..31."""
    return 0 if window is None else max(0, num_computed - window + 1) // block_size


def held_ids(request: Request) -> list[int]:
    """The blocks of all tables, by position; for each position the first group's before the others'."""
    if len(request.tables) == 1:
        return request.tables[0].live_ids
    by_position = sorted(
        (index, group, block_id)
        for group, table in enumerate(request.tables)
        for index, block_id in enumerate(table.live_ids, start=table.num_dropped)
    )
    return [block_id for _, _, block_id in by_position]


def deal(request: Request, block_ids: list[int], block_size: int) -> list[BlockTable]:
    """Tables for the request's computed tokens from blocks in the order of `held_ids`."""
    tables = [BlockTable([NULL_BLOCK] * table.num_dropped, table.num_dropped) for table in request.tables]
    remaining = iter(block_ids)
    for index in range(blocks_needed(request.num_computed, block_size)):
        for table in tables:
            if index >= table.num_dropped:
                table.block_ids.append(next(remaining))
    return tables
