"""Exchange by DeepEP's low-latency kernels: a token goes to the slot of each of its choices, and
all outputs come back, to be weighted and summed in float32 in the order of k. So the bits are those
of ``all_to_all.py``, whatever the number of ranks.

In FP8 the kernels quantise tokens themselves: amax of 128 values, 1e-4 at least, makes a scale of
amax / 448, and values are multiplied by 448 / amax, where experts divide by their scale. So a few
values differ in their last bit.

Suffixes: T own tokens, K choices, W ranks, S slots of a rank, N = W x capacity rows of a slot,
M = S x N pairs, D hidden, G = D / 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed, Quantised, wide_of
from ...parallel.deepep import DeepEPGroup, Tokens3D
from ...parallel.deepep_sizes import BufferShape, rounded_capacity
from ...parallel.one_epoch import Started
from ..balance.placement import EMPTY, Placement
from .dispatcher import Received
from .exchange import Handle
from .rows import Tokens
from .within_capacity import CapacityExchange, TokenShape


@dataclass
class _Round:
    """A dispatch and its combine. places_TK in the library's dtype. ``arrived``: tokens and int32
    counts_S from the dispatch; ``known``: its handle for the combine. ``started``: the call that
    was started last; ``kept``: tensors that it reads or fills.
    """

    places_TK: Tensor
    weights_TK: Tensor
    arrived: tuple[Tokens3D, Tensor] | None = None
    known: Any = None
    started: Started = None
    kept: tuple[Tensor, ...] = field(default=())


class DeepEPExchange(CapacityExchange):
    """Sends tokens in bf16 or FP8 through the memory of ``group``.

    Rows of ``ids`` -1 are padding: they go nowhere and are never counted. All ranks make the same
    calls in the same order, and meet before the first of a step, which may have another capacity.
    Two microbatches share the memory (``parallel/deepep.py`` says why they can).
    """

    def __init__(
        self,
        placement: Placement,
        group: DeepEPGroup,
        device: torch.device,
        shape: TokenShape,
        node_W: Sequence[int] | None = None,
    ) -> None:
        super().__init__(placement, group, device, shape, node_W)
        self._group, self._begins = group, False
        self._num_slots = placement.num_ranks * placement.num_slots
        group.reserve(BufferShape(self._num_slots, shape.capacities[0], shape.hidden))

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        super().begin_step(num_tokens, capacity)
        self._begins = True

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        tokens = wide_of(normed).contiguous()
        places_TK = self._places_TK(ids_TK, layer).to(self._group.ids_dtype)
        exchange = _Round(places_TK, weights_TK.contiguous(), kept=(tokens,))
        capacity = rounded_capacity(self._capacity, self._group.size)
        buffer, begins, self._begins = self._group.buffer, self._begins, False

        def send() -> None:
            if begins:
                buffer.clean_low_latency_buffer(capacity, self._shape.hidden, self._num_slots)
            arrived, counts_S, exchange.known, _, _ = buffer.low_latency_dispatch(
                tokens, places_TK, capacity, self._num_slots, use_fp8=self._shape.eight
            )
            exchange.arrived = arrived, counts_S

        exchange.started = self._group.start(send)
        return Handle(weights_TK, layer, exchange)

    def receive(self, handle: Handle) -> Received:
        exchange = handle.state
        assert isinstance(exchange, _Round) and exchange.arrived is not None
        self._group.wait(exchange.started)
        (arrived, counts_S), exchange.arrived = exchange.arrived, None
        tokens = _joined(arrived)
        num_rows = len(tokens.values if isinstance(tokens, Quantised) else tokens)
        rows_M = torch.arange(num_rows, device=counts_S.device)
        rows_SN = rows_M.view(len(counts_S), -1)
        slots_S1 = torch.arange(len(counts_S), device=counts_S.device)[:, None]
        arrived_SN = rows_SN < slots_S1 * rows_SN.shape[1] + counts_S[:, None]
        return Received(tokens, rows_M, torch.where(arrived_SN, slots_S1, EMPTY).flatten())

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        exchange = handle.state
        assert isinstance(exchange, _Round)
        y_SND = y_MD.view(self.placement.num_slots, -1, self._shape.hidden)
        sums_TD = y_MD.new_empty(len(handle.weights_TK), self._shape.hidden)

        def send() -> None:
            self._group.buffer.low_latency_combine(
                y_SND, exchange.places_TK, exchange.weights_TK, exchange.known, out=sums_TD
            )

        exchange.kept = y_SND, sums_TD
        exchange.started = self._group.start(send)

    def combine(self, handle: Handle) -> Tensor:
        exchange = handle.state
        assert isinstance(exchange, _Round)
        self._group.wait(exchange.started)
        _, sums_TD = exchange.kept
        exchange.kept, exchange.known = (), None
        return sums_TD


def _joined(arrived: Tokens3D) -> Tokens:
    """The rows of all slots; experts take scales row by row."""
    if isinstance(arrived, Tensor):
        return arrived.flatten(0, 1)
    values, scales = arrived
    return Quantised(values.flatten(0, 1), scales.flatten(0, 1).contiguous())
