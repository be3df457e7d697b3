"""Rotation with cache write in Triton, against the reference and its parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import head_entry, latent_entry
from lockstep.kernels.reference import rope as reference
from lockstep.kernels.reference.rope import Angles, angles, frequencies, yarn_frequencies
from lockstep.kernels.triton import rope as triton_rope
from support.grids import pairwise
from support.kernels.fp8_entries import heads_in, latents_in
from support.kernels.poison import DEVICE, poisoned

# The model's dtype, the cache's, and the tolerance. The interpreter truncates bf16 instead of
# rounding.
DTYPES = [
    (torch.float32, torch.float32, 1e-6),
    (torch.bfloat16, torch.bfloat16, 1.6e-2),
    (torch.float16, torch.float16, 2e-3),
    (torch.bfloat16, torch.float32, 1.6e-2),
]
NUM_PLACES = 40


def rotation(num_tokens: int, dim: int) -> Angles:
    positions = torch.arange(num_tokens) * 97
    stretched = yarn_frequencies(dim, 10000.0, 40.0, 64, 32.0, 1.0, True)
    turned = angles(positions, stretched if dim > 8 else frequencies(dim, 100.0), magnitude=1.2)
    return Angles(turned.cos_T1F.to(DEVICE), turned.sin_T1F.to(DEVICE))


@pairwise(
    {
        "shape": [
            (5, 6, 2, 16, 16),
            (1, 3, 3, 6, 6),
            (9, 4, 1, 40, 40),
            (0, 4, 2, 16, 16),
            (5, 6, 2, 16, 8),
            (3, 4, 3, 22, 6),
        ],
        "dtype, cache_dtype, tolerance": DTYPES,
        "interleaved": [False, True],
    }
)
def test_keys_and_values(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    tolerance: float,
    interleaved: bool,
) -> None:
    num_tokens, heads, kv_heads, dim, turned = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim, generator=generator).to(DEVICE, dtype)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    write = torch.randperm(NUM_PLACES, generator=generator)[:num_tokens].to(DEVICE)
    results = []
    for column in (reference, triton_rope):
        cache = tuple(
            torch.full((NUM_PLACES, kv_heads, dim), 7.0, dtype=cache_dtype, device=DEVICE) for _ in range(2)
        )
        with poisoned():
            q_out = column.rotate_and_write(
                q, k, v, rotation(num_tokens, turned), (cache[0], cache[1]), write, interleaved
            )
        results.append((q_out, *cache))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(results[1][2], results[0][2])


@pairwise(
    {
        "dtype, cache_dtype, tolerance": DTYPES,
        "num_tokens, heads, latent, dim": [(5, 6, 20, 6), (3, 16, 512, 64), (0, 2, 8, 4)],
        "interleaved": [False, True],
    }
)
def test_latents(
    num_tokens: int,
    heads: int,
    latent: int,
    dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    tolerance: float,
    interleaved: bool,
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(num_tokens, heads, 10 + dim, generator=generator).to(DEVICE, dtype)[..., 10:]
    c, k = (
        torch.randn(num_tokens, latent + dim, generator=generator).to(DEVICE, dtype).split([latent, dim], 1)
    )
    write = torch.randperm(NUM_PLACES, generator=generator)[:num_tokens].to(DEVICE)
    results = []
    for column in (reference, triton_rope):
        cache = torch.full((NUM_PLACES, latent + dim), 7.0, dtype=cache_dtype, device=DEVICE)
        with poisoned():
            q_out = column.rotate_and_write_latent(
                q, c, k, rotation(num_tokens, dim), cache, write, interleaved
            )
        results.append((q_out, cache))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


# A few e4m3 values differ by one step, since they are rounded from numbers that differ in the last
# bit.
STEP = 2.0**-3


def assert_same_entries(got: Tensor, expected: Tensor, read: Callable[[Tensor], Tensor]) -> None:
    assert (got != expected).float().mean() < 0.02
    torch.testing.assert_close(read(got.cpu()), read(expected.cpu()), rtol=STEP * 1.02, atol=0.02)


@pairwise(
    {
        "shape": [
            (5, 6, 2, 16, 16),
            (1, 3, 3, 12, 12),
            (9, 4, 1, 40, 40),
            (0, 4, 2, 16, 16),
            (5, 6, 2, 16, 8),
            (3, 8, 4, 128, 64),
        ],
        "dtype": [torch.float32, torch.bfloat16],
        "interleaved": [False, True],
    }
)
def test_keys_and_values_in_fp8(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, interleaved: bool
) -> None:
    num_tokens, heads, kv_heads, dim, turned = shape
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim, generator=torch.Generator().manual_seed(0)).to(
        DEVICE, dtype
    )
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    write = torch.randperm(NUM_PLACES, generator=torch.Generator().manual_seed(1))[:num_tokens].to(DEVICE)
    results = []
    for column in (reference, triton_rope):
        cache = [
            torch.full((NUM_PLACES, *head_entry("fp8", kv_heads, dim)), 7, dtype=torch.uint8, device=DEVICE)
            for _ in range(2)
        ]
        with poisoned():
            q_out = column.rotate_and_write(
                q, k, v, rotation(num_tokens, turned), (cache[0], cache[1]), write, interleaved
            )
        results.append((q_out, *cache))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1.6e-2, atol=1.6e-2)
    for got, expected in zip(results[1][1:], results[0][1:], strict=True):
        assert_same_entries(got, expected, lambda entries: heads_in(entries, kv_heads, dim))
    assert torch.equal(results[1][2], results[0][2]), "values are not rotated"


@pairwise(
    {
        "num_tokens, latent, dim": [(5, 20, 6), (2, 300, 8), (3, 512, 64), (0, 8, 4)],
        "dtype": [torch.float32, torch.bfloat16],
        "interleaved": [False, True],
    }
)
def test_latents_in_fp8(
    num_tokens: int, latent: int, dim: int, dtype: torch.dtype, interleaved: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(num_tokens, 4, dim, generator=generator).to(DEVICE, dtype)
    c, k = (
        torch.randn(num_tokens, latent + dim, generator=generator).to(DEVICE, dtype).split([latent, dim], 1)
    )
    write = torch.randperm(NUM_PLACES, generator=generator)[:num_tokens].to(DEVICE)
    results = []
    for column in (reference, triton_rope):
        cache = torch.full(
            (NUM_PLACES, *latent_entry("fp8", latent, dim)), 7, dtype=torch.uint8, device=DEVICE
        )
        with poisoned():
            column.rotate_and_write_latent(q, c, k, rotation(num_tokens, dim), cache, write, interleaved)
        results.append(cache)
    end = latent + 4 * -(-latent // 128)
    assert torch.equal(results[1][:, :end], results[0][:, :end])
    assert_same_entries(results[1], results[0], lambda entries: latents_in(entries, latent))


def test_a_negative_place_is_not_written() -> None:
    q, k, v = (torch.randn(2, 2, 8, device=DEVICE) for _ in range(3))
    cache = (torch.zeros(4, 2, 8, device=DEVICE), torch.zeros(4, 2, 8, device=DEVICE))
    write = torch.tensor([-1, 2], device=DEVICE)
    triton_rope.rotate_and_write(q, k, v, rotation(2, 8), cache, write, False)
    for part in cache:
        assert part[2].all() and not part[[0, 1, 3]].any()
    latents = torch.zeros(4, 12, device=DEVICE)
    triton_rope.rotate_and_write_latent(
        q, k[:, 0, :4].contiguous(), v[:, 0], rotation(2, 8), latents, write, False
    )
    assert latents[2].all() and not latents[[0, 1, 3]].any()
    eight = torch.zeros(4, *latent_entry("fp8", 4, 8), dtype=torch.uint8, device=DEVICE)
    triton_rope.rotate_and_write_latent(
        q, k[:, 0, :4].contiguous(), v[:, 0], rotation(2, 8), eight, write, False
    )
    heads = (
        torch.zeros(4, 24, dtype=torch.uint8, device=DEVICE),
        torch.zeros(4, 24, dtype=torch.uint8, device=DEVICE),
    )
    triton_rope.rotate_and_write(q, k, v, rotation(2, 8), heads, write, False)
    for part in (eight, *heads):
        assert part[2].any() and not part[[0, 1, 3]].any()
