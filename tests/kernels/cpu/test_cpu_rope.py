"""Compiled norms, rotation and writing against the reference, with caches of every format."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lockstep.kernels.cpu import rope as cpu_rope
from lockstep.kernels.formats.kv_format import KvFormat, Shape, head_entry, latent_entry
from lockstep.kernels.reference import rope
from lockstep.kernels.reference.kv_entries import decode_heads, decode_latents
from lockstep.kernels.reference.rope import HeadNorms, angles, frequencies
from support.grids import pairwise

PLACES = 600
CACHES: dict[KvFormat, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def empty(kv_format: KvFormat, shape: Shape) -> Tensor:
    return torch.full((PLACES, *shape), 7, dtype=CACHES[kv_format])


@pairwise(
    {
        "kv_format, dtype": product(CACHES, TOLERANCES),
        "num_tokens, turned": [(0, 16), (7, 16), (7, 8)],
        "normed": [False, True],
        "interleaved": [False, True],
    }
)
def test_heads(
    num_tokens: int, turned: int, normed: bool, interleaved: bool, kv_format: KvFormat, dtype: torch.dtype
) -> None:
    tolerance = TOLERANCES[dtype]
    torch.manual_seed(0)
    qkv = torch.randn(num_tokens, 6 + 2 + 2, 16).mul(3).to(dtype)
    norms = HeadNorms(torch.randn(16).to(dtype), torch.randn(16).to(dtype), 1e-6) if normed else None
    rotation, write = (
        angles(torch.arange(num_tokens) * 31 + 1, frequencies(turned, 100.0)),
        torch.randperm(PLACES)[:num_tokens],
    )
    results = []
    for column in (cpu_rope, rope):
        caches = (
            empty(kv_format, head_entry(kv_format, 2, 16)),
            empty(kv_format, head_entry(kv_format, 2, 16)),
        )
        results.append(
            (column.norm_rotate_and_write(qkv, norms, rotation, caches, write, interleaved), *caches)
        )
    (found, *found_caches), (expected, *expected_caches) = results
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found_caches[1], expected_caches[1])
    if kv_format == "fp8":
        found_caches, expected_caches = (
            [decode_heads(cache, 16, torch.float32) for cache in part]
            for part in (found_caches, expected_caches)
        )
        tolerance = 0.13  # a key may be rounded to the neighbouring e4m3 value
    torch.testing.assert_close(found_caches[0], expected_caches[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kv_format", CACHES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_latents(interleaved: bool, kv_format: KvFormat, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    torch.manual_seed(0)
    q, c, k = (
        torch.randn(5, 3, 24).to(dtype)[..., 16:],
        torch.randn(5, 300).to(dtype),
        torch.randn(5, 8).to(dtype),
    )
    rotation, write = angles(torch.arange(5) * 31 + 1, frequencies(8, 100.0)), torch.randperm(PLACES)[:5]
    results = []
    for column in (cpu_rope, rope):
        cache = empty(kv_format, latent_entry(kv_format, 300, 8))
        out = column.rotate_and_write_latent(q, c, k, rotation, cache, write, interleaved)
        results.append((out, decode_latents(cache, 300, torch.float32) if kv_format == "fp8" else cache))
    (found, found_cache), (expected, expected_cache) = results
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found_cache[:, :300], expected_cache[:, :300])
    torch.testing.assert_close(found_cache, expected_cache, rtol=tolerance, atol=tolerance)


def test_other_layouts_are_left_to_the_reference() -> None:
    """A slice of a wider matrix, and float64."""
    rotation, write, cache = (
        angles(torch.arange(3), frequencies(8, 100.0)),
        torch.arange(3),
        torch.zeros(4, 1, 8),
    )
    for qkv in (torch.randn(3, 5, 8)[:, 1:4], torch.randn(3, 3, 8).double()):
        caches = cache.clone(), cache.clone()
        out = cpu_rope.norm_rotate_and_write(qkv, None, rotation, caches, write, False)
        assert out.dtype == qkv.dtype and torch.equal(caches[1][:3], qkv[:, 2:].float())
