"""Builds a model from its description."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.formats.fp8_format import BLOCK
from ...kernels.reference.column import Reference
from ...kernels.reference.sublayers import RowNorm
from ...kernels.table import Column, column_for, ops_of
from ...moe.dispatch.dispatcher import Dispatcher
from ...parallel.dense import UNSPLIT_LAYERS, LayerSplits
from ...parallel.linear import Backend
from ...parallel.stages import PipelineStage, whole_model
from .attention import Attention
from .config import MlaConfig, ModelConfig
from .decoder import Model
from .grouped_attention import GroupedAttention
from .latent_attention import LatentAttention


@dataclass(frozen=True)
class ModelPart:
    """The layers to build, and how they are split."""

    stage: PipelineStage
    splits: LayerSplits = UNSPLIT_LAYERS


def build_model(
    config: ModelConfig,
    dispatcher: Dispatcher,
    dtype: torch.dtype,
    device: torch.device,
    column: Column | Reference | None = None,
    keep_fp8: bool = False,
    part: ModelPart | None = None,
) -> Model:
    """The model of ``config``, its weights uninitialised. The dispatcher's placement decides which
    experts have a slot. ``column``: of the op table, or ops; by default those that serve on the
    device. ``keep_fp8``: experts and linear layers stay in the FP8 of their checkpoint. ``part``:
    by default the whole model.
    """
    part = part or ModelPart(whole_model(config.num_layers, config.moe_layers))
    block = BLOCK if keep_fp8 else None
    ops = column if isinstance(column, Reference) else ops_of(column or column_for(device))
    backend = Backend(dtype, device, ops, part.splits, block)
    return Model(config, part.stage, dispatcher, backend, _attention_of)


def _attention_of(config: ModelConfig, backend: Backend[Reference], norm: RowNorm, layer: int) -> Attention:
    window = config.window(layer)
    if isinstance(config.attention, MlaConfig):
        assert not window, "latent attention sees all positions"
        return LatentAttention(config, backend, norm, layer)
    return GroupedAttention(config, backend, norm, window)
