"""The two sublayers of a decoder layer, each with the norm before it: grouped-query attention, and
routed experts that all live here.

They are made of other ops, which differ by column; and they are ops themselves, because a column
may compute one in fewer calls: with a few rows it takes longer to make a dozen calls than to do
what they ask for.

A *residual* is the sum so far and what has yet to be added to it, None before the first sublayer:
the next norm adds it in passing.

T tokens  D hidden  H query heads  K key/value heads  X = H + 2 K  E head dim  C choices per token  M = T C pairs  L experts  S slots
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .gate import Routing
from .paged import PagedBatch
from .rope import Angles, HeadNorms

Residual = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm."""

    weight: Tensor
    eps: float

    @cached_property
    def array(self) -> NDArray[Any]:
        """The weight as compiled kernels of the host read it, bf16 as its bits; so are all arrays
        here. It takes 1 to 2 us to find.
        """
        return _memory(self.weight)


class Projection(Protocol):
    """A matrix and perhaps a bias, as ``linear`` of the column reads them."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


@dataclass(frozen=True)
class GroupedHeads:
    """What grouped-query attention is made of. ``qkv`` gives X heads of ``dim``: queries, then
    keys, then values.
    """

    dim: int
    interleaved: bool
    norms: HeadNorms | None
    qkv: Projection
    out: Projection

    @cached_property
    def norm_arrays(self) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Weights of the norms, if any."""
        return None if self.norms is None else (_memory(self.norms.q_D), _memory(self.norms.k_D))


@dataclass(frozen=True)
class Step:
    """What the attention of one layer needs to know of a step. ``cache``: keys and values."""

    rotation: Angles
    batch: PagedBatch
    cache: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GateWeights:
    """A gate: weight [L, D] and perhaps a bias [L], both float32, and its rule."""

    weight: Tensor
    bias: Tensor | None
    routing: Routing

    @cached_property
    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        return self.weight.numpy(), None if self.bias is None else self.bias.numpy()


@dataclass(frozen=True)
class Here:
    """Where the experts of a layer are, all of which are in reach: slots_L int64; rows_M int64, the
    token of each pair; counts_S int64, increased by the pairs of every slot.
    """

    slots_L: Tensor
    rows_M: Tensor
    counts_S: Tensor

    @cached_property
    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        return self.slots_L.numpy(), self.rows_M.numpy(), self.counts_S.numpy()


class Ops(Protocol):
    """The ops of a column that sublayers are made of."""

    @property
    def linear(self) -> Callable[..., Tensor]: ...

    @property
    def rms_norm(self) -> Callable[..., Tensor]: ...

    @property
    def add_rms_norm(self) -> Callable[..., tuple[Tensor, Tensor]]: ...

    @property
    def norm_rotate_and_write(self) -> Callable[..., Tensor]: ...

    @property
    def attend(self) -> Callable[..., Tensor]: ...

    @property
    def gate(self) -> Callable[..., tuple[Tensor, Tensor]]: ...

    @property
    def experts(self) -> Callable[..., Tensor]: ...

    @property
    def weighted_sum(self) -> Callable[..., Tensor]: ...


def _memory(x: Tensor) -> NDArray[Any]:
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def add_norm(ops: Ops, residual: Residual, norm: RowNorm) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    x_TD, update_TD = residual
    if update_TD is None:
        return x_TD, ops.rms_norm(x_TD, norm.weight, norm.eps)
    return ops.add_rms_norm(x_TD, update_TD, norm.weight, norm.eps)


def attention_sublayer(
    ops: Ops, residual: Residual, norm: RowNorm, heads: GroupedHeads, step: Step
) -> tuple[Tensor, Tensor]:
    """The residual after attention. T is at least 1. ``ops`` is the column."""
    x_TD, normed_TD = add_norm(ops, residual, norm)
    qkv_TXE = ops.linear(normed_TD, heads.qkv.weight, heads.qkv.bias).unflatten(-1, (-1, heads.dim))
    batch = step.batch
    q_THE = ops.norm_rotate_and_write(
        qkv_TXE, heads.norms, step.rotation, step.cache, batch.write_T, heads.interleaved
    )
    out_THE = ops.attend(q_THE, *step.cache, batch, heads.dim**-0.5)
    return x_TD, ops.linear(out_THE.flatten(1), heads.out.weight, heads.out.bias)


def choose_experts(
    ops: Ops, residual: Residual, norm: RowNorm, gate: GateWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum so far, its norm, and the experts that the gate chooses for that: ids_TC int64 and
    weights_TC float32.
    """
    x_TD, normed_TD = add_norm(ops, residual, norm)
    return x_TD, normed_TD, *ops.gate(normed_TD, gate.weight, gate.bias, gate.routing)


def experts_sublayer(
    ops: Ops, residual: Residual, norm: RowNorm, gate: GateWeights, weights: tuple[Any, Any], here: Here
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum so far, its norm, and what the experts that the gate chooses make of that, weighted.
    ``weights``: w13 and w2, as ``experts`` of the column reads them.
    """

    def run(x_TD: Tensor, slots_M: Tensor) -> Tensor:
        return ops.experts(x_TD, here.rows_M, slots_M, *weights, here.counts_S)

    return route_through(ops, residual, norm, gate, here.slots_L, run)


def route_through(
    ops: Ops,
    residual: Residual,
    norm: RowNorm,
    gate: GateWeights,
    slots_L: Tensor,
    run: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """``experts_sublayer`` with any experts: ``run`` takes x_TD and slots_M and returns y_MD,
    unweighted.
    """
    x_TD, normed_TD, ids_TC, weights_TC = choose_experts(ops, residual, norm, gate)
    y_MD = run(normed_TD, slots_L.index_select(0, ids_TC.view(-1)))
    return x_TD, normed_TD, ops.weighted_sum(y_MD.view(*ids_TC.shape, y_MD.shape[1]), weights_TC)
