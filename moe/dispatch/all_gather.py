"""Exchange by all-gather and reduce-scatter: every rank receives every token and computes its own
experts.

All shapes follow from the step's capacity. Suffixes: T own tokens, C capacity, W ranks, N = W x C,
K choices, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.reference.fp8 import Normed, wide_of
from ...kernels.table import Column, column_for, ops_of
from ...parallel.collectives import Collectives, Pending
from ..balance.placement import EMPTY, Placement
from .dispatcher import Received
from .exchange import Handle
from .replicas import PlacedExchange, ReplicaChoice
from .rows import TokenForm


@dataclass
class _Gathered:
    """Tokens under way, then their outputs. ``form`` of the tokens. ``weights_NK``: of all tokens
    that were received, 0 for other ranks' experts, where sums travel back.
    """

    pending: Pending
    form: TokenForm
    weights_NK: Tensor


class AllGatherExchange(PlacedExchange):
    """Tokens are padded to the capacity; padding goes to no expert.

    ``exact``: each of a token's K outputs is reduced separately: one rank adds the value, the
    others zeros, which is exact. The token's own rank then sums over K, so the sum does not depend
    on the number of ranks. Otherwise each rank sums the outputs of its own experts in float32 and
    the sums are reduced in the model's dtype: 1 / K of the bytes, and rounding that depends on the
    number of ranks. By default CPUs are exact; GPUs are not, whose experts leave outputs of padding
    undefined. ``column``: that of the experts, by default the device's. ``eight``: tokens travel in
    FP8, as experts in FP8 quantise them.
    """

    def __init__(
        self,
        placement: Placement,
        collectives: Collectives,
        device: torch.device,
        node_W: Sequence[int] | None = None,
        exact: bool | None = None,
        eight: bool = False,
        column: Column | None = None,
    ) -> None:
        super().__init__(
            placement, collectives.size, ReplicaChoice(placement, collectives.index, node_W, device)
        )
        column = column or column_for(device)
        ops = ops_of(column)
        self._weighted_sum, self._quantise = ops.weighted_sum, ops.quantise_rows if eight else None
        self._collectives = collectives
        self._exact = column != "triton" if exact is None else exact
        self._capacity = 0

    def begin_step(self, num_tokens: int, capacity: int) -> None:
        assert num_tokens <= capacity, f"{num_tokens} tokens, capacity {capacity}"
        self._capacity = capacity
        self._choice.begin_step(num_tokens)

    def dispatch(self, normed: Normed, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Handle:
        (num_tokens, top_k), x_TD = ids_TK.shape, wide_of(normed)
        places_CK = ids_TK.new_full((self._capacity, top_k), EMPTY)
        places_TK = self._choice.places_TK(ids_TK.clamp_min(0), layer)
        places_CK[:num_tokens] = torch.where(ids_TK >= 0, places_TK, EMPTY)
        if not self._exact:
            weights_CK = weights_TK.new_zeros(self._capacity, top_k)
            weights_CK[:num_tokens] = weights_TK
            places_CK = torch.cat([places_CK.to(torch.int32), weights_CK.view(torch.int32)], 1)
        form = TokenForm(x_TD.shape[1], x_TD.dtype, self._quantise)
        num_bytes = form.num_bytes + 4 * places_CK.shape[1]
        rows = torch.zeros(self._capacity, num_bytes, dtype=torch.uint8, device=x_TD.device)
        for part, values in zip(form.parts(rows), form.of(normed), strict=True):
            part[:num_tokens].copy_(values)
        rows[:, form.num_bytes :].view(torch.int32).copy_(places_CK)
        # A vacant rank's rows are padding: places of EMPTY's bits.
        pending = self._collectives.all_gather(rows, f"tokens of MoE layer {layer}", fill=0xFF)
        return Handle(weights_TK, layer, _Gathered(pending, form, weights_TK))

    def forward(self, handle: Handle) -> None:
        """Does nothing: the number of tokens is known, and they are on their way."""

    def receive(self, handle: Handle) -> Received:
        gathered, top_k = handle.state, handle.weights_TK.shape[1]
        assert isinstance(gathered, _Gathered)
        rows = self._collectives.wait(gathered.pending)
        packed = rows[:, gathered.form.num_bytes :].view(torch.int32)
        places_NK = packed[:, :top_k]
        slots_NK = places_NK.to(torch.int64) - self._collectives.index * self.placement.num_slots
        slots_NK = torch.where((slots_NK >= 0) & (slots_NK < self.placement.num_slots), slots_NK, EMPTY)
        if not self._exact:
            weights_NK = packed[:, top_k:].view(torch.float32)
            gathered.weights_NK = torch.where(slots_NK >= 0, weights_NK, 0.0)
        rows_M = torch.arange(len(rows), device=rows.device).repeat_interleave(slots_NK.shape[1])
        return Received(gathered.form.read(rows), rows_M, slots_NK.flatten())

    def send_back(self, y_MD: Tensor, handle: Handle) -> None:
        gathered, what = handle.state, f"expert outputs of MoE layer {handle.layer}"
        if not self._exact:
            y_NKD = y_MD.view(*gathered.weights_NK.shape, gathered.form.hidden)
            y_MD = self._weighted_sum(y_NKD, gathered.weights_NK)
        gathered.pending = self._collectives.reduce_scatter(y_MD, what)

    def combine(self, handle: Handle) -> Tensor:
        num_tokens, top_k = handle.weights_TK.shape
        y_PD = self._collectives.wait(handle.state.pending)
        if not self._exact:
            return y_PD[:num_tokens]
        y_PD = y_PD[: num_tokens * top_k]
        return self._weighted_sum(y_PD.view(num_tokens, top_k, y_PD.shape[1]), handle.weights_TK)
