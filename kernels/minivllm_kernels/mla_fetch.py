"""What mla_decode_hopper reads and when: each program's share of the line of tiles, and the warp that fetches it.

    line of tiles     r0 t0 t1 t2 t3 | r1 t0 t1 | r2 t0 t1 t2 | ...         cut into equal shares, as in mla_decode
    tile              RoPE | latent 0 | latent 1 | ... | latent 7           64 tokens x 64 columns each: boxes
    ring              [pack: 3 boxes][pack][pack] | [pack][pack][pack] | [pack][pack]

A box is 128 bytes wide, the widest that the copy engine swizzles, and as high as a block of the cache allows: blocks of
16 take four copies. The warp walks on over the borders of requests as far as the ring has room, so memory never waits
for a softmax or an output to be stored. `full` barriers count bytes that landed, `empty` ones the groups that are done.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

TILE = gl.constexpr(64)  # tokens: the rows of a tensor core's product
BOX = gl.constexpr(64)  # columns


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def equal_share(num_tokens_ptr, batch_size, shares, share_index, BATCH: gl.constexpr, LEAST_TILES: gl.constexpr):
    """Where a share of the line begins and stops, tiles a share, the request it begins in and where that one does."""
    requests = gl.arange(0, BATCH, layout=gl.BlockedLayout([1], [32], [4], [0]))
    lengths = gl.load(num_tokens_ptr + gl.minimum(requests, batch_size - 1))
    tiles = gl.maximum((lengths + TILE - 1) // TILE, 1)  # a padded row writes its zeros
    tiles = gl.where(requests < batch_size, tiles, 0)
    num_tiles = gl.sum(tiles, 0)
    share = gl.maximum((num_tiles + shares - 1) // shares, LEAST_TILES)
    begin = share_index * share
    is_over = (gl.associative_scan(tiles, 0, _add) <= begin) & (requests < batch_size)
    request = gl.sum(gl.where(is_over, 1, 0), 0)
    request_start = gl.sum(gl.where(is_over, tiles, 0), 0)
    return num_tokens_ptr, begin, gl.minimum(begin + share, num_tiles), share, request, request_start


@gluon.jit
def segment(num_tokens_ptr, position, stop, request, request_start):
    """From `position` on within one request: its keys, where it stops, where we do, first tile, tiles to read."""
    num_tokens = gl.load(num_tokens_ptr + request)
    tiles = (num_tokens + TILE - 1) // TILE
    request_stop = request_start + gl.maximum(tiles, 1)
    segment_stop = gl.minimum(request_stop, stop)
    first = position - request_start
    return num_tokens, request_stop, segment_stop, first, gl.minimum(segment_stop - request_start, tiles) - first


@gluon.jit
def _fetch_tile(
    desc, shared, turn, table, tile, num_tokens, LATENT_BOXES: gl.constexpr, PACK: gl.constexpr, BLOCK: gl.constexpr
):
    """Ask for the boxes of one tile, RoPE's first."""
    ring, queries, probs, full, empty, _, _ = shared
    PLACES: gl.constexpr = full.shape[0]
    BOXES: gl.constexpr = queries.shape[0] // probs.shape[0]
    ROWS: gl.constexpr = desc.block_shape[1]
    STRIPS: gl.constexpr = TILE // ROWS
    strips = ring._reinterpret(ring.dtype, [PLACES * PACK * STRIPS, ROWS, BOX], ring.layout)
    block_ids = ()  # read before waiting, or their latency would come on top
    for strip in gl.static_range(STRIPS):  # past the request's end its last block comes again: those keys are masked
        column = gl.minimum((tile * TILE + strip * ROWS) // BLOCK, (num_tokens - 1) // BLOCK)
        block_ids += (gl.load(table + column),)  # type: ignore[assignment]
    for box in gl.static_range(BOXES):
        place = (turn + box // PACK) % PLACES
        if box % PACK == 0:
            mbarrier.wait(empty.index(place), (turn + box // PACK) // PLACES & 1 ^ 1)  # phase -1 counts as over
            mbarrier.expect(full.index(place), 2 * PACK * TILE * BOX)
        first_strip = (place * PACK + box % PACK) * STRIPS
        for strip in gl.static_range(STRIPS):
            corner = [block_ids[strip], tile * TILE % BLOCK if BLOCK > TILE else 0, (LATENT_BOXES + box) % BOXES * BOX]
            tma.async_copy_global_to_shared(desc, corner, full.index(place), strips.index(first_strip + strip))


@gluon.jit
def _fetch_queries(q_desc, rope_desc, shared, num_queries, request, head, LATENT_BOXES: gl.constexpr):
    """All heads of one request, in boxes like the tiles'; heads that do not exist are zero or another block's."""
    _, queries, probs, _, _, q_full, q_empty = shared
    HEADS: gl.constexpr = queries.shape[1]
    BOXES: gl.constexpr = queries.shape[0] // probs.shape[0]
    ROPE_BOXES: gl.constexpr = BOXES - LATENT_BOXES
    GROUPS: gl.constexpr = probs.shape[0]
    mbarrier.wait(q_empty.index(0), num_queries & 1 ^ 1)
    mbarrier.expect(q_full.index(0), 2 * GROUPS * BOXES * HEADS * BOX)
    for group in gl.static_range(GROUPS):
        row = head + group * HEADS
        for box in gl.static_range(BOXES):
            part = queries.index(group * BOXES + box)
            if box < ROPE_BOXES:
                tma.async_copy_global_to_shared(rope_desc, [request, row, box * BOX], q_full.index(0), part)
            else:
                column = (box - ROPE_BOXES) * BOX
                tma.async_copy_global_to_shared(q_desc, [request, row, column], q_full.index(0), part)


@gluon.jit
def produce(fetched, shared, work, head, LATENT_BOXES: gl.constexpr, PACK: gl.constexpr, BLOCK: gl.constexpr):
    """The fetching warp: the share's tiles without a pause, a request's queries behind its first tile."""
    q_desc, rope_desc, cache_desc, table_ptr, stride_table = fetched
    _, queries, probs, _, _, _, _ = shared
    num_tokens_ptr, position, stop, _, request, request_start = work
    turn, num_queries = 0, 0  # packs and requests so far: they say which phase a barrier is in
    while position < stop:
        num_tokens, request_stop, segment_stop, first, num_tiles = segment(
            num_tokens_ptr, position, stop, request, request_start
        )
        table = table_ptr + request.to(gl.int64) * stride_table
        for tile in range(num_tiles):
            _fetch_tile(cache_desc, shared, turn, table, first + tile, num_tokens, LATENT_BOXES, PACK, BLOCK)
            turn += queries.shape[0] // probs.shape[0] // PACK
            if tile == 0:  # not before: the queries of the request before are in use until its last tile
                _fetch_queries(q_desc, rope_desc, shared, num_queries, request, head, LATENT_BOXES)
                num_queries += 1
        position, request, request_start = segment_stop, request + 1, request_stop
