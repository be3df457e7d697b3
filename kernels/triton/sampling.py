"""Triton column of ``sampling``: edits of logits, draws and log-probabilities, one program per row.

``sample``, ``edit_logits`` and ``logprobs`` take the reference's arguments. A captured step calls
``sample_slots``, with all settings and the counters of the random numbers on the device. Floors of
top-k and top-p are found by bisection over the bits of a float, which needs no sort: one pass over
the row per bit, until the choice is settled. Sums are float64 in a fixed order, so a draw does not
depend on the batch.

Roofline: 4 V bytes per row and pass, from memory once and from the L2 cache after that. Passes: 1
greedy, 3 drawn, at most 31 more for each of top-k and top-p.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..reference.sampling import MIN_TEMPERATURE, LogitEdits, Purpose, SamplingParams, SlotSampling
from .target import power_of_two

_CHUNK = 4096
_EDITS_PER_PROGRAM = 256
_WORDS_PER_PROGRAM = 64


def sample(logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64]) -> Tensor:
    """Same as ``sampling.sample``."""
    device = logits_RV.device
    settings = (params.temperature_R, params.top_k_R, params.top_p_R, params.min_p_R)
    temperature, top_k, top_p, min_p = (_move(setting, device) for setting in settings)
    return _sample(
        logits_RV, (temperature, top_k, top_p, min_p), _move(uniform_R, device), None, Purpose.SAMPLE
    )


def sample_slots(logits_RV: Tensor, slots: SlotSampling, purpose: Purpose) -> Tensor:
    """Same as ``sampling.sample_slots``, and the host reads nothing."""
    settings = (slots.temperature_R, slots.top_k_R, slots.top_p_R, slots.min_p_R)
    return _sample(logits_RV, settings, slots.seed_R, slots.position_R, purpose)


def edit_logits(logits_RV: Tensor, edits: LogitEdits) -> None:
    """Same as ``sampling.edit_logits``."""
    device = logits_RV.device
    if len(edits.bias_rows_N):
        edit_bias(
            logits_RV,
            *(_move(part, device) for part in (edits.bias_rows_N, edits.bias_tokens_N, edits.bias_values_N)),
        )
    if len(edits.masked_rows_N):
        edit_mask(logits_RV, *(_move(part, device) for part in (edits.masked_rows_N, edits.masked_tokens_N)))
    if len(edits.counted_rows_N):
        counted = tuple(
            _move(part, device)
            for part in (edits.counted_rows_N, edits.counted_tokens_N, edits.output_counts_N)
        )
        penalties = tuple(
            _move(part, device) for part in (edits.repetition_R, edits.presence_R, edits.frequency_R)
        )
        edit_penalties(
            logits_RV, (counted[0], counted[1], counted[2]), (penalties[0], penalties[1], penalties[2])
        )


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


def edit_penalties(
    logits_RV: Tensor, counted: tuple[Tensor, Tensor, Tensor], penalties: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Applies penalties in place. ``counted``: rows_N, tokens_N, output_counts_N int64.
    ``penalties``: repetition, presence, frequency [R].
    """
    _penalty_kernel[_edit_grid(counted[0])](
        logits_RV, logits_RV.stride(0), *counted, *penalties, len(counted[0]), CHUNK=_EDITS_PER_PROGRAM
    )


def allow_only(logits_RV: Tensor, rows_S: NDArray[np.int64], bits_SW: NDArray[np.int32]) -> None:
    """Same as ``sampling.allow_only``."""
    edit_allowed(logits_RV, _move(rows_S, logits_RV.device), _move(bits_SW, logits_RV.device))


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


