"""The column ``reference``: every op in plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import (
    attention,
    clock,
    experts as expert_ops,
    four_bit,
    fp8,
    gate as gate_ops,
    grouping,
    indexer,
    linear as linear_ops,
    mla,
    norm,
    paged,
    rope,
    sampling,
)
from .experts import PLAIN_FORM, ExpertForm
from .fp8 import Normed, NormedRows
from .paged import PagedBatch, Selection
from .rope import Angles
from .sampling import SamplingParams
from .sublayers import (
    AttentionSublayer,
    ExpertsSublayer,
    GateWeights,
    GroupedHeads,
    LocalExperts,
    Projection,
    Residual,
    RowNorm,
)


class Reference:
    """The op table. Other columns derive from this one and replace ops by faster ones with the
    same signature. An op is defined by the docstring of its reference.
    """

    column: ClassVar[str] = "reference"

    # Whether shared experts compute gate and up in one product and one ``silu_mul``. On a CPU that
    # changes answers: some sums of oneDNN's merged product differ in the last bit, and the compiled
    # ``silu_mul`` does not round silu. Logits of small models in bf16 moved by 0.03 of 4.3, and by
    # 1.7 where a router turned.
    merges_shared_experts: ClassVar[bool] = False
    # Whether a gate's weights may be held in 16 bits: those of a checkpoint in bf16 lose nothing.
    takes_narrow_gates: ClassVar[bool] = False

    linear = staticmethod(linear_ops.linear)
    pack = staticmethod(linear_ops.pack)
    pack_slots = staticmethod(linear_ops.pack_slots)
    gate = staticmethod(gate_ops.gate)
    group_pairs = staticmethod(grouping.group_pairs)
    permute = staticmethod(grouping.permute)
    unpermute = staticmethod(grouping.unpermute)
    experts = staticmethod(expert_ops.experts_reference)
    weighted_sum = staticmethod(expert_ops.weighted_sum)
    rms_norm = staticmethod(norm.rms_norm)
    add_rms_norm = staticmethod(norm.add_rms_norm)
    silu_mul = staticmethod(norm.silu_mul)
    quantise_rows = staticmethod(fp8.quantise_rows)
    rms_norm_fp8 = staticmethod(fp8.rms_norm_fp8)
    add_rms_norm_fp8 = staticmethod(fp8.add_rms_norm_fp8)
    silu_mul_fp8 = staticmethod(fp8.silu_mul_fp8)
    experts_fp8 = staticmethod(fp8.experts_fp8)
    linear_fp8 = staticmethod(fp8.linear_fp8)
    experts_four_bit = staticmethod(four_bit.experts_four_bit)
    pack_four_bit = staticmethod(four_bit.pack_four_bit)
    norm_rotate_and_write = staticmethod(rope.norm_rotate_and_write)
    rotate_and_write_latent = staticmethod(rope.rotate_and_write_latent)
    attend = staticmethod(attention.attend)
    mla_attend = staticmethod(mla.mla_attend)
    rotate_and_write_index = staticmethod(indexer.rotate_and_write_index)
    select_positions = staticmethod(indexer.select_positions)
    edit_logits = staticmethod(sampling.edit_logits)
    allow_only = staticmethod(sampling.allow_only)
    sample_slots = staticmethod(sampling.sample_slots)
    copy_pages = staticmethod(paged.copy_pages)
    add_time = staticmethod(clock.add_time)

    @staticmethod
    def sample(logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64]) -> Tensor:
        """``sampling.sample`` with the reference's search."""
        return sampling.sample(logits_RV, params, uniform_R)

    @staticmethod
    def logprobs(logits_SV: Tensor, tokens_S: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        """``sampling.logprobs`` with the reference's search."""
        return sampling.logprobs(logits_SV, tokens_S, num_top)

    def add_norm(self, residual: Residual, norm: RowNorm) -> tuple[Tensor, Tensor]:
        """The sum of the residual, and its norm."""
        x_TD, update_TD = residual
        if update_TD is None:
            return x_TD, self.rms_norm(x_TD, norm.weight, norm.eps)
        return self.add_rms_norm(x_TD, update_TD, norm.weight, norm.eps)

    def project(self, x: Tensor, projection: Projection) -> Tensor:
        """The product with a projection, in FP8 or not."""
        if projection.scales is None:
            return self.linear(x, projection.weight, projection.bias)
        return self.linear_fp8(x, projection.weight, projection.bias, projection.scales)

    def norm_project(
        self, residual: Residual, norm: RowNorm, projection: Projection
    ) -> tuple[Tensor, Tensor]:
        """The sum of the residual, and the product of its norm with a projection."""
        x_TD, normed_TD = self.add_norm(residual, norm)
        return x_TD, self.project(normed_TD, projection)

    def mla_attend_selected(
        self,
        q_nope_THN: Tensor,
        q_rope_THE: Tensor,
        cache: Tensor,
        expand_HPC: Tensor,
        batch: PagedBatch,
        scale: float,
        selection: Selection | None,
    ) -> Tensor:
        """``mla_attend`` over the positions that an indexer has chosen; None: over all."""
        if selection is None:
            return self.mla_attend(q_nope_THN, q_rope_THE, cache, expand_HPC, batch, scale)
        value_dim = expand_HPC.shape[1] - q_nope_THN.shape[2]
        out_THV = q_nope_THN.new_empty(*q_nope_THN.shape[:2], value_dim)
        parts = indexer.selected_parts(selection, cache)
        if selection.rest is not None:
            parts = itertools.chain(((selection.rest_tokens, cache, selection.rest),), parts)
        for tokens, entries, rows in parts:
            out_THV[tokens] = self.mla_attend(
                q_nope_THN[tokens], q_rope_THE[tokens], entries, expand_HPC, rows, scale
            )
        return out_THV

    def project_normed(self, rows: Normed, projection: Projection) -> Tensor:
        """The product of a norm with a projection."""
        return self.project(fp8.wide_of(rows), projection)

    def norm_rows(self, residual: Residual, norm: RowNorm) -> tuple[Tensor, NormedRows]:
        """The sum of the residual, and its norm, quantised too."""
        x_TD, normed_TD = self.add_norm(residual, norm)
        return x_TD, NormedRows(normed_TD, self.quantise_rows(normed_TD))

    def choose_experts(
        self, residual: Residual, norm: RowNorm, gate: GateWeights, eight: bool = False
    ) -> tuple[Tensor, Normed, Tensor, Tensor]:
        """The sum of the residual, its norm, quantised too if ``eight``, and the gate's choice:
        ids_TC int64 and weights_TC float32.
        """
        x_TD, normed = self.norm_rows(residual, norm) if eight else self.add_norm(residual, norm)
        return x_TD, normed, *self.gate(fp8.wide_of(normed), gate.weight, gate.bias, gate.routing)

    def attention_sublayer(self, norm: RowNorm, heads: GroupedHeads) -> AttentionSublayer:
        """The attention of a layer with these weights, for T of at least 1."""
        qkv, out, scale = heads.qkv, heads.out, heads.dim**-0.5

        def attention(
            residual: Residual, rotation: Angles, batch: PagedBatch, cache: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            x_TD, qkv_TX = self.norm_project(residual, norm, qkv)
            qkv_TXE = qkv_TX.unflatten(-1, (-1, heads.dim))
            q_THE = self.norm_rotate_and_write(
                qkv_TXE, heads.norms, rotation, cache, batch.write_T, heads.interleaved
            )
            out_THE = self.attend(q_THE, *cache, batch, scale, heads.rule)
            return x_TD, self.project(out_THE.flatten(1), out)

        return attention

    def experts_sublayer(
        self,
        norm: RowNorm,
        gate: GateWeights,
        weights: tuple[Tensor, Tensor],
        form: ExpertForm = PLAIN_FORM,
    ) -> ExpertsSublayer:
        """The routed experts of a layer. ``weights``: w13 and w2 as ``experts`` reads them."""

        def run(rows: Normed, slots_M: Tensor, local: LocalExperts) -> Tensor:
            return self.experts(fp8.wide_of(rows), local.rows_M, slots_M, *weights, local.counts_S, form)

        return self.routed_sublayer(norm, gate, run)

    def routed_sublayer(
        self,
        norm: RowNorm,
        gate: GateWeights,
        run: Callable[[Normed, Tensor, LocalExperts], Tensor],
        eight: bool = False,
    ) -> ExpertsSublayer:
        """``experts_sublayer`` with any experts: ``run`` takes the norm, quantised too if
        ``eight``, slots_M and the places, and returns y_MD, unweighted.
        """

        def routed(residual: Residual, local: LocalExperts) -> tuple[Tensor, Normed, Tensor]:
            x_TD, normed, ids_TC, weights_TC = self.choose_experts(residual, norm, gate, eight)
            slots_M = local.slots_L.index_select(0, ids_TC.view(-1))
            if local.padding_M is not None:
                slots_M = slots_M.masked_fill(local.padding_M, -1)
                weights_TC = weights_TC.masked_fill(local.padding_M.view_as(weights_TC), 0.0)
            y_MD = run(normed, slots_M, local)
            y_TCD = y_MD.view(*ids_TC.shape, y_MD.shape[1])
            return x_TD, normed, self.weighted_sum(y_TCD, weights_TC)

        return routed
