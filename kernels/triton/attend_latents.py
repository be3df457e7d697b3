"""The kernel of attention over latents as they are: decode rows (split over the keys), and extends
of few queries.

A program takes a tile of (query token, head) pairs of one row and walks the pages of the row, as in
``attend``. A block of latents is read once, chunk by chunk: an eight-bit chunk is widened, and
serves as keys and then as values. So no more than a chunk lies in registers beside the sums, and 64
heads take a block of latents together. On sm_100 the sums of 64 heads fill the tensor memory
twice, as only half of its rows take 64 heads; turned they fill half of it.

T tokens  R rows  P positions  H heads  C latent dim  E rotated dims  S splits of a row's keys
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..formats.kv_format import GROUP
from ..reference.paged import PagedBatch
from .attend_inputs import Keys, Part, Queries
from .attend_steps import pages_of, place_of_tile, softmax_weights
from .target import interpreted, padded_rows, power_of_two
from .tiles import AttendTile


def launch_latents(
    queries: Queries, keys: Keys, batch: PagedBatch, scale: float, tile: AttendTile, part: Part
) -> None:
    """Attends the tiles of ``part``."""
    q0, q1, out = queries.q0_THC, queries.q1_THE, queries.out_THC
    latents, scales, rotated = keys.k0.values, keys.k0.scales, keys.k1_PKE
    assert q1 is not None and rotated is not None
    assert q0.stride(2) == q1.stride(2) == out.stride(2) == latents.stride(2) == rotated.stride(2) == 1
    (num_heads, dim), more = q0.shape[1:], q1.shape[2]
    chunk = min(tile.chunk, max(16, power_of_two(dim)))
    decode = part.first == 0 and part.rows == batch.num_decode
    _attend_latents_kernel[(part.tiles, 1, part.splits)](
        q0,
        q1,
        latents,
        scales,
        rotated,
        out,
        part.partial_THSC if part.partial_THSC is not None else out,
        part.logsum_THS if part.logsum_THS is not None else out,
        batch.query_start_R1,
        batch.lengths_R,
        batch.pages_RP,
        scale * 1.4426950408889634,  # log2(e)
        part.first,
        part.rows,
        part.splits,
        part.most_queries,
        q0.stride(0),
        q0.stride(1),
        q1.stride(0),
        q1.stride(1),
        out.stride(0),
        out.stride(1),
        latents.stride(0),
        rotated.stride(0),
        scales.stride(0),
        batch.pages_RP.stride(0),
        H=num_heads,
        C=dim,
        CHUNK=chunk,
        CHUNKS=triton.cdiv(dim, chunk),
        E=more,
        E_PAD=max(16, power_of_two(more)),
        GROUP=min(chunk, GROUP) if keys.k0.group else 0,
        TURNED=tile.turned,
        HOISTED=tile.hoisted,
        SERIAL=tile.serial,
        PAGE=batch.page_size,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        SPLIT=part.splits > 1,
        DECODE=decode,
        ROWS_PAD=1 if decode else padded_rows(part.rows),
        WIDEN=interpreted(),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_splits", "most_queries", "pages_stride"])
def _attend_latents_kernel(
    q0_ptr,
    q1_ptr,
    latents_ptr,
    scales_ptr,
    rotated_ptr,
    out_ptr,
    partial_ptr,
    logsum_ptr,
    query_start_ptr,
    lengths_ptr,
    pages_ptr,
    scale,
    first_row,
    num_rows,
    num_splits,
    most_queries,
    q0_stride_t,
    q0_stride_h,
    q1_stride_t,
    q1_stride_h,
    out_stride_t,
    out_stride_h,
    latents_stride_p,
    rotated_stride_p,
    scales_stride_p,
    pages_stride,
    H: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    TURNED: tl.constexpr,
    HOISTED: tl.constexpr,
    SERIAL: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of pairs, one split of the row's keys."""
    split = tl.program_id(2)
    row, tile_in_row, num_queries, first_token = place_of_tile(
        query_start_ptr, first_row, num_rows, H, BLOCK_M, ROWS_PAD, DECODE
    )
    if not DECODE:  # noqa: SIM102  # decided when it is compiled
        if (row >= first_row + num_rows) | (num_queries > most_queries):
            return
    length = tl.load(lengths_ptr + row)
    start = length - num_queries  # position of the row's first query

    pair = tile_in_row * BLOCK_M + tl.arange(0, BLOCK_M)
    if DECODE:
        query, head, live = pair * 0, pair, pair < H
    else:
        query, head, live = pair // H, pair % H, pair // H < num_queries
    position = tl.where(live, start + query, -1)
    token = first_token + query
    c = tl.arange(0, CHUNK)
    e = tl.arange(0, E_PAD)
    dtype: tl.constexpr = tl.float32 if WIDEN else q0_ptr.dtype.element_ty
    q0_at = q0_ptr + token[:, None] * q0_stride_t + head[:, None] * q0_stride_h + c[None, :]
    q0 = ()
    acc = ()
    for i in tl.static_range(CHUNKS):
        inside_c = live[:, None] & (i * CHUNK + c < C)[None, :]
        q0 = q0 + (tl.load(q0_at + i * CHUNK, mask=inside_c, other=0.0).to(dtype),)
        acc = acc + (_zeros(BLOCK_M, CHUNK, TURNED),)
    q1_at = q1_ptr + token[:, None] * q1_stride_t + head[:, None] * q1_stride_h + e[None, :]
    q1 = tl.load(q1_at, mask=live[:, None] & (e < E)[None, :], other=0.0).to(dtype)

    last_query = tl.minimum((tile_in_row * BLOCK_M + BLOCK_M - 1) // H, num_queries - 1)
    visible = start + last_query + 1  # keys that some pair of the tile may see
    per_split = tl.cdiv(tl.cdiv(visible, BLOCK_N), num_splits) * BLOCK_N
    key_begin = split * per_split
    key_end = tl.minimum(key_begin + per_split, visible)
    row_pages_ptr = pages_ptr + row.to(tl.int64) * pages_stride

    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Pages are looked up one block ahead. A lookup in the iteration that needs it would displace
    # the loads in flight.
    pages = pages_of(row_pages_ptr, key_begin, key_end, PAGE, BLOCK_N)
    for key_start in tl.range(
        key_begin, key_end, BLOCK_N, disable_licm=not HOISTED, disallow_acc_multi_buffer=SERIAL
    ):
        key = key_start + tl.arange(0, BLOCK_N)
        inside = key < key_end
        at = pages.to(tl.int64) * PAGE + key % PAGE
        pages = pages_of(row_pages_ptr, key_start + BLOCK_N, key_end, PAGE, BLOCK_N)
        k1_mask = inside[:, None] & (e < E)[None, :]
        k1 = tl.load(rotated_ptr + at[:, None] * rotated_stride_p + e[None, :], mask=k1_mask, other=0.0)
        scores = tl.dot(q1, tl.trans(k1.to(dtype)), input_precision="ieee")
        latents_at = latents_ptr + at * latents_stride_p
        scales_at = scales_ptr + at * scales_stride_p
        latents = ()
        for i in tl.static_range(CHUNKS):
            x = _load_chunk(latents_at, scales_at, inside, i, C, CHUNK, GROUP, BLOCK_N, dtype)
            scores = tl.dot(q0[i], tl.trans(x), scores, input_precision="ieee")
            latents = latents + (x,)
        if DECODE:  # a query sees all keys of its row
            seen = inside[None, :]
        else:
            seen = (key[None, :] <= position[:, None]) & inside[None, :]
        best, total, weights, shrink = softmax_weights(
            tl.where(seen, scores * scale, float("-inf")), best, total
        )
        weights = weights.to(dtype)
        grown = ()
        for i in tl.static_range(CHUNKS):
            grown = grown + (_add_values(weights, latents[i], acc[i], shrink, TURNED),)
        acc = grown

    divisor = tl.where(total == 0.0, 1.0, total)
    share = 1.0 / divisor
    slot = (token * H + head) * num_splits + split
    out_at = out_ptr + token[:, None] * out_stride_t + head[:, None] * out_stride_h + c[None, :]
    for i in tl.static_range(CHUNKS):
        out = (tl.trans(acc[i]) if TURNED else acc[i]) * share[:, None]
        inside_c = live[:, None] & (i * CHUNK + c < C)[None, :]
        if SPLIT:
            tl.store(partial_ptr + slot[:, None] * C + i * CHUNK + c[None, :], out, mask=inside_c)
        else:
            tl.store(out_at + i * CHUNK, out.to(out_ptr.dtype.element_ty), mask=inside_c)
    if SPLIT:
        logsum = tl.where(total == 0.0, float("-inf"), best + tl.log2(divisor))
        tl.store(logsum_ptr + slot, logsum, mask=live)


@triton.jit
def _zeros(M: tl.constexpr, CHUNK: tl.constexpr, TURNED: tl.constexpr):
    if TURNED:
        zeros = tl.zeros((CHUNK, M), tl.float32)
    else:
        zeros = tl.zeros((M, CHUNK), tl.float32)
    return zeros


@triton.jit
def _add_values(weights, x, acc, shrink, TURNED: tl.constexpr):
    """The values [N, CHUNK] weighted and added to the shrunk ``acc``, which is [CHUNK, M] if
    ``TURNED``: so the matrix units of sm_100 take 128 rows at once.
    """
    if TURNED:
        acc = tl.dot(tl.trans(x), tl.trans(weights), acc * shrink[None, :], input_precision="ieee")
    else:
        acc = tl.dot(weights, x, acc * shrink[:, None], input_precision="ieee")
    return acc


@triton.jit
def _load_chunk(
    at_N,
    scales_at_N,
    inside_N,
    i: tl.constexpr,
    C: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    N: tl.constexpr,
    dtype: tl.constexpr,
):
    """Loads chunk ``i`` [N, CHUNK] of the latents that begin at at_N, as ``dtype``. Eight-bit
    values are multiplied by their scales, one for each GROUP.
    """
    if GROUP == 0:
        c = i * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(at_N[:, None] + c[None, :], mask=inside_N[:, None] & (c < C)[None, :], other=0.0)
        x = x.to(dtype)
    else:
        g = tl.arange(0, CHUNK // GROUP)
        c = i * CHUNK + g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(
            at_N[:, None, None] + c[None, :, :], mask=inside_N[:, None, None] & (c < C)[None, :, :], other=0.0
        )
        first = i * (CHUNK // GROUP) + g
        mask = inside_N[:, None] & (first * GROUP < C)[None, :]
        scales = tl.load(scales_at_N[:, None] + first[None, :], mask=mask, other=0.0)
        x = tl.reshape((x.to(tl.float32) * scales[:, :, None]).to(dtype), (N, CHUNK))
    return x
