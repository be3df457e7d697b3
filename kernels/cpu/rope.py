"""Head norms, rotation and cache write in one compiled pass over the tokens.

T tokens  H heads  K key/value heads  X = H + 2 K  D head dim  F frequencies  C latent dim
P cache positions  B bytes of an entry
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..reference import rope
from ..reference.kv_entries import holds_fp8, num_kv_heads
from ..reference.rope import Angles, HeadNorms
from .codegen.arrays import ALONE, array, computes, inner, made, narrow, widen
from .codegen.threads import share_out
from .kv_entries import write_head, write_latent
from .norm import norm_row
from .views import angles_of

_ENTER_ALONE = ALONE // 4  # a value costs more here than in other passes


def norm_rotate_and_write(
    qkv_TXD: Tensor,
    norms: HeadNorms | None,
    angles: Angles,
    cache: tuple[Tensor, Tensor],
    write_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """Same as ``rope.norm_rotate_and_write``."""
    dtype, (num_tokens, num_heads, dim) = qkv_TXD.dtype, qkv_TXD.shape
    plain = (
        qkv_TXD.is_contiguous()
        and cache[0].dtype == cache[1].dtype
        and (norms is None or norms.q_D.dtype == norms.k_D.dtype == dtype)
    )
    if not (plain and computes(dtype) and (holds_fp8(cache[0]) or computes(cache[0].dtype))):
        return rope.norm_rotate_and_write(qkv_TXD, norms, angles, cache, write_T, interleaved)
    num_keys = num_kv_heads(cache[0], dim)
    out_THD, bits = made((num_tokens, num_heads - 2 * num_keys, dim), dtype)
    weights = (
        (array(norms.q_D), array(norms.k_D)) if norms is not None else (_NOTHING[dtype], _NOTHING[dtype])
    )
    eps, caches = norms.eps if norms is not None else 0.0, (array(cache[0]), array(cache[1]))
    enter_heads(array(qkv_TXD), weights, eps, angles_of(angles), caches, write_T.numpy(), interleaved, bits)
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
    """Same as ``rope.rotate_and_write_latent``."""
    dtype = q_rope_THD.dtype
    if not (
        computes(dtype)
        and c_TC.dtype == k_rope_TD.dtype == dtype
        and (holds_fp8(cache) or computes(cache.dtype))
    ):
        return rope.rotate_and_write_latent(q_rope_THD, c_TC, k_rope_TD, angles, cache, write_T, interleaved)
    out_THD, bits = made(q_rope_THD.shape, dtype)
    # k_rope is made contiguous, so that one kernel serves both: it is small, and a single row is
    # always contiguous.
    rows = (
        array(q_rope_THD),
        array(c_TC),
        array(k_rope_TD.contiguous()),
    )
    _enter_latents(rows, angles_of(angles), array(cache), write_T.numpy(), interleaved, bits)
    return out_THD


_NOTHING = {torch.bfloat16: np.empty(0, np.uint16), torch.float32: np.empty(0, np.float32)}


@njit(cache=True, forceinline=True)
def enter_heads(qkv_TXD, weights, eps, turns, caches, write_T, interleaved, out_THD):
    """Empty weights mean no norm."""
    given = qkv_TXD, weights, np.float32(eps), turns, caches, write_T, interleaved, out_THD
    share_out(_enter_tokens, len(qkv_TXD), given, out_THD.size <= _ENTER_ALONE)


@inner()
def _enter_tokens(begin, end, qkv_TXD, weights, eps, turns, caches, write_T, interleaved, out_THD):
    for t in range(begin, end):
        _enter_token(
            qkv_TXD[t],
            weights,
            eps,
            (turns[0][t, 0], turns[1][t, 0]),
            caches,
            write_T[t],
            interleaved,
            out_THD[t],
        )


@inner()
def _enter_token(qkv_XD, weights, eps, turns, caches, position, interleaved, out_HD):
    """Enters one token."""
    num_heads = len(out_HD)
    num_keys = (len(qkv_XD) - len(out_HD)) // 2
    normed_D = np.empty_like(qkv_XD[0])
    turned_D = np.empty_like(qkv_XD[0])
    for head in range(num_heads):
        _turn(qkv_XD[head], weights[0], eps, normed_D, turns[0], turns[1], interleaved, out_HD[head])
    for head in range(num_keys):
        _turn(qkv_XD[num_heads + head], weights[1], eps, normed_D, turns[0], turns[1], interleaved, turned_D)
        write_head(turned_D, caches[0], position, head, num_keys)
        write_head(qkv_XD[num_heads + num_keys + head], caches[1], position, head, num_keys)


@inner()
def _turn(x_D, weight_D, eps, normed_D, cos_F, sin_F, interleaved, out_D):
    """Rounds the norm before the rotation. Leaves values from 2 F on unrotated."""
    num = len(cos_F)
    if len(weight_D):
        norm_row(x_D, weight_D, eps, normed_D)
    else:
        for d in range(len(x_D)):
            normed_D[d] = x_D[d]
    if interleaved:
        for f in range(num):
            low = widen(normed_D[2 * f])
            high = widen(normed_D[2 * f + 1])
            out_D[f] = narrow(low * cos_F[f] - high * sin_F[f], out_D)
            out_D[num + f] = narrow(high * cos_F[f] + low * sin_F[f], out_D)
    else:
        for f in range(num):
            low = widen(normed_D[f])
            high = widen(normed_D[num + f])
            out_D[f] = narrow(low * cos_F[f] - high * sin_F[f], out_D)
            out_D[num + f] = narrow(high * cos_F[f] + low * sin_F[f], out_D)
    for d in range(2 * num, len(x_D)):
        out_D[d] = normed_D[d]


@njit(cache=True, forceinline=True)
def _enter_latents(rows, turns, cache, write_T, interleaved, out_THD):
    share_out(_enter_each, len(out_THD), (rows, turns, cache, write_T, interleaved, out_THD), False)


@inner()
def _enter_each(begin, end, rows, turns, cache, write_T, interleaved, out_THD):
    (q_THD, c_TC, k_TD), (cos_T1F, sin_T1F) = rows, turns
    for t in range(begin, end):
        turned_D, no_weights = np.empty_like(out_THD[t, 0]), out_THD[t, 0, :0]
        for head in range(q_THD.shape[1]):
            _turn(
                q_THD[t, head],
                no_weights,
                np.float32(0),
                turned_D,
                cos_T1F[t, 0],
                sin_T1F[t, 0],
                interleaved,
                out_THD[t, head],
            )
        key_D = np.empty_like(turned_D)
        _turn(k_TD[t], no_weights, np.float32(0), turned_D, cos_T1F[t, 0], sin_T1F[t, 0], interleaved, key_D)
        write_latent(c_TC[t], key_D, cache, write_T[t])
