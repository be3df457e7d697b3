"""The decoder that all families share: embedding, pre-norm layers of attention and MLP or experts,
output head.

Parameters carry their Hugging Face names, except where matrices that read the same input are merged
into one (``MergedLinear``), where the experts of a layer are stacked by slot and where the family
says so (``CheckpointNames``); ``checkpoint_tensors`` and ``expert_layers`` say where each tensor of
a checkpoint goes.

T tokens  R sampled rows  D hidden  V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles, angles, frequencies, yarn_frequencies
from ...kernels.reference.sublayers import Residual, RowNorm, add_norm
from ...kernels.table import Ops
from ...moe.dispatch.dispatcher import Dispatcher
from ...moe.experts import Experts, Fp8Experts
from ...moe.layer import MoELayer, SharedExperts
from .config import ModelConfig, RopeConfig

LayerCache = tuple[Tensor, ...]

_LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True)
class Placing:
    """Where and how the parameters of a model are held, and the ops that compute with them.
    ``fp8_experts``: experts stay in the FP8 of their checkpoint.
    """

    dtype: torch.dtype
    device: torch.device
    ops: Ops
    fp8_experts: bool = False

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter; the weight loader fills it."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device), requires_grad=False)


@dataclass(frozen=True)
class ExpertLayer:
    """The expert slots of one MoE layer; ``name`` is the prefix of its tensors in a checkpoint, up
    to the expert's number, and ``projections`` are what gate, up and down matrices are called
    there.

    w13_SFD [S, 2F, D]: gate rows, then up rows. w2_SDF [S, D, F]. ``scales`` of both, where they
    are FP8 (``kernels.fp8.Quantised``).
    """

    name: str
    projections: tuple[str, str, str]
    w13_SFD: Tensor
    w2_SDF: Tensor
    scales: tuple[Tensor, Tensor] | None = None


class Norm(nn.Module):
    """RMS norm over ``dim`` values."""

    def __init__(self, dim: int, eps: float, placing: Placing) -> None:
        super().__init__()
        self.weight = placing.parameter(dim)
        self.row = RowNorm(self.weight, eps)
        self._ops = placing.ops

    def forward(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self.weight, self.row.eps)


class Matrix(nn.Module):
    """A weight [rows, columns] that others read as it is."""

    def __init__(self, columns: int, rows: int, placing: Placing) -> None:
        super().__init__()
        self.weight = placing.parameter(rows, columns)


class Linear(Matrix):
    """x W^T + b, with weight [rows, columns], which nobody else reads once it is packed."""

    def __init__(self, columns: int, rows: int, placing: Placing, bias: bool = False) -> None:
        super().__init__(columns, rows, placing)
        self.bias = placing.parameter(rows) if bias else None
        self._ops = placing.ops

    def pack(self) -> None:
        self.weight = nn.Parameter(self._ops.pack(self.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._ops.linear(x, self.weight, self.bias)


class MergedLinear(Linear):
    """Several matrices that read the same input, stacked by rows: ``parts`` maps their names to
    their rows, in order.

    ``without_bias`` are parts whose bias stays zero because a checkpoint has none for them.
    """

    def __init__(
        self,
        columns: int,
        parts: dict[str, int],
        placing: Placing,
        bias: bool = False,
        without_bias: Sequence[str] = (),
    ) -> None:
        super().__init__(columns, sum(parts.values()), placing, bias)
        self._parts = parts
        self._without_bias = without_bias
        if self.bias is not None:
            self.bias.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Views by the names they have in a checkpoint, relative to the module this one is in."""
        views: dict[str, Tensor] = {}
        start = 0
        for name, rows in self._parts.items():
            views[f"{name}.weight"] = self.weight.data[start : start + rows]
            if self.bias is not None and name not in self._without_bias:
                views[f"{name}.bias"] = self.bias.data[start : start + rows]
            start += rows
        return views


class DenseMLP(nn.Module):
    """A SwiGLU block in place of experts."""

    def __init__(self, hidden: int, width: int, placing: Placing) -> None:
        super().__init__()
        self.gate_up_proj = MergedLinear(hidden, {"gate_proj": width, "up_proj": width}, placing)
        self.down_proj = Linear(width, hidden, placing)
        self._ops = placing.ops

    def forward(self, residual: Residual, norm: RowNorm) -> tuple[Tensor, Tensor]:
        x_TD, normed_TD = add_norm(self._ops, residual, norm)
        return x_TD, cast(Tensor, self.down_proj(self._ops.silu_mul(self.gate_up_proj(normed_TD))))


class Attention(Protocol):
    """The attention of one layer; T is at least 1."""

    def __call__(
        self, residual: Residual, norm: RowNorm, rotation: Angles, batch: PagedBatch, cache: LayerCache
    ) -> Residual: ...


class DecoderLayer(nn.Module):
    """Attention, then MLP or experts, each on the normalised sum of everything before it, the
    *residual* (``kernels.sublayers``).
    """

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module, placing: Placing) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden, config.norm_eps, placing)
        self.self_attn = attention
        self.post_attention_layernorm = Norm(config.hidden, config.norm_eps, placing)
        self.mlp = mlp

    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        if len(residual[0]):
            residual = cast(Attention, self.self_attn)(
                residual, self.input_layernorm.row, rotation, batch, cache
            )
        return cast(Residual, self.mlp(residual, self.post_attention_layernorm.row))


