"""Chooses the tokens of a step.

Suffixes: R rows that sample, S rows that want log-probabilities, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocol.arrays import Int64
from ..protocol.results import RowLogprobs
from .draws import Draws
from .masks import Masks
from .parts import Parts
from .slot_sampling import RowSettings, SlotSettings
from .split_choice import SplitChoice
from .token_logprobs import logprob_lines


class TokenChoice:
    """Chooses by the model's logits and each row's ``settings``. All ranks of a tensor group make
    the same calls.
    """

    def __init__(self, parts: Parts, settings: SlotSettings) -> None:
        self._parts, self._settings = parts, settings
        self._split = SplitChoice(parts, settings, self._by_the_rules)

    def choose(
        self, hidden_RD: Tensor, slots: Int64, positions: Int64, numbers: Int64, masks: Masks | None
    ) -> tuple[Int64, tuple[RowLogprobs, ...]]:
        """Tokens [R], the same on all ranks of a tensor group, and the requested
        log-probabilities.
        """
        if self._parts.splits.tensor.size > 1:
            return self._split.choose(hidden_RD, slots, positions, numbers, masks)
        settings = self._settings.rows(slots)
        asked = settings.asked
        logits_RV, ops = self._parts.model.logits(hidden_RD), self._parts.model.ops
        raw_SV = logits_RV[torch.from_numpy(asked).to(logits_RV.device)] if len(asked) else None
        tokens = self._by_the_rules(logits_RV, settings, positions, masks)
        if raw_SV is None:
            return tokens, ()
        top = ops.logprobs(
            raw_SV, torch.from_numpy(tokens[asked]).to(raw_SV.device), int(settings.num_logprobs.max())
        )
        return tokens, logprob_lines(top, numbers[asked], settings.num_logprobs[asked])

    def _by_the_rules(
        self, logits_RV: Tensor, settings: RowSettings, positions: Int64, masks: Masks | None
    ) -> Int64:
        """Tokens [R] for ``positions`` of the rows; their logits are edited in place."""
        ops = self._parts.model.ops
        edits = self._settings.edits(settings, positions)
        if edits is not None:
            ops.edit_logits(logits_RV, edits)
        if settings.allowed is not None:
            ops.allow_only(logits_RV, *settings.allowed)
        if masks is not None:
            ops.allow_only(logits_RV, *masks.take(settings.slots))
        tokens: Int64 = Draws(settings.params, settings.seed, positions).among(logits_RV, ops).cpu().numpy()
        return tokens
