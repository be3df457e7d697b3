"""The decoder that all families share: embedding, pre-norm layers of attention and MLP or experts,
output head.

Parameters carry their Hugging Face names, with three exceptions: matrices that read the same input
are merged into one (``MergedLinear``), the experts of a layer are stacked by slot, and a family may
rename (``CheckpointNames``). ``checkpoint_tensors`` and ``expert_layers`` map the tensors of a
checkpoint to their places.

T tokens  R sampled rows  D hidden  V vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
from torch import Tensor, nn

from ...kernels.reference.column import Reference
from ...kernels.reference.four_bit import FourBit
from ...kernels.reference.paged import PagedBatch
from ...kernels.reference.rope import Angles, angles, frequencies, query_growth, yarn_frequencies
from ...kernels.reference.sampling import SamplingParams
from ...kernels.reference.sublayers import Projection, Residual, RowNorm
from ...moe.dispatch.dispatcher import Dispatcher
from ...moe.experts import AnyExperts, Experts, FourBitExperts, Fp8Experts
from ...moe.layer import MoELayer
from ...parallel.linear import Backend, Linear, Matrix, MergedLinear, SwiGLU
from ...parallel.logits import SplitLogits
from ...parallel.stages import PipelineStage
from ...parallel.tensor import Shard
from ...parallel.vocabulary import Embedding, OutputHead
from .attention import Attention, LayerCache
from .config import ModelConfig, RopeConfig
from .norm import Norm

_LAYER = re.compile(r"model\.layers\.\d+\.")
_Op = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ExpertLayer:
    """The expert slots of one MoE layer. ``name`` is the prefix of its tensors in a checkpoint, up
    to the expert's number; ``projections`` are the names of gate, up and down matrices there.

    w13_SFD [S, 2F, D]: gate rows, then up rows. w2_SDF [S, D, F]. ``scales`` of both, where they
    are FP8 (``kernels.reference.fp8.Quantised``); ``four_bit``: both, where they are in 4 bits.
    ``biases`` of both, [S, 2F] and [S, D], where they have some.
    """

    name: str
    projections: tuple[str, str, str]
    w13_SFD: Tensor
    w2_SDF: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    four_bit: tuple[FourBit, FourBit] | None = None
    biases: tuple[Tensor, Tensor] | None = None


class DenseMLP(SwiGLU):
    """A SwiGLU block in place of experts, with the norm before it. The norm and the first product
    are one op where nothing is gathered between them.
    """

    def __init__(self, hidden: int, width: int, backend: Backend[Reference], norm: RowNorm) -> None:
        super().__init__(hidden, width, backend, member=backend.splits.dense)
        self._ops = backend.ops
        self._norm = norm
        self._split = backend.splits.dense
        self._bind()

    def _bind(self) -> None:
        self._gate_up = Projection(*self.gate_up_proj.operands)

    def pack(self) -> None:
        super().pack()
        self._bind()

    def forward(self, residual: Residual) -> Residual:
        split, entered = self._split, self._split.enter(residual)
        if split.gathers:
            x_TD, normed_TD = self._ops.add_norm(entered, self._norm)
            update_TD = split.sum_of(self.swiglu, normed_TD)
        else:
            x_TD, gate_up_TX = self._ops.norm_project(entered, self._norm, self._gate_up)
            update_TD = split.sum_of(self.after_gate_up, gate_up_TX)
        return split.leave((x_TD, update_TD), len(residual[0]))


class DecoderLayer(nn.Module):
    """Attention, then MLP or experts. Each maps one *residual* (``kernels.reference.sublayers``) to
    the next and begins with a norm: ``input_layernorm`` and ``post_attention_layernorm``.
    """

    def __init__(self, norms: tuple[Norm, Norm], attention: Attention, mlp: MoELayer | DenseMLP) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = norms
        self.self_attn = attention
        self.mlp = mlp
        # In a tuple they are found at once. Finding a submodule takes 0.5 us.
        self._sublayers = attention, mlp

    def pack(self) -> None:
        self.self_attn.pack()
        self.mlp.pack()

    def forward(self, residual: Residual, rotation: Angles, batch: PagedBatch, cache: LayerCache) -> Residual:
        attention, mlp = self._sublayers
        if len(residual[0]):
            residual = attention(residual, rotation, batch, cache)
        return cast(Residual, mlp(residual))


class _Stack(nn.Module):
    """The part that a checkpoint names ``model``: everything but the output head. The first stage
    embeds, the last has the norm, and the embedding too where the head shares its weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: PipelineStage,
        layers: dict[int, DecoderLayer],
        backend: Backend[Reference],
    ) -> None:
        super().__init__()
        self.embed_tokens: Embedding | None = None
        if stage.first or (stage.last and config.tie_embeddings):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden, backend)
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self.norm = Norm(config.hidden, config.norm_eps, backend) if stage.last else None


