"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim of x [..., D]; computed in float32, returned in the dtype of x."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps)
