"""Exchange over NVLink by FlashInfer: a token goes once to every rank that has one of its experts,
with all its choices, and the sum of their outputs comes back.

As in ``symmetric.py``, outputs are summed where they are computed, in float32 in the order of
slots, and travel in the model's dtype; the library adds the sums of the ranks in float32.

Suffixes: T own tokens, K choices, S slots of a rank, J = min(K, S) pairs of a row, N received rows
(padded ones included), M = N x J pairs, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed, Quantised
from ...kernels.table import column_for, ops_of
from ...parallel.nvlink import Arrived, NvlinkGroup, RoundShape
from ...parallel.one_epoch import Started
from ..balance.placement import EMPTY, Placement
from .dispatcher import Received
from .exchange import Handle
from .rows import TokenForm, Tokens
from .within_capacity import CapacityExchange, TokenShape


@dataclass
class _Lane:
    """The memory of one microbatch by its number in the group, and the round under way: the half
    that was started last, tensors that it reads or fills, and what has arrived. weights_NJ: of the
    pairs received.
    """

    number: int
    free: bool = True
    started: Started = None
    kept: tuple[Tensor, ...] = ()
    arrived: Arrived | None = None
    weights_NJ: Tensor | None = None


class NvlinkExchange(CapacityExchange):
    """Sends each token to the ranks that need it, through memories of ``group``.

    Rows of ``ids`` -1 are padding: they go nowhere and are never counted. Memories are used again
    in every layer: a rank begins a round once it has got all of the one before. Two microbatches
    have memories of their own, and take turns alike on all ranks.
    """

    def __init__(
        self,
        placement: Placement,
        group: NvlinkGroup,
        device: torch.device,
        shape: TokenShape,
        node_W: Sequence[int] | None = None,
    ) -> None:
        super().__init__(placement, group, device, shape, node_W)
        self._group = group
        ops = ops_of(column_for(device))
        self._weighted_sum = ops.weighted_sum
        plain = TokenForm(shape.hidden, shape.dtype)
        self._form = replace(plain, quantise=ops.quantise_rows) if shape.eight else plain
        self._num_pairs = min(shape.top_k, placement.num_slots)
        self._lanes = [self._reserve_lane(capacity) for capacity in _different(shape.capacities)]

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        lane = next(lane for lane in self._lanes if lane.free)
        places_TK = self._places_TK(ids_TK, layer)
        tokens, *scales = (part.contiguous() for part in self._form.of(normed))
        ids = places_TK.to(torch.int32)
        weights = weights_TK.contiguous()
        lane.free, lane.kept = False, (tokens, ids, weights, *scales)

        def send() -> None:
            lane.arrived = self._group[lane.number].dispatch(
                tokens,
                ids,
                weights,
                hidden_states_scale=scales[0] if scales else None,
                runtime_max_tokens_per_rank=self._capacity,
            )

        lane.started = self._group.start(send)
        return Handle(weights_TK, layer, lane)

    def receive(self, handle: Handle) -> Received:
        lane = handle.state
        assert isinstance(lane, _Lane) and lane.arrived is not None
        self._group.wait(lane.started)
        arrived, num_slots = lane.arrived, self.placement.num_slots
        weights_NK = arrived.topk_weights
        assert weights_NK is not None
        slots_NK = arrived.topk_ids.to(torch.int64) - self._group.index * num_slots
        own_NK = (slots_NK >= 0) & (slots_NK < num_slots)
        slots_NJ, choice_NJ = torch.where(own_NK, slots_NK, EMPTY).topk(self._num_pairs)
        lane.weights_NJ = torch.where(slots_NJ >= 0, weights_NK.gather(1, choice_NJ), 0.0)
        rows_N = torch.arange(len(slots_NJ), device=slots_NJ.device)
        rows_M = rows_N[:, None].expand(-1, self._num_pairs).flatten()
        return Received(_tokens_of(arrived), rows_M, slots_NJ.flatten())

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        lane = handle.state
        assert isinstance(lane, _Lane) and lane.weights_NJ is not None
        rounds, hidden = self._group[lane.number], self._shape.hidden
        room_ND = self._group.room_for_outputs(lane.number, self._shape.dtype)
        self._weighted_sum(y_MD.view(*lane.weights_NJ.shape, hidden), lane.weights_NJ, room_ND)
        sums_TD = y_MD.new_empty(len(handle.weights_TK), hidden)

        def send() -> None:
            rounds.combine(room_ND, output=sums_TD)

        lane.kept = (sums_TD,)
        lane.started = self._group.start(send)

    def combine(self, handle: Handle) -> Tensor:
        lane = handle.state
        assert isinstance(lane, _Lane)
        self._group.wait(lane.started)
        [sums_TD] = lane.kept
        lane.free, lane.kept, lane.arrived, lane.weights_NJ = True, (), None, None
        return sums_TD

    def _reserve_lane(self, capacity: int) -> _Lane:
        shape, num_slots = self._shape, self.placement.num_ranks * self.placement.num_slots
        rounds = RoundShape(num_slots, shape.top_k, capacity, shape.hidden, shape.dtype, shape.eight)
        return _Lane(self._group.reserve(rounds))


def _tokens_of(arrived: Arrived) -> Tokens:
    scales = arrived.hidden_states_scale
    if scales is None:
        return arrived.hidden_states
    return Quantised(arrived.hidden_states.view(torch.float8_e4m3fn), scales)


def _different(capacities: Sequence[int]) -> list[int]:
    """The capacities, made distinct by adding 1: the library shares memory among equal ones."""
    found: list[int] = []
    for capacity in capacities:
        while capacity in found:
            capacity += 1
        found.append(capacity)
    return found
