"""Triton column of ``rope``: rotation fused with the write to the paged cache.

Roofline: memory, each of q, k, v (or the latent) read once and written once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..formats.kv_format import num_groups
from ..reference.kv_entries import holds_fp8
from ..reference.rope import Angles, HeadNorms, split_heads
from .attend_inputs import heads_of, latents_of
from .fp8 import eight_bits, group_scales
from .norm import rms_norm
from .target import check_dtype, interpreted, power_of_two


def norm_rotate_and_write(
    qkv_TXD: Tensor,
    norms: HeadNorms | None,
    angles: Angles,
    cache: tuple[Tensor, Tensor],
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """Same as ``rope.norm_rotate_and_write``, in three launches: the norms are separate kernels."""
    q_THD, k_TKD, v_TKD = split_heads(qkv_TXD, cache[0])
    if norms is not None:
        q_THD = rms_norm(q_THD, norms.q_D, norms.eps)
        k_TKD = rms_norm(k_TKD, norms.k_D, norms.eps)
    return rotate_and_write(q_THD, k_TKD, v_TKD, angles, cache, write_T, interleaved)


def rotate_and_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    angles: Angles,
    cache: tuple[Tensor, Tensor],
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """Same as ``rope.rotate_and_write``. A token with a negative place is not written."""
    return _launch(q_THD, k_TKD, v_TKD, angles, cache, write_T, interleaved)


def rotate_and_write_keys(
    q_THD: Tensor, k_TKD: Tensor, angles: Angles, cache: Tensor, write_T: Tensor, interleaved: bool
) -> Tensor:
    """As ``rotate_and_write``, of keys that have no values."""
    return _launch(q_THD, k_TKD, None, angles, (cache, cache), write_T, interleaved)


def _launch(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor | None,
    angles: Angles,
    cache: tuple[Tensor, Tensor],
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    has_values = v_TKD is not None
    v_TKD = k_TKD if v_TKD is None else v_TKD
    check_dtype(q_THD, "rotate_and_write: q")
    num_tokens, num_heads, dim = q_THD.shape
    turned = 2 * angles.cos_T1F.shape[-1]
    assert turned <= dim, f"{turned} rotated dims of {dim}"
    out_THD = q_THD.new_empty(q_THD.shape)
    assert q_THD.stride(2) == k_TKD.stride(2) == v_TKD.stride(2) == 1 and k_TKD.shape == v_TKD.shape
    assert angles.cos_T1F.is_contiguous() and angles.sin_T1F.is_contiguous()
    assert all(part.is_contiguous() for part in cache)
    k_cache, v_cache = (heads_of(part, dim) for part in cache)
    num_kv_heads = k_TKD.shape[1]
    assert k_cache.values.shape[1] == num_kv_heads
    if num_tokens:
        _rotate_and_write_kernel[(num_tokens,)](
            q_THD,
            k_TKD,
            v_TKD,
            angles.cos_T1F,
            angles.sin_T1F,
            out_THD,
            k_cache.values,
            k_cache.scales,
            v_cache.values,
            v_cache.scales,
            write_T,
            k_cache.values.stride(0),
            k_cache.scales.stride(0),
            q_THD.stride(0),
            q_THD.stride(1),
            k_TKD.stride(0),
            k_TKD.stride(1),
            v_TKD.stride(0),
            v_TKD.stride(1),
            H=num_heads,
            H_PAD=power_of_two(num_heads),
            K=num_kv_heads,
            K_PAD=power_of_two(num_kv_heads),
            F=turned // 2,
            F_PAD=power_of_two(turned // 2),
            D=dim,
            D_PAD=power_of_two(dim),
            INTERLEAVED=interleaved,
            VALUES=has_values,
            EIGHT=holds_fp8(cache[0]),
            ROUND=interpreted(),
            num_warps=4,
        )
    return out_THD


def rotate_and_write_latent(
    q_rope_THD: Tensor,
    c_TC: Tensor,
    k_rope_TD: Tensor,
    angles: Angles,
    cache: Tensor,
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """Same as ``rope.rotate_and_write_latent``. A token with a negative place is not written."""
    check_dtype(q_rope_THD, "rotate_and_write_latent: q")
    num_tokens, num_heads, dim = q_rope_THD.shape
    out_THD = q_rope_THD.new_empty(q_rope_THD.shape)
    assert q_rope_THD.stride(2) == c_TC.stride(1) == k_rope_TD.stride(1) == 1
    assert angles.cos_T1F.is_contiguous() and angles.sin_T1F.is_contiguous() and cache.is_contiguous()
    latent_dim = c_TC.shape[1]
    entry = latents_of(cache, latent_dim)
    assert entry.k1_PKE is not None and entry.k1_PKE.shape[2] == dim
    if num_tokens:
        _rotate_and_write_latent_kernel[(num_tokens,)](
            q_rope_THD,
            c_TC,
            k_rope_TD,
            angles.cos_T1F,
            angles.sin_T1F,
            out_THD,
            entry.k0.values,
            entry.k0.scales,
            entry.k1_PKE,
            write_T,
            entry.k0.values.stride(0),
            entry.k0.scales.stride(0),
            entry.k1_PKE.stride(0),
            q_rope_THD.stride(0),
            q_rope_THD.stride(1),
            c_TC.stride(0),
            k_rope_TD.stride(0),
            H=num_heads,
            H_PAD=power_of_two(num_heads),
            C=latent_dim,
            C_GROUPS=num_groups(latent_dim),
            C_GROUPS_PAD=power_of_two(num_groups(latent_dim)),
            F=dim // 2,
            F_PAD=power_of_two(dim // 2),
            INTERLEAVED=interleaved,
            EIGHT=holds_fp8(cache),
            ROUND=interpreted(),
            num_warps=4,
        )
    return out_THD


@triton.jit
def _rotate(
    x_ptr,
    stride_h,
    cos,
    sin,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """First and second members [H_PAD, F_PAD] float32 of the rotated pairs of one token's heads,
    rounded to the dtype of x.
    """
    h = tl.arange(0, H_PAD)[:, None]
    f = tl.arange(0, F_PAD)[None, :]
    inside = (h < H) & (f < F)
    if INTERLEAVED:
        first = tl.load(x_ptr + h * stride_h + 2 * f, mask=inside, other=0.0)
        second = tl.load(x_ptr + h * stride_h + 2 * f + 1, mask=inside, other=0.0)
    else:
        first = tl.load(x_ptr + h * stride_h + f, mask=inside, other=0.0)
        second = tl.load(x_ptr + h * stride_h + F + f, mask=inside, other=0.0)
    dtype = x_ptr.dtype.element_ty
    first = first.to(tl.float32)
    second = second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _store_halves(
    out_ptr,
    first,
    second,
    heads,
    H_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    D: tl.constexpr,
):
    """Stores to the first 2F values of the rows of [heads, D], contiguous, in its dtype."""
    h = tl.arange(0, H_PAD)[:, None]
    f = tl.arange(0, F_PAD)[None, :]
    inside = (h < heads) & (f < F)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + h * D + f, first.to(dtype), mask=inside)
    tl.store(out_ptr + h * D + F + f, second.to(dtype), mask=inside)


@triton.jit
def _load_rest(
    x_ptr,
    stride_h,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    START: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Loads the values from START on of one token's heads, [H_PAD, D_PAD]; zeros before them."""
    h = tl.arange(0, H_PAD)[:, None]
    d = tl.arange(0, D_PAD)[None, :]
    return tl.load(x_ptr + h * stride_h + d, mask=(h < H) & (d >= START) & (d < D), other=0.0)


