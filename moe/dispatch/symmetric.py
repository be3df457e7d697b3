"""Exchange by all-to-all with counts on the device: a token goes once to every rank that has one of
its experts, and the sum of their outputs comes back.

Sizes follow from the capacity and addresses never change, so a step can be captured; the host reads
nothing. Expert outputs are summed where they are computed, in float32 in the order of slots, and
travel in the model's dtype; so sums differ by rounding between numbers of ranks.

Suffixes: T own tokens, K choices, C largest capacity, W ranks, S slots of a rank, J = min(K, S)
pairs of a row, R rows sent, N received rows (padded ones included), M = N x J pairs, D hidden, L
MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed
from ...kernels.table import column_for, ops_of
from ...parallel.one_epoch import Started
from ...parallel.symmetric_memory import Region, SymmetricGroup, region_rows, row_alignment
from ..balance.placement import EMPTY, Placement
from .dispatcher import Received
from .exchange import Handle
from .rows import TokenForm
from .within_capacity import CapacityExchange, TokenShape


@dataclass(frozen=True)
class _Row:
    """Layout of a row: hidden state, then slots int32 and weights float32 of its pairs."""

    form: TokenForm
    num_pairs: int
    alignment: int

    @property
    def num_bytes(self) -> int:
        return _aligned(self._slots_at + 8 * self.num_pairs, self.alignment)

    @property
    def _slots_at(self) -> int:
        return _aligned(self.form.num_bytes, 16)

    def slots(self, rows: Tensor) -> Tensor:
        return rows[:, self._slots_at : self._slots_at + 4 * self.num_pairs].view(torch.int32)

    def weights(self, rows: Tensor) -> Tensor:
        start = self._slots_at + 4 * self.num_pairs
        return rows[:, start : start + 4 * self.num_pairs].view(torch.float32)


@dataclass(frozen=True)
class _Way:
    """The regions of one direction: rows [.., bytes] uint8, int64 splits [W] and [2, W]."""

    sent: Region
    received: Region
    splits: Region
    received_splits: Region


@dataclass
class _Lane:
    """The regions of one microbatch, both ways, and the exchange that was started last. ``free``:
    no tokens are under way.
    """

    there: _Way
    back: _Way
    started: Started = None
    free: bool = True


@dataclass
class _Sent:
    """Tokens under way on ``lane``. sent_TK int64: the row of every choice, the last row for those
    whose rank an earlier choice has. ``weights_NJ``: of the pairs received.
    """

    lane: _Lane
    sent_TK: Tensor
    weights_NJ: Tensor


class SymmetricExchange(CapacityExchange):
    """Sends each token to the ranks that need it, through regions of ``group``.

    Rows of ``ids`` -1 are padding: they go nowhere and are never counted. Regions are used again in
    every layer: each exchange begins with a barrier, so rows of an exchange are free once the next
    one has begun. Two microbatches have regions of their own, and take turns alike on all ranks.
    """

    def __init__(
        self,
        placement: Placement,
        group: SymmetricGroup,
        device: torch.device,
        shape: TokenShape,
        node_W: Sequence[int] | None = None,
    ) -> None:
        super().__init__(placement, group, device, shape, node_W)
        self._group = group
        ops = ops_of(column_for(device))
        self._weighted_sum = ops.weighted_sum
        alignment = row_alignment(group.size)
        plain = TokenForm(shape.hidden, shape.dtype)
        there = replace(plain, quantise=ops.quantise_rows) if shape.eight else plain
        self._row = _Row(there, min(shape.top_k, placement.num_slots), alignment)
        self._output = _Row(plain, 0, alignment)
        self._lanes = [self._reserve_lane(capacity) for capacity in shape.capacities]

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        num_tokens, top_k = ids_TK.shape
        size, num_slots, row = self._group.size, self.placement.num_slots, self._row
        lane = next(lane for lane in self._lanes if lane.free)
        lane.free = False
        rows = self._group[lane.there.sent]
        places_TK = self._places_TK(ids_TK, layer)
        real_TK = places_TK >= 0
        ranks_TK = torch.where(real_TK, places_TK // num_slots, size)
        same_TKK = ranks_TK[:, :, None] == ranks_TK[:, None, :]
        first_TK = real_TK & ~same_TKK.tril(-1).any(2)
        hit_TW = ids_TK.new_zeros(num_tokens, size + 1).scatter_(1, ranks_TK, 1)[:, :size]
        self._group[lane.there.splits].copy_(hit_TW.sum(0))
        # Runs of the ranks follow one another, tokens in order within each.
        row_TW = (hit_TW.t().flatten().cumsum(0) - 1).view(size, num_tokens).t()
        row_TK = row_TW.gather(1, ranks_TK.clamp_max(size - 1))
        sent_TK = torch.where(first_TK, row_TK, len(rows) - 1)
        slots_TKK = torch.where(same_TKK & real_TK[:, None], (places_TK % num_slots)[:, None], EMPTY)
        slots_TKJ, choice_TKJ = slots_TKK.topk(row.num_pairs)
        weights_TKJ = weights_TK[:, None].expand(-1, top_k, -1).gather(2, choice_TKJ)
        at = sent_TK.flatten()
        for part, values in zip(row.form.parts(rows), row.form.of(normed), strict=True):
            part.index_copy_(0, at, values.repeat_interleave(top_k, 0, output_size=len(at)))
        row.slots(rows).index_copy_(0, at, slots_TKJ.flatten(0, 1).to(torch.int32))
        row.weights(rows).index_copy_(0, at, weights_TKJ.flatten(0, 1))
        self._start(lane, lane.there)
        return Handle(weights_TK, layer, _Sent(lane, sent_TK, weights_TK))

    def receive(self, handle: Handle) -> Received:
        sent = handle.state
        assert isinstance(sent, _Sent)
        self._group.wait(sent.lane.started)
        there, num_pairs = sent.lane.there, self._row.num_pairs
        num_rows = self._group.size * self._capacity
        rows = self._group[there.received][:num_rows]
        arrived = self._group[there.received_splits][0].sum()
        order_N = torch.arange(num_rows, device=rows.device)
        slots_NJ = torch.where((order_N < arrived)[:, None], self._row.slots(rows).to(torch.int64), EMPTY)
        sent.weights_NJ = torch.where(slots_NJ >= 0, self._row.weights(rows), 0.0)
        rows_M = order_N[:, None].expand(-1, num_pairs).flatten()
        return Received(self._row.form.read(rows), rows_M, slots_NJ.flatten())

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        sent = handle.state
        assert isinstance(sent, _Sent)
        lane, y_NJD = sent.lane, y_MD.view(*sent.weights_NJ.shape, self._shape.hidden)
        [room] = self._output.form.parts(self._group[lane.back.sent][: len(y_NJD)])
        self._weighted_sum(y_NJD, sent.weights_NJ, room)
        self._group[lane.back.splits].copy_(self._group[lane.there.received_splits][0])
        self._start(lane, lane.back)

    def combine(self, handle: Handle) -> Tensor:
        sent = handle.state
        assert isinstance(sent, _Sent)
        self._group.wait(sent.lane.started)
        sent.lane.free = True
        [rows] = self._output.form.parts(self._group[sent.lane.back.received])  # the last one is zero
        sums_TKD = rows.index_select(0, sent.sent_TK.flatten()).view(*sent.sent_TK.shape, rows.shape[1])
        return self._weighted_sum(sums_TKD, torch.ones_like(handle.weights_TK))

    def _reserve_lane(self, capacity: int) -> _Lane:
        size = self._group.size
        own, all_ = capacity * min(self._shape.top_k, size) + 1, capacity * size
        return _Lane(
            self._reserve_way(own, all_, self._row.num_bytes),
            self._reserve_way(all_, own, self._output.num_bytes),
        )

    def _reserve_way(self, sent: int, received: int, row_bytes: int) -> _Way:
        reserve, size = self._group.reserve, self._group.size
        return _Way(
            reserve((region_rows(sent, row_bytes), row_bytes), torch.uint8),
            reserve((region_rows(received, row_bytes), row_bytes), torch.uint8),
            reserve((size,), torch.int64),
            reserve((2, size), torch.int64),
        )

    def _start(self, lane: _Lane, way: _Way) -> None:
        lane.started = self._group.start_all_to_all(way.sent, way.received, way.splits, way.received_splits)


def _aligned(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
