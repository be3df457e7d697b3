"""Draws the tokens of rows whose logits are not cut or changed by a recording.

Suffixes: C rows that draw, S rows that ask for log-probabilities, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.reference.column import Reference
from ....kernels.reference.sampling import Purpose
from ..slot_sampling import SlotSettings
from .step_arrays import sampling_of
from .under_way import Drawing


def draw(
    ops: Reference, slot_settings: SlotSettings, logits_CV: Tensor, sent: list[Tensor], drawing: Drawing
) -> tuple[Tensor, list[Tensor]]:
    """Tokens [C], and the log-probabilities that rows ask for: of the tokens, then the ids and
    values of the most likely ones. ``sent`` as ``sample_arrays``.
    """
    settings = drawing.settings
    asked_S = None
    if len(settings.asked):
        asked_S = torch.from_numpy(settings.asked).to(logits_CV.device)
    raw_SV = None if asked_S is None else logits_CV.index_select(0, asked_S)
    edits = slot_settings.edits(settings, drawing.positions)
    if edits is not None:
        ops.edit_logits(logits_CV, edits)
    if settings.allowed is not None:
        ops.allow_only(logits_CV, *settings.allowed)
    if drawing.masks is not None:
        ops.allow_only(logits_CV, *drawing.masks.take(settings.slots))
    tokens_C = ops.sample_slots(logits_CV, sampling_of(sent)[1], Purpose.SAMPLE)
    if raw_SV is None or asked_S is None:
        return tokens_C, []
    return tokens_C, list(ops.logprobs(raw_SV, tokens_C[asked_S], int(settings.num_logprobs.max())))
