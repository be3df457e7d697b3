"""Triton column of the draws of ``sampling``: several programs draw a row, each for a part of the
vocabulary.

``sample`` takes the reference's arguments. A captured step calls ``sample_slots``, with all
settings and the counters of the random numbers on the device. The floors of top-k and top-p are
found by their bits, five at a time from the highest on, which needs no sort: the programs of a row
add up its weights by these bits (a histogram), and those of the next launch add the histograms of
all parts, choose the bits of the floor, and go on within them. Then the masses of parts say in
which of them the token lies. Sums are float64 in a fixed order, so a draw does not depend on the
batch.

15 launches, whatever rows ask for; programs of rows that do not ask end at once. Roofline: 4 V
bytes per row and pass, from memory once and from the L2 cache after that. Passes: 1 greedy, 2
drawn, 6 more for each of top-k and top-p.

R rows  V vocabulary  Q parts of a row  B bins of a histogram
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
from ..reference.sampling import MIN_TEMPERATURE, Purpose, SamplingParams, SlotSampling
from .target import interpreted, power_of_two

_PART = 4096
_BITS, _STEPS = 5, 6  # 30 bits: a weight is at most 1.0, so that its two highest are zero
_COLUMNS = 64  # weights that a histogram takes at once


def sample(logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64]) -> Tensor:
    """Same as ``sampling.sample``."""
    device = logits_RV.device
    settings = (params.temperature_R, params.top_k_R, params.top_p_R, params.min_p_R)
    temperature, top_k, top_p, min_p = (to_device(setting, device) for setting in settings)
    return _sample(
        logits_RV, (temperature, top_k, top_p, min_p), to_device(uniform_R, device), None, Purpose.SAMPLE
    )


def sample_slots(logits_RV: Tensor, slots: SlotSampling, purpose: Purpose) -> Tensor:
    """Same as ``sampling.sample_slots``, and the host reads nothing."""
    settings = (slots.temperature_R, slots.top_k_R, slots.top_p_R, slots.min_p_R)
    return _sample(logits_RV, settings, slots.seed_R, slots.position_R, purpose)


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
    if not num_rows:
        return tokens_R

    def room(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_RV.device)

    part = min(_PART, power_of_two(vocab))
    num_parts, bins = triton.cdiv(vocab, part), 1 << _BITS
    bests_RQ, places_RQ = (room(num_rows, num_parts, dtype=kind) for kind in (torch.float32, torch.int32))
    states = room(2 * _STEPS, 3, num_rows, dtype=torch.float64)
    sums_2RQB = room(2, num_rows, num_parts, bins, dtype=torch.float64)
    masses_RQ = room(num_rows, num_parts, dtype=torch.float64)
    floors_2R = room(2, num_rows, dtype=torch.float32)
    grid, row = (num_rows, num_parts), (logits_RV, logits_RV.stride(0), settings[0])
    cut = {"Q": num_parts, "Q_PAD": power_of_two(num_parts), "PART": part}
    cut["MIN_TEMPERATURE"] = MIN_TEMPERATURE
    bits = {"BITS": _BITS, "STEPS": _STEPS, "BINS": bins}
    _best_kernel[grid](logits_RV, logits_RV.stride(0), bests_RQ, places_RQ, vocab, Q=num_parts, PART=part)
    found = bests_RQ, states, sums_2RQB, floors_2R
    for step in range(2 * _STEPS):
        _narrow_kernel[grid](
            *row,
            *settings[1:],
            *found,
            vocab,
            num_rows,
            step,
            FIRST=step % _STEPS == 0,
            MASS=step >= _STEPS,
            COLUMNS=part if interpreted() else min(_COLUMNS, part),
            **cut,
            **bits,
            num_warps=8,
        )
    _mass_kernel[grid](*row, settings[2], *found, masses_RQ, vocab, num_rows, **cut, **bits)
    _pick_kernel[(num_rows,)](
        *row,
        bests_RQ,
        places_RQ,
        floors_2R,
        masses_RQ,
        seed_R,
        position_R if position_R is not None else seed_R,
        tokens_R,
        vocab,
        num_rows,
        COUNTERS=position_R is not None,
        PURPOSE=int(purpose),
        **cut,
        num_warps=8,
    )
    return tokens_R


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
def _weights(logits_ptr, v, V, best, temperature, least):
    """exp((x - best) / temperature), 0 below ``least`` and past the vocabulary."""
    logits = tl.load(logits_ptr + v, mask=v < V, other=float("-inf"))
    weights = tl.exp((logits - best) / temperature)
    return tl.where(weights < least, 0.0, weights)


@triton.jit
def _best_of(bests_ptr, row, Q: tl.constexpr, Q_PAD: tl.constexpr):
    """The largest logit of a row."""
    q = tl.arange(0, Q_PAD)
    return tl.max(tl.load(bests_ptr + row * Q + q, mask=q < Q, other=float("-inf")), 0)


@triton.jit
def _best_kernel(logits_ptr, logits_stride, bests_ptr, places_ptr, V, Q: tl.constexpr, PART: tl.constexpr):
    """The largest logit of a part, and its first place."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    v = part * PART + tl.arange(0, PART)
    logits = tl.load(logits_ptr + row * logits_stride + v, mask=v < V, other=float("-inf"))
    best = tl.max(logits, 0)
    tl.store(bests_ptr + row * Q + part, best)
    tl.store(places_ptr + row * Q + part, tl.min(tl.where(logits == best, v, V), 0))


