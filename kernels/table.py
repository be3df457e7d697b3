"""The op table: three columns of implementations with one signature.

``reference`` is plain torch, the definition; ``cpu`` is what serves on a CPU, which differs where
the reference is too slow; ``triton`` is for NVIDIA cards, and for Triton's interpreter in tests.
The column is a parameter of whoever starts a process; it is chosen once, and the choice logged.

Products of FP8 weights and what feeds them (``experts_fp8``, ``quantise_rows``, the norms and
``silu_mul_fp8``) are the reference in the column ``cpu``: a CPU has no such product, its weights
are widened when they are loaded, and no model calls these ops there.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .reference import attention, experts, fp8, gate, grouping, mla, norm, paged, rope, sampling, sublayers
from .reference.fp8 import Quantised
from .reference.gate import GateCounts, Routing
from .reference.grouping import Grouping
from .reference.paged import PagedBatch
from .reference.rope import Angles, HeadNorms
from .reference.sampling import LogitEdits, SamplingParams
from .reference.sublayers import GateWeights, GroupedHeads, Here, Residual, RowNorm, Step
from .triton.tiles import Tiles

Column = Literal["reference", "cpu", "triton"]

# What ``pack_slots`` makes of stacked expert weights and ``experts`` of the same column reads: a
# tensor or tensors.
SlotWeights = Any

_log = logging.getLogger(__name__)


class Linear(Protocol):
    def __call__(self, x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor: ...


class Gate(Protocol):
    def __call__(
        self,
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        routing: Routing,
        counts: GateCounts | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class GroupPairs(Protocol):
    def __call__(self, slots_M: Tensor, counts_S: Tensor, block: int) -> Grouping: ...


class Permute(Protocol):
    def __call__(self, x_ND: Tensor, rows_M: Tensor, grouping: Grouping) -> Tensor: ...


class Unpermute(Protocol):
    def __call__(self, y_PD: Tensor, grouping: Grouping, num_pairs: int) -> Tensor: ...


class Experts(Protocol):
    def __call__(
        self,
        x_ND: Tensor,
        rows_M: Tensor,
        slots_M: Tensor,
        w13_SFD: SlotWeights,
        w2_SDF: SlotWeights,
        counts_S: Tensor,
    ) -> Tensor: ...


class WeightedSum(Protocol):
    def __call__(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor: ...


class RmsNorm(Protocol):
    def __call__(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor: ...


class AddRmsNorm(Protocol):
    def __call__(self, x: Tensor, update: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor) -> Tensor: ...


class QuantiseRows(Protocol):
    def __call__(self, x_ND: Tensor) -> Quantised: ...


class RmsNormFp8(Protocol):
    def __call__(self, x_ND: Tensor, weight_D: Tensor, eps: float) -> Quantised: ...


class AddRmsNormFp8(Protocol):
    def __call__(
        self, x_ND: Tensor, update_ND: Tensor, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Quantised]: ...


class SiluMulFp8(Protocol):
    def __call__(self, gate_up_NF: Tensor) -> Quantised: ...


class ExpertsFp8(Protocol):
    def __call__(
        self,
        x: Quantised,
        pairs: tuple[Tensor, Tensor],
        w13: Quantised,
        w2: Quantised,
        counts_S: Tensor,
        dtype: torch.dtype,
    ) -> Tensor: ...


class NormRotateAndWrite(Protocol):
    def __call__(
        self,
        qkv_TXD: Tensor,
        norms: HeadNorms | None,
        angles: Angles,
        cache: tuple[Tensor, Tensor],
        write_T: Tensor,
        interleaved: bool,
    ) -> Tensor: ...


class RotateAndWriteLatent(Protocol):
    def __call__(
        self,
        q_rope_THD: Tensor,
        c_TC: Tensor,
        k_rope_TD: Tensor,
        angles: Angles,
        cache: Tensor,
        write_T: Tensor,
        interleaved: bool,
    ) -> Tensor: ...


class Attend(Protocol):
    def __call__(
        self, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch, scale: float
    ) -> Tensor: ...


class MlaAttend(Protocol):
    def __call__(
        self,
        q_nope_THN: Tensor,
        q_rope_THE: Tensor,
        cache: Tensor,
        expand_HPC: Tensor,
        batch: PagedBatch,
        scale: float,
    ) -> Tensor: ...


class AttentionSublayer(Protocol):
    def __call__(
        self, ops: sublayers.Ops, residual: Residual, norm: RowNorm, heads: GroupedHeads, step: Step
    ) -> tuple[Tensor, Tensor]: ...


class ExpertsSublayer(Protocol):
    def __call__(
        self,
        ops: sublayers.Ops,
        residual: Residual,
        norm: RowNorm,
        gate: GateWeights,
        weights: tuple[SlotWeights, SlotWeights],
        here: Here,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class EditLogits(Protocol):
    def __call__(self, logits_RV: Tensor, edits: LogitEdits) -> None: ...


class AllowOnly(Protocol):
    def __call__(self, logits_RV: Tensor, rows_S: NDArray[np.int64], bits_SW: NDArray[np.int32]) -> None: ...


class Sample(Protocol):
    def __call__(
        self, logits_RV: Tensor, params: SamplingParams, uniform_R: NDArray[np.float64]
    ) -> Tensor: ...


class Logprobs(Protocol):
    def __call__(
        self, logits_SV: Tensor, tokens_S: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class CopyPages(Protocol):
    def __call__(
        self, caches: Sequence[Tensor], sources_N: Tensor, targets_N: Tensor, page_size: int
    ) -> None: ...


@dataclass(frozen=True)
class Ops:
    """One column. What an op computes is written in the docstring of its reference."""

    column: Column
    linear: Linear
    pack: Callable[[Tensor], Tensor]
    pack_slots: Callable[[Tensor, Tensor], tuple[SlotWeights, SlotWeights]]
    gate: Gate
    group_pairs: GroupPairs
    permute: Permute
    unpermute: Unpermute
    experts: Experts
    weighted_sum: WeightedSum
    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    silu_mul: SiluMul
    quantise_rows: QuantiseRows
    rms_norm_fp8: RmsNormFp8
    add_rms_norm_fp8: AddRmsNormFp8
    silu_mul_fp8: SiluMulFp8
    experts_fp8: ExpertsFp8
    norm_rotate_and_write: NormRotateAndWrite
    rotate_and_write_latent: RotateAndWriteLatent
    attend: Attend
    mla_attend: MlaAttend
    attention_sublayer: AttentionSublayer
    experts_sublayer: ExpertsSublayer
    edit_logits: EditLogits
    allow_only: AllowOnly
    sample: Sample
    logprobs: Logprobs
    copy_pages: CopyPages


def column_for(device: torch.device) -> Column:
    """The column that serves on a device."""
    return "cpu" if device.type == "cpu" else "triton"


@functools.cache
def ops_of(column: Column) -> Ops:
    """The ops of a column. Raises ValueError for a column that does not exist, ImportError where
    Triton is not installed.
    """
    if column not in get_args(Column):
        raise ValueError(f"kernels: {column!r} is no column; allowed: {', '.join(get_args(Column))}")
    if column == "triton":
        from .triton.target import card_name
        from .triton.tiles import tiles_of

        ops = triton_ops(tiles_of(card_name()))
    else:
        ops = _reference() if column == "reference" else _cpu()
    _log.info("kernels: column %s", column)
    return ops


def _linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return F.linear(x, weight_ND, bias_N)


def _as_it_is(weights: Tensor) -> Tensor:
    return weights


def _slots_as_they_are(w13_SFD: Tensor, w2_SDF: Tensor) -> tuple[Tensor, Tensor]:
    return w13_SFD, w2_SDF


def _reference() -> Ops:
    return Ops(
        column="reference",
        linear=_linear,
        pack=_as_it_is,
        pack_slots=_slots_as_they_are,
        gate=gate.gate,
        group_pairs=grouping.group_pairs,
        permute=grouping.permute,
        unpermute=grouping.unpermute,
        experts=experts.experts_reference,
        weighted_sum=experts.weighted_sum,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        silu_mul=norm.silu_mul,
        quantise_rows=fp8.quantise_rows,
        rms_norm_fp8=fp8.rms_norm_fp8,
        add_rms_norm_fp8=fp8.add_rms_norm_fp8,
        silu_mul_fp8=fp8.silu_mul_fp8,
        experts_fp8=fp8.experts_fp8,
        norm_rotate_and_write=rope.norm_rotate_and_write,
        rotate_and_write_latent=rope.rotate_and_write_latent,
        attend=attention.attend,
        mla_attend=mla.mla_attend,
        attention_sublayer=sublayers.attention_sublayer,
        experts_sublayer=sublayers.experts_sublayer,
        edit_logits=sampling.edit_logits,
        allow_only=sampling.allow_only,
        sample=sampling.sample,
        logprobs=sampling.logprobs,
        copy_pages=paged.copy_pages,
    )


def _cpu() -> Ops:
    from . import cpu_isa
    from .cpu import (
        attention as cpu_attention,
        experts as cpu_experts,
        gate as cpu_gate,
        linear as cpu_linear,
        mla as cpu_mla,
        norm as cpu_norm,
        rope as cpu_rope,
        sampling as cpu_sampling,
        sublayers as cpu_sublayers,
    )
    from .cpu.codegen import arrays as cpu_arrays

    cpu_isa.check()
    cpu_arrays.use_threads_of_torch()
    return dataclasses.replace(
        _reference(),
        column="cpu",
        linear=cpu_linear.linear,
        pack=cpu_linear.pack,
        pack_slots=cpu_linear.pack_slots,
        gate=cpu_gate.gate,
        experts=cpu_experts.experts,
        weighted_sum=cpu_experts.weighted_sum,
        rms_norm=cpu_norm.rms_norm,
        add_rms_norm=cpu_norm.add_rms_norm,
        silu_mul=cpu_norm.silu_mul,
        norm_rotate_and_write=cpu_rope.norm_rotate_and_write,
        rotate_and_write_latent=cpu_rope.rotate_and_write_latent,
        attend=cpu_attention.attend,
        mla_attend=cpu_mla.mla_attend,
        attention_sublayer=cpu_sublayers.attention_sublayer,
        experts_sublayer=cpu_sublayers.experts_sublayer,
        sample=cpu_sampling.sample,
        logprobs=cpu_sampling.logprobs,
    )


def triton_ops(tiles: Tiles) -> Ops:
    """The column triton with these tile sizes."""
    from .triton import (
        attention as triton_attention,
        experts as triton_experts,
        experts_fp8 as triton_experts_fp8,
        fp8 as triton_fp8,
        gate as triton_gate,
        grouping as triton_grouping,
        mla as triton_mla,
        norm as triton_norm,
        pages as triton_pages,
        rope as triton_rope,
        sampling as triton_sampling,
    )

    return Ops(
        column="triton",
        linear=_linear,
        pack=_as_it_is,
        pack_slots=_slots_as_they_are,
        gate=triton_gate.gate,
        group_pairs=triton_grouping.group_pairs,
        permute=triton_grouping.permute,
        unpermute=triton_grouping.unpermute,
        experts=functools.partial(triton_experts.experts, tiles=tiles),
        weighted_sum=triton_experts.weighted_sum,
        rms_norm=triton_norm.rms_norm,
        add_rms_norm=triton_norm.add_rms_norm,
        silu_mul=triton_norm.silu_mul,
        quantise_rows=triton_fp8.quantise_rows,
        rms_norm_fp8=triton_fp8.rms_norm_fp8,
        add_rms_norm_fp8=triton_fp8.add_rms_norm_fp8,
        silu_mul_fp8=triton_fp8.silu_mul_fp8,
        experts_fp8=functools.partial(triton_experts_fp8.experts_fp8, tiles=tiles),
        norm_rotate_and_write=triton_rope.norm_rotate_and_write,
        rotate_and_write_latent=triton_rope.rotate_and_write_latent,
        attend=functools.partial(triton_attention.attend, tiles=tiles),
        mla_attend=functools.partial(triton_mla.mla_attend, tiles=tiles),
        attention_sublayer=sublayers.attention_sublayer,
        experts_sublayer=sublayers.experts_sublayer,
        edit_logits=triton_sampling.edit_logits,
        allow_only=triton_sampling.allow_only,
        sample=triton_sampling.sample,
        logprobs=triton_sampling.logprobs,
        copy_pages=triton_pages.copy_pages,
    )
