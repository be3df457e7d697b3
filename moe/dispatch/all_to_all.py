"""Exchange by all-to-all: a token goes once to every rank that has one of its experts, and each
expert's output comes back.

Ragged: rows per rank are counted on the host, so it is for eager execution on a CPU only.
Suffixes: T own tokens, W ranks, N received tokens, K choices, M pairs (token, choice), D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.reference.fp8 import Normed, wide_of
from ...kernels.table import column_for, ops_of
from ...parallel.collectives import Collectives, Pending
from ..balance.placement import EMPTY, Placement
from .dispatcher import Received
from .exchange import Handle
from .replicas import PlacedExchange, ReplicaChoice
from .rows import pack, unpack

# Up to this many bytes per peer, rows are padded to the capacity. Beyond, a first exchange counts
# them: with 2 gloo ranks on one host an exchange takes 70 us however small, and 64 kB more take
# 30 us (2 cores, torch 2.13). Shared memory takes less of both.
_PADDED_BYTES = 1 << 16


@dataclass
class _Exchange:
    """Tokens under way, then their outputs. ranks_TK: the rank of every choice. ``sent`` [W] and
    ``arriving`` [W]: rows to and from each rank, where they are counted. ``rows`` wait until they
    are. ``received`` [W]: pairs from each rank.
    """

    pending: Pending
    ranks_TK: NDArray[np.int64]
    rows: Tensor
    sent: list[int]
    arriving: list[int]
    hidden: int
    dtype: torch.dtype
    received: list[int]


class AllToAllExchange(PlacedExchange):
    """Sends each token only to ranks that need it; no rank computes padding."""

    def __init__(
        self,
        placement: Placement,
        collectives: Collectives,
        device: torch.device,
        node_W: Sequence[int] | None = None,
    ) -> None:
        assert device.type == "cpu", f"ragged exchange on {device}: it counts on the host"
        super().__init__(placement, collectives.size, ReplicaChoice(placement, collectives.index, node_W))
        self._weighted_sum = ops_of(column_for(device)).weighted_sum
        self._collectives = collectives
        self._capacity = 0

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        assert num_tokens <= capacity, f"{num_tokens} tokens, capacity {capacity}"
        self._capacity = capacity
        self._choice.begin_step(num_tokens)

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        x_TD = wide_of(normed)
        ranks_TK, slots_TK = np.divmod(
            self._choice.places_TK(ids_TK.numpy(), layer), self.placement.num_slots
        )
        hit_WT = np.zeros((self._collectives.size, len(ranks_TK)), np.bool_)
        hit_WT[ranks_TK, np.arange(len(ranks_TK))[:, None]] = True
        targets, tokens = np.nonzero(hit_WT)
        slots_NK = np.where(ranks_TK[tokens] == targets[:, None], slots_TK[tokens], EMPTY)
        rows = pack(x_TD[torch.from_numpy(tokens)], torch.from_numpy(slots_NK))
        size, what = self._collectives.size, f"tokens of MoE layer {layer}"
        counting = self._capacity * rows.shape[1] > _PADDED_BYTES
        if counting:
            counts_W = hit_WT.sum(1)
            sent, arriving = counts_W.tolist(), []
            counts = torch.from_numpy(counts_W)
            pending = self._collectives.all_to_all(counts, None, None, f"the number of {what}")
        else:
            sent, arriving = [], [self._capacity] * size
            pending = self._collectives.all_to_all(self._padded(rows, targets, hit_WT), None, None, what)
        exchange = _Exchange(pending, ranks_TK, rows, sent, arriving, x_TD.shape[1], x_TD.dtype, [])
        return Handle(weights_TK, layer, exchange, counting)

    def forward(self, handle: Handle) -> None:
        exchange, what = handle.state, f"tokens of MoE layer {handle.layer}"
        assert isinstance(exchange, _Exchange)
        exchange.arriving = self._collectives.wait(exchange.pending).tolist()
        exchange.pending = self._collectives.all_to_all(exchange.rows, exchange.sent, exchange.arriving, what)

    def receive(self, handle: Handle) -> Received:
        exchange = handle.state
        assert isinstance(exchange, _Exchange)
        x_ND, slots_NK = unpack(self._collectives.wait(exchange.pending), exchange.hidden, exchange.dtype)
        slots = slots_NK.numpy()
        rows, choices = np.nonzero(slots >= 0)
        starts = np.cumsum([0, *exchange.arriving])
        exchange.received = np.diff(np.searchsorted(rows, starts)).tolist()
        return Received(x_ND, torch.from_numpy(rows), torch.from_numpy(slots[rows, choices].astype(np.int64)))

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        exchange = handle.state
        assert isinstance(exchange, _Exchange)
        expected = np.bincount(exchange.ranks_TK.ravel(), minlength=self._collectives.size).tolist()
        what = f"expert outputs of MoE layer {handle.layer}"
        exchange.pending = self._collectives.all_to_all(y_MD, exchange.received, expected, what)

    def combine(self, handle: Handle) -> Tensor:
        exchange = handle.state
        assert isinstance(exchange, _Exchange)
        ranks = exchange.ranks_TK.ravel()
        y_PD = self._collectives.wait(exchange.pending)
        # Pairs come back rank by rank, within a rank in the order of (token, choice).
        place = np.empty(len(ranks), np.int64)
        place[np.argsort(ranks, kind="stable")] = np.arange(len(ranks))
        y_PD = y_PD[torch.from_numpy(place)]
        return self._weighted_sum(y_PD.view(*exchange.ranks_TK.shape, exchange.hidden), handle.weights_TK)

    def _padded(self, rows: Tensor, targets: NDArray[np.int64], hit_WT: NDArray[np.bool_]) -> Tensor:
        """``capacity`` rows for every rank; padding has no slots."""
        padded = rows.new_full((self._collectives.size * self._capacity, rows.shape[1]), 0xFF)  # EMPTY's bits
        firsts = np.cumsum(hit_WT.sum(1)) - hit_WT.sum(1)
        padded[torch.from_numpy(targets * self._capacity + np.arange(len(targets)) - firsts[targets])] = rows
        return padded
