"""Compiled reading and writing of entries, bit for bit like the reference."""

from __future__ import annotations

import numba
import pytest
import torch
from torch import Tensor

from lockstep.kernels.cpu import kv_entries as cpu_kv_entries, rope as cpu_rope
from lockstep.kernels.cpu.codegen.arrays import array
from lockstep.kernels.cpu.kv_entries import Block, place_of_heads
from lockstep.kernels.formats.kv_format import head_entry, latent_entry
from lockstep.kernels.reference import kv_entries
from lockstep.kernels.reference.rope import Angles, angles
from support.kernels.fp8_entries import heads_in
from support.kernels.paged_rows import PAGE_SIZE

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NUM_PLACES = 600
_read = numba.njit(cpu_kv_entries.read)
PAGES = torch.tensor([3, 0, 17], dtype=torch.int32)


def spread(*shape: int) -> Tensor:
    """Numbers of all magnitudes, exact half steps among them, and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-6, 5, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    x[2] = 0
    x[3] = torch.randint(
        -448, 449, shape[1:], generator=generator
    ).float()  # scale 1: whole numbers lie between two of e4m3
    x[3].view(-1)[0] = 448
    return x


def unturned(num_tokens: int) -> Angles:
    return angles(torch.zeros(num_tokens, dtype=torch.int64), torch.ones(1))


def write_heads(cache: Tensor, write: Tensor, x: Tensor) -> None:
    """Writes as keys first, then as values; both must give the same entries."""
    other = cache.clone()
    qkv = torch.cat([x, x, torch.zeros_like(x)], 1), torch.cat([x, torch.zeros_like(x), x], 1)
    cpu_rope.norm_rotate_and_write(
        qkv[0], None, unturned(len(x)), (other, torch.empty_like(cache)), write, False
    )
    cpu_rope.norm_rotate_and_write(
        qkv[1], None, unturned(len(x)), (torch.empty_like(cache), cache), write, False
    )
    assert torch.equal(cache[write].nan_to_num(3), other[write].nan_to_num(3))


def read_heads(cache: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Keys or values of ``PAGES`` without the last three positions, head by head: [n, K, D]."""
    place, block = place_of_heads(cache, dim), Block(0, len(PAGES) * PAGE_SIZE - 3, PAGE_SIZE)
    heads = []
    for head in range(kv_entries.num_kv_heads(cache, dim)):
        out = torch.full((len(PAGES) * PAGE_SIZE + 2, dim), 7, dtype=dtype)
        _read(array(cache).reshape(len(cache), -1), place, head, array(PAGES), block, array(out))
        assert not out[block.end :].any()
        heads.append(out[: block.end])
    return torch.stack(heads, 1)


@DTYPES
@pytest.mark.parametrize(("num_tokens", "heads", "dim"), [(4, 1, 4), (20, 3, 20), (300, 4, 128)])
def test_heads(num_tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    x = spread(num_tokens, heads, dim).to(dtype)
    write = torch.randperm(NUM_PLACES, generator=torch.Generator().manual_seed(1))[:num_tokens]
    found, expected = (
        torch.full((NUM_PLACES, *head_entry("fp8", heads, dim)), 7, dtype=torch.uint8) for _ in range(2)
    )
    write_heads(found, write, x)
    kv_entries.write_heads(expected, write, x)
    assert torch.equal(found, expected)
    for out in (torch.float32, torch.bfloat16):
        assert torch.equal(
            read_heads(found, dim, out), kv_entries.gather_heads(found, PAGES, PAGE_SIZE, dim, out)[:-3]
        )


@DTYPES
@pytest.mark.parametrize(("num_tokens", "latent", "rotated"), [(4, 4, 2), (20, 300, 6), (100, 512, 64)])
def test_latents(num_tokens: int, latent: int, rotated: int, dtype: torch.dtype) -> None:
    c, k = spread(num_tokens, latent + rotated).to(dtype).split([latent, rotated], 1)
    write = torch.randperm(NUM_PLACES, generator=torch.Generator().manual_seed(1))[:num_tokens]
    found, expected = (
        torch.full((NUM_PLACES, *latent_entry("fp8", latent, rotated)), 7, dtype=torch.uint8)
        for _ in range(2)
    )
    cpu_rope.rotate_and_write_latent(k[:, None], c, k, unturned(num_tokens), found, write, False)
    kv_entries.write_latents(expected, write, c, k)
    assert torch.equal(found, expected)
    found[:] = kv_entries.encode_latents(torch.randn(NUM_PLACES, latent), torch.randn(NUM_PLACES, rotated))
    for out in (torch.float32, torch.bfloat16):
        read, wanted = (
            part.gather_latents(found, PAGES, PAGE_SIZE, latent, out) for part in (cpu_kv_entries, kv_entries)
        )
        assert read.dtype == out and torch.equal(read, wanted)


def test_nan_stays_visible() -> None:
    x = torch.ones(1, 1, 16)
    x[0, 0, 3] = torch.nan
    cache = torch.zeros(PAGE_SIZE, 20, dtype=torch.uint8)
    write_heads(cache, torch.tensor([0]), x)
    assert heads_in(cache[:1], 1, 16).isnan().all()


@DTYPES
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_numbers(stored: torch.dtype, dtype: torch.dtype) -> None:
    cache = torch.randn(NUM_PLACES, 2, 20).to(stored)
    write_heads(cache, torch.tensor([1]), torch.ones(1, 2, 20).to(dtype))
    assert (cache[1] == 1).all()
    assert torch.equal(
        read_heads(cache, 20, dtype), kv_entries.gather_heads(cache, PAGES, PAGE_SIZE, 20, dtype)[:-3]
    )
    latents = cache.view(NUM_PLACES, -1)
    assert torch.equal(
        *(part.gather_latents(latents, PAGES, PAGE_SIZE, 30, dtype) for part in (cpu_kv_entries, kv_entries))
    )
