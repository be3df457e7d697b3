"""Latent attention over a paged cache, absorbed and materialised, against its definition in
float64.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from lockstep.kernels.cpu import mla as cpu_mla
from lockstep.kernels.reference import mla
from lockstep.kernels.reference.kv_entries import decode_latents, encode_latents
from lockstep.kernels.reference.paged import write_entries
from support.grids import pairwise
from support.kernels.paged_rows import PAGE_SIZE, PagedRows

HEADS, NOPE, ROPE, LATENT, SCALE = 4, 12, 6, 20, 0.25

# The model's dtype, the cache's, and the tolerance. The definition reads the cache's contents, so
# their rounding is no error.
DTYPES = [
    (torch.float32, torch.float32, 2e-5),
    (torch.bfloat16, torch.bfloat16, 3e-2),
    (torch.float32, torch.bfloat16, 2e-5),
    (torch.bfloat16, torch.float32, 3e-2),
]

CASES = {
    "decode": ([(0, 1), (17, 1), (8, 1)], 3),
    "decode far apart": ([(700, 1), (2, 1), (600, 1), (90, 1)], 4),
    "extends": ([(0, 9), (0, 1), (30, 12), (7, 1)], 0),
    "both": ([(5, 1), (64, 1), (0, 20), (11, 3)], 2),
    "nothing": ([], 0),
}


def definition(q_nope: Tensor, q_rope: Tensor, latents: Tensor, expand: Tensor, start: int) -> Tensor:
    """Expands keys and values of every head from the latents."""
    c, k_rope = latents.double().split([LATENT, ROPE], -1)
    kv = torch.einsum("lc,hpc->lhp", c, expand.double())
    scores = torch.einsum("thn,lhn->htl", q_nope.double(), kv[..., :NOPE]) + torch.einsum(
        "the,le->htl", q_rope.double(), k_rope
    )
    position = torch.arange(len(q_nope))[:, None] + start
    scores = (scores * SCALE).masked_fill(torch.arange(len(latents)) > position, -torch.inf)
    return torch.einsum("htl,lhv->thv", scores.softmax(-1), kv[..., NOPE:])


@pairwise({"case": CASES, "dtype, cache_dtype, tolerance": DTYPES, "value_dim": [8, 18, 24]})
@pytest.mark.parametrize("column", [mla, cpu_mla])
def test_equals_the_definition(
    column: ModuleType,
    case: str,
    value_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    rows = PagedRows(*CASES[case])
    num_tokens = int(rows.counts.sum())
    cache = torch.full((rows.num_pages * PAGE_SIZE, LATENT + ROPE), 1e3, dtype=cache_dtype)
    for row in range(len(rows.starts)):
        past = rows.places(row)[: int(rows.starts[row])]
        cache[past] = torch.randn(len(past), LATENT + ROPE).to(cache_dtype)
    q_nope, q_rope = (torch.randn(num_tokens, HEADS, dim).to(dtype) for dim in (NOPE, ROPE))
    latent = torch.randn(num_tokens, LATENT + ROPE).to(dtype)
    expand = (torch.randn(HEADS, NOPE + value_dim, LATENT) * LATENT**-0.5).to(dtype)
    write_entries(cache, rows.batch.write_T, latent)
    out = column.mla_attend(q_nope, q_rope, cache, expand, rows.batch, SCALE)
    assert (out.shape, out.dtype) == ((num_tokens, HEADS, value_dim), dtype)
    for row, start in enumerate(rows.starts.tolist()):
        tokens, places = rows.queries(row), rows.places(row)
        assert torch.equal(cache[places[start:]], latent[tokens].to(cache_dtype))
        expected = definition(q_nope[tokens], q_rope[tokens], cache[places], expand, start)
        torch.testing.assert_close(out[tokens].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("nope", "value"), [(24, 16), (128, 128)])
@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("kv_format", ["bf16", "fp8"])
def test_compiled_at_the_size_of_deepseek(kv_format: str, page_size: int, nope: int, value: int) -> None:
    """Entries whose first dims are values, read in place or converted, over rows in several parts;
    products by torch and by the compiled kernel.
    """
    torch.manual_seed(0)
    rows, (heads, rope, latent) = (
        PagedRows([(600, 1), (70, 1), (40, 30)], 2, page_size=page_size),
        (3, 64, 512),
    )
    c, k = torch.randn(rows.num_pages * page_size, latent + rope).split([latent, rope], 1)
    cache = encode_latents(c, k) if kv_format == "fp8" else torch.cat([c, k], 1).bfloat16()
    numbers = decode_latents(cache, latent, torch.float32) if kv_format == "fp8" else cache.float()
    q_nope, q_rope = torch.randn(32, heads, nope).bfloat16(), torch.randn(32, heads, rope).bfloat16()
    expand = (torch.randn(heads, nope + value, latent) * latent**-0.5).bfloat16()
    out = cpu_mla.mla_attend(q_nope, q_rope, cache, expand, rows.batch, 0.1)
    expected = mla.mla_attend(q_nope.float(), q_rope.float(), numbers, expand.float(), rows.batch, 0.1)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
