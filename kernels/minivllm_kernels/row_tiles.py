"""What the products of a single row share: its stretches and those of a matrix, as tuples that stay in registers.

K        |  COLUMNS  |  COLUMNS  |  COLUMNS  |
row      [     x0    ] [    x1    ] [    x2    ]      each stretch once, normalised by all of them
matrix   [ROWS,   w0 ] [ROWS,  w1 ] [ROWS,  w2 ]      all loads under way before the first is used
"""

import triton
import triton.language as tl


@triton.jit
def load_tiles(rows_ptr, is_row, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Tiles [ROWS, COLUMNS] of the matrix rows that start at `rows_ptr` [ROWS]."""
    column, tiles = tl.arange(0, COLUMNS)[None, :], ()
    for first in tl.static_range(0, K, COLUMNS):
        mask = is_row[:, None] & (first + column < K)
        tiles += (tl.load(rows_ptr[:, None] + first + column, mask=mask, other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def load_row(ptr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """A row of K elements as stretches [COLUMNS], zeros behind its end."""
    column, stretches = tl.arange(0, COLUMNS), ()
    for first in tl.static_range(0, K, COLUMNS):
        stretches += (tl.load(ptr + first + column, mask=first + column < K, other=0.0),)  # type: ignore[assignment]
    return stretches


@triton.jit
def added(x, y):
    """The sum of two rows, rounded."""
    sums = ()
    for i in tl.static_range(len(x)):
        sums += ((x[i].to(tl.float32) + y[i].to(tl.float32)).to(x[i].dtype),)
    return sums


@triton.jit
def normalised(x, weights, eps, K: tl.constexpr):
    """RMSNorm of a row: rounded where norms.py rounds."""
    squares = x[0].to(tl.float32) * x[0].to(tl.float32)
    for i in tl.static_range(1, len(x)):
        squares += x[i].to(tl.float32) * x[i].to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
    normed = ()
    for i in tl.static_range(len(x)):
        dtype = x[i].dtype
        unit = (x[i].to(tl.float32) * scale).to(dtype).to(tl.float32)
        normed += ((unit * weights[i].to(tl.float32)).to(dtype),)  # type: ignore[assignment]
    return normed


@triton.jit
def product(tiles, x):
    """Each row of the tiles times x, in fp32 [ROWS]: lanes hold partial sums, added up once at the end."""
    sums = tiles[0].to(tl.float32) * x[0].to(tl.float32)[None, :]
    for i in tl.static_range(1, len(x)):
        sums += tiles[i].to(tl.float32) * x[i].to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)
