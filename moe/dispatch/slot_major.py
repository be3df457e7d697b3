"""Exchange by slots: a token goes to the slot of each of its choices, and all outputs come back, to
be weighted and summed in float32 in the order of k. So the bits are those of ``all_to_all.py``,
whatever the number of ranks.

Suffixes: T own tokens, K choices, W ranks, S slots of a rank, R rows of a slot that the step may
fill, N rows of a slot in memory, M = S x R pairs, D hidden, G = D / 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed, Quantised
from ...kernels.table import column_for, ops_of
from ...parallel.one_epoch import Started
from ...parallel.slot_major import SlotArrivals, SlotGroup, SlotShape, SlotTokens
from ..balance.placement import EMPTY, Placement
from .dispatcher import Received
from .exchange import Handle
from .rows import TokenForm
from .within_capacity import CapacityExchange, TokenShape


@dataclass
class _Round:
    """A dispatch and its combine on ``lane``. ``started``: the call that was started last. y_SRD
    and sums_TD: what the combine reads and fills.
    """

    lane: int
    tokens: SlotTokens
    arrived: SlotArrivals | None = None
    started: Started = None
    y_SRD: Tensor | None = None
    sums_TD: Tensor | None = None


class SlotMajorExchange(CapacityExchange):
    """Sends tokens through the memory of ``group``, in FP8 as experts quantise them unless its
    kernels do it.

    Rows of ``ids`` -1 are padding: they go nowhere and are never counted. All ranks make the same
    calls in the same order, and two microbatches take turns alike on all ranks.
    """

    def __init__(
        self,
        placement: Placement,
        group: SlotGroup,
        device: torch.device,
        shape: TokenShape,
        node_W: Sequence[int] | None = None,
    ) -> None:
        super().__init__(placement, group, device, shape, node_W)
        self._group, self._begins = group, False
        self._free = list(range(len(shape.capacities)))
        quantise = ops_of(column_for(device)).quantise_rows if shape.eight and not group.quantises else None
        self._form = TokenForm(shape.hidden, shape.dtype, quantise)
        group.reserve(
            SlotShape(
                num_slots=placement.num_ranks * placement.num_slots,
                top_k=shape.top_k,
                capacity=shape.capacities[0],
                lanes=len(shape.capacities),
                hidden=shape.hidden,
                dtype=shape.dtype,
                eight=shape.eight,
            )
        )

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        super().begin_step(num_tokens, capacity)
        self._begins = True

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        places_TK = self._places_TK(ids_TK, layer).to(self._group.ids_dtype)
        values, *scales = (part.contiguous() for part in self._form.of(normed))
        if scales:
            values = values.view(torch.float8_e4m3fn)
        tokens = SlotTokens(values, scales[0] if scales else None, places_TK, weights_TK.contiguous())
        exchange = _Round(self._free.pop(), tokens)
        rounds, capacity, begins = self._group.rounds, self._capacity, self._begins
        self._begins = False

        def send() -> None:
            exchange.arrived = rounds.dispatch(exchange.lane, tokens, capacity, begins)

        exchange.started = self._group.start(send)
        return Handle(weights_TK, layer, exchange)

    def receive(self, handle: Handle) -> Received:
        exchange = handle.state
        assert isinstance(exchange, _Round) and exchange.arrived is not None
        self._group.wait(exchange.started)
        arrived = exchange.arrived
        num_slots, num_rows = arrived.values.shape[:2]
        device = arrived.values.device
        order_R = torch.arange(self._group.num_rows(self._capacity), device=device)
        slots_S1 = torch.arange(num_slots, device=device)[:, None]
        rows_M = (slots_S1 * num_rows + order_R).flatten()
        slots_M = torch.where(order_R < arrived.counts_S[:, None], slots_S1, EMPTY).flatten()
        values_ND = arrived.values.flatten(0, 1)
        if arrived.scales is None:
            return Received(values_ND, rows_M, slots_M)
        # Experts take scales row by row.
        return Received(Quantised(values_ND, arrived.scales.flatten(0, 1).contiguous()), rows_M, slots_M)

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        exchange = handle.state
        assert isinstance(exchange, _Round) and exchange.arrived is not None
        known, exchange.arrived, rounds = exchange.arrived.known, None, self._group.rounds
        y_SRD = y_MD.view(self.placement.num_slots, -1, self._shape.hidden)
        sums_TD = y_MD.new_empty(len(handle.weights_TK), self._shape.hidden)

        def send() -> None:
            rounds.combine(exchange.lane, y_SRD, exchange.tokens, known, sums_TD)

        exchange.y_SRD, exchange.sums_TD = y_SRD, sums_TD
        exchange.started = self._group.start(send)

    def combine(self, handle: Handle) -> Tensor:
        exchange = handle.state
        assert isinstance(exchange, _Round) and exchange.sums_TD is not None
        self._group.wait(exchange.started)
        self._free.append(exchange.lane)
        exchange.y_SRD = None
        return exchange.sums_TD
