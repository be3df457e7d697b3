"""A Mixture-of-Experts layer: norm, gate, dispatch, experts, shared experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference.column import Reference
from ..kernels.reference.fp8 import Normed, wide_of
from ..kernels.reference.sublayers import GateWeights, Projection, Residual, RowNorm
from ..parallel.linear import Backend, Matrix, SwiGLU
from .config import MoEConfig
from .dispatch.dispatcher import Dispatcher, RoutedExperts
from .experts import AnyExperts, Experts, Fp8Experts


class Gate(nn.Module):
    """Chooses experts. ``weight`` [E, D] and ``e_score_correction_bias`` [E], or the logits'
    ``bias`` [E], are float32 whatever the model's dtype; ``pack`` may narrow ``weight``.
    """

    def __init__(self, config: MoEConfig, backend: Backend[Reference]) -> None:
        super().__init__()
        self.weight = backend.parameter(config.num_experts, config.hidden, dtype=torch.float32)
        self.e_score_correction_bias: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if config.selection_bias:
            self.e_score_correction_bias = backend.parameter(config.num_experts, dtype=torch.float32)
        elif config.logit_bias:
            self.bias = backend.parameter(config.num_experts, dtype=torch.float32)
        bias = self.bias if self.e_score_correction_bias is None else self.e_score_correction_bias
        self.weights = GateWeights(self.weight, bias, config)
        self._narrow = backend.dtype if backend.ops.takes_narrow_gates else None

    def pack(self) -> None:
        """Holds ``weight`` in the model's dtype, if the ops take that and no weight changes by it:
        a checkpoint that stores its gates in float32 keeps them.
        """
        if self._narrow is None:
            return
        narrow_ED = self.weight.to(self._narrow)
        if torch.equal(narrow_ED.float(), self.weight):
            self.weight = nn.Parameter(narrow_ED, requires_grad=False)
            self.weights = replace(self.weights, weight=self.weight)


class SharedExperts(SwiGLU):
    """The experts that process every token, as one block of ``shared_width``, and the gate of their
    output if there is one.
    """

    def __init__(self, config: MoEConfig, backend: Backend[Reference]) -> None:
        split = backend.splits.shared
        super().__init__(
            config.hidden, config.shared_width, backend, backend.ops.merges_shared_experts, split
        )
        self._split, self._ops = split, backend.ops
        self._gate_up = self._bound()
        self._opening: Callable[[Tensor], Tensor] | None = None
        if config.shared_gate:
            self.gate = Matrix(config.hidden, 1, backend)
            self._opening = functools.partial(F.linear, weight=self.gate.weight)

    def _bound(self) -> Projection | None:
        """The merged product with gate and up, if there is one over this rank's tokens alone."""
        merged = self._ops.merges_shared_experts and not self._split.gathers
        return Projection(*self.gate_up_proj.operands) if merged else None

    def pack(self) -> None:
        super().pack()
        self._gate_up = self._bound()

    def forward(self, normed: Normed) -> Tensor:
        x_TD = wide_of(normed)
        if self._gate_up is None:
            y_TD = self._split.sum_of(self.swiglu, x_TD)
        else:
            gate_up_TX = self._ops.project_normed(normed, self._gate_up)
            y_TD = self._split.sum_of(self.after_gate_up, gate_up_TX)
        return y_TD if self._opening is None else y_TD * self._opening(x_TD).sigmoid()


class MoELayer(nn.Module):
    """Layer ``layer`` (counted among MoE layers) of a model, with the norm before it. Its experts
    are those of the dispatcher's placement, made by ``make_experts`` for the number of its slots.
    """

    def __init__(
        self,
        config: MoEConfig,
        layer: int,
        dispatcher: Dispatcher,
        backend: Backend[Reference],
        norm: RowNorm,
        make_experts: Callable[[MoEConfig, int, Backend[Reference]], AnyExperts] = Experts,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.gate = Gate(config, backend)
        self.experts = make_experts(config, dispatcher.placement.num_slots, backend)
        self.shared_experts = SharedExperts(config, backend) if config.shared_width else None
        self._choose_experts = backend.ops.choose_experts
        self._dispatcher = dispatcher
        self._split = backend.tensor
        self._layer = layer
        self._routed = self._bind()
        self._shared = _nothing if self.shared_experts is None else self.shared_experts.forward

    def pack(self) -> None:
        self.gate.pack()
        self.experts.pack()
        self._routed = self._bind()
        if self.shared_experts is not None:
            self.shared_experts.pack()

    def forward(self, residual: Residual) -> Residual:
        """The residual after this layer, [T, D]. T may be 0: other ranks wait in the exchange.

        O: of the T tokens, the run that this rank of a tensor group gates.
        """
        own = self._split.scatter(residual)
        x_OD, routed_OD, shared_OD = self._dispatcher.run(self._layer, self._routed, own, self._shared)
        updated = x_OD, routed_OD if shared_OD is None else routed_OD + shared_OD
        return self._split.gather(updated, len(residual[0]))

    def _bind(self) -> RoutedExperts:
        norm, gate, eight = self.norm, self.gate.weights, isinstance(self.experts, Fp8Experts)
        choose = functools.partial(self._choose_experts, norm=norm, gate=gate, eight=eight)
        sublayer = self.experts.sublayer(norm, gate)
        return RoutedExperts(gate.routing.top_k, choose, self.experts.forward, sublayer)


def _nothing(normed: Normed) -> None:
    """The output of a layer without shared experts."""
