"""Triton column of the indexer's ops. A kernel scores positions; choosing among scores is torch's.

A token that sees no more than ``top_k`` positions chooses all of them: a captured step does not
know lengths. Nothing is read back.

Roofline of the kernel: memory, one index key for each token and position (132 bytes in FP8).

T tokens  N tokens that choose  K = top_k  R rows
J index heads  I values of an index key  L positions that the page table has room for
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..formats.kv_format import INDEX_BLOCK_BYTES, INDEX_SCORE_BYTES
from ..reference.indexer import IndexNorm, best_positions, blocks_of
from ..reference.paged import PagedBatch, Selection
from ..reference.rope import Angles
from .attend_inputs import heads_of
from .rope import rotate_and_write_keys
from .target import check_dtype, interpreted, power_of_two

_BLOCK = 64  # positions of a program; not measured


def rotate_and_write_index(
    q_TJI: Tensor,
    k_TI: Tensor,
    norm: IndexNorm,
    angles: Angles,
    cache: Tensor,
    write_T: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Same as ``indexer.rotate_and_write_index``. A token with a negative place is not written."""
    return rotate_and_write_keys(q_TJI, norm.of(k_TI)[:, None], angles, cache, write_T, interleaved)


def select_positions(
    q_TJI: Tensor, weights_TJ: Tensor, cache: Tensor, batch: PagedBatch, top_k: int
) -> Selection | None:
    """Same as ``indexer.select_positions``, but decode rows always choose. Rows of several tokens
    do unless the host knows that all see ``top_k`` positions or fewer.
    """
    check_dtype(q_TJI, "select_positions: q")
    device, most = q_TJI.device, batch.pages_RP.shape[1] * batch.page_size
    if batch.lengths:
        most = min(most, max(batch.lengths))
    num_choosing = batch.num_decode if most <= top_k else len(q_TJI)
    if not num_choosing:
        return None
    tokens_T = torch.arange(len(q_TJI), device=device)
    ends_R, tokens_N = batch.query_start_R1[1:].long(), tokens_T[:num_choosing]
    rows_N = torch.searchsorted(ends_R, tokens_N, right=True).clamp_max(len(ends_R) - 1)
    seen_N = (batch.lengths_R[rows_N] - ends_R[rows_N] + tokens_N + 1).clamp_min(0)
    places = []
    for begin, end in blocks_of(0, num_choosing, INDEX_SCORE_BYTES * most, INDEX_BLOCK_BYTES):
        of_rows, seen = rows_N[begin:end], seen_N[begin:end]
        scores_NL = _scores(q_TJI[begin:end], weights_TJ[begin:end], cache, batch, (of_rows, seen), most)
        places.append(_places(best_positions(scores_NL, seen, top_k), batch, of_rows, top_k))
    rest = _extends(batch) if num_choosing < len(q_TJI) else None
    counts_N = seen_N.clamp_max(top_k).int()
    return Selection(tokens_N, torch.cat(places), counts_N, rest, tokens_T[num_choosing:])


def _places(chosen_NK: Tensor, batch: PagedBatch, rows_N: Tensor, top_k: int) -> Tensor:
    """The cache positions of positions in rows, as many for each token: attention over them is one
    kernel whatever their number.
    """
    pages_NK = batch.pages_RP[rows_N].long().gather(1, chosen_NK // batch.page_size)
    places_NK = pages_NK * batch.page_size + chosen_NK % batch.page_size
    return F.pad(places_NK, (0, top_k - places_NK.shape[1]))


def _extends(batch: PagedBatch) -> PagedBatch:
    """The rows of several tokens alone."""
    first = batch.num_decode
    return PagedBatch(
        num_decode=0,
        page_size=batch.page_size,
        query_start_R1=batch.query_start_R1[first:] - first,
        lengths_R=batch.lengths_R[first:],
        pages_RP=batch.pages_RP[first:],
        write_T=batch.write_T[first:],
        query_starts=tuple(start - first for start in batch.query_starts[first:]),
        lengths=batch.lengths[first:],
    )


def _scores(
    q_NJI: Tensor,
    weights_NJ: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    rows_and_seen: tuple[Tensor, Tensor],
    most: int,
) -> Tensor:
    """Float32 [N, L]; undefined at positions that a token does not see."""
    (num_tokens, num_heads, dim), keys = q_NJI.shape, heads_of(cache, q_NJI.shape[2])
    q_NJI = q_NJI.contiguous()
    weights_NJ = weights_NJ.float().contiguous()
    scores_NL = torch.empty(num_tokens, most, dtype=torch.float32, device=q_NJI.device)
    _scores_kernel[(num_tokens, triton.cdiv(most, _BLOCK))](
        q_NJI,
        weights_NJ,
        keys.values,
        keys.scales,
        scores_NL,
        *rows_and_seen,
        batch.pages_RP,
        most,
        keys.values.stride(0),
        keys.scales.stride(0),
        batch.pages_RP.stride(0),
        J=num_heads,
        J_PAD=max(16, power_of_two(num_heads)),
        DIM=dim,
        DIM_PAD=max(16, power_of_two(dim)),
        PAGE=batch.page_size,
        BLOCK=_BLOCK,
        EIGHT=bool(keys.group),
        WIDEN=interpreted(),
        num_warps=4,
    )
    return scores_NL


@triton.jit(do_not_specialize=["most", "pages_stride"])
def _scores_kernel(
    q_ptr,
    weights_ptr,
    keys_ptr,
    scales_ptr,
    scores_ptr,
    rows_ptr,
    seen_ptr,
    pages_ptr,
    most,
    key_stride,
    scale_stride,
    pages_stride,
    J: tl.constexpr,
    J_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    EIGHT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """The scores of a block of positions for one token. The scale of an eight-bit key is positive,
    so it multiplies the sum.
    """
    token = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = position < tl.minimum(tl.load(seen_ptr + token), most)
    pages_at = pages_ptr + tl.load(rows_ptr + token) * pages_stride
    place = tl.load(pages_at + position // PAGE, mask=inside, other=0).to(tl.int64) * PAGE + position % PAGE
    j = tl.arange(0, J_PAD)
    i = tl.arange(0, DIM_PAD)
    dtype: tl.constexpr = tl.float32 if WIDEN else q_ptr.dtype.element_ty
    q_mask = (j < J)[:, None] & (i < DIM)[None, :]
    q = tl.load(q_ptr + (token * J + j[:, None]) * DIM + i[None, :], mask=q_mask, other=0.0).to(dtype)
    key_mask = inside[:, None] & (i < DIM)[None, :]
    keys = tl.load(keys_ptr + place[:, None] * key_stride + i[None, :], mask=key_mask, other=0.0).to(dtype)
    products = tl.maximum(tl.dot(keys, tl.trans(q), input_precision="ieee"), 0.0)
    weights = tl.load(weights_ptr + token * J + j, mask=j < J, other=0.0)
    scores = tl.sum(products * weights[None, :], 1)
    if EIGHT:
        scores *= tl.load(scales_ptr + place * scale_stride, mask=inside, other=0.0)
    tl.store(scores_ptr + token * most + position, scores, mask=inside)
