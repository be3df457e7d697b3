"""Latent attention over expanded keys and values, for rows with many queries: the materialised form
of ``mla``.

The latents of a row are expanded window by window into a workspace of fixed size; each window is
attended before the next is expanded. The device reads which rows take part, where they begin and
end, and how many windows are in use. The host knows a bound on the number of windows, and programs
without work exit at once. Rows lie one after another in the windows, each starting at a whole
block.

Rooflines, both compute: expansion 2 C P flops per key and head, attention 2 (N + E + V) per query,
key and head.

T tokens  R rows  H heads  N unrotated dims  E rotated dims  V value dims  C latent dim  P = N + V
W keys of a window
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.paged import PagedBatch
from .attend_inputs import Keys
from .attend_steps import row_of_tile, softmax_step
from .target import interpreted, padded_rows, power_of_two
from .tiles import Tiles

_BLOCK = 64  # keys expanded together; windows and rows begin at multiples of it
_MOST_WINDOWS = 32  # more launches than this are not worth a captured step


@dataclass(frozen=True)
class Heads:
    """The attention's inputs and output: q_nope_THN, q_rope_THE, the weights that expand a latent,
    and out_THV. Only the last stride is fixed.
    """

    q_nope_THN: Tensor
    q_rope_THE: Tensor
    expand_HPC: Tensor
    out_THV: Tensor


def break_even(nope: int, rope: int, value: int, latent: int) -> int:
    """Largest number of queries per row for which latents as they are cost fewer operations than
    expanded ones.
    """
    absorbed = 2 * latent + rope
    expanded = nope + rope + value
    return 2**31 - 1 if absorbed <= expanded else latent * (nope + value) // (absorbed - expanded)


@dataclass(frozen=True)
class Windows:
    """``count`` windows of ``keys`` each, for the rows with more than ``most_absorbed`` queries."""

    count: int
    keys: int
    most_absorbed: int


def plan_windows(batch: PagedBatch, num_tokens: int, most_absorbed: int, keys: int) -> Windows | None:
    """Enough windows of at most ``keys`` for any rows the device may find. The bound comes from the
    lengths if the host knows them, else from shapes. None if no row can have that many queries, or
    if so many windows might be needed that latents are better attended as they are.
    """
    if batch.lengths:
        extends = range(batch.num_decode, len(batch.lengths))
        bounds = [batch.lengths[row] for row in extends if _num_queries(batch, row) > most_absorbed]
    else:
        rows = min(
            len(batch.lengths_R) - batch.num_decode, (num_tokens - batch.num_decode) // (most_absorbed + 1)
        )
        bounds = [batch.pages_RP.shape[1] * batch.page_size] * rows
    needed = sum(triton.cdiv(bound, _BLOCK) * _BLOCK for bound in bounds)
    keys = min(keys, needed)
    return (
        Windows(triton.cdiv(needed, keys), keys, most_absorbed)
        if 0 < needed <= keys * _MOST_WINDOWS
        else None
    )


def all_expanded(batch: PagedBatch, most_absorbed: int) -> bool:
    """Whether the host knows that every row is attended in expanded form."""
    rows = range(len(batch.lengths))
    return (
        bool(rows) and not batch.num_decode and all(_num_queries(batch, row) > most_absorbed for row in rows)
    )


def _num_queries(batch: PagedBatch, row: int) -> int:
    return batch.query_starts[row + 1] - batch.query_starts[row]


def window_keys(num_bytes: int, expand_HPC: Tensor) -> int:
    """Number of keys of a window that takes about ``num_bytes``."""
    return max(1, num_bytes // (expand_HPC[:, :, 0].numel() * expand_HPC.element_size() * _BLOCK)) * _BLOCK


def attend_expanded(
    heads: Heads, latents: Keys, batch: PagedBatch, scale: float, tiles: Tiles, windows: Windows
) -> None:
    """Attends the rows after ``num_decode`` with more than ``windows.most_absorbed`` queries."""
    tile, expand, num_keys = tiles.prefill, tiles.expand, windows.keys
    q_THN, out = heads.q_nope_THN, heads.out_THV
    num_tokens, num_heads, nope = q_THN.shape
    rope, value, latent = heads.q_rope_THE.shape[2], out.shape[2], heads.expand_HPC.shape[2]
    columns = min(expand.columns, max(16, power_of_two(nope + value)))
    num_rows = len(batch.lengths_R) - batch.num_decode
    assert latents.k1_PKE is not None and heads.expand_HPC.is_contiguous()
    kv_WHP = q_THN.new_empty(num_keys, num_heads, nope + value)
    rope_WE = q_THN.new_empty(num_keys, rope)
    # Kept between windows: a query's partial output, and the logarithm of its weight.
    several = windows.count > 1
    partial_THV = q_THN.new_empty(num_tokens, num_heads, value, dtype=torch.float32) if several else out
    logsum_TH = q_THN.new_empty(num_tokens, num_heads, dtype=torch.float32) if several else out
    rows = (batch.query_start_R1, batch.lengths_R, batch.num_decode, num_rows, windows.most_absorbed)
    for window in range(windows.count):
        _expand_kernel[(num_keys // _BLOCK, num_heads * triton.cdiv(nope + value, columns))](
            latents.k0.values,
            latents.k0.scales,
            latents.k1_PKE,
            heads.expand_HPC,
            kv_WHP,
            rope_WE,
            *rows,
            batch.pages_RP,
            window * num_keys,
            latents.k0.values.stride(0),
            latents.k0.scales.stride(0),
            latents.k1_PKE.stride(0),
            batch.pages_RP.stride(0),
            H=num_heads,
            P=nope + value,
            C=latent,
            E=rope,
            E_PAD=power_of_two(rope),
            GROUP=latents.k0.group,
            PAGE=batch.page_size,
            BLOCK_N=_BLOCK,
            BLOCK_P=columns,
            BLOCK_C=min(expand.depth, max(16, power_of_two(latent))),
            ROWS_PAD=padded_rows(num_rows),
            WIDEN=interpreted(),
            num_warps=expand.warps,
            num_stages=expand.stages,
        )
        _attend_window_kernel[((num_tokens - batch.num_decode) // tile.queries + num_rows, num_heads)](
            q_THN,
            heads.q_rope_THE,
            kv_WHP,
            rope_WE,
            out,
            partial_THV,
            logsum_TH,
            *rows,
            window * num_keys,
            num_keys,
            scale * 1.4426950408889634,  # log2(e)
            *q_THN.stride()[:2],
            *heads.q_rope_THE.stride()[:2],
            *out.stride()[:2],
            H=num_heads,
            N=nope,
            N_PAD=max(16, power_of_two(nope)),
            E=rope,
            E_PAD=max(16, power_of_two(rope)),
            V=value,
            V_PAD=max(16, power_of_two(value)),
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            ROW_BLOCK=_BLOCK,
            SEVERAL=several,
            ROWS_PAD=padded_rows(num_rows),
            HOISTED=tile.hoisted,
            WIDEN=interpreted(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


@triton.jit
def _places_of_rows(
    query_start_ptr,
    lengths_ptr,
    first_row,
    num_rows,
    most_absorbed,
    BLOCK: tl.constexpr,
    ROWS_PAD: tl.constexpr,
):
    """[ROWS_PAD] for the rows from ``first_row`` on: each row's first block, counted over all
    windows, and its number of blocks.
    """
    r = tl.arange(0, ROWS_PAD)
    begins = tl.load(query_start_ptr + first_row + r, mask=r < num_rows, other=0)
    ends = tl.load(query_start_ptr + first_row + r + 1, mask=r < num_rows, other=0)
    lengths = tl.load(lengths_ptr + first_row + r, mask=r < num_rows, other=0)
    blocks = tl.where(ends - begins > most_absorbed, (lengths + BLOCK - 1) // BLOCK, 0).to(tl.int32)
    return tl.cumsum(blocks, 0) - blocks, blocks


@triton.jit(do_not_specialize=["first_row", "num_rows", "most_absorbed", "window_start", "pages_stride"])
def _expand_kernel(
    latents_ptr,
    scales_ptr,
    rotated_ptr,
    expand_ptr,
    kv_ptr,
    rope_ptr,
    query_start_ptr,
    lengths_ptr,
    first_row,
    num_rows,
    most_absorbed,
    pages_ptr,
    window_start,
    latents_stride,
    scales_stride,
    rotated_stride,
    pages_stride,
    H: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One block of keys, one head, BLOCK_P of its P values. The first of these programs also copies
    the rotated part.
    """
    here = tl.program_id(0)
    part = tl.program_id(1)
    block = window_start // BLOCK_N + here
    first_blocks, blocks = _places_of_rows(
        query_start_ptr, lengths_ptr, first_row, num_rows, most_absorbed, BLOCK_N, ROWS_PAD
    )
    if block >= tl.sum(blocks, 0):
        return
    mine = (block >= first_blocks) & (block < first_blocks + blocks)
    row = first_row + tl.sum(tl.where(mine, tl.arange(0, ROWS_PAD), 0), 0)
    n = tl.arange(0, BLOCK_N)
    key = (block - tl.sum(tl.where(mine, first_blocks, 0), 0)) * BLOCK_N + n
    inside = key < tl.load(lengths_ptr + row)
    page = tl.load(pages_ptr + row.to(tl.int64) * pages_stride + key // PAGE, mask=inside, other=0).to(
        tl.int64
    )
    at = page * PAGE + key % PAGE
    to = (here * BLOCK_N + n).to(tl.int64)

    head = part // tl.cdiv(P, BLOCK_P)
    p = part % tl.cdiv(P, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    dtype: tl.constexpr = tl.float32 if WIDEN else kv_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        x = tl.load(
            latents_ptr + at[:, None] * latents_stride + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
        if GROUP > 0:  # the loaded values share a scale
            scales = tl.load(scales_ptr + at * scales_stride + start // GROUP, mask=inside, other=0.0)
            x = x.to(tl.float32) * scales[:, None]
        weights_at = expand_ptr + (head.to(tl.int64) * P + p)[None, :] * C + c[:, None]
        w = tl.load(weights_at, mask=(p < P)[None, :] & (c < C)[:, None], other=0.0)
        acc = tl.dot(x.to(kv_ptr.dtype.element_ty).to(dtype), w.to(dtype), acc, input_precision="ieee")
    tl.store(
        kv_ptr + (to[:, None] * H + head) * P + p[None, :],
        acc.to(kv_ptr.dtype.element_ty),
        mask=(p < P)[None, :],
    )
    if part == 0:
        e = tl.arange(0, E_PAD)
        rotated = tl.load(
            rotated_ptr + at[:, None] * rotated_stride + e[None, :],
            mask=inside[:, None] & (e < E)[None, :],
            other=0.0,
        )
        tl.store(
            rope_ptr + to[:, None] * E + e[None, :],
            rotated.to(rope_ptr.dtype.element_ty),
            mask=(e < E)[None, :],
        )


@triton.jit(do_not_specialize=["first_row", "num_rows", "most_absorbed", "window_start", "window_keys"])
def _attend_window_kernel(
    q0_ptr,
    q1_ptr,
    kv_ptr,
    rope_ptr,
    out_ptr,
    partial_ptr,
    logsum_ptr,
    query_start_ptr,
    lengths_ptr,
    first_row,
    num_rows,
    most_absorbed,
    window_start,
    window_keys,
    scale,
    q0_stride_t,
    q0_stride_h,
    q1_stride_t,
    q1_stride_h,
    out_stride_t,
    out_stride_h,
    H: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SEVERAL: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    HOISTED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of a row's queries, one head, the row's keys in this window."""
    # The last tiles of a row see the most keys and are started first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row, tile_in_row, num_queries, first_token = row_of_tile(
        query_start_ptr + first_row, tile, num_rows, 1, BLOCK_M, ROWS_PAD
    )
    if (row >= num_rows) | (num_queries <= most_absorbed):
        return
    first_blocks, _ = _places_of_rows(
        query_start_ptr, lengths_ptr, first_row, num_rows, most_absorbed, ROW_BLOCK, ROWS_PAD
    )
    # Place of the row's first key, relative to the start of the window.
    origin = tl.sum(tl.where(tl.arange(0, ROWS_PAD) == row, first_blocks, 0), 0) * ROW_BLOCK - window_start
    start = tl.load(lengths_ptr + first_row + row) - num_queries
    query = tile_in_row * BLOCK_M + tl.arange(0, BLOCK_M)
    live = query < num_queries
    # Keys that some query of the tile may see.
    visible = start + tl.minimum(tile_in_row * BLOCK_M + BLOCK_M, num_queries)
    key_begin = tl.maximum(0, -origin)
    key_end = tl.minimum(visible, window_keys - origin)
    if key_begin >= key_end:
        return

    token = first_token + query
    n = tl.arange(0, N_PAD)
    e = tl.arange(0, E_PAD)
    v = tl.arange(0, V_PAD)
    dtype: tl.constexpr = tl.float32 if WIDEN else q0_ptr.dtype.element_ty
    q0_at = q0_ptr + token[:, None] * q0_stride_t + head * q0_stride_h + n[None, :]
    q0 = tl.load(q0_at, mask=live[:, None] & (n < N)[None, :], other=0.0).to(dtype)
    q1_at = q1_ptr + token[:, None] * q1_stride_t + head * q1_stride_h + e[None, :]
    q1 = tl.load(q1_at, mask=live[:, None] & (e < E)[None, :], other=0.0).to(dtype)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, V_PAD), tl.float32)
    out_mask = live[:, None] & (v < V)[None, :]
    slot = token * H + head
    if SEVERAL:  # noqa: SIM102, since the compiler must not see both conditions at once
        if key_begin > 0:
            best = tl.load(logsum_ptr + slot, mask=live, other=float("-inf"))
            total = tl.where(live, 1.0, total)
            acc = tl.load(partial_ptr + slot[:, None] * V + v[None, :], mask=out_mask, other=0.0)

    kv_ptr += head * (N + V)
    # Up to here every query sees every key, so nothing is masked.
    whole_end = (
        key_begin
        + tl.maximum(tl.minimum(key_end, start + tile_in_row * BLOCK_M + 1) - key_begin, 0)
        // BLOCK_N
        * BLOCK_N
    )
    for key_start in tl.range(key_begin, whole_end, BLOCK_N, disable_licm=not HOISTED):
        at = (origin + key_start + tl.arange(0, BLOCK_N)).to(tl.int64)
        keys, more, values = _load_block(
            kv_ptr, rope_ptr, at, at >= 0, H, N, N_PAD, E, E_PAD, V, V_PAD, dtype
        )
        scores = tl.dot(
            q1, tl.trans(more), tl.dot(q0, tl.trans(keys), input_precision="ieee"), input_precision="ieee"
        )
        best, total, acc = softmax_step(scores * scale, values, best, total, acc, dtype)
    for key_start in tl.range(whole_end, key_end, BLOCK_N, disable_licm=not HOISTED):
        key = key_start + tl.arange(0, BLOCK_N)
        at = (origin + key).to(tl.int64)
        keys, more, values = _load_block(
            kv_ptr, rope_ptr, at, key < key_end, H, N, N_PAD, E, E_PAD, V, V_PAD, dtype
        )
        scores = tl.dot(
            q1, tl.trans(more), tl.dot(q0, tl.trans(keys), input_precision="ieee"), input_precision="ieee"
        )
        seen = (key[None, :] <= (start + query)[:, None]) & (live[:, None] & (key < key_end)[None, :])
        best, total, acc = softmax_step(
            tl.where(seen, scores * scale, float("-inf")), values, best, total, acc, dtype
        )

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SEVERAL:  # noqa: SIM102
        if key_end < visible:
            tl.store(partial_ptr + slot[:, None] * V + v[None, :], acc, mask=out_mask)
            logsum = tl.where(total == 0.0, float("-inf"), best + tl.log2(tl.where(total == 0.0, 1.0, total)))
            tl.store(logsum_ptr + slot, logsum, mask=live)
            return
    out_at = out_ptr + token[:, None] * out_stride_t + head * out_stride_h + v[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def _load_block(
    kv_ptr,
    rope_ptr,
    at,
    inside,
    H: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads keys, their rotated parts and values at places of the window."""
    n = tl.arange(0, N_PAD)
    e = tl.arange(0, E_PAD)
    v = tl.arange(0, V_PAD)
    keys_at = kv_ptr + at[:, None] * (H * (N + V))
    keys = tl.load(keys_at + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0).to(dtype)
    more = tl.load(
        rope_ptr + at[:, None] * E + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0
    ).to(dtype)
    values = tl.load(keys_at + N + v[None, :], mask=inside[:, None] & (v < V)[None, :], other=0.0).to(dtype)
    return keys, more, values
