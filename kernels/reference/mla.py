"""Multi-head latent attention (arXiv 2405.04434, section 2.1) over a paged cache of latents.

A cache entry is one vector for all heads: the normalised latent (C values), then the rotated key
part (E values), or their FP8 form (``kv_format``). Extends expand the latents of their row into
keys and values (the materialised form: least work for many queries). Decode rows apply the
expansion to the query and the output instead (the absorbed form: latents are read as they are).

T tokens  R decode rows  H heads  N unrotated dims  E rotated dims  V value dims  C latent dim
P = N + V  L positions of a row  Z = C + E
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import causal_attention
from .kv_entries import gather_latents
from .paged import DecodeGroup, PagedBatch


def mla_attend(
    q_nope_THN: Tensor, q_rope_THE: Tensor, cache: Tensor, expand_HPC: Tensor, batch: PagedBatch, scale: float
) -> Tensor:
    """Causal attention over a cache that already holds this step's latents, [positions, Z] or
    bytes. Returns [T, H, V] in q's dtype.
    """
    value_dim, latent_dim = expand_HPC.shape[1] - q_nope_THN.shape[2], expand_HPC.shape[2]
    out_THV = q_nope_THN.new_empty(*q_nope_THN.shape[:2], value_dim)
    for group in batch.decode_groups:
        rows = slice(0, batch.num_decode) if group.rows is None else group.rows
        latents_LZ = gather_latents(cache, group.pages, batch.page_size, latent_dim, q_nope_THN.dtype)
        out_THV[rows] = _absorbed(q_nope_THN[rows], q_rope_THE[rows], latents_LZ, expand_HPC, group, scale)
    for row in batch.extends():
        latents_LZ = gather_latents(cache, row.pages, batch.page_size, latent_dim, q_nope_THN.dtype)[
            : row.length
        ]
        q_THD = torch.cat([q_nope_THN[row.begin : row.end], q_rope_THE[row.begin : row.end]], -1)
        out_THV[row.begin : row.end] = _materialised(q_THD, latents_LZ, expand_HPC, row.start, scale)
    return out_THV


def _absorbed(
    q_nope_RHN: Tensor,
    q_rope_RHE: Tensor,
    latents_LZ: Tensor,
    expand_HPC: Tensor,
    group: DecodeGroup,
    scale: float,
) -> Tensor:
    """One query per row. latents_LZ holds the rows one after another, padded alike. Returns [R, H,
    V].
    """
    nope_dim, latent_dim = q_nope_RHN.shape[2], expand_HPC.shape[2]
    q_RHC = torch.bmm(q_nope_RHN.transpose(0, 1), expand_HPC[:, :nope_dim]).transpose(0, 1)
    q_R1HZ = torch.cat([q_RHC, q_rope_RHE], -1).unsqueeze(1)
    latents_R1LZ = latents_LZ.unflatten(0, (group.num_rows, 1, -1))
    # Whole entries serve as values too, because the fused kernel needs equal widths; the rotated
    # part of the result is dropped.
    out_R1HZ = F.scaled_dot_product_attention(
        q_R1HZ, latents_R1LZ, latents_R1LZ, attn_mask=group.mask, scale=scale
    )
    out_HRC = out_R1HZ[:, 0, :, :latent_dim].transpose(0, 1)
    return torch.bmm(out_HRC, expand_HPC[:, nope_dim:].transpose(1, 2)).transpose(0, 1)


def _materialised(q_THD: Tensor, latents_LZ: Tensor, expand_HPC: Tensor, start: int, scale: float) -> Tensor:
    """The queries at positions [start, L) of one row, D = N + E. Returns [T, H, V]."""
    num_heads, _, latent_dim = expand_HPC.shape
    rope_LE = latents_LZ[:, latent_dim:]
    nope_dim = q_THD.shape[2] - rope_LE.shape[1]
    kv_LHP = F.linear(latents_LZ[:, :latent_dim], expand_HPC.flatten(0, 1)).unflatten(1, (num_heads, -1))
    k_LHD = torch.cat([kv_LHP[..., :nope_dim], rope_LE[:, None].expand(-1, num_heads, -1)], -1)
    v_LHV = kv_LHP[..., nope_dim:]
    padding = k_LHD.shape[2] - v_LHV.shape[2]
    if padding <= 0:
        return causal_attention(q_THD, k_LHD, v_LHV, start, scale)
    # Padded to the width of the keys: with unequal widths there is no fused kernel, and scores [H,
    # T, L] would be stored.
    return causal_attention(q_THD, k_LHD, F.pad(v_LHV, (0, padding)), start, scale)[..., : v_LHV.shape[2]]
