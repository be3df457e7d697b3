"""Sampling on a CPU: rows that are all greedy take one compiled pass each, others the reference.

R rows  V vocabulary
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from . import sampling
from .cpu_arrays import array
from .sampling import SamplingParams

_BLOCK = 512


def sample(logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64]) -> Tensor:
    """As ``sampling.sample``; of equal logits a greedy row takes the lower token."""
    if len(params.drawn_S):
        return sampling.sample(logits_RV, params, uniform_R)
    tokens_R = np.empty(len(logits_RV), np.int64)
    _argmax(array(logits_RV), tokens_R)
    return torch.from_numpy(tokens_R)


@njit(cache=True, parallel=True)
def _argmax(logits_RV, tokens_R):
    for r in prange(len(logits_RV)):
        tokens_R[r] = _argmax_row(logits_RV[r])


@njit(cache=True)
def _argmax_row(logits_V):
    """The first block with the largest maximum, and the place within it: a maximum is taken by vectors, a place is not."""
    best, start = np.float32(-np.inf), 0
    for first in range(0, len(logits_V), _BLOCK):
        largest = _largest(logits_V[first : first + _BLOCK])
        if largest > best:
            best, start = largest, first
    for v in range(start, min(start + _BLOCK, len(logits_V))):
        if logits_V[v] == best:
            return v
    return 0


@njit(cache=True, fastmath={"nnan", "nsz"})
def _largest(values):
    largest = values[0]
    for i in range(1, len(values)):
        largest = max(largest, values[i])
    return largest
