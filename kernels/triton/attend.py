"""The kernel behind both kinds of paged attention: decode rows (split over the keys), and extends
over a cached prefix.

A program takes a tile of (query token, head) pairs of one row that share a key head: the heads of a
group for decode rows, several tokens of them for extends. It walks the pages of its row and keeps a
running softmax, in base 2; eight-bit values are scaled as they are loaded. Blocks of keys that lie
before the windows of all its queries are passed over. A sink counts as a first key of value 0.
Lengths, page tables and the first token of each row are read on the device. Grids depend only on T,
R and the width of the page table.

T tokens  R rows  P positions  H query heads  K key heads  G = H / K  C dims of a head
S splits of a row's keys
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.attention import PLAIN_RULE, AttentionRule
from ..reference.paged import PagedBatch
from .attend_inputs import ANY_NUMBER, Keys, Part, Queries
from .attend_latents import launch_latents
from .attend_steps import pages_of, place_of_tile, softmax_step
from .target import interpreted, num_processors, padded_rows, power_of_two
from .tiles import AttendTile

_SPLITS = 16  # lanes for the splits of a row: one kernel for all numbers up to this
_KEYS_PER_SPLIT = 256  # smallest worthwhile split; not measured


def attend_decode(
    queries: Queries,
    keys: Keys,
    batch: PagedBatch,
    scale: float,
    tile: AttendTile,
    rule: AttentionRule = PLAIN_RULE,
) -> None:
    """Attends the first ``num_decode`` rows and tokens. R, K and the width of the page table set
    the number of splits that fill the device.
    """
    num_rows, num_heads, dim = batch.num_decode, queries.q0_THC.shape[1], queries.q0_THC.shape[2]
    if not num_rows:
        return
    kv_heads = keys.k0.values.shape[1]
    tiles = num_rows * triton.cdiv(num_heads // kv_heads, tile.queries)
    wanted = tile.programs * num_processors(queries.q0_THC.device) // (tiles * kv_heads)
    most_keys = batch.pages_RP.shape[1] * batch.page_size
    if rule.window:
        most_keys = min(most_keys, rule.window + tile.keys)
    splits = tile.splits or _num_splits(wanted, most_keys)
    if splits == 1:
        _launch(queries, keys, batch, scale, tile, Part(0, num_rows, tiles), rule)
        return
    partial_THSC = queries.q0_THC.new_empty(num_rows, num_heads, splits, dim, dtype=torch.float32)
    logsum_THS = queries.q0_THC.new_empty(num_rows, num_heads, splits, dtype=torch.float32)
    part = Part(0, num_rows, tiles, splits, partial_THSC, logsum_THS)
    _launch(queries, keys, batch, scale, tile, part, rule)
    out = queries.out_THC
    _join_kernel[(num_rows, num_heads)](
        partial_THSC,
        logsum_THS,
        out,
        out.stride(0),
        out.stride(1),
        splits,
        H=num_heads,
        C=dim,
        C_PAD=power_of_two(dim),
        SPLITS_PAD=max(_SPLITS, power_of_two(splits)),
        num_warps=4,
    )


def attend_extend(
    queries: Queries,
    keys: Keys,
    batch: PagedBatch,
    scale: float,
    tile: AttendTile,
    rule: AttentionRule = PLAIN_RULE,
    most_queries: int = ANY_NUMBER,
) -> None:
    """Attends the rows after ``num_decode`` that have at most ``most_queries`` tokens; leaves other
    rows alone.
    """
    num_tokens = len(queries.q0_THC) - batch.num_decode
    num_rows = len(batch.lengths_R) - batch.num_decode
    if num_tokens <= 0 or not num_rows:
        return
    group = queries.q0_THC.shape[1] // keys.k0.values.shape[1]
    tiles = num_tokens * group // tile.queries + num_rows  # every row may end with a partial tile
    part = Part(batch.num_decode, num_rows, tiles, most_queries=most_queries)
    _launch(queries, keys, batch, scale, tile, part, rule)


def _num_splits(wanted: int, max_keys: int) -> int:
    """Fixed by the shapes of a captured step, independent of lengths."""
    return max(1, min(wanted, max_keys // _KEYS_PER_SPLIT, 64))


def _launch(
    queries: Queries,
    keys: Keys,
    batch: PagedBatch,
    scale: float,
    tile: AttendTile,
    part: Part,
    rule: AttentionRule,
) -> None:
    if queries.q1_THE is not None:
        assert rule.plain
        launch_latents(queries, keys, batch, scale, tile, part)
        return
    q, out, k, v = queries.q0_THC, queries.out_THC, keys.k0.values, keys.v.values
    assert q.stride(2) == out.stride(2) == k.stride(2) == v.stride(2) == 1
    assert keys.k0.group == keys.v.group and keys.k0.scales.stride(0) == keys.v.scales.stride(0)
    kv_heads, dim = k.shape[1], q.shape[2]
    decode = part.first == 0 and part.rows == batch.num_decode
    _attend_kernel[(part.tiles, kv_heads, part.splits)](
        q,
        k,
        keys.k0.scales,
        v,
        keys.v.scales,
        out,
        part.partial_THSC if part.partial_THSC is not None else out,
        part.logsum_THS if part.logsum_THS is not None else out,
        rule.sinks_H if rule.sinks_H is not None else out,
        batch.query_start_R1,
        batch.lengths_R,
        batch.pages_RP,
        scale * 1.4426950408889634,  # log2(e)
        part.first,
        part.rows,
        part.splits,
        part.most_queries,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.k0.scales.stride(0),
        batch.pages_RP.stride(0),
        G=q.shape[1] // kv_heads,
        C=dim,
        C_PAD=max(16, power_of_two(dim)),
        GROUP=max(16, keys.k0.group) if keys.k0.group else 0,
        PAGE=batch.page_size,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        SPLIT=part.splits > 1,
        DECODE=decode,
        ROWS_PAD=1 if decode else padded_rows(part.rows),
        WIDEN=interpreted(),
        WINDOW=rule.window,
        SINKS=rule.sinks_H is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_splits", "most_queries", "pages_stride"])
def _attend_kernel(
    q_ptr,
    k_ptr,
    k_scales_ptr,
    v_ptr,
    v_scales_ptr,
    out_ptr,
    partial_ptr,
    logsum_ptr,
    sinks_ptr,
    query_start_ptr,
    lengths_ptr,
    pages_ptr,
    scale,
    first_row,
    num_rows,
    num_splits,
    most_queries,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    k_stride_p,
    k_stride_h,
    v_stride_p,
    v_stride_h,
    scales_stride_p,
    pages_stride,
    G: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    WIDEN: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One tile of pairs, one key head, one split of the row's keys."""
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row, tile_in_row, num_queries, first_token = place_of_tile(
        query_start_ptr, first_row, num_rows, G, BLOCK_M, ROWS_PAD, DECODE
    )
    if not DECODE:  # noqa: SIM102  # decided when it is compiled
        if (row >= first_row + num_rows) | (num_queries > most_queries):
            return
    length = tl.load(lengths_ptr + row)
    start = length - num_queries  # position of the row's first query

    pair = tile_in_row * BLOCK_M + tl.arange(0, BLOCK_M)
    query = pair // G
    live = query < num_queries
    position = tl.where(live, start + query, -1)
    token = first_token + query
    head = kv_head * G + pair % G
    c = tl.arange(0, C_PAD)
    q_mask = live[:, None] & (c < C)[None, :]
    q = tl.load(
        q_ptr + token[:, None] * q_stride_t + head[:, None] * q_stride_h + c[None, :],
        mask=q_mask,
        other=0.0,
    )
    dtype: tl.constexpr = tl.float32 if WIDEN else q_ptr.dtype.element_ty
    q = q.to(dtype)

    last_query = tl.minimum((tile_in_row * BLOCK_M + BLOCK_M - 1) // G, num_queries - 1)
    visible = start + last_query + 1  # keys that some pair of the tile may see
    if WINDOW > 0:
        first_seen = tl.maximum(start + tile_in_row * BLOCK_M // G + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    else:
        first_seen = 0
    per_split = tl.cdiv(tl.cdiv(visible - first_seen, BLOCK_N), num_splits) * BLOCK_N
    key_begin = first_seen + split * per_split
    key_end = tl.minimum(key_begin + per_split, visible)
    row_pages_ptr = pages_ptr + row.to(tl.int64) * pages_stride

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINKS and split == 0:
        best = tl.load(sinks_ptr + head) * 1.4426950408889634
        total += 1.0
    acc = tl.zeros((BLOCK_M, C_PAD), tl.float32)
    # Pages are looked up one block ahead. A lookup in the iteration that needs it would displace
    # the loads in flight.
    pages = pages_of(row_pages_ptr, key_begin, key_end, PAGE, BLOCK_N)
    for key_start in range(key_begin, key_end, BLOCK_N):
        key = key_start + tl.arange(0, BLOCK_N)
        inside = key < key_end
        at = pages.to(tl.int64) * PAGE + key % PAGE
        pages = pages_of(row_pages_ptr, key_start + BLOCK_N, key_end, PAGE, BLOCK_N)
        k_scales_at = k_scales_ptr + at * scales_stride_p
        v_scales_at = v_scales_ptr + at * scales_stride_p
        k = _load_values(
            k_ptr + at * k_stride_p + kv_head * k_stride_h,
            k_scales_at,
            kv_head,
            inside,
            C,
            C_PAD,
            GROUP,
            BLOCK_N,
            dtype,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = _load_values(
            v_ptr + at * v_stride_p + kv_head * v_stride_h,
            v_scales_at,
            kv_head,
            inside,
            C,
            C_PAD,
            GROUP,
            BLOCK_N,
            dtype,
        )
        seen = (key[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        best, total, acc = softmax_step(
            tl.where(seen, scores * scale, float("-inf")), v, best, total, acc, dtype
        )

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLIT:
        slot = (token * (G * tl.num_programs(1)) + head) * num_splits + split
        tl.store(partial_ptr + slot[:, None] * C + c[None, :], out, mask=q_mask)
        logsum = tl.where(total == 0.0, float("-inf"), best + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(logsum_ptr + slot, logsum, mask=live)
    else:
        out_at = out_ptr + token[:, None] * out_stride_t + head[:, None] * out_stride_h + c[None, :]
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _load_values(
    at_N,
    scales_at_N,
    kv_head,
    inside_N,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads [N, C_PAD] as ``dtype`` from entries that begin at at_N. Eight-bit values are
    multiplied by their scales, C / GROUP per head.
    """
    if GROUP == 0:
        c = tl.arange(0, C_PAD)
        if C == C_PAD:
            values = tl.load(at_N[:, None] + c[None, :], mask=inside_N[:, None], other=0.0).to(dtype)
        else:
            values = tl.load(
                at_N[:, None] + c[None, :], mask=inside_N[:, None] & (c < C)[None, :], other=0.0
            ).to(dtype)
    else:
        GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
        g = tl.arange(0, C_PAD // GROUP)
        c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(
            at_N[:, None, None] + c[None, :, :], mask=inside_N[:, None, None] & (c < C)[None, :, :], other=0.0
        )
        scales_mask = inside_N[:, None] & (g < GROUPS)[None, :]
        scales = tl.load(scales_at_N[:, None] + kv_head * GROUPS + g[None, :], mask=scales_mask, other=0.0)
        values = tl.reshape((x.to(tl.float32) * scales[:, :, None]).to(dtype), (N, C_PAD))
    return values


@triton.jit(do_not_specialize=["num_splits"])
def _join_kernel(
    partial_ptr,
    logsum_ptr,
    out_ptr,
    out_stride_t,
    out_stride_h,
    num_splits,
    H: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """One (token, head): adds its splits weighted by their shares, in the order of splits, whatever
    order the device ran them in.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    s = tl.arange(0, SPLITS_PAD)
    c = tl.arange(0, C_PAD)
    slot = (token * H + head) * num_splits
    logsum = tl.load(logsum_ptr + slot + s, mask=s < num_splits, other=float("-inf"))
    best = tl.max(logsum, 0)
    share = tl.exp2(logsum - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(share, 0)
    inside = (s < num_splits)[:, None] & (c < C)[None, :]
    partial = tl.load(partial_ptr + (slot + s)[:, None] * C + c[None, :], mask=inside, other=0.0)
    out = tl.sum(partial * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + token * out_stride_t + head * out_stride_h + c, out.to(out_ptr.dtype.element_ty), mask=c < C
    )
