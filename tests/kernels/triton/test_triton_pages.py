"""Copied pages, in both columns."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from lockstep.kernels.reference import paged as reference
from lockstep.kernels.triton import pages as triton_pages
from support.kernels.poison import DEVICE


@pytest.mark.parametrize("column", [reference, triton_pages], ids=["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (700,)])
def test_pages_are_copied_and_padding_is_skipped(
    column: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    page_size, num_pages = 3, 6
    caches = [(torch.rand(num_pages * page_size, *shape, device=DEVICE) * 200).to(dtype) for _ in range(2)]
    before = [cache.view(num_pages, page_size, -1).clone() for cache in caches]
    column.copy_pages(
        caches,
        torch.tensor([4, 0, 1, 0], device=DEVICE),
        torch.tensor([2, -1, 5, 3], device=DEVICE),
        page_size,
    )
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache.view(num_pages, page_size, -1), old[[0, 1, 4, 0, 4, 1]])


@pytest.mark.parametrize("column", [reference, triton_pages], ids=["reference", "triton"])
def test_nothing_to_copy(column: ModuleType) -> None:
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    cache = torch.ones(4, 2, device=DEVICE)
    column.copy_pages([cache], nothing, nothing, 2)
    assert cache.all()
