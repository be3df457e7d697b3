"""Triton column of ``experts``: a grouped product with SwiGLU in its epilogue, a second one that
scatters back to pairs, and the ordered sum.

Two launches follow the grouping. ``_up_kernel`` gathers rows of x by pair and writes the activation
in grouped order; ``_down_kernel`` writes every pair's row of y. Programs of blocks without a
slot exit at once, so grids are bounds known to the host. Rooflines: up to some 64 tokens the
weights of the slots hit, 6 D F bytes each in bf16, against memory bandwidth; at thousands of tokens
6 D F flops per pair against the matmul rate. ``weighted_sum`` reads K rows and writes 1 row per
token.

The sum over k is a separate pass in the order of k and in float32. Atomic adds from
``_down_kernel`` would save a read of y, but their order changes from run to run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..reference.experts import PLAIN_FORM, ExpertForm
from .grouping import group_pairs
from .target import check_dtype, interpreted, power_of_two
from .tiles import DEFAULT, ExpertTile, ProductTile, Tiles


def experts_with(tiles: Tiles) -> Callable[..., Tensor]:
    """``experts`` with these tiles."""

    def experts(
        x_ND: Tensor,
        rows_M: Tensor,
        slots_M: Tensor,
        w13_SFD: Tensor,
        w2_SDF: Tensor,
        counts_S: Tensor,
        form: ExpertForm = PLAIN_FORM,
    ) -> Tensor:
        """Same as ``experts.experts``, for x and weights of one dtype. The host reads nothing."""
        tile = tiles.of_experts(len(slots_M), len(w13_SFD))
        return experts_tiled(x_ND, (rows_M, slots_M), (w13_SFD, w2_SDF), counts_S, tile, form)

    return experts


experts = experts_with(DEFAULT)


def experts_tiled(
    x_ND: Tensor,
    pairs: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    counts_S: Tensor,
    tile: ExpertTile,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """``experts`` with ``pairs`` (rows_M, slots_M), ``weights`` (w13_SFD, w2_SDF) and a tile."""
    (rows_M, slots_M), (w13_SFD, w2_SDF) = pairs, weights
    check_dtype(x_ND, "experts: x")
    assert x_ND.dtype == w13_SFD.dtype == w2_SDF.dtype and x_ND.stride(1) == 1
    assert w13_SFD.is_contiguous() and w2_SDF.is_contiguous()
    hidden, width = w2_SDF.shape[1:]
    grouping = group_pairs(slots_M, counts_S, tile.rows)
    num_blocks = len(grouping.slot_of_block_B)
    y_MD = x_ND.new_empty(len(slots_M), hidden)
    if not num_blocks:
        return y_MD
    h_PF = x_ND.new_empty(num_blocks * tile.rows, width)
    _up_kernel[(num_blocks * triton.cdiv(width, tile.up.columns),)](
        x_ND,
        x_ND.stride(0),
        rows_M,
        grouping.pair_of_place_P,
        grouping.slot_of_block_B,
        w13_SFD,
        form.biases[0] if form.biases is not None else w13_SFD,
        h_PF,
        num_blocks,
        D=hidden,
        F=width,
        EVEN_K=hidden % tile.up.depth == 0,
        EVEN_N=width % tile.up.columns == 0,
        **form_options(form),
        **_options(tile.rows, tile.up),
    )
    _down_kernel[(num_blocks * triton.cdiv(hidden, tile.down.columns),)](
        h_PF,
        grouping.pair_of_place_P,
        grouping.slot_of_block_B,
        w2_SDF,
        form.biases[1] if form.biases is not None else w2_SDF,
        y_MD,
        num_blocks,
        D=hidden,
        F=width,
        EVEN_K=width % tile.down.depth == 0,
        EVEN_N=hidden % tile.down.columns == 0,
        BIASED=form.biases is not None,
        **_options(tile.rows, tile.down),
    )
    return y_MD


def form_options(form: ExpertForm) -> dict[str, bool | float]:
    """Options of a first product."""
    activation = form.activation
    return {
        "BIASED": form.biases is not None,
        "CLAMPED": activation.kind == "clamped",
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
    }


def _options(rows: int, tile: ProductTile) -> dict[str, Any]:
    return {
        "BLOCK_M": rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "WIDEN": interpreted(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Same as ``experts.weighted_sum``. Rows of ``out_TD`` without any weight cost nothing: one
    card of a rack sums for few of the tokens that it has room for.
    """
    check_dtype(y_TKD, "weighted_sum: y")
    assert y_TKD.is_contiguous() and weights_TK.is_contiguous()
    num_tokens, top_k, hidden = y_TKD.shape
    sum_TD = y_TKD.new_empty(num_tokens, hidden) if out_TD is None else out_TD
    assert sum_TD.stride(1) == 1
    if num_tokens:
        columns = min(1024, power_of_two(hidden))
        _weighted_sum_kernel[(num_tokens, triton.cdiv(hidden, columns))](
            y_TKD,
            weights_TK,
            sum_TD,
            sum_TD.stride(0),
            hidden,
            K=top_k,
            K_PAD=power_of_two(top_k),
            COLUMNS=columns,
            SPARSE=out_TD is not None,
            num_warps=4,
        )
    return sum_TD


