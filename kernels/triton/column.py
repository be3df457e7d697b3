"""The column ``triton``: kernels for NVIDIA cards, and for Triton's interpreter in tests."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from ..reference.column import Reference
from ..reference.fp8 import Normed, NormedRows
from ..reference.paged import PagedBatch, Selection
from ..reference.sublayers import Product, Projection, Residual, RowNorm
from . import (
    attention,
    clock,
    draw,
    experts as expert_ops,
    experts_four_bit,
    experts_fp8,
    fp8,
    gate as gate_ops,
    grouping,
    indexer,
    linear_fp8,
    mla,
    norm as norm_ops,
    pages,
    rope,
    sampling,
)
from .attend import attend_decode, attend_extend
from .attend_inputs import AttendChosen, AttendRows
from .tiles import Tiles


class Triton(Reference):
    """Kernels with these tile sizes. Products with packed weights stay torch's."""

    column: ClassVar[str] = "triton"
    merges_shared_experts: ClassVar[bool] = True
    takes_narrow_gates: ClassVar[bool] = True

    def __init__(self, tiles: Tiles) -> None:
        self.experts = expert_ops.experts_with(tiles)
        self.experts_fp8 = functools.partial(experts_fp8.experts_fp8, tiles=tiles)
        self.experts_four_bit = experts_four_bit.experts_four_bit_with(tiles)
        self.attend = attention.PagedAttend(tiles)
        self.mla_attend = mla.LatentAttend(tiles)
        self._rows: tuple[AttendRows, AttendRows] = attend_decode, attend_extend
        self._chosen: AttendChosen | None = None
        self._tiles = tiles
        self._product: Product = functools.partial(linear_fp8.product, tiles=tiles)
        self.linear_fp8 = functools.partial(linear_fp8.linear_fp8, tiles=tiles)

    def with_product(self, other: Callable[[Product], Product]) -> Triton:
        """These ops with another product of many rows in FP8, made with the own one."""
        ops = copy.copy(self)
        ops._product = other(self._product)
        ops.linear_fp8 = functools.partial(
            linear_fp8.linear_fp8, product_of_many=ops._product, tiles=self._tiles
        )
        return ops

    def with_decode(self, other: Callable[[AttendRows], AttendRows]) -> Triton:
        """These ops with another attention of rows that decode, made with the own one."""
        return self._attending(other(self._rows[0]), self._rows[1])

    def with_extend(self, other: Callable[[AttendRows], AttendRows]) -> Triton:
        """These ops with another attention of grouped queries in rows of several tokens, made with
        the own one.
        """
        return self._attending(self._rows[0], other(self._rows[1]))

    def with_chosen(self, chosen: AttendChosen) -> Triton:
        """These ops with another attention at positions that an indexer has chosen."""
        ops = copy.copy(self)
        ops._chosen = chosen
        return ops

    def _attending(self, decode: AttendRows, extend: AttendRows) -> Triton:
        ops = copy.copy(self)
        ops._rows = decode, extend
        ops.attend = attention.PagedAttend(self._tiles, decode, extend)
        ops.mla_attend = mla.LatentAttend(self._tiles, decode)
        return ops

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
        """Same as the reference's; a library reads chosen entries where they lie."""
        (num_tokens, num_heads, nope), chosen = q_nope_THN.shape, self._chosen
        if (
            chosen is None
            or selection is None
            or not chosen.takes(q_rope_THE, cache, expand_HPC.shape[2], selection.places_NK.shape[1])
        ):
            return super().mla_attend_selected(
                q_nope_THN, q_rope_THE, cache, expand_HPC, batch, scale, selection
            )
        out_THV = q_nope_THN.new_empty(num_tokens, num_heads, expand_HPC.shape[1] - nope)
        q, facts = (q_nope_THN, q_rope_THE), (scale, batch.page_size)
        mla.attend_chosen(chosen, q, cache, expand_HPC, selection, facts, out_THV)
        if selection.rest is not None:
            tokens = selection.rest_tokens
            out_THV[tokens] = self.mla_attend(
                q_nope_THN[tokens], q_rope_THE[tokens], cache, expand_HPC, selection.rest, scale
            )
        return out_THV

    def norm_project(
        self, residual: Residual, norm: RowNorm, projection: Projection
    ) -> tuple[Tensor, Tensor]:
        """Same as the reference's; the norm of many rows becomes FP8 as it is computed."""
        if projection.scales is None or len(residual[0]) <= linear_fp8.QUANTISED_HERE:
            return super().norm_project(residual, norm, projection)
        return linear_fp8.norm_linear_fp8(residual, norm, projection, self._product)

    def project_normed(self, rows: Normed, projection: Projection) -> Tensor:
        """Same as the reference's; many rows that are quantised are not quantised again."""
        if (
            isinstance(rows, Tensor)
            or projection.scales is None
            or len(rows.wide) <= linear_fp8.QUANTISED_HERE
        ):
            return super().project_normed(rows, projection)
        return self._product(rows.eight, projection, rows.wide.dtype)

    def norm_rows(self, residual: Residual, norm: RowNorm) -> tuple[Tensor, NormedRows]:
        """Same as the reference's, in one launch."""
        return fp8.norm_rows(*residual, norm.weight, norm.eps)

    gate = staticmethod(gate_ops.gate)
    group_pairs = staticmethod(grouping.group_pairs)
    permute = staticmethod(grouping.permute)
    unpermute = staticmethod(grouping.unpermute)
    weighted_sum = staticmethod(expert_ops.weighted_sum)
    rms_norm = staticmethod(norm_ops.rms_norm)
    add_rms_norm = staticmethod(norm_ops.add_rms_norm)
    silu_mul = staticmethod(norm_ops.silu_mul)
    quantise_rows = staticmethod(fp8.quantise_rows)
    rms_norm_fp8 = staticmethod(fp8.rms_norm_fp8)
    add_rms_norm_fp8 = staticmethod(fp8.add_rms_norm_fp8)
    silu_mul_fp8 = staticmethod(fp8.silu_mul_fp8)
    norm_rotate_and_write = staticmethod(rope.norm_rotate_and_write)
    rotate_and_write_latent = staticmethod(rope.rotate_and_write_latent)
    rotate_and_write_index = staticmethod(indexer.rotate_and_write_index)
    select_positions = staticmethod(indexer.select_positions)
    edit_logits = staticmethod(sampling.edit_logits)
    allow_only = staticmethod(sampling.allow_only)
    sample = staticmethod(draw.sample)
    sample_slots = staticmethod(draw.sample_slots)
    logprobs = staticmethod(sampling.logprobs)
    copy_pages = staticmethod(pages.copy_pages)
    add_time = staticmethod(clock.add_time)