class Model(nn.Module):
    """The layers of ``stage`` of a decoder with attention made by ``attention_of``, and ``ops``,
    the column it computes with. Weights are uninitialised until loaded.

    ``cache`` holds a tuple of tensors per layer, [num_pages * page_size, *shape] for each shape of
    ``config.kv_shapes(kv_format, layer)``. Experts in 4 bits stay so.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: PipelineStage,
        dispatcher: Dispatcher,
        backend: Backend[Reference],
        attention_of: Callable[[ModelConfig, Backend[Reference], RowNorm, int], Attention],
    ) -> None:
        super().__init__()
        self.config = config
        self.stage = stage
        self.ops, self.dtype, self._split = backend.ops, backend.dtype, backend.tensor
        self._moe_layers = [layer for layer in config.moe_layers if layer in stage.layers]
        numbers = {layer: number for number, layer in enumerate(self._moe_layers)}
        make_experts: Callable[..., AnyExperts] = Experts if backend.fp8_block is None else Fp8Experts
        if config.four_bit is not None:
            make_experts = partial(FourBitExperts, format=config.four_bit.format)

        def mlp_of(layer: int, norm: RowNorm) -> MoELayer | DenseMLP:
            if layer in numbers:
                return MoELayer(config.moe, numbers[layer], dispatcher, backend, norm, make_experts)
            return DenseMLP(config.hidden, config.dense_width, backend, norm)

        layers: dict[int, DecoderLayer] = {}
        for layer in stage.layers:
            first = Norm(config.hidden, config.norm_eps, backend)
            second = Norm(config.hidden, config.norm_eps, backend)
            attention = attention_of(config, backend, first.row, layer)
            layers[layer] = DecoderLayer((first, second), attention, mlp_of(layer, second.row))
        self.model = _Stack(config, stage, layers, backend)
        self.lm_head: OutputHead | None = None
        if stage.last and not config.tie_embeddings:
            self.lm_head = OutputHead(config.hidden, config.vocab_size, backend)
        # Plain attributes for a step: finding a submodule or its parameter takes 0.5 us.
        self._layers = tuple(layers.values())
        self._embed, self._norm, self._head = self._ends()
        self._frequencies_F = _frequencies(config.rope).to(backend.device)
        self._magnitude = config.rope.yarn.magnitude if config.rope.yarn else 1.0
        self._growth = config.rope.growth

    def forward(
        self, inputs: Tensor, positions_T: Tensor, batch: PagedBatch, cache: Sequence[LayerCache]
    ) -> Tensor:
        """inputs, positions_T int64 -> hidden_TD, before the last norm. ``inputs`` are tokens_T
        int64, or after the first stage hidden_TD of the one before. Every MoE layer is called even
        where T is 0.
        """
        x_TD = self._embed(inputs)
        rotation = angles(positions_T, self._frequencies_F, self._magnitude)
        if self._growth is not None:
            growth_T1 = query_growth(positions_T, self._growth.beta, self._growth.length)
            rotation = replace(rotation, growth_T1=growth_T1)
        residual: Residual = x_TD, None
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            residual = layer(residual, rotation, batch, layer_cache)
        x_TD, update_TD = residual
        return x_TD if update_TD is None else x_TD + update_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """Float32 [R, V] for rows of what ``forward`` returned, the parts of a split vocabulary
        side by side.
        """
        return self._head(self._norm(hidden_RD)).float()

    def likeliest(self, hidden_RD: Tensor) -> Tensor:
        """The most likely token of every row, int64 [R]; of equal ones the lowest. Where the
        vocabulary is split, the logits stay where they are.
        """
        return self.most_likely(self.own_logits(hidden_RD))

    def most_likely(self, logits: SplitLogits) -> Tensor:
        """``likeliest`` of logits."""
        logits_RP = logits.own_RP
        ids_R = self.ops.sample(logits_RP, SamplingParams.greedy(len(logits_RP)), np.zeros(len(logits_RP)))
        values_R = logits_RP.gather(1, ids_R[:, None])[:, 0]
        return self._split.most(values_R, ids_R + logits.first)

    def own_logits(self, hidden_RD: Tensor) -> SplitLogits:
        """As ``logits``, where the vocabulary is split: they stay where they are."""
        head = self.lm_head if self.lm_head is not None else self.model.embed_tokens
        assert head is not None, "no head in this stage"
        own_RP = head.own_logits(self._norm(hidden_RD))
        return SplitLogits(own_RP, head.first, self.config.vocab_size, self._split)

    def _ends(self) -> tuple[_Op, _Op, _Op]:
        """The embedding before the layers, norm and head behind them; the identity where another
        stage has them.
        """
        embedding, norm = self.model.embed_tokens, self.model.norm
        embed: _Op = embedding.embed if self.stage.first and embedding is not None else _pass_on
        if norm is None:
            return embed, _pass_on, _pass_on
        if self.lm_head is not None:
            return embed, norm.forward, self.lm_head.head
        assert embedding is not None, "the head shares its weight"
        return embed, norm.forward, embedding.head

    def pack(self) -> None:
        """Brings matrices into the form that this device reads fastest. Once, after loading:
        afterwards the tensors of a checkpoint have no place here.
        """
        for layer in self._layers:
            layer.pack()
        if self.lm_head is not None:
            self.lm_head.pack()

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Maps checkpoint names to the tensors (often views) they are copied into, for everything
        but routed experts.
        """
        return {self._checkpoint_name(name): tensor for name, tensor in self._own_tensors().items()}

    def checkpoint_shards(self) -> dict[str, Shard]:
        """The part of a checkpoint's tensor that is here, by the names of ``checkpoint_tensors``,
        for those of matrices and attention.
        """
        return {
            self._checkpoint_name(f"{owner}.{part}"): shard
            for owner, module in self._shared_out()
            for part, shard in module.shards().items()
        }

    def checkpoint_scales(self) -> dict[str, Tensor]:
        """The scales of matrices held in FP8, by the names of ``checkpoint_tensors``."""
        return {
            self._checkpoint_name(f"{owner}.{part}"): scales
            for owner, module in self._shared_out()
            if isinstance(module, Linear)
            for part, scales in module.scales_of_tensors().items()
        }

    def linear_names(self) -> set[str]:
        """The names of ``checkpoint_shards`` that are of linear layers."""
        return {
            self._checkpoint_name(f"{owner}.{part}")
            for owner, module in self._shared_out()
            if isinstance(module, Linear)
            for part in module.shards()
        }

    def widen(self, stored_in_fp8: Callable[[str], bool]) -> None:
        """Linear layers of which not all matrices are stored in FP8 are held in the model's dtype.
        ``stored_in_fp8`` takes a checkpoint name. Before loading.
        """
        for owner, module in self._shared_out():
            if isinstance(module, Linear) and module.scales is not None:
                names = [self._checkpoint_name(f"{owner}.{part}") for part in module.scales_of_tensors()]
                if not all(map(stored_in_fp8, names)):
                    module.widen()

    def _shared_out(self) -> Iterator[tuple[str, Matrix | Attention]]:
        """All modules with parts of a checkpoint's tensors, each with the prefix of their names."""
        for name, module in self.named_modules():
            if isinstance(module, Matrix | Attention):
                yield (name.rpartition(".")[0] if isinstance(module, MergedLinear) else name), module

    def _own_tensors(self) -> dict[str, Tensor]:
        """``checkpoint_tensors`` by our names."""
        tensors: dict[str, Tensor] = {}
        merged: list[str] = []
        for name, module in self.named_modules():
            if isinstance(module, MergedLinear):
                merged.append(name + ".")
                owner = name.rpartition(".")[0]
                tensors |= {f"{owner}.{part}": view for part, view in module.tensors().items()}
        for name, tensor in self.state_dict().items():
            elsewhere = name.startswith(tuple(merged)) or name.endswith(".scales")
            if not elsewhere and ".mlp.experts." not in name:
                tensors[name] = tensor
        return tensors

    def expert_layers(self) -> list[ExpertLayer]:
        """The routed experts of this model's MoE layers, in order."""
        return [self.expert_layer(number, experts) for number, experts in enumerate(self.experts())]

    def experts(self) -> list[AnyExperts]:
        """The modules of routed experts, by MoE layer of this model."""
        return [
            cast(MoELayer, self._layers[layer - self.stage.layers.start].mlp).experts
            for layer in self._moe_layers
        ]

    def expert_layer(self, number: int, experts: AnyExperts) -> ExpertLayer:
        """``experts`` as the slots of MoE layer ``number`` of this model."""
        name = self._checkpoint_name(f"model.layers.{self._moe_layers[number]}.mlp.experts")
        scales = None
        if isinstance(experts, Fp8Experts):
            scales = experts.w13_scales.data, experts.w2_scales.data
        four_bit = experts.weights if isinstance(experts, FourBitExperts) else None
        tensors = experts.w13.data, experts.w2.data
        biases = None if isinstance(experts, Fp8Experts) else experts.form.biases
        return ExpertLayer(name, self.config.names.projections, *tensors, scales, four_bit, biases)

    def _checkpoint_name(self, name: str) -> str:
        layer = _LAYER.match(name)
        return layer[0] + self.config.names.of(name[layer.end() :]) if layer else name


def _pass_on(x: Tensor) -> Tensor:
    return x


def _frequencies(rope: RopeConfig) -> Tensor:
    if rope.yarn is None:
        return frequencies(rope.dim, rope.theta)
    yarn = rope.yarn
    return yarn_frequencies(
        rope.dim, rope.theta, yarn.factor, yarn.original_length, yarn.beta_fast, yarn.beta_slow, yarn.truncate
    )
