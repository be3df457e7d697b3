"""A Mixture-of-Experts layer: norm, gate, dispatch, experts, shared experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference.sublayers import GateWeights, Here, Residual, RowNorm, choose_experts
from ..kernels.table import Ops
from .config import MoEConfig
from .dispatch.dispatcher import Dispatcher
from .dispatch.local import LocalDispatcher
from .experts import Experts, Fp8Experts


class Gate(nn.Module):
    """What chooses experts, by ``kernels.sublayers.choose_experts``. ``weight`` [E, D] and
    ``e_score_correction_bias`` [E] are float32 whatever the model's dtype.
    """

    def __init__(self, config: MoEConfig, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.num_experts, config.hidden, device=device), requires_grad=False
        )
        self.e_score_correction_bias: nn.Parameter | None = None
        if config.selection_bias:
            self.e_score_correction_bias = nn.Parameter(
                torch.empty(config.num_experts, device=device), requires_grad=False
            )
        self.weights = GateWeights(self.weight, self.e_score_correction_bias, config)


class _Weight(nn.Module):
    """A matrix without bias, so that its parameter is called ``<name>.weight`` as in the
    checkpoint.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(rows, columns, dtype=dtype, device=device), requires_grad=False
        )


class SharedExperts(nn.Module):
    """The experts every token passes, as one SwiGLU block of ``shared_width``, and the gate of
    their output if there is one.
    """

    def __init__(self, config: MoEConfig, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self.gate_proj = _Weight(config.shared_width, config.hidden, dtype, device)
        self.up_proj = _Weight(config.shared_width, config.hidden, dtype, device)
        self.down_proj = _Weight(config.hidden, config.shared_width, dtype, device)
        self.gate = _Weight(1, config.hidden, dtype, device) if config.shared_gate else None

    def pack(self) -> None:
        for matrix in (self.gate_proj, self.up_proj, self.down_proj):
            matrix.weight = nn.Parameter(self._ops.pack(matrix.weight), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        linear = self._ops.linear
        inner_TF = F.silu(linear(x_TD, self.gate_proj.weight)) * linear(x_TD, self.up_proj.weight)
        y_TD = linear(inner_TF, self.down_proj.weight)
        return y_TD if self.gate is None else y_TD * F.linear(x_TD, self.gate.weight).sigmoid()


class MoELayer(nn.Module):
    """Layer ``layer`` (counted among MoE layers) of a model; its experts are those of the
    dispatcher's placement, in ``dtype`` or in block-scaled FP8.
    """

    def __init__(
        self,
        config: MoEConfig,
        layer: int,
        dispatcher: Dispatcher,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        fp8_experts: bool = False,
    ) -> None:
        super().__init__()
        self.gate = Gate(config, device)
        num_slots = dispatcher.placement.num_slots
        plain = not fp8_experts
        self.experts = (
            Experts(config, num_slots, dtype, device, ops)
            if plain
            else Fp8Experts(config, num_slots, device, ops)
        )
        self.shared_experts = SharedExperts(config, dtype, device, ops) if config.shared_width else None
        self._ops = ops
        self._dispatcher = dispatcher
        self._layer = layer
        self._top_k = config.top_k

    def forward(self, residual: Residual, norm: RowNorm) -> tuple[Tensor, Tensor]:
        """The residual after this layer, [T, D]. T may be 0: other ranks wait in the exchange.
        Shared experts run while tokens travel.
        """
        dispatcher = self._dispatcher
        if isinstance(dispatcher, LocalDispatcher):

            def compute(here: Here) -> tuple[Tensor, Tensor, Tensor]:
                return self.experts.sublayer(residual, norm, self.gate.weights, here)

            x_TD, normed_TD, routed_TD = dispatcher.run(self._layer, (len(residual[0]), self._top_k), compute)
            shared_TD = self._shared(normed_TD)
        else:
            x_TD, normed_TD, ids_TK, weights_TK = choose_experts(self._ops, residual, norm, self.gate.weights)
            handle = dispatcher.dispatch(normed_TD, ids_TK, weights_TK, self._layer)
            shared_TD = self._shared(normed_TD)
            y_MD = self.experts(dispatcher.receive(handle), dispatcher.counts_LS[self._layer])
            routed_TD = dispatcher.combine(y_MD, handle)
        return x_TD, routed_TD if shared_TD is None else routed_TD + shared_TD

    def _shared(self, x_TD: Tensor) -> Tensor | None:
        return self.shared_experts(x_TD) if self.shared_experts is not None else None
