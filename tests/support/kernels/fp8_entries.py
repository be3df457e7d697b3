"""FP8 entries read a second time, by torch's own conversion and by offsets written down here."""

from __future__ import annotations

import torch
from torch import Tensor


def heads_in(entries: Tensor, kv_heads: int, dim: int) -> Tensor:
    """float32 [positions, kv_heads, dim]."""
    assert entries.shape[1] == kv_heads * (dim + 4)
    values = (
        entries[:, : kv_heads * dim].contiguous().view(torch.float8_e4m3fn).float().view(-1, kv_heads, dim)
    )
    return values * entries[:, kv_heads * dim :].contiguous().view(torch.float32)[..., None]


def latents_in(entries: Tensor, latent: int) -> Tensor:
    """float32 [positions, latent + rotated dims]."""
    num_scales = -(-latent // 128)
    values = entries[:, :latent].contiguous().view(torch.float8_e4m3fn).float()
    scales = entries[:, latent : latent + 4 * num_scales].contiguous().view(torch.float32)
    for group in range(num_scales):
        values[:, 128 * group : 128 * group + 128] *= scales[:, group : group + 1]
    return torch.cat(
        [values, entries[:, latent + 4 * num_scales :].contiguous().view(torch.bfloat16).float()], 1
    )
