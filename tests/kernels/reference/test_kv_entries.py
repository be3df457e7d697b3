"""FP8 entries: their size, their loss of precision, and attention that reads nothing else."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lockstep.kernels.formats.kv_format import KvFormat, entry_bytes, head_entry, latent_entry, parse_format
from lockstep.kernels.reference import attention, mla
from lockstep.kernels.reference.fp8 import from_e4m3
from lockstep.kernels.reference.kv_entries import (
    decode_heads,
    decode_latents,
    encode_heads,
    encode_latents,
    gather_heads,
    gather_latents,
    write_heads,
    write_latents,
)
from support.grids import pairwise
from support.kernels.fp8_entries import heads_in, latents_in
from support.kernels.paged_rows import PAGE_SIZE, PagedRows

# e4m3 has three bits of mantissa: half a step is 2^-4 of a value, or for the smallest values 2^-10
# of the scale.
HALF_STEP = 2.0**-4


def test_an_entry_has_the_documented_size() -> None:
    assert entry_bytes("fp8", latent_entry("fp8", 512, 64)) == 656, "FlashMLA's, for DeepSeek-V3"
    assert entry_bytes("fp8", latent_entry("fp8", 160, 32)) == 160 + 2 * 4 + 64
    assert entry_bytes("bf16", latent_entry("bf16", 512, 64)) == 1152
    for dim in (80, 128, 256):
        half = entry_bytes("fp8", head_entry("fp8", 4, dim)) / entry_bytes("bf16", head_entry("bf16", 4, dim))
        assert 0.5 < half <= 0.525, "half of bf16 within 5 %"
    assert (head_entry("fp32", 4, 128), latent_entry("fp32", 512, 64)) == ((4, 128), (576,))


def test_sizes_and_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"kv_cache\.dtype = fp8: head_dim is 6; expected a multiple of 4; use bf16 or fp32"
    ):
        head_entry("fp8", 2, 6)
    with pytest.raises(ValueError, match="kv_lora_rank is 30; expected a multiple of 4"):
        latent_entry("fp8", 30, 8)
    with pytest.raises(ValueError, match=r"kv_cache\.dtype = e5m2: allowed are fp32, bf16, fp8"):
        parse_format("e5m2")
    assert [parse_format(name) for name in get_args(KvFormat)] == ["fp32", "bf16", "fp8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_eight_bits_are_converted_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    expected = bits.view(torch.float8_e4m3fn).to(dtype)
    real = ~expected.isnan()
    assert torch.equal(from_e4m3(bits, dtype)[real], expected[real]) and real.sum() == 254
    columns = bits.view(16, 16)[:, 3:11]
    torch.testing.assert_close(
        from_e4m3(columns, dtype), expected.view(16, 16)[:, 3:11], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 4), (3, 20), (4, 128)])
def test_heads_come_back_within_half_a_step(heads: int, dim: int, dtype: torch.dtype) -> None:
    x = (
        torch.randn(50, heads, dim, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-4, 3, 50)[:, None, None]
    ).to(dtype)
    x[3] = 0
    entries = encode_heads(x)
    assert entries.dtype == torch.uint8 and entries.shape == (50, *head_entry("fp8", heads, dim))
    assert torch.equal(decode_heads(entries, dim, torch.float32), heads_in(entries, heads, dim))
    assert torch.equal(decode_heads(entries, dim, torch.bfloat16), heads_in(entries, heads, dim).bfloat16())
    scale = x.float().abs().amax(-1, keepdim=True) / 448
    error = (heads_in(entries, heads, dim) - x.float()).abs()
    assert (error <= (x.float().abs() * HALF_STEP).maximum(scale * 2.0**-10) * 1.001).all()
    assert error.max() > 0 and not error[3].any()
    assert torch.equal(encode_heads(x[7:8]), entries[7:8]), "a token's entry is its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("latent", "rotated"), [(4, 2), (20, 6), (128, 8), (300, 10), (512, 64)])
def test_latents_come_back_within_half_a_step(latent: int, rotated: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # Groups of 128 with very different magnitudes: one scale for all would lose the small values.
    sizes = 10.0 ** torch.arange(-(-latent // 128)).repeat_interleave(128)[:latent]
    c, k = (
        (torch.randn(9, latent, generator=generator) * sizes).to(dtype),
        torch.randn(9, rotated, generator=generator).to(dtype),
    )
    entries = encode_latents(c, k)
    assert entries.dtype == torch.uint8 and entries.shape == (9, *latent_entry("fp8", latent, rotated))
    assert torch.equal(decode_latents(entries, latent, torch.float32), latents_in(entries, latent))
    found_c, found_k = latents_in(entries, latent).split([latent, rotated], 1)
    assert torch.equal(found_k, k.bfloat16().float()), "the rotated part stays in bf16"
    for begin in range(0, latent, 128):
        part = c[:, begin : begin + 128].float()
        scale = part.abs().amax(-1, keepdim=True) / 448
        error = (found_c[:, begin : begin + 128] - part).abs()
        assert (error <= (part.abs() * HALF_STEP).maximum(scale * 2.0**-10) * 1.001).all()


def test_no_tokens() -> None:
    assert encode_heads(torch.empty(0, 2, 8)).shape == (0, 24)
    assert encode_latents(torch.empty(0, 20), torch.empty(0, 4)).shape == (0, 32)


def test_nan_stays_visible() -> None:
    x = torch.ones(2, 1, 8)
    x[0, 0, 3] = torch.nan
    found = decode_heads(encode_heads(x), 8, torch.float32)
    assert found[0].isnan().all() and torch.equal(found[1], x[1])


# --------------------------------------------------------------------------- attention over them

CASES = {
    "decode": ([(0, 1), (17, 1), (8, 1)], 3),
    "decode far apart": ([(700, 1), (2, 1), (600, 1), (90, 1)], 4),
    "extends": ([(0, 9), (0, 1), (30, 12), (7, 1)], 0),
    "blocks over a prefix": ([(21, 600)], 0),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
}
TOLERANCES = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


@pairwise({"case": CASES, "kv_heads": [1, 2, 6], "dtype, tolerance": TOLERANCES})
def test_grouped_attention_equals_attention_over_decoded_entries(
    case: str, kv_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Equal to attention over a pool of the decoded numbers. Pages that are not read hold large
    values.
    """
    torch.manual_seed(0)
    rows, dim = PagedRows(*CASES[case]), 16
    caches = [encode_heads(torch.full((rows.num_pages * PAGE_SIZE, kv_heads, dim), 1e3)) for _ in range(2)]
    for row in range(len(rows.starts)):
        for cache in caches:
            write_heads(cache, rows.places(row), torch.randn(len(rows.places(row)), kv_heads, dim).to(dtype))
    q = torch.randn(int(rows.counts.sum()), 6, dim).to(dtype)
    out = attention.attend(q, *caches, rows.batch, 0.3)
    expected = attention.attend(
        q.float(), *(heads_in(cache, kv_heads, dim) for cache in caches), rows.batch, 0.3
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_latent_attention_equals_attention_over_decoded_entries(
    case: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    rows, heads, nope, rotated, latent = PagedRows(*CASES[case]), 4, 12, 6, 140
    cache = encode_latents(
        torch.full((rows.num_pages * PAGE_SIZE, latent), 1e3),
        torch.full((rows.num_pages * PAGE_SIZE, rotated), 1e3),
    )
    for row in range(len(rows.starts)):
        count = len(rows.places(row))
        write_latents(
            cache,
            rows.places(row),
            torch.randn(count, latent).to(dtype),
            torch.randn(count, rotated).to(dtype),
        )
    q_nope, q_rope = (torch.randn(int(rows.counts.sum()), heads, dim).to(dtype) for dim in (nope, rotated))
    expand = (torch.randn(heads, nope + 10, latent) * latent**-0.5).to(dtype)
    out = mla.mla_attend(q_nope, q_rope, cache, expand, rows.batch, 0.25)
    expected = mla.mla_attend(
        q_nope.float(), q_rope.float(), latents_in(cache, latent), expand.float(), rows.batch, 0.25
    )
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_gathered_pages_are_those_of_the_table() -> None:
    x = torch.randn(5 * PAGE_SIZE, 2, 8)
    pages = torch.tensor([3, 0], dtype=torch.int32)
    chosen = torch.cat([encode_heads(x)[24:32], encode_heads(x)[:8]])
    assert torch.equal(
        gather_heads(encode_heads(x), pages, PAGE_SIZE, 8, torch.float32), heads_in(chosen, 2, 8)
    )
    c, k = torch.randn(5 * PAGE_SIZE, 20), torch.randn(5 * PAGE_SIZE, 4)
    chosen = torch.cat([encode_latents(c, k)[24:32], encode_latents(c, k)[:8]])
    assert torch.equal(
        gather_latents(encode_latents(c, k), pages, PAGE_SIZE, 20, torch.float32), latents_in(chosen, 20)
    )


# --------------------------------------------------------------------------- the loss


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_the_loss_of_grouped_attention() -> None:
    """Normal queries, keys and values, 1,000 positions, float32 outside the pages: 3.7 % of the
    output's norm, 0.24 % in bf16. The output is a mean of a thousand such values and small, so this
    is about the error of a single value.
    """
    torch.manual_seed(0)
    rows = PagedRows([(999, 1)] * 8, 8)
    x = [torch.randn(rows.num_pages * PAGE_SIZE, 2, 128) for _ in range(2)]
    q = torch.randn(8, 16, 128)
    exact = attention.attend(q, *x, rows.batch, 128**-0.5)
    eight = attention.attend(q, *map(encode_heads, x), rows.batch, 128**-0.5)
    sixteen = attention.attend(q, *(part.bfloat16() for part in x), rows.batch, 128**-0.5)
    assert 0.02 < relative(eight, exact) < 0.045 and 0.001 < relative(sixteen, exact) < 0.004


def test_the_loss_of_latent_attention() -> None:
    """At DeepSeek-V3's sizes: 2.8 % of the output's norm, 0.19 % in bf16."""
    torch.manual_seed(0)
    rows, heads = PagedRows([(999, 1)] * 8, 8), 16
    c, k = torch.randn(rows.num_pages * PAGE_SIZE, 512), torch.randn(rows.num_pages * PAGE_SIZE, 64)
    q_nope, q_rope = torch.randn(8, heads, 128), torch.randn(8, heads, 64)
    expand = torch.randn(heads, 256, 512) * 512**-0.5
    numbers = torch.cat([c, k], 1)
    exact = mla.mla_attend(q_nope, q_rope, numbers, expand, rows.batch, 192**-0.5)
    eight = mla.mla_attend(q_nope, q_rope, encode_latents(c, k), expand, rows.batch, 192**-0.5)
    sixteen = mla.mla_attend(q_nope, q_rope, numbers.bfloat16(), expand, rows.batch, 192**-0.5)
    assert 0.015 < relative(eight, exact) < 0.035 and 0.001 < relative(sixteen, exact) < 0.004