def _sample(
    logits_RV: Tensor,
    settings: tuple[Tensor, Tensor, Tensor, Tensor],
    seed_R: Tensor,
    position_R: Tensor | None,
    purpose: Purpose,
) -> Tensor:
    """Without positions, ``seed_R`` holds the uniform numbers themselves."""
    num_rows, vocab = logits_RV.shape
    assert logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1
    tokens_R = torch.empty(num_rows, dtype=torch.int64, device=logits_RV.device)
    if num_rows:
        _sample_kernel[(num_rows,)](
            logits_RV,
            logits_RV.stride(0),
            *settings,
            seed_R,
            position_R if position_R is not None else seed_R,
            tokens_R,
            vocab,
            MIN_TEMPERATURE=MIN_TEMPERATURE,
            COUNTERS=position_R is not None,
            PURPOSE=int(purpose),
            CHUNK=_chunk(vocab),
            num_warps=8,
        )
    return tokens_R


def _chunk(vocab: int) -> int:
    return min(_CHUNK, power_of_two(vocab))


def _edit_grid(rows_N: Tensor) -> tuple[int]:
    return (max(1, triton.cdiv(len(rows_N), _EDITS_PER_PROGRAM)),)


def _move(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


@triton.jit
def _mix(value):
    """splitmix64 (Steele et al. 2014), as in ``sampling.uniform``."""
    value += 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _uniform(seed, position, PURPOSE: tl.constexpr):
    """``sampling.uniform`` of scalars, computed on vectors of one, because 64-bit products of
    scalars warn in the interpreter.
    """
    one = tl.zeros((1,), tl.int64)
    key = _mix((seed + one).to(tl.uint64, bitcast=True))
    key = _mix(key ^ (position + one).to(tl.uint64, bitcast=True))
    key = _mix(key ^ PURPOSE)
    return tl.sum((key >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16, 0)  # 2^-53


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _weights(logits_ptr, v, V, best, temperature, least):
    """exp((x - best) / temperature), 0 below ``least`` and past the vocabulary."""
    logits = tl.load(logits_ptr + v, mask=v < V, other=float("-inf"))
    weights = tl.exp((logits - best) / temperature)
    return tl.where(weights < least, 0.0, weights)


@triton.jit
def _top_k_floor(logits_ptr, top_k, V, best, temperature, CHUNK: tl.constexpr):
    """A floor that separates the ``top_k`` largest weights, and those that tie with the last of
    them, from all others. Non-negative floats are ordered like their bits.
    """
    low = 0
    high = 0x3F800001  # just above 1.0, the weight of the best token
    while high - low > 1:
        middle = low + (high - low) // 2
        found = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, V, CHUNK):
            v = start + tl.arange(0, CHUNK)
            weights = _weights(logits_ptr, v, V, best, temperature, 0.0)
            found += ((weights.to(tl.int32, bitcast=True) >= middle) & (v < V)).to(tl.int32)
        count = tl.sum(found, 0)
        low = tl.where(count >= top_k, middle, low)
        # Exactly top_k weights reach it: settled.
        high = tl.where(count == top_k, low, tl.where(count > top_k, high, middle))
    return _as_float(low)


@triton.jit
def _top_p_floor(logits_ptr, top_p, V, best, temperature, least, CHUNK: tl.constexpr):
    """A floor that separates the weights needed for ``top_p`` of the total from all others. The
    total covers the weights from ``least`` on.
    """
    mass = tl.zeros((CHUNK,), tl.float64)
    for start in range(0, V, CHUNK):
        mass += _weights(logits_ptr, start + tl.arange(0, CHUNK), V, best, temperature, least).to(tl.float64)
    wanted = tl.sum(mass, 0) * top_p.to(tl.float64)
    low = 0
    high = 0x3F800001
    reach_low = V
    reach_high = 0
    while (high - low > 1) & (reach_low - reach_high > 1):  # one weight between them: settled
        middle = low + (high - low) // 2
        mass = tl.zeros((CHUNK,), tl.float64)
        found = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, V, CHUNK):
            weights = _weights(logits_ptr, start + tl.arange(0, CHUNK), V, best, temperature, least)
            reached = weights.to(tl.int32, bitcast=True) >= middle
            mass += tl.where(reached, weights, 0.0).to(tl.float64)
            found += reached.to(tl.int32)
        enough = tl.sum(mass, 0) >= wanted
        count = tl.sum(found, 0)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        reach_low = tl.where(enough, count, reach_low)
        reach_high = tl.where(enough, reach_high, count)
    return _as_float(low)


