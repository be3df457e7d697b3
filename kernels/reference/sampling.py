"""Chooses the next token of every row from its logits.

A draw depends only on its row's logits, its settings and one uniform number, whatever the other
rows of the batch. The cumulative distribution is inverted in vocabulary order; the number is a hash
of (seed, position, purpose). Settings stay on the host, which picks the rows that need each rule. A
batch of greedy rows costs one argmax.

R rows  V vocabulary  N pairs (row, token) of a sparse edit  S rows that are drawn
B blocks of W tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..splitmix import ADD, TIMES, mix64

# A temperature below this is greedy, as in vLLM: in float32 the distribution is a point anyway.
MIN_TEMPERATURE = 1e-5

# The boundary of a row's top-p nucleus is searched among this many top tokens, then more, then all.
# Partial sorts: 32 rows of 152,000 took 2.2 ms for 50, 9.4 ms for 1,024 and 198 ms for all on 2
# cores (EPYC, torch 2.13).
_NUCLEUS_WIDTHS = (256, 4096)

# The cumulative distribution is searched by block, then within one, which avoids a float64
# cumulative sum over V.
_DRAW_BLOCK = 512


NO_PENALTIES = (1.0, 0.0, 0.0)
"""Repetition, presence and frequency of a request without penalties."""

# The signature of ``likeliest``.
Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class Purpose(IntEnum):
    """The purpose of a uniform number."""

    SAMPLE = 0
    DRAFT = 1
    ACCEPT = 2


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of the rows, host arrays [R]. top_k 0, top_p 1 and min_p 0 are off;
    temperature 0 is greedy.
    """

    temperature_R: NDArray[np.float32]
    top_k_R: NDArray[np.int64]
    top_p_R: NDArray[np.float32]
    min_p_R: NDArray[np.float32]

    @staticmethod
    def greedy(num_rows: int) -> SamplingParams:
        """Settings of rows that take the most likely token."""
        ones = np.ones(num_rows, np.float32)
        zeros = np.zeros(num_rows, np.float32)
        return SamplingParams(zeros, np.zeros(num_rows, np.int64), ones, zeros)

    @cached_property
    def drawn_S(self) -> NDArray[np.int64]:
        """The rows that are drawn; the others are greedy."""
        return np.flatnonzero(self.temperature_R >= MIN_TEMPERATURE)


@dataclass(frozen=True)
class LogitEdits:
    """Sparse changes of logits, host arrays. Every pair (row, token) occurs at most once per kind,
    except among the masked.

    counted: tokens that a row has seen. ``output_counts_N`` counts them among its sampled tokens
    (0: in the prompt alone); the penalties [R] act on these. bias: added. masked: set to -inf (stop
    ids before ``min_tokens``, ends of bad words).
    """

    counted_rows_N: NDArray[np.int64]
    counted_tokens_N: NDArray[np.int64]
    output_counts_N: NDArray[np.int64]
    repetition_R: NDArray[np.float32]
    presence_R: NDArray[np.float32]
    frequency_R: NDArray[np.float32]
    bias_rows_N: NDArray[np.int64]
    bias_tokens_N: NDArray[np.int64]
    bias_values_N: NDArray[np.float32]
    masked_rows_N: NDArray[np.int64]
    masked_tokens_N: NDArray[np.int64]


def uniform(seed: NDArray[np.int64], position: NDArray[np.int64], purpose: Purpose) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position): 53 bits of ``mix64`` over the three."""
    key = mix64(seed.astype(np.uint64))
    key = mix64(key ^ position.astype(np.uint64))
    key = mix64(key ^ np.uint64(purpose))
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_slots(seed_R: Tensor, position_R: Tensor, purpose: Purpose) -> Tensor:
    """``uniform`` for int64 tensors, on their device: products of int64 keep the low 64 bits."""
    key_R = _mix64(_mix64(_mix64(seed_R) ^ position_R) ^ int(purpose))
    return _shifted(key_R, 11).double() * 2.0**-53


def token_counts(
    history_i32: NDArray[np.int32], prompt_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct tokens of one row and how often each was sampled (0: prompt alone).
    ``history_i32`` holds the prompt first.
    """
    tokens, index = np.unique(history_i32, return_inverse=True)
    counts = np.bincount(index[prompt_length:], minlength=len(tokens))
    return tokens.astype(np.int64), counts.astype(np.int64)


