"""What paged_decode_hopper reads and when: each program's share of the line of tiles, and the warp that fetches it.

    line of tiles     r0 h0 t0 t1 t2 | r0 h1 t0 t1 t2 | r1 h0 t0 | r1 h1 t0 | ...       cut into equal shares
    block table       7        2        9      3                 a tile of 64 keys, blocks of 16
                      |        |        |      |
    ring in shared memory   [K t0] [V t0] [K t1] [V t1] [K t2] ...      each [left 64 columns][right 64 columns]

The fetching warp walks on over the borders of requests and heads as far as the ring has room, so memory never waits
for a softmax or an output to be stored. A request's last tile is fetched by the box, not whole: what lies past the
last box with a key in it is what was there before. `full` barriers count bytes that landed, `empty` barriers the
consumer that is done. All walk the same way: whoever leaves out a tile must leave it out everywhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from minivllm_kernels.hopper_fetch import BOX_COLUMNS


@gluon.jit
def _add(left, right):
    return left + right


@gluon.jit
def _pair_tiles(length, own_start, window, TILE: gl.constexpr):
    """First tile of a pair and how many; one, without a key, if the request is a padded row: it writes the zeros."""
    first = own_start // TILE
    if window is not None:
        first = gl.maximum(length - window, 0) // TILE  # tiles wholly before the window are nobody's work
    return first, gl.maximum((length + TILE - 1) // TILE - first, 1)


@gluon.jit
def _lengths(lengths_ptrs, requests, is_there):
    """Keys of requests, and the first that is this kernel's work: 0, or where a shared prefix ends."""
    num_tokens_ptr, prefix_ptr = lengths_ptrs
    lengths = gl.load(num_tokens_ptr + requests, mask=is_there, other=0)
    own_starts = lengths * 0
    if prefix_ptr is not None:
        own_starts = gl.load(prefix_ptr + requests, mask=is_there, other=0)
    return lengths, own_starts