@triton.jit
def _refined(
    row,
    step,
    top_p,
    states_ptr,
    sums_ptr,
    R,
    Q: tl.constexpr,
    Q_PAD: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    BINS: tl.constexpr,
    MASS: tl.constexpr,
):
    """By the sums of the step before ``step``: the bits of the floor so far, and the number (or
    mass, for top-p) of weights beyond all that begin with them, and the one that is wanted.
    """
    state_ptr = states_ptr + (step - 1) * 3 * R + row
    low = tl.load(state_ptr).to(tl.int32)
    beyond = tl.load(state_ptr + R)
    wanted = tl.load(state_ptr + 2 * R)
    b = tl.arange(0, BINS)
    at = tl.arange(0, Q_PAD)[:, None] * BINS + b[None, :]
    sums_ptr += (((step - 1) % 2) * R + row) * Q * BINS
    sums = tl.sum(tl.load(sums_ptr + at, mask=at < Q * BINS, other=0.0), 0)
    reach = tl.sum(tl.where(b[None, :] >= b[:, None], sums[None, :], 0.0), 1)  # from each bin on
    level = (step - 1) % STEPS
    if MASS:
        wanted = tl.where(level == 0, tl.sum(tl.where(b == 0, reach, 0.0), 0) * top_p, wanted)
    digit = tl.max(tl.where(beyond + reach >= wanted, b, 0), 0)
    beyond += tl.sum(tl.where(b > digit, sums, 0.0), 0)
    return low + (digit << (BITS * (STEPS - 1 - level))), beyond, wanted


@triton.jit(do_not_specialize=["R", "step"])
def _narrow_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    bests_ptr,
    states_ptr,
    sums_ptr,
    floors_ptr,
    V,
    R,
    step,
    FIRST: tl.constexpr,
    MASS: tl.constexpr,
    COLUMNS: tl.constexpr,
    Q: tl.constexpr,
    Q_PAD: tl.constexpr,
    PART: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Weights of a part by the next bits of the floor of top-k, later of top-p (``MASS``). Every
    rule is about the weights that earlier ones left, so the first step of top-p ends top-k.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    if temperature < MIN_TEMPERATURE:
        return
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    limits = (top_k > 0) & (top_k < V)
    least = 0.0
    if MASS:
        if FIRST:
            least = tl.load(min_p_ptr + row)
            if limits:
                low, _, _ = _refined(
                    row, step, top_p, states_ptr, sums_ptr, R, Q, Q_PAD, BITS, STEPS, BINS, False
                )
                least = tl.maximum(least, low.to(tl.float32, bitcast=True))
            if part == 0:
                tl.store(floors_ptr + row, least)
        else:
            least = tl.load(floors_ptr + row)
        if top_p >= 1.0:
            return
    else:
        if not limits:
            return
    state_ptr = states_ptr + step * 3 * R + row
    if FIRST:
        low = top_k.to(tl.int32) * 0
        beyond = top_k.to(tl.float64) * 0.0
        wanted = top_k.to(tl.float64)
    else:
        low, beyond, wanted = _refined(
            row, step, top_p, states_ptr, sums_ptr, R, Q, Q_PAD, BITS, STEPS, BINS, MASS
        )
    if part == 0:
        tl.store(state_ptr, low.to(tl.float64))
        tl.store(state_ptr + R, beyond)
        tl.store(state_ptr + 2 * R, wanted)
    best = _best_of(bests_ptr, row, Q, Q_PAD)
    shift = BITS * (STEPS - 1 - step % STEPS)
    b = tl.arange(0, BINS)
    sums = tl.zeros((BINS, COLUMNS), tl.float64)
    for start in range(0, PART, COLUMNS):
        v = part * PART + start + tl.arange(0, COLUMNS)
        weights = _weights(logits_ptr, v, V, best, temperature, least)
        digits = (weights.to(tl.int32, bitcast=True) - low) >> shift
        if MASS:
            values = weights.to(tl.float64)
        else:
            values = (v < V).to(tl.float64)
        sums += tl.where(digits[None, :] == b[:, None], values[None, :], 0.0)
    at = ((step % 2) * R + row) * Q + part
    tl.store(sums_ptr + at * BINS + b, tl.sum(sums, 1))


