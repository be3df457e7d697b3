"""The clock of a device, read when the device comes to it: seconds between two places in its work,
also where launches are recorded and repeated.
"""

from __future__ import annotations

import time

from torch import Tensor


def host_time() -> int:
    """Nanoseconds of the host's monotonic clock."""
    return time.monotonic_ns()


def add_time(totals_R: Tensor, place: int, sign: int) -> None:
    """Adds ``sign`` times the clock's nanoseconds to int64 totals_R[place]. With -1 at one place of
    a device's work and 1 at a later one, the time between them is added: sums wrap, so it is exact
    as soon as both have run, in whatever order they add. Here the clock is the host's.
    """
    totals_R[place].add_(sign * host_time())
