"""The experts of a layer on this rank, their weights stacked by slot.

S expert slots  D hidden  F width of an expert  M pairs (token, choice)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.formats.four_bit_format import FourBitFormat
from ..kernels.formats.fp8_format import BLOCK
from ..kernels.reference.column import Reference
from ..kernels.reference.experts import ExpertForm
from ..kernels.reference.four_bit import SCALE_DTYPES, FourBit, PackedFourBit
from ..kernels.reference.fp8 import Normed, NormedRows, Quantised, wide_of
from ..kernels.reference.sublayers import ExpertsSublayer, GateWeights, LocalExperts, RowNorm
from ..parallel.linear import Backend
from .config import MoEConfig
from .dispatch.dispatcher import Received


class Experts(nn.Module):
    """w13 [S, 2F, D], gate rows first, and w2 [S, D, F]; with biases also w13_bias [S, 2F] and
    w2_bias [S, D].
    """

    def __init__(self, config: MoEConfig, num_slots: int, backend: Backend[Reference]) -> None:
        super().__init__()
        width, hidden = config.expert_width, config.hidden
        self._config, self._backend, self._ops = config, backend, backend.ops
        self.w13 = backend.parameter(num_slots, 2 * width, hidden)
        self.w2 = backend.parameter(num_slots, hidden, width)
        self.w13_bias, self.w2_bias = _biases(config, num_slots, backend)
        self.form = _form(config, self.w13_bias, self.w2_bias)
        self._weights: tuple[Tensor, Tensor] = self.w13, self.w2

    def pack(self) -> None:
        """Brings the weights into the form that this device reads fastest."""
        self._weights = w13, w2 = self._ops.pack_slots(self.w13, self.w2)
        self.w13 = nn.Parameter(w13, requires_grad=False)
        self.w2 = nn.Parameter(w2, requires_grad=False)

    @property
    def by_slot(self) -> tuple[Tensor, ...]:
        """All weights, [S, ...] each, in the form that travels."""
        return self.w13.data, self.w2.data, *(self.form.biases or ())

    def spare(self, num_slots: int) -> Experts:
        """Unloaded experts of the same form, in slots of their own."""
        return Experts(self._config, num_slots, self._backend)

    def forward(self, received: Received, counts_S: Tensor) -> Tensor:
        """Returns y_MD, unweighted; adds the tokens of every slot to counts_S."""
        pairs = received.rows_M, received.slots_M
        return self._ops.experts(_wide(received), *pairs, *self._weights, counts_S, self.form)

    def sublayer(self, norm: RowNorm, gate: GateWeights) -> ExpertsSublayer:
        """The sublayer of norm, gate and these experts, where all of them are local."""
        return self._ops.experts_sublayer(norm, gate, self._weights, self.form)


class Fp8Experts(nn.Module):
    """``Experts`` in block-scaled FP8 (``kernels.reference.fp8.Quantised``): w13 with w13_scales
    [S, 2, ceil(F / 128), ceil(D / 128)], w2 with w2_scales [S, ceil(D / 128), ceil(F / 128)]. Rows
    are quantised before either product.
    """

    def __init__(self, config: MoEConfig, num_slots: int, backend: Backend[Reference]) -> None:
        super().__init__()
        width, hidden = config.expert_width, config.hidden
        blocks = -(-width // BLOCK), -(-hidden // BLOCK)
        self._config, self._backend, self._ops = config, backend, backend.ops
        self.w13 = backend.parameter(num_slots, 2 * width, hidden, dtype=torch.float8_e4m3fn)
        self.w13_scales = backend.parameter(num_slots, 2, *blocks, dtype=torch.float32)
        self.w2 = backend.parameter(num_slots, hidden, width, dtype=torch.float8_e4m3fn)
        self.w2_scales = backend.parameter(num_slots, *blocks[::-1], dtype=torch.float32)
        self._weights = Quantised(self.w13, self.w13_scales), Quantised(self.w2, self.w2_scales)

    def pack(self) -> None:
        """FP8 weights stay as they are loaded."""

    @property
    def by_slot(self) -> tuple[Tensor, ...]:
        """All weights and scales, [S, ...] each."""
        return self.w13.data, self.w13_scales.data, self.w2.data, self.w2_scales.data

    def spare(self, num_slots: int) -> Fp8Experts:
        """Unloaded experts of the same form, in slots of their own."""
        return Fp8Experts(self._config, num_slots, self._backend)

    def forward(self, received: Received, counts_S: Tensor) -> Tensor:
        """Returns y_MD, unweighted; adds the tokens of every slot to counts_S."""
        x, pairs = received.x_ND, (received.rows_M, received.slots_M)
        rows = x if isinstance(x, Quantised) else self._ops.quantise_rows(x)
        return self._ops.experts_fp8(rows, pairs, *self._weights, counts_S, self._backend.dtype)

    def sublayer(self, norm: RowNorm, gate: GateWeights) -> ExpertsSublayer:
        """The sublayer of norm, gate and these experts, where all of them are local."""

        def run(rows: Normed, slots_M: Tensor, local: LocalExperts) -> Tensor:
            tokens = rows.eight if isinstance(rows, NormedRows) else rows
            return self.forward(Received(tokens, local.rows_M, slots_M), local.counts_S)

        return self._ops.routed_sublayer(norm, gate, run, eight=True)


class FourBitExperts(nn.Module):
    """``Experts`` in 4 bits (``kernels.reference.four_bit.FourBit``): w13 uint8 [S, 2F, D / 2] with
    w13_scales [S, 2F, G], w2 uint8 [S, D, F / 2] with w2_scales; w13_factors [S, 2] and w2_factors
    [S, 1] where the format has factors. Products use the dequantised values. Biases, if any, are
    those of ``Experts``.
    """

    def __init__(
        self, config: MoEConfig, num_slots: int, backend: Backend[Reference], format: FourBitFormat
    ) -> None:
        super().__init__()
        self._config, self._backend, self._ops, self._format = config, backend, backend.ops, format
        width, hidden = config.expert_width, config.hidden
        self.w13, self.w13_scales, self.w13_factors = self._parameters_of(num_slots, 2 * width, hidden, 2)
        self.w2, self.w2_scales, self.w2_factors = self._parameters_of(num_slots, hidden, width, 1)
        self.weights = (
            FourBit(format, self.w13, self.w13_scales, self.w13_factors),
            FourBit(format, self.w2, self.w2_scales, self.w2_factors),
        )
        self._packed: tuple[PackedFourBit, PackedFourBit] = self.weights
        self.w13_bias, self.w2_bias = _biases(config, num_slots, backend)
        self.form = _form(config, self.w13_bias, self.w2_bias)

    def pack(self) -> None:
        """The weights stay as they are loaded; the ops may see them in another form."""
        self._packed = self._ops.pack_four_bit(self.weights[0]), self._ops.pack_four_bit(self.weights[1])

    @property
    def by_slot(self) -> tuple[Tensor, ...]:
        """All codes, scales, factors and biases, [S, ...] each."""
        return tuple(parameter.data for parameter in self.parameters())

    def spare(self, num_slots: int) -> FourBitExperts:
        """Unloaded experts of the same form, in slots of their own."""
        return FourBitExperts(self._config, num_slots, self._backend, self._format)

    def forward(self, received: Received, counts_S: Tensor) -> Tensor:
        """Returns y_MD, unweighted; adds the tokens of every slot to counts_S."""
        pairs = received.rows_M, received.slots_M
        return self._ops.experts_four_bit(_wide(received), *pairs, *self._packed, counts_S, self.form)

    def sublayer(self, norm: RowNorm, gate: GateWeights) -> ExpertsSublayer:
        """The sublayer of norm, gate and these experts, where all of them are local."""

        def run(rows: Normed, slots_M: Tensor, local: LocalExperts) -> Tensor:
            return self.forward(Received(wide_of(rows), local.rows_M, slots_M), local.counts_S)

        return self._ops.routed_sublayer(norm, gate, run)

    def _parameters_of(
        self, num_slots: int, rows: int, columns: int, parts: int
    ) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
        """Codes, scales and factors of matrices [rows, columns]."""
        format, parameter = self._format, self._backend.parameter
        return (
            parameter(num_slots, rows, columns // 2, dtype=torch.uint8),
            parameter(num_slots, rows, format.groups(columns), dtype=SCALE_DTYPES[format.scale]),
            parameter(num_slots, parts, dtype=torch.float32) if format.has_factor else None,
        )


def _biases(
    config: MoEConfig, num_slots: int, backend: Backend[Reference]
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The biases of both products by slot, if experts have them."""
    if not config.expert_bias:
        return None, None
    return (
        backend.parameter(num_slots, 2 * config.expert_width),
        backend.parameter(num_slots, config.hidden),
    )


