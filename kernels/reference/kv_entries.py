"""Reads and writes keys, values and latents as entries of a paged cache, in every format of
``kv_format``. A cache of bytes holds FP8.

T tokens  K key/value heads  D head dim  C latent dim  E rotated dims  Z = C + E
G = ceil(C / 128) groups  B bytes of an entry
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.kv_format import GROUP, SCALE_BYTES, num_groups
from .fp8 import LARGEST, LEAST_SCALE, from_e4m3
from .paged import gather_pages, write_entries


def holds_fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.uint8


def num_kv_heads(cache: Tensor, dim: int) -> int:
    """Number of heads in a cache of keys or values."""
    return cache.shape[1] // (dim + SCALE_BYTES) if holds_fp8(cache) else cache.shape[1]


def write_heads(cache: Tensor, write_T: Tensor, x_TKD: Tensor) -> None:
    """Stores a step's keys or values at positions write_T."""
    write_entries(cache, write_T, encode_heads(x_TKD) if holds_fp8(cache) else x_TKD)


def write_latents(cache: Tensor, write_T: Tensor, c_TC: Tensor, k_TE: Tensor) -> None:
    """Stores a step's latents and rotated key parts at positions write_T."""
    write_entries(
        cache, write_T, encode_latents(c_TC, k_TE) if holds_fp8(cache) else torch.cat([c_TC, k_TE], -1)
    )


def gather_heads(cache: Tensor, pages: Tensor, page_size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The keys or values of ``pages`` [n] in order: [n * page_size, K, D] as ``dtype``."""
    if not holds_fp8(cache):
        return gather_pages(cache, pages, page_size, dtype)
    return decode_heads(gather_pages(cache, pages, page_size, cache.dtype), dim, dtype)


def gather_latents(cache: Tensor, pages: Tensor, page_size: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The latents of ``pages`` [n] in order: [n * page_size, Z] as ``dtype``."""
    if not holds_fp8(cache):
        return gather_pages(cache, pages, page_size, dtype)
    return decode_latents(gather_pages(cache, pages, page_size, cache.dtype), dim, dtype)


def encode_heads(x_TKD: Tensor) -> Tensor:
    """Encodes keys or values as uint8 [T, B]."""
    x_TKD = x_TKD.float()
    scales_TK = (x_TKD.abs().amax(-1) / LARGEST).clamp_min(LEAST_SCALE)
    values_TKD = (x_TKD / scales_TK[..., None]).to(torch.float8_e4m3fn)
    return torch.cat([values_TKD.flatten(1).view(torch.uint8), scales_TK.view(torch.uint8)], 1)


def decode_heads(entries_TB: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Decodes entries to [T, K, D]: products in float32, rounded to ``dtype``."""
    num_heads = num_kv_heads(entries_TB, dim)
    scales_TK = entries_TB[:, num_heads * dim :].view(torch.float32)
    values_TKD: Tensor = from_e4m3(entries_TB[:, : num_heads * dim], torch.float32).unflatten(
        1, (num_heads, dim)
    )
    values_TKD *= scales_TK[..., None]
    return values_TKD.to(dtype)


def encode_latents(c_TC: Tensor, k_TE: Tensor) -> Tensor:
    """Encodes latents and rotated key parts as uint8 [T, B]."""
    padded_TGg = F.pad(c_TC.float(), (0, -c_TC.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales_TG = (padded_TGg.abs().amax(-1) / LARGEST).clamp_min(LEAST_SCALE)
    values_TC = (padded_TGg / scales_TG[..., None]).to(torch.float8_e4m3fn).flatten(1)[:, : c_TC.shape[1]]
    return torch.cat(
        [
            values_TC.view(torch.uint8),
            scales_TG.view(torch.uint8),
            k_TE.to(torch.bfloat16).contiguous().view(torch.uint8),
        ],
        1,
    )


def decode_latents(entries_TB: Tensor, latent_dim: int, dtype: torch.dtype) -> Tensor:
    """Decodes entries to [T, Z]: products in float32, rounded to ``dtype``."""
    ends = latent_dim, latent_dim + SCALE_BYTES * num_groups(latent_dim)
    scales_TG = entries_TB[:, ends[0] : ends[1]].view(torch.float32)
    values_TC = from_e4m3(entries_TB[:, :latent_dim], torch.float32)
    values_TC *= scales_TG.repeat_interleave(GROUP, 1)[:, :latent_dim]
    return torch.cat([values_TC.to(dtype), entries_TB[:, ends[1] :].view(torch.bfloat16).to(dtype)], 1)
