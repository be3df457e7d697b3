"""Flash attention on one thread: queries that share key heads against a run of cached positions,
softmax(q k^T) v with a running softmax.

Each block of 64 positions is laid out once for all queries, in the form that products of units need
(``codegen/tiles.py``). Keys are transposed, so that a vector holds 16 positions; a bf16 unit of
values holds two positions. A single tile of rows, as a decode row has, does that in registers
instead. Heads in e4m3 become bf16 on the way, without their scales: a position's key scale
multiplies its scores, its value scale multiplies its softmax weights. A query row adds the same
terms in the same order whatever its neighbours.

With AMX, bf16 is multiplied by its tiles, 16 rows at once, also for a decode row: it adds in
another order than vectors do.

A head's part of an entry is a few cache lines of a longer row, which the processor does not
foresee. Reading a position therefore fetches the same head at one of the block that follows.

M rows: the G query heads of each query in turn  N = 64 positions
D, E dims of keys and values, padded  U units of a key
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import overload

from .codegen.amx import begin_tiles, end_tiles
from .codegen.arrays import inner, stay_apart
from .codegen.e4m3 import AT_ONCE, decodes, pair_bytes, take_scales, turn_bytes
from .codegen.threads import borrowed
from .codegen.tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    pair,
    soften,
    transpose,
)
from .codegen.vectors import LANES
from .flash_products import PADDING, add_values, rows_at_once, score
from .kv_entries import NO_SCALES, Block, find, move_rows, read

BLOCK = TILE_COLUMNS  # positions
_LOWEST = np.float32(-1e30)  # below any score: hidden ones, -inf, get no share even before the first
_LINE = 64  # bytes of a cache line: a vector that crosses a line is read at half the rate


class Scratch(NamedTuple):
    """A thread's working memory. Numbers (bf16 as uint16, or float32): q [M, D], k [N, D], v [N,
    E], shares [4, N]. Units: turned [U, N], paired [N / 2 or N, E]. Float32: scores [4, N], sums
    [M, E], best and total [M], shrink [4], scales [2, N] of keys and values. int64: places [4, N],
    the cache rows of a block's positions and of the block's that follows, and twice those of k and
    v.
    """

    q: Any
    k: Any
    v: Any
    turned: Any
    paired: Any
    shares: Any
    scores: Any
    sums: Any
    best: Any
    total: Any
    shrink: Any
    scales: Any
    places: Any


class Spot(NamedTuple):
    """One head of the cache entries at a block's positions."""

    place: Any
    head: int
    block: Any


