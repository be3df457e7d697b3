"""The experts that live on this rank, their weights stacked slot by slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.formats.fp8_format import BLOCK
from ..kernels.reference.fp8 import Quantised
from ..kernels.reference.sublayers import GateWeights, Here, Residual, RowNorm, route_through
from ..kernels.table import Ops, SlotWeights
from .config import MoEConfig
from .dispatch.dispatcher import Received


class Experts(nn.Module):
    """w13 [S, 2F, D], gate rows first, and w2 [S, D, F] of the S expert slots of one layer."""

    def __init__(
        self, config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, ops: Ops
    ) -> None:
        super().__init__()
        self._ops = ops
        width, hidden = config.expert_width, config.hidden
        self.w13 = nn.Parameter(
            torch.empty(num_slots, 2 * width, hidden, dtype=dtype, device=device), requires_grad=False
        )
        self.w2 = nn.Parameter(
            torch.empty(num_slots, hidden, width, dtype=dtype, device=device), requires_grad=False
        )
        self._weights: tuple[SlotWeights, SlotWeights] = self.w13, self.w2

    def pack(self) -> None:
        """Brings the weights into the form that this device reads fastest, after loading; as loaded
        they are kept only if that form needs them.
        """
        self._weights = w13, w2 = self._ops.pack_slots(self.w13, self.w2)
        if isinstance(w13, Tensor) and isinstance(w2, Tensor):
            self.w13, self.w2 = (nn.Parameter(weights, requires_grad=False) for weights in (w13, w2))

    def forward(self, received: Received, counts_S: Tensor) -> Tensor:
        """Returns y_MD, unweighted; adds the tokens of every slot to counts_S."""
        return self._ops.experts(received.x_ND, received.rows_M, received.slots_M, *self._weights, counts_S)

    def sublayer(
        self, residual: Residual, norm: RowNorm, gate: GateWeights, here: Here
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``kernels.sublayers.experts_sublayer``."""
        return self._ops.experts_sublayer(self._ops, residual, norm, gate, self._weights, here)


class Fp8Experts(nn.Module):
    """The same in block-scaled FP8 (``kernels.fp8.Quantised``): w13 with w13_scales [S, 2, ceil(F /
    128), ceil(D / 128)], w2 with w2_scales [S, ceil(D / 128), ceil(F / 128)]. Rows are quantised
    before either product.
    """

    def __init__(self, config: MoEConfig, num_slots: int, device: torch.device, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        width, hidden = config.expert_width, config.hidden
        blocks = -(-width // BLOCK), -(-hidden // BLOCK)

        def held(dtype: torch.dtype, *shape: int) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(num_slots, *shape, dtype=dtype, device=device), requires_grad=False
            )

        self.w13, self.w13_scales = (
            held(torch.float8_e4m3fn, 2 * width, hidden),
            held(torch.float32, 2, *blocks),
        )
        self.w2, self.w2_scales = held(torch.float8_e4m3fn, hidden, width), held(torch.float32, *blocks[::-1])

    def forward(self, received: Received, counts_S: Tensor) -> Tensor:
        """Returns y_MD, unweighted; adds the tokens of every slot to counts_S."""
        w13, w2 = Quantised(self.w13, self.w13_scales), Quantised(self.w2, self.w2_scales)
        pairs = (received.rows_M, received.slots_M)
        return self._ops.experts_fp8(
            self._ops.quantise_rows(received.x_ND), pairs, w13, w2, counts_S, received.x_ND.dtype
        )

    def sublayer(
        self, residual: Residual, norm: RowNorm, gate: GateWeights, here: Here
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``kernels.sublayers.experts_sublayer``."""

        def run(x_TD: Tensor, slots_M: Tensor) -> Tensor:
            return self.forward(Received(x_TD, here.rows_M, slots_M), here.counts_S)

        return route_through(self._ops, residual, norm, gate, here.slots_L, run)
