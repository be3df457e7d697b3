"""Draws the tokens of rows, by logits that are whole on this rank.

Suffixes: B rows of a captured step, C rows that draw, S rows of them, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ....kernels.reference.column import Reference
from ....kernels.reference.sampling import Purpose, SlotSampling
from ...protocol.arrays import Int64
from ..masks import Masks
from ..parts import Parts
from ..slot_sampling import RowSettings, SlotSettings
from .step_arrays import NUM_SAMPLE_ARRAYS, sampling_of
from .token_counts import TokenCounts
from .under_way import Drawing


class Draw(Protocol):
    """Draws tokens from hidden states. All ranks of a tensor group make the same calls."""

    def is_free(self, settings: RowSettings) -> bool:
        """Whether ``free`` draws rows of these settings, if nothing changes their logits."""
        ...

    def free(self, hidden_BD: Tensor, sampling: SlotSampling) -> Tensor:
        """tokens_B int64 by the model's own logits; may be recorded."""
        ...

    def draw(self, hidden_CD: Tensor, sent: list[Tensor], drawing: Drawing) -> tuple[Tensor, list[Tensor]]:
        """Tokens [C], the same on all ranks of a tensor group, and the log-probabilities that rows
        ask for: of the tokens, then the ids and values of the most likely ones. ``sent`` as
        ``Drawing.arrays``.
        """
        ...


class WholeDraw:
    """The ``Draw`` of a rank that has the whole vocabulary."""

    def __init__(self, parts: Parts, settings: SlotSettings, counts: TokenCounts | None) -> None:
        self._parts, self._settings, self._counts = parts, settings, counts

    def is_free(self, settings: RowSettings) -> bool:
        return True

    def free(self, hidden_BD: Tensor, sampling: SlotSampling) -> Tensor:
        model = self._parts.model
        return model.ops.sample_slots(model.logits(hidden_BD), sampling, Purpose.SAMPLE)

    def draw(self, hidden_CD: Tensor, sent: list[Tensor], drawing: Drawing) -> tuple[Tensor, list[Tensor]]:
        model, settings = self._parts.model, drawing.settings
        logits_CV, ops = model.logits(hidden_CD), model.ops
        asked_S = raw_SV = None
        if len(settings.asked):
            asked_S = sent[NUM_SAMPLE_ARRAYS]
            raw_SV = logits_CV.index_select(0, asked_S)
        rules = Rules(ops, self._settings, self._counts, drawing.masks)
        tokens_C = rules.draw(logits_CV, settings, drawing.positions, *sampling_of(sent))
        if raw_SV is None or asked_S is None:
            return tokens_C, []
        return tokens_C, list(ops.logprobs(raw_SV, tokens_C[asked_S], int(settings.num_logprobs.max())))


class Rules:
    """Draws by whole logits after all that rows ask for has changed them."""

    def __init__(
        self, ops: Reference, slot_settings: SlotSettings, counts: TokenCounts | None, masks: Masks | None
    ) -> None:
        self._ops, self._slot_settings, self._counts, self._masks = ops, slot_settings, counts, masks

    def draw(
        self,
        logits_SV: Tensor,
        settings: RowSettings,
        positions: Int64,
        slots_S: Tensor,
        sampling: SlotSampling,
    ) -> Tensor:
        """Tokens [S] for ``positions`` of the rows of ``settings``, whose slots and samples are on
        the device. Logits are edited in place.
        """
        edits = self._slot_settings.edits(settings, positions)
        if edits is not None:
            self._ops.edit_logits(logits_SV, edits)
        if self._counts is not None and self._counts.among(settings.slots):
            self._counts.penalise(logits_SV, slots_S, self._ops)
        if settings.allowed is not None:
            self._ops.allow_only(logits_SV, *settings.allowed)
        if self._masks is not None:
            self._ops.allow_only(logits_SV, *self._masks.take(settings.slots))
        return self._ops.sample_slots(logits_SV, sampling, Purpose.SAMPLE)
