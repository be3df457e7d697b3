"""Draws the tokens of rows whose logits the ranks of a tensor group have in parts.

Rules are floors, so a few numbers of each part decide a row, and nothing of it is read on the host:
its best values, which set the floors; then its weight above them, which says in which part the draw
falls; then the token that this part draws. A draw differs from one rank's only if it falls within
the rounding of a sum. Whole logits travel for rows whose logits are edited, for top-p without top-k
and for top-k beyond what travels.

Suffixes: R rows, C rows that draw, S rows of them, P tokens of this part, N best of all parts, W
ranks, B blocks of X tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....kernels.host_arrays import to_device
from ....kernels.reference.sampling import (
    MIN_TEMPERATURE,
    Purpose,
    SamplingParams,
    SlotSampling,
    first_past,
    uniform_slots,
)
from ....parallel.logits import SplitLogits
from ...protocol.arrays import Int64
from ..parts import Parts
from ..slot_sampling import RowSettings, SlotSettings
from ..split_choice import MOST_KEPT, split_logprobs
from .draw import Draw, Rules, WholeDraw
from .step_arrays import NUM_SAMPLE_ARRAYS, sampling_of
from .token_counts import TokenCounts
from .under_way import Drawing

_BLOCK = 512


def draw_of(parts: Parts, settings: SlotSettings, counts: TokenCounts | None) -> Draw:
    """The ``Draw`` of a rank; no ``counts``: it draws nothing by whole logits."""
    return (SplitDraw if parts.splits.tensor.size > 1 else WholeDraw)(parts, settings, counts)


class SplitDraw:
    """The ``Draw`` of a rank that has a part of the vocabulary. The first of the group draws what
    is drawn by whole logits.
    """

    def __init__(self, parts: Parts, settings: SlotSettings, counts: TokenCounts | None) -> None:
        self._parts, self._settings, self._counts = parts, settings, counts

    def is_free(self, settings: RowSettings) -> bool:
        return bool(_by_floors(settings.params).all())

    def free(self, hidden_BD: Tensor, sampling: SlotSampling) -> Tensor:
        return draw_in_parts(self._parts.model.own_logits(hidden_BD), sampling, MOST_KEPT)

    def draw(self, hidden_CD: Tensor, sent: list[Tensor], drawing: Drawing) -> tuple[Tensor, list[Tensor]]:
        parts, settings = self._parts, drawing.settings
        if self._settings.plain(drawing.slots).all():
            return parts.model.likeliest(hidden_CD), []  # in one exchange
        logits = parts.model.own_logits(hidden_CD)
        slots_C, sampling = sampling_of(sent)
        floors_C = _by_floors(settings.params)
        most_kept = int(settings.params.top_k_R[floors_C].max(initial=1))
        tokens_C = draw_in_parts(logits, sampling, most_kept)
        whole = np.flatnonzero(~(floors_C & self._settings.free(drawing.slots)))
        if len(whole):
            whole_S = to_device(whole, parts.device)
            own = slots_C[whole_S], sampling.rows(whole_S)
            tokens_S = self._by_the_rules(logits.rows(whole_S), own, drawing, whole)
            tokens_C.index_copy_(0, whole_S, tokens_S)
        asked = settings.asked
        if not len(asked):
            return tokens_C, []
        asked_S = sent[NUM_SAMPLE_ARRAYS]
        width = min(int(settings.num_logprobs.max()), logits.size)
        return tokens_C, list(split_logprobs(parts, logits.rows(asked_S), tokens_C[asked_S], width))

    def _by_the_rules(
        self, logits: SplitLogits, own: tuple[Tensor, SlotSampling], drawing: Drawing, rows: Int64
    ) -> Tensor:
        """Tokens of the ``rows`` [S] by whole logits; ``logits`` and ``own`` are theirs."""
        parts, logits_SV = self._parts, logits.whole(self._parts.model.dtype)
        tokens_S = torch.zeros(len(rows), dtype=torch.int64, device=parts.device)
        if parts.samples:
            rules = Rules(parts.model.ops, self._settings, self._counts, drawing.masks)
            settings = self._settings.rows(drawing.slots[rows])
            tokens_S = rules.draw(logits_SV, settings, drawing.positions[rows], *own)
        return parts.splits.tensor.from_first(tokens_S)


def _by_floors(params: SamplingParams) -> NDArray[np.bool_]:
    """The rows [R] whose floors follow from few values of each part."""
    few = (params.top_k_R > 0) & (params.top_k_R <= MOST_KEPT)
    every = (params.top_k_R == 0) & (params.top_p_R >= 1)
    return np.asarray(few | every | (params.temperature_R < MIN_TEMPERATURE), np.bool_)


def draw_in_parts(logits: SplitLogits, sampling: SlotSampling, most_kept: int) -> Tensor:
    """Tokens [R] int64 by logits in parts. No top-k is above ``most_kept``, and none is 0 where
    top-p is below 1, unless a row is greedy. Reads nothing on the host.
    """
    greedy_R1 = sampling.temperature_R[:, None] < MIN_TEMPERATURE
    temperature_R1 = torch.where(greedy_R1, 1.0, sampling.temperature_R[:, None])
    count = min(most_kept, logits.own_RP.shape[1])
    best_RN = logits.of_all(logits.own_RP.topk(count).values).flatten(1).sort(1, descending=True).values
    most_R1 = best_RN[:, :1]
    best_RN = (best_RN - most_R1) / temperature_R1
    scaled_RP = (logits.own_RP - most_R1) / temperature_R1
    floor_R1 = _top_k_floor(best_RN, sampling, greedy_R1)
    own_RP = _weights(scaled_RP, floor_R1, sampling)
    mass_R1 = logits.of_all(own_RP.sum(1, keepdim=True, dtype=torch.float64)).sum(1)
    nucleus_R1 = _top_p_floor(best_RN, _weights(best_RN, floor_R1, sampling), mass_R1, sampling)
    own_RP = own_RP.masked_fill_(scaled_RP < torch.where(greedy_R1, floor_R1, nucleus_R1), 0.0)
    blocks_RBX = torch.nn.functional.pad(own_RP, (0, -own_RP.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    ends_RB = blocks_RBX.sum(2).double().cumsum(1)
    ends_RW = logits.of_all(ends_RB[:, -1:])[:, :, 0].cumsum(1)
    number_R1 = uniform_slots(sampling.seed_R, sampling.position_R, Purpose.SAMPLE)[:, None]
    target_R1 = torch.where(greedy_R1, 0.0, number_R1) * ends_RW[:, -1:]
    owner_R1 = first_past(ends_RW, target_R1).clamp_max(ends_RW.shape[1] - 1)  # NaN comes past all
    target_R1 = target_R1 - (ends_RW - ends_RW.diff(dim=1, prepend=torch.zeros_like(target_R1))).gather(
        1, owner_R1
    )
    block_R1 = first_past(ends_RB, target_R1).clamp_max(ends_RB.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, ends_RB.gather(1, (block_R1 - 1).clamp_min(0)), 0.0)
    index_R1X = block_R1[:, :, None].expand(-1, 1, _BLOCK)
    inner_RX = blocks_RBX.gather(1, index_R1X)[:, 0].double().cumsum(1)
    places_R = (block_R1 * _BLOCK + first_past(inner_RX, target_R1 - before_R1))[:, 0]
    return logits.of_owner((places_R + logits.first).clamp_max(logits.size - 1), owner_R1[:, 0])


def _weights(scaled_RX: Tensor, floor_R1: Tensor, sampling: SlotSampling) -> Tensor:
    """Weights of tokens, 0 below the floor and below min-p of the largest, which is 1."""
    weights_RX = scaled_RX.exp()
    below_RX = (weights_RX < sampling.min_p_R[:, None]) | ~(scaled_RX >= floor_R1)
    return weights_RX.masked_fill_(below_RX, 0.0)


def _top_k_floor(best_RN: Tensor, sampling: SlotSampling, greedy_R1: Tensor) -> Tensor:
    """The k-th largest of the scaled values, best first; the largest for greedy rows, -inf without
    top-k.
    """
    top_k_R1 = sampling.top_k_R[:, None]
    floor_R1 = best_RN.gather(1, (top_k_R1 - 1).clamp(0, best_RN.shape[1] - 1))
    return floor_R1.masked_fill((top_k_R1 == 0) & ~greedy_R1, -torch.inf).masked_fill(greedy_R1, 0.0)


def _top_p_floor(best_RN: Tensor, weights_RN: Tensor, mass_R1: Tensor, sampling: SlotSampling) -> Tensor:
    """The smallest scaled value in the nucleus, as of the best; -inf without top-p. Beyond the best
    lie only tokens that tie with the last one kept.
    """
    top_p_R1 = sampling.top_p_R[:, None]
    before_R1 = (weights_RN.double().cumsum(1) < mass_R1 * top_p_R1.double()).sum(1, keepdim=True)
    last_R1 = ((weights_RN > 0).sum(1, keepdim=True) - 1).clamp_min(0)
    return best_RN.gather(1, torch.minimum(before_R1, last_R1)).masked_fill(top_p_R1 >= 1, -torch.inf)
