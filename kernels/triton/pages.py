"""Triton column of ``paged.copy_pages``.

Roofline: memory, each byte read once and written once. One launch per cache tensor.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .target import power_of_two

_BYTES_PER_PROGRAM = 16384


def copy_pages(caches: Sequence[Tensor], sources_N: Tensor, targets_N: Tensor, page_size: int) -> None:
    """Same as ``paged.copy_pages``."""
    for cache in caches:
        assert cache.is_contiguous()
        page_bytes = page_size * cache[0].numel() * cache.element_size()
        # Copies the widest integers that divide a page, whatever the dtype.
        integer = next(
            kind
            for kind in (torch.int64, torch.int32, torch.int16, torch.int8)
            if page_bytes % kind.itemsize == 0
        )
        words = page_bytes // integer.itemsize
        chunk = min(_BYTES_PER_PROGRAM // integer.itemsize, power_of_two(words))
        if len(targets_N):
            _copy_pages_kernel[(len(targets_N), triton.cdiv(words, chunk))](
                cache.view(-1).view(integer), sources_N, targets_N, words, CHUNK=chunk, num_warps=8
            )


@triton.jit
def _copy_pages_kernel(cache_ptr, sources_ptr, targets_ptr, words, CHUNK: tl.constexpr):
    target = tl.load(targets_ptr + tl.program_id(0)).to(tl.int64)
    if target < 0:
        return
    source = tl.load(sources_ptr + tl.program_id(0)).to(tl.int64)
    word = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(cache_ptr + source * words + word, mask=word < words)
    tl.store(cache_ptr + target * words + word, value, mask=word < words)
