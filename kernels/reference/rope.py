"""Rotary position embedding (arXiv 2104.09864) and its stretched frequencies (YaRN, arXiv
2309.00071).

Angles and rotation are float32: in bf16 the angle of a position past 256 would already be off by
whole steps.

T tokens  H heads  K key/value heads  D head dim, all rotated unless said otherwise
F = D / 2 frequencies  C latent dim  Z = C + D
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .kv_entries import num_kv_heads, write_heads, write_latents
from .norm import rms_norm


@dataclass(frozen=True, eq=False)
class Angles:
    """The rotations of a step's tokens, broadcast over heads. cos_T1F, sin_T1F: float32 [T, 1,
    F]. growth_T1: float32 [T, 1], factors of queries, where they depend on the position.
    """

    cos_T1F: Tensor
    sin_T1F: Tensor
    growth_T1: Tensor | None = None


@dataclass(frozen=True)
class HeadNorms:
    """Weights [D] of the RMS norms over each head of queries and of keys."""

    q_D: Tensor
    k_D: Tensor
    eps: float


def frequencies(dim: int, theta: float) -> Tensor:
    """Radians per position of each pair of dims: float32 [dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(
    dim: int,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """``frequencies`` for a context ``factor`` times ``original_length``: float32 [dim / 2].

    Pairs that turn more than ``beta_fast`` times over the original length keep their frequency.
    Those that turn less than ``beta_slow`` times are slowed by ``factor``. A ramp joins the two;
    ``truncate`` rounds the ramp's ends outwards.
    """

    def pair_of(turns: float) -> float:
        return dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_of(beta_fast)
    high = pair_of(beta_slow)
    if truncate:
        low = float(math.floor(low))
        high = float(math.ceil(high))
    low = max(low, 0.0)
    high = min(high, dim - 1.0)
    ramp_F = (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    slowed_F = ramp_F.clamp(0, 1)
    plain_F = frequencies(dim, theta)
    return plain_F / factor * slowed_F + plain_F * (1 - slowed_F)


def angles(positions_T: Tensor, frequencies_F: Tensor, magnitude: float = 1.0) -> Angles:
    """Angles of positions_T int64; ``magnitude`` multiplies cos and sin."""
    turn_T1F = (positions_T.float()[:, None] * frequencies_F)[:, None, :]
    cos_T1F = turn_T1F.cos()
    sin_T1F = turn_T1F.sin()
    return Angles(cos_T1F * magnitude, sin_T1F * magnitude) if magnitude != 1.0 else Angles(cos_T1F, sin_T1F)


def query_growth(positions_T: Tensor, beta: float, length: int) -> Tensor:
    """Factors of queries at positions_T int64: 1 + beta * log(1 + floor(p / length)), float32 [T,
    1].
    """
    return 1.0 + beta * torch.log1p((positions_T // length).float())[:, None]


def rotate_halves(x_THD: Tensor, angles: Angles) -> Tensor:
    """Rotates the pairs (i, i + D/2) of x_THD. Returns float32 [T, H, D]."""
    low_THF, high_THF = x_THD.float().chunk(2, -1)
    cos, sin = angles.cos_T1F, angles.sin_T1F
    return torch.cat(
        [torch.addcmul(low_THF * cos, high_THF, sin, value=-1), torch.addcmul(high_THF * cos, low_THF, sin)],
        -1,
    )


def rotate_pairs(x_THD: Tensor, angles: Angles) -> Tensor:
    """Rotates the pairs (2i, 2i + 1) of x_THD. Returns float32 [T, H, D] with first members first,
    so queries and keys must both be rotated here.
    """
    even_THF, odd_THF = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos_T1F, angles.sin_T1F
    return torch.cat(
        [torch.addcmul(even_THF * cos, odd_THF, sin, value=-1), torch.addcmul(odd_THF * cos, even_THF, sin)],
        -1,
    )


def norm_rotate_and_write(
    qkv_TXD: Tensor,
    norms: HeadNorms | None,
    angles: Angles,
    cache: tuple[Tensor, Tensor],
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """``rotate_and_write`` of X = H + 2 K heads (queries, keys, values), after optional norms."""
    q_THD, k_TKD, v_TKD = split_heads(qkv_TXD, cache[0])
    if norms is not None:
        q_THD = rms_norm(q_THD, norms.q_D, norms.eps)
        k_TKD = rms_norm(k_TKD, norms.k_D, norms.eps)
    return rotate_and_write(q_THD, k_TKD, v_TKD, angles, cache, write_T, interleaved)


def split_heads(qkv_TXD: Tensor, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits into queries, keys and values; the cache gives the number of key heads."""
    num_keys = num_kv_heads(k_cache, qkv_TXD.shape[2])
    q_THD, k_TKD, v_TKD = qkv_TXD.split([qkv_TXD.shape[1] - 2 * num_keys, num_keys, num_keys], 1)
    return q_THD, k_TKD, v_TKD


def rotate_and_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    angles: Angles,
    cache: tuple[Tensor, Tensor],
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """Rotates queries and keys, and stores keys and values at write_T int64 in the cache, in its
    format. A key is first rounded to the model's dtype. Returns the queries [T, H, D] in their
    dtype. ``interleaved`` selects ``rotate_pairs`` instead of ``rotate_halves``. If F < D / 2, only
    the first 2 F values of a head are rotated.
    """
    write_heads(cache[0], write_T, rotate_first(k_TKD, angles, interleaved))
    write_heads(cache[1], write_T, v_TKD)
    return rotate_first(q_THD, angles, interleaved)


def rotate_and_write_latent(
    q_rope_THD: Tensor,
    c_TC: Tensor,
    k_rope_TD: Tensor,
    angles: Angles,
    cache: Tensor,
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """Rotates q_rope and k_rope, and stores c_TC and then the rotated k_rope at write_T int64 in
    the cache, [positions, Z] or bytes. Returns q_rope [T, H, D] in its dtype.
    """
    rotate = rotate_pairs if interleaved else rotate_halves
    k_TD = rotate(k_rope_TD.unsqueeze(1), angles).to(k_rope_TD.dtype).squeeze(1)
    write_latents(cache, write_T, c_TC, k_TD)
    return rotate(q_rope_THD, angles).to(q_rope_THD.dtype)


def rotate_first(x_THD: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """Rotates the first 2 F values of each head and keeps the others. Returns x's dtype."""
    rotate = rotate_pairs if interleaved else rotate_halves
    turned = 2 * angles.cos_T1F.shape[-1]
    if turned == x_THD.shape[-1]:
        return rotate(x_THD, angles).to(x_THD.dtype)
    return torch.cat([rotate(x_THD[..., :turned], angles).to(x_THD.dtype), x_THD[..., turned:]], -1)