def _wide(received: Received) -> Tensor:
    """Tokens in the model's dtype. Raises if they are quantised: these experts do not take them."""
    assert isinstance(received.x_ND, Tensor), "only experts in FP8 take tokens in FP8"
    return received.x_ND


def _form(config: MoEConfig, up: nn.Parameter | None, down: nn.Parameter | None) -> ExpertForm:
    return ExpertForm(config.activation, None if up is None or down is None else (up.data, down.data))


AnyExperts = Experts | Fp8Experts | FourBitExperts


def read_slot(experts: AnyExperts, slot: int, row: Tensor | None = None) -> Tensor:
    """The weights of one slot in the form that travels, uint8 [bytes]: in ``row``, if given."""
    return torch.cat([part[slot].reshape(-1).view(torch.uint8) for part in experts.by_slot], out=row)


def slot_form(experts: AnyExperts) -> str:
    """The form in which a slot's weights travel; ranks with the same form can exchange experts."""
    return " and ".join(
        f"{str(part.dtype).removeprefix('torch.')} {'x'.join(map(str, part.shape[1:]))}"
        for part in experts.by_slot
    )


def write_slot(experts: AnyExperts, slot: int, row: Tensor) -> None:
    """Writes what ``read_slot`` read, on a rank whose weights have the same form, at the slot's
    place in memory.
    """
    targets = [part[slot].view(-1).view(torch.uint8) for part in experts.by_slot]
    for target, source in zip(targets, row.split([len(target) for target in targets]), strict=True):
        target.copy_(source)
