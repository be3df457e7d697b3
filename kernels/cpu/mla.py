"""Compiled latent attention on a CPU, in the two forms of ``reference/mla.py``. Decode rows read
pages of latents in place.

T tokens  R decode rows  H heads  N unrotated dims  E rotated dims  V value dims  C latent dim
P = N + V  L positions of a row  Z = C + E  D = N + E
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu_isa
from ..reference import mla
from ..reference.kv_entries import holds_fp8
from ..reference.paged import Extend, PagedBatch
from .attention import Shape, Softmax, attend_places
from .codegen.arrays import array, computes, made
from .codegen.crew import num_threads
from .head_products import multiply_heads, multiply_heads_turned
from .kv_entries import Place, gather_latents, place_of_latents
from .views import rows_of

_SAME_AS_KEYS = Place(0, 0, 0, 1, 0, 0)


def mla_attend(
    q_nope_THN: Tensor, q_rope_THE: Tensor, cache: Tensor, expand_HPC: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """Same as ``mla.mla_attend``. Softmax weights are rounded to bf16 unless queries or cache are
    float32.
    """
    dtype = q_nope_THN.dtype
    if not (
        computes(dtype)
        and dtype == q_rope_THE.dtype == expand_HPC.dtype
        and (holds_fp8(cache) or computes(cache.dtype))
    ):
        return mla.mla_attend(q_nope_THN, q_rope_THE, cache, expand_HPC, batch, scale)
    value_dim, num_decode = expand_HPC.shape[1] - q_nope_THN.shape[2], batch.num_decode
    out_THV = q_nope_THN.new_empty(*q_nope_THN.shape[:2], value_dim)
    if num_decode:
        _absorbed(
            q_nope_THN[:num_decode],
            q_rope_THE[:num_decode],
            cache,
            expand_HPC,
            batch,
            scale,
            out_THV[:num_decode],
        )
    for row in batch.extends():
        q_THD = torch.cat([q_nope_THN[row.begin : row.end], q_rope_THE[row.begin : row.end]], -1)
        latents_LZ = gather_latents(cache, row.pages, batch.page_size, expand_HPC.shape[2], dtype)[
            : row.length
        ]
        _materialised(q_THD, latents_LZ, expand_HPC, row, scale, out_THV[row.begin : row.end])
    return out_THV


def _absorbed(
    q_nope_RHN: Tensor,
    q_rope_RHE: Tensor,
    cache: Tensor,
    expand_HPC: Tensor,
    batch: PagedBatch,
    scale: float,
    out_RHV: Tensor,
) -> None:
    """Decode rows. H query heads share one key head, whose first C dims are its values."""
    (num_rows, num_heads, nope_dim), latent_dim = q_nope_RHN.shape, expand_HPC.shape[2]
    q_RHZ = q_nope_RHN.new_empty(num_rows, num_heads, latent_dim + q_rope_RHE.shape[2])
    multiply_heads(q_nope_RHN, expand_HPC[:, :nope_dim], q_RHZ[..., :latent_dim])
    q_RHZ[..., latent_dim:] = q_rope_RHE
    out_RHC, bits = made((num_rows, num_heads, latent_dim), q_RHZ.dtype)
    starts_R1, lengths_R, pages_RP = rows_of(batch)
    rows = starts_R1[: num_rows + 1], lengths_R[:num_rows], pages_RP[:num_rows]
    shape = Shape(1, num_rows, batch.page_size, num_threads())
    place = place_of_latents(cache, latent_dim)
    # The shape that other attention has, so that no further kernel is compiled.
    entries = cache if holds_fp8(cache) else cache[:, None]
    attend_places(q_RHZ, (entries, entries), (place, _SAME_AS_KEYS), rows, shape, Softmax(scale), bits)
    multiply_heads_turned(out_RHC, expand_HPC[:, nope_dim:], out_RHV)


def _materialised(
    q_THD: Tensor, latents_LZ: Tensor, expand_HPC: Tensor, row: Extend, scale: float, out_THV: Tensor
) -> None:
    """One extend row with expanded keys and values, held in a temporary cache of one page."""
    (num_heads, width, latent_dim), key_dim, value_dim = expand_HPC.shape, q_THD.shape[2], out_THV.shape[2]
    rope_LE = latents_LZ[:, latent_dim:]
    kv_LHP = _product(latents_LZ[:, :latent_dim], expand_HPC.flatten(0, 1)).unflatten(1, (num_heads, -1))
    k_LHD = torch.cat(
        [kv_LHP[..., : key_dim - rope_LE.shape[1]], rope_LE[:, None].expand(-1, num_heads, -1)], -1
    )
    places = (
        Place(0, key_dim, key_dim, key_dim, 0, 0),
        Place(width - value_dim, width, value_dim, value_dim, 0, 0),
    )
    rows = np.array([0, len(q_THD)], np.int32), np.array([row.length], np.int32), np.zeros((1, 1), np.int32)
    shape = Shape(num_heads, 0, row.length, num_threads())
    attend_places(q_THD, (k_LHD, kv_LHP), places, rows, shape, Softmax(scale), array(out_THV))


def _product(x_LC: Tensor, weight_NC: Tensor) -> Tensor:
    """x W^T. Widened first where no instruction multiplies bf16: with AVX2 that takes a quarter of
    the time, weights included, with AVX-512 half.
    """
    if x_LC.dtype != torch.bfloat16 or cpu_isa.multiplies_bf16(cpu_isa.here()):
        return F.linear(x_LC, weight_NC)
    return F.linear(x_LC.float(), weight_NC.float()).to(torch.bfloat16)
