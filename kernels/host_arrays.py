"""Arrays of the host on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on ``device``, for the work that it is given next. A GPU copies from pinned memory,
    so the host waits for nothing; torch keeps that memory until the copy has ended, then uses it
    again.
    """
    source = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        source = source.pin_memory()
    return source.to(device, non_blocking=True)
