"""The two products of flash attention for a tile of query rows: scores, and sums of values. By AMX
for bf16 where there is any, else by vectors.

M rows  N = 64 positions  D, E dims of keys and values, padded  U units of a key
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import overload

from .codegen import amx
from .codegen.arrays import inner
from .codegen.tiles import TILE_COLUMNS, TILE_ROWS, add_paired, add_product, multiply_turned
from .codegen.vectors import LANES

PADDING = 2 * LANES  # dims are padded to a multiple of this: the bf16 values of one vector


def rows_at_once(like: Any) -> int:
    """In kernels: rows of a tile, of numbers as in ``like``."""
    raise NotImplementedError


def score(*arguments: Any) -> None:
    """In kernels: scores [M, N] of a tile of rows from ``row`` of ``q`` on, units [., U], with the
    keys ``turned`` [U, N]; ``direct``: with ``keys`` as they lie at ``places``, from ``column`` on.
    """
    raise NotImplementedError


def add_values(*arguments: Any) -> None:
    """In kernels: shrinks the sums [., E] of a tile of rows, at least of the first ``num_rows``,
    and adds ``shares``, units [M, .], of the values ``paired``; ``direct``: of ``values`` as they
    lie at ``places``, from ``column`` on.
    """
    raise NotImplementedError


@overload(rows_at_once, inline="always")
def _rows_at_once(like):
    return (lambda like: amx.ROWS) if amx.multiplies(like) else (lambda like: TILE_ROWS)


@overload(score, inline="always")
def _score(scores, q, row, turned, direct, keys, places, column):
    if q.dtype == types.uint32 and amx.used():
        return lambda scores, q, row, turned, direct, keys, places, column: amx.multiply_units(
            scores, q, row, turned
        )
    return lambda scores, q, row, turned, direct, keys, places, column: _score_by_vectors(
        scores, q, row, turned, direct, keys, places, column
    )


@inner(inline="always")
def _score_by_vectors(scores, q, row, turned, direct, keys, places, column):
    if direct:
        for n in range(0, TILE_COLUMNS, LANES):
            multiply_turned(scores, q, row, keys, places, n, column * keys.itemsize // q.itemsize)
    else:
        add_product(scores, 0, None, q, row, turned, 0, 4)


@overload(add_values, inline="always")
def _add_values(sums, row, num_rows, shrink, shares, paired, direct, values, places, column):
    if shares.dtype == types.uint32 and amx.used():
        return lambda sums, row, num_rows, shrink, shares, paired, direct, values, places, column: (
            amx.add_units(sums, row, num_rows, shrink, shares, paired)
        )
    return lambda sums, row, num_rows, shrink, shares, paired, direct, values, places, column: (
        _add_by_vectors(sums, row, shrink, shares, paired, direct, values, places, column)
    )


@inner(inline="always")
def _add_by_vectors(sums, row, shrink, shares, paired, direct, values, places, column):
    width = sums.shape[1]
    for first in range(0, width // TILE_COLUMNS * TILE_COLUMNS, TILE_COLUMNS):
        if direct:
            add_paired(sums, row, shrink, shares, values, places, column + first, first)
        else:
            add_product(sums, row, shrink, shares, 0, paired, first, 4)
    if width % TILE_COLUMNS:
        add_product(sums, row, shrink, shares, 0, paired, width - PADDING, 2)