@triton.jit(do_not_specialize=["R"])
def _mass_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    top_p_ptr,
    bests_ptr,
    states_ptr,
    sums_ptr,
    floors_ptr,
    masses_ptr,
    V,
    R,
    Q: tl.constexpr,
    Q_PAD: tl.constexpr,
    PART: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
    BINS: tl.constexpr,
):
    """The weight of a part above all floors."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if temperature < MIN_TEMPERATURE:
        return
    least = tl.load(floors_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1.0:
        low, _, _ = _refined(
            row, 2 * STEPS, top_p, states_ptr, sums_ptr, R, Q, Q_PAD, BITS, STEPS, BINS, True
        )
        least = tl.maximum(least, low.to(tl.float32, bitcast=True))
    if part == 0:
        tl.store(floors_ptr + R + row, least)
    v = part * PART + tl.arange(0, PART)
    best = _best_of(bests_ptr, row, Q, Q_PAD)
    weights = _weights(logits_ptr + row * logits_stride, v, V, best, temperature, least)
    tl.store(masses_ptr + row * Q + part, tl.sum(weights.to(tl.float64), 0))


@triton.jit(do_not_specialize=["R"])
def _pick_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    bests_ptr,
    places_ptr,
    floors_ptr,
    masses_ptr,
    seed_ptr,
    position_ptr,
    tokens_ptr,
    V,
    R,
    COUNTERS: tl.constexpr,
    PURPOSE: tl.constexpr,
    Q: tl.constexpr,
    Q_PAD: tl.constexpr,
    PART: tl.constexpr,
    MIN_TEMPERATURE: tl.constexpr,
):
    """The token of a row: the first of the largest; or the part in which the cumulative weight
    passes the random number's share of it all, then the place in it. If rounding puts that share at
    the total, the last token with any weight.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    best = _best_of(bests_ptr, row, Q, Q_PAD)
    q = tl.arange(0, Q_PAD)
    if temperature < MIN_TEMPERATURE:
        bests = tl.load(bests_ptr + row * Q + q, mask=q < Q, other=float("-inf"))
        places = tl.load(places_ptr + row * Q + q, mask=q < Q, other=0)
        first = tl.min(tl.where((bests == best) & (q < Q), places, V), 0)
        tl.store(tokens_ptr + row, first.to(tl.int64))
        return

    if COUNTERS:
        uniform = _uniform(tl.load(seed_ptr + row), tl.load(position_ptr + row), PURPOSE)
    else:
        uniform = tl.load(seed_ptr + row)
    masses = tl.load(masses_ptr + row * Q + q, mask=q < Q, other=0.0)
    reach = tl.cumsum(masses, 0)
    target = uniform * tl.sum(tl.where(q == Q - 1, reach, 0.0), 0)
    chosen = tl.min(tl.where((reach > target) & (masses > 0.0), q, Q_PAD), 0)
    chosen = tl.minimum(chosen, tl.max(tl.where(masses > 0.0, q, 0), 0))
    before = tl.sum(tl.where(q == chosen - 1, reach, 0.0), 0)
    v = chosen * PART + tl.arange(0, PART)
    least = tl.load(floors_ptr + R + row)
    weights = _weights(logits_ptr + row * logits_stride, v, V, best, temperature, least)
    passed = (before + tl.cumsum(weights.to(tl.float64), 0) > target) & (weights > 0.0)
    last = tl.max(tl.where(weights > 0.0, v, 0), 0)
    tl.store(tokens_ptr + row, tl.minimum(tl.min(tl.where(passed, v, V), 0), last).to(tl.int64))
