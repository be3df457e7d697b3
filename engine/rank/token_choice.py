"""Chooses the tokens of a step on the ranks of a tensor group.

Suffixes: R rows that sample, S rows that want log-probabilities, D hidden, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...kernels.reference.sampling import Purpose, uniform
from ..protocol.arrays import Int64
from ..protocol.results import RowLogprobs
from .masks import Masks
from .parts import Parts
from .slot_sampling import RowSettings, SlotSettings
from .token_logprobs import logprob_lines


class TokenChoice:
    """Chooses by the model's logits and each row's ``settings``. All ranks of a tensor group make
    the same calls.
    """

    def __init__(self, parts: Parts, settings: SlotSettings) -> None:
        self._parts, self._settings = parts, settings

    def choose(
        self, hidden_RD: Tensor, slots: Int64, positions: Int64, numbers: Int64, masks: Masks | None
    ) -> tuple[Int64, tuple[RowLogprobs, ...]]:
        """Tokens [R], the same on all ranks of a tensor group, and the requested log-probabilities.
        Logits that are split come together only for rows that need more than the most likely token.
        """
        model, split = self._parts.model, self._parts.splits.tensor
        plain = self._settings.plain(slots) if split.size > 1 else None
        if plain is not None and plain.any():
            if plain.all():
                return model.likeliest(hidden_RD).cpu().numpy(), ()
            near, far = plain.nonzero()[0], (~plain).nonzero()[0]
            here = hidden_RD.device
            tokens = np.empty(len(slots), np.int64)
            tokens[near] = model.likeliest(hidden_RD[torch.from_numpy(near).to(here)]).cpu().numpy()
            tokens[far], lines = self._draw(
                hidden_RD[torch.from_numpy(far).to(here)], slots[far], positions[far], numbers[far], masks
            )
            return tokens, lines
        return self._draw(hidden_RD, slots, positions, numbers, masks)

    def _draw(
        self, hidden_RD: Tensor, slots: Int64, positions: Int64, numbers: Int64, masks: Masks | None
    ) -> tuple[Int64, tuple[RowLogprobs, ...]]:
        """``choose`` by the whole logits, on the first rank of a tensor group."""
        logits_RV = self._parts.model.logits(hidden_RD)
        tokens = np.zeros(len(slots), np.int64)
        lines: tuple[RowLogprobs, ...] = ()
        if self._parts.samples:
            tokens, lines = self._draw_from(logits_RV, self._settings.rows(slots), positions, numbers, masks)
        if self._parts.splits.tensor.size > 1:
            drawn_R = self._parts.splits.tensor.from_first(torch.from_numpy(tokens).to(self._parts.device))
            tokens = drawn_R.cpu().numpy()
        return tokens, lines

    def _draw_from(
        self, logits_RV: Tensor, settings: RowSettings, positions: Int64, numbers: Int64, masks: Masks | None
    ) -> tuple[Int64, tuple[RowLogprobs, ...]]:
        """Tokens [R] for ``positions`` of the rows, and the requested log-probabilities."""
        ops, asked, params = self._parts.model.ops, settings.asked, settings.params
        raw_SV = logits_RV[torch.from_numpy(asked).to(logits_RV.device)] if len(asked) else None
        edits = self._settings.edits(settings, positions)
        if edits is not None:
            ops.edit_logits(logits_RV, edits)
        if settings.allowed is not None:
            ops.allow_only(logits_RV, *settings.allowed)
        if masks is not None:
            ops.allow_only(logits_RV, *masks.take(settings.slots))
        greedy = not len(params.drawn_S)
        uniform_R = np.zeros(len(positions)) if greedy else uniform(settings.seed, positions, Purpose.SAMPLE)
        tokens = ops.sample(logits_RV, params, uniform_R).cpu().numpy()
        if raw_SV is None:
            return tokens, ()
        top = ops.logprobs(
            raw_SV, torch.from_numpy(tokens[asked]).to(raw_SV.device), int(settings.num_logprobs.max())
        )
        return tokens, logprob_lines(top, numbers[asked], settings.num_logprobs[asked])
