"""Steps that the kernels of paged attention share: tiles of rows, pages of keys, and the running
softmax.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of_tile(
    query_start_ptr, tile, num_rows, G: tl.constexpr, BLOCK_M: tl.constexpr, ROWS_PAD: tl.constexpr
):
    """The row that a tile belongs to (``num_rows`` past the last), the tile's index in the row, the
    row's number of queries and its first token.
    """
    r = tl.arange(0, ROWS_PAD)
    begins = tl.load(query_start_ptr + r, mask=r < num_rows, other=0)
    ends = tl.load(query_start_ptr + r + 1, mask=r < num_rows, other=0)
    tiles = (((ends - begins) * G + BLOCK_M - 1) // BLOCK_M).to(tl.int32)
    row = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32) * (r < num_rows).to(tl.int32), 0)
    tile_in_row = tile - tl.sum(tl.where(r < row, tiles, 0), 0)
    num_queries = tl.sum(tl.where(r == row, ends - begins, 0), 0)
    return row, tile_in_row, num_queries, tl.sum(tl.where(r == row, begins, 0), 0).to(tl.int64)


@triton.jit
def place_of_tile(
    query_start_ptr,
    first_row,
    num_rows,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    DECODE: tl.constexpr,
):
    """As ``row_of_tile`` for the tile of this program, rows counted from ``first_row`` on. Tiles of
    decode rows come as they are; the last tiles of other rows see the most keys and are started
    first.
    """
    if DECODE:
        tile = tl.program_id(0)
        row = tile // tl.cdiv(G, BLOCK_M)
        tile_in_row = tile % tl.cdiv(G, BLOCK_M)
        num_queries = 1
        first_token = row.to(tl.int64)
    else:
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        row, tile_in_row, num_queries, first_token = row_of_tile(
            query_start_ptr + first_row, tile, num_rows, G, BLOCK_M, ROWS_PAD
        )
        row += first_row
    return row, tile_in_row, num_queries, first_token


@triton.jit
def softmax_weights(scores, best, total):
    """One step of the running softmax in base 2, over a block of scores; -inf hides a key. Returns
    the largest score and the total so far, the weights of the block, and the factor by which
    earlier weights shrink.
    """
    new_best = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(new_best == float("-inf"), 0.0, new_best)  # for a pair that has seen no key yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(best - base)
    return new_best, total * shrink + tl.sum(weights, 1), weights, shrink


@triton.jit
def softmax_step(scores, v, best, total, acc, dtype: tl.constexpr):
    """``softmax_weights``, and the sum of the values so weighted."""
    best, total, weights, shrink = softmax_weights(scores, best, total)
    return best, total, tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision="ieee")


@triton.jit
def pages_of(row_pages_ptr, key_start, key_end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of a block of keys if blocks lie within pages, else the page of each key; 0 past the
    end.
    """
    if PAGE % BLOCK_N == 0:
        pages = tl.load(row_pages_ptr + key_start // PAGE, mask=key_start < key_end, other=0)
    else:
        key = key_start + tl.arange(0, BLOCK_N)
        pages = tl.load(row_pages_ptr + key // PAGE, mask=key < key_end, other=0)
    return pages