class _Stack(nn.Module):
    """What a checkpoint names ``model``: everything but the output head."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer], placing: Placing) -> None:
        super().__init__()
        self.embed_tokens = Matrix(config.hidden, config.vocab_size, placing)
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.hidden, config.norm_eps, placing)


class Model(nn.Module):
    """A decoder with attention made by ``attention_of``, and ``ops``, the column it computes with.
    Weights are uninitialised until loaded.

    ``cache`` holds a tuple of tensors per layer, [num_pages * page_size, *shape] for each shape of
    ``config.kv_shapes(kv_format)``.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        placing: Placing,
        attention_of: Callable[[ModelConfig, Placing], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = placing.ops
        numbers = {layer: number for number, layer in enumerate(config.moe_layers)}
        layers = []
        for layer in range(config.num_layers):
            mlp: nn.Module
            if layer in numbers:
                mlp = MoELayer(
                    config.moe,
                    numbers[layer],
                    dispatcher,
                    placing.dtype,
                    placing.device,
                    placing.ops,
                    placing.fp8_experts,
                )
            else:
                mlp = DenseMLP(config.hidden, config.dense_width, placing)
            layers.append(DecoderLayer(config, attention_of(config, placing), mlp, placing))
        self.model = _Stack(config, layers, placing)
        self.lm_head = None if config.tie_embeddings else Linear(config.hidden, config.vocab_size, placing)
        self._frequencies_F = _frequencies(config.rope).to(placing.device)
        self._magnitude = config.rope.yarn.magnitude if config.rope.yarn else 1.0

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, batch: PagedBatch, cache: Sequence[LayerCache]
    ) -> Tensor:
        """tokens_T, positions_T int64 -> hidden_TD, before the last norm. Every MoE layer is called
        even where T is 0.
        """
        x_TD = F.embedding(tokens_T, self.model.embed_tokens.weight)
        rotation = angles(positions_T, self._frequencies_F, self._magnitude)
        residual: Residual = x_TD, None
        for layer, layer_cache in zip(self.model.layers, cache, strict=True):
            residual = layer(residual, rotation, batch, layer_cache)
        x_TD, update_TD = residual
        return x_TD if update_TD is None else x_TD + update_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 [R, V] for rows of what ``forward`` returned."""
        normed_RD = self.model.norm(hidden_RD)
        if self.lm_head is None:
            return F.linear(normed_RD, self.model.embed_tokens.weight).float()
        return cast(Tensor, self.lm_head(normed_RD)).float()

    def pack(self) -> None:
        """Brings matrices into the form that this device reads fastest. Once, after loading: no
        tensor of a checkpoint has a place here any more.
        """
        for module in self.modules():
            if isinstance(module, Linear | Experts | SharedExperts):
                module.pack()
        for module in (
            self.modules()
        ):  # found at once, where nn.Module searches three tables: 0.04 us instead of 0.5, 25 times a layer
            module.__dict__.update(module._parameters)
            module.__dict__.update(module._modules)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Checkpoint name -> the tensor (often a view) it is copied into, for everything but routed
        experts.
        """
        return {self._checkpoint_name(name): tensor for name, tensor in self._own_tensors().items()}

    def _own_tensors(self) -> dict[str, Tensor]:
        """The same by our names."""
        tensors: dict[str, Tensor] = {}
        merged: list[str] = []
        for name, module in self.named_modules():
            if isinstance(module, MergedLinear):
                merged.append(name + ".")
                owner = name.rpartition(".")[0]
                tensors |= {f"{owner}.{part}": view for part, view in module.tensors().items()}
        for name, tensor in self.state_dict().items():
            if not name.startswith(tuple(merged)) and ".mlp.experts." not in name:
                tensors[name] = tensor
        return tensors

    def expert_layers(self) -> list[ExpertLayer]:
        """The routed experts of this model's MoE layers, in order."""
        found = []
        for layer in self.config.moe_layers:
            experts = cast(MoELayer, cast(DecoderLayer, self.model.layers[layer]).mlp).experts
            name = self._checkpoint_name(f"model.layers.{layer}.mlp.experts")
            scales = (
                (experts.w13_scales.data, experts.w2_scales.data) if isinstance(experts, Fp8Experts) else None
            )
            found.append(
                ExpertLayer(name, self.config.names.projections, experts.w13.data, experts.w2.data, scales)
            )
        return found

    def _checkpoint_name(self, name: str) -> str:
        layer = _LAYER.match(name)
        return layer[0] + self.config.names.of(name[layer.end() :]) if layer else name


def _frequencies(rope: RopeConfig) -> Tensor:
    if rope.yarn is None:
        return frequencies(rope.dim, rope.theta)
    yarn = rope.yarn
    return yarn_frequencies(
        rope.dim, rope.theta, yarn.factor, yarn.original_length, yarn.beta_fast, yarn.beta_slow, yarn.truncate
    )
