"""The experts that live on this rank, their weights stacked slot by slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.table import Ops
from .config import MoEConfig
from .dispatch import Received


class Experts(nn.Module):
    """w13 [S, 2F, D], gate rows first, and w2 [S, D, F] of the S expert slots of one layer."""

    def __init__(self, config: MoEConfig, num_slots: int, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        width, hidden = config.expert_width, config.hidden
        self.w13 = nn.Parameter(torch.empty(num_slots, 2 * width, hidden, dtype=dtype, device=device), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(num_slots, hidden, width, dtype=dtype, device=device), requires_grad=False)

    def forward(self, received: Received, counts_S: Tensor) -> Tensor:
        """Returns y_MD, unweighted; adds the tokens of every slot to counts_S."""
        return self._ops.experts(received.x_ND, received.rows_M, received.slots_M, self.w13, self.w2, counts_S)
