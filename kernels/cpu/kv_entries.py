"""Compiled kernels that read and write cache entries: ``reference/kv_entries.py`` on a CPU, bit for
bit.

T tokens  K key/value heads  D head dim  C latent dim  E rotated dims  Z = C + E
B bytes of an entry  P positions  F = B / 4  N positions read  X numbers of an entry
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numba.core import types
from numba.extending import overload
from torch import Tensor

from ..formats.kv_format import GROUP, SCALE_BYTES, num_groups
from ..reference import kv_entries
from ..reference.fp8 import LARGEST, LEAST_SCALE
from ..reference.kv_entries import holds_fp8, num_kv_heads
from .codegen.arrays import array, computes, inner, narrow, stay_apart, widen
from .codegen.threads import share_out
from .codegen.tiles import move
from .codegen.vectors import LANES

NO_SCALES = np.empty((0, 0), np.float32)
_LARGEST = np.float32(LARGEST)
_LEAST_SCALE = np.float32(LEAST_SCALE)


class Place(NamedTuple):
    """Place of a head's numbers in an entry: ``width`` numbers from ``first`` + head * ``step``. In
    FP8, every ``group`` numbers have a scale; the first scale is number ``scale`` + head of the
    entry viewed as float32. The last ``tail`` numbers of the entry are bf16.
    """

    first: int
    step: int
    width: int
    group: int
    scale: int
    tail: int


class Run(NamedTuple):
    """Positions [begin, end) of a sequence. Page i of ``pages`` holds the positions from i *
    ``page_size`` on.
    """

    pages: Any
    page_size: int
    begin: int
    end: int


class Block(NamedTuple):
    """Positions [begin, end) of a run, and its page size. The pages are left out, because a tuple
    with an array counts references wherever it goes.
    """

    begin: int
    end: int
    page_size: int


def place_of_heads(cache: Tensor, dim: int) -> Place:
    """The place of keys or values in a cache [P, K, D], or in bytes."""
    return Place(0, dim, dim, dim, num_kv_heads(cache, dim) * dim // SCALE_BYTES, 0)


def place_of_latents(cache: Tensor, dim: int) -> Place:
    """The place of latents and rotated parts in a cache [P, Z], or in bytes; there is one head."""
    if not holds_fp8(cache):
        return Place(0, 0, cache.shape[1], cache.shape[1], 0, 0)
    return Place(
        0, 0, dim, GROUP, dim // SCALE_BYTES, (cache.shape[1] - dim - SCALE_BYTES * num_groups(dim)) // 2
    )


def gather_latents(cache: Tensor, pages: Tensor, page_size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Same as ``kv_entries.gather_latents``."""
    if not (computes(dtype) and (holds_fp8(cache) or computes(cache.dtype))):
        return kv_entries.gather_latents(cache, pages, page_size, dim, dtype)
    place = place_of_latents(cache, dim)
    out = torch.empty(len(pages) * page_size, place.width + place.tail, dtype=dtype)
    _gather(array(cache), place, array(pages), page_size, array(out))
    return out


@njit(cache=True)
def _gather(entries, place, pages, page_size, out_NX):
    share_out(_gather_pages, len(pages), (entries, place, pages, page_size, out_NX), False)


@inner()
def _gather_pages(begin, end, entries, place, pages, page_size, out_NX):
    for page in range(begin, end):
        start = page * page_size
        block = Block(start, start + page_size, page_size)
        read(entries, place, 0, pages, block, out_NX[start : start + page_size])


