"""The shape of one Mixture-of-Experts layer."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.activation import SILU, Activation
from ..kernels.routing import Routing


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Routing):
    """Sizes of a layer, and its rule for choosing experts.

    ``selection_bias`` adds a per-expert bias to the scores, for selection only. ``shared_width`` is
    the intermediate width of all shared experts together, 0 for none. With ``shared_gate`` a
    sigmoid gate scales their output for every token (Qwen2-MoE). ``activation`` is that of routed
    experts; with ``expert_bias`` both of their products have biases.
    """

    hidden: int
    expert_width: int
    num_experts: int
    selection_bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    activation: Activation = SILU
    expert_bias: bool = False
