"""The place of each choice of a token, where experts may have replicas.

Suffixes: T own tokens, K choices per token, L MoE layers, E experts, C turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..balance.placement import Placement
from ..balance.routes import TURNS, places_by_turn


class ReplicaChoice:
    """Sends consecutive tokens of a rank to replicas in turn (``places_by_turn``). Padding asks for
    no place.

    ``source``: this rank among those of the placement. Tables are arrays, or tensors on ``device``
    if given; so are ids and places then, and the turns of every step begin with the first, which is
    fixed in a captured step. There the table keeps its address, which captured steps know, and has
    all turns from the start if there is room for replicas.
    """

    def __init__(
        self,
        placement: Placement,
        source: int,
        node_W: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._source, self._node_W, self._device = source, node_W, device
        self._next = 0
        self._turns_T1: Any = None
        room = placement.num_ranks * placement.num_slots > placement.num_experts
        self._least_turns = TURNS if device is not None and room else 1
        self._num_turns = 0
        self._places: Any = None
        self.place(placement, range(placement.num_layers))

    def place(self, placement: Placement, layers: Sequence[int]) -> None:
        """Takes over a new placement of ``layers`` between two steps."""
        part = Placement(placement.experts_LWS[list(layers)], placement.num_experts)
        places_LEC = places_by_turn(part, self._source, self._node_W)
        if self._places is None or places_LEC.shape[2] > self._num_turns:
            assert self._places is None or self._device is None, "replicas without room for them"
            whole_LEC = places_by_turn(placement, self._source, self._node_W)
            self._num_turns = max(whole_LEC.shape[2], self._least_turns)
            whole = np.broadcast_to(whole_LEC, (*whole_LEC.shape[:2], self._num_turns))
            self._places = self._table(whole if self._num_turns > 1 else whole[:, :, 0])
        else:
            changed = np.broadcast_to(places_LEC, (*places_LEC.shape[:2], self._num_turns))
            self._places[list(layers)] = self._table(changed if self._num_turns > 1 else changed[:, :, 0])

    def begin_step(self, num_tokens: int) -> None:
        """Continues the turns after the last step; both microbatches of a step begin at the same
        turn.
        """
        if self._num_turns == 1:
            return
        if self._device is None:
            self._turns_T1 = (self._next + np.arange(num_tokens)[:, None]) % self._num_turns
            self._next = (self._next + num_tokens) % self._num_turns
        else:
            self._turns_T1 = torch.arange(num_tokens, device=self._device)[:, None] % self._num_turns

    def _table(self, places: Any) -> Any:
        places = np.array(places, order="C")  # a copy: a broadcast view must not be written to
        return places if self._device is None else torch.from_numpy(places).to(self._device)

    def places_TK(self, ids_TK: Any, layer: int) -> Any:
        """rank x slots + slot of every choice."""
        places = self._places[layer]
        return places[ids_TK] if self._num_turns == 1 else places[ids_TK, self._turns_T1[: len(ids_TK)]]


class PlacedExchange:
    """Base of exchanges among ``size`` ranks: the placement of experts, and the choice by it."""

    def __init__(self, placement: Placement, size: int, choice: ReplicaChoice) -> None:
        assert placement.num_ranks == size, f"placement for {placement.num_ranks} ranks, {size} in the group"
        self.placement = placement
        self._choice = choice

    def place(self, placement: Placement, layers: Sequence[int]) -> None:
        self.placement = placement
        self._choice.place(placement, layers)
