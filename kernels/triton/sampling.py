"""Triton column of ``sampling``: edits of logits and log-probabilities. Draws: ``draw.py``.

Roofline: 4 V bytes per row for log-probabilities; edits read and write the logits they change.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..host_arrays import to_device
from ..reference import sampling as reference
from ..reference.sampling import LogitEdits
from .target import power_of_two

_CHUNK = 4096
_EDITS_PER_PROGRAM = 256
_WORDS_PER_PROGRAM = 64
_EDITED = 1024  # tokens of a row that a program penalises


def edit_logits(logits_RV: Tensor, edits: LogitEdits) -> None:
    """Same as ``sampling.edit_logits``."""
    device = logits_RV.device
    if len(edits.bias_rows_N):
        edit_bias(
            logits_RV,
            *(
                to_device(part, device)
                for part in (edits.bias_rows_N, edits.bias_tokens_N, edits.bias_values_N)
            ),
        )
    if len(edits.masked_rows_N):
        edit_mask(
            logits_RV, *(to_device(part, device) for part in (edits.masked_rows_N, edits.masked_tokens_N))
        )
    if len(edits.counted_rows_N):
        reference.penalise_counted(logits_RV, edits)


def edit_bias(logits_RV: Tensor, rows_N: Tensor, tokens_N: Tensor, values_N: Tensor) -> None:
    """Adds values_N float32 in place. Pairs with row -1 pad a list of fixed length, here and
    below.
    """
    _bias_kernel[_edit_grid(rows_N)](
        logits_RV, logits_RV.stride(0), rows_N, tokens_N, values_N, len(rows_N), CHUNK=_EDITS_PER_PROGRAM
    )


def edit_mask(logits_RV: Tensor, rows_N: Tensor, tokens_N: Tensor) -> None:
    """Sets pairs to -inf in place."""
    _mask_kernel[_edit_grid(rows_N)](
        logits_RV, logits_RV.stride(0), rows_N, tokens_N, len(rows_N), CHUNK=_EDITS_PER_PROGRAM
    )


def penalise(logits_RV: Tensor, slots_R: Tensor, counts_SV: Tensor, penalties_S3: Tensor) -> None:
    """Same as ``sampling.penalise``."""
    assert logits_RV.stride(1) == counts_SV.stride(1) == 1 and penalties_S3.is_contiguous()
    if len(slots_R):
        grid = (len(slots_R), triton.cdiv(logits_RV.shape[1], _EDITED))
        _penalty_kernel[grid](
            logits_RV,
            logits_RV.stride(0),
            slots_R,
            counts_SV,
            counts_SV.stride(0),
            penalties_S3,
            logits_RV.shape[1],
            CHUNK=_EDITED,
            num_warps=4,
        )


def allow_only(logits_RV: Tensor, rows_S: NDArray[np.int64], bits_SW: NDArray[np.int32]) -> None:
    """Same as ``sampling.allow_only``."""
    edit_allowed(logits_RV, to_device(rows_S, logits_RV.device), to_device(bits_SW, logits_RV.device))


def edit_allowed(logits_RV: Tensor, rows_S: Tensor, bits_SW: Tensor) -> None:
    """``allow_only`` with rows_S int64 and bits_SW int32 on the device."""
    assert logits_RV.stride(1) == 1 and bits_SW.stride(1) == 1 and 32 * bits_SW.shape[1] >= logits_RV.shape[1]
    if len(rows_S):
        grid = (len(rows_S), triton.cdiv(logits_RV.shape[1], 32 * _WORDS_PER_PROGRAM))
        _allow_kernel[grid](
            logits_RV,
            logits_RV.stride(0),
            rows_S,
            bits_SW,
            bits_SW.stride(0),
            logits_RV.shape[1],
            WORDS=_WORDS_PER_PROGRAM,
            num_warps=4,
        )


def logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Same as ``sampling.logprobs``. The library finds the top tokens."""
    num_rows, vocab = logits_SV.shape
    assert logits_SV.dtype == torch.float32 and logits_SV.stride(1) == 1
    total_S, chosen_S = (logits_SV.new_empty(num_rows) for _ in range(2))
    if num_rows:
        _logsumexp_kernel[(num_rows,)](
            logits_SV,
            logits_SV.stride(0),
            tokens_S,
            total_S,
            chosen_S,
            vocab,
            CHUNK=_chunk(vocab),
            num_warps=8,
        )
    top = logits_SV.topk(num_top, dim=-1)
    return chosen_S, top.indices, top.values - total_S[:, None]


