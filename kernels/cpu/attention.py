"""Compiled attention on a CPU. Reads pages in place and handles decode rows and extends alike.

Work is cut into items. An item of a decode row covers the query heads of some key heads over up to
512 positions. An item of an extend covers the query heads of one key head, for a block of queries,
over every position they see. Items begin with the first block of 64 that a window touches: blocks
before are not read. The order of each sum is independent of how heads are cut, so a row's result
depends neither on its neighbours nor on the number of threads.

Measured with 16 query and 4 key heads of 64 in bf16 on 2 cores of an EPYC Turin: 8 decode rows of
320 positions take 65 us from the cache and 150 us from memory (60 us to read alone); 8 prompts of
256 run at 400 GFLOP/s, one of 2,048 at 650, where oneDNN's products reach 970.

T tokens  R rows  H query heads  K key/value heads  G = H / K  D, E dims of keys and values
I items  S parts of split rows, one head each
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from .. import cpu_isa
from ..reference import attention
from ..reference.attention import PLAIN_RULE, AttentionRule
from ..reference.kv_entries import holds_fp8, num_kv_heads
from ..reference.paged import PagedBatch
from .codegen.arrays import array, computes, inner, made
from .codegen.crew import num_threads
from .codegen.threads import share_out
from .flash import BLOCK, attend_rows, place_queries, scratch, tiled
from .kv_entries import NO_SCALES, Place, Run, move_rows, place_of_heads
from .views import rows_of

_SPLIT = 512  # positions of a decode row in one item
# rows of an extend's item: they share one layout of the keys, and their sums stay in the L2 cache
_ROWS = 512 if cpu_isa.here() == "amx" else 256
_ITEMS = 8  # per thread when rows are few, so that threads share evenly
_LAYING_OUT = 16  # cost of laying out a position, in rows of products with it

ALL = 1 << 40  # a window beyond any length
_LOG2_E = np.float32(1 / math.log(2))

_BF16, _FLOAT32 = np.empty(0, np.uint16), np.empty(0, np.float32)
NO_SINKS = _FLOAT32


class Shape(NamedTuple):
    """K, number of decode rows, page size, number of threads, positions that a query sees."""

    num_heads: int
    num_decode: int
    page_size: int
    num_threads: int
    window: int = ALL


class Softmax(NamedTuple):
    """The scale of scores, and the logit of each query head's sink; empty: there are none."""

    scale: float
    sinks_H: NDArray[np.float32] = NO_SINKS


class Item(NamedTuple):
    """A row, its key heads [head, end_head), and ``num_tokens`` queries from ``token`` on. The
    queries end at position ``end`` and attend to positions [begin, end). ``part`` numbers the first
    part of a split row; it is -1 for a row that is not split. A query sees the last ``window``
    positions up to its own, counted from ``end`` where the row goes on.
    """

    row: int
    head: int
    end_head: int
    token: int
    num_tokens: int
    begin: int
    end: Any
    part: int
    window: Any


def attend(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    rule: AttentionRule = PLAIN_RULE,
) -> Tensor:
    """Same as ``attention.attend``. Softmax weights are rounded to bf16 unless queries or cache are
    float32.
    """
    dim = q_THD.shape[2]
    if not (
        computes(q_THD.dtype)
        and (holds_fp8(k_cache) or computes(k_cache.dtype))
        and k_cache.dtype == v_cache.dtype
    ):
        return attention.attend(q_THD, k_cache, v_cache, batch, scale, rule)
    out_THD, bits = made(q_THD.shape, q_THD.dtype)
    num_heads, place = num_kv_heads(k_cache, dim), place_of_heads(k_cache, dim)
    window, sinks_H = reach_of(rule)
    shape = Shape(num_heads, batch.num_decode, batch.page_size, num_threads(), window)
    attend_places(
        q_THD, (k_cache, v_cache), (place, place), rows_of(batch), shape, Softmax(scale, sinks_H), bits
    )
    return out_THD


def reach_of(rule: AttentionRule) -> tuple[int, NDArray[np.float32]]:
    """A rule as kernels read it: its window, and sinks, none if empty."""
    return rule.window or ALL, NO_SINKS if rule.sinks_H is None else array(rule.sinks_H)


def attend_places(
    q_THD: Tensor,
    caches: tuple[Tensor, Tensor],
    places: tuple[Place, Place],
    rows: Any,
    shape: Shape,
    softmax: Softmax,
    out_THE: NDArray[Any],
) -> None:
    """Attention over heads of keys and values at ``places`` in cache entries of one dtype. ``rows``
    is ``views.rows_of``.
    """
    halves = q_THD.dtype == torch.bfloat16 and caches[0].dtype != torch.float32
    like, factor = _BF16 if halves else _FLOAT32, softmax.scale / math.log(2)
    attend_heads(
        array(q_THD),
        array(caches[0]),
        array(caches[1]),
        *places,
        rows,
        shape,
        factor,
        like,
        out_THE,
        softmax.sinks_H,
    )