@triton.jit
def _draw(logits_ptr, uniform, V, best, temperature, least, CHUNK: tl.constexpr):
    """The chunk in which the cumulative weight passes ``uniform`` of its total, then the place in
    it. If rounding puts the target at the total, the last token with any weight.
    """
    lane = tl.arange(0, CHUNK)
    # Added chunk by chunk here and below, so that both give the same total.
    total = tl.sum(tl.zeros((1,), tl.float64), 0)
    for start in range(0, V, CHUNK):
        total += tl.sum(_weights(logits_ptr, start + lane, V, best, temperature, least).to(tl.float64), 0)
    target = uniform * total
    before = total * 0.0
    chosen = -1
    last = 0
    for start in range(0, V, CHUNK):
        if chosen < 0:
            weights = _weights(logits_ptr, start + lane, V, best, temperature, least)
            inside = tl.sum(weights.to(tl.float64), 0)
            last = tl.maximum(last, tl.max(tl.where(weights > 0.0, start + lane, 0), 0))
            if before + inside > target:
                chosen = start
            else:
                before += inside
    token = last
    if chosen >= 0:
        # Read again: kept from the loop, the weights would be more than there are registers for.
        weights = _weights(logits_ptr, chosen + lane, V, best, temperature, least)
        passed = (before + tl.cumsum(weights.to(tl.float64), 0) > target) & (weights > 0.0)
        token = tl.minimum(tl.min(tl.where(passed, chosen + lane, V), 0), last)
    return token


@triton.jit
def _sample_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    tokens_ptr,
    V,
    MIN_TEMPERATURE: tl.constexpr,
    COUNTERS: tl.constexpr,
    PURPOSE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    lane = tl.arange(0, CHUNK)
    temperature = tl.load(temperature_ptr + row)

    bests = tl.full((CHUNK,), float("-inf"), tl.float32)
    places = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, V, CHUNK):
        logits = tl.load(logits_ptr + start + lane, mask=start + lane < V, other=float("-inf"))
        places = tl.where(logits > bests, start + lane, places)
        bests = tl.maximum(bests, logits)
    best = tl.max(bests, 0)
    if temperature < MIN_TEMPERATURE:
        # The first of the largest: each lane keeps its earliest place, and the smallest of those is
        # taken.
        tl.store(tokens_ptr + row, tl.min(tl.where(bests == best, places, V), 0).to(tl.int64))
        return

    # Weights below this are out. Every rule raises it, based on the weights that earlier rules
    # left.
    least = tl.load(min_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    if (top_k > 0) & (top_k < V):
        least = tl.maximum(least, _top_k_floor(logits_ptr, top_k, V, best, temperature, CHUNK))
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1.0:
        least = tl.maximum(least, _top_p_floor(logits_ptr, top_p, V, best, temperature, least, CHUNK))
    if COUNTERS:
        uniform = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row), PURPOSE)
    else:
        uniform = tl.load(seed_ptr + row)
    tl.store(tokens_ptr + row, _draw(logits_ptr, uniform, V, best, temperature, least, CHUNK).to(tl.int64))


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
    tl.store(logits_ptr + row * logits_stride + token, never, mask=refused & (token < V) & (row >= 0))


@triton.jit(do_not_specialize=["num"])
def _penalty_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    tokens_ptr,
    counts_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    num,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(rows_ptr + i, mask=i < num, other=-1)
    real = row >= 0
    at = logits_ptr + row * logits_stride + tl.load(tokens_ptr + i, mask=real, other=0)
    count = tl.load(counts_ptr + i, mask=real, other=0)
    value = tl.load(at, mask=real, other=0.0)
    repetition = tl.load(repetition_ptr + row, mask=real, other=1.0)
    value = tl.where(value > 0.0, value / repetition, value * repetition)
    value -= tl.load(frequency_ptr + row, mask=real, other=0.0) * count.to(tl.float32)
    value -= tl.where(count > 0, tl.load(presence_ptr + row, mask=real, other=0.0), 0.0)
    tl.store(at, value, mask=real)