@gluon.jit
def equal_share(
    lengths_ptrs, batch_size, window,
    NUM_KV_HEADS: gl.constexpr, TILE: gl.constexpr, LEAST_TILES: gl.constexpr, BATCH: gl.constexpr,
):  # fmt: skip
    """This program's stretch of the line of tiles, and the (request, head) where it begins, with that pair's start."""
    requests = gl.arange(0, BATCH, layout=gl.BlockedLayout([BATCH // 128], [32], [4], [0]))
    lengths, own_starts = _lengths(lengths_ptrs, requests, requests < batch_size)
    _, tiles = _pair_tiles(lengths, own_starts, window, TILE)
    tiles = gl.where(requests < batch_size, tiles, 0)
    ends = gl.associative_scan(tiles, 0, _add) * NUM_KV_HEADS  # where each request's work ends in the line
    all_tiles = gl.sum(tiles, 0) * NUM_KV_HEADS
    share = gl.maximum((all_tiles + gl.num_programs(0) - 1) // gl.num_programs(0), LEAST_TILES)
    position = gl.program_id(0) * share
    stop = gl.minimum(position + share, all_tiles)
    request = gl.sum((ends <= position).to(gl.int32), 0)
    request_start = gl.max(gl.where(ends <= position, ends, 0), 0)
    pair_tiles = gl.maximum(gl.sum(gl.where(requests == request, tiles, 0), 0), 1)  # a program without work: no 0
    head = (position - request_start) // pair_tiles
    return share, position, stop, request, head, request_start + head * pair_tiles


@gluon.jit
def segment(position, stop, pair_start, request, lengths_ptrs, window, TILE: gl.constexpr):
    """What of the pair at `position` is this program's: keys, tiles begin .. end - 1, its stop, the pair's."""
    length, own_start = _lengths(lengths_ptrs, request, True)
    first, pair_tiles = _pair_tiles(length, own_start, window, TILE)
    segment_stop = gl.minimum(pair_start + pair_tiles, stop)
    skipped = first - pair_start  # from a place in the line to a tile of the request
    end = gl.minimum(segment_stop + skipped, (length + TILE - 1) // TILE)  # a padded row's one tile is none
    return length, position + skipped, end, segment_stop, pair_start + pair_tiles


@gluon.jit
def next_pair(request, head, NUM_KV_HEADS: gl.constexpr):
    return request + (head + 1) // NUM_KV_HEADS, (head + 1) % NUM_KV_HEADS


@gluon.jit
def produce(
    descriptors, shared, share, table_ptr, stride_table,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """The fetching warp: queries of each segment, then K and V of its tiles in turn."""
    q_desc, k_desc, v_desc = descriptors
    buffers, barriers, lengths_ptrs, factors = shared
    queries, tiles, _weights = buffers
    q_full, q_empty, full, empty = barriers
    TILE: gl.constexpr = tiles.shape[1]
    BLOCKS: gl.constexpr = TILE // BLOCK if TILE > BLOCK else 1  # of a tile
    entry, num_segments = 0, 0  # so far: they say which slot comes next, and which phase of its barriers
    _share, position, stop, request, head, pair_start = share
    while position < stop:
        length, begin, end, segment_stop, pair_stop = segment(
            position, stop, pair_start, request, lengths_ptrs, factors[2], TILE
        )
        if begin < end:
            _fetch_queries(q_desc, queries, q_full, q_empty, num_segments, request, head * GROUP)
            num_segments += 1
        table = table_ptr + request.to(gl.int64) * stride_table
        last_column = gl.maximum(length - 1, 0) // BLOCK
        for tile in range(begin, end):
            block_ids = ()  # read before waiting for room, or their latency would come on top
            for block in gl.static_range(BLOCKS):
                column = gl.minimum(tile * TILE // BLOCK + block, last_column)
                block_ids += (gl.load(table + column),)  # type: ignore[assignment]
            _fetch(k_desc, tiles, full, empty, entry, block_ids, head, tile, length, BLOCK)
            _fetch(v_desc, tiles, full, empty, entry + 1, block_ids, head, tile, length, BLOCK)
            entry += 2
        position, pair_start = segment_stop, pair_stop
        request, head = next_pair(request, head, NUM_KV_HEADS)


@gluon.jit
def _fetch_queries(desc, queries, full, empty, num_segments, request, head):
    """Ask for the query heads of a pair; those behind them in the tile are others', or zero past the tensor's end."""
    SLOTS: gl.constexpr = queries.shape[0]
    ROWS: gl.constexpr = queries.shape[1]
    HALVES: gl.constexpr = queries.shape[2] // BOX_COLUMNS
    boxes = queries._reinterpret(queries.dtype, [SLOTS * HALVES, ROWS, BOX_COLUMNS], queries.layout)
    slot = num_segments % SLOTS
    mbarrier.wait(empty.index(slot), num_segments // SLOTS & 1 ^ 1)  # a barrier's phase before the first counts as over
    mbarrier.expect(full.index(slot), 2 * ROWS * HALVES * BOX_COLUMNS)
    for half in gl.static_range(HALVES):
        corner = [request, head, half * BOX_COLUMNS]
        tma.async_copy_global_to_shared(desc, corner, full.index(slot), boxes.index(slot * HALVES + half))


@gluon.jit
def _fetch(desc, tiles, full, empty, entry, block_ids, head, tile, length, BLOCK: gl.constexpr):
    """Ask for K or V of a tile as an entry of the ring: the boxes that hold a key of the request."""
    STAGES: gl.constexpr = tiles.shape[0]
    TILE: gl.constexpr = tiles.shape[1]
    HALVES: gl.constexpr = tiles.shape[2] // BOX_COLUMNS
    BOX_ROWS: gl.constexpr = desc.block_shape[2]
    BOXES: gl.constexpr = TILE // BOX_ROWS
    boxes = tiles._reinterpret(tiles.dtype, [STAGES * HALVES * BOXES, BOX_ROWS, BOX_COLUMNS], tiles.layout)
    slot = entry % STAGES
    landed = full.index(slot)
    num_boxes = gl.minimum((length - tile * TILE + BOX_ROWS - 1) // BOX_ROWS, BOXES)
    mbarrier.wait(empty.index(slot), entry // STAGES & 1 ^ 1)
    for count in gl.static_range(1, BOXES + 1):  # the number of bytes is a constant of the instruction
        mbarrier.expect(landed, 2 * count * BOX_ROWS * HALVES * BOX_COLUMNS, pred=num_boxes == count)
    for box in gl.static_range(BOXES):
        for half in gl.static_range(HALVES):
            row = (tile * TILE + box * BOX_ROWS) % BLOCK
            corner = [block_ids[box * BOX_ROWS // BLOCK], head, row, half * BOX_COLUMNS]
            place = boxes.index((slot * HALVES + half) * BOXES + box)
            tma.async_copy_global_to_shared(desc, corner, landed, place, pred=box < num_boxes)
