"""Inputs and results of the two sublayers of a decoder layer: grouped-query attention, and routed
experts that are all local. Each sublayer begins with a norm.

A sublayer is made of other ops, and it is an op itself: a column may compute it in fewer calls. A
step of a few rows spends more time making a dozen calls than computing.

A *residual* is the sum so far and an update that is not yet added, None before the first sublayer.
The next norm adds the update.

T tokens  D hidden  H query heads  K key/value heads  X = H + 2 K  C choices per token
M = T C pairs  L experts  S slots
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .attention import PLAIN_RULE, AttentionRule
from .fp8 import Normed, Quantised
from .gate import Routing
from .paged import PagedBatch
from .rope import Angles, HeadNorms

Residual = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Projection:
    """A weight as ``linear`` of the column reads it, and perhaps a bias; or as ``linear_fp8`` does,
    with scales.
    """

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None = None


class Product(Protocol):
    """y_TN of rows in FP8 and a projection in FP8, in ``dtype``."""

    def __call__(self, rows: Quantised, projection: Projection, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class GroupedHeads:
    """The weights of grouped-query attention. ``qkv`` yields X heads of ``dim``: queries, keys,
    then values. ``rule``: what queries see.
    """

    dim: int
    interleaved: bool
    norms: HeadNorms | None
    qkv: Projection
    out: Projection
    rule: AttentionRule = PLAIN_RULE


@dataclass(frozen=True)
class GateWeights:
    """A gate: weight [L, D] float32, or in the model's dtype for ops that take narrow gates, and
    perhaps a bias [L] float32, and its rule.
    """

    weight: Tensor
    bias: Tensor | None
    routing: Routing


@dataclass(frozen=True, eq=False)
class LocalExperts:
    """Places of the experts of a layer, all of which are local: slots_L int64, the slot of each
    expert; rows_M int64, the token of each pair; counts_S int64, increased by the pairs of every
    slot. ``padding_M`` bool: pairs of tokens that are padding; None: there are none.
    """

    slots_L: Tensor
    rows_M: Tensor
    counts_S: Tensor
    padding_M: Tensor | None = None


# (residual, rotation, batch, (keys, values)) -> residual
AttentionSublayer = Callable[[Residual, Angles, PagedBatch, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
# (residual, places) -> the sum so far, its norm, the weighted outputs of the experts; all [T, D]
ExpertsSublayer = Callable[[Residual, LocalExperts], tuple[Tensor, Normed, Tensor]]
