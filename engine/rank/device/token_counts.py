"""The tokens that slots with penalties have seen, counted on the device: a row that is penalised
follows the steps before as any other does, and the host waits for none.

Suffixes: S1 slots and the scratch slot, V vocabulary, C rows that draw, N slots or entries.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....kernels.reference.column import Reference
from ....kernels.reference.sampling import NO_PENALTIES, token_counts
from ...protocol.arrays import Int32, Int64
from ...protocol.message import Sampling
from ..parts import Parts
from .transfers import Upload

_ENTRIES = 8192
"""Counts of tokens that travel at once."""


class TokenCounts:
    """Counts for ``num_slots`` slots of at most ``max_len`` tokens. counts_S1V, int16 where such
    lengths fit, else int32: twice how often a slot has sampled a token, and 1 more for one of its
    prompt. penalties_S13 float32: repetition, presence, frequency.
    """

    def __init__(self, num_slots: int, max_len: int, vocab_size: int, device: torch.device) -> None:
        dtype = torch.int16 if 2 * max_len < np.iinfo(np.int16).max else torch.int32
        self._counts_S1V = torch.zeros(num_slots + 1, vocab_size, dtype=dtype, device=device)
        neutral = torch.tensor(NO_PENALTIES, device=device)
        self._penalties_S13 = neutral.repeat(num_slots + 1, 1)
        self._vocab_size = vocab_size
        self._dtype = np.int16 if dtype == torch.int16 else np.int32
        self._penalised = np.zeros(num_slots, np.bool_)
        self._admitted: dict[int, tuple[tuple[float, float, float], Int32, int]] = {}

    def admit(self, slot: int, sampling: Sampling, history: Int32, num_emitted: int) -> None:
        """Takes in that a request has got a slot; its ``history`` ends with ``num_emitted`` tokens
        that it has sampled.
        """
        num_prompt = len(history) - num_emitted
        penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
        if penalties != NO_PENALTIES or self._penalised[slot]:
            self._admitted[slot] = penalties, history, num_prompt
        self._penalised[slot] = penalties != NO_PENALTIES

    def among(self, slots: Int64) -> bool:
        """Whether some of these slots have penalties."""
        return bool(self._penalised[slots].any())

    def send(self, upload: Upload) -> None:
        """Hands over what admissions have changed."""
        if not self._admitted:
            return
        slots = np.array(list(self._admitted), np.int64)
        penalties = np.array([each for each, _, _ in self._admitted.values()], np.float32)
        slots_N, penalties_N3 = upload.send([slots, penalties])
        self._penalties_S13.index_copy_(0, slots_N, penalties_N3)
        self._counts_S1V.index_fill_(0, slots_N, 0)
        found = [
            self._entries(slot, history, num_prompt)
            for slot, (_, history, num_prompt) in self._admitted.items()
            if self._penalised[slot]
        ]
        self._admitted.clear()
        if not found:
            return
        places = np.concatenate([each for each, _ in found])
        counts = np.concatenate([each for _, each in found])
        for start in range(0, len(places), _ENTRIES):
            some = slice(start, start + _ENTRIES)
            self._counts_S1V.view(-1).index_copy_(0, *upload.send([places[some], counts[some]]))

    def penalise(self, logits_CV: Tensor, slots_C: Tensor, ops: Reference) -> None:
        """Applies the penalties of slots to their logits, in place."""
        ops.penalise(logits_CV, slots_C, self._counts_S1V, self._penalties_S13)

    def add(self, slots_C: Tensor, tokens_C: Tensor) -> None:
        """Counts sampled tokens. Those of slots without penalties mean nothing."""
        twos_C = torch.full_like(tokens_C, 2, dtype=self._counts_S1V.dtype)
        self._counts_S1V.view(-1).index_add_(0, slots_C * self._vocab_size + tokens_C, twos_C)

    def _entries(self, slot: int, history: Int32, num_prompt: int) -> tuple[Int64, NDArray[np.integer]]:
        tokens, counts = token_counts(history, num_prompt)
        of_prompt = np.isin(tokens, history[:num_prompt])
        return slot * self._vocab_size + tokens, (2 * counts + of_prompt).astype(self._dtype)


def token_counts_of(parts: Parts, num_slots: int, max_len: int) -> TokenCounts | None:
    """The counts of a rank; None if it draws nothing by whole logits."""
    if not (parts.links.stage.last and parts.samples):
        return None
    return TokenCounts(num_slots, max_len, parts.model.config.vocab_size, parts.device)