def edit_logits(logits_RV: Tensor, edits: LogitEdits) -> None:
    """Applies bias, then the mask, then penalties, in place on logits_RV float32.

    Repetition divides positive and multiplies negative logits of every counted token (arXiv
    1909.05858). Frequency is subtracted once per occurrence in the output, presence once if there
    is any.
    """
    device = logits_RV.device
    if len(edits.bias_rows_N):
        where = _pairs(edits.bias_rows_N, edits.bias_tokens_N, device)
        logits_RV[where] += _move(edits.bias_values_N, device)
    if len(edits.masked_rows_N):
        logits_RV[_pairs(edits.masked_rows_N, edits.masked_tokens_N, device)] = -math.inf
    if len(edits.counted_rows_N):
        penalise_counted(logits_RV, edits)


def penalise_counted(logits_RV: Tensor, edits: LogitEdits) -> None:
    """Applies the penalties of ``edit_logits``, by what the host has counted."""
    device, rows = logits_RV.device, edits.counted_rows_N
    where = _pairs(rows, edits.counted_tokens_N, device)
    repetition_N = _move(edits.repetition_R[rows], device)
    counts = edits.output_counts_N
    subtracted = edits.frequency_R[rows] * counts + edits.presence_R[rows] * (counts > 0)
    values_N = logits_RV[where]
    values_N = torch.where(values_N > 0, values_N / repetition_N, values_N * repetition_N)
    logits_RV[where] = values_N - _move(subtracted.astype(np.float32), device)


def penalise(logits_RV: Tensor, slots_R: Tensor, counts_SV: Tensor, penalties_S3: Tensor) -> None:
    """Applies the penalties of ``edit_logits`` in place on logits_RV float32, by what is counted on
    their device: counts_SV int16 or int32 is twice how often a slot has sampled a token, and 1 more
    for one of its prompt; penalties_S3 float32 are repetition, presence and frequency. Rows of
    slots with ``NO_PENALTIES`` stay as they are. slots_R int64.
    """
    counts_RV = counts_SV.index_select(0, slots_R)
    repetition_R1, presence_R1, frequency_R1 = penalties_S3.index_select(0, slots_R)[:, :, None].unbind(1)
    times_RV = counts_RV >> 1
    subtracted_RV = frequency_R1.double() * times_RV + presence_R1.double() * (times_RV > 0)
    scaled_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    penalised_RV = scaled_RV - subtracted_RV.float()
    logits_RV.copy_(torch.where(counts_RV > 0, penalised_RV, logits_RV))


def allow_only(logits_RV: Tensor, rows_S: NDArray[np.int64], bits_SW: NDArray[np.int32]) -> None:
    """Sets tokens that ``rows_S`` may not sample to -inf, in place. Token t is allowed if bit t %
    32 of word t // 32 is set.

    Adds 0 or -inf row by row, from a table over bytes: at V 152,000 that took a core 0.05 to 0.13
    ms a row, ``masked_fill_`` with a mask of bools up to 1.7 ms (EPYC, torch 2.13).
    """
    vocab, device = logits_RV.shape[1], logits_RV.device
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    table = torch.where(bits == 1, 0.0, -math.inf)
    for row, bytes_N in zip(rows_S.tolist(), _move(bits_SW, device).view(torch.uint8), strict=True):
        logits_RV[row].add_(table.index_select(0, bytes_N.int()).flatten()[:vocab])