@inner()
def scratch(num_rows, key_dim, value_dim, like):
    """Allocates scratch for ``num_rows`` rows, whole tiles. ``like`` is an array of numbers."""
    per_unit = 4 // like.itemsize
    one = np.empty(1, np.float32)
    tile = rows_at_once(like)
    key = -(-key_dim // PADDING) * PADDING
    value = -(-value_dim // PADDING) * PADDING
    return Scratch(
        room_for(num_rows, key, like),
        room_for(BLOCK, key, like),
        room_for(BLOCK, value, like),
        units(room_for(key // per_unit, BLOCK * per_unit, like)),
        units(room_for(BLOCK // per_unit, value * per_unit, like)),
        room_for(tile, BLOCK, like),
        room_for(tile, BLOCK, one),
        room_for(num_rows, value, one),
        np.empty(num_rows, np.float32),
        np.empty(num_rows, np.float32),
        np.empty(tile, np.float32),
        np.empty((2, BLOCK), np.float32),
        _places(),
    )


@inner()
def _places():
    places = np.empty((4, BLOCK), np.int64)
    for n in range(BLOCK):
        places[:, n] = n
    return places


@inner()
def room_for(rows, columns, like):
    """Zeros [rows, columns], aligned to a cache line. Padding stays zero."""
    stay_apart()
    raw = np.zeros(rows * columns + _LINE // like.itemsize, like.dtype)
    skip = -raw.ctypes.data % _LINE // like.itemsize
    return raw[skip : skip + rows * columns].reshape(rows, columns)


@inner()
def tiled(num_rows, like):
    """Rounds a number of rows up to whole tiles."""
    return -(-num_rows // rows_at_once(like)) * rows_at_once(like)


@inner()
def place_queries(q_THD, first_token, num_tokens, heads, group, work):
    """Copies queries of the key heads [heads[0], heads[1]) into rows, each head padded to whole
    tiles.
    """
    stride = tiled(num_tokens * group, work.q)
    for head in range(heads[0], heads[1]):
        for token in range(num_tokens):
            first = (head - heads[0]) * stride + token * group
            move_rows(
                q_THD[first_token + token],
                head * group,
                0,
                q_THD.shape[2],
                NO_SCALES,
                0,
                work.q,
                first,
                0,
                group,
            )


@njit(cache=True, inline="always")
def attend_rows(
    work, num_tokens, group, keys, values, key_place, value_place, heads, run, then, factor, window
):
    """Attention of the run's last ``num_tokens`` positions as queries, each over the last
    ``window`` keys up to its own. ``factor`` is scale / ln 2. If ``value_place`` has no width, the
    values are the first dims of the keys. Meanwhile the first block of the run ``then`` is fetched.
    Leaves sums, best and total in ``work``.

    The functions called in the loops take arrays one by one: a tuple of arrays counts references,
    which took a third of the time.
    """
    q = borrowed(units(work.q))
    k = borrowed(work.k)
    v = borrowed(work.v)
    places = borrowed(work.places)
    turned = borrowed(work.turned)
    paired = borrowed(work.paired)
    scores = borrowed(work.scores)
    shares = borrowed(work.shares)
    share_units = borrowed(units(work.shares))
    sums = borrowed(work.sums)
    best = borrowed(work.best)
    total = borrowed(work.total)
    shrink = borrowed(work.shrink)
    scales, pages = _scales(keys, k, borrowed(work.scales)), run.pages
    tile_rows, position = rows_at_once(k), run.end - num_tokens
    stride = tiled(num_tokens * group, k)
    num_rows = stride * (heads[1] - heads[0])
    sums[:num_rows], best[:num_rows], total[:num_rows] = 0, _LOWEST, 0
    separate = value_place.width > 0
    stored = key_place.width >= k.shape[1] and (not separate or value_place.width >= v.shape[1])
    key_rows = _as_they_lie(keys, k)
    value_rows = _as_they_lie(values, v)
    whole = keys.itemsize == k.itemsize and stored and sums.shape[1] % TILE_COLUMNS == 0
    begin_tiles(k, num_tokens * group)
    for start in range(run.begin, run.end, BLOCK):
        block = Block(start, min(start + BLOCK, run.end), run.page_size)
        # The first ``blind`` rows see none of these positions, nor do those from ``past`` on.
        blind = max(0, start - position) * group // tile_rows * tile_rows
        past = min(stride, tiled(max(0, start + BLOCK + window - 1 - position) * group, k))
        direct = whole and past - blind <= tile_rows == TILE_ROWS  # AMX reads only what is laid out
        find(pages, block, places[0])
        if block.end < run.end:
            find(pages, Block(block.end, min(block.end + BLOCK, run.end), run.page_size), places[1])
        else:
            first = Block(then.begin, min(then.begin + BLOCK, then.end), then.page_size)
            find(then.pages, first, places[1])
        for head in range(heads[0], heads[1]):
            column = _column(value_place, head) if separate else key_place.first
            if not direct:
                _lay_out_keys(keys, Spot(key_place, head, block), pages, places, k, turned, scales)
                if separate:
                    _lay_out_values(values, Spot(value_place, head, block), pages, places, v, paired, scales)
                else:
                    _pair_keys(keys, stored, column, places, k, paired)
            for row in range(blind, past, tile_rows):
                tile = (head - heads[0]) * stride + row
                seen = position + 1 - start
                score(scores, q, tile, turned, direct, key_rows, places, _column(key_place, head))
                if seen + row // group < BLOCK or seen + (row + tile_rows - 1) // group > window:
                    _hide(scores, row, group, seen, num_tokens, window)
                num_used = min(tile_rows, num_tokens * group - row)
                for i in range(0, num_used, TILE_ROWS):
                    soften(scores, i, factor, scales, best, total, tile + i, shares, shrink)
                add_values(
                    sums, tile, num_used, shrink, share_units, paired, direct, value_rows, places, column
                )
    end_tiles(k)


def _as_they_lie(entries: Any, numbers: Any) -> Any:
    """In kernels: entries if they are of the dtype in which they are multiplied, else the room for
    such numbers, which nobody reads then.
    """
    raise NotImplementedError


@overload(_as_they_lie, inline="always")
def _multiplied_as_they_lie(entries, numbers):
    if entries.dtype == numbers.dtype:
        return lambda entries, numbers: entries
    return lambda entries, numbers: numbers


@inner()
def _hide(scores, first_row, group, seen, num_tokens, window):
    """Hides positions that rows of a tile may not see. The first query sees ``seen`` positions,
    but for those before its window.
    """
    for i in range(len(scores)):
        query = min((first_row + i) // group, num_tokens - 1)
        for n in range(max(0, seen + query), BLOCK):
            scores[i, n] = -np.inf
        for n in range(min(seen + query - window, BLOCK)):
            scores[i, n] = -np.inf


def _scales(entries: Any, room: Any, scales: Any) -> Any:
    """In kernels: ``scales`` if entries are decoded without their scales, else None."""
    raise NotImplementedError


@overload(_scales, inline="always")
def _found_scales(entries, room, scales):
    if entries.dtype == types.uint8 and room.dtype == types.uint16 and decodes():
        return lambda entries, room, scales: scales
    return lambda entries, room, scales: None


def _lay_out_keys(keys: Any, spot: Any, pages: Any, places: Any, k: Any, turned: Any, scales: Any) -> None:
    """In kernels: transposes the keys of a head, from ``k`` if they are not as wide as needed;
    writes their scales separately if they are not applied.
    """
    raise NotImplementedError


@overload(_lay_out_keys)
def _keys_laid_out(keys, spot, pages, places, k, turned, scales):
    if keys.dtype == k.dtype:

        def where_they_lie(keys, spot, pages, places, k, turned, scales):
            if spot.place.width >= k.shape[1]:
                column = _column(spot.place, spot.head)
                turn_rows(keys, places, 0, column * k.itemsize // turned.itemsize, turned)
            else:
                read(keys, spot.place, spot.head, pages, spot.block, k)
                turn_rows(k, places[2:], 0, 0, turned)

        return where_they_lie

    def converted(keys, spot, pages, places, k, turned, scales):
        read(keys, spot.place, spot.head, pages, spot.block, k)
        turn_rows(k, places[2:], 0, 0, turned)

    if scales == types.none:
        return converted

    def as_bytes(keys, spot, pages, places, k, turned, scales):
        if _decoded(spot.place):
            _turn_bytes(keys, places, _column(spot.place, spot.head), turned)
            take_scales(keys, places, spot.place.scale + spot.head, scales, 0)
        else:
            read(keys, spot.place, spot.head, pages, spot.block, k)
            turn_rows(k, places[2:], 0, 0, turned)
            scales[:] = 1

    return as_bytes


def _lay_out_values(
    values: Any, spot: Any, pages: Any, places: Any, v: Any, paired: Any, scales: Any
) -> None:
    """In kernels: pairs the values of a head, as ``_lay_out_keys`` transposes keys."""
    raise NotImplementedError


@overload(_lay_out_values)
def _values_laid_out(values, spot, pages, places, v, paired, scales):
    if values.dtype == v.dtype:

        def where_they_lie(values, spot, pages, places, v, paired, scales):
            if spot.place.width >= v.shape[1]:
                pair_rows(values, places, 0, _column(spot.place, spot.head), paired)
            else:
                read(values, spot.place, spot.head, pages, spot.block, v)
                pair_rows(v, places[2:], 0, 0, paired)

        return where_they_lie

    def converted(values, spot, pages, places, v, paired, scales):
        read(values, spot.place, spot.head, pages, spot.block, v)
        pair_rows(v, places[2:], 0, 0, paired)

    if scales == types.none:
        return converted

    def as_bytes(values, spot, pages, places, v, paired, scales):
        if _decoded(spot.place):
            _pair_bytes(values, places, _column(spot.place, spot.head), paired)
            take_scales(values, places, spot.place.scale + spot.head, scales, 1)
        else:
            read(values, spot.place, spot.head, pages, spot.block, v)
            pair_rows(v, places[2:], 0, 0, paired)
            scales[1] = 1

    return as_bytes


def _pair_keys(keys: Any, stored: Any, column: Any, places: Any, k: Any, paired: Any) -> None:
    """In kernels: pairs the first dims of the keys as values; they lie in the entries or in ``k``,
    as ``_lay_out_keys`` found them.
    """
    raise NotImplementedError


@overload(_pair_keys)
def _keys_paired(keys, stored, column, places, k, paired):
    if keys.dtype == k.dtype:

        def where_they_lie(keys, stored, column, places, k, paired):
            if stored:
                pair_rows(keys, places, 0, column, paired)
            else:
                pair_rows(k, places[2:], 0, 0, paired)

        return where_they_lie
    return lambda keys, stored, column, places, k, paired: pair_rows(k, places[2:], 0, 0, paired)


@inner()
def _column(place, head):
    return place.first + head * place.step


@inner()
def _decoded(place):
    """Whether bytes can be decoded in vectors: those of heads (latents have several scales) in
    whole vectors.
    """
    return place.step > 0 and place.width % AT_ONCE == 0


@inner()
def turn_rows(rows, places, first, unit, turned):
    """Transposes units from ``unit`` on, of as many positions from ``first`` on as ``turned`` [U,
    N] has columns.
    """
    stay_apart()
    for u in range(0, len(turned), LANES):
        for n in range(0, turned.shape[1], LANES):
            transpose(rows, places, first + n, unit + u, turned, u, n)


@inner()
def _turn_bytes(keys, places, column, turned):
    stay_apart()
    for u in range(0, len(turned), AT_ONCE // 2):
        for n in range(0, BLOCK, LANES):
            turn_bytes(keys, places, n, column + 2 * u, turned, u, n)


def pair_rows(rows: Any, places: Any, first: Any, column: Any, paired: Any) -> None:
    """In kernels: copies numbers from position ``first`` and the given column on, two positions to
    a bf16 unit: [N / 2 or N, E].
    """
    raise NotImplementedError


@overload(pair_rows)
def _paired(rows, places, first, column, paired):
    if rows.dtype == types.uint16:

        def pair_all(rows, places, first, column, paired):
            stay_apart()
            for i in range(len(paired)):
                for e in range(0, paired.shape[1], PADDING):
                    pair(rows, places, first + 2 * i, column + e, paired, i, e)

        return pair_all

    def copy(rows, places, first, column, paired):
        for n in range(len(paired)):
            move_rows(rows, _place(places, first + n), column, paired.shape[1], NO_SCALES, 0, paired, n, 0, 1)

    return copy


def _place(places: Any, position: Any) -> Any:
    """In kernels: the row of a position."""
    raise NotImplementedError


@overload(_place, inline="always")
def _placed(places, position):
    if places == types.none:
        return lambda places, position: position
    return lambda places, position: places[0, position]


@inner()
def _pair_bytes(values, places, column, paired):
    stay_apart()
    for i in range(len(paired)):
        for e in range(0, paired.shape[1], AT_ONCE):
            pair_bytes(values, places, 2 * i, column + e, paired, i, e)


def units(numbers: Any) -> Any:
    """In kernels: views rows of numbers as units."""
    raise NotImplementedError


@overload(units, inline="always")
def _as_units(numbers):
    if numbers.dtype == types.uint16:
        return lambda numbers: numbers.view(np.uint32)
    return lambda numbers: numbers
