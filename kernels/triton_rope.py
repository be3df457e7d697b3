"""Triton column of ``rope``: rotation fused with the write to the paged cache.

Roofline: memory, each of q, k, v (or the latent) read once and written once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rope import Angles
from .triton_target import check_dtype, power_of_two


def rotate_and_write(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, angles: Angles, cache: tuple[Tensor, Tensor], write_T: Tensor, interleaved: bool
) -> Tensor:
    """As ``rope.rotate_and_write``; a token whose place is negative is not written."""
    check_dtype(q_THD, "rotate_and_write: q")
    num_tokens, num_heads, dim = q_THD.shape
    out_THD = q_THD.new_empty(q_THD.shape)
    assert q_THD.stride(2) == k_TKD.stride(2) == v_TKD.stride(2) == 1 and k_TKD.shape == v_TKD.shape
    assert angles.cos_T1F.is_contiguous() and angles.sin_T1F.is_contiguous()
    assert all(part.is_contiguous() for part in cache)
    if num_tokens:
        num_kv_heads = k_TKD.shape[1]
        _rotate_and_write_kernel[(num_tokens,)](
            q_THD,
            k_TKD,
            v_TKD,
            angles.cos_T1F,
            angles.sin_T1F,
            out_THD,
            cache[0],
            cache[1],
            write_T,
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
            F=dim // 2,
            F_PAD=power_of_two(dim // 2),
            INTERLEAVED=interleaved,
            num_warps=4,
        )
    return out_THD


def rotate_and_write_latent(
    q_rope_THD: Tensor, c_TC: Tensor, k_rope_TD: Tensor, angles: Angles, cache_Z: Tensor, write_T: Tensor, interleaved: bool
) -> Tensor:
    """As ``rope.rotate_and_write_latent``; a token whose place is negative is not written."""
    check_dtype(q_rope_THD, "rotate_and_write_latent: q")
    num_tokens, num_heads, dim = q_rope_THD.shape
    out_THD = q_rope_THD.new_empty(q_rope_THD.shape)
    assert q_rope_THD.stride(2) == c_TC.stride(1) == k_rope_TD.stride(1) == 1
    assert angles.cos_T1F.is_contiguous() and angles.sin_T1F.is_contiguous() and cache_Z.is_contiguous()
    if num_tokens:
        _rotate_and_write_latent_kernel[(num_tokens,)](
            q_rope_THD,
            c_TC,
            k_rope_TD,
            angles.cos_T1F,
            angles.sin_T1F,
            out_THD,
            cache_Z,
            write_T,
            q_rope_THD.stride(0),
            q_rope_THD.stride(1),
            c_TC.stride(0),
            k_rope_TD.stride(0),
            H=num_heads,
            H_PAD=power_of_two(num_heads),
            C=c_TC.shape[1],
            C_PAD=power_of_two(c_TC.shape[1]),
            F=dim // 2,
            F_PAD=power_of_two(dim // 2),
            INTERLEAVED=interleaved,
            num_warps=4,
        )
    return out_THD


@triton.jit
def _rotate(
    x_ptr, stride_h, cos, sin, H: tl.constexpr, H_PAD: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """First and second members [H_PAD, F_PAD] float32 of the rotated pairs of one token's heads, rounded to the dtype of x."""
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
    first, second = first.to(tl.float32), second.to(tl.float32)
    return (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)


@triton.jit
def _store_halves(out_ptr, first, second, H: tl.constexpr, H_PAD: tl.constexpr, F: tl.constexpr, F_PAD: tl.constexpr, wanted):
    """To [H, 2F], contiguous, in its dtype."""
    h = tl.arange(0, H_PAD)[:, None]
    f = tl.arange(0, F_PAD)[None, :]
    inside = (h < H) & (f < F) & wanted
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + h * (2 * F) + f, first.to(dtype), mask=inside)
    tl.store(out_ptr + h * (2 * F) + F + f, second.to(dtype), mask=inside)


@triton.jit
def _rotate_and_write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    write_ptr,
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
    INTERLEAVED: tl.constexpr,
):
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, F_PAD)[None, :]
    cos = tl.load(cos_ptr + token * F + f, mask=f < F, other=0.0)
    sin = tl.load(sin_ptr + token * F + f, mask=f < F, other=0.0)
    place = tl.load(write_ptr + token)
    first, second = _rotate(q_ptr + token * q_stride_t, q_stride_h, cos, sin, H, H_PAD, F, F_PAD, INTERLEAVED)
    _store_halves(out_ptr + token * (2 * F * H), first, second, H, H_PAD, F, F_PAD, place == place)
    first, second = _rotate(k_ptr + token * k_stride_t, k_stride_h, cos, sin, K, K_PAD, F, F_PAD, INTERLEAVED)
    _store_halves(k_cache_ptr + place * (2 * F * K), first, second, K, K_PAD, F, F_PAD, place >= 0)
    h = tl.arange(0, K_PAD)[:, None]
    d = tl.arange(0, 2 * F_PAD)[None, :]
    v = tl.load(v_ptr + token * v_stride_t + h * v_stride_h + d, mask=(h < K) & (d < 2 * F), other=0.0)
    v = v.to(v_cache_ptr.dtype.element_ty)
    tl.store(v_cache_ptr + place * (2 * F * K) + h * (2 * F) + d, v, mask=(h < K) & (d < 2 * F) & (place >= 0))


@triton.jit
def _rotate_and_write_latent_kernel(
    q_ptr,
    c_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    cache_ptr,
    write_ptr,
    q_stride_t,
    q_stride_h,
    c_stride_t,
    k_stride_t,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    F: tl.constexpr,
    F_PAD: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, F_PAD)[None, :]
    cos = tl.load(cos_ptr + token * F + f, mask=f < F, other=0.0)
    sin = tl.load(sin_ptr + token * F + f, mask=f < F, other=0.0)
    place = tl.load(write_ptr + token)
    first, second = _rotate(q_ptr + token * q_stride_t, q_stride_h, cos, sin, H, H_PAD, F, F_PAD, INTERLEAVED)
    _store_halves(out_ptr + token * (2 * F * H), first, second, H, H_PAD, F, F_PAD, place == place)
    entry = cache_ptr + place * (C + 2 * F)
    first, second = _rotate(k_ptr + token * k_stride_t, 0, cos, sin, 1, 1, F, F_PAD, INTERLEAVED)
    _store_halves(entry + C, first, second, 1, 1, F, F_PAD, place >= 0)
    c = tl.arange(0, C_PAD)
    latent = tl.load(c_ptr + token * c_stride_t + c, mask=c < C, other=0.0)
    tl.store(entry + c, latent.to(cache_ptr.dtype.element_ty), mask=(c < C) & (place >= 0))