@njit(cache=True)
def attend_heads(q_THD, keys, values, key_place, value_place, rows, shape, factor, like, out_THE, sinks_H):
    group = q_THD.shape[1] // shape.num_heads
    items, num_parts = _items(rows[0], rows[1], shape, group)
    bounds = _bounds(items, group, shape.num_threads, like)
    sums_SGE, stats_2SG = (
        np.empty((num_parts, group, out_THE.shape[2]), np.float32),
        np.empty((2, num_parts, group), np.float32),
    )
    pages_RP, keys, values, factor = (
        rows[2],
        keys.reshape(len(keys), -1),
        values.reshape(len(values), -1),
        np.float32(factor),
    )
    work = items, bounds, sums_SGE, stats_2SG, sinks_H
    given = q_THD, keys, values, key_place, value_place, pages_RP, shape, factor, like, work, out_THE
    share_out(_attend, shape.num_threads, given, False)
    if num_parts:
        share_out(_join, out_THE.shape[1], (items, sums_SGE, stats_2SG, sinks_H, factor, out_THE), False)


@inner()
def _items(starts_R1, lengths_R, shape, group):
    """Returns the items, int64 [I, 9], and the number of parts."""
    block = max(1, _ROWS // group)
    cuts = min(shape.num_heads, -(-_ITEMS * shape.num_threads // max(shape.num_decode, 1)))
    most = 0
    for row in range(len(lengths_R)):
        if row < shape.num_decode:
            most += cuts * -(-lengths_R[row] // _SPLIT)
        else:
            most += shape.num_heads * -(-(starts_R1[row + 1] - starts_R1[row]) // block)
    items, num, part = np.empty((most, 9), np.int64), 0, 0
    for row in range(len(lengths_R)):
        length = np.int64(lengths_R[row])
        first_seen = _block_before(length - shape.window)
        if row < shape.num_decode:
            for cut in range(cuts):
                head, end_head = cut * shape.num_heads // cuts, (cut + 1) * shape.num_heads // cuts
                for begin in range(first_seen, length, _SPLIT):
                    end, own = min(begin + _SPLIT, length), part if length - first_seen > _SPLIT else -1
                    rest = length - begin - _SPLIT
                    window = shape.window - (rest if rest > 0 else 0)
                    _put(Item(row, head, end_head, row, 1, begin, end, own, window), items[num])
                    part += end_head - head if length - first_seen > _SPLIT else 0
                    num += 1
        else:
            first, end = np.int64(starts_R1[row]), np.int64(starts_R1[row + 1])
            for head in range(shape.num_heads):
                for token in range(first, end, block):
                    num_tokens, position = min(block, end - token), length - end + token
                    begin = _block_before(position + 1 - shape.window)
                    item = Item(
                        row, head, head + 1, token, num_tokens, begin, position + num_tokens, -1, shape.window
                    )
                    _put(item, items[num])
                    num += 1
    return items[:num], part


@inner()
def _block_before(position):
    """The first position of the block that holds ``position``, or 0: blocks of whole pages are read
    in place.
    """
    return max(0, position) // BLOCK * BLOCK


@inner()
def _put(item, x_9):
    """Stores value by value. Assigning a whole row would compile numba's error texts too, which
    takes seconds.
    """
    x_9[0], x_9[1], x_9[2], x_9[3] = item.row, item.head, item.end_head, item.token
    x_9[4], x_9[5], x_9[6], x_9[7] = item.num_tokens, item.begin, item.end, item.part
    x_9[8] = item.window


@inner()
def _item(x_9):
    return Item(x_9[0], x_9[1], x_9[2], x_9[3], x_9[4], x_9[5], x_9[6], x_9[7], x_9[8])


@inner()
def _bounds(items, group, num_threads, like):
    """Bounds of each thread's items, int64 [threads + 1], for costs as equal as possible."""
    costs, total = np.empty(len(items), np.float64), 0.0
    for i in range(len(items)):
        item = _item(items[i])
        length, seen = item.end - item.begin, item.end - item.begin - (item.num_tokens - 1) / 2
        costs[i] = (item.end_head - item.head) * (
            length * _LAYING_OUT + seen * tiled(item.num_tokens * group, like) + BLOCK
        )
        total += costs[i]
    bounds, thread, done = np.empty(num_threads + 1, np.int64), 0, 0.0
    for i in range(len(items)):
        while thread <= num_threads and done + costs[i] / 2 >= total / num_threads * thread:
            bounds[thread] = i
            thread += 1
        done += costs[i]
    bounds[thread:] = len(items)
    return bounds


@inner()
def _attend(
    begin, end, q_THD, keys, values, key_place, value_place, pages_RP, shape, factor, like, work, out_THE
):
    """Computes the items of threads [begin, end)."""
    items, bounds, sums_SGE, stats_2SG, sinks_H = work
    group, num_rows = q_THD.shape[1] // shape.num_heads, 0
    for i in range(bounds[begin], bounds[end]):
        item = _item(items[i])
        num_rows = max(num_rows, (item.end_head - item.head) * tiled(item.num_tokens * group, like))
    if not num_rows:
        return
    room = scratch(num_rows, q_THD.shape[2], out_THE.shape[2], like)
    for i in range(bounds[begin], bounds[end]):
        item, then = _item(items[i]), _item(items[min(i + 1, bounds[end] - 1)])
        if then.head != item.head:
            then = item  # other heads: nothing to fetch
        heads = item.head, item.end_head
        place_queries(q_THD, item.token, item.num_tokens, heads, group, room)
        attend_rows(
            room,
            item.num_tokens,
            group,
            keys,
            values,
            key_place,
            value_place,
            heads,
            _run(item, pages_RP, shape),
            _run(then, pages_RP, shape),
            factor,
            item.window,
        )
        for head in range(item.head, item.end_head):
            first, part = (
                (head - item.head) * tiled(item.num_tokens * group, like),
                item.part + head - item.head,
            )
            sums, total = room.sums[first:, : out_THE.shape[2]], room.total[first:]
            if item.part < 0:
                if len(sinks_H):
                    sinks_G = sinks_H[head * group : (head + 1) * group]
                    _add_sinks(total, room.best[first:], item.num_tokens, sinks_G, factor)
                _store(
                    sums,
                    total,
                    out_THE[item.token : item.token + item.num_tokens, head * group : (head + 1) * group],
                )
            else:
                _keep(sums, room.best[first:], total, sums_SGE[part], stats_2SG[:, part])


@inner()
def _run(item, pages_RP, shape):
    return Run(pages_RP[item.row], shape.page_size, item.begin, item.end)


@inner()
def _add_sinks(total, best, num_tokens, sinks_G, factor):
    """Adds the shares of sinks to the sums of shares."""
    group = len(sinks_G)
    for row in range(num_tokens * group):
        total[row] += np.exp2(sinks_G[row % group] * _LOG2_E - best[row] * factor)


@inner()
def _store(sums, total, out_TGE):
    group = out_TGE.shape[1]
    for row in range(len(out_TGE) * group):
        share = np.float32(1) / total[row]
        for e in range(sums.shape[1]):
            sums[row, e] *= share
    for t in range(len(out_TGE)):
        move_rows(sums, t * group, 0, sums.shape[1], NO_SCALES, 0, out_TGE[t], 0, 0, group)


@inner()
def _keep(sums, best, total, sums_GE, stats_2G):
    """Stores a part of a split row."""
    for g in range(len(sums_GE)):
        stats_2G[0, g], stats_2G[1, g] = best[g], total[g]
        for e in range(sums_GE.shape[1]):
            sums_GE[g, e] = sums[g, e]


@inner()
def _join(first_head, end_head, items, sums_SGE, stats_2SG, sinks_H, factor, out_THE):
    """Joins the parts of split rows, for query heads [first_head, end_head)."""
    group, first = sums_SGE.shape[1], 0
    while first < len(items):
        item, end = _item(items[first]), first + 1
        while (
            end < len(items) and items[end, 0] == item.row and items[end, 1] == item.head and item.part >= 0
        ):
            end += 1
        if item.part >= 0:
            step, out_HE = item.end_head - item.head, out_THE[item.token]
            for head in range(item.head, item.end_head):
                parts = slice(item.part + head - item.head, item.part + (end - first) * step, step)
                for g in range(group):
                    if first_head <= head * group + g < end_head:
                        sums_SE = sums_SGE[parts, g]
                        sink = sinks_H[head * group + g] if len(sinks_H) else np.float32(-np.inf)
                        _join_parts(sums_SE, stats_2SG[0, parts, g], stats_2SG[1, parts, g], factor, sink)
                        move_rows(
                            sums_SE, 0, 0, out_HE.shape[1], NO_SCALES, 0, out_HE, head * group + g, 0, 1
                        )
        first = end


@inner(error_model="numpy")
def _join_parts(sums_SE, best_S, total_S, factor, sink):
    """Joins all parts into the first."""
    best = best_S[0]
    for s in range(1, len(best_S)):
        best = max(best, best_S[s])
    total = np.exp2(sink * _LOG2_E - best * factor)
    for s in range(len(sums_SE)):
        share = np.exp2((best_S[s] - best) * factor)
        total += total_S[s] * share
        if s:
            for e in range(sums_SE.shape[1]):
                sums_SE[0, e] += sums_SE[s, e] * share
        else:
            for e in range(sums_SE.shape[1]):
                sums_SE[0, e] *= share
    share = np.float32(1) / total
    for e in range(sums_SE.shape[1]):
        sums_SE[0, e] *= share
