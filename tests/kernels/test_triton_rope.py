"""Rotation with cache write in Triton, against the reference and its parts."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels import rope as reference
from lockstep.kernels import triton_rope
from lockstep.kernels.rope import Angles, angles, frequencies, yarn_frequencies
from support.poison import DEVICE, poisoned

# The model's dtype, the cache's, and the tolerance: the interpreter cuts bf16 instead of rounding it.
DTYPES = pytest.mark.parametrize(
    ("dtype", "cache_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 1.6e-2),
        (torch.float16, torch.float16, 2e-3),
        (torch.bfloat16, torch.float32, 1.6e-2),
    ],
)
CONVENTIONS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
NUM_PLACES = 40


def rotation(num_tokens: int, dim: int) -> Angles:
    positions = torch.arange(num_tokens) * 97
    stretched = yarn_frequencies(dim, 10000.0, 40.0, 64, 32.0, 1.0, True)
    turned = angles(positions, stretched if dim > 8 else frequencies(dim, 100.0), magnitude=1.2)
    return Angles(turned.cos_T1F.to(DEVICE), turned.sin_T1F.to(DEVICE))


@CONVENTIONS
@DTYPES
@pytest.mark.parametrize(("num_tokens", "heads", "kv_heads", "dim"), [(5, 6, 2, 16), (1, 3, 3, 6), (9, 4, 1, 40), (0, 4, 2, 16)])
def test_keys_and_values(
    num_tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, tolerance: float, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim, generator=generator).to(DEVICE, dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    write = torch.randperm(NUM_PLACES, generator=generator)[:num_tokens].to(DEVICE)
    results = []
    for column in (reference, triton_rope):
        cache = tuple(torch.full((NUM_PLACES, kv_heads, dim), 7.0, dtype=cache_dtype, device=DEVICE) for _ in range(2))
        with poisoned():
            q_out = column.rotate_and_write(q, k, v, rotation(num_tokens, dim), (cache[0], cache[1]), write, interleaved)
        results.append((q_out, *cache))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(results[1][2], results[0][2])


@CONVENTIONS
@DTYPES
@pytest.mark.parametrize(("num_tokens", "heads", "latent", "dim"), [(5, 6, 20, 6), (3, 16, 512, 64), (0, 2, 8, 4)])
def test_latents(
    num_tokens: int, heads: int, latent: int, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, tolerance: float, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(num_tokens, heads, 10 + dim, generator=generator).to(DEVICE, dtype)[..., 10:]
    c, k = torch.randn(num_tokens, latent + dim, generator=generator).to(DEVICE, dtype).split([latent, dim], 1)
    write = torch.randperm(NUM_PLACES, generator=generator)[:num_tokens].to(DEVICE)
    results = []
    for column in (reference, triton_rope):
        cache = torch.full((NUM_PLACES, latent + dim), 7.0, dtype=cache_dtype, device=DEVICE)
        with poisoned():
            q_out = column.rotate_and_write_latent(q, c, k, rotation(num_tokens, dim), cache, write, interleaved)
        results.append((q_out, cache))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_a_negative_place_is_not_written() -> None:
    q, k, v = (torch.randn(2, 2, 8, device=DEVICE) for _ in range(3))
    cache = (torch.zeros(4, 2, 8, device=DEVICE), torch.zeros(4, 2, 8, device=DEVICE))
    write = torch.tensor([-1, 2], device=DEVICE)
    triton_rope.rotate_and_write(q, k, v, rotation(2, 8), cache, write, False)
    for part in cache:
        assert part[2].all() and not part[[0, 1, 3]].any()
    latents = torch.zeros(4, 12, device=DEVICE)
    triton_rope.rotate_and_write_latent(q, k[:, 0, :4].contiguous(), v[:, 0], rotation(2, 8), latents, write, False)
    assert latents[2].all() and not latents[[0, 1, 3]].any()
