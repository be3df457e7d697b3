"""The experts in the slots of a rank, and their moves between ranks.

A move copies an expert's weights out of a slot, lets them travel in a group of its own beside the
steps, and keeps them where they land. A commit writes them into their slots, at the addresses that
steps read, and changes the placement: on all ranks before the same step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...moe.balance.placement import EMPTY, Placement
from ...moe.dispatch.dispatcher import Dispatcher
from ...moe.experts import read_slot, write_slot
from ...parallel.collectives import Collectives, Pending
from ..models.decoder import Model
from ..models.tensor_source import TensorSource
from ..models.weights import load_experts
from ..protocol.arrays import Int32
from ..protocol.plan import Transfer


@dataclass(frozen=True)
class StagePlace:
    """A rank among those that share its experts, and the MoE layers of their stage."""

    stage: int
    rank: int
    layers: range


@dataclass
class _Arriving:
    """Moves that were started. ``moves_N5`` as in ``Transfer.moves_i32``. ``rows`` [n, bytes] have
    landed here, in the order of ``targets`` [n]: (layer, slot). None before.
    """

    moves_N5: Int32
    pending: Pending | None
    targets: list[tuple[int, int]]
    rows: Tensor | None


class ExpertSlots:
    """Applies moves to a model and its dispatcher. ``placement`` is that of all stages; ``group``
    carries the weights, ``source`` has those of all experts. No token goes to slots at positions
    that are vacant; they keep their experts in the placement.
    """

    def __init__(
        self,
        model: Model,
        dispatcher: Dispatcher,
        placement: Placement,
        here: StagePlace,
        group: Collectives,
        source: TensorSource,
    ) -> None:
        self.version = 0
        self._model, self._dispatcher, self._here = model, dispatcher, here
        self._group, self._source = group, source
        self._experts_LWS = placement.experts_LWS.copy()
        self._num_experts = placement.num_experts
        self._vacant: tuple[int, ...] = ()
        self._arriving: dict[int, _Arriving] = {}

    @property
    def placement_i32(self) -> bytes:
        """The placement of all stages, as in ``RankSpec``; empty before the first commit."""
        return self._experts_LWS.tobytes() if self.version else b""

    def start(self, moves: Transfer) -> None:
        """Sends and receives experts, beside the steps that follow."""
        moves_N5 = np.frombuffer(moves.moves_i32, np.int32).reshape(-1, 5)
        if moves.stage != self._here.stage:
            self._arriving[moves.id] = _Arriving(moves_N5, None, [], None)
            return
        layers, experts, sources, ranks, slots = moves_N5.T
        sent = np.flatnonzero(sources == self._here.rank)
        sent = sent[np.argsort(ranks[sent], kind="stable")]
        received = np.flatnonzero((ranks == self._here.rank) & (experts != EMPTY))
        received = received[np.argsort(sources[received], kind="stable")]
        modules = self._model.experts()
        rows = self._empty_rows(len(sent))
        for row, layer, expert in zip(rows, layers[sent].tolist(), experts[sent].tolist(), strict=True):
            read_slot(modules[layer - self._here.layers.start], self._slot_of(layer, expert), row)
        size = self._group.size
        pending = self._group.all_to_all(
            rows,
            np.bincount(ranks[sent], minlength=size).tolist(),
            np.bincount(sources[received], minlength=size).tolist(),
            f"experts of moves {moves.id}",
        )
        targets = list(zip(layers[received].tolist(), slots[received].tolist(), strict=True))
        self._arriving[moves.id] = _Arriving(moves_N5, pending, targets, None)

    def landed(self) -> bytes:
        """Ids int32 of the moves whose part has landed here. Raises CollectiveError if one never
        will.
        """
        for arriving in self._arriving.values():
            if arriving.pending is not None and self._group.is_done(arriving.pending):
                arriving.rows, arriving.pending = self._group.wait(arriving.pending), None
        ids = [number for number, arriving in self._arriving.items() if arriving.rows is not None]
        return np.array(ids, np.int32).tobytes()

    def commit(self, ids: Sequence[int]) -> None:
        """Makes moves part of the placement. Those committed before change nothing."""
        changed: set[int] = set()
        for number in ids:
            if number <= self.version:
                continue
            assert number in self._arriving, f"moves {number} are committed, and have not landed here"
            arriving = self._arriving.pop(number)
            if arriving.rows is not None:
                for (layer, slot), row in zip(arriving.targets, arriving.rows, strict=True):
                    write_slot(self._model.experts()[layer - self._here.layers.start], slot, row)
            layers, experts, _, ranks, slots = arriving.moves_N5.T
            self._experts_LWS[layers, ranks, slots] = experts
            changed.update(layers.tolist())
            self.version = number
        self._show(changed)

    def begin_epoch(self, committed: Collection[int]) -> None:
        """Drops moves that the first plan of an epoch does not commit."""
        self._arriving = {
            number: arriving for number, arriving in self._arriving.items() if number in committed
        }

    def leave_out(self, vacant: tuple[int, ...]) -> None:
        """An epoch begins with vacant positions: the other ranks have every expert."""
        if vacant != self._vacant:
            self._vacant = vacant
            self._show(set(self._here.layers))

    def place(self, version: int, placement_i32: bytes) -> None:
        """Loads the experts of another placement, where slots have others. The epoch that follows
        says which positions are vacant.
        """
        self._arriving.clear()
        new_LWS = np.frombuffer(placement_i32, np.int32).reshape(self._experts_LWS.shape)
        here = self._here
        wanted: dict[int, dict[int, int]] = {}
        for layer in here.layers:
            own_S, old_S = new_LWS[layer, here.rank], self._experts_LWS[layer, here.rank]
            slots = np.flatnonzero((own_S != old_S) & (own_S != EMPTY)).tolist()
            if slots:
                wanted[layer - here.layers.start] = {slot: int(own_S[slot]) for slot in slots}
        load_experts(self._model, self._source, wanted)
        self._experts_LWS, self.version, self._vacant = new_LWS.copy(), version, ()
        self._show(set(here.layers))

    def _show(self, changed: set[int]) -> None:
        """The dispatcher sends tokens by the new placement."""
        here = self._here.layers
        layers = sorted(layer - here.start for layer in changed if layer in here)
        if layers:
            own_LWS = self._experts_LWS[here.start : here.stop].copy()
            own_LWS[:, list(self._vacant)] = EMPTY
            self._dispatcher.place(Placement(own_LWS, self._num_experts), layers)

    def _slot_of(self, layer: int, expert: int) -> int:
        return int(np.flatnonzero(self._experts_LWS[layer, self._here.rank] == expert)[0])

    def _empty_rows(self, num: int) -> Tensor:
        experts = self._model.experts()[0]
        num_bytes = sum(part[0].numel() * part.element_size() for part in experts.by_slot)
        return torch.empty(num, num_bytes, dtype=torch.uint8, device=self._group.device)
