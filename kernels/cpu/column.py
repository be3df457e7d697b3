"""The column ``cpu``: compiled kernels wherever the reference is too slow to serve from.

FP8 products and their inputs (``experts_fp8``, ``quantise_rows``, the norms and ``silu_mul_fp8``)
stay the reference's: a CPU has no such product. FP8 weights are widened when they are loaded, so no
model calls these ops. Experts in 4 bits stay so and are decoded in registers. Biases and clamped
activations of experts are compiled where weights are in blocks or in 4 bits; elsewhere they are
torch's, slot by slot.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .. import cpu_isa
from ..reference.column import Reference
from ..reference.experts import PLAIN_FORM, ExpertForm
from ..reference.sublayers import AttentionSublayer, ExpertsSublayer, GateWeights, GroupedHeads, RowNorm
from . import (
    attention,
    experts as expert_ops,
    experts_four_bit as four_bit_ops,
    gate as gate_ops,
    linear as linear_ops,
    mla,
    norm,
    rope,
    sampling,
    sublayers,
)
from .codegen import arrays


class Cpu(Reference):
    """Kernels run on as many threads as torch has when the column is made."""

    column: ClassVar[str] = "cpu"

    def __init__(self) -> None:
        cpu_isa.check()
        arrays.use_threads_of_torch()

    linear = staticmethod(linear_ops.linear)
    pack = staticmethod(linear_ops.pack)
    pack_slots = staticmethod(linear_ops.pack_slots)
    gate = staticmethod(gate_ops.gate)
    experts = staticmethod(expert_ops.experts)
    experts_four_bit = staticmethod(four_bit_ops.experts_four_bit)
    pack_four_bit = staticmethod(four_bit_ops.pack_four_bit)
    weighted_sum = staticmethod(expert_ops.weighted_sum)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    silu_mul = staticmethod(norm.silu_mul)
    norm_rotate_and_write = staticmethod(rope.norm_rotate_and_write)
    rotate_and_write_latent = staticmethod(rope.rotate_and_write_latent)
    attend = staticmethod(attention.attend)
    mla_attend = staticmethod(mla.mla_attend)
    sample = staticmethod(sampling.sample)
    logprobs = staticmethod(sampling.logprobs)

    def attention_sublayer(self, norm: RowNorm, heads: GroupedHeads) -> AttentionSublayer:
        composed = super().attention_sublayer(norm, heads)
        if sublayers.attention_in_blocks(norm, heads):
            return sublayers.Attention(norm, heads, composed)
        return composed

    def experts_sublayer(
        self,
        norm: RowNorm,
        gate: GateWeights,
        weights: tuple[Tensor, Tensor],
        form: ExpertForm = PLAIN_FORM,
    ) -> ExpertsSublayer:
        composed = super().experts_sublayer(norm, gate, weights, form)
        if sublayers.experts_in_blocks(norm, weights):
            return sublayers.Experts(norm, gate, weights, form, composed)
        return composed
