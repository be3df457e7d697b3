"""Linear layers and the backend that holds their weights. Sharding belongs here and nowhere else.

Weights are uninitialised until a checkpoint is loaded. Then ``pack`` brings them into the form that
the device reads fastest.

A layer that is split over a tensor group is made with the sizes of its part. ``shards`` says which
part of each of a checkpoint's tensors that is.

T tokens  D hidden  F width of a SwiGLU block
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import UNSPLIT_LAYERS, LayerSplits
from .tensor import UNSPLIT, Member, Shard, TensorSplit, shard_of


class LinearOps(Protocol):
    """The ops that linear layers call. ``pack`` yields a weight as ``linear`` reads it fastest;
    ``linear_fp8`` takes one in FP8 with a scale per block; ``silu_mul`` maps [..., 2F], gate first,
    to silu(gate) * up.
    """

    def linear(self, x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor: ...

    def linear_fp8(
        self, x: Tensor, weight_ND: Tensor, bias_N: Tensor | None, scales_GG: Tensor
    ) -> Tensor: ...

    def pack(self, weights: Tensor) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...


_Op = Callable[[Tensor], Tensor]
OpsT_co = TypeVar("OpsT_co", bound=LinearOps, covariant=True)


@dataclass(frozen=True)
class Backend(Generic[OpsT_co]):
    """The type and the device of a model's parameters, the ops that compute with them, and how
    layers are split. ``fp8_block``: linear layers stay in the FP8 of their checkpoint, which has a
    scale for so many rows and columns (arXiv 2412.19437, section 3.3); None: none does.
    """

    dtype: torch.dtype
    device: torch.device
    ops: OpsT_co
    splits: LayerSplits = UNSPLIT_LAYERS
    fp8_block: int | None = None

    @property
    def tensor(self) -> TensorSplit:
        """The split of attention and of the vocabulary."""
        return self.splits.tensor

    def parameter(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """An uninitialised parameter; the weight loader fills it."""
        values = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        return nn.Parameter(values, requires_grad=False)


_Operands = tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]

WHOLE = Shard()


class Matrix(nn.Module):
    """A weight [rows, columns] that is read as it is; ``shard`` of a checkpoint's."""

    def __init__(
        self,
        columns: int,
        rows: int,
        backend: Backend[LinearOps],
        shard: Shard = WHOLE,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = backend.parameter(rows, columns, dtype=dtype)
        self._shard = shard

    def shards(self) -> dict[str, Shard]:
        """The parts of a checkpoint's tensors that are here, by parameter."""
        return {"weight": self._shard}


class Linear(Matrix):
    """x W^T + b, with weight [rows, columns]. Nothing else reads the weight once it is packed.

    Where the columns are split, the result is a summand: ``TensorSplit.total`` adds them up. The
    weight is in FP8 where it has ``scales`` [ceil(rows / block), ceil(columns / block)]; a part
    that begins inside a block of the checkpoint is not.
    """

    def __init__(
        self,
        columns: int,
        rows: int,
        backend: Backend[LinearOps],
        bias: bool = False,
        shard: Shard = WHOLE,
    ) -> None:
        block = backend.fp8_block
        in_fp8 = block is not None and self._begins_with_a_block((rows, columns), shard, block)
        super().__init__(columns, rows, backend, shard, torch.float8_e4m3fn if in_fp8 else None)
        self.bias = backend.parameter(rows) if bias else None
        self._backend = backend
        self.scales: nn.Parameter | None = None
        if in_fp8 and block is not None:
            self.scales = backend.parameter(-(-rows // block), -(-columns // block), dtype=torch.float32)
        self._bind()

    def _bind(self) -> None:
        # In a tuple they are plain attributes. Finding a module's parameter takes 0.5 us.
        self.operands: _Operands = self.weight, self.bias
        self._product: Callable[..., Tensor] = self._backend.ops.linear
        if self.scales is not None:
            self.operands = self.weight, self.bias, self.scales
            self._product = self._backend.ops.linear_fp8

    def _begins_with_a_block(self, shape: tuple[int, int], shard: Shard, block: int) -> bool:
        return _cut_at_blocks(shape, shard, block)

    def widen(self) -> None:
        """Holds the weight in the backend's dtype, before it is loaded."""
        self.scales = None
        self.weight = self._backend.parameter(*self.weight.shape)
        self._bind()

    def scales_of_tensors(self) -> dict[str, Tensor]:
        """The scales of a checkpoint's tensors that are here in FP8, by parameter."""
        return {} if self.scales is None else {"weight": self.scales.data}

    def shards(self) -> dict[str, Shard]:
        if self.bias is None:
            return super().shards()
        bias = self._shard
        if bias.dim == 1 and bias.parts > 1:
            bias = Shard(index=bias.index, added_once=True)  # the sum holds it once
        return {**super().shards(), "bias": bias}

    def pack(self) -> None:
        if self.scales is None:
            self.weight = nn.Parameter(self._backend.ops.pack(self.weight), requires_grad=False)
            self._bind()

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, *self.operands)


class MergedLinear(Linear):
    """Several matrices that read the same input, stacked by rows: ``parts`` maps their names to
    their rows, in order.

    A checkpoint has no bias for the parts ``without_bias``; theirs stays zero. ``part_shards``: the
    parts whose rows are split.
    """

    def __init__(
        self,
        columns: int,
        parts: dict[str, int],
        backend: Backend[LinearOps],
        bias: bool = False,
        without_bias: Sequence[str] = (),
        part_shards: Mapping[str, Shard] | None = None,
    ) -> None:
        self._parts = parts
        self._part_shards = part_shards or {}
        super().__init__(columns, sum(parts.values()), backend, bias)
        self._without_bias = without_bias
        if self.bias is not None:
            self.bias.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Views by the names they have in a checkpoint, relative to the module this one is in."""
        views: dict[str, Tensor] = {}
        for name, (start, rows) in self._places().items():
            views[f"{name}.weight"] = self.weight.data[start : start + rows]
            if self.bias is not None and name not in self._without_bias:
                views[f"{name}.bias"] = self.bias.data[start : start + rows]
        return views

    def scales_of_tensors(self) -> dict[str, Tensor]:
        """The scales of the parts, by the names of ``tensors``."""
        block = self._backend.fp8_block
        if self.scales is None or block is None:
            return {}
        return {
            f"{name}.weight": self.scales.data[start // block : -(-(start + rows) // block)]
            for name, (start, rows) in self._places().items()
        }

    def _places(self) -> dict[str, tuple[int, int]]:
        """First row and number of rows of every part."""
        ends = itertools.accumulate(self._parts.values())
        return {name: (end - rows, rows) for (name, rows), end in zip(self._parts.items(), ends, strict=True)}

    def _begins_with_a_block(self, shape: tuple[int, int], shard: Shard, block: int) -> bool:
        return all(
            start % block == 0 and _cut_at_blocks((rows, shape[1]), self._part_shards.get(name, WHOLE), block)
            for name, (start, rows) in self._places().items()
        )

    def shards(self) -> dict[str, Shard]:
        """The parts here of a checkpoint's tensors, by the names of ``tensors``."""
        names = self.tensors()
        return {name: self._part_shards.get(name.rpartition(".")[0], WHOLE) for name in names}


def _cut_at_blocks(shape: tuple[int, int], shard: Shard, block: int) -> bool:
    """Whether every part of this shape begins with a block."""
    return shard.parts == 1 or shape[shard.dim] % block == 0


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202. If ``merged``, gate and up are one product and
    silu and multiplication one op; otherwise they are single ops, each rounded to the dtype.

    ``member``: of the ranks that compute a part of ``width`` each; the result is a summand then.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        backend: Backend[LinearOps],
        merged: bool = True,
        member: Member = UNSPLIT,
    ) -> None:
        super().__init__()
        rows = shard_of(member, 0)
        columns = shard_of(member, 1)
        width //= rows.parts
        self.down_proj = Linear(width, hidden, backend, shard=columns)
        self._down = self.down_proj.forward
        self._inputs: tuple[Linear, ...]
        self._inner: _Op
        if merged:
            self.gate_up_proj = MergedLinear(
                hidden,
                {"gate_proj": width, "up_proj": width},
                backend,
                part_shards={"gate_proj": rows, "up_proj": rows},
            )
            self._inputs = (self.gate_up_proj,)
            self._silu_mul = backend.ops.silu_mul
            self._inner = functools.partial(_merged, self.gate_up_proj.forward, self._silu_mul)
        else:
            self.gate_proj = Linear(hidden, width, backend, shard=rows)
            self.up_proj = Linear(hidden, width, backend, shard=rows)
            self._inputs = self.gate_proj, self.up_proj
            self._inner = functools.partial(_separate, self.gate_proj.forward, self.up_proj.forward)

    def pack(self) -> None:
        for matrix in (*self._inputs, self.down_proj):
            matrix.pack()

    def swiglu(self, x_TD: Tensor) -> Tensor:
        return self._down(self._inner(x_TD))

    def after_gate_up(self, gate_up_TX: Tensor) -> Tensor:
        """``swiglu`` from the product with gate and up on, where they are merged."""
        return self._down(self._silu_mul(gate_up_TX))


def _merged(gate_up: _Op, silu_mul: _Op, x_TD: Tensor) -> Tensor:
    return silu_mul(gate_up(x_TD))


def _separate(gate: _Op, up: _Op, x_TD: Tensor) -> Tensor:
    return F.silu(gate(x_TD)) * up(x_TD)
