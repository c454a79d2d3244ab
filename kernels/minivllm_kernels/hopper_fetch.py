"""The fetching warp of paged_attention_hopper: it asks the copy engine for Q, K and V, and nobody else touches a cache.

    block table      7        2        9      3          a tile of 64 keys, blocks of 16
                     |        |        |      |
    shared memory   [left halves of 4 x 16 rows][right halves of 4 x 16 rows]      a ring of such tiles for K, one for V

A box is at most one block high and 64 columns (128 bytes) wide, the widest that the engine swizzles; the tensor cores
want a tile as column halves, each with all its rows. So a box goes to where its rows begin within its half.
`full` barriers count bytes that have landed, `empty` barriers the two groups of warps that are done with a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

GROUP_ROWS = gl.constexpr(64)  # queries of one head that a group of warps holds
ITEM_ROWS = gl.constexpr(128)
BOX_COLUMNS = gl.constexpr(64)


@gluon.jit
def work_item(step, work, HEADS: gl.constexpr, TILE: gl.constexpr):
    """This program's item of a round: request, head, first row, rows, its position, keys, first and last tile."""
    num_tokens_ptr, query_starts_ptr, _, num_requests, num_query_tiles, window = work
    # Every other round is dealt backwards, or the first program would always get the longest item.
    place = gl.where(step % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
    item = step * gl.num_programs(0) + place
    head = item % HEADS
    request = item // HEADS % num_requests
    row = (num_query_tiles - 1 - item // HEADS // num_requests) * ITEM_ROWS  # negative: nothing left in this round
    start = gl.load(query_starts_ptr + request)
    num_queries = gl.load(query_starts_ptr + request + 1) - start
    num_tokens = gl.load(num_tokens_ptr + request)
    num_rows = gl.where(row >= 0, num_queries - row, 0)  # of the request from this item on; none: skip the item
    position = num_tokens - num_queries + row
    last = gl.maximum(gl.minimum(position + ITEM_ROWS, num_tokens) - 1, 0) // TILE
    first = last * 0
    if window is not None:
        first = gl.minimum(gl.maximum(position + 1 - window, 0) // TILE, last)
    return request, head, start + row, num_rows, position, num_tokens, first, last


@gluon.jit
def produce(
    descriptors, shared, table_ptr, stride_table, HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr
):
    """Q of each item, then its tiles from the diagonal back: K always one tile ahead of V."""
    q_desc, k_desc, v_desc = descriptors
    buffers, barriers, work, _factors = shared
    queries, keys, values = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turns = barriers
    TILE: gl.constexpr = keys.shape[1]
    turn, num_items, num_clears = 0, 0, 0  # tiles, items and cleared tiles so far: they say which phase a barrier is in
    for step in range(work[2]):
        request, head, q_row, num_rows, _position, num_tokens, first, last = work_item(step, work, HEADS, TILE)
        if num_rows > 0:
            _fetch_queries(q_desc, queries, q_full.index(0), q_empty.index(0), num_items, head, q_row)
            table = table_ptr + request.to(gl.int64) * stride_table
            place = (table, head // GROUP, num_tokens)
            _fetch(k_desc, keys, k_full, k_empty, turn, last, place, 0, BLOCK, False)
            for tile in range(last - first):
                _fetch(k_desc, keys, k_full, k_empty, turn + tile + 1, last - tile - 1, place, 0, BLOCK, False)
                num_clears = _fetch(
                    v_desc, values, v_full, v_empty, turn + tile, last - tile, place, num_clears, BLOCK, True
                )
            turn += last - first + 1
            num_clears = _fetch(v_desc, values, v_full, v_empty, turn - 1, first, place, num_clears, BLOCK, True)
            num_items += 1


@gluon.jit
def _fetch_queries(desc, queries, full, empty, num_items, head, row):
    """128 rows of one head; those past a request's end are another's, or zero past the tensor's: never stored."""
    HALVES: gl.constexpr = queries.shape[2] // BOX_COLUMNS
    boxes = queries._reinterpret(queries.dtype, [2 * HALVES, GROUP_ROWS, BOX_COLUMNS], queries.layout)
    mbarrier.wait(empty, num_items & 1 ^ 1)  # a barrier's phase before the first counts as over
    mbarrier.expect(full, 2 * ITEM_ROWS * HALVES * BOX_COLUMNS)
    for box in gl.static_range(2 * HALVES):
        corner = [head, row + box // HALVES * GROUP_ROWS, box % HALVES * BOX_COLUMNS]
        tma.async_copy_global_to_shared(desc, corner, full, boxes.index(box))


@gluon.jit
def _fetch(
    desc, tiles, full, empty, turn, tile, place, num_clears, BLOCK: gl.constexpr, CLEARS: gl.constexpr
):  # fmt: skip
    """Ask for K or V of a tile as entry `turn` of its ring; CLEARS zeroes its rows past the last key once landed."""
    table, head, num_tokens = place
    STAGES: gl.constexpr = tiles.shape[0]
    TILE: gl.constexpr = tiles.shape[1]
    HALVES: gl.constexpr = tiles.shape[2] // BOX_COLUMNS
    BOX_ROWS: gl.constexpr = desc.block_shape[2]
    BOXES: gl.constexpr = TILE // BOX_ROWS
    boxes = tiles._reinterpret(tiles.dtype, [STAGES * HALVES * BOXES, BOX_ROWS, BOX_COLUMNS], tiles.layout)
    last_column = gl.maximum(num_tokens - 1, 0) // BLOCK
    block_ids = ()  # read before waiting, or their latency would come on top
    for box in gl.static_range(BOXES):  # past the request's end its last block comes again: those keys are masked
        column = gl.minimum((tile * TILE + box * BOX_ROWS) // BLOCK, last_column)
        block_ids += (gl.load(table + column),)  # type: ignore[assignment]
    slot = turn % STAGES
    num_keys = num_tokens - tile * TILE
    landed = full.index(gl.where(num_keys < TILE, STAGES, slot)) if CLEARS else full.index(slot)
    mbarrier.wait(empty.index(slot), turn // STAGES & 1 ^ 1)
    mbarrier.expect(landed, 2 * TILE * HALVES * BOX_COLUMNS)
    for half in gl.static_range(HALVES):
        for box in gl.static_range(BOXES):
            corner = [block_ids[box], head, tile * TILE % BLOCK if BLOCK > TILE else 0, half * BOX_COLUMNS]
            tma.async_copy_global_to_shared(desc, corner, landed, boxes.index((slot * HALVES + half) * BOXES + box))
    if CLEARS and num_keys < TILE:
        mbarrier.wait(landed, num_clears & 1)
        _clear_rows(tiles, slot, num_keys)
        mbarrier.arrive(full.index(slot), count=1)
        num_clears += 1
    return num_clears


@gluon.jit
def _clear_rows(tiles, slot, first_row):
    """Zero the rows of one tile from `first_row` on, eight at a time: the rows that a swizzle pattern spans."""
    TILE: gl.constexpr = tiles.shape[1]
    HALVES: gl.constexpr = tiles.shape[2] // BOX_COLUMNS
    strips = tiles._reinterpret(tiles.dtype, [tiles.shape[0] * HALVES * TILE // 8, 8, BOX_COLUMNS], tiles.layout)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, 8, layout=gl.SliceLayout(1, layout))[:, None]
    for strip in range(first_row // 8, TILE // 8):
        for half in gl.static_range(HALVES):
            part = strips.index((slot * HALVES + half) * (TILE // 8) + strip)
            part.store(gl.where(strip * 8 + rows < first_row, part.load(layout), 0.0).to(tiles.dtype))
    fence_async_shared()  # the tensor cores read through another path than these stores