@triton.jit
def block_and_tile(num_blocks, num_tiles, GROUP: tl.constexpr):
    """Assigns blocks and tiles to programs. Concurrent programs share weight tiles among GROUP
    neighbouring blocks, which mostly use the same slot.
    """
    pid = tl.program_id(0)
    per_group = GROUP * num_tiles
    first = (pid // per_group) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


@triton.jit
def biases_of(bias_at, n, N: tl.constexpr):
    """Biases of columns n, float32 [1, BLOCK_N]."""
    return tl.load(bias_at + n, mask=n < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def activated(gate, up, CLAMPED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """``Activation`` of both."""
    if CLAMPED:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        h = gate / (1.0 + tl.exp(-ALPHA * gate)) * up
    else:
        h = gate / (1.0 + tl.exp(-gate)) * up
    return h


@triton.jit(do_not_specialize=["num_blocks"])
def _up_kernel(
    x_ptr,
    x_stride,
    rows_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    w13_ptr,
    bias_ptr,
    h_ptr,
    num_blocks,
    D: tl.constexpr,
    F: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """h[place] = activation(x w_gate^T, x w_up^T) for one block and BLOCK_N columns of F."""
    block, tile = block_and_tile(num_blocks, tl.cdiv(F, BLOCK_N), 8)
    slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
    if slot < 0:
        return
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pair_of_place_ptr + place)
    real = pair >= 0
    row = tl.load(rows_ptr + pair, mask=real, other=0)
    f = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + row[:, None] * x_stride + k[None, :]
    gate_at = w13_ptr + slot * (2 * F * D) + f[None, :].to(tl.int64) * D + k[:, None]
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        if EVEN_K and EVEN_N:
            x = tl.load(x_at + start, mask=real[:, None], other=0.0)
            w_gate = tl.load(gate_at + start)
            w_up = tl.load(gate_at + F * D + start)
        elif EVEN_K:
            x = tl.load(x_at + start, mask=real[:, None], other=0.0)
            w_gate = tl.load(gate_at + start, mask=(f < F)[None, :], other=0.0)
            w_up = tl.load(gate_at + F * D + start, mask=(f < F)[None, :], other=0.0)
        else:
            inside = start + k < D
            x = tl.load(x_at + start, mask=real[:, None] & inside[None, :], other=0.0)
            w_gate = tl.load(gate_at + start, mask=(f < F)[None, :] & inside[:, None], other=0.0)
            w_up = tl.load(gate_at + F * D + start, mask=(f < F)[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            w_gate = w_gate.to(tl.float32)
            w_up = w_up.to(tl.float32)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    if BIASED:
        gate += biases_of(bias_ptr + slot * (2 * F), f, F)
        up += biases_of(bias_ptr + slot * (2 * F) + F, f, F)
    h = activated(gate, up, CLAMPED, ALPHA, LIMIT)
    tl.store(h_ptr + place[:, None] * F + f[None, :], h.to(h_ptr.dtype.element_ty), mask=(f < F)[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def _down_kernel(
    h_ptr,
    pair_of_place_ptr,
    slot_of_block_ptr,
    w2_ptr,
    bias_ptr,
    y_ptr,
    num_blocks,
    D: tl.constexpr,
    F: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    BIASED: tl.constexpr,
):
    """y[pair] = h w2^T for one block and BLOCK_N columns of D."""
    block, tile = block_and_tile(num_blocks, tl.cdiv(D, BLOCK_N), 8)
    slot = tl.load(slot_of_block_ptr + block).to(tl.int64)
    if slot < 0:
        return
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    pair = tl.load(pair_of_place_ptr + place).to(tl.int64)
    d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    h_at = h_ptr + place[:, None] * F + k[None, :]
    w_at = w2_ptr + slot * (D * F) + d[None, :].to(tl.int64) * F + k[:, None]
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, F, BLOCK_K):
        if EVEN_K and EVEN_N:
            h = tl.load(h_at + start)
            w = tl.load(w_at + start)
        elif EVEN_K:
            h = tl.load(h_at + start)
            w = tl.load(w_at + start, mask=(d < D)[None, :], other=0.0)
        else:
            inside = start + k < F
            h = tl.load(h_at + start, mask=inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=(d < D)[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        y = tl.dot(h, w, y, input_precision="ieee")
    if BIASED:
        y += biases_of(bias_ptr + slot * D, d, D)
    tl.store(
        y_ptr + pair[:, None] * D + d[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(pair >= 0)[:, None] & (d < D)[None, :],
    )


@triton.jit
def _weighted_sum_kernel(
    y_ptr,
    weights_ptr,
    out_ptr,
    out_stride,
    D,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPARSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if SPARSE:
        k = tl.arange(0, K_PAD)
        weights = tl.load(weights_ptr + token * K + k, mask=k < K, other=0.0)
        if tl.sum((weights != 0.0).to(tl.int32), 0) == 0:
            return
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + token * K + k)
        ends = tl.where(weight == 0.0, 0, D)
        total += tl.load(y_ptr + (token * K + k) * D + d, mask=d < ends, other=0.0).to(tl.float32) * weight
    tl.store(out_ptr + token * out_stride + d, total.to(out_ptr.dtype.element_ty), mask=d < D)