@inner()
def find(pages, block, rows_N):
    """Writes the cache rows of a block's positions; rows past its end repeat the last one."""
    count, done = block.end - block.begin, 0
    while done < count:
        offset = (block.begin + done) % block.page_size
        first = np.int64(pages[(block.begin + done) // block.page_size]) * block.page_size + offset
        num = min(block.page_size - offset, count - done)
        for n in range(num):
            rows_N[done + n] = first + n
        done += num
    rows_N[count:] = rows_N[count - 1]


@inner()
def read(entries, place, head, pages, block, out_NX):
    """Reads a head's numbers at a block's positions; rows past its end become zero."""
    stay_apart()
    count, done, first = block.end - block.begin, 0, place.first + head * place.step
    scales = _scales(entries)
    halves = _halves(entries)
    while done < count:
        offset = (block.begin + done) % block.page_size
        row = np.int64(pages[(block.begin + done) // block.page_size]) * block.page_size + offset
        num = min(block.page_size - offset, count - done)
        for begin in range(0, place.width, place.group):
            width = min(place.group, place.width - begin)
            scale = place.scale + head + begin // place.group
            move_rows(entries, row, first + begin, width, scales, scale, out_NX, done, begin, num)
        if place.tail:
            move_rows(
                halves,
                row,
                halves.shape[1] - place.tail,
                place.tail,
                NO_SCALES,
                0,
                out_NX,
                done,
                place.width,
                num,
            )
        done += num
    out_NX[count:] = 0


@inner()
def move_rows(source, row, column, width, scales, scale, out, out_row, out_column, num_rows):
    """Moves ``width`` numbers of each row, times the row's number ``scale`` in ``scales``;
    ``NO_SCALES`` means no factor.
    """
    stay_apart()
    wide = width // (4 * LANES) * (4 * LANES)
    even = width // LANES * LANES
    for n in range(num_rows):
        factor = scales[row + n, scale] if scales.shape[1] else np.float32(1)
        for x in range(0, wide, 4 * LANES):  # unrolled by hand, since the compiler does not
            for part in range(4):
                at = x + part * LANES
                move(source, row + n, column + at, factor, out, out_row + n, out_column + at)
        for x in range(wide, even, LANES):
            move(source, row + n, column + x, factor, out, out_row + n, out_column + x)
        for x in range(even, width):
            _move_one(
                source[row + n : row + n + 1, column + x],
                factor,
                out[out_row + n : out_row + n + 1, out_column + x],
            )


def _move_one(source_1: Any, factor: Any, out_1: Any) -> None:
    """In kernels: ``move`` for one number."""
    raise NotImplementedError


@overload(_move_one)
def _moved_one(source_1, factor, out_1):
    if source_1.dtype == out_1.dtype:

        def copy(source_1, factor, out_1):
            stay_apart()  # otherwise the few left-over values become vector loops, six times the code
            out_1[0] = source_1[0]

        return copy

    def convert(source_1, factor, out_1):
        stay_apart()
        out_1[0] = narrow(widen(source_1[0]) * factor, out_1)

    return convert


def _scales(entries: Any) -> Any:
    """In kernels: views entries as float32, which includes their scales; ``NO_SCALES`` if entries
    are numbers.
    """
    raise NotImplementedError


@overload(_scales, inline="always")
def _as_scales(entries):
    if entries.dtype == types.uint8:
        return lambda entries: entries.view(np.float32)
    return lambda entries: NO_SCALES


def _halves(entries: Any) -> Any:
    """In kernels: views entries as bf16; entries of numbers have no tail and stay as they are."""
    raise NotImplementedError


@overload(_halves, inline="always")
def _as_halves(entries):
    if entries.dtype == types.uint8:
        return lambda entries: entries.view(np.uint16)
    return lambda entries: entries


@njit(cache=True, inline="always")
def _to_e4m3(value):
    """Rounds a float32 of at most 448 to the nearest e4m3, ties to even."""
    bits = np.float32(value).view(np.uint32)
    size = bits & np.uint32(0x7FFFFFFF)
    normal = (
        (size + np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)
    ) - np.uint32(120 << 3)
    # Values below 2^-6 come in steps of 2^-9.
    small = np.uint32(np.rint(np.uint32(size).view(np.float32) * np.float32(512)))
    low = small if size < np.uint32(0x3C800000) else normal
    return np.uint8(low | ((bits >> np.uint32(24)) & np.uint32(0x80)))


@inner(error_model="numpy")
def _write_group(x_D, out_D):
    """Writes a group and returns its scale."""
    largest = np.uint32(0)  # compared as bits: faster in vectors, and NaN is the largest
    for d in range(len(x_D)):
        largest = max(largest, np.uint32(np.float32(widen(x_D[d])).view(np.uint32) & np.uint32(0x7FFFFFFF)))
    scale = np.uint32(largest).view(np.float32) / _LARGEST
    scale = _LEAST_SCALE if scale < _LEAST_SCALE else scale
    for d in range(len(x_D)):
        out_D[d] = _to_e4m3(widen(x_D[d]) / scale)
    return scale


def write_head(x_D: Any, cache: Any, position: Any, head: Any, num_heads: Any) -> None:
    """In kernels: writes a head's keys or values to the entry at ``position`` of a cache [P, K, D]
    or [P, B].
    """
    raise NotImplementedError


@overload(write_head)
def _write_head(x_D, cache, position, head, num_heads):
    if cache.dtype == types.uint8:

        def write_bytes(x_D, cache, position, head, num_heads):
            dim = len(x_D)
            scales = cache.view(np.float32)
            scales[position, num_heads * dim // 4 + head] = _write_group(
                x_D, cache[position, head * dim : (head + 1) * dim]
            )

        return write_bytes

    return lambda x_D, cache, position, head, num_heads: _write_numbers(x_D, cache[position, head])


def write_latent(c_C: Any, k_E: Any, cache: Any, position: Any) -> None:
    """In kernels: writes a latent and a rotated part to the entry at ``position`` of a cache [P, Z]
    or [P, B].
    """
    raise NotImplementedError


@overload(write_latent)
def _write_latent(c_C, k_E, cache, position):
    if cache.dtype == types.uint8:

        def write_bytes(c_C, k_E, cache, position):
            scales = cache.view(np.float32)
            halves = cache.view(np.uint16)
            dim = len(c_C)
            for begin in range(0, dim, GROUP):
                end = min(begin + GROUP, dim)
                scales[position, dim // 4 + begin // GROUP] = _write_group(
                    c_C[begin:end], cache[position, begin:end]
                )
            _write_numbers(k_E, halves[position, halves.shape[1] - len(k_E) :])

        return write_bytes

    def write_numbers(c_C, k_E, cache, position):
        _write_numbers(c_C, cache[position, : len(c_C)])
        _write_numbers(k_E, cache[position, len(c_C) :])

    return write_numbers


@inner()
def _write_numbers(x_X, out_X):
    for x in range(len(x_X)):
        out_X[x] = narrow(widen(x_X[x]), out_X)
