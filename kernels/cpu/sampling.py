"""Sampling on a CPU: one compiled pass per row if all rows are greedy, otherwise the reference with
a compiled top-k.

R, S rows  V vocabulary  B blocks of V  K top entries
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from ..reference import sampling
from ..reference.sampling import SamplingParams
from .codegen.arrays import array, inner
from .codegen.threads import share_out

_BLOCK = 512
_SEARCHED = 128  # block size of the top-k search
_FEW = 4  # blocks per top entry at least: with fewer there is little to skip


def sample(logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64]) -> Tensor:
    """Same as ``sampling.sample``. A greedy row breaks ties toward the lower token."""
    if len(params.drawn_S):
        return sampling.sample(logits_RV, params, uniform_R, likeliest)
    tokens_R = np.empty(len(logits_RV), np.int64)
    _argmax(array(logits_RV), tokens_R)
    return torch.from_numpy(tokens_R)


def logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Same as ``sampling.logprobs``. Among equal logits the lower tokens come first."""
    return sampling.logprobs(logits_SV, tokens_S, num_top, likeliest)


def likeliest(x_SV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Same as ``sampling.likeliest``: the top 50 of 16 rows of 152,064 take 0.4 ms, ``topk`` takes
    2.2 (2 cores of an EPYC Turin, torch 2.13).
    """
    if not count or x_SV.dtype != torch.float32 or x_SV.shape[1] < _FEW * count * _SEARCHED:
        return sampling.likeliest(x_SV, count)
    values = torch.empty(len(x_SV), count)
    ids = torch.empty(len(x_SV), count, dtype=torch.int64)
    _search(array(x_SV.contiguous()), array(values), array(ids))
    return values, ids


@njit(cache=True)
def _search(x_SV, values_SK, ids_SK):
    share_out(_search_rows, len(x_SV), (x_SV, values_SK, ids_SK), False)


@inner()
def _search_rows(begin, end, x_SV, values_SK, ids_SK):
    for s in range(begin, end):
        _search_row(x_SV[s], values_SK[s], ids_SK[s])


@inner()
def _search_row(x_V, values_K, ids_K):
    """Top K of one row. At least K values reach the K-th largest block maximum, so only blocks
    whose maximum exceeds it are searched; the places left go to the lowest tokens that equal it.
    A heap instead of numba's partition and sort, which take a quarter of all compiling.
    """
    num_blocks = -(-len(x_V) // _SEARCHED)
    most_B = np.empty(num_blocks, np.float32)
    values_K[:], ids_K[:] = -np.inf, len(x_V)
    for b in range(num_blocks):
        most_B[b] = _largest(x_V[b * _SEARCHED : (b + 1) * _SEARCHED])
        _enter(most_B[b], b, values_K, ids_K)
    bound, num = values_K[0], 0
    values_K[:], ids_K[:] = -np.inf, len(x_V)
    for b in range(num_blocks):
        if most_B[b] > bound:
            for v in range(b * _SEARCHED, min((b + 1) * _SEARCHED, len(x_V))):
                if x_V[v] > bound:
                    _enter(x_V[v], v, values_K, ids_K)
                    num += 1
    for last in range(len(values_K) - 1, 0, -1):  # the least goes behind the others
        value, place = values_K[last], ids_K[last]
        values_K[last], ids_K[last] = values_K[0], ids_K[0]
        _sink(value, place, values_K[:last], ids_K[:last])
    num = min(num, len(values_K))
    _fill(x_V, most_B, bound, values_K[num:], ids_K[num:])


@inner()
def _enter(value, place, values_K, ids_K):
    """Takes the place of the least of a heap, if larger. Later ones of equal values are less."""
    if value > values_K[0]:
        _sink(value, place, values_K, ids_K)


@inner()
def _sink(value, place, values_K, ids_K):
    """Puts a value into a heap, whose first entry it replaces; the least is first."""
    k, child = 0, 1
    while child < len(values_K):
        if child + 1 < len(values_K) and _is_less(
            values_K[child + 1], ids_K[child + 1], values_K[child], ids_K[child]
        ):
            child += 1
        if not _is_less(values_K[child], ids_K[child], value, place):
            break
        values_K[k], ids_K[k] = values_K[child], ids_K[child]
        k, child = child, 2 * child + 1
    values_K[k], ids_K[k] = value, place


@inner()
def _is_less(value, place, than, its_place):
    return value < than or (value == than and place > its_place)


@inner()
def _fill(x_V, most_B, bound, values_K, ids_K):
    """Fills the places with the lowest tokens whose value equals the bound."""
    num = 0
    for b in range(len(most_B)):
        if num < len(ids_K) and most_B[b] >= bound:
            for v in range(b * _SEARCHED, min((b + 1) * _SEARCHED, len(x_V))):
                if x_V[v] == bound and num < len(ids_K):
                    values_K[num], ids_K[num] = bound, v
                    num += 1
    for k in range(num, len(ids_K)):  # fewer than K values are numbers
        values_K[k], ids_K[k] = np.nan, 0


@njit(cache=True)
def _argmax(logits_RV, tokens_R):
    share_out(_argmax_rows, len(logits_RV), (logits_RV, tokens_R), False)


@inner()
def _argmax_rows(begin, end, logits_RV, tokens_R):
    for r in range(begin, end):
        tokens_R[r] = _argmax_row(logits_RV[r])


@inner()
def _argmax_row(logits_V):
    """Finds the first block with the largest maximum, then the place within it: a maximum
    vectorizes, a search for its place does not.
    """
    best, start = np.float32(-np.inf), 0
    for first in range(0, len(logits_V), _BLOCK):
        largest = _largest(logits_V[first : first + _BLOCK])
        if largest > best:
            best, start = largest, first
    for v in range(start, min(start + _BLOCK, len(logits_V))):
        if logits_V[v] == best:
            return v
    return 0


@inner(fastmath={"nnan", "nsz"})
def _largest(values):
    largest = values[0]
    for i in range(1, len(values)):
        largest = max(largest, values[i])
    return largest