def likeliest(x_SV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest ``count`` values of each row, best first, and their indices: both [S, count]."""
    top = x_SV.topk(count, dim=-1)
    return top.values, top.indices


def sample(
    logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64], search: Search = likeliest
) -> Tensor:
    """Returns tokens_R int64 and leaves logits_RV float32 unchanged. ``uniform_R`` comes from
    ``uniform``; greedy rows do not read it. ``search`` behaves like ``likeliest``.
    """
    drawn = params.drawn_S
    if not len(drawn):
        return logits_RV.argmax(-1)
    drawn_S = _draw(_weights(logits_RV, params, drawn, search), _move(uniform_R[drawn], logits_RV.device))
    if len(drawn) == len(logits_RV):
        return drawn_S
    tokens_R = logits_RV.argmax(-1)
    tokens_R[_move(drawn, logits_RV.device)] = drawn_S
    return tokens_R


@dataclass(frozen=True)
class SlotSampling:
    """Settings of the rows on the device, [R] each: float32, except top_k, seed and position int64.
    ``position`` is that of the token to be drawn. The addresses may be those of a captured step.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor

    def rows(self, rows_S: Tensor) -> SlotSampling:
        """Those of some rows."""
        return SlotSampling(*(getattr(self, field.name).index_select(0, rows_S) for field in fields(self)))


def sample_slots(logits_RV: Tensor, slots: SlotSampling, purpose: Purpose) -> Tensor:
    """``sample``, with the numbers that ``uniform`` gives for the seeds and positions of
    ``slots``. Returns [R] int64. The reference reads the settings on the host.
    """
    arrays = (slots.temperature_R, slots.top_k_R, slots.top_p_R, slots.min_p_R)
    temperature, top_k, top_p, min_p = (array.cpu().numpy() for array in arrays)
    numbers = uniform(slots.seed_R.cpu().numpy(), slots.position_R.cpu().numpy(), purpose)
    return sample(logits_RV, SamplingParams(temperature, top_k, top_p, min_p), numbers)


def logprobs(
    logits_SV: Tensor, tokens_S: Tensor, num_top: int, search: Search = likeliest
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under the model's own logits (before ``edit_logits``), float32.

    Returns chosen_S of tokens_S, then ids [S, num_top] int64 and values [S, num_top] of the top
    tokens, best first.
    """
    total_S1 = logits_SV.logsumexp(-1, keepdim=True)
    chosen_S = (logits_SV.gather(-1, tokens_S[:, None]) - total_S1)[:, 0]
    values, ids = search(logits_SV, num_top)
    return chosen_S, ids, values - total_S1


# --------------------------------------------------------------------------- parts


def _mix64(value_R: Tensor) -> Tensor:
    """``mix64`` of int64 bits."""
    value_R = value_R + _signed(ADD)
    value_R = (value_R ^ _shifted(value_R, 30)) * _signed(TIMES[0])
    value_R = (value_R ^ _shifted(value_R, 27)) * _signed(TIMES[1])
    return value_R ^ _shifted(value_R, 31)


def _shifted(value_R: Tensor, bits: int) -> Tensor:
    """The 64 bits shifted to the right, with zeros from the left."""
    return (value_R >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: np.uint64) -> int:
    return int(bits.astype(np.int64))


def _weights(logits_RV: Tensor, params: SamplingParams, drawn: NDArray[np.int64], search: Search) -> Tensor:
    """The distributions of the rows ``drawn``, not normalised: [S, B, W], the vocabulary in blocks
    of W with zeros at the end.

    Min-p, then top-k, then top-p over the remainder set weights to 0. Each rule is a floor, so
    tokens that tie with the last one kept are kept too.
    """
    if len(drawn) < len(logits_RV):
        logits_RV = logits_RV[_move(drawn, logits_RV.device)]
    num_rows, vocab = logits_RV.shape
    temperature_S1 = _move(params.temperature_R[drawn], logits_RV.device)[:, None]
    scaled_SV = (logits_RV - logits_RV.amax(-1, keepdim=True)).div_(temperature_S1)
    blocks_SBW = scaled_SV.new_zeros(num_rows, -(-vocab // _DRAW_BLOCK), _DRAW_BLOCK)
    weights_SV = blocks_SBW.view(num_rows, -1)[:, :vocab]
    torch.exp(scaled_SV, out=weights_SV)
    min_p, top_k, top_p = params.min_p_R[drawn], params.top_k_R[drawn], params.top_p_R[drawn]
    if (min_p > 0).any():
        weights_SV.masked_fill_(weights_SV < _move(min_p, logits_RV.device)[:, None], 0.0)
    if (top_k > 0).any():
        weights_SV.masked_fill_(scaled_SV < _top_k_floor(scaled_SV, top_k, search), 0.0)
    if (top_p < 1).any():
        weights_SV.masked_fill_(
            weights_SV < _top_p_floor(weights_SV, blocks_SBW.flatten(1), top_p, search), 0.0
        )
    return blocks_SBW


def _top_k_floor(scaled_SV: Tensor, top_k: NDArray[np.int64], search: Search) -> Tensor:
    """The k-th largest value [S, 1], -inf where k is 0."""
    top_k = np.minimum(top_k, scaled_SV.shape[1])
    values, _ = search(scaled_SV, int(top_k.max()))
    floor_S1 = values.gather(-1, _move(np.maximum(top_k - 1, 0), scaled_SV.device)[:, None])
    return floor_S1.masked_fill_(_move(top_k == 0, scaled_SV.device)[:, None], -math.inf)


def _top_p_floor(weights_SV: Tensor, padded_SP: Tensor, top_p: NDArray[np.float32], search: Search) -> Tensor:
    """The smallest weight [S, 1] in the nucleus, the smallest set of top tokens whose share reaches
    ``top_p``. ``padded_SP``: the weights padded with zeros, rows one after another.
    """
    num_rows, vocab = weights_SV.shape
    device = weights_SV.device
    mass_S1 = weights_SV.sum(-1, keepdim=True).double() * _move(top_p.astype(np.float64), device)[:, None]
    floor_S1 = torch.zeros(num_rows, 1, device=device)
    open_S = _move(np.nonzero(top_p < 1)[0], device)
    for width in (*_NUCLEUS_WIDTHS, vocab):
        values, _ = search(padded_SP if len(open_S) == num_rows else padded_SP[open_S], min(width, vocab))
        # The number of tokens before the one that reaches the mass.
        before = (values.double().cumsum(-1) < mass_S1[open_S]).sum(-1, keepdim=True)
        floor_S1[open_S] = values.gather(-1, before.clamp_max(values.shape[1] - 1))
        open_S = open_S[(before[:, 0] >= values.shape[1]) & (values[:, -1] > 0)]
        if not len(open_S) or width >= vocab:
            break
    return floor_S1


def _draw(weights_SBW: Tensor, uniform_S: Tensor) -> Tensor:
    """The token at which the cumulative weight passes uniform_S float64 of its total. Finds its
    block first, then the token within it.
    """
    ends_SB = weights_SBW.sum(-1).double().cumsum(-1)
    target_S1 = uniform_S[:, None] * ends_SB[:, -1:]
    block_S1 = first_past(ends_SB, target_S1)
    before_S1 = torch.where(block_S1 > 0, ends_SB.gather(1, (block_S1 - 1).clamp_min(0)), 0.0)
    inner_SW = (
        weights_SBW[torch.arange(len(weights_SBW), device=weights_SBW.device), block_S1[:, 0]]
        .double()
        .cumsum(-1)
    )
    return (block_S1 * _DRAW_BLOCK + first_past(inner_SW, target_S1 - before_S1))[:, 0]


def first_past(ends_SN: Tensor, target_S1: Tensor) -> Tensor:
    """The first index [S, 1] whose cumulative weight exceeds the target. Its weight is never zero,
    even if rounding puts the target at the total or past it.
    """
    last_S1 = torch.searchsorted(ends_SN, ends_SN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends_SN, target_S1, right=True), last_S1)


def _pairs(
    rows_N: NDArray[np.int64], tokens_N: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    return _move(rows_N, device), _move(tokens_N, device)


def _move(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