@triton.jit
def _store_rest(
    out_ptr,
    x,
    heads,
    H_PAD: tl.constexpr,
    START: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Stores the result of ``_load_rest`` to [heads, D], contiguous, in its dtype."""
    h = tl.arange(0, H_PAD)[:, None]
    d = tl.arange(0, D_PAD)[None, :]
    inside = (h < heads) & (d >= START) & (d < D)
    tl.store(out_ptr + h * D + d, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_cache_ptr,
    k_scales_ptr,
    v_cache_ptr,
    v_scales_ptr,
    write_ptr,
    cache_stride,
    scales_stride,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    VALUES: tl.constexpr,
    EIGHT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One token per program."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, F_PAD)[None, :]
    cos = tl.load(cos_ptr + token * F + f, mask=f < F, other=0.0)
    sin = tl.load(sin_ptr + token * F + f, mask=f < F, other=0.0)
    place = tl.load(write_ptr + token)
    first, second = _rotate(q_ptr + token * q_stride_t, q_stride_h, cos, sin, H, H_PAD, F, F_PAD, INTERLEAVED)
    _store_halves(out_ptr + token * (D * H), first, second, H, H_PAD, F, F_PAD, D)
    first, second = _rotate(k_ptr + token * k_stride_t, k_stride_h, cos, sin, K, K_PAD, F, F_PAD, INTERLEAVED)
    if VALUES:
        v = _load_rest(v_ptr + token * v_stride_t, v_stride_h, K, K_PAD, 0, D, D_PAD)
    if 2 * F < D:
        q_rest = _load_rest(q_ptr + token * q_stride_t, q_stride_h, H, H_PAD, 2 * F, D, D_PAD)
        _store_rest(out_ptr + token * (D * H), q_rest, H, H_PAD, 2 * F, D, D_PAD)
        k_rest = _load_rest(k_ptr + token * k_stride_t, k_stride_h, K, K_PAD, 2 * F, D, D_PAD)
    heads = tl.where(place >= 0, K, 0)
    k_at = k_cache_ptr + place * cache_stride
    v_at = v_cache_ptr + place * cache_stride
    if EIGHT:
        dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
        h = tl.arange(0, K_PAD)
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        scales = tl.maximum(group_scales(first), group_scales(second))  # one scale for all parts of a head
        if 2 * F < D:
            scales = tl.maximum(scales, group_scales(k_rest.to(tl.float32)))
            k_rest = eight_bits(k_rest.to(tl.float32) / scales[:, None], dtype, ROUND)
        first = eight_bits(first / scales[:, None], dtype, ROUND)
        second = eight_bits(second / scales[:, None], dtype, ROUND)
        tl.store(k_scales_ptr + place * scales_stride + h, scales, mask=h < heads)
        if VALUES:
            v = v.to(tl.float32)
            scales = group_scales(v)
            v = eight_bits(v / scales[:, None], dtype, ROUND)
            tl.store(v_scales_ptr + place * scales_stride + h, scales, mask=h < heads)
    _store_halves(k_at, first, second, heads, K_PAD, F, F_PAD, D)
    if 2 * F < D:
        _store_rest(k_at, k_rest, heads, K_PAD, 2 * F, D, D_PAD)
    if VALUES:
        _store_rest(v_at, v, heads, K_PAD, 0, D, D_PAD)


@triton.jit
def _rotate_and_write_latent_kernel(
    q_ptr,
    c_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    cache_ptr,
    scales_ptr,
    rotated_ptr,
    write_ptr,
    cache_stride,
    scales_stride,
    rotated_stride,
    q_stride_t,
    q_stride_h,
    c_stride_t,
    k_stride_t,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    C: tl.constexpr,
    C_GROUPS: tl.constexpr,
    C_GROUPS_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EIGHT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """One token per program."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, F_PAD)[None, :]
    cos = tl.load(cos_ptr + token * F + f, mask=f < F, other=0.0)
    sin = tl.load(sin_ptr + token * F + f, mask=f < F, other=0.0)
    place = tl.load(write_ptr + token)
    first, second = _rotate(q_ptr + token * q_stride_t, q_stride_h, cos, sin, H, H_PAD, F, F_PAD, INTERLEAVED)
    _store_halves(out_ptr + token * (2 * F * H), first, second, H, H_PAD, F, F_PAD, 2 * F)
    first, second = _rotate(k_ptr + token * k_stride_t, 0, cos, sin, 1, 1, F, F_PAD, INTERLEAVED)
    heads = tl.where(place >= 0, 1, 0)
    _store_halves(rotated_ptr + place * rotated_stride, first, second, heads, 1, F, F_PAD, 2 * F)
    g = tl.arange(0, C_GROUPS_PAD)
    c = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    latent = tl.load(c_ptr + token * c_stride_t + c, mask=c < C, other=0.0)
    if EIGHT:
        latent = latent.to(tl.float32)
        scales = group_scales(latent)
        latent = eight_bits(latent / scales[:, None], cache_ptr.dtype.element_ty, ROUND)
        tl.store(scales_ptr + place * scales_stride + g, scales, mask=g < C_GROUPS * heads)
    tl.store(
        cache_ptr + place * cache_stride + c,
        latent.to(cache_ptr.dtype.element_ty),
        mask=c < C * heads,
    )