def _chunk(vocab: int) -> int:
    return min(_CHUNK, power_of_two(vocab))


def _edit_grid(rows_N: Tensor) -> tuple[int]:
    return (max(1, triton.cdiv(len(rows_N), _EDITS_PER_PROGRAM)),)


@triton.jit
def _logsumexp_kernel(logits_ptr, logits_stride, tokens_ptr, total_ptr, chosen_ptr, V, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    lane = tl.arange(0, CHUNK)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, V, CHUNK):
        logits = tl.load(logits_ptr + start + lane, mask=start + lane < V, other=float("-inf"))
        new = tl.maximum(best, logits)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(best - base) + tl.exp(logits - base)
        best = new
    most = tl.max(best, 0)
    logsum = most + tl.log(tl.sum(total * tl.exp(best - most), 0))
    tl.store(total_ptr + row, logsum)
    tl.store(chosen_ptr + row, tl.load(logits_ptr + tl.load(tokens_ptr + row)) - logsum)


@triton.jit(do_not_specialize=["num"])  # one kernel for all lists
def _bias_kernel(logits_ptr, logits_stride, rows_ptr, tokens_ptr, values_ptr, num, CHUNK: tl.constexpr):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(rows_ptr + i, mask=i < num, other=-1)
    at = logits_ptr + row * logits_stride + tl.load(tokens_ptr + i, mask=row >= 0, other=0)
    value = tl.load(values_ptr + i, mask=row >= 0, other=0.0)
    tl.store(at, tl.load(at, mask=row >= 0, other=0.0) + value, mask=row >= 0)


@triton.jit(do_not_specialize=["num"])  # one kernel for all lists
def _mask_kernel(logits_ptr, logits_stride, rows_ptr, tokens_ptr, num, CHUNK: tl.constexpr):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(rows_ptr + i, mask=i < num, other=-1)
    at = logits_ptr + row * logits_stride + tl.load(tokens_ptr + i, mask=row >= 0, other=0)
    tl.store(at, tl.full((CHUNK,), float("-inf"), tl.float32), mask=row >= 0)


@triton.jit(do_not_specialize=["bits_stride"])
def _allow_kernel(logits_ptr, logits_stride, rows_ptr, bits_ptr, bits_stride, V, WORDS: tl.constexpr):
    """Masks the tokens of WORDS words of one row."""
    row = tl.load(rows_ptr + tl.program_id(0))
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)
    bits = tl.load(bits_ptr + tl.program_id(0).to(tl.int64) * bits_stride + word, mask=word * 32 < V, other=0)
    token = word[:, None] * 32 + bit[None, :]
    refused = ((bits[:, None] >> bit[None, :]) & 1) == 0
    never = tl.full((WORDS, 32), float("-inf"), tl.float32)
    end = tl.where(row >= 0, V, 0)
    tl.store(logits_ptr + row * logits_stride + token, never, mask=refused & (token < end))


@triton.jit
def _penalty_kernel(
    logits_ptr, logits_stride, slots_ptr, counts_ptr, counts_stride, penalties_ptr, V, CHUNK: tl.constexpr
):
    """Penalises a chunk of one row."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    repetition = tl.load(penalties_ptr + 3 * slot)
    presence = tl.load(penalties_ptr + 3 * slot + 1)
    frequency = tl.load(penalties_ptr + 3 * slot + 2)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        count = tl.load(counts_ptr + slot * counts_stride + token, mask=token < V, other=0).to(tl.int32)
        at = logits_ptr + tl.program_id(0).to(tl.int64) * logits_stride + token
        value = tl.load(at, mask=count > 0, other=0.0)
        value = tl.where(value > 0.0, value / repetition, value * repetition)
        value -= frequency * (count >> 1).to(tl.float32)
        value -= tl.where(count > 1, presence, 0.0)
        tl.store(at, value, mask=count > 0)
