"""Triton column of ``clock.add_time``: one program that adds the card's ``%globaltimer``.

PTX counts it in nanoseconds, and leaves to the card how often it changes. A launch that a recording
repeats reads it anew each time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference import clock
from .target import interpreted


def add_time(totals_R: Tensor, place: int, sign: int) -> None:
    """Same as ``clock.add_time``, by the card's clock."""
    host = clock.host_time if interpreted() else None
    _add_time_kernel[(1,)](totals_R, place, sign, HOST=host, num_warps=1)


@triton.jit(do_not_specialize=["place", "sign"])  # one kernel for all places
def _add_time_kernel(totals_ptr, place, sign, HOST: tl.constexpr):
    """``HOST``: the clock of an interpreter, which has no card's."""
    if HOST is None:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        now = HOST()
    tl.atomic_add(totals_ptr + place, now * sign, sem="relaxed")
