"""Experts: SwiGLU feed-forward blocks, each applied to the rows routed to it, and the weighted sum
of a token's outputs.

A *pair* is one (token, choice). Each of the M pairs names a row of x and the slot with its weights.
Suffixes: N received tokens, T own tokens, K choices per token, M pairs, S expert slots, D hidden, F
expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activation import SILU, Activation


@dataclass(frozen=True, eq=False)
class ExpertForm:
    """The parts of experts beside their matrices: the activation, and perhaps ``biases`` of both
    products by slot, [S, 2F] (gate first) and [S, D].
    """

    activation: Activation = SILU
    biases: tuple[Tensor, Tensor] | None = None

    def of(self, slot: int) -> tuple[Tensor | None, Tensor | None]:
        """The biases of one slot."""
        return (None, None) if self.biases is None else (self.biases[0][slot], self.biases[1][slot])


PLAIN_FORM = ExpertForm()


def activate(gate_up: Tensor, activation: Activation) -> Tensor:
    """[..., 2F], gate first -> [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    if activation.kind == "silu":
        return F.silu(gate) * up
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return gate * (gate * activation.alpha).sigmoid() * (up + 1)


def experts_reference(
    x_ND: Tensor,
    rows_M: Tensor,
    slots_M: Tensor,
    w13_SFD: Tensor,
    w2_SDF: Tensor,
    counts_S: Tensor,
    form: ExpertForm = PLAIN_FORM,
) -> Tensor:
    """Applies to every pair the expert in its slot; the plain definition. Returns y_MD in pair
    order, unweighted, in the dtype of x.

    rows_M int64 into x_ND. slots_M int64 into w13_SFD [S, 2F, D] and w2_SDF [S, D, F]. A slot of -1
    is padding: its output is zero, in the Triton column undefined, and it is not counted. counts_S
    int64 is increased by the pairs of each slot.
    """
    y_MD = x_ND.new_zeros(len(slots_M), x_ND.shape[1])
    for pair, (row, slot) in enumerate(zip(rows_M.tolist(), slots_M.tolist(), strict=True)):
        if slot >= 0:
            up_bias, down_bias = form.of(slot)
            gate_up_1F = F.linear(x_ND[row : row + 1], w13_SFD[slot], up_bias)
            y_MD[pair] = F.linear(activate(gate_up_1F, form.activation), w2_SDF[slot], down_bias)[0]
            counts_S[slot] += 1
    return y_MD


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor | None = None) -> Tensor:
    """Weighted sum of each token's K outputs, in float32 and in the order of k. Returns [T, D] in
    the dtype of y; or fills ``out_TD``, whose rows without any weight are undefined.

    The order is fixed, so the sum depends neither on where the outputs were computed nor on the
    neighbouring tokens. The Triton column does not read an output of weight 0, so it may be
    undefined.
    """
    sum_TD = y_TKD[:, 0] * weights_TK[:, :1]
    for k in range(1, y_TKD.shape[1]):
        sum_TD = torch.addcmul(sum_TD, y_TKD[:, k], weights_TK[:, k : k + 1])
    return sum_TD.to(y_TKD.dtype) if out_TD is None else out_TD.copy_(sum_TD)
